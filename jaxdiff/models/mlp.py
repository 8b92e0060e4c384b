"""Residual multilayer perceptron: (x: [b, *d], t: [b]) -> [b, *d]; what is no vector is read as one."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.layers import ZERO, TimeEmbedding, check_input


class MLP(nn.Module):
  """Residual perceptron conditioned on time; zero at initialization.

  h <- h + W2 silu(W1 silu(h) + time embedding), `depth` times.

  Attributes:
    width: size of the hidden layers.
    depth: number of residual blocks of two layers.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    dtype: type of the computation; parameters are float32.

  Example:
    >>> import jax
    >>> net, x, t = MLP(width=32, depth=2), jnp.ones((5, 2)), jnp.linspace(0.1, 1.0, 5)
    >>> params = net.init(jax.random.key(0), x, t)
    >>> net.apply(params, x, t).shape
    (5, 2)
  """

  width: int = 128
  depth: int = 3
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b *d"], t: Float[Array, " b"]) -> Float[Array, "b *d"]:
    """Applies the network.

    Args:
      x: vectors, or images, whose neighbourhoods are then not seen.
      t: times.

    Returns:
      An array like `x`, in its dtype.

    Raises:
      ValueError: if x is not [b, *d], with one axis or more beside b, or t not [b].
      TypeError: if x is not of floats.
    """
    check_input(x, t, rank=max(2, x.ndim), layout="vectors [b, d] or images [b, h, w, c]")
    embedding = nn.silu(TimeEmbedding(self.width, self.max_frequency, dtype=self.dtype)(t))
    h = nn.Dense(self.width, dtype=self.dtype)(x.reshape(len(x), -1).astype(self.dtype))
    for _ in range(self.depth):
      y = nn.Dense(self.width, dtype=self.dtype)(nn.silu(h))
      y = nn.silu(y + nn.Dense(self.width, dtype=self.dtype, use_bias=False)(embedding))
      h = h + nn.Dense(self.width, dtype=self.dtype)(y)
    output = nn.Dense(math.prod(x.shape[1:]), dtype=self.dtype, kernel_init=ZERO, name="output")(nn.silu(h))
    return output.reshape(x.shape).astype(x.dtype)
