"""Noise schedules as functions of time, and the time grids on which samplers step.

    linear   beta(t) = beta_min + t (beta_max - beta_min),  B(t) = int_0^t beta     (Ho et al. 2020)
    cosine   alpha = cos(theta t),  sigma = sin(theta t)          (after Nichol & Dhariwal 2021, without their offset)

Every noise level of every process has one log-SNR, log(alpha^2 / sigma^2): grids and default times are set by it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff.typing import Scalar, Step, Time

SAMPLING_NOISE_TO_SIGNAL = 2e-3
TRAINING_NOISE_TO_SIGNAL = 1e-3


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


def invert(
  rising: Callable[[Array], Array], value: Float[Array, "..."], low: Scalar, high: Scalar
) -> Float[Array, "..."]:
  """Where an elementwise increasing function takes this value, within [low, high]: bisection to the last digit.

  Differentiable in the value and in whatever `rising` depends on: one Newton step from the root carries the derivative.
  """
  bits = jnp.finfo(value.dtype).nmant + 4
  start = jnp.full_like(value, low), jnp.full_like(value, high)

  def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    left, right = ends
    middle = 0.5 * (left + right)
    below = rising(middle) < value
    return jnp.where(below, middle, left), jnp.where(below, right, middle)

  left, right = jax.lax.stop_gradient(jax.lax.fori_loop(0, bits, halve, start))
  root = 0.5 * (left + right)
  reached, slope = jax.jvp(rising, (root,), (jnp.ones_like(root),))
  newton = root + (value - reached) / jax.lax.stop_gradient(slope)
  return jnp.clip(jnp.where(slope > 0, newton, root), low, high)


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
  position = t * rises.size
  piece = jnp.clip(jnp.ceil(position) - 1, 0, rises.size - 1)
  index = piece.astype(jnp.int32)
  rise = rises[index]
  return nodes[index] + (position - piece).astype(nodes.dtype) * rise, rises.size * rise


def _is_number(value: Any) -> bool:
  return not isinstance(value, jax.core.Tracer)


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
    ValueError: if t0 lies outside [0, t1), or there is no noise at t0.
  """
  if t0 is not None and _is_number(t0) and _is_number(sde.t1) and not 0 <= float(t0) < float(sde.t1):
    raise ValueError(f"t0 must lie in [0, t1) = [0, {sde.t1}), got {t0}")
  with jax.ensure_compile_time_eval():
    if t0 is None:
      return jnp.maximum(sde.time_of_log_snr(-2 * jnp.log(float_time(noise_to_signal))), 0.0)
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

  Example:
    >>> import jaxdiff as jd
    >>> [round(float(t), 3) for t in jd.time_grid(jd.EDM(sigma_max=80.0), 4, kind="karras", t0=0.002)]
    [80.0, 17.528, 2.515, 0.17, 0.002]

  References:
    Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, eq. 5.
  """
  if steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
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
  elif kind == "karras":
    root = ratio ** (1 / rho)
    times = sde.time_of_log_snr(-2 * rho * jnp.log(root[0] + fraction * (root[1] - root[0])))
  else:
    raise ValueError(f"kind must be 'log_snr', 'uniform' or 'karras', got {kind!r}")
  return times.at[0].set(first).at[-1].set(last)
