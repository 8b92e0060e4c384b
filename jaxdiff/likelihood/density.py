"""The exact log-density of a diffusion model.

The probability flow carries data at t0 to the prior at t1, and the density with it (instantaneous change of variables):

    log p(x) = log prior(x_{t1}) + int_{t0}^{t1} div f~(x_t, t) dt,      f~ = f - 1/2 g^2 score

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 39 and Appendix D.2; Chen et al. 2018, Neural
  Ordinary Differential Equations, Theorem 1.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, flow, keys, ode, predictions
from jaxdiff import divergence as divergences
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, float_time, start_time
from jaxdiff.sde import ScalarSDE, log_snr, reverse
from jaxdiff.typing import Cond, Keys, LogProb, Scalar, ScoreFn, State

Variable = Literal["time", "log_snr"]

_FIRST_NOISE_TO_SIGNAL = 0.05
_FIRST_LOG_SNR_STEP = 0.02  # of the whole range
_ROUNDING = 8  # units in the last place


def log_prob(
  sde: ScalarSDE,
  divergence: divergences.Divergence | None = None,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  t0: Scalar | None = None,
  prior_log_prob: Callable[[State], Float[Array, " b"]] | None = None,
  solver: ode.Adaptive = "tsit5",
  max_steps: int = ode.MAX_STEPS,
  variable: Variable = "log_snr",
  steps: flow.Steps = "per_example",
  adjoint: ode.Adjoint = "checkpoint",
) -> flow.LogDensity:
  """Log-density under the probability flow.

  Args:
    sde: a process with scalar marginals.
    divergence: trace estimator; None for `divergence.exact()` (d products) up to 64 dimensions, and one probe of
      `divergence.hutchinson()` above.
    rtol: relative tolerance of a step, on the state and its log-density together. The errors of all steps add up: log p
      is off by tens to hundreds of times the tolerances, so 1e-3 is for a first look.
    atol: absolute tolerance of a step.
    t0: where the data stand; None for the time at which sigma / alpha = 1e-3.
    prior_log_prob: log-density at t1, [b, *d] -> [b] in nats; None for `sde.prior_log_prob`.
    solver: "tsit5", "dopri5" or "dopri8".
    max_steps: steps after which an example gives up (status 1).
    variable: what is integrated over: "log_snr", or "time", which takes fewer evaluations where data are smooth on all
      scales and more where they are thin, as images are.
    steps: "per_example": each example has step sizes of its own; "shared": one for all, such that every example keeps
      the tolerances, results depend on batch mates, and one that fails fails all.
    adjoint: how gradients flow back, "checkpoint", "continuous" or "direct": see `ode.Solver` and `flow.cnf`.

  Returns:
    fn(key, x0: [b, *d], score, cond={}) -> LogProb, values in nats. Probes are drawn once a solve, from example keys.

  Raises:
    ValueError: for tolerances that are not positive, a t0 outside [0, t1) or an unknown name; when called, for x0
      without an axis of data, or a score of another shape than x0.
    TypeError: for a factory given where what it makes is due; when called, for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> log_prob = jd.likelihood.log_prob(jd.VP())
    >>> score = jax.tree_util.Partial(lambda x, t: -x)  # of N(0, I)
    >>> result = jax.jit(log_prob)(jax.random.key(0), jnp.zeros((1, 2)), score)
    >>> round(float(result.value[0]), 3)  # -log(2 pi)
    -1.838
  """
  checks.made("sde", sde, ScalarSDE)
  if divergence is not None:
    checks.made("divergence", divergence, divergences.Divergence)
  checks.one_of("solver", solver, ode.Adaptive)
  checks.one_of("variable", variable, Variable)
  checks.one_of("steps", steps, flow.Steps)
  options = ode.Solver(solver, rtol, atol, max_steps, adjoint=adjoint)
  start = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)
  course = _course(sde, start, variable)
  growth = _growth(sde, start)

  def evaluate(key: Keys, x0: State, score: ScoreFn, cond: Cond) -> LogProb:
    if jnp.issubdtype(getattr(x0, "dtype", float), jnp.integer):
      raise TypeError(f"x0 must be floating point, got {x0.dtype}: for integer data use likelihood.bits_per_dim")
    checks.batch("x0", x0, cond)
    _warn_of_rounding(options, x0.dtype)
    checks.vectors("x0", x0)
    drift, _ = reverse(sde, score, eta=0.0)
    jax.eval_shape(lambda x: drift(x, start, **cond), x0)  # refuses a score of another shape than the whole batch has
    trace = made.trace(x0)

    def solve(key: Array, x: Array, cond: dict[str, Array], norm: Callable[[Any], Array]) -> tuple[Any, ...]:
      probes = trace.draw(key, x)

      def field(u: Array, y: tuple[Array, Array]) -> tuple[Array, Array]:
        t, rate = course.time(u)
        velocity = lambda x: drift(x, t, **cond)
        return jax.tree.map(
          lambda v: rate.astype(v.dtype) * v, trace.estimate(velocity, y[0], probes, _identity(sde, t))
        )

      estimates = jax.eval_shape(lambda x: trace.estimate(lambda x: drift(x, start, **cond), x, probes, start)[1], x)
      y0 = x, jnp.zeros(estimates.shape, estimates.dtype)
      (z, change), *counts = ode.solve(field, y0, course.start, course.end, course.first_step, options, norm=norm)
      return (z, change - trace.correction(probes, growth)), *counts

    key = keys.per_example(key, len(x0))
    (z, change), nfe, status = flow.solve_batch(solve, steps, key, x0, dict(cond))
    value = (prior_log_prob or sde.prior_log_prob)(z) + jnp.mean(change, axis=1)
    nfe = nfe * predictions.evaluations(score)
    return LogProb(value, z, nfe, status, trace.standard_error(change))

  made = flow.LogDensity(sde, start, divergence, evaluate)
  return made


def _warn_of_rounding(options: ode.Solver, dtype: Any) -> None:
  least = _ROUNDING * float(jnp.finfo(dtype).eps)
  if max(options.rtol, options.atol) < least:
    warnings.warn(
      f"rtol = {options.rtol:g} and atol = {options.atol:g} are below what {dtype} delivers, about {least:.0e}: more "
      "evaluations, and no more digits. Loosen one of them, or evaluate in float64 (jax_enable_x64, and x0 in float64; "
      "on the command line --dtype=float64)",
      stacklevel=4,
    )


@dataclasses.dataclass(frozen=True)
class _Course:
  """From t0 to t1 in some variable u: its ends, the first step to try, and `time(u) = (t, dt/du)`."""

  start: Array
  end: Array
  first_step: Array
  time: Callable[[Array], tuple[Array, Array]]


def _course(sde: ScalarSDE, start: Array, variable: Variable) -> _Course:
  with jax.ensure_compile_time_eval():
    end = float_time(sde.t1)
    if variable == "time":
      first = jnp.clip(sde.time_of_log_snr(-2 * math.log(_FIRST_NOISE_TO_SIGNAL)) - start, 0.0, end - start)
      return _Course(start, end, first, lambda t: (t, jnp.ones_like(t)))
    high, low = log_snr(sde, start), log_snr(sde, end)
    if not isinstance(low, jax.core.Tracer) and not jnp.isfinite(low - high):
      raise ValueError(
        f"variable = 'log_snr' needs finite log-SNRs, got {high} at t0 and {low} at t1 of {sde}: take "
        "variable='time', or float64"
      )

  def time(u: Array) -> tuple[Array, Array]:
    t = sde.time_of_log_snr(u)
    # The value alone: the derivative at fixed u, which the continuous adjoint integrates, jumps nowhere.
    t = t + jax.lax.stop_gradient(jnp.clip(t, start, end) - t)
    _, slope = jax.jvp(lambda t: log_snr(sde, t), (t,), (jnp.ones_like(t),))
    return t, 1 / slope

  return _Course(high, low, _FIRST_LOG_SNR_STEP * (high - low), time)


def _growth(sde: ScalarSDE, start: Array) -> Callable[[Array], Array]:
  """How many times wider the flow makes Gaussian data of given variances, as logarithms."""
  with jax.ensure_compile_time_eval():
    (alpha0, sigma0), (alpha1, sigma1) = sde.marginal(start), sde.marginal(float_time(sde.t1))

  def growth(variance: Float[Array, " k"]) -> Float[Array, " k"]:
    ends = jnp.stack([alpha1, sigma1, alpha0, sigma0]).astype(variance.dtype) ** 2
    return 0.5 * jnp.log((ends[0] * variance + ends[1]) / (ends[2] * variance + ends[3]))

  return growth


def _identity(sde: ScalarSDE, t: Array) -> Array:
  """What of the flow's Jacobian is a multiple of I: that of f, and of -x in score = (alpha E[x_0|x] - x) / sigma^2."""
  _, sigma = sde.marginal(t)
  return sde.drift(jnp.ones((1, 1), sigma.dtype), t)[0, 0] + 0.5 * (sde.diffusion(t) / sigma) ** 2
