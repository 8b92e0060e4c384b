"""Stochastic sampling: the reverse SDE on a fixed grid of times.

For a step from t to s = t - h with b(x, t) = (1 + eta^2) / 2 g^2 score - f, noises z ~ N(0, I):

    Euler-Maruyama       x_s = x + h b(x, t) + eta sqrt(h) g(t) z                                          order 1  (1)
    reverse diffusion    x_s = (2 - a) x + (1 + eta^2) / 2 G^2 score(x, t) + eta G z                       order 1  (2)
                         with the forward step exact: a = alpha_t / alpha_s, G^2 = sigma_t^2 - a^2 sigma_s^2
    stochastic Heun      x' = x + h b(x, t) + n,    x_s = x + h / 2 (b(x, t) + b(x', s)) + n               order 2  (3)
                         with n = eta sqrt(h m) z, m the mean of g^2 over [s, t]

The orders are weak ones, those of mean and variance. Noise of variance h g(t)^2 in (3) would make its order 1.

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 6 and Section 4.1 for (1), Appendix E for (2);
  Kloeden & Platen 1992, Numerical Solution of Stochastic Differential Equations, Section 15.1, for (3).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_grid, check_noise, intervals
from jaxdiff.sde import SDE, ScalarSDE, check_eta, expand, reverse
from jaxdiff.typing import Scalar, State

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)


def reverse_sde(sde: SDE, ts: Float[Array, " n"], eta: Scalar = 1.0, denoise: bool = False, path: int = 0) -> FixedGrid:
  """Sampler by Euler-Maruyama steps of the reverse SDE.

  Args:
    sde: any forward process.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    eta: amount of noise: 1 the reverse SDE, 0 Euler steps of the probability flow.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations. Example k takes its noise from
    its own key: the same for any batch.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], a negative eta, a path that does not divide the number
      of steps; when called, for cond of another batch.
    TypeError: for a class given as the process; when called, for an x_T that is no array of floating point numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 100))
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = sampler(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [100, 100, 100, 100])
  """
  checks.made("sde", sde, SDE)
  check_eta(eta)
  ts = check_grid(ts, sde.t1)

  def step(field: Field, x: State, memory: Any, node: tuple[Array, Array], noise: Key[Array, " b"]) -> Any:
    t, h = node
    drift, diffuse = reverse(sde, field.score, eta)
    h = expand(h, x)
    return x - h * drift(x, t) + jnp.sqrt(h) * diffuse(t, keys.normal(noise, x.shape, x.dtype)), memory

  return FixedGrid(sde, ts, Method(step, (ts[:-1], ts[:-1] - ts[1:]), ts[:-1]), denoise, path)


def reverse_diffusion(
  sde: ScalarSDE, ts: Float[Array, " n"], eta: Scalar = 1.0, denoise: bool = False, path: int = 0
) -> FixedGrid:
  """Sampler by reverse-diffusion steps, eq. (2): those of `reverse_sde` with the forward process exact over a step.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    eta: amount of noise: 1 the reverse SDE, 0 the probability flow.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations.

  Raises:
    ValueError, TypeError: as `reverse_sde`, and for a process without scalar marginals.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VE(sigma_max=10.0)
    >>> sampler = jd.samplers.reverse_diffusion(sde, jd.time_grid(sde, 100))
    >>> sample = sampler(jax.random.key(1), sde.prior_sample(jax.random.key(0), (4, 2)), lambda x, t: -x)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [100, 100, 100, 100])
  """
  checks.made("sde", sde, ScalarSDE)
  check_eta(eta)
  ts = check_grid(ts, sde.t1)
  grid = intervals(sde, ts)
  with jax.ensure_compile_time_eval():
    ratio = grid.alpha / grid.alpha_next
    kept = ratio * grid.sigma_next
    variance = (grid.sigma - kept) * (grid.sigma + kept)
    nodes = grid.t, 2 - ratio, 0.5 * (1 + eta**2) * variance, eta * jnp.sqrt(variance)

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    keep, push, spread = (expand(value, x) for value in node[1:])
    return keep * x + push * field.score(x, node[0]) + spread * keys.normal(noise, x.shape, x.dtype), memory

  return FixedGrid(sde, ts, Method(step, nodes, ts[:-1]), denoise, path)


def stochastic_heun(
  sde: ScalarSDE, ts: Float[Array, " n"], eta: Scalar = 1.0, denoise: bool = False, path: int = 0
) -> FixedGrid:
  """Sampler by Heun steps of the reverse SDE, eq. (3), of weak order 2.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`; the score is called at the last, so sigma is not 0 there.
    eta: amount of noise: 1 the reverse SDE, 0 Heun steps of the probability flow in t.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `2 steps` network evaluations.

  Raises:
    ValueError, TypeError: as `reverse_sde`; for a process without scalar marginals, a grid that ends without noise.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.stochastic_heun(sde, jd.time_grid(sde, 50))
    >>> sample = sampler(jax.random.key(1), sde.prior_sample(jax.random.key(0), (4, 2)), lambda x, t: -x)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [100, 100, 100, 100])
  """
  checks.made("sde", sde, ScalarSDE)
  check_eta(eta)
  ts = check_grid(ts, sde.t1)
  check_noise(sde, ts[-1], "stochastic_heun")
  with jax.ensure_compile_time_eval():
    h = ts[:-1] - ts[1:]
    pull = -sde.drift(jnp.ones((len(ts), 1), ts.dtype), ts)[:, 0]
    push = 0.5 * (1 + eta**2) * sde.diffusion(ts) ** 2
    spread = eta * jnp.sqrt(h * _mean_of_squared_diffusion(sde, ts))
    nodes = ts[:-1], ts[1:], h, pull[:-1], push[:-1], pull[1:], push[1:], spread

  def step(field: Field, x: State, memory: Any, node: tuple[Array, ...], noise: Key[Array, " b"]) -> Any:
    h, pull, push, pull_next, push_next, spread = (expand(value, x) for value in node[2:])
    jump = spread * keys.normal(noise, x.shape, x.dtype)
    slope = pull * x + push * field.score(x, node[0])
    guess = x + h * slope + jump
    slope_next = pull_next * guess + push_next * field.score(guess, node[1])
    return x + 0.5 * h * (slope + slope_next) + jump, memory

  return FixedGrid(sde, ts, Method(step, nodes, jnp.concatenate([ts[:-1], ts[1:]])), denoise, path)


def _mean_of_squared_diffusion(sde: ScalarSDE, ts: Float[Array, " n"]) -> Float[Array, " steps"]:
  """The mean of g^2 over every interval of the grid, by Gauss's rule of order 10."""
  fraction, weight = (jnp.asarray(0.5 * value, ts.dtype) for value in (1 + _NODES, _WEIGHTS))
  times = ts[None, 1:] + fraction[:, None] * (ts[:-1] - ts[1:])[None]
  return weight @ sde.diffusion(times.reshape(-1)).reshape(times.shape) ** 2
