"""The autoencoder of latent diffusion: images [b, h, w, c] to Gaussians over latents [b, h / f, w / f, k], and back.

    q(z | x) = N(mean, exp(log_variance) I),   (mean, log_variance) = encode(x),   x = decode(z),   f = 2^(levels - 1)

With one output a channel, x is an image; an output of more channels holds the parameters of a distribution of images.

References:
  Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, Section 3.1 and Appendix G.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.coding import Decoder, Encoder, check_images, check_latents, level_features

_LOG_VARIANCES = (-30.0, 20.0)  # of the unscaled latents, as in the published models


class AutoencoderKL(nn.Module):
  """Variational autoencoder with a Gaussian posterior for every pixel of the latents.

  `encode` and `decode` are methods: `net.apply(params, x, method="encode")`. The call itself decodes the mean.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    latent_channels: k.
    image_channels: c, of the images.
    groups: of the group norms; must divide the channels of every level.
    scaling: what the latents are multiplied by when they leave the encoder, and divided by when they enter the decoder:
      1 over the standard deviation of the latents of data, so that a diffusion model sees unit variance. Train with 1.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    output_channels: of what the decoder gives; None for image_channels.
    attention: whether encoder and decoder have attention at the lowest resolution.

  Example:
    >>> import jax
    >>> net, x = AutoencoderKL(channels=8, channel_multipliers=(1, 2), blocks=1, groups=4), jnp.ones((2, 8, 8, 3))
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x)
    >>> encode, decode = (lambda v, x, name=name: net.apply(v, x, method=name) for name in ("encode", "decode"))
    >>> mean, log_variance = jax.eval_shape(encode, params, x)
    >>> mean.shape, jax.eval_shape(decode, params, mean).shape
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
  output_channels: int | None = None
  attention: bool = True

  def setup(self) -> None:
    if not self.scaling > 0:
      raise ValueError(f"scaling={self.scaling}: must be positive")
    features = level_features(self.channels, self.channel_multipliers, self.groups)
    outputs = self.output_channels or self.image_channels
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = Encoder(features, self.blocks, 2 * self.latent_channels, self.attention, self.groups, types)
    self.moments = nn.Dense(2 * self.latent_channels, **types)
    self.latents = nn.Dense(self.latent_channels, **types)
    self.decoder = Decoder(features, self.blocks, outputs, self.attention, self.groups, types)

  def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b _ _ k"], Float[Array, "b _ _ k"]]:
    """The posterior of the latents.

    Args:
      x: images, scaled to [-1, 1] for the published models.

    Returns:
      (mean, log of the variance), of the scaled latents, in the dtype of x.

    Raises:
      ValueError: for x that is not [b, h, w, image_channels], or h or w not divisible by f.
    """
    check_images(x, self.image_channels, len(self.channel_multipliers))
    mean, log_variance = jnp.split(self.moments(self.encoder(x.astype(self.dtype))).astype(x.dtype), 2, axis=-1)
    return mean * self.scaling, jnp.clip(log_variance, *_LOG_VARIANCES) + 2 * math.log(self.scaling)

  def decode(self, z: Float[Array, "b h w k"]) -> Float[Array, "b _ _ outputs"]:
    """The outputs of scaled latents, in their dtype.

    Raises:
      ValueError: for z that is not [b, h, w, latent_channels].
    """
    check_latents("z", z, self.latent_channels, "latents")
    return self.decoder(self.latents((z / self.scaling).astype(self.dtype))).astype(z.dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w outputs"]:
    """The outputs of the means of the latents of x."""
    return self.decode(self.encode(x)[0])
