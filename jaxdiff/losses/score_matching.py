"""Score matching: train a network so that it gives the gradient of log p_t.

Denoising score matching over the times of a process (Vincent 2011; Song et al. 2021, eq. 7):

    loss = 1/2 w(t) |eps_hat(x_t, t) - eps|^2    summed over the dimensions, averaged over t in [t0, t1] and eps

with eps_hat = -sigma score. Its minimizer is the score whatever the weight; see `weights` and `times`.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys
from jaxdiff.losses import times, weights
from jaxdiff.predictions import Prediction, call_network, noise_factor
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE, expand, perturb
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar, State


@runtime_checkable
class Loss(Protocol):
  """`loss(key, x0: [b, *d], network, cond={}, u=None) -> (per-example [b], aux)`."""

  def __call__(
    self, key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]: ...


def denoising(
  sde: ScalarSDE,
  prediction: Prediction,
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
) -> Loss:
  """Denoising score matching over the times of a process.

  Args:
    sde: a process with scalar marginals.
    prediction: what the network outputs.
    weight: `(sde, t) -> [b]` on the squared error of the noise: `weights.noise()`, `likelihood()`, `edm()` or
      `min_snr()`.
    time: `times.uniform()`, `importance()` (for the likelihood weight) or `log_normal()`.
    t0: smallest time; None for the time at which sigma / alpha = 1e-3.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux): half a weighted squared error, summed over dimensions;
    with `weights.likelihood()`, (t1 - t0) times it is in nats. `key` is one key or one per example; `network` is
    (x, t, **cond) -> [b, *d]; `u: [b]` in [0, 1) places the times (a trainer passes stratified numbers of the global
    batch), None draws them from `key`. aux: "t" and "noise_error", the mean squared error of the noise per dimension.

  Raises:
    ValueError: for a t0 outside [0, t1); when called, for stratified times without a batch to stratify, and for cond
      or u of another batch.
    TypeError: for a factory given where what it makes is due; when called, for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.denoising(jd.VP(), jd.predictions.noise())
    >>> value, aux = loss(jax.random.key(0), jnp.zeros((8, 2)), lambda x, t: jnp.zeros_like(x))
    >>> value.shape
    (8,)

  References:
    Vincent 2011, A Connection Between Score Matching and Denoising Autoencoders, Section 4; Song et al. 2021a,
    Score-Based Generative Modeling through SDEs, eq. 7; Song et al. 2021b, Maximum Likelihood Training, for the
    likelihood weight.
  """
  for name, value, kind in (
    ("sde", sde, ScalarSDE),
    ("prediction", prediction, Prediction),
    ("time", time, times.Times),
  ):
    checks.made(name, value, kind)
  checks.made("weight", weight)
  if not callable(weight):
    raise TypeError(f"weight must be a function of (sde, t), got {type(weight).__name__}")
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    noise_key, time_key = keys.split(keys.per_example(key, len(x0)))
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    t, correction = time.place(sde, first, u.astype(first.dtype))
    alpha, sigma = sde.marginal(t)
    x_t, noise = perturb(noise_key, x0, t, sde)
    output = call_network(network, prediction, sde, x_t, t, cond)
    x0, noise, output = (value.astype(t.dtype) for value in (x0, noise, output))
    target = prediction.target(x0, noise, expand(alpha, x0), expand(sigma, x0))
    per_noise = noise_factor(prediction, alpha, sigma) ** 2
    squared = per_noise * jnp.sum((output - target) ** 2, axis=range(1, x0.ndim))
    dimension = x0[0].size
    return 0.5 * weight(sde, t) * correction * squared, {"t": t, "noise_error": squared / dimension}

  return loss
