"""Residual multilayer perceptron: (x: [b, *d], t: [b]) -> [b, *d]; what is no vector is read as one."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jaxdiff.models import conditioning
from jaxdiff.models.layers import ZERO, TimeEmbedding, check_input


class MLP(nn.Module):
  """Residual perceptron conditioned on time; zero at initialization.

  h <- h + W2 silu(W1 silu(h) + time embedding), `depth` times.

  Attributes:
    width: size of the hidden layers.
    depth: number of residual blocks of two layers.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    dtype: type of the computation.
    conditions: what is told beside x and t, by name: see `conditioning`. An image stands beside x; tokens are refused.
    param_dtype: type of the parameters.

  Example:
    >>> import jax
    >>> net, x, t = MLP(width=32, depth=2), jnp.ones((5, 2)), jnp.linspace(0.1, 1.0, 5)
    >>> params = jax.jit(net.init)(jax.random.key(0), x, t)
    >>> float(abs(jax.jit(net.apply)(params, x, t)).max())
    0.0
  """

  width: int = 128
  depth: int = 3
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  conditions: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *d"], t: Float[Array, " b"], *, train: bool = False, **cond: Shaped[Array, "b ..."]
  ) -> Float[Array, "b *d"]:
    """Applies the network.

    Args:
      x: vectors, or images, whose neighbourhoods are then not seen.
      t: times.
      train: without effect: nothing is dropped.
      **cond: the arrays of `conditions`, by name.

    Returns:
      An array like `x`, in its dtype.

    Raises:
      ValueError: if x is not [b, *d], with one axis or more beside b, t not [b], or a condition is missing, unknown, of
        another shape, or a sequence.
      TypeError: if x is not of floats, or a condition of another type.
    """
    check_input(x, t, rank=max(2, x.ndim), layout="vectors [b, d] or images [b, h, w, c]")
    dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
    told = self._told(x, cond)
    embedding = TimeEmbedding(self.width, self.max_frequency, dtype=self.dtype, param_dtype=self.param_dtype)(t)
    if told.vector is not None:
      embedding = embedding + told.vector.astype(self.dtype)
    embedding = nn.silu(embedding)
    seen = [x] if told.channels is None else [x, told.channels]
    h = dense(self.width)(jnp.concatenate([y.reshape(len(x), -1).astype(self.dtype) for y in seen], axis=-1))
    for _ in range(self.depth):
      y = dense(self.width)(nn.silu(h))
      y = nn.silu(y + dense(self.width, use_bias=False)(embedding))
      h = h + dense(self.width)(y)
    output = dense(math.prod(x.shape[1:]), kernel_init=ZERO, name="output")(nn.silu(h))
    return output.reshape(x.shape).astype(x.dtype)

  def _told(self, x: Array, cond: Mapping[str, Array]) -> conditioning.Encoded:
    told = conditioning.encode(self.conditions, cond, x, self.width)
    if told.tokens is not None:
      alone = {name: {name: module} for name, module in sorted(self.conditions.items())}
      encoded = {name: conditioning.encode(one, {name: cond[name]}, x, self.width) for name, one in alone.items()}
      name = next(name for name, part in encoded.items() if part.tokens is not None)
      raise ValueError(
        f"condition {name!r} is a sequence of tokens, which MLP cannot read: take DiT or UNet, or pool it"
      )
    return told
