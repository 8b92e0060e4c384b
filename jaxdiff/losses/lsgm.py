"""The bound of an autoencoder whose latents have a diffusion model as their prior, trained together:

    -log p(x)  <=  E_q -log p(x | z)  -  H(q(z | x))  +  CE(q(z | x) || p(z))                                        (1)

    CE  =  E_q KL(q(z_t1 | z) || prior)  +  d/2 log(2 pi e sigma_t0^2 / alpha_t0^2)
           + 1/2 int_t0^t1 (g / sigma)^2 E |eps_hat(z_t, t) - eps|^2 dt                                              (2)

The prior is the model at t0 and a step N(z_t0 / alpha, (sigma / alpha)^2) to t = 0, of which (2) is the bound that
`bound` is, so that (1) holds for every t0. For Gaussian data and the exact score

    E (2)  =  E[-log p_t0(alpha_t0 z + sigma_t0 eps)] - d log alpha_t0,                                              (3)

the cross-entropy but for O(d sigma_t0^2).

Encoder and decoder must follow the bound, or z loses what it should say of x; the network may follow another weight w.
It does so without a second evaluation: with l = (g / sigma)^2 and E_w(z) the error under w at the time drawn, the loss
is E_w(z'), where z' equals z and hands back l / w times its gradient. Networks must treat examples one by one.

References:
  Vahdat, Kreis & Kautz 2021, Score-based Generative Modeling in Latent Space: Theorem 1 for (2), there without its
  first term; Section 3.3 for the weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key, Shaped

from jaxdiff import checks, keys, latents
from jaxdiff.losses import bounds, times, weights
from jaxdiff.losses.observations import Observation
from jaxdiff.losses.score_matching import check_made, denoising
from jaxdiff.predictions import Prediction, noise
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import NO_COND, Autoencoder, Cond, Keys, Network, Scalar, State

Costs = dict[str, Float[Array, " b"]]


class LatentModel(NamedTuple):
  """An autoencoder, and the network of a diffusion of its latents: what `lsgm` trains.

  Attributes:
    autoencoder: encode and decode.
    network: `(z: [b, *k], t: [b], **cond) -> [b, *k]`.
  """

  autoencoder: Autoencoder
  network: Network


def lsgm(
  sde: ScalarSDE,
  observation: Observation,
  prediction: Prediction = noise(),
  prior_weight: weights.Weight | None = None,
  time: times.Times = times.importance(),
  t0: Scalar | None = None,
  prior_log_prob: Callable[[State], Float[Array, " b"]] | None = None,
) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """The bound (1) on -log p(x), in nats, of autoencoder and diffusion of latents together.

  Args:
    sde: a process of the latents with scalar marginals.
    observation: p(x | output of the decoder), of `losses.observations`.
    prediction: what the network outputs.
    prior_weight: what the network's gradient weighs the squared error of the noise with, `weights.noise()` or another
      that is positive everywhere; None for the bound's own. Encoder and decoder follow the bound in any case.
    time: how times are drawn, for both: `importance`, uniform in log-SNR, has the lower variance for the bound.
    t0: the smallest time; None for the time at which sigma / alpha = 1e-3.
    prior_log_prob: log-density at t1 of a Gaussian prior, as in `bound`.

  Returns:
    loss(key, x, model, cond={}, u=None) -> (bound [b] in nats, aux), `model` a `LatentModel`, one evaluation of its
    network; x are integers for observations of integers, else floats; `cond` is the network's. With a `prior_weight`
    the value is still the bound, and its gradient no longer that of the value. aux, in nats: "reconstruction",
    "cross_entropy" and "entropy", of which the bound is the first two less the third; "prior_loss", what the network
    follows; and "noise_error", of the noise per dimension.

  Raises:
    ValueError: for a t0 outside [0, t1), times without correction (`log_normal`, `fixed`); when called, for outputs
      that the observation does not fit, or a posterior of two shapes.
    TypeError: for a factory given where what it makes is due; when called, for a model that is no `LatentModel`, or
      data of the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.lsgm(jd.VP(), jd.losses.observations.gaussian(std=1.0), jd.predictions.score())
    >>> autoencoder = jd.typing.Autoencoder(lambda x: (x / 2, jnp.full_like(x, -jnp.log(2.0))), lambda z: z)
    >>> model = jd.losses.LatentModel(autoencoder, lambda z, t: -z)  # the score of N(0, I)
    >>> value, aux = jax.jit(lambda x: loss(jax.random.key(0), x, model))(jnp.zeros((500, 2)))
    >>> bool(abs(value.mean() - jnp.log(4 * jnp.pi)) < 0.5)  # x is N(0, 2 I)
    True
  """
  check_made(sde, prediction, weights.likelihood() if prior_weight is None else prior_weight, time)
  checks.made("observation", observation, Observation)
  bounds.check_unbiased(time)
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)
  cross_entropy = _cross_entropy(sde, prediction, prior_weight, time, first, prior_log_prob or sde.prior_log_prob)

  def loss(
    key: Keys, x: Shaped[Array, "b *d"], model: LatentModel, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], Costs]:
    checks.made("model", model, LatentModel)
    sample_key, time_key, prior_key = keys.split(keys.per_example(key, len(x)), 3)
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    q = latents.posterior(model.autoencoder, observation.to_state(x))
    z = latents.sample(sample_key, q)
    reconstruction = -observation.log_prob(x, model.autoencoder.decode(z))
    cross, aux = cross_entropy(prior_key, z, model.network, cond, u)
    entropy = latents.entropy(q)
    value = reconstruction + cross - entropy
    return value, {"reconstruction": reconstruction, "cross_entropy": cross, "entropy": entropy, **aux}

  return loss


def _cross_entropy(
  sde: ScalarSDE,
  prediction: Prediction,
  prior_weight: weights.Weight | None,
  time: times.Times,
  first: Array,
  prior_log_prob: Callable[[State], Float[Array, " b"]],
) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """(2) of z at one time, whose gradient by the network has weights of its own."""
  likelihood = weights.likelihood()
  match = denoising(sde, prediction, prior_weight or likelihood, time, first)

  def cross_entropy(
    key: Key[Array, " b"], z: State, network: Network, cond: Cond, u: Float[Array, " b"]
  ) -> tuple[Float[Array, " b"], Costs]:
    noise_key, end_key = keys.split(key)
    last = jnp.asarray(sde.t1, first.dtype)
    if prior_weight is None:
      ratio = jnp.ones_like(u)
    else:
      t, _ = time.place(sde, first, u.astype(first.dtype))
      ratio = likelihood(sde, t) / prior_weight(sde, t)
    error, aux = match(noise_key, _with_gradient_scaled(z, ratio), network, cond, u)
    prior_loss = (last - first) * error
    diffusion = _with_gradient_of(prior_loss, ratio * prior_loss)
    prior = bounds.prior_cost(end_key, z, *sde.marginal(last), prior_log_prob)
    alpha, sigma = sde.marginal(first)
    cost = prior + z[0].size * bounds.gaussian_entropy(sigma / alpha) + diffusion
    return cost, {"prior_loss": prior_loss, "noise_error": aux["noise_error"]}

  return cross_entropy


def _with_gradient_scaled(z: State, factor: Float[Array, " b"]) -> State:
  """z, whose gradient comes back `factor` times as large."""
  value = jax.lax.stop_gradient(z)
  return value + factor.astype(z.dtype).reshape((-1,) + (1,) * (z.ndim - 1)) * (z - value)


def _with_gradient_of(source: Float[Array, " b"], value: Float[Array, " b"]) -> Float[Array, " b"]:
  """The value, with the gradient of another."""
  return jax.lax.stop_gradient(value - source) + source
