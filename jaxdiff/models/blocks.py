"""The residual block of U-Nets, on feature maps [b, h, w, c], told an embedding [b, e].

    h = conv(silu(norm(x)))
    h = silu(norm(h + W e))                           modulation "add" (Ho et al. 2020)
    h = silu(norm(h) (1 + W_1 e) + W_2 e)             modulation "scale_shift" (Dhariwal and Nichol 2021)
    y = x + conv(dropout(h))                          over sqrt 2 with `skip_rescale` (Song et al. 2021)

Resampling within the block (Brock et al. 2019, BigGAN) acts before the first convolution, and on x.

Parameters for c channels in, f out: GroupNorm_0 (scale, bias: [c]); Conv_0/kernel [3, 3, c, f]; Dense_0 (kernel [e, f],
or [e, 2 f] with the scales first, and bias); GroupNorm_1 (scale, bias: [f]) with "add"; Conv_1 (kernel [3, 3, f, f],
bias [f]); shortcut (kernel [c, f], bias [f]) where x is projected. `all_biases` adds Conv_0/bias and, with
"scale_shift", GroupNorm_1.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import ZERO, rescaled
from jaxdiff.models.resampling import Padding, downsample, upsample


class ResidualBlock(nn.Module):
  """Norm, SiLU and convolution, twice, around a shortcut; zero at initialization but for the shortcut.

  Attributes:
    features: channels of the output; an input with another number is projected for the shortcut.
    groups: of the group norms; must divide the channels of the input and `features`.
    dropout: probability of dropping an activation before the last convolution.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    norm_epsilon: added to the variance in the norms.
    modulation: how the embedding acts: see the module.
    all_biases: whether also those biases and scales exist for which others can mostly stand: see the module.
    skip_rescale: whether the sum with the shortcut is divided by sqrt 2.
    padding: what lies beyond the border.
    resample: whether height and width are halved or doubled.
    fir: whether by the FIR filter: see `resampling`.
    project_resampled: whether the shortcut is projected wherever the block resamples.
  """

  features: int
  groups: int = 8
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-6
  modulation: Literal["add", "scale_shift"] = "scale_shift"
  all_biases: bool = False
  skip_rescale: bool = False
  padding: Padding = "SAME"
  resample: Literal["none", "down", "up"] = "none"
  fir: bool = False
  project_resampled: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], deterministic: bool = True
  ) -> Float[Array, "b _ _ features"]:
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = functools.partial(nn.GroupNorm, self.groups, epsilon=self.norm_epsilon, **types)
    conv = functools.partial(Conv, self.features, (3, 3), padding=self.padding, **types)
    add = self.modulation == "add"
    h = nn.silu(norm()(x))
    if self.resample != "none":
      half_or_double = downsample if self.resample == "down" else upsample
      h, x = half_or_double(h, self.fir, self.padding), half_or_double(x, self.fir, self.padding)
    h = conv(use_bias=self.all_biases)(h)
    told = nn.Dense(self.features * (1 if add else 2), **types)(nn.silu(embedding))[:, None, None, :]
    if add:
      h = nn.silu(norm()(h + told))
    else:
      scale, shift = jnp.split(told, 2, axis=-1)
      h = nn.silu(norm(use_bias=self.all_biases, use_scale=self.all_biases)(h) * (1 + scale) + shift)
    h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
    h = conv(kernel_init=ZERO)(h)
    if x.shape[-1] != self.features or (self.project_resampled and self.resample != "none"):
      x = nn.Dense(self.features, name="shortcut", **types)(x)
    return rescaled(x + h, self.skip_rescale)
