"""Likelihoods of many examples as numbers: their mean and its errors, one model against another, one data set against
another.

    difference     d_i = b_i - a_i of the same examples,    mean d +- t_{n-1, 0.975} s_d / sqrt(n)
    AUROC          P(a < b) + 1/2 P(a = b), the Mann-Whitney statistic over n m

The spread of d is that of the two models' disagreement, not that of the examples, which are harder or easier for both.

References:
  Student 1908, The Probable Error of a Mean; Hanley & McNeil 1982, The Meaning and Use of the Area under a Receiver
  Operating Characteristic Curve.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from jaxdiff import status
from jaxdiff.evaluation import baselines

Values = Mapping[str, np.ndarray]


class Estimate(NamedTuple):
  """The mean over examples, and what makes it uncertain; NaN where a number cannot be known.

  Attributes:
    examples: how many there are.
    failed: how many of them failed; they are in no mean.
    mean: over the others.
    standard_error_over_examples: of the mean.
    rms_standard_error_over_probes: of one example's value.
    rms_standard_error_over_dequantization: of one example's value.
  """

  examples: int
  failed: int
  mean: float
  standard_error_over_examples: float
  rms_standard_error_over_probes: float
  rms_standard_error_over_dequantization: float


class Difference(NamedTuple):
  """The mean of paired differences and its 95 % confidence interval."""

  mean: float
  low: float
  high: float


def failed(values: Values) -> Bool[np.ndarray, " n"]:
  """Which examples have no value: their solve did not succeed, or gave what is not finite."""
  return (values["code"] != status.SUCCESS) | ~np.isfinite(values["value"])


def estimate(values: Values) -> Estimate:
  """Mean and errors of per-example values: `value`, `standard_error`, `dequantization_error` and `code`, each [n]."""
  good = ~failed(values)
  mean, error = baselines.mean_and_error(values["value"][good]) if good.any() else (np.nan, np.nan)
  rms = lambda name: float(np.sqrt(np.mean(np.square(values[name][good], dtype=np.float64)))) if good.any() else np.nan
  count = int(np.count_nonzero(~good))
  return Estimate(len(good), count, mean, error, rms("standard_error"), rms("dequantization_error"))


def difference(first: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> Difference:
  """The mean of other - first over the same examples, with Student's interval: infinite for one example.

  Example:
    >>> low, high = difference(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 5.0]))[1:]
    >>> round(low, 3), round(high, 3)
    (-0.101, 2.768)
  """
  mean, error = baselines.mean_and_error(np.asarray(other, np.float64) - np.asarray(first, np.float64))
  if len(first) < 2:
    return Difference(mean, -np.inf, np.inf)
  half = float(stdtrit(len(first) - 1, 0.975)) * error
  return Difference(mean, mean - half, mean + half)


def auroc(low: Float[np.ndarray, " n"], high: Float[np.ndarray, " m"]) -> float:
  """How well a threshold tells the two sets apart: the probability that one of `high` exceeds one of `low`.

  1/2 if they are alike, 1 if all of `high` exceed all of `low`.

  Example:
    >>> auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.875
  """
  ordered = np.sort(low)
  below, not_above = (np.searchsorted(ordered, high, side) for side in ("left", "right"))
  return float((below + not_above).mean() / (2 * len(low)))
