"""Classifier of noised images: (x: [b, h, w, c], t: [b], **cond) -> logits [b, classes].

The way down of a U-Net and its middle, as in ADM but for biases, epsilons and the number of heads: residual blocks told
the time, halving height and width within blocks of their own, then attention pooling: the mean of all positions asks
them, and itself, what they have of the classes.

Parameters, in the order of the computation:

| name | what |
|---|---|
| TimeEmbedding_0, conditions_NAME, Conv_0 | as in `unet` |
| ResidualBlock_k | `blocks` a level, then one that halves; two in the middle; see `blocks` |
| SelfAttention_k, CrossAttention_k | after every block of `attention_levels`, between the two of the middle |
| GroupNorm_0 | after the middle |
| AttentionPool_0 | positions [h w + 1, c] of the lowest resolution; query, key_value (kernel, bias) |
| output | kernel [c, classes], bias |

References:
  Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis, Section 4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jaxdiff.models import conditioning
from jaxdiff.models.attention import CrossAttention, SelfAttention, attention
from jaxdiff.models.blocks import ResidualBlock
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import ZERO, TimeEmbedding, check_choice, check_divisible, check_input
from jaxdiff.models.remat import CHOICES as REMAT_CHOICES
from jaxdiff.models.remat import Remat, rematerialized


class AttentionPool(nn.Module):
  """Attention from the mean of all positions to all of them and to itself.

  Attributes:
    heads: number of heads; must divide the channels.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  heads: int = 1
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    b, h, w, c = x.shape
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = x.reshape(b, h * w, c)
    y = jnp.concatenate([jnp.mean(y, axis=1, keepdims=True), y], axis=1)
    where = self.param("positions", nn.initializers.normal(c**-0.5), (h * w + 1, c), self.param_dtype)
    y = y + where[None].astype(y.dtype)
    query = nn.Dense(c, name="query", **types)(y[:, :1])
    key, value = jnp.split(nn.Dense(2 * c, name="key_value", **types)(y), 2, axis=-1)
    heads = lambda z: z.reshape(*z.shape[:2], self.heads, c // self.heads)
    return attention(heads(query), heads(key), heads(value)).reshape(b, c)


class Classifier(nn.Module):
  """Half a U-Net; undecided at initialization: all logits are zero.

  Attributes:
    classes: how many.
    channels: feature channels at full resolution; the embedding of the time and the conditions has 4 times as many.
    channel_multipliers: one per level, from full resolution down, as in `UNet`.
    blocks: residual blocks per level.
    attention_levels: levels whose residual blocks are followed by self-attention (0 is full resolution). The middle
      always has one.
    heads: attention heads; must divide the channels of the levels with attention and of the lowest.
    groups: groups of the group norms; must divide the channels of every level.
    dropout: probability of dropping an activation in the residual blocks, only with train=True.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    dtype: type of the computation.
    remat: what the backward pass computes again, to save memory: see `remat`.
    param_dtype: type of the parameters.
    conditions: what is told beside x and t, by name, as in `UNet`.

  Example:
    >>> import jax
    >>> net, x, t = Classifier(classes=10, channels=8), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> jax.eval_shape(net.apply, params, x, t).shape
    (2, 10)
  """

  classes: int
  channels: int = 32
  channel_multipliers: tuple[int, ...] = (1, 2)
  blocks: int = 2
  attention_levels: tuple[int, ...] = ()
  heads: int = 1
  groups: int = 8
  dropout: float = 0.0
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  remat: Remat = "none"
  param_dtype: DTypeLike = jnp.float32
  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False, **cond: Shaped[Array, "b ..."]
  ) -> Float[Array, "b classes"]:
    """Applies the network.

    Args:
      x: noised images.
      t: times.
      train: whether to drop activations; needs `rngs={"dropout": key}` if `dropout` is positive.
      **cond: conditions by name, all that `conditions` has.

    Returns:
      The logits, in the dtype of x.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], h or w not divisible by 2^(levels - 1), the channels of a level
        not divisible by `groups` or, with attention, by `heads`, `attention_levels` names a level that does not exist,
        there are fewer than two classes, or the conditions are not those of the network.
      TypeError: if x is not of floats, or a condition of another type.
    """
    self._check(x, t)
    told = conditioning.encode(self.conditions, cond, x, 4 * self.channels)
    types = self._types()
    embedding = TimeEmbedding(4 * self.channels, self.max_frequency, **types)(t)
    if told.vector is not None:
      embedding = embedding + told.vector.astype(self.dtype)
    seen = [x] if told.channels is None else [x, told.channels]
    h = Conv(self.channels, (3, 3), **types)(jnp.concatenate([y.astype(self.dtype) for y in seen], axis=-1))
    lowest = len(self.channel_multipliers) - 1
    for level in range(lowest + 1):
      for _ in range(self.blocks):
        h = self._residual(h, embedding, level, train)
        if level in self.attention_levels:
          h = self._attend(h, told)
      if level < lowest:
        h = self._residual(h, embedding, level, train, resample="down")
    h = self._attend(self._residual(h, embedding, lowest, train), told)
    h = self._residual(h, embedding, lowest, train)
    h = nn.silu(nn.GroupNorm(self.groups, **types)(h))
    h = AttentionPool(self.heads, **types)(h)
    return nn.Dense(self.classes, kernel_init=ZERO, name="output", **types)(h).astype(x.dtype)

  def _residual(self, h: Array, embedding: Array, level: int, train: bool, **fields: Any) -> Array:
    features = self.channels * self.channel_multipliers[level]
    apply = lambda _, h, embedding: ResidualBlock(features, self.groups, self.dropout, **self._types(), **fields)(
      h, embedding, deterministic=not train
    )
    return rematerialized(apply, self.remat)(self, h, embedding)

  def _attend(self, h: Array, told: conditioning.Encoded) -> Array:
    fields = self._types() | {"heads": self.heads, "groups": self.groups}
    h = rematerialized(lambda _, h: SelfAttention(**fields)(h), self.remat)(self, h)
    if told.tokens is None:
      return h
    apply = lambda _, h, tokens, mask: CrossAttention(**fields)(h, tokens, mask)
    return rematerialized(apply, self.remat)(self, h, told.tokens.astype(self.dtype), told.mask)

  def _types(self) -> dict[str, Any]:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def _check(self, x: Array, t: Array) -> None:
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    check_choice("remat", self.remat, REMAT_CHOICES)
    if self.classes < 2:
      raise ValueError(f"classes={self.classes}: a classifier needs two or more")
    levels = len(self.channel_multipliers)
    if wrong := [level for level in self.attention_levels if not 0 <= level < levels]:
      raise ValueError(f"attention_levels={self.attention_levels}: there is no level {wrong[0]}, take 0..{levels - 1}")
    check_divisible("height of x", x.shape[1], "2^(levels - 1)", 2 ** (levels - 1))
    check_divisible("width of x", x.shape[2], "2^(levels - 1)", 2 ** (levels - 1))
    for level, multiplier in enumerate(self.channel_multipliers):
      check_divisible(f"channels at level {level}", self.channels * multiplier, "groups", self.groups)
      if level in self.attention_levels or level == levels - 1:
        check_divisible(f"channels at level {level}", self.channels * multiplier, "heads", self.heads)
