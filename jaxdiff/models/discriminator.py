"""Discriminators: of a step of a denoising chain, for images and for vectors, and of the patches of images.

    StepDiscriminator     (x_{t-1}: [b, h, w, c], t: [b], x_t=x_t) -> logits [b]
    VectorDiscriminator   (x_{t-1}: [b, d], t: [b], x_t=x_t)       -> logits [b]
    PatchDiscriminator    (x: [b, h, w, c])                        -> logits [b, h / f, w / f],   f = 2^(levels - 1)

For images leaky ReLU and convolution, twice, around a shortcut, without norms; height and width halve within the block:

    h = conv(lrelu(x)) + W e,   y = (pool(conv(lrelu(h))) + shortcut(pool(x))) / sqrt 2

with e the embedding of the time. The paper adds the spread of a batch (minibatch standard deviation) as a channel; here
examples are judged by themselves, as everywhere in jaxdiff, so that no result depends on the batch or its layout.

Parameters, in the order of the computation: TimeEmbedding_0 and conditions_NAME where there are any; Conv_0 (kernel
[3, 3, c, f], bias); Block_k (Conv_0, Dense_0 where the time is told, Conv_1, shortcut where the channels change), one a
level; output.

References:
  Xiao et al. 2022, Tackling the Generative Learning Trilemma with Denoising Diffusion GANs, Section 3.2; Isola et al.
  2017, Image-to-Image Translation with Conditional Adversarial Networks, Section 3.2, for patches.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jaxdiff.models import conditioning
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import TimeEmbedding, check_divisible, check_input, rescaled
from jaxdiff.models.resampling import downsample

_lrelu = functools.partial(nn.leaky_relu, negative_slope=0.2)


class Block(nn.Module):
  """Leaky ReLU and convolution, twice, around a shortcut: see the module.

  Attributes:
    features: channels of the output.
    down: whether height and width are halved.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  features: int
  down: bool
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None = None
  ) -> Float[Array, "b _ _ features"]:
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = Conv(self.features, (3, 3), **types)(_lrelu(x))
    if embedding is not None:
      h = h + nn.Dense(self.features, **types)(embedding)[:, None, None, :]
    h = Conv(self.features, (3, 3), **types)(_lrelu(h))
    if self.down:
      h, x = downsample(h), downsample(x)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, name="shortcut", **types)(x)
    return rescaled(x + h, True)


class StepDiscriminator(nn.Module):
  """Tells the images x_{t-1} that led to x_t from those that a generator made of it.

  Attributes:
    channels: feature channels at full resolution; the embedding of the time and the conditions has 4 times as many.
    channel_multipliers: one per level, from full resolution down.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    conditions: what is told beside x, t and x_t, by name, as in `Classifier`.

  Example:
    >>> import jax
    >>> net, x, t = StepDiscriminator(channels=8), jnp.ones((2, 8, 8, 1)), jnp.array([0.25, 1.0])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, x_t=x)
    >>> jax.eval_shape(net.apply, params, x, t, x_t=x).shape
    (2,)
  """

  channels: int = 64
  channel_multipliers: tuple[int, ...] = (1, 2, 4)
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    *,
    x_t: Float[Array, "b h w c"],
    **cond: Shaped[Array, "b ..."],
  ) -> Float[Array, " b"]:
    """Applies the network.

    Args:
      x: images after the step, x_{t-1}.
      t: times of x_t.
      x_t: images before the step.
      **cond: conditions by name, all that `conditions` has.

    Returns:
      The logits, positive for what looks real, in the dtype of x.

    Raises:
      ValueError: if x is not [b, h, w, c], x_t of another shape, t not [b], h or w not divisible by 2^(levels - 1), or
        the conditions are not those of the network.
      TypeError: if x is not of floats, or a condition of another type.
    """
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    _check_pair(x, x_t)
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    told = conditioning.encode(self.conditions, cond, x, 4 * self.channels)
    conditioning.refuse_tokens(told, "StepDiscriminator")
    embedding = _lrelu(_embedding(t, told, 4 * self.channels, self.max_frequency, types))
    seen = [x, x_t] if told.channels is None else [x, x_t, told.channels]
    h = _down(jnp.concatenate(seen, axis=-1), self.channels, self.channel_multipliers, embedding, types)
    h = jnp.mean(_lrelu(h), axis=(1, 2))
    return nn.Dense(1, name="output", **types)(h)[:, 0].astype(x.dtype)


class VectorDiscriminator(nn.Module):
  """Tells the vectors x_{t-1} that led to x_t from those that a generator made of it: a residual perceptron.

  Attributes:
    width: size of the hidden layers.
    depth: number of residual blocks of two layers, as in `MLP` with leaky ReLU.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    conditions: what is told beside x, t and x_t, by name: vectors alone.

  Example:
    >>> import jax
    >>> net, x, t = VectorDiscriminator(width=32), jnp.ones((5, 2)), jnp.linspace(0.1, 1.0, 5)
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t, x_t=x)
    >>> jax.eval_shape(net.apply, params, x, t, x_t=x).shape
    (5,)
  """

  width: int = 128
  depth: int = 3
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(
    self, x: Float[Array, "b d"], t: Float[Array, " b"], *, x_t: Float[Array, "b d"], **cond: Shaped[Array, "b ..."]
  ) -> Float[Array, " b"]:
    """Applies the network.

    Args:
      x: vectors after the step, x_{t-1}.
      t: times of x_t.
      x_t: vectors before the step.
      **cond: conditions by name, all that `conditions` has.

    Returns:
      The logits, positive for what looks real, in the dtype of x.

    Raises:
      ValueError: if x is not [b, d], x_t of another shape, t not [b], or the conditions are not those of the network.
      TypeError: if x is not of floats, or a condition of another type.
    """
    check_input(x, t, rank=2, layout="vectors [b, d]")
    _check_pair(x, x_t)
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    told = conditioning.encode(self.conditions, cond, x, self.width)
    conditioning.refuse_tokens(told, "VectorDiscriminator")
    embedding = _lrelu(_embedding(t, told, self.width, self.max_frequency, types))
    h = dense(self.width)(jnp.concatenate([x, x_t], axis=-1).astype(self.dtype))
    for _ in range(self.depth):
      y = dense(self.width)(_lrelu(h))
      y = _lrelu(y + dense(self.width, use_bias=False)(embedding))
      h = h + dense(self.width)(y)
    return dense(1, name="output")(_lrelu(h))[:, 0].astype(x.dtype)


class PatchDiscriminator(nn.Module):
  """Tells images from reconstructions by their patches; it knows neither a time nor what else is in the image.

  A logit sees 11 f - 2 pixels along each axis, its own f and 5 f - 1 on both sides.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> import jax
    >>> net, x = PatchDiscriminator(channels=8), jnp.ones((2, 8, 8, 3))
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape
    (2, 2, 2)
  """

  channels: int = 64
  channel_multipliers: tuple[int, ...] = (1, 2, 4)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _"]:
    """The logits of the patches, positive for what looks real, in the dtype of x.

    Raises:
      ValueError: if x is not [b, h, w, c], or h or w not divisible by 2^(levels - 1).
      TypeError: if x is not of floats.
    """
    check_input(x, x[(slice(None),) + (0,) * (x.ndim - 1)], rank=4, layout="images [b, h, w, c]")
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = _down(x, self.channels, self.channel_multipliers, None, types)
    return Conv(1, (3, 3), name="output", **types)(_lrelu(h))[..., 0].astype(x.dtype)


def _down(
  x: Array, channels: int, multipliers: Sequence[int], embedding: Array | None, types: Mapping[str, Any]
) -> Array:
  """A convolution, then a block a level, all but the last one of which halve."""
  levels = len(multipliers)
  for name, size in zip(("height of x", "width of x"), x.shape[1:3], strict=True):
    check_divisible(name, size, "2^(levels - 1)", 2 ** (levels - 1))
  h = Conv(channels, (3, 3), **types)(x.astype(types["dtype"]))
  for level, multiplier in enumerate(multipliers):
    h = Block(channels * multiplier, level < levels - 1, **types)(h, embedding)
  return h


def _embedding(
  t: Array, told: conditioning.Encoded, features: int, max_frequency: float, types: Mapping[str, Any]
) -> Array:
  embedding = TimeEmbedding(features, max_frequency, **types)(t)
  return embedding if told.vector is None else embedding + told.vector.astype(types["dtype"])


def _check_pair(x: Array, x_t: Array) -> None:
  if x_t.shape != x.shape:
    raise ValueError(f"x_t has shape {x_t.shape}: pass what the step started from, of the shape of x, {x.shape}")
