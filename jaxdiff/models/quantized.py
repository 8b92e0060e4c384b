"""Autoencoders with discrete latents: one of K codes at every pixel of a grid [h / f, w / f], f = 2^(levels - 1).

`VQVAE` encodes to vectors, which `jaxdiff.quantization.nearest` replaces by those of a codebook; `GumbelVAE` encodes to
logits of the codes, and decodes probabilities of them. What lies between encoder and decoder, and how both are trained,
is in `jaxdiff.losses`.

References:
  van den Oord et al. 2017, Neural Discrete Representation Learning; Jang et al. 2017, Categorical Reparameterization
  with Gumbel-Softmax.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.coding import Decoder, Encoder, check_images, check_latents, level_features


def _check_codes(codes: int) -> None:
  if codes < 2:
    raise ValueError(f"codes={codes}: a codebook needs at least 2 codes")


class VQVAE(nn.Module):
  """Encoder to vectors and decoder of vectors, with a codebook.

  `encode` and `decode` are methods: `net.apply(variables, x, method="encode")`. The variables of `init` are two groups:
  "params", and "codebook" with its vectors [codes, code_channels] and, where these are moving averages of what the
  encoder gives (`jaxdiff.training.codebook`), the counts [codes] and sums [codes, code_channels] of it.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    codes: K, at least 2.
    code_channels: d, of a vector.
    image_channels: c, of the images.
    output_channels: of what the decoder gives; None for image_channels.
    groups: of the group norms; must divide the channels of every level.
    attention: whether encoder and decoder have attention at the lowest resolution.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> net, x = VQVAE(channels=8, channel_multipliers=(1, 2), blocks=1, codes=16, groups=4), jnp.ones((2, 8, 8, 3))
    >>> variables = jax.eval_shape(net.init, jax.random.key(0), x)
    >>> encode = lambda variables, x: net.apply(variables, x, method="encode")
    >>> jax.eval_shape(encode, variables, x).shape, variables["codebook"]["vectors"].shape
    ((2, 4, 4, 16), (16, 16))
  """

  channels: int = 64
  channel_multipliers: tuple[int, ...] = (1, 2, 4)
  blocks: int = 2
  codes: int = 512
  code_channels: int = 16
  image_channels: int = 3
  output_channels: int | None = None
  groups: int = 8
  attention: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    _check_codes(self.codes)
    features = level_features(self.channels, self.channel_multipliers, self.groups)
    outputs = self.output_channels or self.image_channels
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = Encoder(features, self.blocks, self.code_channels, self.attention, self.groups, types)
    self.decoder = Decoder(features, self.blocks, outputs, self.attention, self.groups, types)
    shape = (self.codes, self.code_channels)
    unit = nn.initializers.normal(self.code_channels**-0.5)
    self.variable("codebook", "vectors", lambda: unit(self.make_rng("params"), shape, self.param_dtype))
    self.variable("codebook", "counts", jnp.zeros, shape[:1], self.param_dtype)
    self.variable("codebook", "sums", jnp.zeros, shape, self.param_dtype)

  def encode(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ d"]:
    """The vectors of images, before quantization, in the dtype of x.

    Raises:
      ValueError: for x that is not [b, h, w, image_channels], or h or w not divisible by f.
    """
    check_images(x, self.image_channels, len(self.channel_multipliers))
    return self.encoder(x.astype(self.dtype)).astype(x.dtype)

  def decode(self, z: Float[Array, "b h w d"]) -> Float[Array, "b _ _ outputs"]:
    """The outputs of vectors, in their dtype.

    Raises:
      ValueError: for z that is not [b, h, w, code_channels].
    """
    check_latents("z", z, self.code_channels, "vectors")
    return self.decoder(z.astype(self.dtype)).astype(z.dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w outputs"]:
    """The outputs of the vectors of x, without quantization."""
    return self.decode(self.encode(x))


class GumbelVAE(nn.Module):
  """Encoder to the logits of codes and decoder of their probabilities.

  `encode` and `decode` are methods: `net.apply(params, x, method="encode")`. The decoder begins with the mean of the
  vectors of the codes, weighted by what it is given: probabilities, a relaxed sample or a one-hot.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    codes: K, at least 2.
    code_channels: of the vector of a code.
    image_channels: c, of the images.
    output_channels: of what the decoder gives; None for image_channels.
    groups: of the group norms; must divide the channels of every level.
    attention: whether encoder and decoder have attention at the lowest resolution.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> net, x = GumbelVAE(channels=8, channel_multipliers=(1, 2), blocks=1, codes=16, groups=4), jnp.ones((2, 8, 8, 3))
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x)
    >>> encode, decode = (lambda v, x, name=name: net.apply(v, x, method=name) for name in ("encode", "decode"))
    >>> logits = jax.eval_shape(encode, params, x)
    >>> logits.shape, jax.eval_shape(decode, params, logits).shape
    ((2, 4, 4, 16), (2, 8, 8, 3))
  """

  channels: int = 64
  channel_multipliers: tuple[int, ...] = (1, 2, 4)
  blocks: int = 2
  codes: int = 64
  code_channels: int = 16
  image_channels: int = 3
  output_channels: int | None = None
  groups: int = 8
  attention: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    _check_codes(self.codes)
    features = level_features(self.channels, self.channel_multipliers, self.groups)
    outputs = self.output_channels or self.image_channels
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.encoder = Encoder(features, self.blocks, self.codes, self.attention, self.groups, types)
    self.vectors = nn.Dense(self.code_channels, use_bias=False, **types)
    self.decoder = Decoder(features, self.blocks, outputs, self.attention, self.groups, types)

  def encode(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ codes"]:
    """The logits of the codes, in the dtype of x.

    Raises:
      ValueError: for x that is not [b, h, w, image_channels], or h or w not divisible by f.
    """
    check_images(x, self.image_channels, len(self.channel_multipliers))
    return self.encoder(x.astype(self.dtype)).astype(x.dtype)

  def decode(self, p: Float[Array, "b h w codes"]) -> Float[Array, "b _ _ outputs"]:
    """The outputs of probabilities of the codes, in their dtype.

    Raises:
      ValueError: for p that is not [b, h, w, codes].
    """
    check_latents("p", p, self.codes, "probabilities")
    return self.decoder(self.vectors(p.astype(self.dtype))).astype(p.dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w outputs"]:
    """The outputs of the probabilities of the codes."""
    return self.decode(jax.nn.softmax(self.encode(x)))
