"""DPM-Solver++: multistep exponential integrators with the denoiser, for the flow and for the reverse SDE.

The denoiser in the exact solution (exponential.py, eq. 1) becomes the polynomial through its last `order` values:

    order 1    x_next = a x + alpha_next J_0 D_0 + n z                                        DDIM at eta = 0        (1)
    order 2    ... + alpha_next J_0 / 2 (D_0 - D_1) / r_0                                     2M                     (2)
    order 3    ... + alpha_next (J_1 d_1 + J_2 d_2)                                           3M                     (3)

    a = sigma_next / sigma exp(-eta^2 h),     n = sigma_next sqrt(1 - exp(-2 eta^2 h)),     J_k = J_k((1 + eta^2) h)
    d_2 = (delta_0 - delta_1) / (r_0 + r_1),  d_1 = delta_0 + r_0 d_2,  delta_i = (D_i - D_{i+1}) / r_i

with D_i the value i steps ago and r_i = h_{-1-i} / h. At n = 0 the error is of order h^1, h^2 and, from exact starting
values, h^3: the first step of 3M, of order 1, leaves h^2, which is small where D hardly moves at the start, as it does
at the prior. For eta > 0 the error of the moments is of order h^1, h^2 and h^2.

2M has the paper's J_0 / 2 (the midpoint rule) where the exact integral of the line is J_1. The order is the same; at 40
steps for a mixture in 64 dimensions with modes of std 0.05 it leaves 0.35 nats where J_1 leaves 0.59. Common
implementations of 3M have J_2 / 2 for J_2 in (3), which leaves order 2.

References:
  Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, Algorithm 2 for 2M,
  Section 5 and Appendix A for the SDE.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers import exponential
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Intervals, Method, check_grid, intervals
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import Scalar, State

_COEFFICIENTS = ("exact", "diffusers")


def dpm_solver_pp(
  sde: ScalarSDE,
  ts: Float[Array, " n"],
  order: int = 2,
  eta: Scalar = 0.0,
  lower_order_final: bool = False,
  coefficients: Literal["exact", "diffusers"] = "exact",
  denoise: bool = False,
  path: int = 0,
) -> FixedGrid:
  """Sampler by DPM-Solver++ with `order` values of the denoiser: DDIM, 2M, 3M and their stochastic versions.

  The first steps have the orders 1, 2, .. that the values at hand allow. A step to sigma = 0 has order 1: it ends at
  the denoiser's value.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    order: 1, 2 or 3, at most `steps`.
    eta: amount of noise in [0, 1], as in `jd.reverse`: 0 the probability flow, 1 the reverse SDE.
    lower_order_final: whether the last two steps have the orders 2 and 1, which steadies grids of few steps.
    coefficients: "exact" integrates the parabola of order 3 exactly; "diffusers" halves its J_2 for parity with that
      library at eta = 0, and has an error of order h^2 only. Orders 1 and 2 are the same in both: 2M is that library's
      default, `solver_type="midpoint"`.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], an order above 3 or the number of steps, eta outside
      [0, 1], unknown coefficients, a path that does not divide the number of steps; when called, for cond of another
      batch.
    TypeError: for a process without scalar marginals; when called, for an x_T that is no array of floating point
      numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.dpm_solver_pp(sde, jd.time_grid(sde, 20))
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = sampler(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.nfe.tolist(), bool(abs(sample.x - x_T).max() < 0.1)  # N(0, I) is at rest under VP
    ([20, 20, 20, 20], True)
  """
  checks.made("sde", sde, ScalarSDE)
  ts = check_grid(ts, sde.t1)
  _check_options(eta, coefficients)
  exponential.check_multistep_order(order, len(ts) - 1)
  with jax.ensure_compile_time_eval():
    nodes = _nodes(intervals(sde, ts), eta, int(order), bool(lower_order_final), coefficients)
  noisy = isinstance(eta, jax.core.Tracer) or eta != 0

  def step(field: Field, x: State, memory: Any, node: Any, noise: Key[Array, " b"]) -> Any:
    t, keep, weights, spread = node
    values = (field.denoised(x, t), *memory)
    x = expand(keep, x) * x + exponential.weighted(weights, values)
    if noisy:
      x = x + expand(spread, x) * keys.normal(noise, x.shape, x.dtype)
    return x, values[:-1]

  memory = lambda x: (jnp.zeros_like(x),) * (order - 1)
  return FixedGrid(sde, ts, Method(step, nodes, ts[:-1], memory), denoise, path)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _nodes(ends: Intervals, eta: Scalar, order: int, lower_order_final: bool, coefficients: str) -> tuple[Array, ...]:
  """(t, a, weights [steps, order], n) of every step."""
  h = exponential.log_snr_steps(ends)
  past, J = exponential.past_nodes(h, order), exponential.moments((1 + eta**2) * h, 3)
  curvature = J[2] / 2 if coefficients == "diffusers" else J[2]
  integrals = [J[:1], [J[0], J[0] / 2], [J[0], J[1], curvature]]
  each = [exponential.interpolation_weights(past[:k], integrals[k - 1]) for k in range(1, order + 1)]
  orders = exponential.step_orders(order, ends.sigma_next, lower_order_final)
  weights = ends.alpha_next[:, None] * exponential.by_order(orders, each, order)
  keep = ends.sigma_next / ends.sigma * jnp.exp(-(eta**2) * h)
  return ends.t, keep, weights, ends.sigma_next * _noise(eta, h)


def _noise(eta: Scalar, h: Array) -> Array:
  """sqrt(1 - exp(-2 eta^2 h)), with a derivative at eta = 0."""
  exponent = 2 * eta**2 * h
  some = exponent > 0
  share = jnp.where(some, -jnp.expm1(-exponent) / jnp.where(some, exponent, 1.0), 1.0)
  return eta * jnp.sqrt(2 * h * share)


def _check_options(eta: Scalar, coefficients: str) -> None:
  if not isinstance(eta, jax.core.Tracer) and not 0 <= float(eta) <= 1:
    raise ValueError(f"eta must lie in [0, 1] (0 the probability flow, 1 the reverse SDE), got {eta}")
  if coefficients not in _COEFFICIENTS:
    raise ValueError(f"coefficients must be 'exact' or 'diffusers', got {coefficients!r}")
