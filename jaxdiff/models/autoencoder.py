"""The autoencoder of latent diffusion: images [b, h, w, c] to Gaussians over latents [b, h / f, w / f, k], and back.

    q(z | x) = N(mean, exp(log_variance) I),   (mean, log_variance) = encode(x),   x = decode(z),   f = 2^(levels - 1)

Encoder and decoder are the halves of a U-Net without skip connections and without time: residual blocks at each level,
between levels height and width halve or double, and attention in the middle.

References:
  Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, Section 3.1 and Appendix G.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import check_divisible
from jaxdiff.models.resampling import nearest

_LOG_VARIANCES = (-30.0, 20.0)  # of the unscaled latents, as in the published models
_EPSILON = 1e-6  # of the group norms


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

  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    h = _Residual(h.shape[-1], self.groups, self.types, name="block_0")(h)
    h = SelfAttention(1, self.groups, norm_epsilon=_EPSILON, all_biases=True, name="attention", **self.types)(h)
    return _Residual(h.shape[-1], self.groups, self.types, name="block_1")(h)


class _Encoder(nn.Module):
  """From images to twice as many channels as the latents have."""

  features: tuple[int, ...]
  blocks: int
  outputs: int
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
    h = _Middle(self.groups, self.types, name="middle")(h)
    h = nn.silu(nn.GroupNorm(self.groups, epsilon=_EPSILON, name="norm", **self.types)(h))
    return Conv(self.outputs, (3, 3), name="output", **self.types)(h)


class _Decoder(nn.Module):
  """From latents to images; it has a residual block more at each level than the encoder."""

  features: tuple[int, ...]
  blocks: int
  outputs: int
  groups: int
  types: Mapping[str, Any]

  @nn.compact
  def __call__(self, z: Float[Array, "b h w k"]) -> Float[Array, "b _ _ outputs"]:
    h = Conv(self.features[-1], (3, 3), name="input", **self.types)(z)
    h = _Middle(self.groups, self.types, name="middle")(h)
    for level, features in reversed(list(enumerate(self.features))):
      for block in range(self.blocks + 1):
        h = _Residual(features, self.groups, self.types, name=f"level_{level}_block_{block}")(h)
      if level > 0:
        h = Conv(features, (3, 3), name=f"up_{level}", **self.types)(nearest(h))
    h = nn.silu(nn.GroupNorm(self.groups, epsilon=_EPSILON, name="norm", **self.types)(h))
    return Conv(self.outputs, (3, 3), name="output", **self.types)(h)


class AutoencoderKL(nn.Module):
  """Variational autoencoder with a Gaussian posterior for every pixel of the latents.

  `encode` and `decode` are methods: `net.apply(params, x, method="encode")`. The call itself decodes the mean.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    latent_channels: k.
    image_channels: c, of the decoded images.
    groups: of the group norms; must divide the channels of every level.
    scaling: what the latents are multiplied by when they leave the encoder, and divided by when they enter the decoder:
      1 over the standard deviation of the latents of data, so that a diffusion model sees unit variance. Train with 1.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> import jax
    >>> net, x = AutoencoderKL(channels=8, channel_multipliers=(1, 2), blocks=1, groups=4), jnp.ones((2, 8, 8, 3))
    >>> params = jax.jit(net.init)(jax.random.key(0), x)
    >>> mean, log_variance = net.apply(params, x, method="encode")
    >>> mean.shape, net.apply(params, mean, method="decode").shape
    ((2, 4, 4, 4), (2, 8, 8, 3))
  """

  channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  latent_channels: int = 4
  image_channels: int = 3
  groups: int = 32
  scaling: float = 1.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if not self.scaling > 0:
      raise ValueError(f"scaling={self.scaling}: must be positive")
    features = tuple(self.channels * multiplier for multiplier in self.channel_multipliers)
    for level, number in enumerate(features):
      check_divisible(f"channels at level {level}", number, "groups", self.groups)
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = _Encoder(features, self.blocks, 2 * self.latent_channels, self.groups, types)
    self.moments = nn.Dense(2 * self.latent_channels, **types)
    self.latents = nn.Dense(self.latent_channels, **types)
    self.decoder = _Decoder(features, self.blocks, self.image_channels, self.groups, types)

  def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b _ _ k"], Float[Array, "b _ _ k"]]:
    """The posterior of the latents.

    Args:
      x: images, scaled to [-1, 1] for the published models.

    Returns:
      (mean, log of the variance), of the scaled latents, in the dtype of x.

    Raises:
      ValueError: for x that is not [b, h, w, image_channels], or h or w not divisible by f.
    """
    if x.ndim != 4 or x.shape[-1] != self.image_channels:
      raise ValueError(f"x has shape {x.shape}: pass images [b, h, w, {self.image_channels}]")
    for name, size in zip(("height of x", "width of x"), x.shape[1:3], strict=True):
      check_divisible(name, size, "2^(levels - 1)", 2 ** (len(self.channel_multipliers) - 1))
    mean, log_variance = jnp.split(self.moments(self.encoder(x.astype(self.dtype))).astype(x.dtype), 2, axis=-1)
    return mean * self.scaling, jnp.clip(log_variance, *_LOG_VARIANCES) + 2 * math.log(self.scaling)

  def decode(self, z: Float[Array, "b h w k"]) -> Float[Array, "b _ _ c"]:
    """The images of scaled latents, in their dtype.

    Raises:
      ValueError: for z that is not [b, h, w, latent_channels].
    """
    if z.ndim != 4 or z.shape[-1] != self.latent_channels:
      raise ValueError(f"z has shape {z.shape}: pass latents [b, h, w, {self.latent_channels}]")
    return self.decoder(self.latents((z / self.scaling).astype(self.dtype))).astype(z.dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The images of the means of the latents of x."""
    return self.decode(self.encode(x)[0])
