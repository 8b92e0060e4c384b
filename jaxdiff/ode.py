"""Ordinary differential equations along time: methods, error control, and how gradients flow back through a solve.

Methods are Runge-Kutta's: with error control Tsit5 (Tsitouras 2011, order 5), Dopri5 (Dormand & Prince 1980, order 5)
or Dopri8 (Prince & Dormand 1981, order 8); with a number of equal steps these, and Euler's (order 1), Heun's (order 2)
or the classic one of order 4. Integration is diffrax's. Nothing here depends on batch mates: a batch is vmapped, unless
the batch is the state.

Adjoints. The checkpoint and the direct adjoint differentiate the steps taken. The continuous one solves the equation of
the cotangent a = dL/dy backward in time, beside y itself (Pontryagin):

    da/dt = -(df/dy)^T a,    dL/dtheta = int_{t0}^{t1} (df/dtheta)^T a dt                                            (1)
    dL/dt1 = a(t1) . f(t1, y1),    dL/dt0 = -a(t0) . f(t0, y0)                                                       (2)

References:
  Chen et al. 2018, Neural Ordinary Differential Equations, eq. 4 and 5 and Appendix B for (1) and (2); Kidger et al.
  2021, "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms, for the error norm of the backward solve.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, status
from jaxdiff.schedules import float_time
from jaxdiff.typing import Status

Method = Literal["tsit5", "dopri5", "dopri8", "euler", "heun", "rk4"]
Adaptive = Literal["tsit5", "dopri5", "dopri8"]
Adjoint = Literal["checkpoint", "continuous", "direct"]

MAX_STEPS = 4096
_SMALLEST_STEP = 1e-7  # of the whole interval: below it float32 times stand still


class _RK4(diffrax.AbstractERK):
  """The classic Runge-Kutta method of order 4 (Kutta 1901)."""

  tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
    a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
    b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    b_error=np.array([1 / 6 - 1, 1 / 3, 1 / 3, 1 / 6]),
    c=np.array([0.5, 0.5, 1.0]),
  )
  interpolation_cls: ClassVar[Any] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

  def order(self, terms: Any) -> int:
    return 4


# The method, evaluations a step, evaluations before the first.
_ADAPTIVE = {"tsit5": (diffrax.Tsit5, 6, 1), "dopri5": (diffrax.Dopri5, 6, 1), "dopri8": (diffrax.Dopri8, 13, 1)}
_METHODS = {**_ADAPTIVE, "euler": (diffrax.Euler, 1, 0), "heun": (diffrax.Heun, 2, 0), "rk4": (_RK4, 4, 0)}


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
    method: "tsit5" or "dopri5" (order 5), "dopri8" (order 8: pays at tolerances far below 1e-5 and in float64 alone);
      with `num_steps` also "euler", "heun", "rk4".
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    max_steps: steps, taken and refused, after which a solve with error control gives up (status 1).
    num_steps: how many equal steps to take, without error control; None for steps that keep the tolerances.
    adjoint: how reverse mode goes. "checkpoint": through the steps, whose states are recomputed from a logarithmic
      number of them. "continuous": by solving eq. (1) backward, in memory that does not depend on the number of steps
      and with errors of its own, of the tolerances, but large where the way back is unstable; it gives eq. (2) for the
      ends. "direct": through the steps, in bounded loops, also in forward mode; its cost grows with max_steps.

  Raises:
    ValueError: for tolerances that are not positive, an unknown method or adjoint, max_steps or num_steps below 1, and
      for a method without error control where num_steps is None.
    TypeError: for max_steps or num_steps that are no integer.
  """

  method: Method = "tsit5"
  rtol: float = 1e-5
  atol: float = 1e-5
  max_steps: int = MAX_STEPS
  num_steps: int | None = None
  adjoint: Adjoint = "checkpoint"

  def __post_init__(self):
    for name in ("rtol", "atol"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    if self.method not in _METHODS:
      raise ValueError(f"solver must be one of {', '.join(_METHODS)}, got {self.method!r}")
    checks.whole("max_steps", self.max_steps, 1)
    if self.num_steps is not None:
      checks.whole("num_steps", self.num_steps, 1)
    elif self.method not in _ADAPTIVE:
      raise ValueError(
        f"solver {self.method!r} has no error control: give it num_steps, or use one of {', '.join(_ADAPTIVE)}"
      )
    checks.one_of("adjoint", self.adjoint, Adjoint)


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

  Gradients reach y0, what the field captured, and `start`, `end` and `at` where they are traced.

  Args:
    field: `(t: [], y) -> dy/dt`, of the structure of y.
    y0: the state at `start`, a pytree.
    start: a time.
    end: a time.
    first_step: length of the first step tried under error control, above 0; a hundredth of the interval where it is
      below float resolution.
    solver: how to solve.
    at: times from `start` to `end` at which the state is wanted, not with the continuous adjoint; None for `end`.
    norm: of a state, by which the error of a step is measured.

  Returns:
    (the state at `end`, or at the times `at` with a leading axis [n], NaN where the solve failed; number of evaluations
    of the field [], those of the backward solve not among them; status with fields []).

  Raises:
    ValueError: for `at` with the continuous adjoint.
  """
  if at is not None and solver.adjoint == "continuous":
    raise ValueError("at needs adjoint='checkpoint' or 'direct': the continuous adjoint starts from the end alone")
  with jax.ensure_compile_time_eval():
    t0, t1 = float_time(start), float_time(end)
    length = jnp.abs(t1 - t0)
    dt0 = jnp.sign(t1 - t0) * jnp.where(first_step > _SMALLEST_STEP * length, first_step, 1e-2 * length)
  # diffrax checks the order of times that are arrays by a callback to the host, of Python numbers here and now; a
  # traced process leaves the first step to diffrax.
  traced = any(isinstance(time, jax.core.Tracer) for time in (t0, t1, dt0))
  times = _Times(t0, t1, None, at) if traced else _Times(float(t0), float(t1), float(dt0), at)
  with jax.default_matmul_precision("highest"):
    if solver.adjoint == "continuous":
      ys, counts = _backsolve(field, y0, times, solver, norm)
    else:
      adjoint = diffrax.DirectAdjoint() if solver.adjoint == "direct" else diffrax.RecursiveCheckpointAdjoint()
      ys, counts = _integrate(lambda t, y, args: field(t, y), None, y0, times, solver, norm, adjoint)
  ys = jax.tree.map(lambda leaf: leaf[0], ys) if at is None else ys
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ys)]))
  spent = (counts.steps >= solver.max_steps) & (counts.accepted > 0) & (solver.num_steps is None)
  unfinished = jnp.where(spent, status.MAX_STEPS, status.NON_FINITE)
  code = jnp.where(finite & counts.finished, status.SUCCESS, unfinished)
  whole = jnp.where(code == status.SUCCESS, 1.0, jnp.nan)  # a factor, so that gradients of failures are NaN, too
  ys = jax.tree.map(lambda leaf: leaf * whole.astype(leaf.dtype), ys)
  _, evaluations, first = _METHODS[solver.method]
  return ys, evaluations * counts.steps + first, Status(code, counts.accepted, counts.rejected)


class _Times(NamedTuple):
  """Where a solve begins, ends, and looks: numbers, or arrays where they are traced."""

  start: Any
  end: Any
  first_step: Any
  at: Any


class _Counts(NamedTuple):
  steps: Array
  accepted: Array
  rejected: Array
  finished: Array


def _integrate(
  field: Callable[[Array, Any, Any], Any],
  args: Any,
  y0: Any,
  times: _Times,
  solver: Solver,
  norm: Callable[[Any], Array],
  adjoint: diffrax.AbstractAdjoint,
) -> tuple[Any, _Counts]:
  """The states `[n, ...]` at the times asked for, by diffrax. What is to be differentiated by `adjoint` is in args."""
  options: dict[str, Any]
  control: diffrax.AbstractStepSizeController
  if solver.num_steps is None:
    term = lambda t, y, args: field(t, y, args[0])
    smallest = _SMALLEST_STEP * abs(times.end - times.start)
    control = diffrax.PIDController(solver.rtol, solver.atol, norm=norm, dtmin=smallest, force_dtmin=False)
    options = {"t0": times.start, "t1": times.end, "dt0": times.first_step, "max_steps": solver.max_steps}
    at = times.at
  else:
    # Steps are counted in a variable s whose every step is 1, exactly: t = t0 (1 - s/n) + t1 s/n.
    count, dtype = solver.num_steps, jnp.result_type(times.start)

    def term(s: Any, y: Any, args: Any) -> Any:
      inner, start, end = args
      share = jnp.asarray(s / count, dtype)
      slope = field(start * (1 - share) + end * share, y, inner)
      return jax.tree.map(lambda leaf: jnp.asarray((end - start) / count, leaf.dtype) * leaf, slope)

    control = diffrax.ConstantStepSize()
    options = {"t0": 0.0, "t1": float(count), "dt0": 1.0, "max_steps": count}
    at = None if times.at is None else count * (times.at - times.start) / (times.end - times.start)
  with jax.default_matmul_precision("highest"):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(term),
      _METHODS[solver.method][0](),
      y0=y0,
      args=(args, times.start, times.end),
      saveat=diffrax.SaveAt(t1=True) if at is None else diffrax.SaveAt(ts=at),
      stepsize_controller=control,
      adjoint=adjoint,
      throw=False,
      **options,
    )
  stats, finished = solution.stats, solution.result == diffrax.RESULTS.successful
  return solution.ys, _Counts(stats["num_steps"], stats["num_accepted_steps"], stats["num_rejected_steps"], finished)


def _backsolve(
  field: Callable[[Array, Any], Any], y0: Any, times: _Times, solver: Solver, norm: Callable[[Any], Array]
) -> tuple[Any, _Counts]:
  """`_integrate` with the continuous adjoint, eq. (1), and the endpoint rule, eq. (2); NaN where the way back fails.

  The equation of the cotangent is linear, so it is solved for a cotangent scaled to a largest entry of 1: then atol has
  one meaning for every loss. diffrax's own continuous adjoint checks times on the host and is silent on failures.
  """
  dtype = jnp.result_type(times.start)
  start, end = (jnp.asarray(time, dtype) for time in (times.start, times.end))
  converted = eqx.filter_closure_convert(field, start, y0)
  captured, rest = eqx.partition(converted, lambda leaf: isinstance(leaf, jax.core.Tracer))
  captured = jax.tree.map(jnp.asarray, captured)  # a Python number differentiated outside jit is no array by itself
  slope = lambda t, y, captured: eqx.combine(captured, rest)(jnp.asarray(t, dtype), y)
  steps_alone = diffrax.RecursiveCheckpointAdjoint()

  @eqx.filter_custom_vjp
  def run(inputs: Any, times: _Times) -> tuple[Any, _Counts]:
    y0, captured, *_ = inputs
    return _integrate(slope, captured, y0, times, solver, norm, steps_alone)

  @run.def_fwd
  def forward(perturbed: Any, inputs: Any, times: _Times) -> Any:
    ys, counts = run(inputs, times)
    return (ys, counts), jax.tree.map(lambda leaf: leaf[0], ys)

  @run.def_bwd
  def backward(y1: Any, cotangents: Any, perturbed: Any, inputs: Any, times: _Times) -> Any:
    y0, captured, start, end = inputs
    a1 = jax.tree.map(lambda y, a: jnp.zeros_like(y) if a is None else a[0], y1, cotangents[0])
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in jax.tree.leaves(a1)]))
    scale = jnp.where(size > 0, size, 1.0)
    moved, held = eqx.partition(captured, eqx.is_inexact_array)

    def adjoint(t: Array, state: Any, moved: Any) -> Any:
      dy, pull = jax.vjp(lambda y, moved: slope(t, y, eqx.combine(moved, held)), state[0], moved)
      return dy, *jax.tree.map(jnp.negative, pull(state[1]))

    state = y1, jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), a1), jax.tree.map(jnp.zeros_like, moved)
    first_step = None if times.first_step is None else -times.first_step
    back = _Times(times.end, times.start, first_step, None)
    # The integrals over the parameters are no part of the norm: nothing on the way depends on them (Kidger et al.).
    (_, *found), counts = _integrate(adjoint, moved, state, back, solver, lambda state: norm(state[:2]), steps_alone)
    factor = jnp.where(counts.finished, scale, jnp.nan)
    rescaled = lambda leaf: jnp.where(size == 0, 0, leaf[0] * factor.astype(leaf.dtype))
    a0, d_captured = jax.tree.map(rescaled, found)
    d_start = -_dot(a0, slope(start, y0, captured)).astype(dtype) if perturbed[2] else None
    d_end = _dot(a1, slope(end, y1, captured)).astype(dtype) if perturbed[3] else None
    return a0, d_captured, d_start, d_end

  fixed = jax.tree.map(lambda time: jax.lax.stop_gradient(time) if isinstance(time, Array) else time, times)
  return run((y0, captured, start, end), fixed)


def _dot(a: Any, b: Any) -> Array:
  return jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))
