"""What the losses of discrete chains share: at which steps they look, and one network evaluation there."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from jaxdiff import checks, keys
from jaxdiff.losses import times
from jaxdiff.losses.score_matching import Loss
from jaxdiff.predictions import Prediction, call_network, noise_factor
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import NO_COND, Cond, Keys, Network, State, Step


@runtime_checkable
class Chain(Protocol):
  """Steps 1..steps with q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I): `ddpm.Chain`, `ncsn.Chain` or your own."""

  @property
  def steps(self) -> int: ...

  def marginal(self, t: Step, /) -> tuple[Array, Array]: ...

  def perturb(self, key: Keys, x0: State, t: Step, /) -> tuple[State, State]: ...

  def time(self, t: Step, /) -> Array: ...

  def sde(self) -> ScalarSDE: ...


class Evaluation(NamedTuple):
  """One evaluation of the network at noised data, in the precision of the chain.

  Attributes:
    x_t: the noised data.
    noise: the noise that the network predicts, -sigma score.
    error: its error, up to the sign.
    rest: the other parts of the output of a network with several times the channels.
  """

  x_t: Float[Array, "b *d"]
  noise: Float[Array, "b *d"]
  error: Float[Array, "b *d"]
  rest: tuple[Float[Array, "b *d"], ...]


def check_made(chain: Any, kind: Any, prediction: Any) -> None:
  """Refuse what is no chain of this kind, and factories that were not called."""
  checks.made("chain", chain, kind)
  checks.made("prediction", prediction, Prediction)


def check_floating(x0: Array) -> None:
  """Refuse integers where scaled data are wanted."""
  if not jnp.issubdtype(x0.dtype, jnp.floating):
    raise TypeError(
      f"x0 must be floating point, got {x0.dtype}: scale integers by losses.decoders.integer_values(x, levels), or, "
      "where the loss takes `levels`, state them"
    )


def draw_steps(
  chain: Chain, key: Keys, per_example: Key[Array, " b"], u: Float[Array, " b"] | None, first: int, stratified: bool
) -> Int[Array, " b"]:
  """Steps uniform on first..chain.steps: first + floor(u count), from the given u or, for None, from the keys."""
  count = chain.steps - first + 1
  if u is not None:
    checks.per_example("u", u, len(per_example))
  else:
    u = times.draw(times.uniform(stratified), key, per_example, jnp.float32)
  # A u of 1, which others may hand on, belongs to the last step.
  return first + jnp.minimum(jnp.floor(u * count), count - 1).astype(jnp.int32)


def evaluate(
  chain: Chain,
  prediction: Prediction,
  noise_key: Keys,
  x0: State,
  t: Int[Array, " b"],
  network: Network,
  cond: Cond,
  parts: int = 1,
) -> Evaluation:
  """Noise the data to step t and ask the network, once, at time `chain.time(t)`."""
  checks.batch("x0", x0, cond, t)
  alpha, sigma = chain.marginal(t)
  x_t, noise = chain.perturb(noise_key, x0, t)
  output = call_network(network, prediction, chain.sde(), x_t, chain.time(t), cond, parts)
  output, *rest = jnp.split(output, parts, axis=-1)
  x0, x_t, noise, output = (value.astype(sigma.dtype) for value in (x0, x_t, noise, output))
  scales = expand(alpha, x0), expand(sigma, x0)
  error = expand(noise_factor(prediction, alpha, sigma), x0) * (output - prediction.target(x0, noise, *scales))
  predicted = -scales[1] * prediction.to_score(x_t, output, *scales)
  return Evaluation(x_t, predicted, error, tuple(part.astype(sigma.dtype) for part in rest))


def sum_dims(values: State) -> Float[Array, " b"]:
  """The sum over all axes but the first."""
  return jnp.sum(values, axis=range(1, values.ndim))


def denoising(chain: Chain, prediction: Prediction, first: int, stratified: bool) -> Loss:
  """Half the squared error of the noise, summed over dimensions, at a step uniform on first..chain.steps."""

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    check_floating(x0)
    noise_key, step_key = keys.split(keys.per_example(key, len(x0)))
    t = draw_steps(chain, key, step_key, u, first, stratified)
    squared = sum_dims(evaluate(chain, prediction, noise_key, x0, t, network, cond).error ** 2)
    return 0.5 * squared, {"t": chain.time(t), "noise_error": squared / x0[0].size}

  return loss
