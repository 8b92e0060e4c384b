"""Hutch++: the trace on a subspace exactly, on the rest by random probes.

    S = (J - a I) Omega,   Q = orth(S),   P = I - Q Q^T
    tr J = tr(Q^T J Q) + E[v . J v],      E[v v^T] = P

a I is the part of J that is known; of a diffusion model's flow what is left is its denoiser's Jacobian, whose range Q
is to hold. Residual probes are v = sqrt(d - s) P g / |P g| for Gaussian g and s columns of Q: uniform on a sphere of
the complement, where they see multiples of the identity without noise, unknown ones, too; P g alone would add the noise
of |P g|^2 times their size.

References:
  Meyer, Musco, Musco & Woodruff 2021, Hutch++: Optimal Stochastic Trace Estimation, Algorithm 1; Epperly, Tropp &
  Webber 2024, XTrace, for residual probes of fixed length.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks
from jaxdiff.divergence.estimator import Divergence, Estimates, over_probes
from jaxdiff.typing import State

Probes = tuple[Float[Array, "b d s"], Float[Array, "b d m"]]


def hutchpp(sketch: int, probes: int) -> Divergence:
  """Hutch++, by 2 sketch + probes Jacobian-vector products of one linearization.

  Unbiased; exact where J - a I has a rank of at most `sketch`; better than Hutchinson's estimator at equal products
  where its eigenvalues fall fast. Omega and g are drawn once a solve. Gradients hold Q fixed, which leaves them
  unbiased, as for every Q the estimate is, and finite where S has not full rank.

  Args:
    sketch: columns of Omega, at most d.
    probes: residual probes; the standard error is over them, and needs at least 2.

  Raises:
    ValueError: for numbers below 1; when called, for a sketch above the dimensions of an example.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> divergence = jd.divergence.hutchpp(sketch=1, probes=2)
    >>> x, u = jnp.ones((1, 3)), jnp.asarray([[1.0, 2.0, 2.0]])
    >>> v = divergence.draw(jax.random.split(jax.random.key(0), 1), x)
    >>> f = lambda x: x + u * jnp.sum(u * x, axis=1, keepdims=True)  # I + u u^T: rank 1 beside the identity
    >>> traces = jax.jit(lambda x, v: divergence.estimate(f, x, v, jnp.ones(()))[1])
    >>> [round(float(trace), 3) for trace in traces(x, v)[0]]
    [12.0, 12.0]
  """
  checks.whole("sketch", sketch, 1)
  checks.whole("probes", probes, 1)

  def draw(key: Key[Array, " b"], x: State) -> Probes:
    size = math.prod(x.shape[1:])
    if sketch > size:
      raise ValueError(f"sketch = {sketch} exceeds the {size} dimensions of an example: use divergence.exact()")
    normal = lambda key: jax.random.normal(key, (size, sketch + probes), x.dtype)
    both = jax.vmap(normal)(key)
    return both[:, :, :sketch], both[:, :, sketch:]

  return Divergence(draw, estimate, over_probes)


def estimate(f: Callable[[State], State], x: State, drawn: Probes, identity: Array) -> tuple[State, Estimates]:
  """f(x), and the estimate of every residual probe."""
  value, linear = jax.linearize(f, x)
  omega, g = drawn
  sketch = omega.shape[2]

  def product(v: Float[Array, "b d k"]) -> Float[Array, "b d k"]:
    return jax.vmap(linear, in_axes=-1, out_axes=-1)(v.reshape(*x.shape, -1)).reshape(v.shape)

  q, _ = jnp.linalg.qr(jax.lax.stop_gradient(product(omega) - jnp.asarray(identity, x.dtype) * omega))
  v = _on_complement(q, g)
  images = product(jnp.concatenate([q, v], axis=2))
  inside = jnp.sum(q * images[:, :, :sketch], axis=(1, 2))
  return value, inside[:, None] + jnp.sum(v * images[:, :, sketch:], axis=1)


def _on_complement(q: Float[Array, "b d s"], g: Float[Array, "b d m"]) -> Float[Array, "b d m"]:
  """g without its part in q, each at the length sqrt(d - s)."""
  inside = jnp.matmul(jnp.swapaxes(q, 1, 2), g, precision="highest")
  rest = g - jnp.matmul(q, inside, precision="highest")
  square = jnp.sum(rest**2, axis=1, keepdims=True)
  return rest * jnp.sqrt((q.shape[1] - q.shape[2]) / jnp.where(square > 0, square, 1.0))
