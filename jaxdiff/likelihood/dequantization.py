"""Dequantization: from integers n to a state z of the model, whose density bounds the probability of n.

With any q(z | n), and any p(n | z) that sums to one over n (or to less),

    -log P(n)  <=  E_q[ log q(z | n) - log p(n | z) - log p(z) ]                                                     (1)

The cell of n is [low + n w, low + (n + 1) w] with w = (high - low) / levels, its centre v_n. p(n | z) = 1 in the cell:

    uniform            z uniform in the cell                                log q = -d log w
    truncated_normal   z = alpha v_n + sigma eps, eps normal in [-tau, tau] log q = log N(eps) - d log(sigma Z)
                       with tau = alpha w / (2 sigma), Z = erf(tau / sqrt(2))
    variational        z = low + w (n + u), u = f(eps, n), eps normal       log q = log N(eps) - log|det f'| - d log w

and in the last one every integer explains z, p(n | z) being `losses.decoders.nearest_level_log_prob`:

    gaussian           z = alpha v_n + sigma eps, the noise of the process  log q = log N(eps) - d log sigma

tau is the half-width of the cell alpha [n w, (n + 1) w] in units of sigma: the largest with which the cells do not
overlap, so that (1) is a bound.

References:
  Theis et al. 2016, A Note on the Evaluation of Generative Models, Section 3.1 (uniform); Zheng et al. 2023, Improved
  Techniques for Maximum Likelihood Estimation for Diffusion ODEs (truncated normal); Ho et al. 2019, Flow++,
  Section 3.1 (variational); Kingma et al. 2021, Variational Diffusion Models, Section 3.3 (the noise of the process).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer, Key

from jaxdiff import checks, keys
from jaxdiff.losses import decoders
from jaxdiff.losses.score_matching import Loss
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar

Range = tuple[float, float]
Draw = tuple[Float[Array, "b *d"], Float[Array, " b"]]
Flow = Callable[[Float[Array, "b *d"], Float[Array, "b *d"]], Draw]

_ROOT_TWO = math.sqrt(2)
_OWN_PART = 2**20  # of a key, far from those that a loss splits it into


class Dequantization(NamedTuple):
  """A distribution of states given integers. Numbers are drawn in float32, so that float64 sees the same ones.

  Attributes:
    draw: `(key: [b], x: integers [b, *d], levels, data_range) -> (z: [b, *d], log_ratio: [b])`, where log_ratio is
      log q(z | x) - log p(x | z) in nats: -log P(x) <= E[log_ratio - log p(z)].
    noise: (alpha, sigma) at the t0 for which z is made, or None if it fits any.
  """

  draw: Callable[[Key[Array, " b"], Integer[Array, "b *d"], int, Range], Draw]
  noise: tuple[Array, Array] | None = None


def dequantize(
  key: Keys, x: Integer[Array, "b *d"], levels: int, data_range: Range = (-1.0, 1.0)
) -> Float[Array, "b *d"]:
  """Uniform dequantization: low + (high - low) (x + u) / levels, u uniform in [0, 1).

  Args:
    key: one key, or one per example.
    x: integers 0..levels-1.
    levels: how many values there are: 256 for 8-bit images, 17 for scikit-learn's digits.
    data_range: (low, high), where the data go.

  Returns:
    `[b, *d]`, float32 (float64 with x64).

  Raises:
    TypeError: for data or levels that are not integers.
    ValueError: for levels below 2.
  """
  check_integers(x, levels, data_range)
  u = keys.uniform(keys.per_example(key, len(x)), x.shape)
  return _in_cell(x, _wide(u), levels, data_range)


def check_integers(x: Array, levels: int, data_range: Range) -> None:
  """Refuse data that are not integers, and levels and ranges that are none."""
  checks.levels(levels, data_range)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(
      f"x must be integers 0..{levels - 1}, got {x.dtype}. Bits per dimension belong to integer data: pass the raw "
      "integers, which are dequantized here; for continuous data report likelihood.log_prob, a density in nats"
    )


def uniform() -> Dequantization:
  """z uniform in the cell of its integer.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> key, x = jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 3), jnp.uint8)
    >>> z, log_ratio = jd.likelihood.dequantization.uniform().draw(key, x, 2, (0.0, 4.0))
    >>> bool(jnp.all((z >= 0) & (z < 2))), round(float(log_ratio[0]), 3)  # -3 log 2
    (True, -2.079)
  """

  def draw(key: Key[Array, " b"], x: Integer[Array, "b *d"], levels: int, data_range: Range) -> Draw:
    z = dequantize(key, x, levels, data_range)
    return z, jnp.full(len(x), -x[0].size * math.log(_width(levels, data_range)), z.dtype)

  return Dequantization(draw)


def truncated_normal(sde: ScalarSDE, t0: Scalar | None = None) -> Dequantization:
  """The noise of the process at t0, cut off at the edges of the cell: for models trained on integers. Nothing to train.

  A model of uniformly dequantized data has a density that is flat in the cells, on which it loses log2(2 tau) less the
  entropy of the truncated normal in bits a dimension: 0.01 at tau = 1, 0.56 at tau = 3, log2(tau) - 1.05 beyond.

  Args:
    sde: the process.
    t0: the t0 that the log-density was made with, or None where it had none.

  Raises:
    ValueError: for a t0 outside [0, t1).

  Example:
    >>> import jaxdiff as jd
    >>> sde = jd.VP()
    >>> dequantization = jd.likelihood.dequantization.truncated_normal(sde)
    >>> bits = jd.likelihood.bits_per_dim(jd.likelihood.log_prob(sde), levels=17, dequantization=dequantization)

  References:
    Zheng et al. 2023, Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs.
  """
  noise = _noise(sde, t0)

  def draw(key: Key[Array, " b"], x: Integer[Array, "b *d"], levels: int, data_range: Range) -> Draw:
    alpha, sigma = noise
    u = keys.uniform(key, x.shape)
    # The middle of u's own interval: symmetric, and never an end, whose quantile is infinite where Z rounds to 1.
    centred = _wide(2 * u - 1 + jnp.finfo(u.dtype).eps)
    tau = alpha * (0.5 * _width(levels, data_range)) / sigma
    inside = jax.scipy.special.erf(tau / _ROOT_TWO)
    eps = jnp.clip(_ROOT_TWO * jax.scipy.special.erfinv(inside * centred), -tau, tau)
    z = alpha * decoders.integer_values(x, levels, data_range) + sigma * eps
    return z, _standard_normal(eps) - x[0].size * (jnp.log(sigma) + jnp.log(inside))

  return Dequantization(draw, noise)


def gaussian(sde: ScalarSDE, t0: Scalar | None = None) -> Dequantization:
  """The noise of the process at t0, with p(x | z) what z says by itself: for models trained on integers.

  A model that was trained on integers with uniform noise spreads its density over the cells, and loses bits by it.

  Args:
    sde: the process.
    t0: the t0 that the log-density was made with, or None where it had none.

  Raises:
    ValueError: for a t0 outside [0, t1).

  References:
    Kingma et al. 2021, Section 3.3.
  """
  noise = _noise(sde, t0)

  def draw(key: Key[Array, " b"], x: Integer[Array, "b *d"], levels: int, data_range: Range) -> Draw:
    alpha, sigma = noise
    eps = _wide(keys.normal(key, x.shape))
    z = alpha * decoders.integer_values(x, levels, data_range) + sigma * eps
    log_decoded = decoders.nearest_level_log_prob(x, z, alpha, sigma, levels, data_range)
    return z, _standard_normal(eps) - x[0].size * jnp.log(sigma) - log_decoded

  return Dequantization(draw, noise)


def variational(flow: Flow) -> Dequantization:
  """Noise from a conditional flow, trained by `likelihood.dequantized` for a model whose density is rough in a cell.

  Args:
    flow: `(eps: [b, *d], x: [b, *d]) -> (u: [b, *d] in [0, 1], log|det du/deps|: [b])`, invertible in eps: where the
      normal numbers eps go in the cell, x being its centre. `models.Dequantizer` is one, with its parameters bound.

  References:
    Ho et al. 2019, Section 3.1.
  """
  checks.made("flow", flow)

  def draw(key: Key[Array, " b"], x: Integer[Array, "b *d"], levels: int, data_range: Range) -> Draw:
    eps = keys.normal(key, x.shape)
    u, log_det = flow(eps, decoders.integer_values(x, levels, data_range).astype(eps.dtype))
    if u.shape != x.shape or log_det.shape != x.shape[:1]:
      raise ValueError(
        f"flow must return u {x.shape} and log|det| {x.shape[:1]}, one number per example; got {u.shape} and "
        f"{log_det.shape}"
      )
    log_q = _standard_normal(eps) - log_det.astype(eps.dtype) - x[0].size * math.log(_width(levels, data_range))
    return _in_cell(x, _wide(u), levels, data_range), _wide(log_q)

  return Dequantization(draw)


def dequantized(loss: Loss, dequantization: Dequantization, levels: int, data_range: Range = (-1.0, 1.0)) -> Loss:
  """A loss on integers, from a bound on -log of the density of continuous data: the bound (1), in nats.

  Its gradient trains the dequantization, the model, or both: close over what is trained inside the differentiated
  function.

  Args:
    loss: `losses.bound` without levels, or any other whose mean bounds -log p(x).
    dequantization: `uniform()` or `variational(flow)`, which are for data at t = 0.
    levels: how many values an integer of the data can take.
    data_range: (low, high), where the model expects the data.

  Returns:
    loss(key, x: integers [b, *d], network, cond={}, u=None) -> (bound on -log P(x) [b], aux), aux in bits per
    dimension: what `loss` has, "dequantization", and the whole as "bits_per_dim".

  Raises:
    ValueError: for levels below 2, or a dequantization at t0.
    TypeError: for a factory given where what it makes is due; when called, for data that are not integers.
  """
  checks.made("loss", loss)
  checks.made("dequantization", dequantization, Dequantization)
  checks.levels(levels, data_range)
  if dequantization.noise is not None:
    raise ValueError("dequantization must be uniform() or variational(flow): losses noise their data themselves")

  def fn(
    key: Keys,
    x: Integer[Array, "b *d"],
    network: Network,
    cond: Cond = NO_COND,
    u: Float[Array, " b"] | None = None,
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    check_integers(x, levels, data_range)
    draw_key = keys.fold_in(keys.per_example(key, len(x)), _OWN_PART)
    z, log_ratio = dequantization.draw(draw_key, x, levels, data_range)
    value, aux = loss(key, z, network, cond, u)
    to_bits = 1 / (x[0].size * math.log(2))
    costs = {"dequantization": to_bits * log_ratio, "bits_per_dim": to_bits * (value + log_ratio)}
    return value + log_ratio, {**aux, **costs}

  return fn


def _noise(sde: ScalarSDE, t0: Scalar | None) -> tuple[Array, Array]:
  checks.made("sde", sde, ScalarSDE)
  return sde.marginal(start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL))


def _wide(values: Array) -> Array:
  return values.astype(jnp.result_type(float))


def _width(levels: int, data_range: Range) -> float:
  return (data_range[1] - data_range[0]) / levels


def _in_cell(x: Array, u: Array, levels: int, data_range: Range) -> Array:
  return data_range[0] + _width(levels, data_range) * (x.astype(u.dtype) + u)


def _standard_normal(eps: Array) -> Float[Array, " b"]:
  return decoders.gaussian_log_prob(eps, jnp.zeros_like(eps), jnp.ones((), eps.dtype))
