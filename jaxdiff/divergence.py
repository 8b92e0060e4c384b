"""The trace of a Jacobian, exactly or by random probes, for one example at a time.

    exact        tr J = sum_i e_i . J e_i                         d products
    hutchinson   tr J = E[v . J v],   E[v v^T] = I                one product a probe

Rademacher probes have variance 2 (|J|^2 - sum_i J_ii^2) for symmetric J, Gaussian ones 2 |J|^2.

References:
  Hutchinson 1989, A Stochastic Estimator of the Trace of the Influence Matrix; Grathwohl et al. 2019, FFJORD, eq. 7.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

_CHUNK = 64


class Divergence(NamedTuple):
  """A trace estimator: three pure functions that act on one example.

  Attributes:
    draw: `(key, x: [*d]) -> probes`, drawn once for a whole solve.
    estimate: `(f, x: [*d], probes) -> (f(x): [*d], [m])`, m estimates of the trace of the Jacobian of f at x.
    standard_error: `[m] -> []`, of the mean of m estimates, or of their integrals.
  """

  draw: Callable[[Array, Array], Any]
  estimate: Callable[[Callable[[Array], Array], Array, Any], tuple[Array, Float[Array, " m"]]]
  standard_error: Callable[[Float[Array, " m"]], Float[Array, ""]]


def exact() -> Divergence:
  """The trace itself, by d Jacobian-vector products (64 at a time)."""

  def estimate(f: Callable[[Array], Array], x: Array, probes: None) -> tuple[Array, Float[Array, " m"]]:
    value, linear = jax.linearize(f, x)

    def entry(i: Array) -> Array:
      direction = jnp.zeros(x.size, x.dtype).at[i].set(1).reshape(x.shape)
      return linear(direction).ravel()[i]

    return value, jnp.sum(jax.lax.map(entry, jnp.arange(x.size), batch_size=min(_CHUNK, x.size)), keepdims=True)

  return Divergence(
    draw=lambda key, x: None,
    estimate=estimate,
    standard_error=lambda estimates: jnp.zeros((), estimates.dtype),
  )


def hutchinson(probes: int = 1, noise: Literal["rademacher", "gaussian"] = "rademacher") -> Divergence:
  """The mean of v . J v over random probes v.

  Args:
    probes: how many; their standard error needs at least 2.
    noise: their distribution.

  Raises:
    ValueError: for probes below 1 or an unknown distribution.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> divergence = jd.divergence.hutchinson(probes=4)
    >>> v = divergence.draw(jax.random.key(0), jnp.ones(3))
    >>> divergence.estimate(lambda x: 2 * x, jnp.ones(3), v)[1].tolist()
    [6.0, 6.0, 6.0, 6.0]
  """
  if probes < 1:
    raise ValueError(f"probes must be at least 1, got {probes}")
  samplers = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
  if noise not in samplers:
    raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")

  def draw(key: Array, x: Array) -> Array:
    return samplers[noise](key, (probes, *x.shape), x.dtype)

  def estimate(f: Callable[[Array], Array], x: Array, v: Array) -> tuple[Array, Float[Array, " m"]]:
    if probes == 1:
      value, product = jax.jvp(f, (x,), (v[0],))
      return value, jnp.sum(v[0] * product, keepdims=True).reshape(1)
    value, linear = jax.linearize(f, x)
    return value, jnp.sum(v * jax.vmap(linear)(v), axis=range(1, v.ndim))

  def standard_error(estimates: Float[Array, " m"]) -> Float[Array, ""]:
    if probes == 1:
      return jnp.full((), jnp.nan, estimates.dtype)
    return jnp.std(estimates, ddof=1) / math.sqrt(probes)

  return Divergence(draw, estimate, standard_error)
