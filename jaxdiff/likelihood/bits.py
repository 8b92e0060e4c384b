"""Bits per dimension of integer data.

An image of integers has a probability P(n), not a density. K draws z_k of a dequantization q have the log weights

    log w_k = log p(z_k) + log p(n | z_k) - log q(z_k | n)

whose mean is a lower bound on log P(n), in expectation, as is the logarithm of the mean of the weights, which is
tighter and tends to log P(n) as K grows:

    -log P(n)  <=  -E log 1/K sum_k w_k  <=  -E 1/K sum_k log w_k                                                    (1)

The left one needs the weights themselves: noise of variance s^2 in log p(z_k) makes w_k larger by s^2 / 2 nats on
average, and the result no bound. So it is refused for traces that are estimated by probes.

References:
  Theis et al. 2016, A Note on the Evaluation of Generative Models, Section 3.1; Burda et al. 2016, Importance Weighted
  Autoencoders, Theorem 1 (the order in (1)).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Integer

from jaxdiff import checks, keys
from jaxdiff import status as codes
from jaxdiff.divergence import Divergence
from jaxdiff.flow import LogDensity
from jaxdiff.likelihood import dequantization as dequantizations
from jaxdiff.likelihood.dequantization import Dequantization
from jaxdiff.typing import NO_COND, Cond, Keys, ScoreFn, Status

_SAME_NOISE = 1e-4


class BitsPerDim(NamedTuple):
  """Bits per dimension of integer data.

  Attributes:
    value: upper bound (in expectation over the draws) on -log2 P(x) / d, example by example.
    standard_error: of `value`, over the probes: 0 for the exact trace, NaN for one probe.
    dequantization_error: of `value`, over the draws of the dequantization, each of which has probes of its own: so it
      contains `standard_error`. NaN for one draw.
    nfe: network evaluations spent on each example, over all draws.
    status: how the solves went, over all draws; code 3 marks integers outside 0..levels-1, whose value is NaN.
  """

  value: Float[Array, " b"]
  standard_error: Float[Array, " b"]
  dequantization_error: Float[Array, " b"]
  nfe: Int[Array, " b"]
  status: Status


def nats_to_bits_per_dim(
  log_prob: Float[Array, " b"], dimension: int, levels: int, data_range: tuple[float, float] = (-1.0, 1.0)
) -> Float[Array, " b"]:
  """Bits per dimension of integers from the log-density, in nats, of their dequantized values in data_range."""
  checks.levels(levels, data_range)
  low, high = data_range
  return -log_prob / (dimension * math.log(2)) + math.log2(levels / (high - low))


def bits_per_dim(
  log_prob: LogDensity,
  levels: int,
  data_range: tuple[float, float] = (-1.0, 1.0),
  dequantization: Dequantization | None = None,
  draws: int = 1,
  importance: bool = False,
) -> Callable[..., BitsPerDim]:
  """Bits per dimension of integer data.

  Args:
    log_prob: what `likelihood.log_prob` returned, or the `log_prob` of `flow.cnf`.
    levels: how many values an integer of the data can take.
    data_range: (low, high), where the model was trained to expect the data.
    dequantization: where in its cell an integer goes; None for `dequantization.uniform()`. Models that were trained on
      the integers, as by `losses.vdm`, need one that knows their noise at t0: `truncated_normal` or `gaussian`.
    draws: how many draws of it, K in (1), one after the other.
    importance: the bound of the mean weight, on the left in (1), rather than the mean of the bounds: exact traces only.

  Returns:
    fn(key, x: integers [b, *d], score, cond={}) -> BitsPerDim. Draw k of an example has the example's key folded with
    k: it is the same for any batch and any number of draws.

  Raises:
    ValueError: for levels below 2, draws below 1, a dequantization made for other noise than log_prob has at its t0,
      and importance weights of estimated traces (also when called, where the trace depends on the dimension).
    TypeError: for levels that are no integer or `likelihood.log_prob` itself; when called, for data that are not
      integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> bits = jd.likelihood.bits_per_dim(jd.likelihood.log_prob(jd.VP()), levels=2, data_range=(-4.0, 4.0))
    >>> x, score = jnp.zeros((1, 2), jnp.uint8), jax.tree_util.Partial(lambda x, t: -x)
    >>> jax.eval_shape(bits, jax.random.key(0), x, score).value.shape
    (1,)
  """
  if hasattr(log_prob, "log_prob"):
    raise TypeError(f"log_prob must be a log-density, got {type(log_prob).__name__}: pass its log_prob")
  checks.made("log_prob", log_prob, LogDensity)
  checks.levels(levels, data_range)
  checks.whole("draws", draws, 1)
  chosen = dequantizations.uniform() if dequantization is None else dequantization
  checks.made("dequantization", chosen, Dequantization)
  _check_noise(chosen, log_prob)
  if importance and log_prob.divergence is not None:
    check_exact(log_prob.divergence)

  def fn(key: Keys, x: Integer[Array, "b *d"], score: ScoreFn, cond: Cond = NO_COND) -> BitsPerDim:
    dequantizations.check_integers(x, levels, data_range)
    if importance:
      check_exact(log_prob.trace(x))
    inside = _inside(x, levels)
    example_key = keys.per_example(key, len(x))
    known = jnp.where(inside.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    def draw(k: Array) -> tuple[Array, Array, Array, Status]:
      draw_key, probe_key = keys.split(keys.fold_in(example_key, k))
      z, log_ratio = chosen.draw(draw_key, known, levels, data_range)
      result = log_prob(probe_key, z, score, cond)
      return result.value - log_ratio.astype(result.value.dtype), result.standard_error, result.nfe, result.status

    log_weights, probe_errors, nfe, status = jax.lax.map(draw, jnp.arange(draws))
    value, error = (log_mean_over_draws if importance else mean_over_draws)(log_weights)
    probe_error = jnp.sqrt(jnp.sum(probe_errors**2, axis=0)) / draws
    to_bits = 1 / (x[0].size * math.log(2))
    code = jnp.where(inside, jnp.max(status.code, axis=0), codes.NOT_IN_LEVELS)
    return BitsPerDim(
      jnp.where(inside, -to_bits * value, jnp.nan),
      to_bits * probe_error,
      to_bits * error,
      jnp.sum(nfe, axis=0),
      Status(code, jnp.sum(status.accepted, axis=0), jnp.sum(status.rejected, axis=0)),
    )

  return fn


def mean_over_draws(values: Float[Array, "k b"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """The mean over k, and its standard error."""
  count = len(values)
  mean = jnp.mean(values, axis=0)
  return mean, jnp.std(values, axis=0, ddof=1) / math.sqrt(count) if count > 1 else jnp.full_like(mean, jnp.nan)


def log_mean_over_draws(values: Float[Array, "k b"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """log mean exp over k, and its standard error by the delta method: that of the mean, relative to the mean."""
  largest = jnp.max(values, axis=0, keepdims=True)
  mean, error = mean_over_draws(jnp.exp(values - largest))
  return largest[0] + jnp.log(mean), error / mean


def _inside(x: Integer[Array, "b *d"], levels: int) -> Array:
  """Whether all integers of an example are 0..levels-1."""
  highest = min(levels - 1, jnp.iinfo(x.dtype).max)  # x < 256 would wrap to x < 0 for uint8
  return jnp.all((x >= 0) & (x <= highest), axis=range(1, x.ndim))


def check_exact(divergence: Divergence, factory: str = "likelihood.log_prob") -> None:
  """Refuse importance weights of estimated traces."""
  if not divergence.exact:
    raise ValueError(
      "importance=True needs the exact trace: the mean of exp(log p) over noisy estimates of log p is too large, by "
      f"half their variance in nats, and bounds nothing. Give {factory} divergence=divergence.exact(), or "
      "take importance=False, the mean over the draws"
    )


def _check_noise(dequantization: Dequantization, log_prob: LogDensity) -> None:
  """Refuse states made for other noise than the log-density has at its t0; what is traced passes."""
  if dequantization.noise is None:
    return
  if log_prob.sde is None:
    raise ValueError(
      "dequantization knows the noise of a process, and a normalizing flow has none: its data stand at t = 0. Take "
      "dequantization.uniform() or variational(flow)"
    )
  with jax.ensure_compile_time_eval():
    theirs = log_prob.sde.marginal(log_prob.t0)
  values: tuple[Any, ...] = (*dequantization.noise, *theirs)
  if any(isinstance(value, jax.core.Tracer) for value in values):
    return
  made, due = (np.asarray(pair, np.float64) for pair in (values[:2], values[2:]))
  if not np.allclose(made, due, rtol=_SAME_NOISE, atol=0.0):
    raise ValueError(
      f"dequantization must be made with the process and the t0 of log_prob: it is for (alpha, sigma) = "
      f"({made[0]:.6g}, {made[1]:.6g}), and log_prob has ({due[0]:.6g}, {due[1]:.6g}) at its t0 = "
      f"{float(log_prob.t0):.6g} of {type(log_prob.sde).__name__}"
    )
