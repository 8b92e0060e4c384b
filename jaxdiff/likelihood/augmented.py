"""Bounds on the density of positions, where a model has that of positions and velocities together.

The probability flow gives log p(x, v) exactly, not log p(x). With velocities from q(v) = N(0, velocity_std^2 I), those
that the process starts from,

    log p(x)  >=  E log 1/K sum_k p(x, v_k) / q(v_k)  >=  E_q[log p(x, v)] + H(q)                                    (1)

Both are means of log p(x, v) - log q(v) over draws, on the left of the exponential, which needs the exact trace. The
right one loses KL(q(v) || p(v | x)), the left one less and less as K grows.

References:
  Dockhorn, Vahdat & Kreis 2022, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Appendix B,
  for the right one; Burda et al. 2016, Importance Weighted Autoencoders, Theorem 1, for the left.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxdiff import checks, cld, flow, keys, ode, predictions
from jaxdiff import divergence as divergences
from jaxdiff.likelihood import bits
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL
from jaxdiff.sde import reverse
from jaxdiff.typing import NO_COND, Cond, Keys, LogProb, Scalar, ScoreFn, State, Status


class PositionBound(NamedTuple):
  """A lower bound on log p(x) of positions, in expectation over the draws.

  Attributes:
    value: the bound, in nats.
    standard_error: of `value`, over the probes of the trace estimator: 0 for the exact trace, NaN for one probe.
    velocity_error: of `value`, over the draws of velocities, which have probes of their own: so it contains
      `standard_error`. NaN for one draw.
    nfe: network evaluations spent on each example, over all draws.
    status: how the solves went, over all draws.
  """

  value: Float[Array, " b"]
  standard_error: Float[Array, " b"]
  velocity_error: Float[Array, " b"]
  nfe: Int[Array, " b"]
  status: Status


def augmented(
  sde: cld.AugmentedSDE,
  divergence: divergences.Divergence | None = None,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  t0: Scalar | None = None,
  prior_log_prob: Callable[[State], Float[Array, " b"]] | None = None,
  solver: ode.Adaptive = "tsit5",
  max_steps: int = ode.MAX_STEPS,
) -> flow.LogDensity:
  """log p(x, v) - log q(v) at one velocity v drawn from q: its mean is the bound on the right of (1).

  For `position_bound`; for integers, `bits_per_dim` takes it as it takes a log-density, and draws a velocity with every
  dequantization.

  Args:
    sde: a process of positions and velocities.
    divergence: trace estimator of states [b, *d, 2]; None for `divergence.exact()` up to 64 positions (2 d products an
      evaluation), and one probe of `divergence.hutchinson()` above.
    rtol: relative tolerance of a step, as in `log_prob`.
    atol: absolute tolerance of a step.
    t0: where the data stand; None for the time at which the deviation of positions is 1e-3 of the weight of x_0.
    prior_log_prob: log-density at t1, [b, *d, 2] -> [b] in nats; None for `sde.prior_log_prob`.
    solver: "tsit5", "dopri5" or "dopri8".
    max_steps: steps after which an example gives up (status 1).

  Returns:
    fn(key, x0: [b, *d], score, cond={}) -> LogProb of this value in nats, whose `latent` is `[b, *d, 2]`; score is
    (u: [b, *d, 2], t, **cond) -> [b, *d, 2].

  Raises:
    ValueError: for tolerances that are not positive, a t0 outside (0, t1), an unknown name; when called, for x0 without
      an axis of data, a score of another shape than the state.
    TypeError: for a process of another kind; when called, for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.CLD(gamma=1.0)
    >>> log_prob = jd.likelihood.augmented(sde)
    >>> score = jd.cld.score_fn(lambda params, u, t: jnp.zeros_like(u[..., 0]), None, sde)  # that of N(0, I) data
    >>> result = jax.jit(log_prob)(jax.random.key(0), jnp.zeros((1, 2)), score)
    >>> round(float(result.value[0]), 3)  # -log(2 pi): v says nothing of x
    -1.838
  """
  checks.made("sde", sde, cld.AugmentedSDE)
  checks.one_of("solver", solver, ode.Adaptive)
  if divergence is not None:
    checks.made("divergence", divergence, divergences.Divergence)
  options = ode.Solver(solver, rtol, atol, max_steps)
  start = cld.start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)
  base = flow.Base(sde.prior_sample, prior_log_prob or sde.prior_log_prob)

  def evaluate(key: Keys, x0: State, score: ScoreFn, cond: Cond) -> LogProb:
    checks.batch("x0", x0, cond)
    checks.vectors("x0", x0)
    field, _ = reverse(sde, score, eta=0.0)
    joint = flow.log_density(options, base, made.trace(x0), sde.t1, "per_example", flow.plain_rates, start)
    velocity_key, probe_key = keys.split(keys.per_example(key, len(x0)))
    noise, std = keys.normal(velocity_key, x0.shape, x0.dtype), jnp.asarray(sde.velocity_std, x0.dtype)
    result, _ = joint(probe_key, cld.join(x0, std * noise), field, cond)
    log_q = flow.standard_normal().log_prob(noise) - x0[0].size * jnp.log(std)
    return result._replace(value=result.value - log_q, nfe=result.nfe * predictions.evaluations(score))

  made = flow.LogDensity(None, start, divergence, evaluate)
  return made


def position_bound(log_prob: flow.LogDensity, draws: int = 1, importance: bool = False) -> Callable[..., PositionBound]:
  """A lower bound on log p(x) of positions, from a number of velocities.

  Args:
    log_prob: what `augmented` returned.
    draws: how many velocities, K in (1), one after the other.
    importance: the bound of the mean weight, on the left in (1), rather than the mean of the bounds: exact traces only.

  Returns:
    fn(key, x0: [b, *d], score, cond={}) -> PositionBound. Draw k of an example has the example's key folded with k: it
    is the same for any batch and any number of draws.

  Raises:
    ValueError: for draws below 1, importance weights of estimated traces (also when called, where the trace depends on
      the dimension).
    TypeError: for draws that are no integer, `likelihood.augmented` itself.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.CLD(gamma=0.5)
    >>> bound = jd.likelihood.position_bound(jd.likelihood.augmented(sde), draws=4, importance=True)
    >>> score = jd.cld.score_fn(lambda params, u, t: jnp.zeros_like(u[..., 0]), None, sde)  # that of N(0, I) data
    >>> jax.eval_shape(bound, jax.random.key(0), jnp.zeros((1, 2)), score).value.shape
    (1,)
  """
  checks.made("log_prob", log_prob, flow.LogDensity)
  if log_prob.sde is not None:
    raise TypeError("log_prob must be what likelihood.augmented returned, got that of a process without velocities")
  checks.whole("draws", draws, 1)
  if importance and log_prob.divergence is not None:
    bits.check_exact(log_prob.divergence, "likelihood.augmented")

  def fn(key: Keys, x0: State, score: ScoreFn, cond: Cond = NO_COND) -> PositionBound:
    checks.batch("x0", x0, cond)
    if importance:
      bits.check_exact(log_prob.trace(x0), "likelihood.augmented")
    example_key = keys.per_example(key, len(x0))

    def draw(k: Array) -> tuple[Array, Array, Array, Status]:
      result = log_prob(keys.fold_in(example_key, k), x0, score, cond)
      return result.value, result.standard_error, result.nfe, result.status

    log_weights, probe_errors, nfe, status = jax.lax.map(draw, jnp.arange(draws))
    value, error = (bits.log_mean_over_draws if importance else bits.mean_over_draws)(log_weights)
    code, accepted, rejected = status.code, status.accepted, status.rejected
    return PositionBound(
      value,
      jnp.sqrt(jnp.sum(probe_errors**2, axis=0)) / draws,
      error,
      jnp.sum(nfe, axis=0),
      Status(jnp.max(code, axis=0), jnp.sum(accepted, axis=0), jnp.sum(rejected, axis=0)),
    )

  return fn
