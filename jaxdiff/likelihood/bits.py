"""Bits per dimension of integer data.

An image of integers 0..L-1 has a probability, not a density: with u uniform on [0, 1)^d,

    -log2 P(n) / d  <=  E_u[ -log p(low + (high - low) (n + u) / L) ] / (d log 2) + log2(L / (high - low))

A model of integers that were noised without dequantization, as by `losses.vdm`, has a density at the noise of t0. With
z = alpha v_n + sigma eps around the centre v_n of the cell,

    -log P(n)  <=  E_z[ log q(z | n) - log p(z) - log p(n | z) ]

References:
  Theis et al. 2016, A Note on the Evaluation of Generative Models, Section 3.1; Ho et al. 2019, Flow++, Section 3.1,
  for a dequantization q that is not uniform.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Integer

from jaxdiff import checks, keys
from jaxdiff import status as codes
from jaxdiff.losses import decoders
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE, perturb
from jaxdiff.typing import NO_COND, Cond, Keys, LogProb, Scalar, ScoreFn, Status


class BitsPerDim(NamedTuple):
  """Bits per dimension of integer data.

  Attributes:
    value: upper bound (in expectation over the dequantization) on -log2 P(x) / d, example by example.
    standard_error: of `value`, over the probes: 0 for the exact trace, NaN for one probe.
    nfe: network evaluations spent on each example.
    status: how the solve went; code 3 marks integers outside 0..levels-1, whose value is NaN.
  """

  value: Float[Array, " b"]
  standard_error: Float[Array, " b"]
  nfe: Int[Array, " b"]
  status: Status


def dequantize(
  key: Keys, x: Integer[Array, "b *d"], levels: int, data_range: tuple[float, float] = (-1.0, 1.0)
) -> Float[Array, "b *d"]:
  """Uniform dequantization: low + (high - low) (x + u) / levels, u uniform in [0, 1).

  Args:
    key: one key, or one per example.
    x: integers 0..levels-1.
    levels: how many values there are: 256 for 8-bit images, 17 for scikit-learn's digits.
    data_range: (low, high), where the data go.

  Returns:
    float32 `[b, *d]`.

  Raises:
    TypeError: for data or levels that are not integers.
    ValueError: for levels below 2.
  """
  checks.levels(levels, data_range)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(
      f"x must be integers 0..{levels - 1}, got {x.dtype}. Bits per dimension belong to integer data: pass the raw "
      "integers, which are dequantized here; for continuous data report likelihood.log_prob, a density in nats"
    )
  low, high = data_range
  u = keys.uniform(keys.per_example(key, len(x)), x.shape)
  return low + (high - low) / levels * (x.astype(u.dtype) + u)


def nats_to_bits_per_dim(
  log_prob: Float[Array, " b"], dimension: int, levels: int, data_range: tuple[float, float] = (-1.0, 1.0)
) -> Float[Array, " b"]:
  """Bits per dimension of integers from the log-density, in nats, of their dequantized values in data_range."""
  checks.levels(levels, data_range)
  low, high = data_range
  return -log_prob / (dimension * math.log(2)) + math.log2(levels / (high - low))


def bits_per_dim(
  log_prob: Callable[..., LogProb], levels: int, data_range: tuple[float, float] = (-1.0, 1.0)
) -> Callable[..., BitsPerDim]:
  """Bits per dimension of integer data under uniform dequantization.

  Args:
    log_prob: what `likelihood.log_prob` returned.
    levels: how many values an integer of the data can take.
    data_range: (low, high), where the model was trained to expect the data.

  Returns:
    fn(key, x: integers [b, *d], score, cond={}) -> BitsPerDim; one draw of the dequantization, from example keys.

  Raises:
    ValueError: for levels below 2.
    TypeError: for levels that are no integer or `likelihood.log_prob` itself; when called, for data that are not
      integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> bits = jd.likelihood.bits_per_dim(jd.likelihood.log_prob(jd.VP()), levels=2, data_range=(-4.0, 4.0))
    >>> x = jnp.zeros((1, 2), jnp.uint8)
    >>> bits(jax.random.key(0), x, lambda x, t: -x).value.shape
    (1,)
  """
  checks.made("log_prob", log_prob)
  checks.levels(levels, data_range)

  def fn(key: Keys, x: Integer[Array, "b *d"], score: ScoreFn, cond: Cond = NO_COND) -> BitsPerDim:
    dequantize_key, probe_key = keys.split(keys.per_example(key, len(x)))
    result = log_prob(probe_key, dequantize(dequantize_key, x, levels, data_range), score, cond)
    dimension = math.prod(x.shape[1:])
    highest = min(levels - 1, jnp.iinfo(x.dtype).max)  # x < 256 would wrap to x < 0 for uint8
    inside = jnp.all((x >= 0) & (x <= highest), axis=range(1, x.ndim))
    bits = nats_to_bits_per_dim(result.value, dimension, levels, data_range)
    status = result.status._replace(code=jnp.where(inside, result.status.code, codes.NOT_IN_LEVELS))
    error = result.standard_error / (dimension * math.log(2))
    return BitsPerDim(jnp.where(inside, bits, jnp.nan), error, result.nfe, status)

  return fn


def variational_bits_per_dim(
  sde: ScalarSDE,
  log_prob: Callable[..., LogProb],
  levels: int,
  data_range: tuple[float, float] = (-1.0, 1.0),
  t0: Scalar | None = None,
) -> Callable[..., BitsPerDim]:
  """Bits per dimension of integer data dequantized by the noise of the process at t0: for models trained on integers.

  Args:
    sde: the process.
    log_prob: what `likelihood.log_prob` returned for this process and this t0.
    levels: how many values an integer of the data can take.
    data_range: (low, high), where the integers go, each to the centre of its cell.
    t0: the t0 that `log_prob` was made with, or None where it had none: with another the result is no bound.

  Returns:
    fn(key, x: integers [b, *d], score, cond={}) -> BitsPerDim; one draw of the noise, from example keys.

  Raises:
    ValueError: for levels below 2, a t0 outside [0, t1).
    TypeError: when called with data that are not integers.
  """
  checks.levels(levels, data_range)
  start = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def fn(key: Keys, x: Integer[Array, "b *d"], score: ScoreFn, cond: Cond = NO_COND) -> BitsPerDim:
    noise_key, probe_key = keys.split(keys.per_example(key, len(x)))
    x0, alpha, sigma = decoders.integer_values(x, levels, data_range), *sde.marginal(start)
    z, noise = perturb(noise_key, x0, start, sde)
    result = log_prob(probe_key, z, score, cond)
    log_q = decoders.gaussian_log_prob(noise, jnp.zeros_like(noise), jnp.ones_like(sigma)) - x0[0].size * jnp.log(sigma)
    log_decoded = decoders.nearest_level_log_prob(x, z, alpha, sigma, levels, data_range)
    to_bits = 1 / (x0[0].size * math.log(2))
    inside = jnp.all(jnp.isfinite(x0), axis=range(1, x.ndim))
    status = result.status._replace(code=jnp.where(inside, result.status.code, codes.NOT_IN_LEVELS))
    bits = to_bits * (log_q - result.value - log_decoded)
    return BitsPerDim(jnp.where(inside, bits, jnp.nan), to_bits * result.standard_error, result.nfe, status)

  return fn
