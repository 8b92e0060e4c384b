"""What a trace estimator is."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff.typing import State

Estimates = Float[Array, "b m"]
Growth = Callable[[Float[Array, " k"]], Float[Array, " k"]]


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
  correction: Callable[[Any, Growth], Estimates | float] = lambda probes, growth: 0.0
  exact: bool = False


def over_probes(estimates: Estimates) -> Float[Array, " b"]:
  """Standard error of the mean of independent estimates, NaN for one."""
  count = estimates.shape[1]
  if count == 1:
    return jnp.full(len(estimates), jnp.nan, estimates.dtype)
  return jnp.std(estimates, axis=1, ddof=1) / math.sqrt(count)
