"""What a file is: checkpoint folders read and written, safetensors rule by rule.

Knows nothing of kernels, plans or model families.
"""
