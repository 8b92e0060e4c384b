"""The log-density of a continuous normalizing flow as `bits_per_dim`, `pilot` and `each_condition` take it.

The flow has no noise: data stand at t = 0 themselves, and the network is the vector field.

References:
  Grathwohl et al. 2019, FFJORD, eq. 8; Theis et al. 2016, A Note on the Evaluation of Generative Models, Section 3.1,
  for the bits per dimension of a density by uniform dequantization.
"""

import jax
import jax.numpy as jnp

from jaxdiff import divergence as divergences
from jaxdiff import flow, ode
from jaxdiff.likelihood.density import LogDensity
from jaxdiff.typing import Scalar


def flow_log_prob(
  divergence: divergences.Divergence | None = None,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  base: flow.Base = flow.standard_normal(),
  t1: Scalar = 1.0,
  solver: ode.Method = "tsit5",
  max_steps: int = ode.MAX_STEPS,
  num_steps: int | None = None,
  steps: flow.Steps = "per_example",
  adjoint: ode.Adjoint = "checkpoint",
) -> LogDensity:
  """Log-density of a continuous normalizing flow: `flow.cnf(...).log_prob`, which remembers its trace estimator.

  Args:
    divergence: as in `flow.cnf`, with everything that follows.
    rtol: as in `flow.cnf`.
    atol: as in `flow.cnf`.
    base: as in `flow.cnf`.
    t1: as in `flow.cnf`.
    solver: as in `flow.cnf`.
    max_steps: as in `flow.cnf`.
    num_steps: as in `flow.cnf`.
    steps: as in `flow.cnf`.
    adjoint: as in `flow.cnf`.

  Returns:
    fn(key, x0: [b, *d], field, cond={}) -> LogProb, values in nats, with `sde` None and `t0` 0.

  Raises:
    ValueError, TypeError: as `flow.cnf` does.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> bits = jd.likelihood.bits_per_dim(jd.likelihood.flow_log_prob(), levels=2, data_range=(-1.0, 1.0))
    >>> result = bits(jax.random.key(0), jnp.zeros((1, 2), jnp.uint8), lambda x, t: jnp.zeros_like(x))
    >>> bool(1.32 < result.value[0] < 2.05)  # log2(2 pi) / 2 and log2(2 pi e) / 2, at the ends of the cell [-1, 0]
    True
  """
  model = flow.cnf(base, divergence, t1, solver, rtol, atol, num_steps, max_steps, adjoint, steps)
  with jax.ensure_compile_time_eval():
    return LogDensity(None, jnp.zeros(()), divergence, model.log_prob)
