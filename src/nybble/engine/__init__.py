"""Generating: requests in, tokens out. Its first form serves one sequence at a time."""
