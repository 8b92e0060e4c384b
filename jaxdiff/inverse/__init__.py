"""Inverse problems: samples of p(x | y) for y = A x + noise, with a model of p(x) alone."""
