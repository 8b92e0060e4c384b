"""Ordinary differential equations along time, each example with step sizes of its own.

Integration is diffrax's: Tsit5 (Tsitouras 2011, order 5) or Dopri8 (Prince & Dormand 1981, order 8) with error control,
reverse-mode differentiable by recursive checkpointing. Nothing here depends on batch mates: the solve of one example is
vmapped.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import status
from jaxdiff.schedules import float_time
from jaxdiff.typing import Status

MAX_STEPS = 4096
_SOLVERS = {5: (diffrax.Tsit5, 6), 8: (diffrax.Dopri8, 13)}  # with the evaluations of a step
_SMALLEST_STEP = 1e-7  # of the whole interval: below it float32 times stand still


def check_solver(rtol: float, atol: float, order: int, max_steps: int) -> None:
  """Refuse tolerances that no solve can meet, and orders that there are not."""
  for name, value in (("rtol", rtol), ("atol", atol)):
    if not value > 0:
      raise ValueError(f"{name} must be positive, got {value}")
  if order not in _SOLVERS:
    raise ValueError(f"order must be 5 or 8, got {order}")
  if max_steps < 1:
    raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def solve(
  field: Callable[[Array, Any], Any],
  y0: Any,
  start: Float[Array, ""],
  end: Float[Array, ""],
  first_step: Float[Array, ""],
  rtol: float,
  atol: float,
  max_steps: int = MAX_STEPS,
  at: Float[Array, " n"] | None = None,
  order: int = 5,
) -> tuple[Any, Array, Status]:
  """Solve dy/dt = field(t, y) for one example, from `start` to `end` in either direction of time.

  Args:
    field: `(t: [], y) -> dy/dt`, of the structure of y.
    y0: the state at `start`, a pytree; the error control takes its root mean square over all of it.
    start: a time.
    end: a time.
    first_step: length of the first step tried, above 0; a hundredth of the interval where it is below float resolution.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    max_steps: steps, taken and refused, after which the solve gives up.
    at: times from `start` to `end` at which the state is wanted; None for `end` alone.
    order: of the solver, 5 or 8.

  Returns:
    (the state at `end`, or at the times `at` with a leading axis [n], NaN where the solve failed; number of evaluations
    of the field []; status with fields []).
  """

  def vector_field(t: Any, y: Any, args: None) -> Any:
    return field(t, y)

  with jax.ensure_compile_time_eval():
    t0, t1 = float_time(start), float_time(end)
    smallest = _SMALLEST_STEP * jnp.abs(t1 - t0)
    dt0 = jnp.sign(t1 - t0) * jnp.where(first_step > smallest, first_step, 1e-2 * jnp.abs(t1 - t0))
  times: dict[str, Any] = {"t0": t0, "t1": t1, "dt0": dt0}
  # diffrax checks the order of times that are arrays by a callback to the host, of Python numbers here and now; a
  # traced process leaves the first step to diffrax.
  if any(isinstance(time, jax.core.Tracer) for time in times.values()):
    times["dt0"] = None
  else:
    times = {name: float(time) for name, time in times.items()}
  solver, evaluations = _SOLVERS[order]
  with jax.default_matmul_precision("highest"):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(vector_field),
      solver(),
      y0=y0,
      **times,
      saveat=diffrax.SaveAt(t1=True) if at is None else diffrax.SaveAt(ts=at),
      stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmin=smallest, force_dtmin=False),
      max_steps=max_steps,
      throw=False,
    )
  ys = jax.tree.map(lambda leaf: leaf[0], solution.ys) if at is None else solution.ys
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ys)]))
  steps, accepted = solution.stats["num_steps"], solution.stats["num_accepted_steps"]
  unfinished = jnp.where((steps >= max_steps) & (accepted > 0), status.MAX_STEPS, status.NON_FINITE)
  code = jnp.where(finite & (solution.result == diffrax.RESULTS.successful), status.SUCCESS, unfinished)
  ys = jax.tree.map(lambda leaf: jnp.where(code == status.SUCCESS, leaf, jnp.nan), ys)
  return ys, evaluations * steps + 1, Status(code, accepted, solution.stats["num_rejected_steps"])
