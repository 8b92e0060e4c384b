"""UniPC: a multistep predictor, corrected at every grid point by the very evaluation that the next step needs.

With the weights of exponential.py, eq. (3), for p values of the denoiser D, and B(h) = 1 - e^-h = J_0 (bh2):

    UniP-p     x_next = sigma_next / sigma x + alpha_next sum_{j<p} w_j D_j,       nodes 0, -r_0, -r_0 - r_1         (1)
    UniC-p     the same with one node more, theta = 1: D at the predicted x_next,  at which the next step starts     (2)

The linear parts agree, so the corrector adds a combination of values of D to the prediction. B(h) matters only where
one unknown weight is left: UniP-2 and UniC-1 give it half of J_0, and not J_1. The error of UniPC-p is of order
h^(p+1) for p = 1, 2; for p = 3 the first step, whose corrector has order 2, leaves h^3.

References:
  Zhao et al. 2023, UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, Algorithms 1,
  2 and eq. 7, 9 and 12.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks
from jaxdiff.samplers import exponential
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Intervals, Method, check_grid, intervals
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import State


def unipc(
  sde: ScalarSDE,
  ts: Float[Array, " n"],
  order: int = 2,
  lower_order_final: bool = False,
  denoise: bool = False,
  path: int = 0,
) -> FixedGrid:
  """Sampler by UniPC steps (the variant bh2): one network evaluation a step for predictor and corrector together.

  The first steps have the orders 1, 2, .. that the values at hand allow; a step to sigma = 0 has order 1. The last
  state is predicted and not corrected, which would cost one evaluation more; so are the states of the path.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    order: of the predictor, 1, 2 or 3, at most `steps`; the corrector has one more.
    lower_order_final: whether the last two steps have the orders 2 and 1, which steadies grids of few steps.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations. It is deterministic.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], an order above 3 or the number of steps, a path that
      does not divide the number of steps; when called, for cond of another batch.
    TypeError: for a process without scalar marginals; when called, for an x_T that is no array of floating point
      numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.unipc(sde, jd.time_grid(sde, 20), order=3)
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = sampler(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.nfe.tolist(), bool(abs(sample.x - x_T).max() < 0.02)  # N(0, I) is at rest under VP
    ([20, 20, 20, 20], True)
  """
  checks.made("sde", sde, ScalarSDE)
  ts = check_grid(ts, sde.t1)
  exponential.check_multistep_order(order, len(ts) - 1)
  with jax.ensure_compile_time_eval():
    nodes = _nodes(intervals(sde, ts), int(order), bool(lower_order_final))

  def step(field: Field, x: State, memory: Any, node: Any, noise: Key[Array, " b"]) -> Any:
    t, keep, predictor, correction = node
    values = (field.denoised(x, t), *memory)
    x = x + exponential.weighted(correction, values)
    return expand(keep, x) * x + exponential.weighted(predictor, values[:-1]), values[:-1]

  memory = lambda x: (jnp.zeros_like(x),) * order
  return FixedGrid(sde, ts, Method(step, nodes, ts[:-1], memory), denoise, path)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nodes(ends: Intervals, order: int, lower_order_final: bool) -> tuple[Array, ...]:
  """(t, a, what a prediction takes of `order` values, what the correction at the step's start takes of one more)."""
  h = exponential.log_snr_steps(ends)
  past, J = exponential.past_nodes(h, order), exponential.moments(h, order + 1)
  halved = [J[0], J[0] / 2]
  each = range(1, order + 1)
  ahead = [exponential.interpolation_weights(past[:p], halved if p == 2 else J[:p]) for p in each]
  both = [jnp.ones_like(h), *past]
  back = [exponential.interpolation_weights(both[: p + 1], halved if p == 1 else J[: p + 1]) for p in each]
  orders = exponential.step_orders(order, ends.sigma_next, lower_order_final)
  predictor = ends.alpha_next[:, None] * exponential.by_order(orders, ahead, order)
  corrector = ends.alpha_next[:, None] * exponential.by_order(orders, back, order + 1)
  added = corrector.at[:, 1:].add(-predictor)
  return ends.t, ends.sigma_next / ends.sigma, predictor, jnp.concatenate([jnp.zeros_like(added[:1]), added[:-1]])
