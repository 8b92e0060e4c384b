"""Symmetric splitting: the reverse SDE in a part that is solved exactly and one that is small where data are normal.

For a process that keeps its prior, the reverse SDE is that of the prior itself, whose steps are exact and have all the
noise, and a flow without noise that drives the state from there,

    dx = G G^T (score(x, t) - grad log prior(x)) (-dt)                                                              (1)

A step from t to s = t - h is half a step of the first, h of (1) and the other half of the first. Weak orders:

    order 1    x + h F(x, t)                              an Euler step of (1) at the start of the step             (2)
    order 2    x + h F(x + h / 2 F(x, m), m)              the midpoint rule in x, at the middle m of the step       (3)

with F the rate of (1). Strang splitting is of order 2 where both parts are, and time goes with the exact one: halfway,
when (1) is due, it is m.

References:
  Dockhorn, Vahdat & Kreis 2022, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Section 3.3
  and Appendix D, for (2); Strang 1968, On the Construction and Comparison of Difference Schemes, for the order.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_grid
from jaxdiff.sde import SDE, expand
from jaxdiff.typing import State, Time

Order = Literal[1, 2]


@runtime_checkable
class PriorKeepingSDE(SDE, Protocol):
  """A process that keeps its prior, and knows its own steps backwards there."""

  def step_back(self, x: State, t: Time, s: Time, noise: State) -> State:
    """x_s given x_t = x, s <= t, of the process started from its prior; noise: standard normal, of the shape of x."""
    ...


def sscs(sde: PriorKeepingSDE, ts: Float[Array, " n"], order: Order = 1, path: int = 0) -> FixedGrid:
  """Sampler by symmetric splitting of the reverse SDE, in its exact part at the prior and the score's.

  Args:
    sde: a process with `step_back(x, t, s, noise)`, the exact step backwards where it keeps its prior; such as `CLD`.
    ts: decreasing times `[steps + 1]`, such as `cld.time_grid` makes.
    order: 1 for Euler steps of the score's part (2), 2 for the midpoint rule (3).
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `order * steps` network evaluations. Example k takes its
    noise from its own key: the same for any batch.

  Raises:
    ValueError: for an unknown order, a grid that does not decrease within [0, t1], a path that does not divide the
      number of steps; when called, for cond of another batch.
    TypeError: for a process without `step_back`, a class given for one.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.CLD()
    >>> sampler = jd.samplers.sscs(sde, jd.cld.time_grid(sde, 20))
    >>> u_T = sde.prior_sample(jax.random.key(0), (4, 3, 2))
    >>> sample = sampler(jax.random.key(1), u_T, lambda u, t: -u)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 3, 2), [20, 20, 20, 20])
  """
  checks.made("sde", sde, PriorKeepingSDE)
  checks.one_of("order", order, Order)
  ts = check_grid(ts, sde.t1)
  middle = 0.5 * (ts[:-1] + ts[1:])

  def rate(field: Field, x: State, t: Array) -> State:
    prior = jax.grad(lambda x: jnp.sum(sde.prior_log_prob(x)))(x)
    return sde.diffuse(t, sde.diffuse(t, field.score(x, t) - prior))

  def drive(field: Field, x: State, t: Array, m: Array, h: Array) -> State:
    if order == 1:
      return x + h * rate(field, x, t)
    return x + h * rate(field, x + 0.5 * h * rate(field, x, m), m)

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    t, m, s = node
    first, second = (keys.normal(key, x.shape, x.dtype) for key in keys.split(noise))
    x = sde.step_back(x, t, m, first)
    x = drive(field, x, t, m, expand(t - s, x))
    return sde.step_back(x, m, s, second), memory

  calls = ts[:-1] if order == 1 else jnp.concatenate([middle, middle])
  return FixedGrid(sde, ts, Method(step, (ts[:-1], middle, ts[1:]), calls), path=path)
