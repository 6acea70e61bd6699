"""Judging: how well a model predicts a text, and how far another one is from it.

Texts, windows, figures, intervals and reports need numpy only; score.py runs models, with torch.
"""
