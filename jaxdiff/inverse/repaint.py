"""RePaint: projection with resampling: the state goes back up in time, and down again, so that all of it agrees.

At every `jump`-th time of the grid, counted from the data, the state is noised back by `jump` steps,

    x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) z,      a = alpha_t / alpha_s                                      (1)

and comes down by projected steps again, `resamplings - 1` times. One leap (1) has the law of `jump` forward steps. The
known values of one such round are drawn from q(x_s | y) with new noise, while the unknown ones have heard of y; with
more rounds the pair comes closer to its joint law, which one pass of `projected` misses: the second value of its
example becomes N(0.765 y, 0.36) in 250 steps with 10 resamplings and jumps of 10, where N(0.8 y, 0.36) is right. It
takes steps + (resamplings - 1) jump floor(steps / jump) network evaluations. With noise, stretches below its level are
walked once: nothing is projected there, and a round that does not hear of y forgets it.

References:
  Lugmayr et al. 2022, RePaint: Inpainting using Denoising Diffusion Probabilistic Models, eq. 8, Algorithm 1 and
  Appendix B (the schedule of jumps; there the first `jump` steps are never repeated, here they are where they fit).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff import checks
from jaxdiff.inverse.operators import Operator, measured
from jaxdiff.inverse.projection import (
  Projection,
  check_noise,
  check_sampler,
  ends_noisy,
  marginals,
  noise_level,
  noise_of,
)
from jaxdiff.samplers.fixed_grid import FixedGrid, replace_last
from jaxdiff.sde import expand
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State

# Data folded into a step's key, beside that of a predictor-corrector's corrector.
_KNOWN, _LEAP = 2**31 - 2, 2**31 - 3


def repaint(
  sampler: FixedGrid, operator: Operator, resamplings: int = 10, jump: int = 10, noise_std: Scalar = 0.0
) -> Any:
  """Sampler by projected steps of another one, each stretch of the grid walked several times.

  Args:
    sampler: on a grid, of one network evaluation a step, which asks for one state alone; the paper has
      `samplers.ancestral` with 250 steps. If its grid ends with noise, the sample is denoised at one more evaluation.
    operator: A, such as `jd.inverse.mask()`.
    resamplings: how often each stretch is walked; 1 is `projected`.
    jump: steps of the grid in a stretch.
    noise_std: standard deviation of the measurement's noise.

  Returns:
    sampler(key, x_T: [b, *d], score, cond) -> Sample as that of `projected`; a path counts the steps down.

  Raises:
    ValueError: as `projected`; for resamplings or a jump below 1, a jump longer than the grid, a sampler with several
      evaluations a step.
    TypeError: for a sampler that is not on a grid, resamplings or a jump that are no integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> base = jd.samplers.ancestral(sde, jd.time_grid(sde, 20))
    >>> sampler = jd.inverse.repaint(base, jd.inverse.mask(jnp.asarray([1, 0])), resamplings=3, jump=5)
    >>> cond = {"measurement": jnp.asarray([[0.5, jnp.nan]])}
    >>> sampler(jax.random.key(0), jnp.ones((1, 2)), lambda x, t: -x, cond).nfe.tolist()
    [61]
  """
  check_sampler(sampler)
  check_noise(operator, noise_std)
  sde, ts, method = sampler.sde, sampler.ts, sampler.method
  steps = len(ts) - 1
  if len(method.calls) != steps:
    raise ValueError(f"sampler must take one network evaluation a step, this one takes {len(method.calls)} in {steps}")
  alpha, sigma = marginals(sampler)
  start, leap = moves(steps, resamplings, jump, _last_projected(operator, noise_std, alpha, sigma))
  with jax.ensure_compile_time_eval():
    arrived, goes_on = start + 1, start + 1 - leap
    keep = alpha[goes_on] / alpha[arrived]
    renewed = jnp.sqrt(jnp.maximum(sigma[goes_on] ** 2 - (keep * sigma[arrived]) ** 2, 0.0))
    nodes = jax.tree.map(lambda leaf: leaf[start], method.nodes), alpha[arrived], sigma[arrived], keep, renewed
    calls, times = method.calls[start], jnp.append(ts[:1], ts[goes_on])

  def run(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    y, own, told = measured(operator, x_T, cond)
    project = Projection(operator, noise_std, y, own)

    def step(field: Any, x: State, memory: Any, node: Any, noise: Array) -> Any:
      interval, alpha, sigma, keep, renewed = node
      x, memory = method.step(field, x, memory, interval, noise)
      x = project(x, noise_of(noise, _KNOWN, x), alpha, sigma)
      return expand(keep, x) * x + expand(renewed, x) * noise_of(noise, _LEAP, x), memory

    moves = method._replace(step=step, nodes=nodes, calls=calls)
    sample = FixedGrid(sde, times, moves, ends_noisy(sampler), sampler.path)(key, x_T, score, told)
    return replace_last(sample, project.at_data(sample.x), 0)

  return run


def _last_projected(operator: Operator, noise_std: Scalar, alpha: Array, sigma: Array) -> int:
  """Index of the last time at which a measurement with noise still replaces anything."""
  if not isinstance(noise_std, jax.core.Tracer) and noise_std == 0:
    return len(sigma) - 1
  with jax.ensure_compile_time_eval():
    room = sigma - alpha * noise_level(operator, noise_std)
  if isinstance(room, jax.core.Tracer):
    raise ValueError("noise_std, and with noise the grid, must be known outside jit: the schedule depends on them")
  return int(np.sum(np.asarray(room) >= 0)) - 1


def moves(steps: int, resamplings: int, jump: int, last: int) -> tuple[np.ndarray, np.ndarray]:
  """Of every step down: the index of the time it starts from, and how many times the state then leaps back.

  A stretch is walked once where it has no projection, that is where it begins at index `last` or after it.
  """
  checks.whole("resamplings", resamplings, 1, "how often each stretch of the grid is walked")
  checks.whole("jump", jump, 1, "the steps of a stretch")
  if jump > steps:
    raise ValueError(f"jump must not be longer than the grid of {steps} steps, got {jump}")
  left = {k: resamplings - 1 for k in range(steps, jump - 1, -jump) if k - jump < last}
  start, leap, at = [], [], 0
  while at < steps:
    start.append(at)
    at += 1
    again = left.get(at, 0) > 0
    leap.append(jump if again else 0)
    if again:
      left[at] -= 1
      at -= jump
  return np.asarray(start), np.asarray(leap)
