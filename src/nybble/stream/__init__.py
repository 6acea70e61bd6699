"""One layer in memory at a time: a batch of windows through a model that need not fit.

Scoring, the measuring of activations and calibration run on the one executor here.
"""
