"""The variational bound in data space of an autoencoder and a diffusion of its latents.

K draws z_k of the posterior q(z | x) have the log weights

    log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x)                                                           (1)

whose mean bounds log p(x) from below, as does the logarithm of their mean, which is tighter: as in `bits`, with the
decoder and the encoder in the places of p(n | z) and q(z | n).

    latent_ode      log p(z) is the density of the probability flow at t0
    latent_elbo     log p(z) is replaced by its own variational bound, one network evaluation a draw

References:
  Vahdat, Kreis & Kautz 2021, Score-based Generative Modeling in Latent Space, Section 3; Burda et al. 2016, Importance
  Weighted Autoencoders, Theorem 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jaxdiff import checks, keys, latents
from jaxdiff import status as codes
from jaxdiff.flow import LogDensity
from jaxdiff.likelihood import bits
from jaxdiff.losses import times
from jaxdiff.losses.observations import Observation
from jaxdiff.losses.score_matching import Loss
from jaxdiff.predictions import evaluations
from jaxdiff.typing import NO_COND, Autoencoder, Cond, Keys, LogProb, Network, ScoreFn, State, Status

_Prior = Callable[[Array, State, Any, Cond, Float[Array, " b"]], LogProb]


class LatentBound(NamedTuple):
  """An upper bound on -log p(x), example by example: in bits per dimension for integers, in nats for other data.

  Attributes:
    value: the bound, in expectation over the draws.
    reconstruction: mean of -log p(x | z).
    prior: mean of -log p(z), or of its bound.
    entropy: mean of -log q(z | x); value is reconstruction + prior - entropy, or below it with importance weights.
    standard_error: of `value`, over the probes: 0 for the exact trace and without a trace, NaN for one probe.
    draw_error: of `value`, over the draws, each of which has probes of its own: so it contains `standard_error`. NaN
      for one draw.
    nfe: network evaluations spent on each example, over all draws.
    status: how the solves went, over all draws; code 2 also marks a value that is not finite.
  """

  value: Float[Array, " b"]
  reconstruction: Float[Array, " b"]
  prior: Float[Array, " b"]
  entropy: Float[Array, " b"]
  standard_error: Float[Array, " b"]
  draw_error: Float[Array, " b"]
  nfe: Int[Array, " b"]
  status: Status


def latent_ode(
  prior: LogDensity, observation: Observation, draws: int = 1, importance: bool = False
) -> Callable[..., LatentBound]:
  """The bound with the exact density of the latents under the probability flow.

  Args:
    prior: of latents: what `likelihood.log_prob` returned. It is evaluated with the score, not with the network.
    observation: p(x | output of the decoder), of `losses.observations`.
    draws: of the posterior, K in (1), one after the other.
    importance: the logarithm of the mean weight rather than the mean of the logarithms: exact traces only.

  Returns:
    fn(key, x, autoencoder, score, cond={}) -> LatentBound, x integers for observations of
    integers, else floats. Draw k of an example has the example's
    key folded with k: it is the same for any batch and any number of draws.

  Raises:
    ValueError: for draws below 1, and importance weights of estimated traces (also when called, where the trace depends
      on the dimension of the latents).
    TypeError: for draws that are no integer, or `likelihood.log_prob` itself.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> fn = jd.likelihood.latent_ode(jd.likelihood.log_prob(jd.VP()), jd.losses.observations.gaussian(std=1.0))
    >>> autoencoder = jd.typing.Autoencoder(lambda x: (x / 2, jnp.full_like(x, -jnp.log(2.0))), lambda z: z)
    >>> result = jax.jit(lambda x: fn(jax.random.key(0), x, autoencoder, lambda z, t: -z))(jnp.zeros((1, 2)))
    >>> round(float(result.value[0]), 3)  # log(4 pi): x is N(0, 2 I), its posterior exact
    2.531
  """
  if hasattr(prior, "log_prob"):
    raise TypeError(f"prior must be a log-density, got {type(prior).__name__}: pass its log_prob")
  checks.made("prior", prior, LogDensity)
  if importance and prior.divergence is not None:
    bits.check_exact(prior.divergence)

  def density(key: Array, z: State, score: ScoreFn, cond: Cond, u: Array) -> LogProb:
    if importance:
      bits.check_exact(prior.trace(z))
    return prior(key, z, score, cond)

  return _bound(density, observation, draws, bits.log_mean_over_draws if importance else bits.mean_over_draws)


def latent_elbo(prior: Loss, observation: Observation, draws: int = 1) -> Callable[..., LatentBound]:
  """The bound with that of the latents, without solves: what `losses.lsgm` trains, in expectation.

  Args:
    prior: a bound on -log p(z) in nats: `losses.bound(sde, prediction)`. Nothing checks that it is one: with another
      loss the result bounds nothing.
    observation: as in `latent_ode`.
    draws: of the posterior, each with a time and a noise of its own, the times spread evenly over the draws.

  Returns:
    fn(key, x, autoencoder, network, cond={}) -> LatentBound, of the network and not of its score. Without importance
    weights: a bound on -log p(z) at one time is too noisy for them.

  Raises:
    ValueError: for draws below 1.
    TypeError: for draws that are no integer, or `losses.bound` itself.
  """
  checks.made("prior", prior)
  if isinstance(prior, LogDensity):
    raise TypeError("prior is a log-density: pass it to likelihood.latent_ode, or losses.bound(sde, prediction) here")

  def density(key: Array, z: State, network: Network, cond: Cond, u: Array) -> LogProb:
    value, _ = prior(key, z, network, cond, u)
    none = jnp.zeros(len(z), jnp.int32)
    return LogProb(-value, z, none + evaluations(network), Status(none, none, none), jnp.zeros_like(value))

  return _bound(density, observation, draws, bits.mean_over_draws)


def _bound(
  prior: _Prior, observation: Observation, draws: int, average: Callable[[Array], tuple[Array, Array]]
) -> Callable[..., LatentBound]:
  checks.whole("draws", draws, 1)
  checks.made("observation", observation, Observation)

  def fn(
    key: Keys, x: Shaped[Array, "b *d"], autoencoder: Autoencoder, model: Any, cond: Cond = NO_COND
  ) -> LatentBound:
    draw_key, offset_key = keys.split(keys.per_example(key, len(x)))
    q = latents.posterior(autoencoder, observation.to_state(x))
    offset = keys.uniform(offset_key, (len(x),), jnp.result_type(float))

    def draw(k: Array) -> tuple[Array, Array, LogProb]:
      sample_key, prior_key = keys.split(keys.fold_in(draw_key, k))
      z = latents.sample(sample_key, q)
      decoded = observation.log_prob(x, autoencoder.decode(z))
      result = prior(prior_key, z, model, cond, times.stratified(offset, k, draws))
      return decoded.astype(result.value.dtype), latents.log_prob(q, z).astype(result.value.dtype), result

    decoded, encoded, result = jax.lax.map(draw, jnp.arange(draws))
    value, error = average(decoded + result.value - encoded)
    unit = 1 / (x[0].size * math.log(2)) if jnp.issubdtype(x.dtype, jnp.integer) else 1.0
    reconstruction, latent, entropy = (-unit * jnp.mean(part, axis=0) for part in (decoded, result.value, encoded))
    return LatentBound(
      -unit * value,
      reconstruction,
      latent,
      entropy,
      unit * jnp.sqrt(jnp.sum(result.standard_error**2, axis=0)) / draws,
      unit * error,
      jnp.sum(result.nfe, axis=0),
      _over_draws(result.status, value),
    )

  return fn


def _over_draws(status: Status, value: Float[Array, " b"]) -> Status:
  code = jnp.max(status.code, axis=0)
  code = jnp.where((code == codes.SUCCESS) & ~jnp.isfinite(value), codes.NON_FINITE, code)
  return Status(code, jnp.sum(status.accepted, axis=0), jnp.sum(status.rejected, axis=0))
