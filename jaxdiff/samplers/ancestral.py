"""Ancestral sampling: every step draws from the Gaussian q(x_s | x_t, x_0) at the data prediction D = E[x_0 | x_t].

From (alpha_t, sigma_t) to (alpha_s, sigma_s), s < t, with a = alpha_t / alpha_s,

    x_s = a sigma_s^2 / sigma_t^2 x_t + alpha_s beta / sigma_t^2 D + std z,       beta = sigma_t^2 - a^2 sigma_s^2   (1)

    variance      std^2
    beta          beta                                                                                               (2)
    beta_tilde    beta sigma_s^2 / sigma_t^2                                                                         (3)
    optimal       beta~ + (alpha_s beta / sigma_t^2)^2  mean_c [c sigma_t^2 / (alpha_t^2 c + sigma_t^2)]             (4)
    learned       exp(v log beta + (1 - v) log beta~),  v from the network                                           (5)

and std = 0 in a step that ends at sigma_s = 0. A shift moves the mean of every step, as guidance by a classifier does:

    x_s = mean + shift(mean, std^2, s) + std z,       mean the first two terms of (1).                               (6)

For neighbouring steps of `ddpm.Chain` this is DDPM; for leaps it is
DDPM of the chain with the merged betas; for `ncsn.Chain` it is the ancestral sampler of SMLD,

    x_{i-1} = x_i + (sigma_i^2 - sigma_{i-1}^2) score + sqrt(sigma_{i-1}^2 (sigma_i^2 - sigma_{i-1}^2) / sigma_i^2) z.

References:
  Ho et al. 2020, Denoising Diffusion Probabilistic Models, eq. 7, Section 3.2 and Algorithm 2, for (1) to (3); Bao et
  al. 2022, Analytic-DPM, Theorem 1, for (4); Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models,
  eq. 15 and Section 4, for (5) and leaps; Song et al. 2021, Score-Based Generative Modeling through SDEs, Appendix F;
  Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis, eq. 10, for (6).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key

from jaxdiff import checks, keys, predictions
from jaxdiff.ddpm import remaining_variance
from jaxdiff.losses.chain import Chain
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Intervals, Method, check_grid, intervals
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import State

Variance = Literal["beta", "beta_tilde", "optimal", "learned"]


def ancestral(
  process: Any,
  ts: ArrayLike | Sequence[int] | None = None,
  variance: Variance = "beta_tilde",
  data_variance: ArrayLike | None = None,
  denoise: bool = False,
  path: int = 0,
  shift: Callable[..., State] | None = None,
) -> FixedGrid:
  """Sampler by ancestral steps, eq. (1): DDPM, SMLD, and the same for every process with scalar marginals.

  Args:
    process: a chain, `ddpm.Chain` or `ncsn.Chain`, or a process with scalar marginals.
    ts: for a chain, decreasing integer steps within 0..T, such as `range(1000, -1, -100)`, None for all of them; a
      chain that ends at 0 returns the data. For a process, decreasing times `[steps + 1]` from `jd.time_grid`.
    variance: "beta", exact for data N(0, I) of a process that preserves variance; "beta_tilde", exact for data in one
      point; "optimal", the best one for Gaussian data; "learned", which needs a score of
      `score_fn(..., learned_variance=True)`.
    data_variance: eigenvalues `[k]` of the covariance of the data, or one for all; for "optimal" alone.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation; not for a grid that ends at the data.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.
    shift: None, or what is added to the mean of every step, eq. (6), such as `guidance.mean_shift` makes: a function
      (mean: [b, *d], variance: [b, *d], t_next: [b], **cond) -> [b, *d], also of a learned variance. In a step without
      variance t_next is the time of its start, as there is no noise at its end.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations, and as many of a shift (or
    what its `evaluations(times)` says). The score is that of the process, `chain.sde()` of a chain, and is called at
    `chain.time(step)`. x_T belongs to the first of ts.

  Raises:
    ValueError: for steps or times that do not decrease within the process, none where they are needed, an unknown
      variance, "optimal" without data_variance or the reverse, a denoise or path that does not fit the grid.
    TypeError: for steps that are no integers, a shift that is no function; when called, for "learned" with a score
      that says nothing of it.

  Example:
    >>> import jax, jaxdiff as jd
    >>> chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
    >>> sampler = jd.samplers.ancestral(chain, range(1000, -1, -100), variance="beta")
    >>> x_T = chain.sde().prior_sample(jax.random.key(0), (4, 2))
    >>> sample = jax.jit(sampler)(jax.random.key(1), x_T, jax.tree_util.Partial(lambda x, t: -x))
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [10, 10, 10, 10])
  """
  _check_variance(variance, data_variance)
  _check_shift(shift)
  sde, times, at = _chain_grid(process, ts, denoise) if hasattr(process, "sde") else _sde_grid(process, ts)
  with jax.ensure_compile_time_eval():
    ratio = snr_ratio(at)
    fresh = (1 - ratio) * (1 + ratio)
    of_state, of_data, std = ratio * (at.sigma_next / at.sigma), at.alpha_next * fresh, at.sigma_next * jnp.sqrt(fresh)
    noisy = at.sigma_next > 0
    last, t_shift = noisy[-1], jnp.where(noisy, at.t_next, at.t)
    widen = jnp.where(noisy, jnp.log(at.sigma / jnp.where(noisy, at.sigma_next, at.sigma)), 0.0)
    if variance == "beta":
      std = std * jnp.exp(widen)
    elif data_variance is not None:
      left = remaining_variance(at.alpha, at.sigma, data_variance)
      std = jnp.sqrt(jnp.where(noisy, std**2 + of_data**2 * left, 0.0))

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    t, t_shift, of_state, of_data, std, widen = node
    std = expand(std, x)
    if variance == "learned":
      data, v = field.denoised_and_v(x, t)
      std = std * jnp.exp(v * expand(widen, x))
    else:
      data = field.denoised(x, t)
    mean = expand(of_state, x) * x + expand(of_data, x) * data
    if shift is not None:
      variance_of_step = jnp.broadcast_to(std**2, x.shape)
      mean = mean + checks.score(x, shift(mean, variance_of_step, batch_time(t_shift, x), **field.cond), "shift")
    return mean + std * keys.normal(noise, x.shape, x.dtype), memory

  to_data = not isinstance(last, jax.core.Tracer) and not bool(last)
  others = 0 if shift is None else predictions.evaluations(shift, t_shift)
  method = Method(step, (at.t, t_shift, of_state, of_data, std, widen), at.t, to_data=to_data, others=others)
  return FixedGrid(sde, times, method, denoise, path)


def snr_ratio(at: Intervals) -> Float[Array, " steps"]:
  """r = (alpha_t sigma_s) / (alpha_s sigma_t) in [0, 1): beta = sigma_t^2 (1 - r) (1 + r); 0 where sigma_s is 0."""
  return at.alpha / at.alpha_next * (at.sigma_next / at.sigma)


def _check_variance(variance: Any, data_variance: Any) -> None:
  if variance not in ("beta", "beta_tilde", "optimal", "learned"):
    raise ValueError(f"variance must be 'beta', 'beta_tilde', 'optimal' or 'learned', got {variance!r}")
  if (variance == "optimal") != (data_variance is not None):
    raise ValueError(f"variance='optimal', and no other, needs data_variance; got {variance!r} and {data_variance}")


def _check_shift(shift: Any) -> None:
  checks.made("shift", shift)
  if shift is not None and not callable(shift):
    raise TypeError(f"shift must be a function (mean, variance, t_next, **cond) -> [b, *d], got {type(shift).__name__}")


def _chain_grid(chain: Chain, ts: Any, denoise: bool) -> tuple[ScalarSDE, Array, Intervals]:
  """The process of a chain, the times of the steps in it, and what is known at the steps."""
  checks.made("process", chain, Chain)
  ts = np.arange(chain.steps, -1, -1) if ts is None else ts
  if not isinstance(ts, jax.core.Tracer):
    ts = _checked_steps(ts, chain.steps)
    if denoise and ts[-1] == 0:
      raise ValueError("denoise=True needs noise at the last step, but step 0 is the data: end ts at 1")
  with jax.ensure_compile_time_eval():
    ts = jnp.asarray(ts)
    # The data of `ncsn.Chain`, level 0, lie outside its process; no network is called there.
    times = jnp.maximum(chain.time(ts), 0.0)
    alpha, sigma = chain.marginal(ts)
    return chain.sde(), times, Intervals(times[:-1], times[1:], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])


def _checked_steps(ts: Any, last: int) -> np.ndarray:
  steps = np.asarray(ts)
  if not np.issubdtype(steps.dtype, np.integer):
    raise TypeError(f"ts of a chain must be integer steps, got {steps.dtype}: chain.index(times) gives them of times")
  if steps.ndim != 1 or len(steps) < 2:
    raise ValueError(f"ts must be [steps + 1] decreasing steps of the chain, got shape {steps.shape}")
  if not np.all(steps[1:] < steps[:-1]):
    raise ValueError(f"ts must decrease from the prior's step to the data's, got {steps}")
  if steps[-1] < 0 or steps[0] > last:
    raise ValueError(f"ts must lie in 0..{last}, the steps of the chain; got {steps[0]} to {steps[-1]}")
  return steps


def _sde_grid(sde: ScalarSDE, ts: Any) -> tuple[ScalarSDE, Array, Intervals]:
  checks.made("process", sde, ScalarSDE)
  if ts is None:
    raise ValueError("ts must be given for a process, which has no steps of its own: make it with jaxdiff.time_grid")
  ts = check_grid(jnp.asarray(ts), sde.t1)
  return sde, ts, intervals(sde, ts)
