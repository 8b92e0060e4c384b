"""Deterministic sampling: the probability-flow ODE, integrated with adaptive steps from the prior to the data.

    dx/dt = f(x, t) - 1/2 g(t)^2 score(x, t)

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 13.
"""

import jax
from jax import Array

from jaxdiff import checks, flow
from jaxdiff.keys import per_example
from jaxdiff.schedules import SAMPLING_NOISE_TO_SIGNAL, float_time, start_time, time_grid
from jaxdiff.sde import ScalarSDE, reverse
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State

_PATH_STEPS = 32
_FIRST_STEP = 1e-2


def probability_flow(
  sde: ScalarSDE,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  t0: Scalar | None = None,
  max_steps: int = flow.MAX_STEPS,
  path: bool = False,
):
  """Sampler by the probability-flow ODE, each example with its own step sizes.

  Args:
    sde: a process with scalar marginals.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    t0: where to stop; None for the time at which sigma / alpha = 2e-3.
    max_steps: steps after which an example gives up (status 1).
    path: whether to return the 33 states at the nodes of `time_grid(sde, 32, t0=t0)`, from x_T to the sample.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample. The flow is deterministic: key is not used.

  Raises:
    ValueError: for tolerances that are not positive or a t0 outside [0, t1); when called, for cond of another batch.
    TypeError: for a class given as the process; when called, for an x_T that is no array of floating point numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = jd.samplers.probability_flow(sde)(jax.random.key(1), x_T, lambda x, t: -x)
    >>> bool(abs(sample.x - x_T).max() < 1e-4)  # N(0, I) is at rest under VP
    True
  """
  checks.made("sde", sde, ScalarSDE)
  flow.check_tolerances(rtol, atol, max_steps)
  end = start_time(sde, t0, SAMPLING_NOISE_TO_SIGNAL)
  nodes = time_grid(sde, _PATH_STEPS, t0=t0) if path else None
  with jax.ensure_compile_time_eval():
    start = float_time(sde.t1)
    first_step = _FIRST_STEP * (start - end)

  def sampler(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    per_example(key, len(x_T))
    drift, _ = reverse(sde, score, eta=0.0)

    def one(x: Array, cond: dict[str, Array]) -> tuple[Array, Array, flow.Status]:
      batched = {name: value[None] for name, value in cond.items()}
      field = lambda t, y: drift(y[None], t, **batched)[0]
      return flow.solve(field, x, start, end, first_step, rtol, atol, max_steps, nodes)

    out_axes = 1 if path else 0, 0, 0
    states, nfe, status = jax.vmap(one, out_axes=out_axes)(x_T, dict(cond))
    return Sample(states[-1], nfe, states, status) if path else Sample(states, nfe, None, status)

  return sampler
