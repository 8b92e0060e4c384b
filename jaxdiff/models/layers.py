"""Layers shared by the networks: time embedding, residual block, self-attention, resampling.

Feature maps are [b, h, w, c]. Parameters are float32; `dtype` is the type of the computation. Layers that a norm or a
softmax follows have no bias: it would cancel, and Adam would turn the rounding of its zero gradient into steps.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ZERO = nn.initializers.zeros_init()


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
  """Raises a ValueError that names both arguments if `divisor` does not divide `value`."""
  if value % divisor:
    nearest = max(divisor, round(value / divisor) * divisor)
    raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}: use {name}={nearest}, for example")


def check_input(x: Array, t: Array, rank: int, layout: str) -> None:
  """Raises a TypeError if `x` is not of floats, a ValueError for a wrong shape of `x` or `t`."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"x has dtype {x.dtype}: pass floats; integers of images are dequantized or scaled first")
  if x.ndim != rank:
    raise ValueError(f"x has shape {x.shape}: pass {layout}, with a leading batch axis")
  if t.shape != x.shape[:1]:
    raise ValueError(f"t has shape {t.shape}: pass one time per example, shape {x.shape[:1]}")


def sinusoidal_embedding(
  t: Float[Array, " b"], features: int, max_frequency: float = 1000.0, min_frequency: float = 0.1
) -> Float[Array, "b {features}"]:
  """Cosines and sines of `t` at geometrically spaced angular frequencies.

  e(t) = [cos(w_k t), sin(w_k t)],  w_k = max_frequency (min_frequency / max_frequency)^(k / (features/2 - 1))

  Differences in time much below 1 / `max_frequency` are not resolved; above it the embedding is smooth in t up to
  1 / `min_frequency`. The defaults are those of DDPM for t in [0, 1] (its 1000 t with periods up to 10000). Choose
  `max_frequency` from the smallest time that matters: about 1e4 for a VP process conditioned on t down to 1e-5, about
  10 for log(sigma) / 4 of the EDM preconditioning.

  Args:
    t: times, in whatever unit the network is conditioned on.
    features: size of the embedding, even and at least 4.
    max_frequency: largest angular frequency, radians per unit of t.
    min_frequency: smallest angular frequency, radians per unit of t.

  Returns:
    Embedding, float32 (float64 for float64 times).

  Raises:
    ValueError: if `features` is odd or below 4.

  Example:
    >>> sinusoidal_embedding(jnp.zeros(3), features=8).shape
    (3, 8)

  References:
    Ho et al., Denoising Diffusion Probabilistic Models, 2020, appendix B (embedding of Vaswani et al., 2017, 3.5).
  """
  if features < 4 or features % 2:
    raise ValueError(f"features={features} of the time embedding is odd or below 4: use an even number such as 64")
  half = features // 2
  dtype = jnp.promote_types(t.dtype, jnp.float32)
  exponent = jnp.arange(half, dtype=dtype) / (half - 1)
  phase = t.astype(dtype)[:, None] * (max_frequency * (min_frequency / max_frequency) ** exponent)[None, :]
  return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def fourier_features(x: Float[Array, "... c"], levels: int) -> Float[Array, "... 5*c"]:
  """The input beside its sines and cosines at the two highest frequencies of data of this many levels in [-1, 1].

      x, sin(pi L x / 2), cos(pi L x / 2), sin(pi L x), cos(pi L x)

  with periods of two levels and of one: what tells neighbouring levels apart, which a network else is slow to learn.
  For L = 256 they are n = 7 and 8 of sin(2^n pi x).

  References:
    Kingma et al. 2021, Variational Diffusion Models, Appendix C.
  """
  angles = [math.pi * levels / 2 * x, math.pi * levels * x]
  return jnp.concatenate([x, *(wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos))], axis=-1)


class TimeEmbedding(nn.Module):
  """Sinusoidal embedding of the time, then a two-layer perceptron.

  Attributes:
    features: size of the output; the sinusoids take `features` // 4 of them, rounded up to an even number of 4 or more.
    max_frequency: see `sinusoidal_embedding`, radians per unit of time.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  features: int
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b features"]:
    h = sinusoidal_embedding(t, max(4, 2 * math.ceil(self.features / 8)), self.max_frequency)
    dense = functools.partial(nn.Dense, self.features, dtype=self.dtype, param_dtype=self.param_dtype)
    return dense()(nn.silu(dense()(h.astype(self.dtype))))


class ResidualBlock(nn.Module):
  """Norm, SiLU and convolution, twice, around a shortcut; zero at initialization but for the shortcut.

  The time embedding scales and shifts the second norm.

  Attributes:
    features: channels of the output; an input with another number is projected for the shortcut.
    groups: of the group norms; must divide the channels of the input and `features`.
    dropout: probability of dropping an activation before the last convolution.
    dtype: type of the computation.
  """

  features: int
  groups: int = 8
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], deterministic: bool = True
  ) -> Float[Array, "b h w features"]:
    h = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(x))
    h = nn.Conv(self.features, (3, 3), dtype=self.dtype, use_bias=False)(h)
    scale, shift = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype)(nn.silu(embedding)), 2, axis=-1)
    h = nn.GroupNorm(self.groups, dtype=self.dtype, use_bias=False, use_scale=False)(h)
    h = nn.silu(h * (1 + scale[:, None, None, :]) + shift[:, None, None, :])
    h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
    h = nn.Conv(self.features, (3, 3), dtype=self.dtype, kernel_init=ZERO)(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + h


def attention(
  query: Float[Array, "b n h c"], key: Float[Array, "b n h c"], value: Float[Array, "b n h c"]
) -> Float[Array, "b n h c"]:
  """softmax(q k / sqrt c) v of every head, the softmax in float32 or wider (`jax.nn` has it in float32 always)."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=wide)
  weights = jax.nn.softmax(logits * (1 / math.sqrt(query.shape[-1])), axis=-1)
  return jnp.einsum("bhqk,bkhc->bqhc", weights.astype(key.dtype), value)


class SelfAttention(nn.Module):
  """Multi-head attention between all positions, with a residual connection that starts at zero.

  Attributes:
    heads: number of heads; must divide the channels.
    groups: of the group norm; must divide the channels.
    dtype: type of the computation.
  """

  heads: int = 1
  groups: int = 8
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    y = nn.GroupNorm(self.groups, dtype=self.dtype)(x).reshape(b, h * w, c)
    qkv = nn.Dense(3 * c, dtype=self.dtype, use_bias=False, name="query_key_value")(y)
    query, key, value = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
    y = attention(query, key, value).reshape(b, h, w, c)
    return x + nn.Dense(c, dtype=self.dtype, kernel_init=ZERO, name="output")(y)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
  """Halves height and width: the mean of each square of 2x2 pixels."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
  """Doubles height and width: every pixel is repeated."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
