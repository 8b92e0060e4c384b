"""The trace of a Jacobian, exactly or by random probes, example by example.

    exact        tr J = sum_i e_i . J e_i                         d products
    hutchinson   tr J = E[v . J v],   E[v v^T] = I                one product a probe

Rademacher probes have variance 2 (|J|^2 - sum_i J_ii^2) for symmetric J, Gaussian ones 2 |J|^2.

The functions whose Jacobian is meant act on a batch, example by example: one product of the batch is a product of every
example's own Jacobian.

References:
  Hutchinson 1989, A Stochastic Estimator of the Trace of the Influence Matrix; Grathwohl et al. 2019, FFJORD, eq. 7.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff.typing import State

EXACT_UP_TO = 64  # dimensions
_CHUNK = 64

Estimates = Float[Array, "b m"]


class Divergence(NamedTuple):
  """A trace estimator.

  Attributes:
    draw: `(key: [b], x: [b, *d]) -> probes`, a pytree with a leading axis b, drawn once for a whole solve.
    estimate: `(f, x: [b, *d], probes, identity: []) -> (f(x): [b, *d], [b, m])`, m estimates of the trace of the
      Jacobian of f at every x. `identity` is the coefficient of a known part of the Jacobian, identity * I, or 0.
    standard_error: `[b, m] -> [b]`, of the mean of m estimates, or of their integrals: 0 if exact, NaN if unknown.
    correction: `(probes, growth) -> [b, m]`, what to subtract from the integrals of the estimates along the flow of a
      process. `growth` gives, of the variances [k] of Gaussian data, the logarithms [k] of how many times wider the
      flow makes them from its start to its end.
    exact: whether the trace is exact.
  """

  draw: Callable[[Key[Array, " b"], State], Any]
  estimate: Callable[[Callable[[State], State], State, Any, Array], tuple[State, Estimates]]
  standard_error: Callable[[Estimates], Float[Array, " b"]]
  correction: Callable[[Any, Callable[[Array], Array]], Estimates | float] = lambda probes, growth: 0.0
  exact: bool = False


def default(dimension: int) -> Divergence:
  """The exact trace up to 64 dimensions, one Rademacher probe above."""
  return exact() if dimension <= EXACT_UP_TO else hutchinson()


def exact() -> Divergence:
  """The trace itself, by d Jacobian-vector products (64 at a time)."""

  def estimate(f: Callable[[State], State], x: State, probes: None, identity: Array) -> tuple[State, Estimates]:
    value, linear = jax.linearize(f, x)
    size = math.prod(x.shape[1:])

    def entries(i: Array) -> Array:
      direction = jnp.zeros((1, size), x.dtype).at[0, i].set(1)
      return linear(jnp.broadcast_to(direction, (len(x), size)).reshape(x.shape)).reshape(len(x), size)[:, i]

    return value, jnp.sum(jax.lax.map(entries, jnp.arange(size), batch_size=min(_CHUNK, size)), axis=0)[:, None]

  return Divergence(
    draw=lambda key, x: None,
    estimate=estimate,
    standard_error=lambda estimates: jnp.zeros(len(estimates), estimates.dtype),
    exact=True,
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
    >>> x = jnp.ones((1, 3))
    >>> v = divergence.draw(jax.random.split(jax.random.key(0), 1), x)
    >>> divergence.estimate(lambda x: 2 * x, x, v, 0.0)[1].tolist()
    [[6.0, 6.0, 6.0, 6.0]]
  """
  if probes < 1:
    raise ValueError(f"probes must be at least 1, got {probes}")
  samplers = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
  if noise not in samplers:
    raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {noise!r}")

  def draw(key: Key[Array, " b"], x: State) -> Array:
    return jax.vmap(lambda key, x: samplers[noise](key, (probes, *x.shape), x.dtype))(key, x)

  def estimate(f: Callable[[State], State], x: State, v: Array, identity: Array) -> tuple[State, Estimates]:
    value, linear = jax.linearize(f, x)
    products = jax.vmap(linear, in_axes=1, out_axes=1)(v)
    return value, jnp.sum(v * products, axis=range(2, v.ndim))

  return Divergence(draw, estimate, _over_probes)


def _over_probes(estimates: Estimates) -> Float[Array, " b"]:
  """Standard error of the mean of independent estimates."""
  count = estimates.shape[1]
  if count == 1:
    return jnp.full(len(estimates), jnp.nan, estimates.dtype)
  return jnp.std(estimates, axis=1, ddof=1) / math.sqrt(count)
