"""Attention between the positions of feature maps [b, h, w, c], and from them to tokens [b, n, e].

    attention(q, k, v) = softmax(q k^T / sqrt d) v        for each head, of d channels

Parameters of `SelfAttention` for c channels: GroupNorm_0 (scale, bias: [c]); query_key_value/kernel [c, 3 c], whose
columns are those of all queries, all keys, all values, each by heads; output (kernel [c, c], bias [c]). Those of
`CrossAttention`: GroupNorm_0; query/kernel [c, c]; key_value/kernel [e, 2 c]; output. With `all_biases` the products
for queries, keys and values have biases, too.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdiff.models.layers import ZERO, rescaled

Implementation = Literal["xla", "cudnn"]


def attention(
  query: Float[Array, "b n h d"],
  key: Float[Array, "b m h d"],
  value: Float[Array, "b m h d"],
  mask: Bool[Array, "b m"] | None = None,
  implementation: Implementation = "xla",
) -> Float[Array, "b n h d"]:
  """softmax(q k^T / sqrt d) v of every head.

  Args:
    query: what asks.
    key: what is asked.
    value: what is answered.
    mask: which of the m are there, at least one of each example; the others have no influence.
    implementation: "xla": the softmax in float32 or wider (`jax.nn.dot_product_attention` has it in float32 always),
      differentiable in both modes. "cudnn": the fused kernel of NVIDIA GPUs, whose memory does not grow with n m, for
      bfloat16 and float16 and heads of at most 128 channels, a multiple of 8; without forward mode, which likelihoods
      need.

  Returns:
    The mean of the values by the weights.
  """
  if implementation == "cudnn":
    there = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=there, implementation="cudnn")
  wide = jnp.promote_types(query.dtype, jnp.float32)
  logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=wide) * (1 / math.sqrt(query.shape[-1]))
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(wide).min)
  weights = jax.nn.softmax(logits, axis=-1)
  return jnp.einsum("bhqk,bkhc->bqhc", weights.astype(key.dtype), value)


class SelfAttention(nn.Module):
  """Multi-head attention between all positions, with a residual connection that starts at zero.

  Attributes:
    heads: number of heads; must divide the channels.
    groups: of the group norm; must divide the channels.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    norm_epsilon: added to the variance in the norm.
    all_biases: whether queries, keys and values have biases.
    skip_rescale: whether the sum with the input is divided by sqrt 2.
    implementation: see `attention`.
  """

  heads: int = 1
  groups: int = 8
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-6
  all_biases: bool = False
  skip_rescale: bool = False
  implementation: Implementation = "xla"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = nn.GroupNorm(self.groups, epsilon=self.norm_epsilon, **types)(x).reshape(b, h * w, c)
    qkv = nn.Dense(3 * c, use_bias=self.all_biases, name="query_key_value", **types)(y)
    query, key, value = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
    y = attention(query, key, value, implementation=self.implementation).reshape(b, h, w, c)
    return rescaled(x + nn.Dense(c, kernel_init=ZERO, name="output", **types)(y), self.skip_rescale)


class CrossAttention(nn.Module):
  """Multi-head attention from all positions to tokens, with a residual connection that starts at zero.

  Attributes: those of `SelfAttention`.
  """

  heads: int = 1
  groups: int = 8
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-6
  all_biases: bool = False
  skip_rescale: bool = False
  implementation: Implementation = "xla"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], tokens: Float[Array, "b n e"], mask: Bool[Array, "b n"] | None = None
  ) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = nn.GroupNorm(self.groups, epsilon=self.norm_epsilon, **types)(x).reshape(b, h * w, c)
    query = nn.Dense(c, use_bias=self.all_biases, name="query", **types)(y)
    query = query.reshape(b, h * w, self.heads, c // self.heads)
    pair = nn.Dense(2 * c, use_bias=self.all_biases, name="key_value", **types)(tokens)
    key, value = jnp.moveaxis(pair.reshape(b, tokens.shape[1], 2, self.heads, c // self.heads), 2, 0)
    y = attention(query, key, value, mask, self.implementation).reshape(b, h, w, c)
    return rescaled(x + nn.Dense(c, kernel_init=ZERO, name="output", **types)(y), self.skip_rescale)
