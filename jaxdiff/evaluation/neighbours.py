"""What nearest neighbours tell of generated examples: precision, recall, density, coverage, and copies of the data.

With r_k(x) the distance of x to its k-th nearest neighbour in its own set, and B_k(x) the ball of that radius,

    precision   share of generated examples in some ball of a real one                        (k = 3)     (1)
    recall      share of real examples in some ball of a generated one                        (k = 3)     (2)
    density     number of real balls around a generated example, over k, averaged             (k = 5)     (3)
    coverage    share of real balls that hold a generated example                             (k = 5)     (4)

For two sets of one distribution (3) is 1 on average. All four depend on the sizes of the sets: take equal ones. Memory
is bounded: distances are computed for a block of rows at a time.

References:
  Kynkaanniemi et al. 2019, Improved Precision and Recall Metric for Assessing Generative Models, eqs. 1 and 2.
  Naeem et al. 2020, Reliable Fidelity and Diversity Metrics for Generative Models, eqs. 3 and 4.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.evaluation.distances import Features, check_pair

_ENTRIES = 2**24  # distances held at a time
_ROUNDING = 1e-12  # of a squared distance by (5), in units of the largest squared norm


class Overlap(NamedTuple):
  """How far the sets cover each other: (1) to (4)."""

  precision: float
  recall: float
  density: float
  coverage: float


def _squared(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """(start, |x_i - y_j|^2 for a block of rows i from `start` on), by |x|^2 - 2 x . y + |y|^2            (5)."""
  x_norms, y_norms = (x**2).sum(axis=1), (y**2).sum(axis=1)
  rows = max(1, _ENTRIES // len(y))
  for start in range(0, len(x), rows):
    part = slice(start, start + rows)
    yield start, np.maximum(x_norms[part, None] - 2 * x[part] @ y.T + y_norms, 0.0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Squared distances [n] to the k-th nearest other example."""
  radii = np.empty(len(x))
  for start, squares in _squared(x, x):
    rows = np.arange(len(squares))
    squares[rows, start + rows] = np.inf
    radii[start + rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
  return radii


def overlap(real: Features, generated: Features, manifold_k: int = 3, coverage_k: int = 5) -> Overlap:
  """Precision, recall, density and coverage.

  Args:
    real: features `[n, f]` of data.
    generated: features `[m, f]` of samples.
    manifold_k: k of precision and recall.
    coverage_k: k of density and coverage.

  Returns:
    The four numbers; all but the density are in [0, 1].

  Raises:
    ValueError: for sets of another number of features, or no larger than k.

  Example:
    >>> corners = np.array([[x, y] for x in (0.0, 1.0) for y in (0.0, 1.0)])
    >>> overlap(corners, corners, manifold_k=2, coverage_k=2)
    Overlap(precision=1.0, recall=1.0, density=1.5, coverage=1.0)
  """
  real, generated = check_pair(real, generated)
  smallest, largest_k = min(len(real), len(generated)), max(manifold_k, coverage_k)
  if min(manifold_k, coverage_k) < 1 or largest_k >= smallest:
    raise ValueError(f"k must be from 1 to {smallest - 1}, below the size of both sets; got {manifold_k}, {coverage_k}")
  center = real.mean(axis=0)
  real, generated = real - center, generated - center
  slack = _ROUNDING * max((real**2).sum(axis=1).max(), (generated**2).sum(axis=1).max())
  real_radii, own_radii, wide_radii = (
    radii + slack for radii in (_radii(real, manifold_k), _radii(generated, manifold_k), _radii(real, coverage_k))
  )
  precise, balls = 0, 0
  recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
  for start, squares in _squared(generated, real):
    inside = squares <= wide_radii
    precise += int(np.count_nonzero((squares <= real_radii).any(axis=1)))
    balls += int(np.count_nonzero(inside))
    covered |= inside.any(axis=0)
    recalled |= (squares <= own_radii[start : start + len(squares), None]).any(axis=0)
  count = len(generated)
  return Overlap(precise / count, float(recalled.mean()), balls / (coverage_k * count), float(covered.mean()))


class Nearest(NamedTuple):
  """The nearest references of every query, nearest first.

  Attributes:
    rows: which they are.
    distance: Euclidean, computed from the differences: 0 for a copy.
  """

  rows: Int[np.ndarray, "n k"]
  distance: Float[np.ndarray, "n k"]


def nearest(queries: Features, reference: Features, k: int = 1) -> Nearest:
  """The k nearest references of every query: samples that copy training examples have one at distance 0.

  Args:
    queries: `[n, f]`.
    reference: `[m, f]`.
    k: how many.

  Raises:
    ValueError: for sets of another number of features, or fewer than k references.

  Example:
    >>> near = nearest(np.array([[2.0]]), np.array([[0.0], [2.0], [3.0]]), k=2)
    >>> near.rows.tolist(), near.distance.tolist()
    ([[1, 2]], [[0.0, 1.0]])
  """
  queries, reference = check_pair(queries, reference)
  if not 1 <= k <= len(reference):
    raise ValueError(f"k must be from 1 to the {len(reference)} references, got {k}")
  center, index, distance = reference.mean(axis=0), [], []
  for start, squares in _squared(queries - center, reference - center):
    near = np.argpartition(squares, k - 1, axis=1)[:, :k]
    away = np.stack([np.linalg.norm(queries[start + i] - reference[row], axis=-1) for i, row in enumerate(near)])
    order = np.argsort(away, axis=1, kind="stable")
    index.append(np.take_along_axis(near, order, axis=1))
    distance.append(np.take_along_axis(away, order, axis=1))
  return Nearest(np.concatenate(index), np.concatenate(distance))
