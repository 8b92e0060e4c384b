"""The report of an evaluation: every metric of the samples beside its floor, the value for held-out data.

The training data are the reference of both columns. A number says little by itself: a Frechet distance shrinks with the
number of examples, and so do the distances to neighbours. So held-out data are measured as if they were samples, and
where there are fewer of them, as many samples are measured once more.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation import distances, neighbours
from jaxdiff.evaluation.distances import Estimate

_BLOCKS = 10
Rows = dict[str, Estimate]


class Side(NamedTuple):
  """A set of examples.

  Attributes:
    x: the data, flattened.
    features: their features.
  """

  x: Float[np.ndarray, "n d"]
  features: Float[np.ndarray, "n f"]

  def first(self, count: int) -> "Side":
    """The first so many."""
    return Side(self.x[:count], self.features[:count])


class Column(NamedTuple):
  """One set measured against the training data.

  Attributes:
    title: what the set is.
    examples: how many it has.
    paired: how many of both sides entered precision, recall, density and coverage, which need equal numbers.
    rows: the metrics by name.
  """

  title: str
  examples: int
  paired: int
  rows: Rows


def measure(
  title: str, train: Side, other: Side, name: str, seed: int, manifold_k: int = 3, coverage_k: int = 5
) -> Column:
  """All metrics of a set against the training data.

  Args:
    title: what the set is.
    train: the training data.
    other: samples, or held-out data.
    name: of the features.
    seed: of the order of the training data, and of the directions of the sliced Wasserstein distance.
    manifold_k: k of precision and recall.
    coverage_k: k of density and coverage.

  Returns:
    FD and KD (FID and KID for the features "inception"), precision, recall, density and coverage of the features; for
    raw features of few dimensions the sliced Wasserstein distance; the median distance of the data to their nearest
    training example.

  Raises:
    ValueError: fewer examples on a side than the metrics need, or values that are not finite.
  """
  exact = lambda value: Estimate(float(value), float("nan"))
  shuffled = train.features[np.random.default_rng(seed).permutation(len(train.features))]
  paired = min(len(shuffled), len(other.features))
  frechet = distances.frechet_distance(distances.moments(train.features), distances.moments(other.features))
  names = ("FID", "KID") if name == "inception" else (f"FD-{name}", f"KD-{name}")
  rows = {
    names[0]: exact(frechet),
    names[1]: distances.kernel_distance(shuffled, other.features, max(1, min(_BLOCKS, paired // 2))),
  }
  if name == "raw":
    key = jax.random.key(seed)
    rows["sliced Wasserstein"] = exact(distances.sliced_wasserstein(key, train.features, other.features))
  overlap = neighbours.overlap(shuffled[:paired], other.features[:paired], manifold_k, coverage_k)
  rows |= {what: exact(value) for what, value in overlap._asdict().items()}
  rows["distance to nearest training example"] = exact(np.median(neighbours.nearest(other.x, train.x).distance))
  return Column(title, len(other.features), paired, rows)


def columns(
  train: Side, held_out: Side, samples: Side, name: str, seed: int, manifold_k: int, coverage_k: int
) -> list[Column]:
  """Samples and held-out data, each against the training data; see the head of this file.

  Returns:
    The columns of the samples, of the floor, and, if held-out data are fewer, of as many samples.
  """
  count = min(len(held_out.x), len(samples.x))
  run = lambda title, side: measure(title, train, side, name, seed, manifold_k, coverage_k)
  made = [run("samples", samples), run("held-out", held_out.first(count))]
  return made if count == len(samples.x) else [*made, run("samples", samples.first(count))]


def plain(columns: list[Column]) -> list[dict[str, Any]]:
  """The columns as JSON has them; None for what is not finite."""
  number = lambda value: value if np.isfinite(value) else None
  return [
    {
      "of": column.title,
      "examples": column.examples,
      "examples_paired": column.paired,
      "results": {
        name: {"value": row.mean, "standard_error": number(row.standard_error)} for name, row in column.rows.items()
      },
    }
    for column in columns
  ]


def table(title: str, columns: list[Column]) -> str:
  """The columns as text."""
  cell = lambda row: f"{row.mean:.4f}" + (f" +- {row.standard_error:.4f}" if np.isfinite(row.standard_error) else "")
  lines = [["", *(f"{column.title}, n = {column.examples}" for column in columns)]]
  lines += [[name, *(cell(column.rows[name]) for column in columns)] for name in columns[0].rows]
  widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
  text = ["  ".join([f"  {line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]) for line in lines]
  return "\n".join([title, *text])
