"""The discrete chain of DDPM: T steps that carry data at t = 0 to noise at t = T, and its continuous process.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),      t = 1 .. T                                        (1)
    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),   alpha_t^2 = prod_{s<=t} (1 - beta_s),  sigma_t^2 = 1 - alpha_t^2   (2)
    q(x_{t-1} | x_t, x_0) = N(alpha_{t-1} beta_t / sigma_t^2 x_0
                              + sqrt(1 - beta_t) sigma_{t-1}^2 / sigma_t^2 x_t,   beta~_t I)                         (3)
    beta~_t = beta_t sigma_{t-1}^2 / sigma_t^2                                                                       (4)
    E[x_{t-1} | x_t, eps] = (x_t - beta_t / sigma_t eps) / sqrt(1 - beta_t)                                          (5)

alpha_t^2 is the alpha-bar of the paper; here alpha and sigma mean the same as for every process of jaxdiff.

References:
  Ho et al. 2020, Denoising Diffusion Probabilistic Models, eq. 2, 4, 6, 7 and 11 for (1) to (5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxdiff import checks, keys
from jaxdiff.schedules import float_time, piecewise_linear, table_entry
from jaxdiff.sde import VP, expand
from jaxdiff.typing import Keys, State, Step, Time

Coefficient = Float[Array, "..."]


def linear_betas(steps: int = 1000, first: float | None = None, last: float | None = None) -> Float[Array, " {steps}"]:
  """beta evenly spaced from `first` to `last`.

  By default 0.1 / steps and 20 / steps: the paper's 1e-4 and 0.02 for 1000 steps, and as much noise in all for others.
  Fewer than 21 steps need values of their own.

  Raises:
    ValueError: for steps below 1.
    TypeError: for steps that are no integer.

  References:
    Ho et al. 2020, Section 4.
  """
  checks.whole("steps", steps, 1)
  first, last = 0.1 / steps if first is None else first, 20 / steps if last is None else last
  return jnp.asarray(np.linspace(first, last, steps), jnp.result_type(float))


def cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> Float[Array, " {steps}"]:
  """1 - f(t) / f(t - 1), f(t) = cos(pi / 2 (t / T + offset) / (1 + offset))^2, not above `largest`.

  Raises:
    ValueError: for steps below 1.

  References:
    Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, eq. 17.
  """
  checks.whole("steps", steps, 1)
  angle = 0.5 * np.pi * (np.arange(steps + 1) / steps + offset) / (1 + offset)
  betas = 1 - (np.cos(angle[1:]) / np.cos(angle[:-1])) ** 2
  return jnp.asarray(np.minimum(betas, largest), jnp.result_type(float))


def vp_betas(steps: int, beta_min: float = 0.1, beta_max: float = 20.0) -> Float[Array, " {steps}"]:
  """1 - exp(B(t - 1 / T) - B(t)) at t = 1 / T .. 1, B the integral of VP's linear beta: VP in T steps, T = 1 too.

  The chain has the marginals of `VP(beta_min, beta_max)` at the times of its steps, so that one process can be walked
  in any number of them. With the last beta near 1 few digits of 1 - beta are left in float32: for T = 1 alpha_T is good
  to 1e-3 of itself.

  Args:
    steps: T.
    beta_min: beta at t = 0, per unit of time, at least 0.
    beta_max: beta at t = 1, not below beta_min.

  Raises:
    ValueError: for steps below 1, or betas that are negative or fall.
    TypeError: for steps that are no integer.

  Example:
    >>> import jaxdiff as jd
    >>> chain = jd.ddpm.Chain(jd.ddpm.vp_betas(4))
    >>> [round(float(process.marginal(t)[0]), 5) for process, t in ((chain, 2), (jd.VP(), 0.5))]
    [0.28118, 0.28118]

  References:
    Song et al. 2021, Score-Based Generative Modeling through SDEs, Appendix C; Xiao et al. 2022, Tackling the
    Generative Learning Trilemma with Denoising Diffusion GANs, for a few steps of it.
  """
  checks.whole("steps", steps, 1)
  if not 0 <= beta_min <= beta_max:
    raise ValueError(f"beta_min and beta_max must satisfy 0 <= beta_min <= beta_max, got {beta_min} and {beta_max}")
  t = np.arange(steps + 1) / steps
  integral = t * (beta_min + 0.5 * t * (beta_max - beta_min))
  return jnp.asarray(-np.expm1(-np.diff(integral)), jnp.result_type(float))


def remaining_variance(alpha: Coefficient, sigma: Coefficient, data_variance: ArrayLike) -> Coefficient:
  """mean_c [ c sigma^2 / (alpha^2 c + sigma^2) ]: the variance that x_0 still has when x_t is known, for Gaussian data.

  Args:
    alpha: of any shape.
    sigma: of the same shape.
    data_variance: eigenvalues c `[k]` of the covariance of the data, or one for all.

  Returns:
    The mean over the coordinates, of the shape of alpha.

  Raises:
    ValueError: for negative eigenvalues, or more than one axis.
  """
  eigenvalues = jnp.atleast_1d(jnp.asarray(data_variance, sigma.dtype))
  if eigenvalues.ndim > 1:
    raise ValueError(f"data_variance must be a number or eigenvalues [k], got the shape {eigenvalues.shape}")
  if not isinstance(eigenvalues, jax.core.Tracer) and np.any(np.asarray(eigenvalues) < 0):
    raise ValueError(f"data_variance must not be negative, got {data_variance}")
  c = eigenvalues.reshape((1,) * alpha.ndim + (-1,))
  return jnp.mean(c * sigma[..., None] ** 2 / (alpha[..., None] ** 2 * c + sigma[..., None] ** 2), axis=-1)


def _check_betas(betas: np.ndarray) -> None:
  if betas.ndim != 1 or betas.size < 1:
    raise ValueError(f"betas must have the shape [T] with T >= 1, got {betas.shape}")
  if not np.all((betas > 0) & (betas < 1)):
    raise ValueError(f"betas must lie between 0 and 1, got values from {betas.min()} to {betas.max()}")
  if np.any(np.diff(betas) < 0):
    raise ValueError(
      f"betas must not decrease: betas[0] = {betas[0]} is the step next to the data, betas[-1] = {betas[-1]} the one "
      "next to the noise. If the array runs from noise to data, pass betas[::-1]"
    )


@checks.pytree
@dataclass(frozen=True, eq=False, init=False)
class Chain:
  """A chain of T noising steps; a pytree. Steps t are integers 0..T, scalar or `[b]`, and 0 is the data.

  Args:
    betas: `[T]`, the variance that each step adds, from the data on; `linear_betas()`, `cosine_betas(steps)` or any
      array between 0 and 1 that does not decrease. Betas that are being traced are taken as they are.

  Raises:
    ValueError: for betas of another shape, outside (0, 1), or decreasing. Every method raises it for a Python integer
      t that is outside the chain; for an array it gives NaN there.
    TypeError: by every method, for a t that is not an integer.

  Example:
    >>> import jaxdiff as jd
    >>> chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
    >>> alpha, sigma = chain.marginal(1000)
    >>> round(float(alpha), 4), round(float(sigma), 4)
    (0.0064, 1.0)
  """

  betas: Float[Array, " T"]

  def __init__(self, betas: ArrayLike | Sequence[float]):
    if not isinstance(betas, jax.core.Tracer):
      _check_betas(np.asarray(betas))
    object.__setattr__(self, "betas", jnp.asarray(betas, jnp.result_type(float)))

  @property
  def steps(self) -> int:
    """T."""
    return self.betas.shape[0]

  @property
  def _log_keep(self) -> Float[Array, " T"]:
    return jnp.log1p(-self.betas)

  @property
  def _log_alpha_squared(self) -> Float[Array, " nodes"]:
    return jnp.concatenate([jnp.zeros_like(self.betas[:1]), jnp.cumsum(self._log_keep)])

  def _beta(self, t: Step) -> Coefficient:
    if isinstance(t, int) and t == 0:
      raise ValueError(f"a reverse step must start at 1..{self.steps}: 0 is the data")
    return table_entry(jnp.concatenate([jnp.full_like(self.betas[:1], jnp.nan), self.betas]), t)

  def marginal(self, t: Step) -> tuple[Coefficient, Coefficient]:
    """(alpha_t, sigma_t) of eq. (2), each of the shape of t; (1, 0) at t = 0."""
    log_alpha_squared = table_entry(self._log_alpha_squared, t)
    return jnp.exp(0.5 * log_alpha_squared), jnp.sqrt(-jnp.expm1(log_alpha_squared))

  def perturb(self, key: Keys, x0: State, t: Step) -> tuple[State, State]:
    """Noise the data in one leap: (x_t, eps) with x_t = alpha_t x_0 + sigma_t eps, as `jaxdiff.perturb` does."""
    noise = keys.normal(keys.per_example(key, len(x0)), x0.shape, x0.dtype)
    alpha, sigma = self.marginal(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * noise, noise

  def posterior(self, x0: State, x_t: State, t: Step) -> tuple[State, Coefficient]:
    """Mean `[b, *d]` and variance beta~_t (of the shape of t) of x_{t-1} given x_t and x_0, eq. (3); t >= 1."""
    beta, (alpha, sigma) = self._beta(t), self.marginal(jnp.asarray(t) - 1)
    sigma_t = self.marginal(t)[1]
    of_data, of_state = alpha * beta / sigma_t**2, jnp.sqrt(1 - beta) * (sigma / sigma_t) ** 2
    return expand(of_data, x0) * x0 + expand(of_state, x_t) * x_t, self.variance("beta_tilde", t)

  def sample_posterior(self, key: Keys, x0: State, x_t: State, t: Step) -> State:
    """x_{t-1} `[b, *d]` drawn given x_t and x_0, eq. (3); at t = 1 it is x_0."""
    mean, variance = self.posterior(x0, x_t, t)
    noise = keys.normal(keys.per_example(key, len(x0)), x0.shape, x0.dtype)
    return mean + expand(jnp.sqrt(variance), x0) * noise

  def reverse_mean(self, x_t: State, noise: State, t: Step) -> State:
    """Mean of x_{t-1} given x_t and its noise, eq. (5): the posterior mean at the x_0 that this noise implies."""
    beta, sigma = self._beta(t), self.marginal(t)[1]
    return (x_t - expand(beta / sigma, x_t) * noise) / expand(jnp.sqrt(1 - beta), x_t)

  def variance(self, kind: Literal["beta", "beta_tilde"], t: Step) -> Coefficient:
    """Variance of a reverse step: beta_t, exact for data N(0, I), or beta~_t of eq. (4), exact for data in one point.

    Between these two lies the best one of all data with coordinates of variance up to 1. beta~_1 is 0.
    """
    if kind not in ("beta", "beta_tilde"):
      raise ValueError(f"kind must be 'beta' or 'beta_tilde', got {kind!r}")
    beta = self._beta(t)
    return beta if kind == "beta" else beta * (self.marginal(jnp.asarray(t) - 1)[1] / self.marginal(t)[1]) ** 2

  def interpolated_log_variance(self, v: Coefficient, t: Step) -> Coefficient:
    """v log beta_t + (1 - v) log beta~_t: what a network that learns its variance outputs v for.

    beta~_1 = 0 has no logarithm: at t = 1 it is replaced by beta~_2, or by beta_1 in a chain of one step.

    Args:
      v: scalar, `[b]` or `[b, *d]`; 1 gives beta, 0 beta~.
      t: step in 1..T, a scalar or, where v has a batch axis, `[b]`.

    Returns:
      The logarithm of the variance, of the shape of v.

    References:
      Nichol & Dhariwal 2021, eq. 15; the replacement at t = 1 is that of their published code.
    """
    v = jnp.asarray(v, self.betas.dtype)
    low = self.variance("beta_tilde", jnp.maximum(t, 2)) if self.steps > 1 else self._beta(t)
    low = jnp.where(jnp.asarray(t) < 1, jnp.nan, low)
    log_high, log_low = (expand(jnp.log(value), v) for value in (self._beta(t), low))
    return v * log_high + (1 - v) * log_low

  def optimal_variance(self, t: Step, data_variance: ArrayLike) -> Coefficient:
    """The best variance, one number for all coordinates, of a reverse step whose mean is exact, for Gaussian data.

        beta~_t + (alpha_{t-1} beta_t / sigma_t^2)^2  mean_c [ c sigma_t^2 / (alpha_t^2 c + sigma_t^2) ]

    over the eigenvalues c of the data's covariance: beta~_t and the mean variance that x_0 still has when x_t is known.
    c = 1 gives beta_t and c = 0 gives beta~_t.

    Args:
      t: step in 1..T.
      data_variance: eigenvalues `[k]` of the covariance of the data, or one for all.

    Returns:
      A variance of the shape of t.

    Raises:
      ValueError: for negative eigenvalues, or more than one axis.

    References:
      Bao et al. 2022, Analytic-DPM, Theorem 1, with the expected squared score of Gaussian data.
    """
    alpha, sigma = self.marginal(t)
    of_data = self.marginal(jnp.asarray(t) - 1)[0] * self._beta(t) / sigma**2
    return self.variance("beta_tilde", t) + of_data**2 * remaining_variance(alpha, sigma, data_variance)

  def time(self, t: Step) -> Coefficient:
    """t / T, the time of this step in the process `sde()`."""
    return jnp.asarray(t).astype(self.betas.dtype) / self.steps

  def index(self, time: Time) -> Int[Array, "..."]:
    """The step nearest to a time in [0, 1], int32: for a network that takes the number of the step.

    The time that a network is given is that of the chain, unless the prediction is `edm` or has `log_snr_time`.
    """
    return jnp.round(float_time(time) * self.steps).astype(jnp.int32)

  def sde(self) -> "ChainSDE":
    """The continuous process through the chain: its marginal at time t / T is that of step t."""
    return ChainSDE(self._log_alpha_squared, self._log_keep)


@checks.pytree
@dataclass(frozen=True, eq=False)
class ChainSDE:
  """Variance preserving, log alpha^2 linear between the steps of a chain; made by `Chain.sde()`.

  beta(t) = -T log(1 - beta_i) on ((i - 1) / T, i / T], so it jumps at the steps: an adaptive solver sees T kinks.
  """

  log_alpha_squared: Float[Array, " nodes"]
  rises: Float[Array, " pieces"]

  t1 = 1.0

  def _at(self, t: Time) -> tuple[Coefficient, Coefficient]:
    return piecewise_linear(self.log_alpha_squared, self.rises, float_time(t))

  def drift(self, x: State, t: Time) -> State:
    return expand(0.5 * self._at(t)[1], x) * x

  def diffusion(self, t: Time) -> Coefficient:
    return jnp.sqrt(-self._at(t)[1])

  def diffuse(self, t: Time, v: State) -> State:
    return expand(self.diffusion(t), v) * v

  def marginal(self, t: Time) -> tuple[Coefficient, Coefficient]:
    log_alpha_squared, _ = self._at(t)
    return jnp.exp(0.5 * log_alpha_squared), jnp.sqrt(-jnp.expm1(log_alpha_squared))

  def time_of_log_snr(self, log_snr: Time) -> Coefficient:
    integral = jax.nn.softplus(-float_time(log_snr))
    nodes = jnp.linspace(0.0, 1.0, self.rises.size + 1, dtype=integral.dtype)
    return jnp.interp(integral, -self.log_alpha_squared.astype(integral.dtype), nodes, right="extrapolate")

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    return VP().prior_sample(key, shape)

  def prior_log_prob(self, z: State) -> Float[Array, " b"]:
    return VP().prior_log_prob(z)
