"""Texts as conditions: a transformer encoder of bytes, trained together with the network that reads it.

    h_0 = first,   h_i = table[byte_i] + position_i   (i = 1 .. length)
    h <- h + attention(norm(h)),   h <- h + W2 gelu(W1 norm(h)),   `layers` times
    tokens = W norm(h),   vector = V norm(h)_0

The bytes are those of UTF-8, so that there is no vocabulary and no text that cannot be read. The end of a shorter text
is filled with 0, a byte that no text has: nothing attends to it. The first token is learned and always there; the whole
text is gathered in it. `jaxdiff.data.text` makes the arrays.

References:
  Vaswani et al. 2017, Attention Is All You Need, Section 3; Xiong et al. 2020, On Layer Normalization in the
  Transformer Architecture (norms before the layers); Xue et al. 2022, ByT5 (bytes for words); Devlin et al. 2019, BERT
  (the first token for the whole).
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt8

from jaxdiff.models.attention import attention
from jaxdiff.models.conditioning import Encoded, check_array, rows
from jaxdiff.models.layers import check_divisible

_NORMAL = nn.initializers.normal(0.02)


class EncoderLayer(nn.Module):
  """Self-attention and a perceptron, each behind a norm and beside a shortcut.

  Attributes:
    heads: attention heads; must divide the features.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  heads: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, h: Float[Array, "b n c"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
    b, n, c = h.shape
    dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    norm = partial(nn.LayerNorm, dtype=self.dtype, param_dtype=self.param_dtype)
    y = norm()(h)
    qkv = dense(3 * c, use_bias=False, name="query_key_value")(y)
    query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, c // self.heads), 2, 0)
    y = attention(query, key, value, mask).reshape(b, n, c)
    h = h + dense(c, name="output")(y)
    y = nn.gelu(dense(4 * c)(norm()(h)))
    return h + dense(c)(y)


class Text(nn.Module):
  """A text, by a vector for the whole and a token for every byte.

  Attributes:
    length: bytes of the longest text.
    width: features of the encoder.
    layers: how many encoder layers.
    heads: attention heads; must divide `width`.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> import jax
    >>> text, x = Text(length=4, width=16, layers=1), jnp.zeros((2, 8, 8, 1))
    >>> value = jnp.array([[104, 105, 0, 0], [0, 0, 0, 0]], jnp.uint8)  # "hi" and nothing
    >>> encoded, params = jax.eval_shape(lambda key: text.init_with_output(key, value, x, 32), jax.random.key(0))
    >>> encoded.vector.shape, encoded.tokens.shape, encoded.mask.shape
    ((2, 32), (2, 5, 32), (2, 5))
  """

  length: int
  width: int = 128
  layers: int = 2
  heads: int = 4
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @property
  def null(self) -> int:
    return 0

  def nothing(self, x: Array) -> UInt8[Array, "b n"]:
    return jnp.zeros((len(x), self.length), jnp.uint8)

  def check(self, name: str, value: Array, x: Array) -> None:
    words = f"bytes [b, {self.length}] of UTF-8 as uint8, the end filled with 0, null 0"
    check_array(name, value, x, (self.length,), jnp.integer, words)

  @nn.compact
  def __call__(self, value: Integer[Array, "b n"], x: Shaped[Array, "b ..."], features: int) -> Encoded:
    """Encodes texts.

    Args:
      value: the bytes.
      x: what the network is to denoise.
      features: size of the vector and the tokens.

    Returns:
      The vector [b, features], the tokens [b, 1 + length, features] and which of them are there; the others are 0.

    Raises:
      ValueError: if `heads` does not divide `width`.
    """
    check_divisible("width of the text encoder", self.width, "heads", self.heads)
    dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    norm = partial(nn.LayerNorm, dtype=self.dtype, param_dtype=self.param_dtype)
    first = self.param("first", _NORMAL, (self.width,), self.param_dtype).astype(self.dtype)
    table = self.param("table", _NORMAL, (256, self.width), self.param_dtype)
    positions = self.param("positions", _NORMAL, (self.length, self.width), self.param_dtype)
    letters = rows(table, value) + positions[None]
    mask = jnp.pad(value != 0, ((0, 0), (1, 0)), constant_values=True)
    h = jnp.concatenate([jnp.broadcast_to(first, (len(value), 1, self.width)), letters.astype(self.dtype)], axis=1)
    for _ in range(self.layers):
      h = EncoderLayer(self.heads, self.dtype, self.param_dtype)(h, mask)
    h = norm()(h)
    tokens = jnp.where(mask[..., None], dense(features, name="tokens")(h), 0)
    return Encoded(vector=dense(features, name="vector")(h[:, 0]), tokens=tokens, mask=mask)
