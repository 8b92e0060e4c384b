"""Maximum likelihood of a continuous normalizing flow, with the regularizers that keep its paths straight.

    -log p(x_0) + l_K int_0^{t1} |f(x_t, t)|^2 dt + l_J int_0^{t1} |df/dx(x_t, t)|_F^2 dt                            (1)

The Jacobian's squared norm is E[|J v|^2] for E[v v^T] = I: exact, or by the probes of the trace estimator.

References:
  Grathwohl et al. 2019, FFJORD; Finlay et al. 2020, How to Train Your Neural ODE (RNODE).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import divergence as divergences
from jaxdiff import flow, ode
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar, State

_CHUNK = 64


def ffjord(
  base: flow.Base = flow.standard_normal(),
  divergence: divergences.Divergence | None = None,
  t1: Scalar = 1.0,
  solver: ode.Method = "tsit5",
  rtol: float = 1e-5,
  atol: float = 1e-5,
  num_steps: int | None = None,
  max_steps: int = ode.MAX_STEPS,
  adjoint: ode.Adjoint = "checkpoint",
  steps: flow.Steps = "shared",
  kinetic: float = 0.0,
  jacobian: float = 0.0,
) -> Callable[..., tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]]:
  """Negative log-likelihood of a flow and its regularizers, eq. (1); the network is the vector field.

  The integrals of the regularizers are part of the ODE's state and cost no further network evaluations.

  Args:
    base: as in `flow.cnf`, with everything that follows.
    divergence: as in `flow.cnf`; with `jacobian` it must be exact or of probes `[b, m, *d]`, as `hutchinson` draws.
    t1: as in `flow.cnf`.
    solver: as in `flow.cnf`.
    rtol: as in `flow.cnf`.
    atol: as in `flow.cnf`.
    num_steps: as in `flow.cnf`.
    max_steps: as in `flow.cnf`.
    adjoint: as in `flow.cnf`.
    steps: as in `flow.cnf`, but shared by default: gradients of a batch need no value that is free of batch mates.
    kinetic: l_K, the weight of the squared speed, per unit of time and summed over dimensions.
    jacobian: l_J, the weight of the Jacobian's squared Frobenius norm.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b] in nats, aux); no time is drawn, so u is not used. aux: "nats",
    -log p(x0); "nfe"; and the integrals "kinetic" and "jacobian", without their weights, where these are positive. A
    failed solve is NaN.

  Raises:
    ValueError: for what `flow.cnf` refuses, and a weight below 0; when called, for a divergence that does not go with
      `jacobian`.
    TypeError: as `flow.cnf` does.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.ffjord(kinetic=0.1)
    >>> field = jax.tree_util.Partial(lambda x, t: jnp.ones_like(x))
    >>> value, aux = jax.jit(loss)(jax.random.key(0), jnp.ones((1, 2)), field)
    >>> round(float(aux["nats"][0]), 3), round(float(aux["kinetic"][0]), 3)  # log(2 pi) + 4, and |(1, 1)|^2
    (5.838, 2.0)
  """
  weights = {"kinetic": kinetic, "jacobian": jacobian}
  for name, weight in weights.items():
    if not weight >= 0:
      raise ValueError(f"{name} must be at least 0, got {weight}")
  options = ode.Solver(solver, rtol, atol, max_steps, num_steps, adjoint)
  density = flow.log_density(options, base, divergence, t1, steps, _rates(kinetic > 0, jacobian > 0))

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    result, integrals = density(key, x0, network, cond)
    nats = -result.value
    value = nats + sum(weights[name] * integral for name, integral in integrals.items())
    return value, {"nats": nats, "nfe": result.nfe.astype(nats.dtype), **integrals}

  return loss


def _rates(kinetic: bool, jacobian: bool) -> flow.Rates:
  """What is integrated: the flow, the estimates of its divergence, and the integrands asked for."""

  def rates(
    trace: divergences.Divergence, velocity: Callable[[State], State], x: State, probes: Any
  ) -> tuple[State, Array, dict[str, Array]]:
    if jacobian:
      value, estimates, squares = _trace_and_square(trace, velocity, x, probes)
      integrands = {"jacobian": squares}
    else:
      value, estimates, integrands = flow.plain_rates(trace, velocity, x, probes)
    if kinetic:
      integrands["kinetic"] = jnp.sum(value**2, axis=range(1, x.ndim))
    return value, estimates, integrands

  return rates


def _trace_and_square(
  trace: divergences.Divergence, velocity: Callable[[State], State], x: State, probes: Any
) -> tuple[State, Float[Array, "b m"], Float[Array, " b"]]:
  """(f(x), estimates of tr J, of |J|_F^2), both from the same products J v."""
  value, linear = jax.linearize(velocity, x)
  size = math.prod(x.shape[1:])

  def products(v: State) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    product = linear(v)
    return jnp.sum(v * product, axis=range(1, x.ndim)), jnp.sum(product**2, axis=range(1, x.ndim))

  if trace.exact:
    unit = lambda i: jnp.broadcast_to(jnp.zeros((1, size), x.dtype).at[0, i].set(1), (len(x), size)).reshape(x.shape)
    entries = jax.lax.map(lambda i: products(unit(i)), jnp.arange(size), batch_size=min(_CHUNK, size))
    traces, squares = (jnp.sum(part, axis=0) for part in entries)
    return value, traces[:, None], squares
  shape = getattr(probes, "shape", None)
  if shape is None or shape[:1] + shape[2:] != x.shape:
    raise ValueError("jacobian needs divergence.exact() or divergence.hutchinson(...), whose probes are [b, m, *d]")
  traces, squares = jax.vmap(products, in_axes=1, out_axes=1)(probes)
  return value, traces, jnp.mean(squares, axis=1)
