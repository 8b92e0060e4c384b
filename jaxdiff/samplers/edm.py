"""The EDM sampler: Heun's method in the noise level itself, with optional churn.

In x / alpha every process is x_0 + s eps at the noise level s = sigma / alpha, and the probability flow is

    d(x / alpha) / ds = (x / alpha - D(x)) / s                                                                       (1)

A step from s to s' < s first raises the noise to s_hat = (1 + gamma) s, with gamma = min(S_churn / steps, sqrt(2) - 1)
for S_tmin <= s <= S_tmax and 0 elsewhere, then takes a step of (1) by Heun's rule:

    y = x / alpha + sqrt(s_hat^2 - s^2) S_noise z,         d = (y - D) / s_hat                                       (2)
    y_e = y + (s' - s_hat) d,                              d' = (y_e - D_e) / s'                                     (3)
    x' / alpha' = y + (s' - s_hat) (d + d') / 2                                                                      (4)

References:
  Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, Algorithm 2; Algorithm 1 and
  eq. 4 for other scalings.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers import exponential
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_grid, check_noise, intervals
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import Scalar, State

_LARGEST_CHURN = math.sqrt(2) - 1


class _Node(NamedTuple):
  """A step: the noise level before and after churn and at its end, with the times and alpha there; arrays `[steps]`."""

  alpha: Array
  t_hat: Array
  alpha_hat: Array
  s_hat: Array
  noise: Array
  t_next: Array
  alpha_next: Array
  s_next: Array


def edm(
  sde: ScalarSDE,
  ts: Float[Array, " n"],
  churn: Scalar = 0.0,
  churn_min: Scalar = 0.0,
  churn_max: Scalar = math.inf,
  noise_scale: Scalar = 1.0,
  order: int = 2,
  denoise: bool = False,
  path: int = 0,
) -> FixedGrid:
  """Sampler by Heun steps of the probability flow in the noise level, stochastic where there is churn.

  A step that would raise the noise above the largest level of the process, that of t1, has no churn.

  A grid that ends at sigma = 0 is taken at order 2 as its authors do: its last step is an Euler step, which gives the
  denoiser's value, and here without churn. It is then no step of the scan: it is what `denoise=True` does on the grid
  without its last time, so `path` divides the number of the other steps and the sample replaces their last state. For a
  process or grid that is being traced it stays a step of the scan, with an evaluation more, and may have churn.

  Args:
    sde: a process with scalar marginals.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`, of kind "karras" in the paper.
    churn: S_churn: the noise added in all steps together, as a multiple of the level, at most sqrt(2) - 1 a step.
    churn_min: S_tmin: the smallest sigma / alpha with churn.
    churn_max: S_tmax: the largest.
    noise_scale: S_noise: the standard deviation of the added noise; above 1 to make up for lost detail.
    order: 2 for Heun's method, 1 for Euler's.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `order * steps` network evaluations; `2 * steps - 1` at
    order 2 where the grid ends at sigma = 0.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], an order above 2, a negative churn or noise scale, a
      path that does not divide the number of steps; when called, for cond of another batch.
    TypeError: for a process without scalar marginals; when called, for an x_T that is no array of floating point
      numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.EDM(sigma_max=80.0)
    >>> sampler = jd.samplers.edm(sde, jd.time_grid(sde, 18, kind="karras", t0=0.002), churn=10.0)
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> score = jax.tree_util.Partial(lambda x, t: -x / (1 + t[:, None] ** 2))
    >>> sample = jax.jit(sampler)(jax.random.key(1), x_T, score)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [36, 36, 36, 36])
  """
  checks.made("sde", sde, ScalarSDE)
  ts = check_grid(ts, sde.t1)
  exponential.check_order(order, 2)
  for name, value in (("churn", churn), ("noise_scale", noise_scale)):
    if not isinstance(value, jax.core.Tracer) and not float(value) >= 0:
      raise ValueError(f"{name} must be at least 0, got {value}")
  steps = len(ts) - 1
  if denoise:
    check_noise(sde, ts[-1], "denoise=True")
  elif order == 2 and _ends_silent(sde, ts):
    ts, denoise, order = (ts[:-1], True, 2) if steps > 1 else (ts, False, 1)
  with jax.ensure_compile_time_eval():
    nodes = _nodes(sde, ts, churn / steps, churn_min, churn_max, noise_scale)
    calls = jnp.concatenate([nodes.t_hat, nodes.t_next][:order])
  noisy = isinstance(churn, jax.core.Tracer) or churn != 0

  def step(field: Field, x: State, memory: Any, node: _Node, noise: Key[Array, " b"]) -> Any:
    alpha, _t_hat, alpha_hat, s_hat, scale, _t_next, alpha_next, s_next = (expand(value, x) for value in node)
    y = x / alpha
    if noisy:
      y = y + scale * keys.normal(noise, x.shape, x.dtype)
    d = (y - field.denoised(alpha_hat * y, node.t_hat)) / s_hat
    y_next = y + (s_next - s_hat) * d
    if order == 2:
      there = (y_next - field.denoised(alpha_next * y_next, node.t_next)) / jnp.where(s_next > 0, s_next, 1.0)
      d_next = jnp.where(s_next > 0, there, d)
      y_next = y + (s_next - s_hat) * (0.5 * (d + d_next))
    return alpha_next * y_next, memory

  return FixedGrid(sde, ts, Method(step, nodes, calls), denoise, path)


def _ends_silent(sde: ScalarSDE, ts: Array) -> bool:
  """Whether sigma is 0 at the last time; False where that is not known yet."""
  with jax.ensure_compile_time_eval():
    silent = sde.marginal(ts[-1])[1] <= 0
  return not isinstance(silent, jax.core.Tracer) and bool(silent)


def _nodes(
  sde: ScalarSDE, ts: Array, churn: Scalar, churn_min: Scalar, churn_max: Scalar, noise_scale: Scalar
) -> _Node:
  """The steps over these times, each with this much churn where it may have any."""
  ends = intervals(sde, ts)
  s, s_next = ends.sigma / ends.alpha, ends.sigma_next / ends.alpha_next
  alpha_most, sigma_most = sde.marginal(jnp.asarray(sde.t1, ts.dtype))
  raised = s * (1 + jnp.minimum(churn, _LARGEST_CHURN))
  churned = (s >= churn_min) & (s <= churn_max) & (raised > s) & (raised <= sigma_most / alpha_most)
  t_hat = jnp.where(churned, sde.time_of_log_snr(-2 * jnp.log(raised)), ends.t)
  alpha_hat, sigma_hat = sde.marginal(t_hat)
  s_hat = sigma_hat / alpha_hat
  churned &= s_hat > s  # rounding may lose a tiny churn
  added = jnp.where(churned, (s_hat - s) * (s_hat + s), 0.0)
  t_next = jnp.where(s_next > 0, ends.t_next, t_hat)  # what is found where no noise is left is not used
  return _Node(ends.alpha, t_hat, alpha_hat, s_hat, noise_scale * jnp.sqrt(added), t_next, ends.alpha_next, s_next)
