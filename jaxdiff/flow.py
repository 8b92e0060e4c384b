"""Continuous normalizing flows: a vector field carries data at t0, mostly 0, to a base density at t1, and back.

    dx/dt = f(x, t)                                                                                                  (1)
    log p(x_t0) = log base(x_t1) + int_t0^t1 tr(df/dx)(x_t, t) dt                                                    (2)

References:
  Chen et al. 2018, Neural Ordinary Differential Equations, Theorem 1; Grathwohl et al. 2019, FFJORD.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys, ode
from jaxdiff import divergence as divergences
from jaxdiff.predictions import evaluations
from jaxdiff.schedules import float_time
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import NO_COND, Cond, Keys, LogProb, Network, Sample, Scalar, State, Status

Steps = Literal["per_example", "shared"]

_FIRST_STEP = 1e-2  # of the whole interval


class Base(NamedTuple):
  """The density at t1.

  Attributes:
    sample: `(key, shape: (b, *d)) -> z`, from one key or one per example.
    log_prob: `z: [b, *d] -> [b]`, in nats.
  """

  sample: Callable[[Keys, tuple[int, ...]], State]
  log_prob: Callable[[State], Float[Array, " b"]]


def standard_normal() -> Base:
  """N(0, I).

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> round(float(jd.flow.standard_normal().log_prob(jnp.zeros((1, 2)))[0]), 3)  # -log(2 pi)
    -1.838
  """

  def sample(key: Keys, shape: tuple[int, ...]) -> State:
    return keys.normal(keys.per_example(key, shape[0]), shape, jnp.result_type(float))

  def log_prob(z: State) -> Float[Array, " b"]:
    return -0.5 * (jnp.sum(z**2, axis=range(1, z.ndim)) + math.prod(z.shape[1:]) * math.log(2 * math.pi))

  return Base(sample, log_prob)


@dataclasses.dataclass(frozen=True, eq=False)
class LogDensity:
  """A log-density: `fn(key, x0: [b, *d], field, cond={}) -> LogProb`, made by `likelihood.log_prob` or `cnf`.

  Attributes:
    sde: the process whose probability flow it is and whose score is its field; None for a flow without noise.
    t0: the time at which the data stand.
    divergence: the trace estimator, or None for `divergence.default`.
    evaluate: the function itself.
  """

  sde: ScalarSDE | None
  t0: Array
  divergence: divergences.Divergence | None
  evaluate: Callable[..., LogProb]

  def __call__(self, key: Keys, x0: State, field: Network, cond: Cond = NO_COND) -> LogProb:
    return self.evaluate(key, x0, field, cond)

  def trace(self, x: Array) -> divergences.Divergence:
    """The trace estimator for examples like those of x `[b, *d]`."""
    return self.divergence or divergences.default(math.prod(x.shape[1:]))


class CNF(NamedTuple):
  """A continuous normalizing flow, made by `cnf`: pure functions of a vector field.

  The field is any callable `(x: [b, *d], t: [b], **cond) -> dx/dt: [b, *d]`, example by example.

  Attributes:
    forward: `(key, x: [b, *d], field, cond={}) -> Sample`, data to base; key is not used.
    inverse: `(key, z: [b, *d], field, cond={}) -> Sample`, base to data; key is not used.
    log_prob: `(key, x: [b, *d], field, cond={}) -> LogProb`, values in nats. Probes are drawn once a solve, from
      example keys.
    sample: `(key, shape: (b, *d), field, cond={}) -> Sample`, the data to which samples of the base are carried.
  """

  forward: Callable[..., Sample]
  inverse: Callable[..., Sample]
  log_prob: LogDensity
  sample: Callable[..., Sample]


def cnf(
  base: Base = standard_normal(),
  divergence: divergences.Divergence | None = None,
  t1: Scalar = 1.0,
  solver: ode.Method = "tsit5",
  rtol: float = 1e-5,
  atol: float = 1e-5,
  num_steps: int | None = None,
  max_steps: int = ode.MAX_STEPS,
  adjoint: ode.Adjoint = "checkpoint",
  steps: Steps = "per_example",
  t0: Scalar = 0.0,
) -> CNF:
  """A continuous normalizing flow, eq. (1) and (2).

  The continuous adjoint keeps one copy of the parameters' cotangent for the batch with shared steps, and one for every
  example with per-example steps: train with `steps="shared"`.

  Args:
    base: the density at t1.
    divergence: trace estimator; None for `divergence.exact()` up to 64 dimensions (d Jacobian-vector products an
      evaluation, 64 at a time), and one probe of `divergence.hutchinson()` above.
    t1: the time of the base, above t0.
    solver: "tsit5", "dopri5" or "dopri8"; with num_steps also "euler", "heun", "rk4".
    rtol: relative tolerance of a step, on the state and its log-density together.
    atol: absolute tolerance of a step.
    num_steps: how many equal steps to take; None for steps that keep the tolerances.
    max_steps: steps, of those that keep the tolerances, after which an example gives up (status 1).
    adjoint: how gradients flow back, "checkpoint", "continuous" or "direct": see `ode.Solver`.
    steps: "per_example": each example has step sizes of its own; "shared": one for all, such that every example keeps
      the tolerances, and results depend on batch mates.
    t0: the time at which the data stand, at least 0 and below t1.

  Returns:
    CNF(forward, inverse, log_prob, sample).

  Raises:
    ValueError: for what `ode.Solver` refuses, a t1 that is not above t0, an unknown name; when called, for a field of
      another shape than x, and for cond of another batch.
    TypeError: for a factory given where what it makes is due; when called, for an x that is no array of floats.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> flow, field = jd.flow.cnf(), jax.tree_util.Partial(lambda x, t: -x)  # x shrinks by a factor of e
    >>> x = jnp.ones((1, 2))
    >>> round(float(jax.jit(flow.forward)(jax.random.key(0), x, field).x[0, 0]), 3)
    0.368
    >>> round(float(jax.jit(flow.log_prob)(jax.random.key(0), 0 * x, field).value[0]), 3)  # -log(2 pi) - 2
    -3.838
  """
  options = ode.Solver(solver, rtol, atol, max_steps, num_steps, adjoint)
  density = log_density(options, base, divergence, t1, steps, plain_rates, t0)
  carry = _transport(options, t0, t1, steps)

  def forward(key: Keys, x: State, field: Network, cond: Cond = NO_COND) -> Sample:
    return carry(key, x, field, cond, backward=False)

  def inverse(key: Keys, z: State, field: Network, cond: Cond = NO_COND) -> Sample:
    return carry(key, z, field, cond, backward=True)

  with jax.ensure_compile_time_eval():
    log_prob = LogDensity(None, float_time(t0), divergence, lambda *of: density(*of)[0])

  def sample(key: Keys, shape: tuple[int, ...], field: Network, cond: Cond = NO_COND) -> Sample:
    return inverse(key, base.sample(key, shape), field, cond)

  return CNF(forward, inverse, log_prob, sample)


Rates = Callable[[divergences.Divergence, Callable[[State], State], State, Any], tuple[State, Array, dict[str, Array]]]


def plain_rates(
  trace: divergences.Divergence, velocity: Callable[[State], State], x: State, probes: Any
) -> tuple[State, Array, dict[str, Array]]:
  """(dx/dt, estimates `[b, m]` of its divergence, no further integrands): what `log_density` integrates for eq. (2)."""
  return *trace.estimate(velocity, x, probes, jnp.zeros((), x.dtype)), {}


def log_density(
  options: ode.Solver,
  base: Base,
  divergence: divergences.Divergence | None,
  t1: Scalar,
  steps: Steps,
  rates: Rates,
  t0: Scalar = 0.0,
) -> Callable[..., tuple[LogProb, dict[str, Float[Array, " b"]]]]:
  """fn(key, x, field, cond={}) -> (LogProb, integrals `[b]` from t0 to t1 of the integrands that `rates` names)."""
  checks.made("base", base, Base)
  if divergence is not None:
    checks.made("divergence", divergence, divergences.Divergence)
  course = _course(t0, t1)
  checks.one_of("steps", steps, Steps)

  def density(key: Keys, x: State, field: Network, cond: Cond = NO_COND) -> tuple[LogProb, dict[str, Array]]:
    checks.batch("x", x, cond)
    checks.vectors("x", x)
    trace = divergence or divergences.default(math.prod(x.shape[1:]))

    def solve(key: Array, x: Array, cond: dict[str, Array], norm: Callable[[Any], Array]) -> tuple[Any, Array, Status]:
      probes = trace.draw(key, x)
      slope = lambda t, y: rates(trace, _velocity(field, t, cond), y[0], probes)
      _, *integrals = jax.tree.map(
        lambda rate: jnp.zeros(rate.shape, rate.dtype), jax.eval_shape(slope, course.end, (x,))
      )
      return ode.solve(slope, (x, *integrals), *course, options, norm=norm)

    key = keys.per_example(key, len(x))
    (z, change, integrals), nfe, status = solve_batch(solve, steps, key, x, dict(cond))
    value = base.log_prob(z) + jnp.mean(change, axis=1)
    nfe = nfe * evaluations(field)
    return LogProb(value, z, nfe, status, trace.standard_error(change)), integrals

  return density


def _transport(options: ode.Solver, t0: Scalar, t1: Scalar, steps: Steps) -> Callable[..., Sample]:
  """carry(key, x, field, cond, backward) -> Sample: eq. (1)."""
  course = _course(t0, t1)

  def carry(key: Keys, x: State, field: Network, cond: Cond, backward: bool) -> Sample:
    checks.batch("x", x, cond)

    def solve(key: Array, x: Array, cond: dict[str, Array], norm: Callable[[Any], Array]) -> tuple[Any, Array, Status]:
      slope = lambda t, y: _velocity(field, t, cond)(y)
      ends = (course.end, course.start) if backward else (course.start, course.end)
      return ode.solve(slope, x, *ends, course.first_step, options, norm=norm)

    x, nfe, status = solve_batch(solve, steps, keys.per_example(key, len(x)), x, dict(cond))
    return Sample(x, nfe * evaluations(field), None, status)

  return carry


def solve_batch(
  solve: Callable[..., tuple[Any, Array, Status]], steps: Steps, *batch: Any
) -> tuple[Any, Array, Status]:
  """Solve for a batch at once, or for every example alone, as a batch of one.

  Args:
    solve: `(*batch, norm) -> (state, number of evaluations [], status [])`.
    steps: "shared" or "per_example".
    *batch: pytrees of arrays `[b, ...]`.

  Returns:
    (state, number of evaluations `[b]`, status `[b]`).
  """
  if steps == "shared":
    state, *counts = solve(*batch, norm=ode.largest_rms)
    size = len(jax.tree.leaves(batch)[0])
    return state, *jax.tree.map(lambda value: jnp.broadcast_to(value, size), counts)
  alone = jax.tree.map(lambda value: value[:, None], batch)
  state, nfe, status = jax.vmap(lambda *one: solve(*one, norm=ode.rms))(*alone)
  return jax.tree.map(lambda value: value[:, 0], state), nfe, status


def _velocity(field: Network, t: Array, cond: dict[str, Array]) -> Callable[[State], State]:
  return lambda x: checks.score(x, field(x, jnp.broadcast_to(t, len(x)), **cond), "field")


class _Course(NamedTuple):
  start: Array
  end: Array
  first_step: Array


def _course(t0: Scalar, t1: Scalar) -> _Course:
  with jax.ensure_compile_time_eval():
    end = float_time(t1)
    start = float_time(t0).astype(end.dtype)
    if not any(isinstance(time, jax.core.Tracer) for time in (start, end)) and not 0 <= start < end:
      raise ValueError(
        f"t1 must be above t0, and t0 at least 0, got t0 = {t0} and t1 = {t1}: data stand at t0, the base at t1"
      )
    return _Course(start, end, _FIRST_STEP * (end - start))
