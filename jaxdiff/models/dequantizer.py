"""A small conditional flow in the unit cube, for variational dequantization.

    y_0 = eps,   y_k = m_k y_{k-1} + (1 - m_k) (y_{k-1} exp(s_k) + b_k),   (s_k, b_k) = net_k(x, m_k y_{k-1})
    u = Phi(y_K),   log|det du/deps| = sum_k sum (1 - m_k) s_k + sum log phi(y_K)

The masks m_k are the two halves of a checkerboard, in turn. s and b start at 0, where u is uniform.

References:
  Ho et al. 2019, Flow++, Section 3.1; Dinh et al. 2017, Density Estimation Using Real NVP, Sections 3.2 and 3.4.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import ZERO


class Dequantizer(nn.Module):
  """Affine couplings of normal numbers, conditioned on the data: (eps: [b, *d], x: [b, *d]) -> (u, log|det du/deps|).

  Attributes:
    width: channels of the hidden layers.
    couplings: how many; from 2 on every coordinate is moved.

  Example:
    >>> import jax
    >>> flow, x = Dequantizer(width=8), jnp.zeros((2, 4, 4, 1))
    >>> params = jax.eval_shape(flow.init, jax.random.key(0), x, x)
    >>> u, log_det = jax.eval_shape(flow.apply, params, x, x)  # of noise like x, and x
    >>> u.shape, log_det.shape
    ((2, 4, 4, 1), (2,))
  """

  width: int = 32
  couplings: int = 4

  @nn.compact
  def __call__(
    self, eps: Float[Array, "b *d"], x: Float[Array, "b *d"]
  ) -> tuple[Float[Array, "b *d"], Float[Array, " b"]]:
    """Applies the flow.

    Args:
      eps: standard normal numbers.
      x: the centres of the cells, vectors `[b, d]` or images `[b, h, w, c]`.

    Returns:
      (u in [0, 1], log|det du/deps|).

    Raises:
      ValueError: for x that are neither vectors nor images, or of another shape than eps.
    """
    if x.ndim not in (2, 4) or x.shape != eps.shape:
      raise ValueError(f"x must be vectors [b, d] or images [b, h, w, c], as eps; got {x.shape} and {eps.shape}")
    even = jnp.sum(jnp.indices(x.shape[1:]), axis=0)[None] % 2 == 0
    axes = tuple(range(1, x.ndim))
    y, log_det = eps, jnp.zeros(len(eps), eps.dtype)
    for k in range(self.couplings):
      kept = even if k % 2 == 0 else ~even
      h = jnp.concatenate([x, jnp.where(kept, y, 0.0)], axis=-1)
      for _ in range(2):
        h = nn.silu(self._layer(x.ndim)(h))
      scale, shift = jnp.split(self._output(x)(h), 2, axis=-1)
      log_scale = jnp.where(kept, 0.0, 2 * jnp.tanh(scale))  # a factor of up to e^2 either way
      y = y * jnp.exp(log_scale) + jnp.where(kept, 0.0, shift)
      log_det = log_det + jnp.sum(log_scale, axis=axes)
    return jax.scipy.special.ndtr(y), log_det + jnp.sum(jax.scipy.stats.norm.logpdf(y), axis=axes)

  def _layer(self, rank: int) -> nn.Module:
    return nn.Dense(self.width) if rank == 2 else Conv(self.width, (3, 3))

  def _output(self, x: Array) -> nn.Module:
    return nn.Dense(2 * x.shape[-1], kernel_init=ZERO)
