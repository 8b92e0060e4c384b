"""DPM-Solver: singlestep exponential integrators of the probability flow with the noise eps = -sigma score.

With lambda = log(alpha / sigma), a step of length h in lambda from t solves

    x_next = alpha_next / alpha x - sigma_next int_0^h exp(h - tau) eps(lambda + tau) dtau                           (1)

exactly but for eps: u_i = alpha_i / alpha x - sigma_i (exp(h_i) - 1) eps(x, t) - .. at times between, h_i = r_i h, give

    order 1    x_next = alpha_next / alpha x - sigma_next (exp(h) - 1) eps                                           (2)
    order 2    ... - sigma_next (exp(h) - 1) / (2 r_1) (eps(u_1) - eps),               r_1 = 1 / 2                   (3)
    order 3    ... - sigma_next ((exp(h) - 1) / h - 1) / r_2 (eps(u_2) - eps),         r_1 = 1 / 3, r_2 = 2 / 3      (4)
               u_2 = .. - sigma_2 r_2 / r_1 ((exp(h_2) - 1) / h_2 - 1) (eps(u_1) - eps)

r_i are those of the times at which the network is asked: rounding in the inverse of the log-SNR does no harm.

References:
  Lu et al. 2022, DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps, eq. 3.7,
  Algorithms 1 and 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks
from jaxdiff.samplers import exponential
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Intervals, Method, check_grid, check_noise, intervals
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import State

_FRACTIONS = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}


class _Stage(NamedTuple):
  """Where the noise is asked for, and what takes it to the next such point or the end of the step; arrays `[steps]`."""

  t: Array
  sigma: Array
  keep: Array
  of_first: Array
  of_change: Array


def dpm_solver(
  sde: ScalarSDE, ts: Float[Array, " n"], order: int = 2, denoise: bool = False, path: int = 0
) -> FixedGrid:
  """Sampler by DPM-Solver-1 (DDIM), 2 or 3: `order` network evaluations a step.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`. It may end at sigma = 0 for order 1 alone.
    order: 1, 2 or 3.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `order * steps` network evaluations. It is deterministic.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], an order above 3, a path that does not divide the
      number of steps, sigma = 0 at the end for an order above 1; when called, for cond of another batch.
    TypeError: for a process without scalar marginals; when called, for an x_T that is no array of floating point
      numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.dpm_solver(sde, jd.time_grid(sde, 10), order=3)
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = sampler(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.nfe.tolist(), bool(abs(sample.x - x_T).max() < 0.02)  # N(0, I) is at rest under VP
    ([30, 30, 30, 30], True)
  """
  checks.made("sde", sde, ScalarSDE)
  ts = check_grid(ts, sde.t1)
  exponential.check_order(order, 3)
  if order > 1:
    check_noise(sde, ts[-1], f"order={order}")
  with jax.ensure_compile_time_eval():
    stages = _stages(sde, intervals(sde, ts), _FRACTIONS[int(order)])
    calls = jnp.concatenate([stage.t for stage in stages])

  def step(field: Field, x: State, memory: Any, node: list[_Stage], noise: Key[Array, " b"]) -> Any:
    eps = lambda u, stage: expand(-stage.sigma, u) * field.score(u, stage.t)
    begin, *between = node
    first = eps(x, begin)
    u = expand(begin.keep, x) * x - expand(begin.of_first, x) * first
    for stage in between:
      change = eps(u, stage) - first
      u = expand(stage.keep, x) * x - expand(stage.of_first, x) * first - expand(stage.of_change, x) * change
    return u, memory

  return FixedGrid(sde, ts, Method(step, stages, calls), denoise, path)


def _stages(sde: ScalarSDE, ends: Intervals, fractions: tuple[float, ...]) -> list[_Stage]:
  log_snr = 2 * (jnp.log(ends.alpha) - jnp.log(ends.sigma))
  h = exponential.log_snr_steps(ends)
  times = [sde.time_of_log_snr(log_snr + 2 * fraction * h) for fraction in fractions]
  points = [(ends.t, ends.alpha, ends.sigma), *((t, *sde.marginal(t)) for t in times)]
  return _coefficients(ends, points)


@jax.jit
def _coefficients(ends: Intervals, points: list[tuple[Array, Array, Array]]) -> list[_Stage]:
  """What leads from every point (t, alpha, sigma) at which the network is asked to the next, and to the end."""
  h, r, stages = exponential.log_snr_steps(ends), jnp.ones_like(ends.t), []
  targets = [*points[1:], (ends.t_next, ends.alpha_next, ends.sigma_next)]
  for (t, _, sigma), (_, alpha_to, sigma_to) in zip(points, targets, strict=True):
    h_to = exponential.log_snr_steps(ends._replace(alpha_next=alpha_to, sigma_next=sigma_to))
    of_first = alpha_to * ends.sigma / ends.alpha * -jnp.expm1(-h_to)
    bend = jnp.expm1(h_to) / 2 if len(points) == 2 else -exponential.moments(-h_to, 2)[1]
    stages.append(_Stage(t, sigma, alpha_to / ends.alpha, of_first, sigma_to * bend * (h_to / h) / r))
    r = h_to / h
  return stages
