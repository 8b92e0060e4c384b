"""Half and double the height and width of feature maps [b, h, w, c]: by means, by convolutions, by a FIR filter.

| kind | down | up |
|---|---|---|
| pool | mean of 2x2 | every pixel repeated |
| conv | convolution 3x3 of stride 2, padded (0, 1) | every pixel repeated, convolution 3x3 |
| conv_symmetric | the same, padded (1, 1) | the same |
| fir | filter (1, 3, 3, 1)/8 of each axis, then every other pixel | zeros between, filter (1, 3, 3, 1)/4 of each axis |

`conv` is that of DDPM, `conv_symmetric` that of ADM, `fir` that of StyleGAN2 and NCSN++ (Song et al. 2021, Appendix H):
without aliasing where convolutions alias. Down is the adjoint of up, over 4; both keep constants, but for the border.
Beyond the border are zeros ("SAME") or the other side ("CIRCULAR"): then they commute with shifts, of two pixels down.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.convolution import Conv

Padding = Literal["SAME", "CIRCULAR"]
_PADDED = {"conv": (0, 1), "conv_symmetric": (1, 1), "fir": (2, 2)}


def pool(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
  """Halves height and width: the mean of each square of 2x2 pixels."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
  """Doubles height and width: every pixel is repeated."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def fir_downsample(x: Float[Array, "b h w c"], padding: Padding = "SAME") -> Float[Array, "b _ _ c"]:
  """Halves height and width: along each axis y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8."""
  x = _pad(x, 1, 1, padding)
  return _filter(_filter(x, axis=1, stride=2), axis=2, stride=2)


def fir_upsample(x: Float[Array, "b h w c"], padding: Padding = "SAME") -> Float[Array, "b 2*h 2*w c"]:
  """Doubles height and width: along each axis y_{2i} = (x_{i-1} + 3 x_i) / 4, y_{2i+1} = (3 x_i + x_{i+1}) / 4."""
  return _fir_upsample_and_border(x, padding)[:, 1:-1, 1:-1]


def downsample(x: Float[Array, "b h w c"], fir: bool = False, padding: Padding = "SAME") -> Float[Array, "b _ _ c"]:
  """Halves height and width without parameters."""
  return fir_downsample(x, padding) if fir else pool(x)


def upsample(x: Float[Array, "b h w c"], fir: bool = False, padding: Padding = "SAME") -> Float[Array, "b 2*h 2*w c"]:
  """Doubles height and width without parameters."""
  return fir_upsample(x, padding) if fir else nearest(x)


class DownsampleConv(nn.Module):
  """Halves height and width by a convolution of stride 2, with "fir" after the filter.

  Attributes:
    features: channels of the output.
    kind: see the module.
    padding: what lies beyond the border.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  features: int
  kind: Literal["conv", "conv_symmetric", "fir"] = "conv"
  padding: Padding = "SAME"
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ features"]:
    x = _pad(x, *_PADDED[self.kind], self.padding)
    if self.kind == "fir":
      x = _filter(_filter(x, axis=1, stride=1), axis=2, stride=1)
    conv = Conv(self.features, (3, 3), 2, padding="VALID", dtype=self.dtype, param_dtype=self.param_dtype)
    return conv(x)


class UpsampleConv(nn.Module):
  """Doubles height and width by repetition, or by the filter, then a convolution.

  Attributes:
    features: channels of the output.
    fir: whether by the filter.
    padding: what lies beyond the border.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  features: int
  fir: bool = False
  padding: Padding = "SAME"
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w features"]:
    # What the filter spreads beyond the border is seen by the convolution, as if both were one.
    x, padding = (_fir_upsample_and_border(x, self.padding), "VALID") if self.fir else (nearest(x), self.padding)
    return Conv(self.features, (3, 3), padding=padding, dtype=self.dtype, param_dtype=self.param_dtype)(x)


def _pad(x: Array, before: int, after: int, padding: Padding) -> Array:
  mode = "wrap" if padding == "CIRCULAR" else "constant"
  return jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode=mode)


def _filter(x: Array, axis: int, stride: int) -> Array:
  """Every stride-th value of x * (1, 3, 3, 1)/8 along one axis, where the filter lies within x.

  Sums of slices: XLA fuses them, while convolutions of single channels are slow on most devices.
  """
  taps = [jax.lax.slice_in_dim(x, k, x.shape[axis] - 3 + k, stride, axis) for k in range(4)]
  return (taps[0] + 3 * (taps[1] + taps[2]) + taps[3]) / 8


def _fir_upsample_and_border(x: Array, padding: Padding) -> Array:
  """`fir_upsample` and one more pixel on each side."""
  x = _pad(x, 1, 1, padding)
  for axis in (1, 2):
    left, right = jax.lax.slice_in_dim(x, 0, -1, axis=axis), jax.lax.slice_in_dim(x, 1, None, axis=axis)
    pairs = jnp.stack([(3 * left + right) / 4, (left + 3 * right) / 4], axis=axis + 1)
    x = pairs.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
  return x
