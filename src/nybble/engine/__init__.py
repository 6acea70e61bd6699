"""Generating: requests in, tokens out; many at once, each as though it were alone."""
