"""A diffusion transformer for the study of scaling: patches, blocks with adaptive norms that start as the identity.

Peebles and Xie 2023, Scalable Diffusion Models with Transformers (adaLN-Zero), without classes and learned variances.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.models.attention import attention
from jaxdiff.models.layers import ZERO, TimeEmbedding


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """The normalized x [b, n, c], scaled and shifted by [b, c] each."""
  y = nn.LayerNorm(use_bias=False, use_scale=False, dtype=x.dtype)(x)
  return y * (1 + scale[:, None, :]) + shift[:, None, :]


class Block(nn.Module):
  """Attention, then a perceptron of four times the width; the embedding shifts, scales and gates both."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
    b, n, c = x.shape
    dense = lambda features, **options: nn.Dense(features, dtype=self.dtype, **options)
    parts = jnp.split(dense(6 * c, kernel_init=ZERO)(nn.silu(embedding)), 6, axis=-1)
    query, key, value = jnp.split(dense(3 * c)(modulated(x, *parts[:2])), 3, axis=-1)
    heads = [y.reshape(b, n, self.heads, c // self.heads) for y in (query, key, value)]
    x = x + parts[2][:, None, :] * dense(c)(attention(*heads).reshape(b, n, c))
    return x + parts[5][:, None, :] * dense(c)(nn.gelu(dense(4 * c)(modulated(x, *parts[3:5]))))


class DiT(nn.Module):
  """(x [b, h, w, c], t [b]) -> [b, h, w, c]; the defaults are XL/2."""

  depth: int = 28
  width: int = 1152
  heads: int = 16
  patch: int = 2
  dtype: Any = jnp.bfloat16
  remat: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    p, dtype = self.patch, self.dtype
    embedding = TimeEmbedding(self.width, dtype=dtype)(t)
    y = nn.Conv(self.width, (p, p), strides=(p, p), dtype=dtype)(x.astype(dtype)).reshape(b, -1, self.width)
    y = y + self.param("positions", nn.initializers.normal(0.02), y.shape[1:])[None].astype(dtype)
    block = nn.remat(Block) if self.remat == "full" else Block
    for i in range(self.depth):
      y = block(self.heads, dtype, name=f"block_{i}")(y, embedding)
    parts = jnp.split(nn.Dense(2 * self.width, dtype=dtype, kernel_init=ZERO)(nn.silu(embedding)), 2, axis=-1)
    y = nn.Dense(p * p * c, dtype=dtype, kernel_init=ZERO)(modulated(y, *parts))
    y = y.reshape(b, h // p, w // p, p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return y.astype(x.dtype)
