"""What a network computes: one file per `model_type`, layers that they share, state, loading.

Torch begins here. One forward serves calibration, scoring and generation: a ragged batch of tokens
[T, H] between handles to per-sequence state.
"""
