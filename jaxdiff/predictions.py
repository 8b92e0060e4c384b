"""What a network outputs, and how it becomes a score and a denoiser.

With x_t = alpha x_0 + sigma eps, r^2 = alpha^2 + sigma^2, V = sigma^2 + alpha^2 s^2 (s = sigma_data), F the raw output:

                target of F                       E[x_0 | x_t]                     score
    noise       eps                               (x - sigma F) / alpha            -F / sigma
    data        x_0                               F                                (alpha F - x) / sigma^2
    velocity    (alpha eps - sigma x_0) / r       alpha x / r^2 - sigma F / r      -x / r^2 - alpha F / (r sigma)
    score       -eps / sigma                      (x + sigma^2 F) / alpha          F
    edm(s)      (sigma x_0 / s - alpha s eps)     alpha s^2 x / V                  -x / V
                  / sqrt V                          + s sigma F / sqrt V             + s alpha F / (sigma sqrt V)

For VP, r = 1. The network sees (x, t) as they are, or with `log_snr_time` (x, log(sigma / alpha) / 4): a time that has
one meaning under every schedule, which learned schedules need. `edm` is the preconditioning of Karras et al. (2022,
Table 1) of the rescaled state x / alpha at noise level sigma / alpha, solved for the score by hand so that no digits
cancel at small sigma; its network sees x / sqrt V and the time log(sigma / alpha) / 4.

References:
  Ho et al. 2020 (noise); Salimans & Ho 2022, Progressive Distillation, Section 4 and Appendix D (velocity); Efron 2011,
  Tweedie's Formula, eq. 1.4.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import Network, Params, ScoreFn, State, Time


class Prediction(NamedTuple):
  """What the raw output of a network means: four pure functions of a state and its (alpha, sigma).

  All act elementwise; alpha and sigma come shaped to broadcast against x. `to_score` and `to_denoised` are affine in
  the output: the losses read from them by how much an error of the output counts.

  Attributes:
    precondition: `(x, t, alpha, sigma) -> (x, t)`, what the network is given; t, alpha, sigma: `[b]`.
    target: `(x0, noise, alpha, sigma)`, what the output is trained to be.
    to_score: `(x, output, alpha, sigma)`.
    to_denoised: `(x, output, alpha, sigma)`.
  """

  precondition: Callable[[Array, Array, Array, Array], tuple[Array, Array]]
  target: Callable[[Array, Array, Array, Array], Array]
  to_score: Callable[[Array, Array, Array, Array], Array]
  to_denoised: Callable[[Array, Array, Array, Array], Array]


def _level(alpha: Array, sigma: Array) -> Array:
  return 0.25 * (jnp.log(sigma) - jnp.log(alpha))


def _as_is(log_snr_time: bool) -> Callable[[Array, Array, Array, Array], tuple[Array, Array]]:
  return lambda x, t, alpha, sigma: (x, _level(alpha, sigma) if log_snr_time else t)


def _norm(alpha: Array, sigma: Array) -> Array:
  return jnp.sqrt(alpha**2 + sigma**2)


@functools.cache
def noise(log_snr_time: bool = False) -> Prediction:
  """The network predicts the noise eps."""
  return Prediction(
    precondition=_as_is(log_snr_time),
    target=lambda x0, noise, alpha, sigma: noise,
    to_score=lambda x, output, alpha, sigma: -output / sigma,
    to_denoised=lambda x, output, alpha, sigma: (x - sigma * output) / alpha,
  )


@functools.cache
def data(log_snr_time: bool = False) -> Prediction:
  """The network predicts the clean data x_0."""
  return Prediction(
    precondition=_as_is(log_snr_time),
    target=lambda x0, noise, alpha, sigma: x0,
    to_score=lambda x, output, alpha, sigma: (alpha * output - x) / sigma**2,
    to_denoised=lambda x, output, alpha, sigma: output,
  )


@functools.cache
def velocity(log_snr_time: bool = False) -> Prediction:
  """The network predicts v = (alpha eps - sigma x_0) / r, the direction of travel on the circle of (x_0, eps)."""

  def target(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    r = _norm(alpha, sigma)
    return alpha / r * noise - sigma / r * x0

  def to_score(x: Array, output: Array, alpha: Array, sigma: Array) -> Array:
    r = _norm(alpha, sigma)
    return -x / r**2 - alpha / (r * sigma) * output

  def to_denoised(x: Array, output: Array, alpha: Array, sigma: Array) -> Array:
    r = _norm(alpha, sigma)
    return alpha / r**2 * x - sigma / r * output

  return Prediction(_as_is(log_snr_time), target, to_score, to_denoised)


@functools.cache
def score(log_snr_time: bool = False) -> Prediction:
  """The network predicts the score itself."""
  return Prediction(
    precondition=_as_is(log_snr_time),
    target=lambda x0, noise, alpha, sigma: -noise / sigma,
    to_score=lambda x, output, alpha, sigma: output,
    to_denoised=lambda x, output, alpha, sigma: (x + sigma**2 * output) / alpha,
  )


@functools.cache
def edm(sigma_data: float = 0.5) -> Prediction:
  """EDM preconditioning: input and output of the network have unit variance at every noise level.

  The network is given x / sqrt V and, as its time, log(sigma / alpha) / 4 (about -1.6 to 1.3), which may be negative.

  Args:
    sigma_data: standard deviation of the data, a positive Python number.

  Raises:
    ValueError: if sigma_data is not positive.
  """
  if not sigma_data > 0:
    raise ValueError(f"sigma_data must be positive, the standard deviation of the data; got {sigma_data}")
  s = sigma_data

  def spread(alpha: Array, sigma: Array) -> Array:
    return jnp.sqrt(sigma**2 + (s * alpha) ** 2)

  def precondition(x: Array, t: Array, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    return x / expand(spread(alpha, sigma), x), _level(alpha, sigma)

  def target(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    root = spread(alpha, sigma)
    return sigma / (s * root) * x0 - alpha * s / root * noise

  def to_score(x: Array, output: Array, alpha: Array, sigma: Array) -> Array:
    root = spread(alpha, sigma)
    return -x / root**2 + s * alpha / (sigma * root) * output

  def to_denoised(x: Array, output: Array, alpha: Array, sigma: Array) -> Array:
    root = spread(alpha, sigma)
    return alpha * s**2 / root**2 * x + s * sigma / root * output

  return Prediction(precondition, target, to_score, to_denoised)


def call_network(
  network: Network, prediction: Prediction, sde: ScalarSDE, x: State, t: Time, cond: Any, parts: int = 1
) -> Float[Array, "b ..."]:
  """The raw output at (x, t), checked and cast to the type of x.

  Raises:
    ValueError: if the output has another shape than x, up to `parts` times its channels (the last axis).
    TypeError: if it is not an array of floating point numbers.
  """
  t = batch_time(t, x)
  return call_at(network, prediction, x, t, *sde.marginal(t), cond, parts)


def call_at(
  network: Network,
  prediction: Prediction,
  x: State,
  t: Float[Array, " b"],
  alpha: Float[Array, " b"],
  sigma: Float[Array, " b"],
  cond: Any,
  parts: int = 1,
) -> Array:
  """`call_network` for alpha and sigma that are known already."""
  return checked_output(network(*prediction.precondition(x, t, alpha, sigma), **cond), x, parts)


def checked_output(output: Any, x: State, parts: int = 1) -> Array:
  """What a network returned for x, refused as `call_network` says; in the type of x."""
  if not hasattr(output, "dtype") or not jnp.issubdtype(output.dtype, jnp.floating):
    raise TypeError(f"network must return a floating point array, got {getattr(output, 'dtype', type(output))}")
  if parts == 1 and output.shape != x.shape:
    raise ValueError(f"network must return an array of the shape of x, {x.shape}; got {output.shape}")
  if parts > 1 and output.shape != (expected := (*x.shape[:-1], parts * x.shape[-1])):
    raise ValueError(f"network must return {parts} times the channels of x, {expected}; got {output.shape}")
  return output.astype(x.dtype)


_NO_VARIANCE = (
  "the score says nothing of the variance of a reverse step: give a network of twice the channels, read by "
  "score_fn(..., learned_variance=True)"
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params", "sde"],
  meta_fields=["apply", "prediction", "learned_variance"],
)
@dataclass(frozen=True)
class _Model:
  """A network read as a score; a pytree whose leaves are the parameters and the numbers of the process."""

  apply: Callable[..., Array]
  params: Params
  sde: ScalarSDE
  prediction: Prediction
  learned_variance: bool = False

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    return self._read(self.prediction.to_score, x, t, cond)[0]

  def denoised(self, x: State, t: Time, /, **cond: Array) -> State:
    return self._read(self.prediction.to_denoised, x, t, cond)[0]

  def denoised_and_v(self, x: State, t: Time, /, **cond: Array) -> tuple[State, State]:
    if not self.learned_variance:
      raise TypeError(_NO_VARIANCE)
    value, (variance,) = self._read(self.prediction.to_denoised, x, t, cond)
    return value, 0.5 * (variance + 1)

  def _read(self, convert: Callable[..., Array], x: State, t: Time, cond: Any) -> tuple[State, list[State]]:
    t, parts = batch_time(t, x), 1 + self.learned_variance
    alpha, sigma = self.sde.marginal(t)
    network = functools.partial(self.apply, self.params)
    output, *rest = jnp.split(call_at(network, self.prediction, x, t, alpha, sigma, cond, parts), parts, axis=-1)
    return convert(x, output, expand(alpha, x), expand(sigma, x)), rest


def score_fn(
  apply: Callable[..., Array], params: Params, sde: ScalarSDE, prediction: Prediction, learned_variance: bool = False
) -> _Model:
  """Read a network as a score: the only adapter between networks and the library.

  Args:
    apply: `(params, x: [b, *d], t: [b], **cond) -> [b, *d]`, such as a linen module's `apply`.
    params: its parameters, any pytree. Make the score inside the jitted function that takes them as an argument.
    sde: a process with scalar marginals.
    prediction: what the output means: `predictions.noise()`, `data()`, `velocity()`, `score()`, `edm(sigma_data)`; all
      but the last take `log_snr_time=True` to give the network log(sigma / alpha) / 4 for t.
    learned_variance: whether the network returns twice the channels (the last axis), the second half 2 v - 1 for the
      variance of a reverse step, as `losses.ddpm_hybrid` trains it.

  Returns:
    A callable pytree `score(x, t, **cond) -> [b, *d]`; `score.denoised(x, t, **cond)` is E[x_0 | x_t], straight from
    the output (through the score it would lose up to 1e-4 in float32 where alpha is small), and
    `score.denoised_and_v(x, t, **cond)` is that and v `[b, *d]`, of one evaluation, where the variance is learned.

  Raises:
    TypeError: if the process is no pytree, or a factory was given where what it makes is due; when `denoised_and_v` is
      called of a score without a learned variance.
    ValueError, TypeError: when called, if the network returns another shape than x or an integer type.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> apply = lambda params, x, t: params * x
    >>> score = jd.score_fn(apply, jnp.float32(2.0), jd.VP(), jd.predictions.score())
    >>> float(score(jnp.ones((1, 3)), 0.5)[0, 0])
    2.0
  """
  checks.made("sde", sde, ScalarSDE)
  checks.made("prediction", prediction, Prediction)
  if jax.tree_util.all_leaves([sde]):
    raise TypeError(
      f"sde must be a pytree, so that the score may pass through jit; {type(sde).__name__} is none: put "
      "@jax.tree_util.register_dataclass and @dataclass(frozen=True) on it"
    )
  return _Model(apply, params, sde, prediction, bool(learned_variance))


def score_of(log_density: Callable[..., Array]) -> Network:
  """The score of an unnormalized log-density, for energy-based models: its gradient with respect to x.

  Args:
    log_density: `(x: [b, *d], t: [b], **cond) -> [b]`, example by example; constants in x do not matter.

  Returns:
    A network `(x, t, **cond) -> [b, *d]` with `predictions.score()`, and a score for samplers and likelihoods; a pytree
    without leaves, so that it passes through jit.

  Raises:
    ValueError: when called, if the log-density is not one number per example.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> score = jd.score_of(lambda x, t: -0.5 * jnp.sum(x**2, axis=1))
    >>> score(jnp.ones((1, 2)), jnp.zeros(1)).tolist()
    [[-1.0, -1.0]]
  """

  checks.made("log_density", log_density)
  if not callable(log_density):
    raise TypeError(f"log_density must be a function (x, t, **cond) -> [b], got {type(log_density).__name__}")

  return jax.tree_util.Partial(lambda x, t, /, **cond: log_density_and_score(log_density, x, t, cond)[1])


def log_density_and_score(
  log_density: Callable[..., Array], x: State, t: Time, cond: Any
) -> tuple[Float[Array, " b"], State]:
  """The log-density and its gradient with respect to x, at the cost of the gradient."""

  def total(x: State) -> tuple[Array, Array]:
    value = log_density(x, t, **cond)
    if value.shape != x.shape[:1]:
      raise ValueError(f"log_density must return one number per example, {x.shape[:1]}; got shape {value.shape}")
    return jnp.sum(value), value

  gradient, value = jax.grad(total, has_aux=True)(x)
  return value, gradient


def denoised(sde: ScalarSDE, score: ScoreFn, x: State, t: Time, **cond: Array) -> State:
  """E[x_0 | x_t], from `score.denoised` where there is one, else by Tweedie's formula (x + sigma^2 score) / alpha."""
  direct = getattr(score, "denoised", None)
  if direct is not None:
    return direct(x, t, **cond)
  t = batch_time(t, x)
  alpha, sigma = (expand(value, x) for value in sde.marginal(t))
  return (x + sigma**2 * checks.score(x, score(x, t, **cond))) / alpha


def denoised_and_v(score: ScoreFn, x: State, t: Time, **cond: Array) -> tuple[State, State]:
  """E[x_0 | x_t] and the v of the variance of a reverse step, each `[b, *d]`, of one evaluation of the network.

  Raises:
    TypeError: for a score that says nothing of the variance.
  """
  both = getattr(score, "denoised_and_v", None)
  if both is None:
    raise TypeError(_NO_VARIANCE)
  return both(x, t, **cond)


def evaluations(score: ScoreFn, times: Float[Array, " n"] | None = None) -> int | Array:
  """Network evaluations of one call of a score at each of these times: `[n]`, or one number for all.

  Without times it is the most that a call takes: what it costs where examples step by themselves, which computes all
  branches. A score takes 1 unless it has a method of this name, `evaluations(times)`.
  """
  of = getattr(score, "evaluations", None)
  return 1 if of is None else of(times)


def noise_factor(prediction: Prediction, alpha: Array, sigma: Array) -> Array:
  """By how much an error of the output counts in units of the noise: |d eps / d F| = sigma |d score / d F|."""
  one = jnp.ones_like(sigma)
  slope = prediction.to_score(jnp.zeros_like(one), one, alpha, sigma)
  return sigma * jnp.abs(slope)
