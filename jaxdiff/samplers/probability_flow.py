"""Deterministic sampling and encoding: the probability-flow ODE, integrated with adaptive steps.

    dx/dt = f(x, t) - 1/2 g(t)^2 score(x, t)                                                                         (1)

From the prior to the data it samples; from the data to the prior it encodes, and the two are each other's inverse.
Latents between two encodings lie on the arc between them, where a Gaussian prior has its mass:

    z(u) = [sin((1 - u) w) z_0 + sin(u w) z_1] / sin w,    w the angle between z_0 and z_1                           (2)

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 13 and Section 4.3, for (1); Song et al. 2021,
  Denoising Diffusion Implicit Models, Appendix D.5, for (2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, ode, predictions
from jaxdiff.keys import per_example
from jaxdiff.schedules import SAMPLING_NOISE_TO_SIGNAL, float_time, start_time, time_grid
from jaxdiff.sde import ScalarSDE, expand, reverse
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State, Status

_PATH_STEPS = 32
_FIRST_STEP = 1e-2


def probability_flow(
  sde: ScalarSDE,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  t0: Scalar | None = None,
  solver: ode.Adaptive = "tsit5",
  max_steps: int = ode.MAX_STEPS,
  denoise: bool = False,
  path: bool = False,
) -> Callable[..., Sample]:
  """Sampler by the probability-flow ODE, each example with its own step sizes; differentiable in reverse mode.

  Args:
    sde: a process with scalar marginals.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    t0: where to stop; None for the time at which sigma / alpha = 2e-3.
    solver: "tsit5", "dopri5" or "dopri8", of order 8, which pays at tolerances far below 1e-5 and in float64 alone.
    max_steps: steps after which an example gives up (status 1).
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: whether to return the 33 states at the nodes of `time_grid(sde, 32, t0=t0)`, from x_T to the sample.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample. The flow is deterministic: key is not used.

  Raises:
    ValueError: for tolerances that are not positive, another solver, a t0 outside [0, t1); when called, for cond of
      another batch.
    TypeError: for a class given as the process; when called, for an x_T that is no array of floating point numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sampler, score = jax.jit(jd.samplers.probability_flow(sde)), jax.tree_util.Partial(lambda x, t: -x)
    >>> sample = sampler(jax.random.key(1), x_T, score)
    >>> bool(abs(sample.x - x_T).max() < 1e-4)  # N(0, I) is at rest under VP
    True
  """
  checks.made("sde", sde, ScalarSDE)
  checks.one_of("solver", solver, ode.Adaptive)
  end = start_time(sde, t0, SAMPLING_NOISE_TO_SIGNAL)
  nodes = time_grid(sde, _PATH_STEPS, t0=t0) if path else None
  solve = _solve(sde, sde.t1, end, ode.Solver(solver, rtol, atol, max_steps), nodes)

  def sampler(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    sample = solve(key, x_T, score, cond)
    if not denoise:
      return sample
    x = predictions.denoised(sde, score, sample.x, end, **cond)
    states = None if sample.path is None else sample.path.at[-1].set(x)
    return Sample(x, sample.nfe + predictions.evaluations(score), states, sample.status)

  return sampler


def probability_flow_encode(
  sde: ScalarSDE,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  t0: Scalar | None = None,
  solver: ode.Adaptive = "tsit5",
  max_steps: int = ode.MAX_STEPS,
) -> Callable[..., Sample]:
  """Encoder by the probability-flow ODE: the latent that `probability_flow` carries to a given x.

  Args:
    sde: a process with scalar marginals.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    t0: where x is; None for the time at which sigma / alpha = 2e-3, as in `probability_flow`.
    solver: "tsit5", "dopri5" or "dopri8".
    max_steps: steps after which an example gives up (status 1).

  Returns:
    encoder(key, x: [b, *d], score, cond={}) -> Sample, whose x is the latent at `sde.t1`; key is not used.

  Raises:
    ValueError, TypeError: as `probability_flow` does.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde, score, key = jd.VP(), jax.tree_util.Partial(lambda x, t: -x), jax.random.key(0)
    >>> x = jax.random.normal(key, (4, 2))
    >>> latent = jax.jit(jd.samplers.probability_flow_encode(sde))(key, x, score).x
    >>> bool(abs(latent - x).max() < 1e-4)  # N(0, I) is at rest under VP
    True
  """
  checks.made("sde", sde, ScalarSDE)
  checks.one_of("solver", solver, ode.Adaptive)
  start = start_time(sde, t0, SAMPLING_NOISE_TO_SIGNAL)
  return _solve(sde, start, sde.t1, ode.Solver(solver, rtol, atol, max_steps), None)


def _solve(
  sde: ScalarSDE, start: Scalar, end: Scalar, solver: ode.Solver, nodes: Float[Array, " n"] | None
) -> Callable[..., Sample]:
  with jax.ensure_compile_time_eval():
    start, end = float_time(start), float_time(end)
    first_step = _FIRST_STEP * jnp.abs(start - end)

  def solve(key: Keys, x: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x, cond)
    per_example(key, len(x))
    drift, _ = reverse(sde, score, eta=0.0)

    def one(x: Array, cond: dict[str, Array]) -> tuple[Array, Array, Status]:
      batched = {name: value[None] for name, value in cond.items()}
      field = lambda t, y: drift(y[None], t, **batched)[0]
      return ode.solve(field, x, start, end, first_step, solver, nodes)

    out_axes = 0 if nodes is None else 1, 0, 0
    states, nfe, status = jax.vmap(one, out_axes=out_axes)(x, dict(cond))
    nfe = nfe * predictions.evaluations(score)
    return Sample(states, nfe, None, status) if nodes is None else Sample(states[-1], nfe, states, status)

  return solve


def interpolate(
  first: Float[Array, "b *d"], last: Float[Array, "b *d"], fractions: Float[Array, " n"]
) -> Float[Array, "n b *d"]:
  """Latents on the arcs from `first` to `last`, eq. (2): to be carried to data by a deterministic sampler.

  Args:
    first: latents `[b, *d]`, such as encodings.
    last: as many others; opposite latents have no one arc, but random ones are never near that.
    fractions: how far along, `[n]`; 0 gives `first`, 1 gives `last`.

  Returns:
    `[n, b, *d]`.

  Raises:
    ValueError: for latents of different shapes.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> first, last = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 1.0]])
    >>> middle = jd.samplers.interpolate(first, last, jnp.asarray([0.5]))
    >>> [round(float(value), 3) for value in middle.ravel()]
    [0.707, 0.707]
  """
  if first.shape != last.shape:
    raise ValueError(f"first and last must have one shape, got {first.shape} and {last.shape}")
  axes = range(1, first.ndim)

  def norm(z: Array) -> Array:
    square = jnp.sum(z**2, axis=axes)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)

  unit = lambda z: z / expand(jnp.maximum(norm(z), jnp.finfo(z.dtype).tiny), z)
  # 2 atan2(|a - b|, |a + b|) has all its digits for small angles, where arccos of the product has half.
  apart, together = norm(unit(first) - unit(last)), norm(unit(first) + unit(last))
  angle = 2 * jnp.arctan2(apart, together)

  def between(fraction: Array) -> Array:
    share = lambda u: expand(u * jnp.sinc(u * angle / jnp.pi) / jnp.sinc(angle / jnp.pi), first)
    return share(1 - fraction) * first + share(fraction) * last

  return jax.vmap(between)(fractions.astype(first.dtype))
