"""Observations: the probability of data given what a decoder puts out, p(x | output), and what the encoder sees of x.

| of | outputs a channel | p(x | output), coordinate by coordinate |
|---|---|---|
| `discretized(levels)` | 2, mean and log std | a Gaussian integrated over the cell of each integer |
| `categorical(levels)` | levels, logits | the softmax of the logits |
| `gaussian(std)` | 1, mean | N(mean, std^2), of continuous data |

The outputs of a channel lie side by side in the last axis: `[.., channels, outputs a channel]` for `categorical`, all
means and then all log stds for `discretized`. Integers sit where `decoders` puts them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxdiff import checks
from jaxdiff.losses import decoders
from jaxdiff.typing import State


class Observation(NamedTuple):
  """How data come out of a decoder.

  Attributes:
    log_prob: `(x [b, *d], output [b, ..]) -> [b]`, log p(x | output) in nats, summed over the dimensions.
    to_state: `x -> [b, *d]`, what the encoder sees: integers at their places in the data range, continuous data as
      they are.
    image: `output -> [b, *d]`, a picture of it.
    outputs: how many channels of output a channel of data needs.
  """

  log_prob: Callable[[Array, Array], Float[Array, " b"]]
  to_state: Callable[[Array], Array]
  image: Callable[[Array], Array]
  outputs: int


def discretized(levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> Observation:
  """Integers under a Gaussian of the output's mean and std, by `decoders.discretized_gaussian_log_prob`.

  The output is `[b, .., 2 channels]`, all means and then all logarithms of the std. The picture is the mean, within the
  data range.

  Args:
    levels: how many values an integer of the data can take.
    data_range: (low, high), of the states.

  Raises:
    ValueError: for levels below 2 or an empty data range; when called, for outputs of another shape.
    TypeError: when called, for data that are not integers.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff.losses import observations
    >>> bit = observations.discretized(2)
    >>> round(float(jnp.exp(bit.log_prob(jnp.array([[1]]), jnp.zeros((1, 2))))[0]), 4)
    0.5
  """
  checks.levels(levels, data_range)

  def log_prob(x: Shaped[Array, "b *d"], output: Float[Array, "b *_"]) -> Float[Array, " b"]:
    check_output(x, output, 2)
    mean, log_std = jnp.split(output, 2, axis=-1)
    return decoders.discretized_gaussian_log_prob(x, mean, log_std, levels, data_range)

  def image(output: Float[Array, "b *_"]) -> State:
    return jnp.clip(jnp.split(output, 2, axis=-1)[0], *data_range)

  return Observation(log_prob, _integers(levels, data_range), image, 2)


def categorical(levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> Observation:
  """Integers under the softmax of the output's logits, of which every coordinate has `levels`.

  The output is `[b, .., channels levels]`, the logits of a channel side by side. It knows no order of the levels. The
  picture is the mean of the levels' places. An integer outside 0..levels-1 has the log-probability NaN.

  Args:
    levels: how many values an integer of the data can take.
    data_range: (low, high), of the states.

  Raises:
    ValueError: for levels below 2 or an empty data range; when called, for outputs of another shape.
    TypeError: when called, for data that are not integers.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff.losses import observations
    >>> value = observations.categorical(4).log_prob(jnp.array([[3]]), jnp.zeros((1, 4)))
    >>> round(float(jnp.exp(value)[0]), 4)
    0.25
  """
  places = decoders.level_values(levels, data_range)
  to_state = _integers(levels, data_range)

  def by_coordinate(output: Float[Array, "b *_"]) -> Float[Array, "b *d _"]:
    return output.reshape(*output.shape[:-1], output.shape[-1] // levels, levels)

  def log_prob(x: Shaped[Array, "b *d"], output: Float[Array, "b *_"]) -> Float[Array, " b"]:
    check_output(x, output, levels)
    known = jnp.isfinite(to_state(x))
    index = jnp.where(known, x.astype(jnp.int32), 0)[..., None]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(by_coordinate(output)), index, axis=-1)[..., 0]
    return jnp.sum(jnp.where(known, chosen, jnp.nan), axis=range(1, x.ndim))

  def image(output: Float[Array, "b *_"]) -> State:
    return jax.nn.softmax(by_coordinate(output)) @ places.astype(output.dtype)

  return Observation(log_prob, to_state, image, levels)


def gaussian(std: float) -> Observation:
  """Continuous data under N(output, std^2); the picture is the output.

  Args:
    std: in units of the data.

  Raises:
    ValueError: for an std that is not positive; when called, for outputs of another shape.
    TypeError: when called, for data that are not floating point.
  """
  if not std > 0:
    raise ValueError(f"std must be positive, got {std}")

  def log_prob(x: Shaped[Array, "b *d"], output: Float[Array, "b *_"]) -> Float[Array, " b"]:
    check_output(x, output, 1)
    return decoders.gaussian_log_prob(to_state(x), output, jnp.asarray(std, output.dtype))

  def to_state(x: Shaped[Array, "b *d"]) -> State:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(
        f"x must be floating point for observations.gaussian, got {x.dtype}: for integers 0..n-1 take "
        "observations.discretized(n) or categorical(n)"
      )
    return x

  return Observation(log_prob, to_state, lambda output: output, 1)


def check_output(x: Array, output: Array, outputs: int) -> None:
  """Refuse what a decoder gave, unless it has as many outputs a channel of x as it should."""
  due = (*x.shape[:-1], x.shape[-1] * outputs)
  if output.shape != due:
    raise ValueError(
      f"decode must return {outputs} outputs a channel of x {x.shape}, {due}; got {output.shape}: give the network "
      f"output_channels={due[-1]}"
    )


def _integers(levels: int, data_range: tuple[float, float]) -> Callable[[Array], Array]:
  return lambda x: decoders.integer_values(x, levels, data_range)
