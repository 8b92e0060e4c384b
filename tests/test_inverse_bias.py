"""How far each method of inverse problems is from the exact posterior of Gaussian data, in closed form.

Every step of a sampler on Gaussian data is affine in its state and its noises, so that mean and covariance of the
samples follow from matrices written here by hand; DPS, whose moves are not linear, has the density of one value.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

import jaxdiff as jd
from jaxdiff import inverse
from jaxdiff.inverse.repaint import moves

SDE = jd.VP()
Y = 1.5


class Data(NamedTuple):
  mean: np.ndarray
  covariance: np.ndarray

  def score(self):
    variances, axes = np.linalg.eigh(self.covariance)

    def apply(params, x, t):
      alpha, sigma = (v[:, None] for v in SDE.marginal(t))
      mean, variance, to_axes = (jnp.asarray(v, x.dtype) for v in (self.mean[None], variances[None], axes))
      return -((x - alpha * mean) @ to_axes / (alpha**2 * variance + sigma**2)) @ to_axes.T

    return jd.score_fn(apply, (), SDE, jd.predictions.score())

  def denoiser(self, alpha, sigma):
    """D = K x + k."""
    eye = np.eye(len(self.mean))
    matrix = alpha * self.covariance @ np.linalg.inv(alpha**2 * self.covariance + sigma**2 * eye)
    return matrix, self.mean - alpha * matrix @ self.mean

  def posterior(self, rows, noise_std=0.0):
    gram = rows @ self.covariance @ rows.T + noise_std**2 * np.eye(len(rows))
    gain = self.covariance @ rows.T @ np.linalg.inv(gram)
    return self.mean + gain @ (Y - rows @ self.mean), self.covariance - gain @ rows @ self.covariance


# Two values of variance 1 and correlation 0.8, the first of which is measured; three others.
PAIR = Data(np.zeros(2), np.array([[1.0, 0.8], [0.8, 1.0]]))
THREE = Data(np.array([0.2, -0.3, 0.1]), np.array([[1.0, 0.8, 0.1], [0.8, 1.0, 0.3], [0.1, 0.3, 0.5]]))
ROWS = np.array([[0.5, 1.0, -0.4]])


@functools.cache
def grid(steps):
  return compiled(lambda: jd.time_grid(SDE, steps))


def levels(ts):
  """alpha and sigma of the default VP, in float64."""
  integral = 0.1 * np.asarray(ts, float) + 0.5 * 19.9 * np.asarray(ts, float) ** 2
  return np.exp(-0.5 * integral), np.sqrt(-np.expm1(-integral))


def first(d):
  """The first of d values is measured."""
  return inverse.mask(np.arange(d) == 0)


def guided_moments(data, ts, rows, pull, ancestral=False):
  """Of DDIM, or ancestral steps, from N(0, I) with D + sigma^2 / alpha K^T A^T pull(alpha, sigma) (y - A D)."""
  alpha, sigma = levels(ts)
  eye = np.eye(len(data.mean))
  mean, covariance = np.zeros(len(data.mean)), eye
  for a, s, a_next, s_next in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
    matrix, shift = data.denoiser(a, s)
    back = s**2 / a * matrix.T @ rows.T @ pull(a, s)
    matrix, shift = matrix - back @ rows @ matrix, shift + back @ (np.full(len(rows), Y) - rows @ shift)
    r = a * s_next / (a_next * s)
    kept = r**2 if ancestral else r  # of the noise of x; the rest of its variance is new noise
    of_data = a_next * (1 - kept)
    step = kept * a_next / a * eye + of_data * matrix
    mean, covariance = step @ mean + of_data * shift, step @ covariance @ step.T
    if ancestral:
      covariance = covariance + s_next**2 * (1 - r**2) * eye
  return mean, covariance


def by_pseudo_inverse(rows, noise_std, c):
  def pull(alpha, sigma):
    variance = c * sigma**2 / (alpha**2 * c + sigma**2)
    return np.linalg.inv(variance * rows @ rows.T + noise_std**2 * np.eye(len(rows)))

  return pull


def by_weight(weight):
  return lambda alpha, sigma: weight * (alpha / sigma) ** 2 * np.eye(1)


def projected_moments(data, ts, resamplings=1, jump=1, noise_std=0.0):
  """Of ancestral sampling from N(0, I) whose first value is replaced after every step, with leaps back."""
  alpha, sigma = levels(ts)
  eye = np.eye(len(data.mean))
  known = eye[:, :1] @ eye[:1]

  def project(mean, covariance, a, s):
    room = s**2 - (a * noise_std) ** 2
    if room < 0:
      return mean, covariance
    rest = eye - known
    return rest @ mean + known @ np.full(len(mean), a * Y), rest @ covariance @ rest + room * known

  last = int(np.sum(sigma >= alpha * noise_std)) - 1
  mean, covariance = np.zeros(len(data.mean)), eye
  for i, leap in zip(*moves(len(ts) - 1, resamplings, jump, last), strict=True):
    a, s, a_next, s_next = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
    r = a * s_next / (a_next * s)
    matrix, shift = data.denoiser(a, s)
    step = r * s_next / s * eye + a_next * (1 - r**2) * matrix
    mean = step @ mean + a_next * (1 - r**2) * shift
    covariance = step @ covariance @ step.T + s_next**2 * (1 - r**2) * eye
    mean, covariance = project(mean, covariance, a_next, s_next)
    up = i + 1 - leap
    keep = alpha[up] / a_next
    mean, covariance = keep * mean, keep**2 * covariance + (sigma[up] ** 2 - (keep * s_next) ** 2) * eye
  matrix, shift = data.denoiser(alpha[-1], sigma[-1])
  return project(matrix @ mean + shift, matrix @ covariance @ matrix.T, 1.0, 0.0)


def affine_moments(sampler, score, y, d):
  """Mean and covariance for x_T ~ N(0, I) of a deterministic sampler, which is affine: from 0 and unit vectors."""
  x_T, cond = np.concatenate([np.zeros((1, d)), np.eye(d)]), {"measurement": np.full((d + 1, *y), Y)}
  run = lambda key, x_T, cond: sampler(key, x_T, score, cond).x
  x = compiled(run, jax.random.key(0), x_T, cond)
  return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


@pytest.mark.parametrize(
  ("guide", "pull"),
  [
    (lambda score, operator: inverse.pigdm(score, operator, 0.0, 0.7), by_pseudo_inverse(ROWS, 0.0, 0.7)),
    (lambda score, operator: inverse.pigdm(score, operator, 0.3), by_pseudo_inverse(ROWS, 0.3, 1.0)),
    (lambda score, operator: inverse.reconstruction(score, operator, 2.0), by_weight(2.0)),
  ],
  ids=["pigdm", "pigdm with noise", "reconstruction"],
)
def test_samples_of_guided_scores_have_the_moments_of_their_formulas(guide, pull, x64):
  ts = grid(12)
  operator = inverse.operator(lambda x: x @ jnp.asarray(ROWS.T), (3,))
  found = affine_moments(jd.samplers.ddim(SDE, ts), guide(THREE.score(), operator), (1,), 3)
  for value, expected in zip(found, guided_moments(THREE, ts, ROWS, pull), strict=True):
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_ancestral_samples_of_guided_scores_have_the_moments_of_their_formulas():
  ts, rows = grid(12), np.eye(3)[:1]
  sampler = jd.samplers.ancestral(SDE, ts)
  score = inverse.reconstruction(THREE.score(), first(3), 2.0)
  run = lambda key, x_T, _, cond: sampler(key, x_T, score, cond)
  close(draw(run, None), *guided_moments(THREE, ts, rows, by_weight(2.0), ancestral=True))


def test_the_moves_of_repaint():
  """Down two steps, back, down again, and on; below the noise of the measurement, from index 3 on, without return."""
  start, leap = moves(6, resamplings=2, jump=2, last=6)
  assert start.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
  assert leap.tolist() == [0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0]
  assert moves(6, resamplings=2, jump=2, last=3)[0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5]


@pytest.mark.parametrize(
  ("pull", "flow", "ancestral"),
  [
    (by_pseudo_inverse(np.eye(2)[:1], 0.0, 1.0), (0.76, 0.39), (0.76, 0.38)),
    (by_weight(1.0), (0.37, 0.56), (0.55, 0.445)),
    (by_weight(2.0), (0.56, 0.42), (0.72, 0.355)),
    (by_weight(5.0), (0.79, 0.31), (0.87, 0.31)),
  ],
)
def test_the_bias_of_guided_scores_is_as_documented(pull, flow, ancestral):
  """Of the formulas, to which the tests above hold the samplers. The exact posterior is N(0.8 y, 0.36)."""
  rows = np.eye(2)[:1]
  exact = PAIR.posterior(rows)
  np.testing.assert_allclose([exact[0][1], exact[1][1, 1]], [0.8 * Y, 0.36])
  for expected, steps in ((flow, False), (ancestral, True)):
    mean, covariance = guided_moments(PAIR, grid(1000), rows, pull, steps)
    np.testing.assert_allclose([mean[1] / Y, covariance[1, 1]], expected, atol=0.006)
    np.testing.assert_allclose([mean[0] / Y, covariance[0, 0]], [1, 0], atol=0.005)


def close(samples, mean, covariance):
  """Mean and covariance of samples within five standard errors."""
  count = len(samples)
  spread = np.sqrt(np.diag(covariance))
  off = np.abs(samples.mean(0) - mean)
  assert np.all(off <= 5 * spread / np.sqrt(count) + 1e-5), (samples.mean(0), mean)
  error = np.sqrt((covariance**2 + np.outer(spread, spread) ** 2) / count)
  assert np.all(np.abs(np.cov(samples.T) - covariance) <= 5 * error + 1e-5), (np.cov(samples.T), covariance)


def noise(count, d):
  return np.random.default_rng(1).normal(size=(count, d)).astype(np.float32)


def draw(sampler, score, count=20000, d=3):
  y, x_T = np.full((count, d), np.nan, np.float32), noise(count, d)
  y[:, 0] = Y
  run = lambda key, x_T, y: sampler(key, x_T, score, {"measurement": y}).x
  return compiled(run, jax.random.key(0), x_T, y).astype(float)


@pytest.mark.parametrize(("resamplings", "jump", "noise_std"), [(1, 1, 0.0), (3, 4, 0.0), (1, 1, 0.3), (2, 5, 0.3)])
def test_samples_of_projections_have_the_moments_of_their_formulas(resamplings, jump, noise_std):
  ts = grid(12)
  base, known = jd.samplers.ancestral(SDE, ts), first(3)
  if resamplings == 1:
    sampler = inverse.projected(base, known, noise_std)
  else:
    sampler = inverse.repaint(base, known, resamplings, jump, noise_std)
  close(draw(sampler, THREE.score()), *projected_moments(THREE, ts, resamplings, jump, noise_std))


def test_what_is_known_has_the_noise_of_its_time():
  """alpha y + sigma z after every move of repaint, leaps back included, in mean and variance."""
  ts = grid(12)
  sampler = inverse.repaint(jd.samplers.ancestral(SDE, ts, path=1), first(3), 2, 1)
  count = 4000
  cond = {"measurement": np.full((count, 3), Y, np.float32)}
  run = lambda key, x_T, cond: sampler(key, x_T, THREE.score(), cond).path[:, :, 0]
  path = compiled(run, jax.random.key(0), np.zeros((count, 3), np.float32), cond)
  # Down to 1, which leaps back to 0, to 1, down to 2, which leaps back to 1, to 2, ...
  times = np.repeat(np.arange(13), 2)[1:-2]
  for states, at in zip(path.astype(float)[1:-1], times, strict=True):
    alpha, sigma = levels(ts[at])
    np.testing.assert_allclose(states.mean(), alpha * Y, atol=5 * sigma / np.sqrt(count))
    np.testing.assert_allclose(states.std(), sigma, rtol=5 / np.sqrt(2 * count))


def test_resampling_brings_projection_to_the_posterior():
  """Of the second value, 0.8 y and 0.36: as documented."""
  found = {}
  for steps, resamplings in ((1000, 1), (250, 1), (250, 3), (250, 10), (250, 20)):
    mean, covariance = projected_moments(PAIR, grid(steps), resamplings, 10)
    found[steps, resamplings] = mean[1] / Y, covariance[1, 1]
  np.testing.assert_allclose(found[1000, 1], (0.50, 0.49), atol=0.005)
  np.testing.assert_allclose(found[250, 10], (0.765, 0.36), atol=0.005)
  means = [found[250, count][0] for count in (1, 3, 10, 20)]
  assert means == sorted(means)
  assert 0.775 < means[-1] < 0.8


def test_projection_with_noise_keeps_its_level_under_resampling():
  """The measured value has mean y / (1 + s^2) and variance s^2 / (1 + s^2), the unknown one 0.8 of that and 0.41."""
  exact = PAIR.posterior(np.eye(2)[:1], 0.3)
  mean, covariance = projected_moments(PAIR, grid(400), 20, 10, 0.3)
  np.testing.assert_allclose(mean, exact[0], atol=0.03)
  np.testing.assert_allclose(covariance, exact[1], atol=0.01)


def test_pigdm_samples_the_posterior_of_isotropic_data():
  """Mean and covariance of adaptive solves within standard errors, each example with a measurement of its own."""
  data = Data(np.array([0.2, -0.3, 0.1]), 0.6 * np.eye(3))
  operator = inverse.operator(lambda x: x @ jnp.asarray(ROWS.T, jnp.float32), (3,))
  score = inverse.pigdm(data.score(), operator, noise_std=0.4, data_variance=0.6)
  count = 4000
  y = np.where(np.arange(count) < count // 2, Y, -Y)[:, None].astype(np.float32)
  sampler = jd.samplers.probability_flow(SDE, rtol=1e-4, atol=1e-4)
  run = lambda key, x_T, y: sampler(key, x_T, score, {"measurement": y})
  sample = compiled(run, jax.random.key(0), noise(count, 3), y)
  jd.raise_if_failed(sample)
  assert len(np.unique(sample.nfe)) > 1
  x = sample.x.astype(float)
  mean, covariance = data.posterior(ROWS, 0.4)
  gain = data.covariance @ ROWS.T / (ROWS @ data.covariance @ ROWS.T + 0.16)
  close(x[: count // 2], mean, covariance)
  close(x[count // 2 :], mean - 2 * Y * gain[:, 0], covariance)


def dps_density(ts, mean, variance, y, scale, x):
  """Density of DPS with ancestral steps at the points x, of one measured value with data N(mean, variance)."""
  alpha, sigma = levels(ts)
  normal = lambda x, m, s: np.exp(-0.5 * ((x - m) / s) ** 2) / np.sqrt(2 * np.pi) / s
  density = normal(x, 0, 1)
  for a, s, a_next, s_next in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
    slope = a * variance / (a**2 * variance + s**2)
    data = mean + slope * (x - a * mean)
    r = a * s_next / (a_next * s)
    to = r * s_next / s * x + a_next * (1 - r**2) * data + scale * slope * np.sign(y - data)
    density = normal(x[:, None], to[None], s_next * np.sqrt(1 - r**2)) @ density * (x[1] - x[0])
  return density


def test_dps_samples_have_the_density_of_algorithm_1():
  """By quadrature; the posterior N(0.79, 0.18) of a measurement with noise 0.5 is another one."""
  data, y, scale = Data(np.array([0.3]), np.array([[0.64]])), 1.0, 0.3
  ts = compiled(lambda: jd.time_grid(SDE, 12, t0=SDE.time_of_log_snr(jnp.asarray(-2 * np.log(0.2)))))
  x = np.linspace(-6, 6, 601)
  density = dps_density(ts, 0.3, 0.64, y, scale, x)
  dx = x[1] - x[0]
  np.testing.assert_allclose(density.sum() * dx, 1, atol=1e-6)
  mean = (x * density).sum() * dx
  variance = ((x - mean) ** 2 * density).sum() * dx
  sampler = inverse.dps(jd.samplers.ancestral(SDE, ts), inverse.mask(np.array([1])), scale)
  count = 20000
  cond = {"measurement": np.full((count, 1), y, np.float32)}
  run = lambda key, x_T, cond: sampler(key, x_T, data.score(), cond).x[:, 0]
  found = compiled(run, jax.random.key(0), noise(count, 1), cond).astype(float)
  np.testing.assert_allclose(found.mean(), mean, atol=5 * np.sqrt(variance / count))
  np.testing.assert_allclose(found.var(), variance, rtol=5 * np.sqrt(2 / count))
  for edge in (0.5, 1.0, 1.5):
    share = density[x < edge].sum() * dx
    np.testing.assert_allclose((found < edge).mean(), share, atol=5 * 0.5 / np.sqrt(count) + 0.005)


def test_dps_jitters_by_its_scale():
  """A measured value ends evenly spread over y +- scale, whatever the data or the noise of y."""
  sampler = inverse.dps(jd.samplers.ancestral(SDE, grid(200)), first(2), 0.3)
  x = draw(sampler, PAIR.score(), 4000, 2)[:, 0]
  np.testing.assert_allclose(x.mean(), Y, atol=0.02)
  np.testing.assert_allclose(x.std(), 0.3 / np.sqrt(3), rtol=0.05)
