"""Forward processes dx = f(x, t) dt + G(t) dw, which carry data at t = 0 to a known prior at t = t1.

A process is a frozen dataclass of numbers and a pytree; any class with the methods of the protocols below does as well.

            f(x, t)        g(t)^2                  alpha(t)      sigma(t)^2        prior            t1
    VP      -beta x / 2    beta                    exp(-B / 2)   1 - exp(-B)       N(0, I)          1          (1)
    SubVP   -beta x / 2    beta (1 - exp(-2 B))    exp(-B / 2)   (1 - exp(-B))^2   N(0, I)          1          (2)
    CosineVP  as VP, with alpha = cos(theta t), sigma = sin(theta t)               N(0, I)          1          (3)
    VE      0              2 sigma^2 log(r)        1             (s_min r^t)^2     N(0, s_max^2)    1          (4)
    EDM     0              2 t                     1             t^2               N(0, s_max^2)    s_max      (5)
    VariancePreserving  as VP, with sigma^2 = sigmoid(gamma(t)), so beta = sigma^2 gamma'(t)        1          (6)

with x_t | x_0 ~ N(alpha x_0, sigma^2 I), beta linear in t, B its integral, r = s_max / s_min.

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, Appendix B-C, for (1), (2), (4); Nichol & Dhariwal
  2021, Improved DDPM, eq. 17, for (3), here without their offset and cut off at a log-SNR; Karras et al. 2022,
  Elucidating the Design Space, Table 1, for (5); Kingma et al. 2021, Variational Diffusion Models, Section 3, for (6).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys, schedules
from jaxdiff.schedules import float_time
from jaxdiff.typing import Keys, Scalar, State, Time


@runtime_checkable
class SDE(Protocol):
  """A forward process dx = f(x, t) dt + G(t) dw."""

  @property
  def t1(self) -> Scalar: ...

  def drift(self, x: State, t: Time) -> State:
    """f(x, t), `[b, *d]`."""
    ...

  def diffuse(self, t: Time, v: State) -> State:
    """G(t) v for a state v: a symmetric linear map."""
    ...

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    """Samples of the prior, `shape = (b, *d)`."""
    ...

  def prior_log_prob(self, z: State) -> Float[Array, " b"]:
    """Log-density of the prior, in nats."""
    ...


@runtime_checkable
class ScalarSDE(SDE, Protocol):
  """A process with x_t | x_0 ~ N(alpha_t x_0, sigma_t^2 I)."""

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    """g(t), of the shape of t."""
    ...

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(alpha, sigma), each of the shape of t."""
    ...

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    """The time at which log(alpha^2 / sigma^2) has this value."""
    ...


def expand(coefficient: Float[Array, "..."], x: Array) -> Array:
  """A scalar or `[b]` coefficient, shaped and typed to multiply x `[b, *d]`."""
  return coefficient.astype(x.dtype).reshape(coefficient.shape + (1,) * (x.ndim - 1) * (coefficient.ndim > 0))


def _check_time(t: Time, x: Array) -> None:
  if jnp.shape(t) not in ((), (1,), x.shape[:1]):
    raise ValueError(f"t must be a scalar or one time per example, [{len(x)}]; got shape {jnp.shape(t)}")


def batch_time(t: Time, x: Array) -> Float[Array, " b"]:
  """Time `[b]` for x `[b, *d]`."""
  _check_time(t, x)
  return jnp.broadcast_to(float_time(t), x.shape[:1])


def log_snr(sde: ScalarSDE, t: Time) -> Float[Array, "..."]:
  """log(alpha^2 / sigma^2) at time t; `sde.time_of_log_snr` is its inverse."""
  checks.made("sde", sde, ScalarSDE)
  alpha, sigma = sde.marginal(t)
  return 2 * (jnp.log(alpha) - jnp.log(sigma))


def perturb(key: Keys, x0: State, t: Time, sde: ScalarSDE) -> tuple[State, State]:
  """Noise the data: x_t = alpha_t x_0 + sigma_t eps.

  Args:
    key: one key, or one per example.
    x0: data `[b, *d]`.
    t: a time, or one per example.
    sde: a process with scalar marginals.

  Returns:
    (x_t, eps), each `[b, *d]` of the type of x0.

  Raises:
    TypeError: for an x0 that is no array of floating point numbers.
    ValueError: for a t of another length.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> x_t, noise = jd.perturb(jax.random.key(0), jnp.ones((4, 2)), 0.5, jd.VP())
    >>> x_t.shape, noise.shape
    ((4, 2), (4, 2))
  """
  checks.batch("x0", x0)
  _check_time(t, x0)
  noise = keys.normal(keys.per_example(key, len(x0)), x0.shape, x0.dtype)
  alpha, sigma = sde.marginal(t)
  return expand(alpha, x0) * x0 + expand(sigma, x0) * noise, noise


def check_eta(eta: Scalar) -> None:
  """Refuse a negative amount of noise; a traced one passes."""
  if not isinstance(eta, jax.core.Tracer) and not float(eta) >= 0:
    raise ValueError(f"eta must be at least 0 (0 the probability flow, 1 the reverse SDE), got {eta}")


def reverse(
  sde: SDE, score: Callable[..., State], eta: Scalar = 1.0
) -> tuple[Callable[..., State], Callable[..., State]]:
  """The process run backwards: f - (1 + eta^2) / 2 G G^T score, with noise eta G.

  Every eta gives the same marginals: 1 the reverse SDE, 0 the probability-flow ODE.

  Args:
    sde: the forward process.
    score: `(x, t, **cond) -> [b, *d]`.
    eta: amount of noise, at least 0.

  Returns:
    drift(x, t, **cond) and diffuse(t, v). Time still runs forwards: a sampler takes negative steps.

  Raises:
    ValueError: for a negative eta; when called, for a score of another shape than x.
    TypeError: when called, for a score that is no array of floating point numbers.

  References:
    Song et al. 2021, eq. 6 (eta = 1) and eq. 13 (eta = 0); Zhang & Chen 2023, DEIS, Section 2, for every eta.
  """

  check_eta(eta)
  if not callable(score):
    raise TypeError(f"score must be a function (x, t, **cond) -> array, got {type(score).__name__}")

  def drift(x: State, t: Time, **cond: Array) -> State:
    t = batch_time(t, x)
    value = checks.score(x, score(x, t, **cond))
    return sde.drift(x, t) - 0.5 * (1 + eta**2) * sde.diffuse(t, sde.diffuse(t, value))

  def diffuse(t: Time, v: State) -> State:
    return eta * sde.diffuse(t, v)

  return drift, diffuse


def _check_numbers(sde: Any, rule: str, holds: Callable[..., bool]) -> None:
  """Refuse a process of Python numbers that break its rule; arrays and tracers pass."""
  numbers = vars(sde).values()
  if all(isinstance(v, int | float) for v in numbers) and not (all(map(math.isfinite, numbers)) and holds(*numbers)):
    raise ValueError(f"{type(sde).__name__} needs finite numbers with {rule}, got {sde}")


def _check_linear_beta(sde: Any) -> None:
  _check_numbers(sde, "0 <= beta_min <= beta_max and beta_max > 0", lambda low, high: 0 <= low <= high and high > 0)


def _diffuse(sde: ScalarSDE, t: Time, v: State) -> State:
  return expand(sde.diffusion(t), v) * v


def _no_drift(sde: SDE, x: State, t: Time) -> State:
  return jnp.zeros_like(x)


def _linear_beta_drift(sde: Any, x: State, t: Time) -> State:
  return expand(-0.5 * schedules.linear_beta(float_time(t), sde.beta_min, sde.beta_max), x) * x


def _unit_prior_sample(sde: SDE, key: Keys, shape: tuple[int, ...]) -> State:
  return keys.normal(keys.per_example(key, shape[0]), shape, jnp.result_type(float))


def _unit_prior_log_prob(sde: SDE, z: State) -> Float[Array, " b"]:
  dimension = math.prod(z.shape[1:])
  return -0.5 * jnp.sum(z**2, axis=range(1, z.ndim)) - 0.5 * dimension * math.log(2 * math.pi)


def _wide_prior_sample(sde: Any, key: Keys, shape: tuple[int, ...]) -> State:
  return sde.sigma_max * _unit_prior_sample(sde, key, shape)


def _wide_prior_log_prob(sde: Any, z: State) -> Float[Array, " b"]:
  return _unit_prior_log_prob(sde, z / sde.sigma_max) - math.prod(z.shape[1:]) * jnp.log(sde.sigma_max)


@checks.pytree
@dataclass(frozen=True)
class VP:
  """Variance preserving, beta linear in time: the continuous limit of DDPM."""

  beta_min: Scalar = 0.1
  beta_max: Scalar = 20.0

  t1 = 1.0
  drift, diffuse = _linear_beta_drift, _diffuse
  prior_sample, prior_log_prob = _unit_prior_sample, _unit_prior_log_prob

  def __post_init__(self) -> None:
    _check_linear_beta(self)

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    return jnp.sqrt(schedules.linear_beta(float_time(t), self.beta_min, self.beta_max))

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    integral = schedules.linear_beta_integral(float_time(t), self.beta_min, self.beta_max)
    return jnp.exp(-0.5 * integral), jnp.sqrt(-jnp.expm1(-integral))

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return schedules.linear_beta_time(jax.nn.softplus(-float_time(log_snr)), self.beta_min, self.beta_max)


@checks.pytree
@dataclass(frozen=True)
class SubVP:
  """VP with less noise at every time: marginal variance (1 - exp(-B))^2, never above VP's."""

  beta_min: Scalar = 0.1
  beta_max: Scalar = 20.0

  t1 = 1.0
  drift, diffuse = _linear_beta_drift, _diffuse
  prior_sample, prior_log_prob = _unit_prior_sample, _unit_prior_log_prob

  def __post_init__(self) -> None:
    _check_linear_beta(self)

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    t = float_time(t)
    integral = schedules.linear_beta_integral(t, self.beta_min, self.beta_max)
    # 1 - exp(-2 B) = (1 - exp(-B)) (1 + exp(-B)): one expm1, of the argument that `marginal` has.
    spread = -jnp.expm1(-integral) * (1 + jnp.exp(-integral))
    return jnp.sqrt(schedules.linear_beta(t, self.beta_min, self.beta_max) * spread)

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    integral = schedules.linear_beta_integral(float_time(t), self.beta_min, self.beta_max)
    return jnp.exp(-0.5 * integral), -jnp.expm1(-integral)

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    # alpha / sigma = r and sigma = 1 - alpha^2 give -log(alpha) = asinh(1 / (2 r)).
    integral = 2 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * float_time(log_snr)))
    return schedules.linear_beta_time(integral, self.beta_min, self.beta_max)


@checks.pytree
@dataclass(frozen=True)
class CosineVP:
  """Variance preserving with alpha = cos(theta t); theta is such that log-SNR ends at `log_snr_min`."""

  log_snr_min: Scalar = -10.0

  t1 = 1.0
  diffuse = _diffuse
  prior_sample, prior_log_prob = _unit_prior_sample, _unit_prior_log_prob

  @property
  def _theta(self) -> Array:
    return schedules.cosine_angle(self.log_snr_min)

  def __post_init__(self) -> None:
    _check_numbers(self, "log_snr_min < 0", lambda low: low < 0)

  def drift(self, x: State, t: Time) -> State:
    alpha, sigma = self.marginal(t)
    return expand(-self._theta * sigma / alpha, x) * x

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    alpha, sigma = self.marginal(t)
    return jnp.sqrt(2 * self._theta * sigma / alpha)

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    t = float_time(t)
    to_right_angle = schedules.cosine_angle(-self.log_snr_min) + self._theta * (1 - t)
    return jnp.sin(to_right_angle), jnp.sin(self._theta * t)

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return schedules.cosine_angle(float_time(log_snr)) / self._theta


@checks.pytree
@dataclass(frozen=True)
class VE:
  """Variance exploding, sigma geometric in time: the continuous limit of SMLD. At t = 0 sigma is sigma_min, not 0."""

  sigma_min: Scalar = 0.01
  sigma_max: Scalar = 50.0

  t1 = 1.0
  drift, diffuse = _no_drift, _diffuse
  prior_sample, prior_log_prob = _wide_prior_sample, _wide_prior_log_prob

  def __post_init__(self) -> None:
    _check_numbers(self, "0 < sigma_min < sigma_max", lambda low, high: 0 < low < high)

  @property
  def _log_ratio(self) -> Array:
    return jnp.log(self.sigma_max) - jnp.log(self.sigma_min)

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    return self.marginal(t)[1] * jnp.sqrt(2 * self._log_ratio)

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    t = float_time(t)
    return jnp.ones_like(t), self.sigma_min * jnp.exp(t * self._log_ratio)

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return (-0.5 * float_time(log_snr) - jnp.log(self.sigma_min)) / self._log_ratio


@checks.pytree
@dataclass(frozen=True)
class EDM:
  """Time is the noise level itself: sigma(t) = t, up to sigma_max."""

  sigma_max: Scalar = 80.0

  drift, diffuse = _no_drift, _diffuse
  prior_sample, prior_log_prob = _wide_prior_sample, _wide_prior_log_prob

  def __post_init__(self) -> None:
    _check_numbers(self, "sigma_max > 0", lambda high: high > 0)

  @property
  def t1(self) -> Scalar:
    return self.sigma_max

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    return jnp.sqrt(2 * float_time(t))

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    t = float_time(t)
    return jnp.ones_like(t), t

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return jnp.exp(-0.5 * float_time(log_snr))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VariancePreserving:
  """Variance preserving with any -log-SNR gamma(t), fixed or learned. At t = 0 there is the noise of gamma(0).

  Attributes:
    gamma: increasing on [0, 1], elementwise; a callable pytree such as `schedules.Gamma`, or
      `jax.tree_util.Partial(f)` for a function of yours.
  """

  gamma: Callable[[Array], Array]

  def __post_init__(self) -> None:
    checks.callable_pytree("gamma", self.gamma)

  t1 = 1.0
  diffuse = _diffuse
  prior_sample, prior_log_prob = _unit_prior_sample, _unit_prior_log_prob

  def _beta(self, t: Time) -> Float[Array, "..."]:
    gamma, slope = schedules.slope(self.gamma, float_time(t))
    return jax.nn.sigmoid(gamma) * slope

  def drift(self, x: State, t: Time) -> State:
    return expand(-0.5 * self._beta(t), x) * x

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    return jnp.sqrt(self._beta(t))

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return schedules.of_gamma(self.gamma(float_time(t)))

  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return schedules.invert(self.gamma, -float_time(log_snr), 0.0, self.t1)
