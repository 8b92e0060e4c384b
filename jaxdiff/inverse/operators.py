"""Measurements: linear operators A with their adjoint A^T and the solution of (A A^T + ratio I) u = r.

A measurement is y = A x + noise_std n, n ~ N(0, I). From the three functions follow

    pseudo-inverse       A^+ y = A^T (A A^T)^-1 y                                                  ratio = 0         (1)
    posterior mean       c A^T (c A A^T + s^2 I)^-1 y for x ~ N(0, c I), noise_std = s             ratio = s^2 / c   (2)

                 A                                     A A^T               y
    mask         keeps the known values                I on them           [b, h, w, c], the hidden ones ignored
    crop         keeps a window                        I                   [b, height, width, c]
    downsample   mean over f x f pixels                I / f^2             [b, h / f, w / f, c]
    greyscale    weighted sum of the channels          sum of w_i^2        [b, h, w, 1]
    blur         periodic convolution with a kernel    |F k|^2, by FFT     [b, h, w, c]
    operator     a linear function of yours            conjugate gradients

References:
  Song et al. 2023, Pseudoinverse-Guided Diffusion Models for Inverse Problems, Section 3, for (1) and (2).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxdiff import checks
from jaxdiff.sde import expand
from jaxdiff.typing import Cond, Scalar

# ITU-R 601 luma.
LUMA = (0.299, 0.587, 0.114)
# Frequencies that a blur weakens below this share of its largest gain count as not measured where ratio = 0.
_LOST = 1e-3
_CG_TOLERANCE, _CG_STEPS, _CG_FAILED = 1e-6, 200, 1e-3


def _as_it_is(y: Array, **own: Array) -> Array:
  return y


@functools.partial(checks.pytree, static=("conditions",))
@dataclass(frozen=True)
class Operator:
  """A linear operator A on images, and what belongs to it: a pytree of functions.

  Attributes:
    apply: `(x: [b, *d], **own) -> y: [b, *m]`, A x.
    adjoint: `(y, **own) -> x`, A^T y.
    solve: `(r, ratio, **own) -> [b, *m]`, (A A^T + ratio I)^-1 r, ratio a scalar or `[b]`; for ratio 0 its
      pseudo-inverse.
    conditions: names in cond that belong to the operator (such as a mask per image): given to all four functions as
      `own`, and withheld from the score.
    restrict: `(y, **own) -> y`, what A cannot reach set to 0: what has no meaning in a measurement, even NaN.
    gain: g where A A^T = g I on what A can reach; None where there is no such number.
  """

  apply: Callable[..., Array]
  adjoint: Callable[..., Array]
  solve: Callable[..., Array]
  conditions: tuple[str, ...] = ()
  restrict: Callable[..., Array] = _as_it_is
  gain: Scalar | None = None

  def __post_init__(self) -> None:
    for name in ("apply", "adjoint", "solve", "restrict"):
      function = getattr(self, name)
      if not callable(function):
        raise TypeError(f"{name} of an operator must be a function, got {type(function).__name__}")
      if jax.tree_util.all_leaves([function]):
        object.__setattr__(self, name, Partial(function))
    if isinstance(self.conditions, str):
      raise TypeError(
        f"conditions must be a tuple of names, got the string {self.conditions!r}: ({self.conditions!r},)"
      )


def mask(mask: ArrayLike | None = None) -> Operator:
  """The known values of an image; the measurement has the size of the image, and hidden values have no influence.

  Args:
    mask: 1 where a value is known, 0 where it is hidden: `[h, w]`, `[h, w, 1]` or `[h, w, c]` (for other data, of their
      shape `d` or without its last axis), one for all images; None for one per image, in `cond["mask"]`.

  Returns:
    An `Operator`. What hidden places of a measurement hold does not matter; NaN is good.

  Raises:
    ValueError: for a mask that is not binary; when called, for a mask of another size than the images. A mask that is
      traced when used cannot be refused: images with values other than 0 and 1 in it become NaN, status 2.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> known = jd.inverse.mask(jnp.asarray([[1, 0], [1, 1]]))
    >>> known.apply(jnp.ones((1, 2, 2, 1))).ravel().tolist()
    [1.0, 0.0, 1.0, 1.0]
  """
  if mask is None:
    return Operator(_per_image, _per_image, _solve_per_image, ("mask",), _per_image, 1.0)
  _check_binary(mask)
  keep = Partial(_keep, jnp.asarray(mask)[None])
  return Operator(keep, keep, Partial(_solve_kept, keep), (), keep, 1.0)


def _check_binary(mask: Any) -> None:
  if isinstance(mask, jax.core.Tracer):
    return
  values = np.unique(np.asarray(mask))
  if not np.isin(values, (0, 1)).all():
    other = values[~np.isin(values, (0, 1))]
    raise ValueError(f"mask must be 1 where a value is known and 0 where it is hidden; it holds {other[:3]} too")


def _keep(mask: Array, x: Array) -> Array:
  """The known values of x, 0 at the others; mask `[1 or b, ...]`."""
  full = mask[..., None] if mask.ndim == x.ndim - 1 else mask
  fits = full.ndim == x.ndim and full.shape[1:-1] == x.shape[1:-1] and full.shape[-1] in (1, x.shape[-1])
  if not fits or len(full) not in (1, len(x)):
    raise ValueError(f"mask must be of the size of the images, {x.shape[1:]}; got {mask.shape[1:]}")
  zero = jnp.zeros((), x.dtype)
  if full.dtype == bool:
    return jnp.where(full, x, zero)
  return jnp.where(full == 1, x, jnp.where(full == 0, zero, jnp.full((), jnp.nan, x.dtype)))


def _per_image(x: Array, *, mask: Array) -> Array:
  _check_binary(mask)
  return _keep(mask, x)


def _solve_kept(keep: Callable[..., Array], r: Array, ratio: Scalar) -> Array:
  return keep(r) / (1 + _like(ratio, r))


def _solve_per_image(r: Array, ratio: Scalar, *, mask: Array) -> Array:
  return _solve_kept(Partial(_keep, mask), r, ratio)


def _like(ratio: Scalar, r: Array) -> Array:
  return expand(jnp.asarray(ratio, r.dtype), r)


def _images(x: Array, name: str) -> Array:
  if x.ndim != 4:
    raise ValueError(f"{name} is for images [b, h, w, c], got shape {x.shape}")
  return x


def crop(top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Operator:
  """A window of an image: the rest is made up around it.

  Args:
    top: first row of the window.
    left: its first column.
    height: its height, in pixels.
    width: its width.
    size: (height, width) of the image.

  Returns:
    An `Operator`; the measurement is the window, `[b, height, width, c]`.

  Raises:
    ValueError: for a window without pixels or not inside the image; when called, for images of another size.
    TypeError: for numbers that are no integers.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> window = jd.inverse.crop(0, 1, height=2, width=3, size=(4, 4))
    >>> window.apply(jnp.ones((1, 4, 4, 3))).shape
    (1, 2, 3, 3)
  """
  for name, value, least in (("top", top, 0), ("left", left, 0), ("height", height, 1), ("width", width, 1)):
    checks.whole(name, value, least)
  if top + height > size[0] or left + width > size[1]:
    raise ValueError(f"the window, {height}x{width} at ({top}, {left}), must lie in the image of {size[0]}x{size[1]}")
  height_and_width = tuple(size)
  rows, columns = slice(top, top + height), slice(left, left + width)
  margin = ((0, 0), (top, size[0] - top - height), (left, size[1] - left - width), (0, 0))

  def apply(x: Array) -> Array:
    if _images(x, "crop").shape[1:3] != height_and_width:
      raise ValueError(f"size={size} is not that of the images, {x.shape[1:3]}")
    return x[:, rows, columns]

  return Operator(apply, lambda y: jnp.pad(y, margin), Partial(_solve_by_gain, 1.0), gain=1.0)


def _solve_by_gain(gain: Scalar, r: Array, ratio: Scalar) -> Array:
  return r / (jnp.asarray(gain, r.dtype) + _like(ratio, r))


def downsample(factor: int) -> Operator:
  """Means over squares of pixels: super-resolution; as the condition "downsampled" makes them of an image.

  Args:
    factor: pixels along each side of a square.

  Returns:
    An `Operator`; the measurement is `[b, h / factor, w / factor, c]`.

  Raises:
    ValueError: for a factor below 1; when called, for one that does not divide the size of the images.
    TypeError: for a factor that is no integer.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> jd.inverse.downsample(2).apply(jnp.ones((1, 4, 4, 3))).shape
    (1, 2, 2, 3)
  """
  checks.whole("factor", factor, 1, "by which the image is made smaller")

  def apply(x: Array) -> Array:
    b, h, w, c = _images(x, "downsample").shape
    if h % factor or w % factor:
      raise ValueError(f"factor={factor} does not divide the {h}x{w} pixels of the images: take one that does")
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))

  def adjoint(y: Array) -> Array:
    return jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2) / factor**2

  return Operator(apply, adjoint, Partial(_solve_by_gain, 1 / factor**2), gain=1 / factor**2)


def greyscale(weights: tuple[float, ...] = LUMA) -> Operator:
  """The brightness of an image, a weighted sum of its channels: colorization.

  Args:
    weights: of the channels; ITU-R 601 luma, as in the condition "greyscale".

  Returns:
    An `Operator`; the measurement is `[b, h, w, 1]`.

  Raises:
    ValueError: for weights that are all 0; when called, for images with another number of channels.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> jd.inverse.greyscale().apply(jnp.ones((1, 2, 2, 3))).shape
    (1, 2, 2, 1)
  """
  given = np.asarray(weights, float)
  if given.ndim != 1 or not np.any(given):
    raise ValueError(f"weights must be one number per channel, not all 0; got {weights}")
  gain = float(np.sum(given**2))

  def across(x: Array) -> Array:
    return jnp.asarray(given, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

  def apply(x: Array) -> Array:
    if x.shape[-1] != len(given):
      raise ValueError(f"greyscale is made of images of {len(given)} channels, one a weight; these have {x.shape[-1]}")
    return jnp.sum(x * across(x), axis=-1, keepdims=True)

  return Operator(apply, lambda y: y * across(y), Partial(_solve_by_gain, gain), gain=gain)


def blur(kernel: ArrayLike) -> Operator:
  """Convolution with a kernel, periodic at the borders, each channel by itself: deblurring.

  Args:
    kernel: `[rows, columns]`, odd numbers both, not larger than the image; a blur that keeps the brightness sums to 1.

  Returns:
    An `Operator`; the measurement has the size of the image. Frequencies with less than 1e-3 of the largest gain count
    as not measured where `solve` has ratio 0: dividing by their gains would return rounding errors.

  Raises:
    ValueError: for a kernel that is not 2-D or of even size; when called, for one larger than the images.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> jd.inverse.blur(jnp.ones((3, 3)) / 9).apply(jnp.ones((1, 4, 4, 3))).shape
    (1, 4, 4, 3)
  """
  kernel = jnp.asarray(kernel)
  if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
    raise ValueError(f"kernel must be [rows, columns], odd numbers both, so that it has a center; got {kernel.shape}")
  return Operator(Partial(_blur, kernel), Partial(_blur_back, kernel), Partial(_deblur, kernel))


def _gains(kernel: Array, x: Array) -> Array:
  """The Fourier transform of the kernel, its center at the first pixel: `[1, h, w // 2 + 1, 1]`."""
  (rows, columns), (_, h, w, _) = kernel.shape, _images(x, "blur").shape
  if rows > h or columns > w:
    raise ValueError(f"kernel must not be larger than the images of {h}x{w}, got {rows}x{columns}")
  around = jnp.pad(kernel.astype(x.dtype), ((0, h - rows), (0, w - columns)))
  return jnp.fft.rfft2(jnp.roll(around, (-(rows // 2), -(columns // 2)), (0, 1)))[None, :, :, None]


def _filtered(x: Array, gains: Array) -> Array:
  spectrum = jnp.fft.rfft2(x, axes=(1, 2))
  return jnp.fft.irfft2(spectrum * gains.astype(spectrum.dtype), s=x.shape[1:3], axes=(1, 2))


def _blur(kernel: Array, x: Array) -> Array:
  return _filtered(x, _gains(kernel, x))


def _blur_back(kernel: Array, y: Array) -> Array:
  return _filtered(y, jnp.conj(_gains(kernel, y)))


def _deblur(kernel: Array, r: Array, ratio: Scalar) -> Array:
  gain, ratio = jnp.abs(_gains(kernel, r)) ** 2, _like(ratio, r)
  lost = (ratio == 0) & (gain <= _LOST**2 * jnp.max(gain))
  inverse = jnp.where(lost, 0.0, 1 / jnp.where(lost, 1.0, gain + ratio))
  return _filtered(r, inverse)


def operator(apply: Callable[..., Array], shape: tuple[int, ...], conditions: tuple[str, ...] = ()) -> Operator:
  """An operator from a linear function: its adjoint by transposition, `solve` by conjugate gradients per example.

  Args:
    apply: `(x: [b, *d], **own) -> [b, *m]`, linear in x, example by example.
    shape: `d`, the shape of one image.
    conditions: names in cond that apply takes as `own`.

  Returns:
    An `Operator`. The gradients end at a relative residual of 1e-6, or after 200 steps; one above 1e-3 gives NaN.

  Raises:
    TypeError: for a function that is not linear, or not for this shape; where it takes conditions, when called.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> slope = jd.inverse.operator(lambda x: x[:, 1:] - x[:, :-1], (3,))
    >>> slope.adjoint(jnp.asarray([[1.0, 0.0]])).tolist()
    [[-1.0, 1.0, 0.0]]
  """
  checks.made("apply", apply)
  if not conditions:
    _check_linear(apply, tuple(shape))

  def adjoint(y: Array, **own: Array) -> Array:
    image = jax.ShapeDtypeStruct((len(y), *shape), y.dtype)
    (x,) = jax.linear_transpose(lambda x: apply(x, **own), image)(y)
    return x

  def solve(r: Array, ratio: Scalar, **own: Array) -> Array:
    def one(r: Array, ratio: Array, own: Any) -> Array:
      batched = {name: value[None] for name, value in own.items()}
      forward = lambda x: apply(x[None], **batched)[0]
      back = lambda u: adjoint(u[None], **batched)[0]
      # All of r that A reaches: without a ratio there is no solution for the rest.
      reached = forward(_conjugate_gradients(lambda x: back(forward(x)), back(r)))
      return _conjugate_gradients(lambda u: forward(back(u)) + ratio * u, jnp.where(ratio == 0, reached, r))

    return jax.vmap(one)(r, jnp.broadcast_to(jnp.asarray(ratio, r.dtype), r.shape[:1]), own)

  return Operator(apply, adjoint, solve, tuple(conditions))


def _check_linear(apply: Callable[..., Array], shape: tuple[int, ...]) -> None:
  image = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float))
  try:
    y = jax.eval_shape(apply, image)
    jax.eval_shape(jax.linear_transpose(apply, image), y)
  except (TypeError, ValueError, NotImplementedError) as error:
    raise TypeError(f"apply must be a linear function of images {shape}, the shape of one: {error}") from error
  nothing = apply(jnp.zeros(image.shape, image.dtype))
  if not isinstance(nothing, jax.core.Tracer) and jnp.any(nothing != 0):
    raise TypeError(
      f"apply must be linear, but A 0 is not 0: it has values up to {float(jnp.max(jnp.abs(nothing))):.3g}; subtract "
      "them from the measurement"
    )


def _conjugate_gradients(normal: Callable[[Array], Array], due: Array) -> Array:
  found, _ = jax.scipy.sparse.linalg.cg(normal, due, tol=_CG_TOLERANCE, maxiter=_CG_STEPS)
  size = lambda r: jnp.sqrt(jnp.sum(r**2))
  return jnp.where(size(normal(found) - due) <= _CG_FAILED * size(due), found, jnp.nan)


def pseudo_inverse(operator: Operator, y: Array, own: Cond) -> Array:
  """A^+ y, eq. (1)."""
  return operator.adjoint(operator.solve(y, 0.0, **own), **own)


def measured(operator: Operator, x: Array, cond: Cond) -> tuple[Array, dict[str, Array], dict[str, Array]]:
  """What cond holds: the measurement, typed as x, what belongs to the operator, and what the score is told.

  Raises:
    ValueError: for cond without the measurement or what belongs to the operator, a measurement of another shape than
      A x.
    TypeError: for a measurement that is no floating point array, or a factory for the operator.
  """
  checks.made("operator", operator, Operator)
  for name in ("measurement", *operator.conditions):
    if name not in cond:
      raise ValueError(
        f"cond must hold {name!r}, an array with a leading batch axis; it holds {sorted(cond) or 'nothing'}"
      )
  y = cond["measurement"]
  own = {name: cond[name] for name in operator.conditions}
  if not jnp.issubdtype(y.dtype, jnp.floating):
    raise TypeError(f"cond['measurement'] must be floating point, in the units of the images; got {y.dtype}")
  expected = jax.eval_shape(lambda x: operator.apply(x, **own), x).shape
  if y.shape != expected:
    raise ValueError(f"cond['measurement'] must have the shape of A x, {expected}; got {y.shape}")
  told = {name: value for name, value in cond.items() if name not in ("measurement", *operator.conditions)}
  return operator.restrict(y.astype(x.dtype), **own), own, told


def check_noise_std(noise_std: Any) -> None:
  """Refuse a negative standard deviation; a traced one passes."""
  if not isinstance(noise_std, jax.core.Tracer) and not 0 <= float(noise_std) < float("inf"):
    raise ValueError(f"noise_std must be at least 0, the spread of the measurement's noise; got {noise_std}")
