"""Two-dimensional toy data: shapes in the plane, standardized by their exact moments.

A shape has equally likely parts; a uniform u runs along a part. Gaussian noise of standard deviation `noise` is added
in the shape's own units (outer radius about 1), then each axis is shifted and scaled to mean 0 and variance 1 of the
population. The moments come from the midpoint rule, never from the sample: every size and seed draws from one density.
"""

from typing import NamedTuple, Protocol

import numpy as np

from jaxdiff.data.examples import SPLITS, Source, check_choice, from_arrays

_GRID = 4096  # midpoints along a part: the moments are exact to about 1e-7


class Curve(Protocol):
  """Maps uniforms u [n] and parts [n] to points [n, 2]."""

  def __call__(self, u: np.ndarray, part: np.ndarray) -> np.ndarray: ...


class Shape(NamedTuple):
  """A shape in the plane: its number of equally likely parts, whether a part is a class, and the map to points."""

  parts: int
  labelled: bool
  points: Curve


def toy2d(split: str, name: str = "moons", size: int = 10_000, seed: int = 0, noise: float = 0.05) -> Source:
  """Draws points of a 2-D density; train and test are independent draws.

  Args:
    split: "train" or "test".
    name: "moons", "circles", "swiss_roll" or "mixture" (8 Gaussians on a ring).
    size: number of points.
    seed: seed of the draw; the split is mixed in.
    noise: standard deviation of the Gaussian noise in units of the shape (outer radius about 1). With 0 the density of
      a curve does not exist, so likelihoods need a positive value.

  Returns:
    float32 points [2] of mean 0 and variance 1 per axis; moons, circles and mixture carry the part as `label`.

  Raises:
    ValueError: an unknown split or name, a size below 1, a negative noise.

  Example:
    >>> toy2d("train", "circles", size=3).gather([0, 1])["x"].shape
    (2, 2)
  """
  check_choice("split", split, SPLITS)
  check_choice("name", name, _SHAPES)
  if size < 1:
    raise ValueError(f"size: got {size}; pass at least 1 point")
  if not 0 <= noise < np.inf:
    raise ValueError(f"noise: got {noise}; pass a finite standard deviation >= 0")
  shape = _SHAPES[name]
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  part = rng.integers(shape.parts, size=size)
  points = shape.points(rng.random(size), part) + noise * rng.standard_normal((size, 2))
  mean, variance = _moments(shape)
  x = ((points - mean) / np.sqrt(variance + noise**2)).astype(np.float32)
  return from_arrays(x, part if shape.labelled else None, name=f"toy2d/{name}", split=split)


def _moments(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  u = np.tile((np.arange(_GRID) + 0.5) / _GRID, shape.parts)
  points = shape.points(u, np.repeat(np.arange(shape.parts), _GRID))
  return points.mean(0), points.var(0)


def _moons(u, part):
  angle = np.pi * u
  outer = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
  return np.where(part[:, None] == 0, outer, [1.0, 0.5] - outer)


def _circles(u, part):
  angle = 2 * np.pi * u
  return np.where(part == 0, 1.0, 0.5)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _swiss_roll(u, part):
  angle = 1.5 * np.pi * (1 + 2 * u)
  return (angle / (4.5 * np.pi))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _mixture(u, part):
  angle = 2 * np.pi * part / 8
  return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


_SHAPES = {
  "moons": Shape(2, True, _moons),
  "circles": Shape(2, True, _circles),
  "swiss_roll": Shape(1, False, _swiss_roll),
  "mixture": Shape(8, True, _mixture),
}
