"""The two halves of an autoencoder of images: to features at a lower resolution, and back.

Encoder and decoder are the halves of a U-Net without skip connections and without time: residual blocks at each level,
between levels height and width halve or double, and attention in the middle.

References:
  Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, Section 3.1 and Appendix G.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import check_divisible
from jaxdiff.models.resampling import nearest

_EPSILON = 1e-6  # of the group norms


def level_features(channels: int, multipliers: Sequence[int], groups: int) -> tuple[int, ...]:
  """The channels of every level.

  Raises:
    ValueError: for channels that the groups do not divide.
  """
  features = tuple(channels * multiplier for multiplier in multipliers)
  for level, number in enumerate(features):
    check_divisible(f"channels at level {level}", number, "groups", groups)
  return features


def check_images(x: Array, channels: int, levels: int) -> None:
  """Refuses x that is not [b, h, w, channels], or whose height or width does not halve levels - 1 times."""
  if x.ndim != 4 or x.shape[-1] != channels:
    raise ValueError(f"x has shape {x.shape}: pass images [b, h, w, {channels}]")
  for name, size in zip(("height of x", "width of x"), x.shape[1:3], strict=True):
    check_divisible(name, size, "2^(levels - 1)", 2 ** (levels - 1))


def check_latents(name: str, z: Array, channels: int, what: str) -> None:
  """Refuses z that is not [b, h, w, channels]."""
  if z.ndim != 4 or z.shape[-1] != channels:
    raise ValueError(f"{name} has shape {z.shape}: pass {what} [b, h, w, {channels}]")


class _Residual(nn.Module):
  """Norm, SiLU and convolution, twice, around a shortcut."""

  features: int
  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
    h = x
    for k in range(2):
      h = nn.silu(nn.GroupNorm(self.groups, epsilon=_EPSILON, name=f"norm_{k}", **self.types)(h))
      h = Conv(self.features, (3, 3), name=f"conv_{k}", **self.types)(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, name="shortcut", **self.types)(x)
    return x + h


class _Middle(nn.Module):
  """Residual block, attention, residual block, at the lowest resolution."""

  attention: bool
  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    h = _Residual(h.shape[-1], self.groups, self.types, name="block_0")(h)
    if self.attention:
      h = SelfAttention(1, self.groups, norm_epsilon=_EPSILON, all_biases=True, name="attention", **self.types)(h)
    return _Residual(h.shape[-1], self.groups, self.types, name="block_1")(h)


class Encoder(nn.Module):
  """From images to features at the lowest resolution.

  Attributes:
    features: channels of each level, from full resolution down.
    blocks: residual blocks per level.
    outputs: channels of the output.
    attention: whether there is attention in the middle.
    groups: of the group norms; must divide the channels of every level.
    types: dtype and param_dtype.
  """

  features: tuple[int, ...]
  blocks: int
  outputs: int
  attention: bool
  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ outputs"]:
    h = Conv(self.features[0], (3, 3), name="input", **self.types)(x)
    for level, features in enumerate(self.features):
      for block in range(self.blocks):
        h = _Residual(features, self.groups, self.types, name=f"level_{level}_block_{block}")(h)
      if level < len(self.features) - 1:
        # A row and a column of zeros at the end alone: SAME for the even sizes that there are.
        h = Conv(features, (3, 3), 2, name=f"down_{level}", **self.types)(h)
    h = _Middle(self.attention, self.groups, self.types, name="middle")(h)
    h = nn.silu(nn.GroupNorm(self.groups, epsilon=_EPSILON, name="norm", **self.types)(h))
    return Conv(self.outputs, (3, 3), name="output", **self.types)(h)


class Decoder(nn.Module):
  """From features at the lowest resolution to images; it has a residual block more at each level than the encoder.

  Attributes: those of `Encoder`.
  """

  features: tuple[int, ...]
  blocks: int
  outputs: int
  attention: bool
  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, z: Float[Array, "b h w k"]) -> Float[Array, "b _ _ outputs"]:
    h = Conv(self.features[-1], (3, 3), name="input", **self.types)(z)
    h = _Middle(self.attention, self.groups, self.types, name="middle")(h)
    for level, features in reversed(list(enumerate(self.features))):
      for block in range(self.blocks + 1):
        h = _Residual(features, self.groups, self.types, name=f"level_{level}_block_{block}")(h)
      if level > 0:
        h = Conv(features, (3, 3), name=f"up_{level}", **self.types)(nearest(h))
    h = nn.silu(nn.GroupNorm(self.groups, epsilon=_EPSILON, name="norm", **self.types)(h))
    return Conv(self.outputs, (3, 3), name="output", **self.types)(h)
