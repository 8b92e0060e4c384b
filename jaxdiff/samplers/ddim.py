"""DDIM: the noise that the network sees in x_t is kept, renewed in part, and scaled to the next time.

With D = E[x_0 | x_t], eps = (x_t - alpha_t D) / sigma_t, z ~ N(0, I), from (alpha_t, sigma_t) to (alpha_s, sigma_s),

    x_s = alpha_s D + sqrt(sigma_s^2 - v) eps + sqrt(v) z,      v = eta^2 beta~                                      (1)
        = c x_t + (alpha_s - c alpha_t) D + sqrt(v) z,          c = sqrt(sigma_s^2 - v) / sigma_t                    (2)

with beta~ the variance of q(x_s | x_t, x_0), eq. (3) of `ancestral`. eta = 1 is ancestral sampling with that variance;
eta = 0 is deterministic, a step of order 1 of the probability flow, which can be walked from the data to noise as well:

    x_t = alpha_t / alpha_s x_s + (sigma_t - alpha_t / alpha_s sigma_s) eps(x_s, s)                                  (3)

References:
  Song et al. 2021, Denoising Diffusion Implicit Models, eq. 12 and 16 for (1), Section 4.3 for (3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers.ancestral import snr_ratio
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_grid, check_noise, intervals
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import Scalar, State


def ddim(sde: ScalarSDE, ts: Float[Array, " n"], eta: Scalar = 0.0, denoise: bool = False, path: int = 0) -> FixedGrid:
  """Sampler by DDIM steps, eq. (1).

  Args:
    sde: a process with scalar marginals; `chain.sde()` of a chain, at times `chain.time(steps)`.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`; they may end at sigma = 0.
    eta: amount of noise in [0, 1]: 0 the probability flow, 1 ancestral sampling with variance "beta_tilde".
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations. For eta = 0 key is not used.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], an eta outside [0, 1], a denoise or path that does not
      fit the grid; when called, for cond of another batch.
    TypeError: for a chain or a class given as the process.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = jd.samplers.ddim(sde, jd.time_grid(sde, 50))(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [50, 50, 50, 50])
  """
  checks.made("sde", sde, ScalarSDE)
  _check_eta(eta)
  ts = check_grid(ts, sde.t1)
  noisy = isinstance(eta, jax.core.Tracer) or float(eta) > 0
  at = intervals(sde, ts)
  with jax.ensure_compile_time_eval():
    ratio = snr_ratio(at)
    kept = jnp.where(ratio > 0, (1 - eta**2) + (eta * ratio) ** 2, 1.0)
    of_state = at.sigma_next / at.sigma * jnp.sqrt(kept)
    of_data = at.alpha_next * (1 - ratio * jnp.sqrt(kept))
    std = eta * at.sigma_next * jnp.sqrt((1 - ratio) * (1 + ratio))

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    t, of_state, of_data, std = node
    x_next = expand(of_state, x) * x + expand(of_data, x) * field.denoised(x, t)
    if noisy:
      x_next = x_next + expand(std, x) * keys.normal(noise, x.shape, x.dtype)
    return x_next, memory

  return FixedGrid(sde, ts, Method(step, (ts[:-1], of_state, of_data, std), ts[:-1]), denoise, path)


def ddim_encode(sde: ScalarSDE, ts: Float[Array, " n"], path: int = 0) -> FixedGrid:
  """DDIM walked from the data to noise, eq. (3): `ddim` on the same grid returns to x up to the error of the steps.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]`, those of `ddim`, walked from the last to the first; there is noise at the last.
    path: 0 for no path, k to return every k-th state from x to its encoding; k divides the number of steps.

  Returns:
    encode(key, x: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations: x at ts[-1], the encoding at
    ts[0]. Every step asks for the noise at its cleaner end. key is not used.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1] or ends at sigma = 0, a path that does not divide the
      number of steps; when called, for cond of another batch.
    TypeError: for a chain or a class given as the process.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde, score = jd.VP(), lambda x, t: -x
    >>> ts, key = jd.time_grid(sde, 50), jax.random.key(0)
    >>> x = sde.prior_sample(key, (4, 2))
    >>> latent = jd.samplers.ddim_encode(sde, ts)(key, x, score).x
    >>> bool(abs(jd.samplers.ddim(sde, ts)(key, latent, score).x / x - 1).max() < 0.2)
    True
  """
  checks.made("sde", sde, ScalarSDE)
  ts = check_grid(ts, sde.t1)
  check_noise(sde, ts[-1], "ddim_encode")
  at = intervals(sde, ts)
  with jax.ensure_compile_time_eval():
    # With eps = -sigma_s score, which D would lose where sigma_s is small: x and alpha_s D have the same digits there.
    of_state = at.alpha / at.alpha_next
    of_score = at.sigma_next * at.sigma * (snr_ratio(at) - 1)
    nodes = jax.tree.map(lambda leaf: leaf[::-1], (at.t_next, of_state, of_score))

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    t, of_state, of_score = node
    return expand(of_state, x) * x + expand(of_score, x) * field.score(x, t), memory

  return FixedGrid(sde, ts[::-1], Method(step, nodes, ts[1:]), False, path)


def _check_eta(eta: Any) -> None:
  if not isinstance(eta, jax.core.Tracer) and not 0 <= float(eta) <= 1:
    raise ValueError(f"eta must lie in [0, 1] (0 the probability flow, 1 ancestral sampling), got {eta}")
