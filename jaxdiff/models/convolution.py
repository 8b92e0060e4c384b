"""Convolutions of stride 1 whose gradients are fast on the CPU, too; elsewhere they are those of `jax.lax`.

XLA's CPU backend is fast for one order of the axes, images [b, h, w, c] with kernels [k, l, c, f], and brings others
into it: but not within loops (`lax.scan`, `while_loop`), where the gradients of a convolution, which `jax.lax` states
in other orders, run 10 to 30 times slower and more (jaxlib 0.10.2, 0.12.0). Here they are stated in that order,

    dL/dx = g * w'           w' the kernel turned by 180 degrees, its channels exchanged
    dL/dw = x^T * g^T        a convolution of the images [c, h, w, b] with the "kernel" [h, w, b, f]

and the second is a sum over bands of rows small enough for the cache: half to a third of the time where images are
large. experiments/benchmarks/convolutions.py measures it.

All derivatives exist, of every order and in both modes, for which it is a primitive of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]

_ORDER = ("NHWC", "HWIO", "NHWC")
_BAND = 2**18  # numbers in the rows of g that are one kernel: 1 MiB in float32, half of the cache of a core

primitive = Primitive("jaxdiff_convolution")


def convolution(
  lhs: Float[Array, "b ... c"],
  rhs: Float[Array, "... _ f"],
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **options: Any,
) -> Float[Array, "b ... f"]:
  """As `jax.lax.conv_general_dilated`, for `flax.linen.Conv(conv_general_dilated=convolution)`.

  Strides, dilations, groups and other ranks than images are left to `jax.lax`.

  Example:
    >>> convolution(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (1, 1), "SAME").shape
    (1, 4, 4, 5)
  """
  dilations = [d for name in ("lhs_dilation", "rhs_dilation") for d in options.get(name) or (1,)]
  special = options.get("feature_group_count", 1) != 1 or options.get("precision") is not None
  special |= options.get("preferred_element_type") is not None or lhs.dtype != rhs.dtype
  if lhs.ndim != 4 or {*window_strides, *dilations} != {1} or special:
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **({"dimension_numbers": _ORDER} | options))
  pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding) if isinstance(padding, str) else padding
  top, side = ((int(low), int(high)) for low, high in pads)
  lhs, rhs = _varying(lhs, rhs), _varying(rhs, lhs)
  return primitive.bind(lhs, rhs, padding=(top, side))


def _varying(value: Array, other: Array) -> Array:
  """The same numbers, varying within `shard_map` along the axes of the other: transposed, the sum over these axes."""
  missing = tuple(jax.typeof(other).mat.varying - jax.typeof(value).mat.varying)
  return lax.pcast(value, missing, to="varying") if missing else value


def _plain(x: Array, w: Array, *, padding: Padding) -> Array:
  return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=_ORDER)


def _image_gradient(g: Array, x: Any, w: Array, *, padding: Padding) -> Array:
  """The transpose in x: its shape is known, and w."""
  opposite = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(w.shape, padding, strict=False))

  def here(g: Array, w: Array) -> Array:
    return primitive.bind(g, jnp.swapaxes(jnp.flip(w, (0, 1)), 2, 3), padding=opposite)

  def elsewhere(g: Array, w: Array) -> Array:
    return jax.linear_transpose(lambda x: _plain(x, w, padding=padding), x.aval)(g)[0]

  return lax.platform_dependent(g, w, cpu=here, default=elsewhere)


def _kernel_gradient(g: Array, x: Array, w: Any, *, padding: Padding) -> Array:
  """The transpose in w: its shape is known, and x."""
  (top, bottom), side = padding

  def here(g: Array, x: Array) -> Array:
    b, h, width, f = g.shape
    rows = min(h, max(1, _BAND // (b * width * f)))
    bands = -(-h // rows)
    images = jnp.transpose(jnp.pad(x, ((0, 0), (top, bottom + bands * rows - h), (0, 0), (0, 0))), (3, 1, 2, 0))
    kernels = jnp.transpose(jnp.pad(g, ((0, 0), (0, bands * rows - h), (0, 0), (0, 0))), (1, 2, 0, 3))
    cut = lambda a, axis, i, size: lax.dynamic_slice_in_dim(a, i * rows, size, axis)

    def band(total: Array, i: Array) -> tuple[Array, None]:
      image = cut(images, 1, i, rows + w.aval.shape[0] - 1)
      return total + primitive.bind(image, cut(kernels, 0, i, rows), padding=((0, 0), side)).astype(wide), None

    wide = jnp.float32 if g.dtype.itemsize < 4 else g.dtype
    nothing = _varying(jnp.zeros((x.shape[-1], *w.aval.shape[:2], f), wide), g)
    total = band(nothing, jnp.int32(0))[0] if bands == 1 else lax.scan(band, nothing, jnp.arange(bands))[0]
    return jnp.transpose(total, (1, 2, 0, 3)).astype(w.aval.dtype)

  def elsewhere(g: Array, x: Array) -> Array:
    return jax.linear_transpose(lambda w: _plain(x, w, padding=padding), w.aval)(g)[0]

  return lax.platform_dependent(g, x, cpu=here, default=elsewhere)


def _batched(values: Sequence[Array], axes: Sequence[int | None], *, padding: Padding) -> tuple[Array, int]:
  """Many images with one kernel are more images of one batch; many kernels are left to `jax.lax`."""
  (x, w), (x_axis, w_axis) = values, axes
  if w_axis is not None:
    return jax.vmap(lambda x, w: _plain(x, w, padding=padding), (x_axis, w_axis))(x, w), 0
  x = jnp.moveaxis(x, x_axis or 0, 0)
  y = primitive.bind(x.reshape(-1, *x.shape[2:]), w, padding=padding)
  return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _shape(x: Any, w: Any, *, padding: Padding) -> Any:
  size = (n + sum(pad) - k + 1 for n, k, pad in zip(x.shape[1:3], w.shape[:2], padding, strict=True))
  return x.update(shape=(x.shape[0], *size, w.shape[3]))


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
"""`flax.linen.Conv` by `convolution`."""

primitive.def_impl(jax.jit(_plain, static_argnames="padding"))
primitive.def_abstract_eval(_shape)
mlir.register_lowering(primitive, mlir.lower_fun(_plain, multiple_results=False))
ad.defbilinear(primitive, _image_gradient, _kernel_gradient)
batching.primitive_batchers[primitive] = _batched
