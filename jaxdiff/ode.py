"""Ordinary differential equations along time, each example with step sizes of its own.

Integration is diffrax's: Tsit5 (Tsitouras 2011, order 5), Dopri5 (Dormand & Prince 1980, order 5) or Dopri8 (Prince &
Dormand 1981, order 8) with error control, reverse-mode differentiable by recursive checkpointing. Nothing here depends
on batch mates: the solve of one example is vmapped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import status
from jaxdiff.schedules import float_time
from jaxdiff.typing import Status

Method = Literal["tsit5", "dopri5", "dopri8"]

MAX_STEPS = 4096
_METHODS = {"tsit5": (diffrax.Tsit5, 6), "dopri5": (diffrax.Dopri5, 6), "dopri8": (diffrax.Dopri8, 13)}
_SMALLEST_STEP = 1e-7  # of the whole interval: below it float32 times stand still


def rms(y: Any) -> Array:
  """The root mean square over all of a state, with a derivative at 0."""
  return largest_rms(jax.tree.map(lambda leaf: leaf[None], y))


def largest_rms(y: Any) -> Array:
  """The largest of the examples' root mean squares over their share of a state, whose leaves are `[b, ...]`."""
  flat = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(y)]
  total = jnp.sum(jnp.stack([jnp.sum(leaf**2, axis=1) for leaf in flat]), axis=0)
  square = jnp.max(total / sum(leaf.shape[1] for leaf in flat))
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class Solver:
  """How to solve: checked when made.

  Attributes:
    method: "tsit5" or "dopri5" (order 5), "dopri8" (order 8: pays at tolerances far below 1e-5 and in float64 alone).
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    max_steps: steps, taken and refused, after which a solve gives up (status 1).

  Raises:
    ValueError: for tolerances that are not positive, an unknown method, max_steps below 1.
  """

  method: Method = "tsit5"
  rtol: float = 1e-5
  atol: float = 1e-5
  max_steps: int = MAX_STEPS

  def __post_init__(self):
    for name in ("rtol", "atol"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    if self.method not in _METHODS:
      raise ValueError(f"solver must be one of {', '.join(_METHODS)}, got {self.method!r}")
    if self.max_steps < 1:
      raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")


def solve(
  field: Callable[[Array, Any], Any],
  y0: Any,
  start: Float[Array, ""],
  end: Float[Array, ""],
  first_step: Float[Array, ""],
  solver: Solver,
  at: Float[Array, " n"] | None = None,
  norm: Callable[[Any], Array] = rms,
) -> tuple[Any, Array, Status]:
  """Solve dy/dt = field(t, y) for one example, from `start` to `end` in either direction of time.

  Args:
    field: `(t: [], y) -> dy/dt`, of the structure of y.
    y0: the state at `start`, a pytree.
    start: a time.
    end: a time.
    first_step: length of the first step tried, above 0; a hundredth of the interval where it is below float resolution.
    solver: how to solve.
    at: times from `start` to `end` at which the state is wanted; None for `end` alone.
    norm: of a state, by which the error of a step is measured.

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
  method, evaluations = _METHODS[solver.method]
  with jax.default_matmul_precision("highest"):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(vector_field),
      method(),
      y0=y0,
      **times,
      saveat=diffrax.SaveAt(t1=True) if at is None else diffrax.SaveAt(ts=at),
      stepsize_controller=diffrax.PIDController(solver.rtol, solver.atol, norm=norm, dtmin=smallest, force_dtmin=False),
      max_steps=solver.max_steps,
      throw=False,
    )
  ys = jax.tree.map(lambda leaf: leaf[0], solution.ys) if at is None else solution.ys
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ys)]))
  steps, accepted = solution.stats["num_steps"], solution.stats["num_accepted_steps"]
  unfinished = jnp.where((steps >= solver.max_steps) & (accepted > 0), status.MAX_STEPS, status.NON_FINITE)
  code = jnp.where(finite & (solution.result == diffrax.RESULTS.successful), status.SUCCESS, unfinished)
  ys = jax.tree.map(lambda leaf: jnp.where(code == status.SUCCESS, leaf, jnp.nan), ys)
  return ys, evaluations * steps + 1, Status(code, accepted, solution.stats["num_rejected_steps"])
