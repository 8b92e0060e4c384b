"""Langevin dynamics: sampling from a density by its score, at one noise level or through the levels of NCSN.

    Langevin       x <- x + eta / 2 score(x) + sqrt(eta) z                                                      (1)
    MALA           (1) as a proposal x', taken with probability min(1, p(x') q(x | x') / (p(x) q(x' | x)))      (2)
    annealed       (1) at the levels i = N .. 1 of a chain, eta_i = eta sigma_i^2 / sigma_1^2                   (3)
    denoising      x <- x + sigma_1^2 score(x, sigma_1)                                                         (4)

(1) is biased by O(eta): on N(0, s^2) it has the variance s^2 / (1 - eta / (4 s^2)), and none above eta = 4 s^2. (2) is
not biased.

References:
  Roberts & Tweedie 1996, Exponential Convergence of Langevin Distributions, for (1) and (2); Song & Ermon 2019,
  Generative Modeling by Estimating Gradients, Algorithm 1, for (3); Jolicoeur-Martineau et al. 2020, Adversarial
  Score Matching and Improved Sampling for Image Generation, Section 3, for (4).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from jaxdiff import checks, keys, ncsn
from jaxdiff.predictions import log_density_and_score
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_path, report, scan_steps, total_evaluations
from jaxdiff.schedules import float_time
from jaxdiff.sde import batch_time, expand
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State


def _check(step_size: Scalar, steps: int) -> None:
  if not isinstance(step_size, jax.core.Tracer) and not 0 < float(step_size) < float("inf"):
    raise ValueError(f"step_size must be positive, the eta of x + eta / 2 score + sqrt(eta) z; got {step_size}")
  checks.whole("steps", steps, 1, "how many Langevin steps to take")


def _step(field: Field, x: State, memory: Any, node: tuple[Array, Array], noise: Key[Array, " b"]) -> Any:
  t, step_size = node
  eta, z = expand(step_size, x), keys.normal(noise, x.shape, x.dtype)
  return x + 0.5 * eta * field.score(x, t) + jnp.sqrt(eta) * z, memory


def langevin(step_size: Scalar, steps: int, t: Scalar = 0.0, path: int = 0):
  """Sampler by (unadjusted) Langevin dynamics, eq. (1), for the score at one time.

  Args:
    step_size: eta. The bias of the samples is O(eta).
    steps: how many steps to take.
    t: the time that the score is called at; the score of a process needs one with noise, such as its smallest.
    path: 0 for no path, k to return every k-th state from the first to the last; k divides the number of steps.

  Returns:
    sampler(key, x: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations, from the states x. For an
    unnormalized log-density the score is `jd.score_of(log_density)`.

  Raises:
    ValueError: for a step size that is not positive, steps below 1, a path that does not divide them.
    TypeError: for steps or a path that are no integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sampler = jd.samplers.langevin(step_size=0.1, steps=100)
    >>> score = jax.tree_util.Partial(lambda x, t: -x)
    >>> jax.eval_shape(sampler, jax.random.key(0), jnp.zeros((4, 2)), score).x.shape
    (4, 2)
  """
  _check(step_size, steps)
  check_path(path, steps)

  def sampler(key: Keys, x: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x", x, cond)
    checks.made("score", score)
    nodes = jnp.full(steps, float_time(t)), jnp.full(steps, float_time(step_size))
    run = scan_steps(Field(None, score, dict(cond)), Method(_step, nodes, nodes[0]), steps, path, key, x)
    return report(run.x, run.path, run.good, run.good == steps, total_evaluations(score, nodes[0]))

  return sampler


def mala(step_size: Scalar, steps: int, t: Scalar = 0.0):
  """Sampler by the Metropolis-adjusted Langevin algorithm, eq. (2), for an unnormalized log-density.

  A proposal of density 0 (log-density -inf) is refused. A log-density of NaN or +inf makes the example NaN, status 2.

  Args:
    step_size: eta; that at which 0.57 of the proposals are taken is the best in high dimension.
    steps: how many proposals to make.
    t: the time that the log-density is called at.

  Returns:
    sampler(key, x: [b, *d], log_density, cond={}) -> Sample from the states x, with
    `log_density(x, t: [b], **cond) -> [b]`. Its gradient is taken once a state: nfe is `steps + 1`. Each example's
    `status.accepted` and `status.rejected` count the proposals taken and refused.

  Raises:
    ValueError: for a step size that is not positive, steps below 1; when called, for a log-density of another shape.
    TypeError: for steps that are no integer.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sampler = jd.samplers.mala(step_size=0.1, steps=100)
    >>> log_density = jax.tree_util.Partial(lambda x, t: -0.5 * jnp.sum(x**2, axis=1))
    >>> sample = jax.jit(sampler)(jax.random.key(0), jnp.zeros((4, 2)), log_density)
    >>> (sample.status.accepted + sample.status.rejected).tolist()
    [100, 100, 100, 100]

  References:
    Roberts & Rosenthal 1998, Optimal Scaling of Discrete Approximations to Langevin Diffusions, for 0.57.
  """
  _check(step_size, steps)

  def sampler(key: Keys, x: State, log_density: Callable[..., Array], cond: Cond = NO_COND) -> Sample:
    checks.batch("x", x, cond)
    checks.made("log_density", log_density)

    def evaluate(x: State) -> tuple[Array, State]:
      return log_density_and_score(log_density, x, batch_time(t, x), dict(cond))

    eta = expand(float_time(step_size), x)
    method = Method(
      _metropolis(eta),
      jnp.arange(steps),
      jnp.full(steps + 1, float_time(t)),
      lambda x: (*evaluate(x), jnp.zeros(len(x), int)),
    )
    run = scan_steps(evaluate, method, steps, 0, key, x)
    moves = run.memory[2]
    return report(run.x, None, moves, run.good == steps, steps + 1, run.good - moves)

  return sampler


def _metropolis(eta: Array) -> Callable[..., Any]:
  """A step of MALA; its memory: log-density [b] and score [b, *d] of the state, how many proposals were taken [b]."""

  def step(evaluate: Callable[..., Any], x: State, memory: Any, node: Array, noise: Key[Array, " b"]) -> Any:
    value, score, moves = memory
    for_z, for_u = keys.split(noise)
    z = keys.normal(for_z, x.shape, x.dtype)
    proposed = x + 0.5 * eta * score + jnp.sqrt(eta) * z
    value_there, score_there = evaluate(proposed)
    # log q(x | x') - log q(x' | x) with what is common to both densities taken out.
    both = score + score_there
    backwards = jnp.sum(jnp.sqrt(eta) * z * both + 0.25 * eta * both**2, axis=range(1, x.ndim))
    ratio = value_there - value - 0.5 * backwards
    taken = jnp.log(keys.uniform(for_u, (len(x),), x.dtype)) < ratio
    broken = ~((value < jnp.inf) & (value_there < jnp.inf))

    def choose(there: Array, here: Array) -> Array:
      to_axes = lambda mask: mask.reshape(mask.shape + (1,) * (here.ndim - 1))
      return jnp.where(to_axes(broken), jnp.nan, jnp.where(to_axes(taken), there, here))

    moves = jnp.where(taken & ~broken, moves + 1, moves)
    return choose(proposed, x), (choose(value_there, value), choose(score_there, score), moves)

  return step


def annealed_langevin(
  chain: ncsn.Chain, step_size: Scalar, steps: int, denoise: bool = True, path: int = 0
) -> FixedGrid:
  """Sampler by annealed Langevin dynamics, eqs. (3) and (4), from the noisiest level of a chain to its first.

  Args:
    chain: the noise levels.
    step_size: eta at the first level; level i has eta sigma_i^2 / sigma_1^2. Stable for eta below 4 sigma_1^2.
    steps: Langevin steps at each level.
    denoise: whether to end by eq. (4), at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides `N steps`.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `N steps` network evaluations. The score is called at the
    times of `chain.sde()`, for networks that take the number of the level at `chain.index(t)`.

  Raises:
    ValueError: for a step size that is not positive, steps below 1, a path that does not divide `N steps`.
    TypeError: for a chain that is no `ncsn.Chain`, steps or a path that are no integers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> chain = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(10, sigma_min=0.01, sigma_max=1.0))
    >>> sampler = jd.samplers.annealed_langevin(chain, step_size=2e-5, steps=100)
    >>> x_T = chain.sde().prior_sample(jax.random.key(0), (4, 2))
    >>> jax.jit(sampler)(jax.random.key(1), x_T, jax.tree_util.Partial(lambda x, t: -x)).nfe.tolist()
    [1001, 1001, 1001, 1001]
  """
  checks.made("chain", chain)
  if not hasattr(chain, "sigmas"):
    raise TypeError(f"chain must be the noise levels of NCSN, a jaxdiff.ncsn.Chain; got {type(chain).__name__}")
  _check(step_size, steps)
  with jax.ensure_compile_time_eval():
    levels = jnp.repeat(jnp.arange(chain.steps, 0, -1), steps)
    times = chain.time(levels)
    nodes = times, step_size * (chain.marginal(levels)[1] / chain.sigmas[0]) ** 2
    ts = jnp.append(times, times[-1])
  return FixedGrid(chain.sde(), ts, Method(_step, nodes, times), denoise, path)
