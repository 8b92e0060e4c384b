"""Decoders: the probability of data given the state next to it, p(x_0 | x_1).

Integers k = 0..levels-1 sit at the centres low + (high - low) (k + 1/2) / levels of equal cells of the data range, over
which `likelihood.dequantize` spreads them. (Images scaled as k / 127.5 - 1 reach the ends of the range instead.) An
integer outside 0..levels-1 has the log-probability NaN.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jaxdiff import checks
from jaxdiff.typing import State

Values = Float[Array, "..."]

_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
_FAR = -10.0
_NARROW = 0.004


def level_values(levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> Float[Array, " {levels}"]:
  """Where the integers 0..levels-1 sit in the data range: the centres of its cells.

  Raises:
    ValueError: for levels below 2 or an empty data range.

  Example:
    >>> from jaxdiff.losses import decoders
    >>> [float(v) for v in decoders.level_values(4, (-1.0, 1.0))]
    [-0.75, -0.25, 0.25, 0.75]
  """
  checks.levels(levels, data_range)
  return _place(jnp.arange(levels), 0.5, levels, data_range)


def _place(x: Integer[Array, "..."], inside: float, levels: int, data_range: tuple[float, float]) -> Values:
  """low + (high - low) (x + inside) / levels: 0 gives the lower edge of a cell, 1 the upper, 1/2 the centre."""
  checks.levels(levels, data_range)
  low, high = data_range
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(f"x must be integers 0..{levels - 1}, got {x.dtype}: pass the raw integers, not scaled data")
  wide = x.astype(jnp.int32)
  places = low + (high - low) * ((wide.astype(jnp.result_type(float)) + inside) / levels)
  return jnp.where((wide >= 0) & (wide < levels), places, jnp.nan)


def integer_values(x: Integer[Array, "b *d"], levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> State:
  """The integers at their places in the data range, `level_values[x]`; NaN for integers outside 0..levels-1.

  Raises:
    TypeError: for data that are not integers.
    ValueError: for levels below 2 or an empty data range.
  """
  return _place(x, 0.5, levels, data_range)


def _per_coordinate(value: Values, x: State) -> Values:
  """A scalar, `[b]`, or a value of as many axes as x, with as many axes as x and of its type."""
  return value.astype(x.dtype).reshape(value.shape + (1,) * (x.ndim - value.ndim))


def _sum(values: Array) -> Float[Array, " b"]:
  return jnp.sum(values, axis=range(1, values.ndim))


def gaussian_log_prob(x: State, mean: State, std: Values) -> Float[Array, " b"]:
  """Log-density of N(mean, std^2) at x, in nats, summed over the dimensions.

  Args:
    x: data `[b, *d]`.
    mean: `[b, *d]`.
    std: a scalar, `[b]`, or of as many axes as x.

  Returns:
    `[b]`.
  """
  std = _per_coordinate(std, x)
  away = (x - mean) / std
  return _sum(-0.5 * away**2 - jnp.log(jnp.broadcast_to(std, x.shape)) - _LOG_ROOT_TWO_PI)


def _log_mills(x: Array) -> Array:
  """log(Phi / phi) for x below -10, from the asymptotic series of Phi."""
  inverse = 1 / x**2
  return -jnp.log(-x) + jnp.log1p(-inverse * (1 - inverse * (3 - 15 * inverse)))


def _log_cdf(x: Array) -> Array:
  """log Phi, with gradients that stay finite and exact however far out x is."""
  far = x < _FAR
  tail = jnp.where(far, x, _FAR)
  near = jax.scipy.special.log_ndtr(jnp.where(far, 0.0, x))
  return jnp.where(far, -0.5 * tail**2 - _LOG_ROOT_TWO_PI + _log_mills(tail), near)


def _log_one_minus_ratio(a: Array, b: Array, half: Array, log_b: Array) -> Array:
  """log(1 - Phi(a) / Phi(b)) for a + b <= 0, b - a = 2 half > 0, log_b = log Phi(b).

  The logarithm of the ratio is the difference of those of Phi; taken to first order where they are too close for that,
  and from their asymptotic series where they are too large.
  """
  middle, far = 0.5 * (a + b), b < _FAR
  narrow = ~far & (half < _NARROW)
  in_tail = 2 * half * middle + _log_mills(jnp.where(far, a, _FAR - 1)) - _log_mills(jnp.where(far, b, _FAR))
  log_a = _log_cdf(jnp.maximum(a, 3 * _FAR))
  log_hazard = -0.5 * middle**2 - _LOG_ROOT_TWO_PI - 0.5 * (log_a + log_b)
  first_order = -2 * half * jnp.exp(jnp.where(narrow, log_hazard, 0.0))
  log_ratio = jnp.where(far, in_tail, jnp.where(narrow, first_order, log_a - log_b))
  return jnp.log(-jnp.expm1(log_ratio))


def discretized_gaussian_log_prob(
  x: Integer[Array, "b *d"],
  mean: State,
  log_std: Values,
  levels: int,
  data_range: tuple[float, float] = (-1.0, 1.0),
) -> Float[Array, " b"]:
  """Log-probability of integers under a Gaussian integrated over each integer's cell; the end cells reach to infinity.

  Stable in float32 however small the probability: its logarithm and the gradient of that stay finite.

  Args:
    x: integers 0..levels-1.
    mean: `[b, *d]`, in the data range.
    log_std: logarithm of the standard deviation in units of the data range: a scalar, `[b]`, or of as many axes as x.
    levels: how many values an integer of the data can take.
    data_range: (low, high), the range of the data.

  Returns:
    `[b]`, nats, summed over the dimensions.

  Raises:
    TypeError: for data that are not integers.
    ValueError: for levels below 2 or an empty data range.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff.losses import decoders
    >>> density = jax.jit(decoders.discretized_gaussian_log_prob, static_argnums=3)
    >>> log_prob = density(jnp.array([[0]]), jnp.zeros((1, 1)), 0.0, 2)  # two levels, one on each side of the mean
    >>> round(float(jnp.exp(log_prob[0])), 4)
    0.5

  References:
    Ho et al. 2020, eq. 13.
  """
  inverse = jnp.broadcast_to(jnp.exp(-_per_coordinate(log_std, mean)), mean.shape)
  edges = (_place(x, inside, levels, data_range).astype(mean.dtype) for inside in (0.0, 1.0))
  low, high = ((edge - mean) * inverse for edge in edges)
  first, last = x == 0, x.astype(jnp.int32) == levels - 1
  # A cell to the right of 0 is mirrored to the left, where Phi has all its digits.
  mirrored = ~first & (last | (low + high > 0))
  a, b = jnp.where(mirrored, -high, low), jnp.where(mirrored, -low, high)
  log_b = _log_cdf(b)
  bounded = ~first & ~last
  half = 0.5 * (data_range[1] - data_range[0]) / levels * inverse
  safe = (jnp.where(bounded, value, other) for value, other in ((a, -1.0), (b, 1.0), (half, 1.0), (log_b, 0.0)))
  return _sum(log_b + jnp.where(bounded, _log_one_minus_ratio(*safe), 0.0))


def nearest_level_log_prob(
  x: Integer[Array, "b *d"],
  z: State,
  alpha: Values,
  sigma: Values,
  levels: int,
  data_range: tuple[float, float] = (-1.0, 1.0),
) -> Float[Array, " b"]:
  """Log-probability of integers given a noisy state z, with every level weighted by how well it explains z.

      p(x = k | z) = exp(-(z - alpha v_k)^2 / (2 sigma^2)) / sum_j exp(-(z - alpha v_j)^2 / (2 sigma^2))

  each coordinate by itself: the exact posterior for levels of equal probability. It has no parameters. Memory: the
  array `[b, *d, levels]`.

  Args:
    x: integers 0..levels-1.
    z: `[b, *d]`, data at the noise level (alpha, sigma).
    alpha: a scalar, `[b]`, or of as many axes as x.
    sigma: as alpha.
    levels: how many values an integer of the data can take.
    data_range: (low, high), the range of the data.

  Returns:
    `[b]`, nats, summed over the dimensions.

  Raises:
    TypeError: for data that are not integers.
    ValueError: for levels below 2 or an empty data range.

  References:
    Kingma et al. 2021, Variational Diffusion Models, Section 3.3.
  """
  alpha, sigma = (_per_coordinate(value, z) for value in (alpha, sigma))
  fit = lambda z, value, alpha, sigma: -0.5 * ((z - alpha * value) / sigma) ** 2
  every = level_values(levels, data_range).astype(z.dtype).reshape((1,) * z.ndim + (-1,))
  total = jax.nn.logsumexp(fit(z[..., None], every, alpha[..., None], sigma[..., None]), axis=-1)
  return _sum(fit(z, integer_values(x, levels, data_range).astype(z.dtype), alpha, sigma) - total)
