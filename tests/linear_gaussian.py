"""The one autoencoder whose likelihood is known: x = W z + b + noise with Gaussian z (probabilistic PCA)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import scipy.stats
from oracles import Gaussian

import jaxdiff as jd
from jaxdiff.losses import observations
from jaxdiff.losses.observations import Observation


@dataclass(frozen=True)
class LinearGaussian:
  """z from `prior`, x = z W^T + b + s eps. The columns of W are orthogonal: the posterior has independent units."""

  prior: Gaussian
  weights: np.ndarray
  offset: np.ndarray
  noise: float

  def log_prob(self, x) -> np.ndarray:
    """log p(x), exactly."""
    covariance = self.weights @ np.diag(self.prior.std**2) @ self.weights.T + self.noise**2 * np.eye(len(self.offset))
    mean = self.weights @ self.prior.mean + self.offset
    return scipy.stats.multivariate_normal(mean, covariance).logpdf(np.asarray(x, np.float64))

  def posterior(self, x):
    """(mean, log variance) of p(z | x), exactly."""
    weights, offset, mean, std = (
      jnp.asarray(v, x.dtype) for v in (self.weights, self.offset, self.prior.mean, self.prior.std)
    )
    precision = std**-2 + jnp.sum(weights**2, axis=0) / self.noise**2
    center = ((mean / std**2)[None] + (x - offset[None]) @ weights / self.noise**2) / precision[None]
    return center, jnp.broadcast_to(-jnp.log(precision)[None], center.shape)

  def autoencoder(self, shift: float = 0.0, widen: float = 0.0) -> jd.typing.Autoencoder:
    """The exact posterior, or one off by `shift` of its standard deviations and `widen` in its log variance."""

    def encode(x):
      mean, log_variance = self.posterior(x)
      return mean + shift * jnp.exp(0.5 * log_variance), log_variance + widen

    decode = lambda z: z @ jnp.asarray(self.weights.T, z.dtype) + jnp.asarray(self.offset, z.dtype)[None]
    return jd.typing.Autoencoder(encode, decode)

  @property
  def observation(self) -> Observation:
    return observations.gaussian(self.noise)


def gap(shift: float, widen: float, units: int = 2) -> float:
  """KL(q(z | x) || p(z | x)) of `autoencoder(shift, widen)`: what its bound lacks."""
  return 0.5 * units * (shift**2 + np.exp(widen) - 1 - widen)


def at_time(data: Gaussian, sde, t) -> Gaussian:
  """The data at time t, so that p_t is the prior of latents without any smoothing by t."""
  alpha, sigma = (float(v) for v in sde.marginal(t))
  return Gaussian(alpha * data.mean, np.sqrt(alpha**2 * data.std**2 + sigma**2))


LATENTS = Gaussian(np.array([0.5, -0.4]), np.array([0.6, 1.2]))
MODEL = LinearGaussian(LATENTS, np.array([[1.0, 0.5], [-1.0, 0.5], [0.5, 0.0]]), np.array([0.3, -0.1, 0.0]), 0.3)
X = np.array([0.9, -1.2, 0.4])
