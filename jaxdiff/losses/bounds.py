"""The variational bound on -log p(x) of a diffusion model: three costs, one network evaluation.

    -log p(x)  <=  KL(q(x_t1 | x) || prior)                                  prior
                 + E_q -log p(x | x_t0)                                      reconstruction
                 + 1/2 int_t0^t1 (g / sigma)^2 E |eps_hat(x_t, t) - eps|^2 dt   diffusion

for every process, with expectations over x_t = alpha x + sigma eps. The diffusion cost of the score of a model is that
of its reverse SDE; it is estimated at one time an example. Conditions make it a bound on -log p(x | c).

References:
  Kingma et al. 2021, Variational Diffusion Models, Section 3.5 and Appendix E; Song et al. 2021, Maximum Likelihood
  Training of Score-Based Diffusion Models, Theorem 3; Huang et al. 2021, A Variational Perspective on Diffusion-Based
  Generative Models, Section 3.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key, Shaped

from jaxdiff import checks, keys
from jaxdiff.losses import decoders, times, weights
from jaxdiff.losses.score_matching import Loss, check_made, denoising
from jaxdiff.predictions import Prediction, noise
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar, State

Decoder = Callable[[Array, State], Float[Array, " b"]]
Costs = dict[str, Float[Array, " b"]]


def bound(
  sde: ScalarSDE,
  prediction: Prediction = noise(),
  levels: int | None = None,
  data_range: tuple[float, float] = (-1.0, 1.0),
  time: times.Times = times.importance(),
  t0: Scalar | None = None,
  decoder: Decoder | None = None,
  prior_log_prob: Callable[[State], Float[Array, " b"]] | None = None,
) -> Loss:
  """The variational bound on -log p(x | cond), in nats.

  Args:
    sde: a process with scalar marginals.
    prediction: what the network outputs.
    levels: for integers 0..levels-1: their number; the bound is on -log of their probability. None for continuous
      data: the bound is on -log of their density.
    data_range: (low, high), where the integers go, each to the centre of its cell.
    time: how times are drawn; `importance`, uniform in log-SNR, makes the cost of a time its noise error alone.
    t0: the smallest time; None for the time at which sigma / alpha = 1e-3.
    decoder: log p(x | x_t0), `(x, x_t0) -> [b]` in nats. None for what the noise at t0 says by itself: for integers
      every level weighted by how well it explains x_t0, for continuous data N(x_t0 / alpha, (sigma / alpha)^2).
    prior_log_prob: log-density at t1 of a Gaussian prior, [b, *d] -> [b] in nats; None for `sde.prior_log_prob`.

  Returns:
    loss(key, x, network, cond={}, u=None) -> (bound [b] in nats, aux); the mean over keys bounds -log p. aux, in bits
    per dimension: "diffusion", "prior", "reconstruction" and their sum "bits_per_dim".

  Raises:
    ValueError: for levels below 2, a t0 outside [0, t1), times without correction (`log_normal`, `fixed`).
    TypeError: when called with integers without `levels`, or with other data with them.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.bound(jd.VP(), jd.predictions.score())
    >>> network = jax.tree_util.Partial(lambda x, t: -x)  # the score of N(0, I)
    >>> value, _ = jax.jit(loss)(jax.random.key(0), jnp.zeros((500, 2)), network)
    >>> bool(abs(value.mean() - jnp.log(2 * jnp.pi)) < 0.5)
    True
  """
  check_made(sde, prediction, weights.likelihood(), time)
  check_unbiased(time)
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)
  check_decoder(levels, data_range, decoder)
  match = denoising(sde, prediction, weights.likelihood(), time, first)

  def loss(
    key: Keys, x: Shaped[Array, "b *d"], network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], Costs]:
    diffusion_key, prior_key, decoder_key = keys.split(keys.per_example(key, len(x)), 3)
    x0 = to_state(x, levels, data_range)
    if u is None:
      u = times.draw(time, key, keys.fold_in(diffusion_key, 1), first.dtype)
    diffusion, _ = match(diffusion_key, x0, network, cond, u)
    last = jnp.asarray(sde.t1, first.dtype)
    return total(
      diffusion=(last - first) * diffusion,
      prior=prior_cost(prior_key, x0, *sde.marginal(last), prior_log_prob or sde.prior_log_prob),
      reconstruction=reconstruction_cost(decoder_key, x, x0, *sde.marginal(first), levels, data_range, decoder),
      dimension=x0[0].size,
    )

  return loss


def averaged(loss: Loss, draws: int) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """A loss averaged over `draws` of its noise, with times spread evenly over the draws of each example: for evaluation.

  Args:
    loss: `bound`, `vdm`, `lsgm`, or any other that takes u.
    draws: how many, each a network evaluation.

  Returns:
    fn(key, x, network, cond={}) -> (mean [b], aux), aux averaged too, with "standard_error" [b] over the draws: as if
    they were independent, which for a loss smooth in time is too large; NaN for one draw.

  Raises:
    ValueError: for draws below 1.
    TypeError: for draws that are no integer.
  """
  checks.whole("draws", draws, 1)
  checks.made("loss", loss)

  def fn(key: Keys, x: Shaped[Array, "b *d"], network: Any, cond: Cond = NO_COND) -> tuple[Float[Array, " b"], Costs]:
    draw_key, offset_key = keys.split(keys.per_example(key, len(x)))
    offset = keys.uniform(offset_key, (len(x),), jnp.result_type(float))

    def draw(k: Array) -> tuple[Array, Costs]:
      return loss(keys.fold_in(draw_key, k), x, network, cond, times.stratified(offset, k, draws))

    values, aux = jax.lax.map(draw, jnp.arange(draws))
    spread = jnp.std(values, axis=0, ddof=1) / math.sqrt(draws) if draws > 1 else jnp.full_like(values[0], jnp.nan)
    return values.mean(axis=0), {name: value.mean(axis=0) for name, value in aux.items()} | {"standard_error": spread}

  return fn


def check_unbiased(time: times.Times) -> None:
  """Refuse times of which the mean of the loss is no bound."""
  if not time.unbiased:
    raise ValueError("time must be times.importance() or uniform(): with others the mean of the loss is no bound")


def check_decoder(levels: int | None, data_range: tuple[float, float], decoder: Decoder | None) -> None:
  """Refuse levels and ranges that are none, before anything is computed."""
  if levels is not None:
    checks.levels(levels, data_range)
  if decoder is not None and not callable(decoder):
    raise TypeError(f"decoder must be a function (x, x_t0) -> [b], got {type(decoder).__name__}")


def to_state(x: Shaped[Array, "b *d"], levels: int | None, data_range: tuple[float, float]) -> State:
  """The data as a state of the process: integers at the centres of their cells, continuous data as they are."""
  if levels is not None:
    return decoders.integer_values(x, levels, data_range)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"x must be floating point without levels, got {x.dtype}: for integers 0..n-1 give levels=n")
  return x


def prior_cost(
  key: Key[Array, " b"],
  x0: State,
  alpha: Float[Array, ""],
  sigma: Float[Array, ""],
  prior_log_prob: Callable[[State], Float[Array, " b"]],
) -> Float[Array, " b"]:
  """KL(N(alpha x0, sigma^2 I) || prior) in nats, without variance for a prior N(m, diagonal).

  A Gaussian log-density f is quadratic, so [f(z + sigma v) + f(z - sigma v)] / 2 = f(z) + sigma^2 v . (grad^2 f) v / 2
  and Rademacher v give the trace of a diagonal matrix exactly, of any other in the mean.
  """
  x0 = x0.astype(sigma.dtype)
  mean, std = alpha * x0, sigma
  v = jax.vmap(lambda key: jax.random.rademacher(key, x0.shape[1:], x0.dtype))(key)
  both = (
    checks.per_example("what prior_log_prob returns", prior_log_prob(mean + sign * v), len(x0)) for sign in (std, -std)
  )
  cross = -0.5 * sum(both)
  return cross - x0[0].size * gaussian_entropy(sigma)


def reconstruction_cost(
  key: Key[Array, " b"],
  x: Shaped[Array, "b *d"],
  x0: State,
  alpha: Float[Array, ""],
  sigma: Float[Array, ""],
  levels: int | None,
  data_range: tuple[float, float],
  decoder: Decoder | None,
) -> Float[Array, " b"]:
  """-log p(x | z) in nats at one z = alpha x0 + sigma eps; in closed form for continuous data without a decoder."""
  if levels is None and decoder is None:
    return jnp.full(len(x), x0[0].size * gaussian_entropy(sigma / alpha))
  x0 = x0.astype(sigma.dtype)
  z = alpha * x0 + sigma * keys.normal(key, x0.shape, x0.dtype)
  if decoder is not None:
    return -checks.per_example("what decoder returns", decoder(x, z), len(x))
  assert levels is not None
  return -decoders.nearest_level_log_prob(x, z, alpha, sigma, levels, data_range)


def total(
  diffusion: Float[Array, " b"], prior: Float[Array, " b"], reconstruction: Float[Array, " b"], dimension: int
) -> tuple[Float[Array, " b"], Costs]:
  """The sum of the costs in nats, and each of them in bits per dimension."""
  costs = {"diffusion": diffusion, "prior": prior, "reconstruction": reconstruction}
  costs["bits_per_dim"] = diffusion + prior + reconstruction
  return costs["bits_per_dim"], {name: cost / (dimension * math.log(2)) for name, cost in costs.items()}


def gaussian_entropy(std: Float[Array, ""]) -> Float[Array, ""]:
  """Of N(0, std^2), in nats."""
  return jnp.log(std) + 0.5 * math.log(2 * math.pi * math.e)
