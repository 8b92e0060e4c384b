"""Densities simple enough to fit in closed form, in bits per dimension of held-out integers: what a model must beat.

    uniform      every level equally likely: log2 L
    histogram    every dimension independent, its levels counted with one pseudo-count each
    gaussian     one Gaussian with full covariance of the dequantized integers n + u, u uniform on [0, 1)^d

The last is a density, so its bits are the upper bound of uniform dequantization, like those of a flow; the expectation
over u is taken in closed form.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer


class Bits(NamedTuple):
  """Mean over examples, in bits per dimension, and its standard error."""

  mean: float
  standard_error: float


def mean_and_error(values: Float[np.ndarray, " n"]) -> Bits:
  """Mean and standard error of the mean; the error of one example is NaN."""
  error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
  return Bits(float(np.mean(values)), float(error))


def uniform(levels: int) -> Bits:
  """Every level equally likely."""
  return Bits(float(np.log2(levels)), 0.0)


def histogram(train: Integer[np.ndarray, "m *d"], test: Integer[np.ndarray, "n *d"], levels: int) -> Bits:
  """Independent dimensions, each with the counts of its levels in the training set plus one.

  Args:
    train: integers 0..levels-1.
    test: integers 0..levels-1.
    levels: how many values there are.

  Example:
    >>> train = np.array([[0], [0], [1]])
    >>> round(histogram(train, np.array([[0], [1]]), levels=2).mean, 4)  # the mean of -log2 of 3/5 and 2/5
    1.0294
  """
  train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
  counts = np.stack([np.bincount(column, minlength=levels) for column in train.T]) + 1.0
  bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
  return mean_and_error(bits[np.arange(test.shape[1]), test].mean(axis=1))


def gaussian(train: Integer[np.ndarray, "m *d"], test: Integer[np.ndarray, "n *d"]) -> Bits:
  """One Gaussian of the mean and covariance of the training set, dequantized.

  u adds 1/2 to the mean and 1/12 to the variances, which keeps the covariance regular where a pixel never changes.

  Args:
    train: integers.
    test: integers.
  """
  train, test = (x.reshape(len(x), -1).astype(np.float64) for x in (train, test))
  dimension = train.shape[1]
  covariance = np.atleast_2d(np.cov(train, rowvar=False)) + np.eye(dimension) / 12
  away = np.linalg.solve(np.linalg.cholesky(covariance), (test - train.mean(axis=0)).T)
  square = np.sum(away**2, axis=0) + np.trace(np.linalg.inv(covariance)) / 12
  nats = 0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1])
  return mean_and_error(nats / (dimension * np.log(2)))
