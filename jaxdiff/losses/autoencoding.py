"""Bounds on -log p(x) by an autoencoder: the negative ELBO, in nats.

    -log p(x)  <=  E_q(z|x) -log p(x | z)                 reconstruction
                 + KL(q(z | x) || p(z))                   kl

with equality where q(z | x) is the posterior of the model.

`vae`      q = N(mean, diag(v)), p = N(0, I):                   kl = 1/2 sum (mean^2 + v - 1 - log v)
`gumbel`   q = softmax(logits) at every position, p = 1 / K:    kl = sum_positions log K - H(q)

both in closed form; the reconstruction is estimated by one sample z of an example, reparameterized.

References:
  Kingma and Welling 2014, Auto-Encoding Variational Bayes, eq. 3 and Appendix B; Higgins et al. 2017, beta-VAE, for
  beta; Jang et al. 2017, Categorical Reparameterization with Gumbel-Softmax.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxdiff import checks, keys, latents, quantization
from jaxdiff.losses.observations import Observation
from jaxdiff.typing import NO_COND, Autoencoder, Cond, DiscreteAutoencoder, Keys, State, Step

Costs = dict[str, Float[Array, " b"]]


def vae(observation: Observation, beta: float = 1.0) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """The negative ELBO of a variational autoencoder with a Gaussian posterior.

  Args:
    observation: p(x | output of the decoder), of `losses.observations`.
    beta: the weight of the KL; the loss is a bound for 1, below it latents keep more than the bound pays for.

  Returns:
    loss(key, x, network, cond={}, u=None) -> (reconstruction + beta kl [b], aux). `network` is an
    `jaxdiff.typing.Autoencoder`; x are integers for observations of integers, else floats. No time is drawn, so u is
    not used. aux, in nats: "reconstruction", "kl" and their sum "nats", the bound at every beta.

  Raises:
    ValueError: for a negative beta; when called, for conditions, or outputs that the observation does not fit.
    TypeError: for a factory given where what it makes is due; when called, for data of the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.vae(jd.losses.observations.gaussian(std=1.0))
    >>> prior = jd.typing.Autoencoder(lambda x: (0 * x, 0 * x), decode=lambda z: 0 * z)
    >>> nats, _ = loss(jax.random.key(0), jnp.zeros((1, 2)), prior)  # -log N(0; 0, I)
    >>> round(float(nats[0]), 4)
    1.8379
  """
  check(observation, beta=beta)

  def loss(
    key: Keys, x: Shaped[Array, "b *d"], network: Autoencoder, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], Costs]:
    state = to_state(observation, x, cond, u)
    posterior = latents.posterior(network, state)
    output = network.decode(latents.sample(keys.per_example(key, len(x)), posterior))
    return total(-observation.log_prob(x, output), latents.kl(posterior), beta)

  return loss


def gumbel(
  observation: Observation,
  temperature: quantization.Temperature = quantization.annealed(),
  beta: float = 1.0,
  straight_through: bool = False,
) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """The negative ELBO of an autoencoder with categorical latents, relaxed for training.

  With a step the decoder gets Gumbel-softmax samples at the temperature of that step, which have gradients but whose
  loss is no bound; without one it gets one-hot samples of q by Gumbel-max, whose mean over keys is the bound: for
  evaluation.

  Args:
    observation: p(x | output of the decoder), of `losses.observations`.
    temperature: of the relaxation, of the step; `quantization.annealed(...)`.
    beta: the weight of the KL.
    straight_through: whether the decoder gets one-hot samples in training, too, with the gradient of relaxed ones.

  Returns:
    loss(key, x, network, cond={}, u=None, step=None) -> (reconstruction + beta kl [b], aux). `network` is a
    `jaxdiff.typing.DiscreteAutoencoder`; `step` an integer. No time is drawn, so u is not used. aux, in nats:
    "reconstruction", "kl" and their sum "nats"; with a step also "temperature".

  Raises:
    ValueError: for a negative beta; when called, for conditions, or outputs that the observation does not fit.
    TypeError: for a factory given where what it makes is due; when called, for data of the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.gumbel(jd.losses.observations.categorical(2))
    >>> copy = jd.typing.DiscreteAutoencoder(
    ...   lambda x: 50 * jnp.stack([-x, x], -1), lambda p: 50 * p.reshape(len(p), -1)
    ... )
    >>> nats, aux = jax.jit(lambda x: loss(jax.random.key(0), x, copy))(jnp.array([[0, 1, 1]]))
    >>> round(float(nats[0]), 4)  # three bits
    2.0794
  """
  check(observation, beta=beta)
  checks.made("temperature", temperature)
  if not callable(temperature):
    raise TypeError(
      f"temperature must be a function of the step, got {temperature!r}: for one that stays take "
      "quantization.annealed(first=t, last=t)"
    )

  def loss(
    key: Keys,
    x: Shaped[Array, "b *d"],
    network: DiscreteAutoencoder,
    cond: Cond = NO_COND,
    u: Float[Array, " b"] | None = None,
    step: Step | None = None,
  ) -> tuple[Float[Array, " b"], Costs]:
    logits = network.encode(to_state(observation, x, cond, u))
    if isinstance(logits, tuple):
      raise TypeError("network must be a DiscreteAutoencoder, whose encode returns logits; of a pair take losses.vae")
    quantization.check_codes(logits.shape[-1])
    each = keys.per_example(key, len(x))
    if step is None:
      sample = jax.nn.one_hot(quantization.gumbel_max(each, logits), logits.shape[-1], dtype=logits.dtype)
      level = {}
    else:
      now = temperature(step)
      sample = quantization.gumbel_softmax(each, logits, now, straight_through)
      level = {"temperature": jnp.broadcast_to(now, len(x))}
    reconstruction = -observation.log_prob(x, network.decode(sample))
    value, costs = total(reconstruction, categorical_kl(logits), beta)
    return value, costs | level

  return loss


def categorical_kl(logits: Float[Array, "b *p K"]) -> Float[Array, " b"]:
  """KL(softmax(logits) || uniform) in nats, summed over the positions."""
  log_q = jax.nn.log_softmax(logits)
  relative = jnp.exp(log_q) * (log_q + jnp.log(jnp.asarray(logits.shape[-1], logits.dtype)))
  return jnp.sum(relative, axis=range(1, logits.ndim))


def total(reconstruction: Float[Array, " b"], kl: Float[Array, " b"], beta: float) -> tuple[Float[Array, " b"], Costs]:
  """The loss, and the bound with its parts."""
  return reconstruction + beta * kl, {"reconstruction": reconstruction, "kl": kl, "nats": reconstruction + kl}


def to_state(observation: Observation, x: Shaped[Array, "b *d"], cond: Cond, u: Float[Array, " b"] | None) -> State:
  """What the encoder sees of x; conditions are refused, for which an autoencoder has no place."""
  state = observation.to_state(x)
  checks.batch("x", state, cond, u)
  if cond:
    raise ValueError(f"cond has {sorted(cond)}: autoencoders take no conditions, leave them out")
  return state


def check(observation: Observation, **weights: float) -> None:
  """Refuse what is no observation, and negative weights."""
  checks.made("observation", observation, Observation)
  for name, weight in weights.items():
    if not weight >= 0:
      raise ValueError(f"{name} must be at least 0, got {weight}")
