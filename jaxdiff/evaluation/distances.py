"""Distances between two sets of examples: of known densities, or of their features [n, f].

    NLL gap              mean of -log p over the samples minus that over data                                        (1)
    sliced Wasserstein   SW_2 = (E_theta W_2(theta . x, theta . y)^2)^(1/2), theta uniform on the sphere             (2)
    Frechet distance     |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^(1/2) S_y S_x^(1/2))^(1/2))                           (3)
    kernel distance      MMD^2 of the kernel k(x, y) = (x . y / f + 1)^3, by its unbiased estimator                  (4)

(3) is the squared 2-Wasserstein distance of two Gaussians. Its estimate is biased upward, by more for fewer examples:
compare only values of equal n, and with the value between real sets of that n, the floor. (4) is unbiased at any n.

References:
  Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, eq. 6 (3).
  Binkowski et al. 2018, Demystifying MMD GANs, Section 4 (4).
  Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, eq. 1.5 (merging moments).
"""

import functools
import warnings
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

_ROWS = 2048  # rows of features that are worked on at a time

Features = Float[np.ndarray, "_ f"]


class Estimate(NamedTuple):
  """A mean and its standard error, NaN where one number alone was averaged."""

  mean: float
  standard_error: float


def nll_gap(
  log_prob_of_samples: Shaped[np.ndarray | Array, " n"], log_prob_of_data: Shaped[np.ndarray | Array, " m"]
) -> Estimate:
  """The gap (1) in nats: 0 for samples of the density, negative for samples that crowd where it is high.

  Args:
    log_prob_of_samples: log p of samples of the model, p the known density of the data.
    log_prob_of_data: log p of data.

  Returns:
    The gap with its standard error; a gap below two of them is no gap.

  Raises:
    ValueError: if a log-density is not finite: a sample where the data cannot be has an infinite gap.

  Example:
    >>> nll_gap(np.array([-1.0, -3.0]), np.array([-1.0, -2.0])).mean
    0.5
  """
  sides = [np.asarray(side, np.float64) for side in (log_prob_of_samples, log_prob_of_data)]
  for name, side in zip(("log_prob_of_samples", "log_prob_of_data"), sides, strict=True):
    if not len(side) or not np.isfinite(side).all():
      broken = np.sum(~np.isfinite(side))
      raise ValueError(f"{name} must be finite numbers [n], got {broken} that are not among {len(side)}")
  samples, data = sides
  variance = sum(np.var(side, ddof=1) / len(side) if len(side) > 1 else np.nan for side in sides)
  return Estimate(float(np.mean(data) - np.mean(samples)), float(np.sqrt(variance)))


def sliced_wasserstein(key: Key[Array, ""], x: Features, y: Features, projections: int = 128) -> float:
  """The sliced 2-Wasserstein distance (2), exact between the two sets in each of the projections.

  Args:
    key: of the directions.
    x: points `[n, f]`.
    y: points `[m, f]`; m may differ from n: the quantile functions, steps of 1/n and 1/m, are compared.
    projections: how many directions.

  Returns:
    The distance, in the unit of the points.

  Raises:
    ValueError: for sets of another number of features, empty ones, or values that are not finite.

  References:
    Bonneel et al. 2015, Sliced and Radon Wasserstein Barycenters of Measures, Section 3.
  """
  x, y = check_pair(x, y)
  directions = np.asarray(jax.random.normal(key, (projections, x.shape[1])), np.float64)
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  ends = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
  middle, weight = 0.5 * (ends[1:] + ends[:-1]), np.diff(ends)
  total = 0.0
  for direction in directions:
    steps = [np.sort(side @ direction)[(middle * len(side)).astype(int)] for side in (x, y)]
    total += weight @ (steps[0] - steps[1]) ** 2
  return float(np.sqrt(total / projections))


class Moments(NamedTuple):
  """What the Frechet distance knows of a set of features, in float64.

  Attributes:
    n: how many examples.
    mean: their mean.
    scatter: sum of (x - mean)(x - mean)^T over them.
  """

  n: int
  mean: Float[np.ndarray, " f"]
  scatter: Float[np.ndarray, "f f"]

  @property
  def covariance(self) -> Float[np.ndarray, "f f"]:
    """The unbiased covariance."""
    return self.scatter / (self.n - 1)


def moments(features: Features) -> Moments:
  """The moments of features `[n, f]`, a block of rows at a time.

  Example:
    >>> moments(np.array([[0.0, 1.0], [2.0, 3.0]])).covariance.tolist()
    [[2.0, 2.0], [2.0, 2.0]]
  """
  features = check_features("features", features)

  def block(rows: np.ndarray) -> Moments:
    mean = rows.mean(axis=0)
    away = rows - mean
    return Moments(len(rows), mean, away.T @ away)

  blocks = (block(features[start : start + _ROWS].astype(np.float64)) for start in range(0, len(features), _ROWS))
  return functools.reduce(merge, blocks)


def merge(a: Moments, b: Moments) -> Moments:
  """The moments of two sets together, whatever their sizes and order: the same to rounding.

  n = n_a + n_b,  mean = mean_a + delta n_b / n,  scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n
  """
  count, delta = a.n + b.n, b.mean - a.mean
  return Moments(
    count,
    a.mean + delta * (b.n / count),
    a.scatter + b.scatter + np.outer(delta, delta) * (a.n * b.n / count),
  )


def frechet_distance(a: Moments, b: Moments) -> float:
  """The Frechet distance (3) of two Gaussians with the moments of the sets.

  The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), whose roots come from the eigenvalues
  of the covariances: real and accurate also for singular ones.

  Args:
    a: moments of one set.
    b: moments of the other.

  Returns:
    The squared distance; 0 for equal moments.

  Raises:
    ValueError: for sets of another number of features, or of fewer than two examples.

  Warns:
    UserWarning: a set has no more examples than features, so that its covariance is singular.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"a and b must be moments of the same features, got {len(a.mean)} and {len(b.mean)} of them")
  fewest, size = min(a.n, b.n), len(a.mean)
  if fewest < 2:
    raise ValueError(f"a Frechet distance needs at least two examples a side, got {fewest}")
  if fewest <= size:
    warnings.warn(
      f"{fewest} examples for {size} features: their covariance is singular and the Frechet distance mostly bias; take "
      f"more than {size}, better {10 * size}",
      stacklevel=2,
    )
  (root_a, _), (root_b, _) = roots = [_root(side.covariance) for side in (a, b)]
  overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
  return float(max(np.sum((a.mean - b.mean) ** 2) + sum(trace for _, trace in roots) - 2 * overlap, 0.0))


def _root(covariance: np.ndarray) -> tuple[np.ndarray, float]:
  """R with R R^T the covariance, and its trace; eigenvalues that rounding made negative are 0."""
  values, vectors = np.linalg.eigh(covariance)
  values = np.maximum(values, 0.0)
  return vectors * np.sqrt(values), float(values.sum())


def kernel_distance(x: Features, y: Features, blocks: int = 10) -> Estimate:
  """The unbiased kernel distance (4), averaged over disjoint blocks of both sets, in their order.

  Blocks are independent, so their spread gives an honest standard error.

  Args:
    x: features `[n, f]`, in random order.
    y: features `[m, f]`, in random order.
    blocks: how many; 1 uses every pair of examples, and gives no standard error.

  Returns:
    MMD^2, which may be negative, with its standard error.

  Raises:
    ValueError: for sets of another number of features, or fewer than two examples a block.
  """
  x, y = check_pair(x, y)
  if blocks < 1 or min(len(x), len(y)) < 2 * blocks:
    raise ValueError(f"blocks must be from 1 to half of the {min(len(x), len(y))} examples, got {blocks}")
  values = [_mmd(*pair) for pair in zip(np.array_split(x, blocks), np.array_split(y, blocks), strict=True)]
  error = np.std(values, ddof=1) / np.sqrt(blocks) if blocks > 1 else np.nan
  return Estimate(float(np.mean(values)), float(error))


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
  n, m, size = len(x), len(y), x.shape[1]

  def total(a: np.ndarray, b: np.ndarray) -> float:
    return sum(((a[i : i + _ROWS] @ b.T / size + 1) ** 3).sum() for i in range(0, len(a), _ROWS))

  own = lambda a: total(a, a) - (((a**2).sum(axis=1) / size + 1) ** 3).sum()
  return own(x) / (n * (n - 1)) + own(y) / (m * (m - 1)) - 2 * total(x, y) / (n * m)


def check_features(name: str, x: Features) -> Features:
  """The features, refused unless they are finite numbers `[n, f]`.

  Raises:
    ValueError: naming the argument.
  """
  if x.ndim != 2 or not x.size:
    raise ValueError(f"{name} must be features [n, f], got shape {x.shape}: flatten images, or take features of them")
  if broken := np.count_nonzero(~np.isfinite(x).all(axis=1)):
    raise ValueError(f"{name} has {broken} of {len(x)} examples with values that are not finite: check the samples")
  return x


def check_pair(x: Features, y: Features) -> tuple[Float[np.ndarray, "n f"], Float[np.ndarray, "m f"]]:
  """Two sets of the same features, as float64.

  Raises:
    ValueError: if they are not.
  """
  x, y = check_features("x", x), check_features("y", y)
  if x.shape[1] != y.shape[1]:
    raise ValueError(f"x and y must be of the same features, got {x.shape[1]} and {y.shape[1]} of them")
  return x.astype(np.float64), y.astype(np.float64)
