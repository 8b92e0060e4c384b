"""Closed-form answers: data whose density, score, denoiser and probability flow are known under every process."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxdiff as jd

SDES = {
  "vp": jd.VP(),
  "subvp": jd.SubVP(),
  "cosine": jd.CosineVP(),
  "ve": jd.VE(sigma_min=0.01, sigma_max=50.0),
  "edm": jd.EDM(sigma_max=80.0),
}
PREDICTIONS = {
  "noise": jd.predictions.noise(),
  "data": jd.predictions.data(),
  "velocity": jd.predictions.velocity(),
  "score": jd.predictions.score(),
  "edm": jd.predictions.edm(0.7),
}


@dataclass(frozen=True)
class Gaussian:
  """Data N(mean, diag(std^2)) in d dimensions, of any type JAX is set to."""

  mean: np.ndarray
  std: np.ndarray

  def moments(self, sde, t) -> tuple[Array, Array]:
    """Mean and variance of x_t, each [b, d]."""
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    mean, std = (jnp.asarray(v, alpha.dtype)[None] for v in (self.mean, self.std))
    return alpha * mean, alpha**2 * std**2 + sigma**2

  def sample(self, key, count: int) -> Array:
    noise = jax.random.normal(key, (count, len(self.mean)))
    return jnp.asarray(self.mean, noise.dtype)[None] + jnp.asarray(self.std, noise.dtype)[None] * noise

  def log_prob(self, x, sde, t) -> Array:
    mean, variance = self.moments(sde, jnp.broadcast_to(t, x.shape[:1]))
    return -0.5 * jnp.sum((x - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance), axis=1)

  def score(self, sde):
    def score(x, t):
      mean, variance = self.moments(sde, t)
      return (mean - x) / variance

    return score

  def flow(self, sde, x, start, end) -> Array:
    """Where the probability flow carries x from time `start` to time `end`: it keeps every standardized coordinate."""
    m0, v0 = self.moments(sde, jnp.broadcast_to(start, x.shape[:1]))
    m1, v1 = self.moments(sde, jnp.broadcast_to(end, x.shape[:1]))
    return m1 + jnp.sqrt(v1 / v0) * (x - m0)


@dataclass(frozen=True)
class Mixture:
  """Data sum_k w_k N(mean_k, std^2 I)."""

  weights: np.ndarray
  means: np.ndarray
  std: float

  def sample(self, key, count: int) -> Array:
    pick, noise = jax.random.split(key)
    component = jax.random.categorical(pick, jnp.log(jnp.asarray(self.weights)), shape=(count,))
    centers = jnp.asarray(self.means)[component]
    return centers + self.std * jax.random.normal(noise, centers.shape, centers.dtype)

  def log_prob(self, x, sde, t) -> Array:
    alpha, sigma = (v[:, None] for v in sde.marginal(jnp.broadcast_to(t, x.shape[:1])))
    variance = alpha**2 * self.std**2 + sigma**2
    away = x[:, None] - alpha[..., None] * jnp.asarray(self.means, x.dtype)[None]
    each = -0.5 * jnp.sum(away**2, axis=-1) / variance - 0.5 * x.shape[1] * jnp.log(2 * jnp.pi * variance)
    return jax.nn.logsumexp(each + jnp.log(jnp.asarray(self.weights, x.dtype))[None], axis=1)

  def score(self, sde):
    return lambda x, t: jax.grad(lambda y: jnp.sum(self.log_prob(y, sde, t)))(x)


@dataclass(frozen=True)
class LabelledMixture(Mixture):
  """A mixture whose components belong to labels 0, 1, ...; the label after the last says nothing."""

  labels: np.ndarray

  def of_label(self, label: int) -> Mixture:
    """The data of one label."""
    own = self.labels == label
    return Mixture(self.weights[own] / self.weights[own].sum(), self.means[own], self.std)

  def _each_log_prob(self, x, sde, t) -> Array:
    """log p_t(x | label) of every label, `[b, labels + 1]`, the last of all data."""
    parts = [self.of_label(label).log_prob(x, sde, t) for label in range(self.labels.max() + 1)]
    return jnp.stack([*parts, self.log_prob(x, sde, t)], axis=1)

  def conditional_log_prob(self, x, sde, t, label) -> Array:
    return jnp.take_along_axis(self._each_log_prob(x, sde, t), label[:, None], axis=1)[:, 0]

  def log_posterior(self, sde):
    """log p(label | x_t) by Bayes' rule."""
    prior = np.log([self.weights[self.labels == label].sum() for label in range(self.labels.max() + 1)])

    def log_posterior(x, t, label):
      return self.conditional_log_prob(x, sde, t, label) - self.log_prob(x, sde, t) + jnp.asarray(prior, x.dtype)[label]

    return log_posterior

  def conditional_score(self, sde):
    """The score of p_t(x | label), in closed form; of p_t(x) for the label after the last."""

    def score(x, t, label):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      return (alpha * self.conditional_denoised(sde, x, t, label) - x) / sigma**2

    return score

  def conditional_denoised(self, sde, x, t, label) -> Array:
    """E[x_0 | x_t, label]: the means of the components' posteriors, by how probable they are."""
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    variance = alpha**2 * self.std**2 + sigma**2
    means = jnp.asarray(self.means, x.dtype)[None]
    away = x[:, None] - alpha[..., None] * means
    own = (jnp.asarray(self.labels, label.dtype)[None] == label[:, None]) | (label > int(self.labels.max()))[:, None]
    log_weight = jnp.where(own, jnp.log(jnp.asarray(self.weights, x.dtype))[None], -jnp.inf)
    share = jax.nn.softmax(log_weight - 0.5 * jnp.sum(away**2, axis=-1) / variance, axis=1)
    centers = means + (alpha * self.std**2 / variance)[..., None] * away
    return jnp.sum(share[..., None] * centers, axis=1)


def gaussian() -> Gaussian:
  return Gaussian(np.array([1.0, -0.5, 0.2]), np.array([0.5, 1.0, 0.05]))


def mixture() -> Mixture:
  return Mixture(np.array([0.3, 0.5, 0.2]), np.array([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.2]]), 0.2)


def labelled_mixture() -> LabelledMixture:
  """Three labels, one of two components; label 3 is the null one."""
  means = np.array([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.2], [1.3, -0.4]])
  return LabelledMixture(np.array([0.2, 0.4, 0.3, 0.1]), means, 0.2, np.array([0, 1, 2, 0]))


def compiled(function, *arguments):
  """What `function(*arguments)` returns, computed by one program rather than one an operation, as NumPy arrays."""
  return jax.device_get(jax.jit(function)(*arguments))
