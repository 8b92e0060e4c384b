"""Panoramas: the score of a large canvas, from a model of images of one size, by overlapping windows.

With W_i x the i-th window of the canvas x, and s the score (or denoiser) of images of its size,

    s(x) = argmin_v sum_i |W_i v - s(W_i x)|^2 = (sum_i W_i^T W_i)^-1 sum_i W_i^T s(W_i x)                           (1)

and W_i^T W_i marks the pixels of window i: every pixel has the mean over the windows that cover it. MultiDiffusion
fuses so what a step of DDIM makes of each window; the step is affine in the score, so that to fuse the scores is the
same, and goes with every sampler. Where pixels are independent it is the score of the canvas; else neighbouring windows
agree on what they share, and nothing makes parts of the canvas fit that share no window.

References:
  Bar-Tal et al. 2023, MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation, Section 3, eq. 3 and 5,
  with weights of one, and Section 4.1.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxdiff import checks, predictions
from jaxdiff.sde import batch_time
from jaxdiff.typing import ScoreFn, State, Time

Pair = tuple[int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["score"], meta_fields=["canvas", "window", "stride"])
@dataclass(frozen=True)
class _Panorama:
  score: ScoreFn
  canvas: Pair
  window: Pair
  stride: Pair

  @property
  def sde(self) -> Any:
    return self.score.sde  # type: ignore[attr-defined]

  @property
  def denoised(self) -> Callable[..., State] | None:
    of_window = getattr(self.score, "denoised", None)
    return None if of_window is None else lambda x, t, /, **cond: self._merged(of_window, x, t, cond)

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    return self._merged(self.score, x, t, cond)

  def denoised_and_v(self, x: State, t: Time, /, **cond: Array) -> tuple[State, State]:
    return self._merged(functools.partial(predictions.denoised_and_v, self.score), x, t, cond)

  def evaluations(self, times: Array | None) -> int | Array:
    rows, columns = self._pixels()
    return len(rows) * len(columns) * predictions.evaluations(self.score, times)

  def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the canvas in each row and column of windows; the last windows end at the border."""

    def covered(size: int, window: int, stride: int) -> np.ndarray:
      starts = np.minimum(np.arange(0, size - window + stride, stride), size - window)
      return starts[:, None] + np.arange(window)[None]

    return tuple(map(covered, self.canvas, self.window, self.stride))  # type: ignore[return-value]

  def _cut(self, x: Shaped[Array, "b H W c"]) -> Shaped[Array, "m h w c"]:
    """All windows of the first canvas, row by row, then those of the next."""
    rows, columns = self._pixels()
    windows = jnp.moveaxis(x[:, rows][:, :, :, columns], 3, 2)
    return windows.reshape(-1, *self.window, x.shape[-1])

  def _merged(self, of_windows: Callable[..., Any], x: State, t: Time, cond: Any) -> Any:
    """Eq. (1) of a function of windows, or of each of several that it returns."""
    if x.ndim != 4 or x.shape[1:3] != self.canvas:
      raise ValueError(f"x must be canvases [b, {self.canvas[0]}, {self.canvas[1]}, c], got shape {x.shape}")
    windows, pixels = self._cut(x), self._pixels()
    each = len(windows) // len(x)
    told = {name: self._of_windows(name, value, each) for name, value in cond.items()}
    rows, columns = (np.bincount(part.ravel()) for part in pixels)
    covers = jnp.asarray(rows[None, :, None, None] * columns[None, None, :, None], x.dtype)

    def mean(value: Any) -> State:
      (total,) = jax.linear_transpose(self._cut, x)(checks.score(windows, value))
      return total / covers

    values = of_windows(windows, jnp.repeat(batch_time(t, x), each), **told)
    return tuple(map(mean, values)) if isinstance(values, tuple) else mean(values)

  def _of_windows(self, name: str, value: Array, each: int) -> Array:
    """A condition of the canvases as their windows are told it."""
    if value.ndim != 4:
      return jnp.repeat(value, each, axis=0)
    if value.shape[1:3] != self.canvas:
      raise ValueError(
        f"cond[{name!r}] has shape {value.shape} beside a canvas of {self.canvas[0]}x{self.canvas[1]} pixels: an image "
        "is cut into windows with the canvas; enlarge it to its size first"
      )
    return self._cut(value)


def panorama(score: ScoreFn, canvas: Pair, window: Pair, stride: Pair) -> _Panorama:
  """The score of canvases `[b, H, W, c]` from that of images `[b, h, w, c]`, eq. (1).

  The windows of all canvases are one batch of one call of the score. Where the stride does not divide what is left
  beside the first window, the last windows are moved back to the border.

  Args:
    score: from `jd.score_fn`, or any score, guided ones too.
    canvas: (H, W).
    window: (h, w), the size of the images that the model was trained on.
    stride: from one window to the next, (down, right): half a window or less to hide where they meet.

  Returns:
    A score with `.denoised` where the score has it, a pytree if the score is one: for any sampler, at as many
    evaluations a call as there are windows. Images `[b, H, W, k]` among the conditions are cut like the canvas, all
    others are told to each window.

  Raises:
    ValueError: for sizes below 1, a window larger than the canvas, a stride that leaves gaps; when called, for x that
      is no such canvas, for an image condition of another size.
    TypeError: for a factory given as score, for sizes that are no pairs of integers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> score = jd.editing.panorama(lambda x, t: -x, canvas=(8, 20), window=(8, 8), stride=(4, 4))
    >>> sampler, x_T = jd.samplers.ddim(sde, jd.time_grid(sde, 10)), sde.prior_sample(jax.random.key(0), (2, 8, 20, 3))
    >>> sample = sampler(jax.random.key(1), x_T, score)
    >>> sample.x.shape, sample.nfe.tolist()
    ((2, 8, 20, 3), [40, 40])
  """
  checks.made("score", score)
  if not callable(score):
    raise TypeError(f"score must be a function (x, t, **cond) -> array, got {type(score).__name__}")
  canvas, window, stride = _pair("canvas", canvas), _pair("window", window), _pair("stride", stride)
  if any(small > large for small, large in zip(window, canvas, strict=True)):
    raise ValueError(f"window must fit into the canvas, {canvas}; got {window}")
  if any(gap > size for gap, size in zip(stride, window, strict=True)):
    raise ValueError(f"stride must not exceed the window, {window}, or it leaves gaps; got {stride}")
  return _Panorama(score, canvas, window, stride)


def _pair(name: str, value: Any) -> Pair:
  if not isinstance(value, tuple | list) or len(value) != 2:
    raise TypeError(f"{name} must be a pair (height, width), got {value!r}")
  for size in value:
    checks.whole(name, size, 1, "the pixels of its height and width")
  return int(value[0]), int(value[1])
