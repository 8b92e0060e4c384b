"""Noise schedules as functions of time, and the time grids on which samplers step.

    linear   beta(t) = beta_min + t (beta_max - beta_min),  B(t) = int_0^t beta     (Ho et al. 2020)
    cosine   alpha = cos(theta t),  sigma = sin(theta t)          (after Nichol & Dhariwal 2021, without their offset)
    gamma    -log-SNR itself, from a minimum to a maximum through any increasing interior   (Kingma et al. 2021)

Every noise level of every process has one log-SNR, log(alpha^2 / sigma^2): grids and default times are set by it.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks
from jaxdiff.typing import Scalar, Step, Time

SAMPLING_NOISE_TO_SIGNAL = 2e-3
TRAINING_NOISE_TO_SIGNAL = 1e-3
_INVERSE_TOLERANCE = 1e-2
_KINDS = ("log_snr", "uniform", "karras")


def float_time(t: Time) -> Float[Array, "..."]:
  """Time as an array of float32, or float64 where it comes so; half precision is no type for a time."""
  t = jnp.asarray(t)
  if not jnp.issubdtype(t.dtype, jnp.floating):
    return t.astype(jnp.result_type(float))
  return t if t.dtype == jnp.float64 else t.astype(jnp.float32)


def linear_beta(t: Float[Array, "..."], beta_min: Scalar, beta_max: Scalar) -> Float[Array, "..."]:
  """beta(t), the rate of noising per unit time."""
  return beta_min + t * (beta_max - beta_min)


def linear_beta_integral(t: Float[Array, "..."], beta_min: Scalar, beta_max: Scalar) -> Float[Array, "..."]:
  """B(t), the integral of beta from 0 to t."""
  return t * (beta_min + 0.5 * t * (beta_max - beta_min))


def linear_beta_time(integral: Float[Array, "..."], beta_min: Scalar, beta_max: Scalar) -> Float[Array, "..."]:
  """The time with B(t) = integral, by the root that loses no digits near 0."""
  return 2 * integral / (beta_min + jnp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral))


def cosine_angle(log_snr: Time) -> Float[Array, "..."]:
  """The angle with alpha = cos, sigma = sin at this log-SNR; that of -log_snr is what it lacks to pi / 2."""
  return jnp.arctan(jnp.exp(-0.5 * log_snr))


@checks.pytree
@dataclass(frozen=True)
class MonotoneNetwork:
  """An increasing function of time in [0, 1], from 0 to 1: a line and sigmoids, all with positive weights.

      (h(t) - h(0)) / (h(t) - h(0) + h(1) - h(t)),      h(t) = w t + sum_k a_k sigmoid(b_k (t - c_k))

  Its leaves are what is trained: w, a and b through softplus, so that any values are valid. `monotone_network` makes
  one that is nearly straight.
  """

  slope: Float[Array, ""]
  heights: Float[Array, " k"]
  rates: Float[Array, " k"]
  centers: Float[Array, " k"]

  def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
    slope, heights, rates, centers = (value.astype(t.dtype) for value in dataclasses.astuple(self))

    def rise(start: Array, end: Array) -> Array:
      step = lambda t: jax.nn.sigmoid(jax.nn.softplus(rates) * (t - centers))
      return jax.nn.softplus(slope) * (end - start) + jnp.sum(jax.nn.softplus(heights) * (step(end) - step(start)))

    def fraction(t: Array) -> Array:
      before, after = rise(jnp.zeros_like(t), t), rise(t, jnp.ones_like(t))
      return before / (before + after)

    return jax.vmap(fraction)(t.ravel()).reshape(t.shape)


def monotone_network(width: int = 32) -> MonotoneNetwork:
  """A nearly straight `MonotoneNetwork` with `width` sigmoids spread over [0, 1].

  Raises:
    ValueError: for a width below 1.
  """
  checks.whole("width", width, 1, "the number of sigmoids")
  centers = jnp.linspace(0.5 / width, 1 - 0.5 / width, width)
  return MonotoneNetwork(jnp.ones(()), jnp.full(width, -math.log(width) - 2.0), jnp.full(width, 10.0), centers)


_STRAIGHT = jax.tree_util.Partial(lambda t: t)


@checks.pytree
@dataclass(frozen=True)
class Gamma:
  """-log-SNR as a function of time in [0, 1]: `minimum` at 0, `maximum` at 1, both exactly, and an interior between.

  A pytree: what of it is trained is decided by what is put among the parameters, all of it, or one field of a copy
  made by `dataclasses.replace`.

  Attributes:
    minimum: of gamma, so the largest log-SNR is -minimum.
    maximum: of gamma.
    interior: increasing from 0 to 1 on [0, 1], elementwise; a callable pytree such as `monotone_network()`, or
      `jax.tree_util.Partial(f)` for a function of yours. Straight by default.

  Raises:
    ValueError: unless minimum < maximum, and the interior rises from 0 to 1.
    TypeError: for an interior that is no callable pytree.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> gamma = jd.schedules.Gamma(-6.0, 4.0, jax.tree_util.Partial(jnp.square))
    >>> gamma(jnp.array([0.0, 0.5, 1.0])).tolist()
    [-6.0, -3.5, 4.0]

  References:
    Kingma et al. 2021, Variational Diffusion Models, Section 3.2 and Appendix H.
  """

  minimum: Scalar = -13.3
  maximum: Scalar = 6.0
  interior: Callable[[Array], Array] = _STRAIGHT

  def __post_init__(self) -> None:
    ends = self.minimum, self.maximum
    if all(isinstance(end, float | int) for end in ends) and not ends[0] < ends[1]:
      raise ValueError(f"minimum must be below maximum, got gamma from {ends[0]} to {ends[1]}")
    checks.callable_pytree("interior", self.interior)
    with jax.ensure_compile_time_eval():
      value = self.interior(jnp.linspace(0.0, 1.0, 9))
      wrong = (jnp.abs(value[0]) > 1e-4) | (jnp.abs(value[-1] - 1) > 1e-4) | jnp.any(jnp.diff(value) < 0)
    if _is_number(wrong) and wrong:
      raise ValueError(f"interior must rise from 0 at t = 0 to 1 at t = 1, got {value} on the way")

  def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
    return self.between(self.interior(t))

  def between(self, fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """gamma at this value of the interior."""
    return (1 - fraction) * self.minimum + fraction * self.maximum


def of_gamma(gamma: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """(alpha, sigma) of the variance-preserving process: alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)."""
  return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma)), jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))


def slope(f: Callable[[Array], Array], t: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """An elementwise function and its derivative."""
  return jax.jvp(f, (t,), (jnp.ones_like(t),))


def invert(
  rising: Callable[[Array], Array], value: Float[Array, "..."], low: Scalar, high: Scalar
) -> Float[Array, "..."]:
  """Where an elementwise increasing function takes this value, within [low, high], 0 <= low: to the last digit.

  Bisection over the floating point numbers themselves, whose bits are in their order, so that roots near 0 have all
  their digits. Differentiable in the value and in whatever `rising` depends on, by the implicit function theorem.
  """
  integer = jnp.int64 if value.dtype == jnp.float64 else jnp.int32
  number = lambda bits: jax.lax.bitcast_convert_type(bits, value.dtype)
  start = tuple(jax.lax.bitcast_convert_type(jnp.full_like(value, end), integer) for end in (low, high))

  def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    left, right = ends
    middle = left + (right - left) // 2
    below = rising(number(middle)) < value
    return jnp.where(below, middle, left), jnp.where(below, right, middle)

  root = jax.lax.stop_gradient(number(jax.lax.fori_loop(0, jnp.iinfo(integer).bits, halve, start)[1]))
  missing, rate = slope(lambda t: value - rising(t), root)
  derivative = (missing - jax.lax.stop_gradient(missing)) / jnp.where(rate < 0, -jax.lax.stop_gradient(rate), jnp.inf)
  return root + jnp.where(jnp.isfinite(missing), derivative, 0.0)


def table_entry(table: Float[Array, " n"], step: Step) -> Float[Array, "..."]:
  """The entry of a table at an integer step `0 .. n - 1`; NaN where a traced or an array step lies outside.

  Raises:
    TypeError: for a step that is not an integer.
    ValueError: for a Python integer outside the table.
  """
  if isinstance(step, int) and not 0 <= step < table.size:
    raise ValueError(f"the step must lie in 0..{table.size - 1}, got {step}")
  step = jnp.asarray(step)
  if not jnp.issubdtype(step.dtype, jnp.integer):
    raise TypeError(f"the step must be an integer, got {step.dtype}: chain.index(time) gives the step of a time")
  return table.at[jnp.where(step < 0, table.size, step)].get(mode="fill", fill_value=jnp.nan)


def piecewise_linear(
  nodes: Float[Array, " nodes"], rises: Float[Array, " pieces"], t: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Value and slope of the function linear between its values nodes[i] at t = i / n; the end pieces go on outside.

  Args:
    nodes: values at t = 0, 1 / n, .. 1.
    rises: their differences, given apart because they have digits that the differences of rounded nodes have lost.
    t: times.

  Returns:
    (value, slope), each of the shape of t. At a node the slope is that of the piece before it.
  """
  nodes, rises = nodes.astype(t.dtype), rises.astype(t.dtype)
  position = t * rises.size
  piece = jnp.clip(jnp.ceil(position) - 1, 0, rises.size - 1)
  index = piece.astype(jnp.int32)
  rise = rises[index]
  return nodes[index] + (position - piece).astype(nodes.dtype) * rise, rises.size * rise


def _is_number(value: Any) -> bool:
  return not isinstance(value, jax.core.Tracer)


def _check_inverse(sde: Any) -> None:
  """Refuse a process whose `time_of_log_snr` does not invert its log-SNR halfway through."""
  log_snr = lambda t: 2 * (jnp.log(sde.marginal(t)[0]) - jnp.log(sde.marginal(t)[1]))
  middle = 0.5 * float_time(sde.t1)
  value = log_snr(middle)
  time = sde.time_of_log_snr(value)
  error = jnp.abs(log_snr(time) - value)
  if _is_number(error) and jnp.isfinite(value) and not error <= _INVERSE_TOLERANCE * (1 + jnp.abs(value)):
    raise ValueError(
      f"{type(sde).__name__}.time_of_log_snr must be the inverse of log(alpha^2 / sigma^2) of its marginal: at t = "
      f"{middle} that is {value}, for which it gives t = {time}"
    )


def _derived_time(sde: Any, noise_to_signal: float) -> Float[Array, ""]:
  time = sde.time_of_log_snr(-2 * jnp.log(float_time(noise_to_signal)))
  time = jnp.where(time <= 0, 0.0, time)  # a process that starts at 0 stays there, also as its parameters change
  if _is_number(time) and _is_number(sde.t1) and not time < sde.t1:
    raise ValueError(
      f"the process never gets to sigma / alpha = {noise_to_signal} before its last time, t1 = {sde.t1}: give it more "
      f"noise, or pass t0; got {sde}"
    )
  silent = sde.marginal(time)[1] <= 0
  if _is_number(silent) and silent:
    raise ValueError(f"the noise of the process starts too steeply to have a smallest time: pass t0; got {sde}")
  return time


def start_time(sde: Any, t0: Scalar | None, noise_to_signal: float) -> Float[Array, ""]:
  """The smallest time of a loss, a sampler or a likelihood.

  Args:
    sde: a process with scalar marginals.
    t0: the time itself, or None for the time at which sigma / alpha = `noise_to_signal`; a process that never gets as
      clean as that (VE has sigma_min at t = 0) starts at 0.
    noise_to_signal: `SAMPLING_NOISE_TO_SIGNAL` or `TRAINING_NOISE_TO_SIGNAL`. One ratio serves all processes where one
      time cannot: VP at t = 1e-3 has sigma = 0.0105, VE has 0.0101, EDM 0.001.

  Returns:
    A scalar.

  Raises:
    ValueError: if t0 lies outside [0, t1), or there is no noise at t0; if `time_of_log_snr` of the process is wrong.
  """
  if t0 is not None and _is_number(t0) and _is_number(sde.t1) and not 0 <= float(t0) < float(sde.t1):
    raise ValueError(f"t0 must lie in [0, t1) = [0, {sde.t1}), got {t0}")
  with jax.ensure_compile_time_eval():
    _check_inverse(sde)
    if t0 is None:
      return _derived_time(sde, noise_to_signal)
    t0 = float_time(t0)
    silent = sde.marginal(t0)[1] <= 0
  if _is_number(silent) and silent:
    raise ValueError(f"t0 = {t0} has no noise (sigma = 0), so no score: take a small positive t0, or t0=None")
  return t0


def time_grid(
  sde: Any,
  steps: int,
  kind: Literal["log_snr", "uniform", "karras"] = "log_snr",
  t0: Scalar | None = None,
  rho: float = 7.0,
) -> Float[Array, " {steps}+1"]:
  """Times from the prior to the data, where a sampler steps.

  Args:
    sde: a process with scalar marginals.
    steps: number of steps.
    kind: what is evenly spaced: "log_snr" (log of alpha^2 / sigma^2), "uniform" (t itself), or "karras"
      ((sigma / alpha)^(1 / rho)). A grid uniform in t takes steps that are too long near the data and makes fine
      scales collapse when steps are few.
    t0: the last time; None for the time at which sigma / alpha = 2e-3 (see `start_time`).
    rho: exponent of the "karras" grid.

  Returns:
    Decreasing times `[steps + 1]`, from exactly `sde.t1` to exactly `t0`.

  Raises:
    ValueError: for steps below 1, an unknown kind, a t0 outside [0, t1).
    TypeError: for steps that are no integer, a process without scalar marginals.

  Example:
    >>> import jaxdiff as jd
    >>> [round(float(t), 3) for t in jd.time_grid(jd.EDM(sigma_max=80.0), 4, kind="karras", t0=0.002)]
    [80.0, 17.528, 2.515, 0.17, 0.002]

  References:
    Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, eq. 5.
  """
  checks.made("sde", sde)
  if not all(hasattr(sde, name) for name in ("t1", "marginal", "time_of_log_snr")):
    raise TypeError(
      f"sde must be a process with scalar marginals, got {type(sde).__name__}: for a chain pass chain.sde(); for any "
      "other process give samplers decreasing times of your own, such as jnp.linspace(t1, t0, steps + 1)"
    )
  if not hasattr(steps, "__index__"):
    raise TypeError(f"steps must be an integer, got {steps!r}")
  if steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  if kind not in _KINDS:
    near = difflib.get_close_matches(str(kind), _KINDS, 1)
    raise ValueError(
      f"kind must be 'log_snr', 'uniform' or 'karras', got {kind!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    )
  with jax.ensure_compile_time_eval():
    return _grid(sde, steps, kind, start_time(sde, t0, SAMPLING_NOISE_TO_SIGNAL), rho)


def _grid(sde: Any, steps: int, kind: str, t0: Array, rho: float) -> Float[Array, " {steps}+1"]:
  first = float_time(sde.t1)
  last = t0.astype(first.dtype)
  fraction = jnp.linspace(0.0, 1.0, steps + 1, dtype=first.dtype)
  alpha, sigma = sde.marginal(jnp.stack([first, last]))
  ratio = sigma / alpha
  if kind == "uniform":
    times = first + fraction * (last - first)
  elif kind == "log_snr":
    times = sde.time_of_log_snr(-2 * (jnp.log(ratio[0]) + fraction * (jnp.log(ratio[1]) - jnp.log(ratio[0]))))
  else:
    root = ratio ** (1 / rho)
    times = sde.time_of_log_snr(-2 * rho * jnp.log(root[0] + fraction * (root[1] - root[0])))
  return times.at[0].set(first).at[-1].set(last)
