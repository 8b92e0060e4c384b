import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import unit_noise
from oracles import Mixture, compiled, mixture

import jaxdiff as jd

KEY = jax.random.key(0)
NORMAL = lambda x, t: -0.5 * jnp.sum(x**2, axis=range(1, x.ndim))
SIGMAS = np.geomspace(0.1, 2.0, 4).astype(np.float32)


@functools.cache
def chain_of_four():
  return jd.ncsn.Chain(SIGMAS)


def test_langevin_on_a_gaussian_has_its_known_bias(x64):
  """The step is affine, x' = a x + c z, so its stationary variance is c^2 / (1 - a^2) = s^2 / (1 - eta / (4 s^2))."""

  @jax.jit
  def run(eta, s, x):
    with unit_noise(first=2):
      return jd.samplers.langevin(eta, 1)(KEY, x, lambda x, t: -x / s**2).x[:, 0]

  for eta, s in ((0.1, 0.5), (0.5, 1.3)):
    x = run(eta, s, np.asarray([[0.0], [1.0], [0.0]]))
    a, c = x[1] - x[0], x[2] - x[0]
    np.testing.assert_allclose(c**2, eta, rtol=1e-12)
    np.testing.assert_allclose(c**2 / (1 - a**2), s**2 / (1 - eta / (4 * s**2)), rtol=1e-12)


def test_langevin_samples_have_the_biased_variance():
  """3000 examples after 60 steps, eta = 0.8 on N(0, 1): variance 1 / (1 - 0.2), 4 standard errors; unbiased is 11."""
  run = lambda x: jd.samplers.langevin(0.8, 60)(KEY, x, jd.score_of(NORMAL)).x
  x = compiled(run, np.zeros((3000, 2), np.float32))
  np.testing.assert_allclose(x.var(axis=0), 1.25, rtol=4 * np.sqrt(2 / 3000))
  assert np.all(np.abs(x.mean(axis=0)) < 4 * np.sqrt(1.25 / 3000))


def test_mala_on_a_gaussian_has_no_bias():
  """From a start twice as wide and off center, at a step size where Langevin's variance is 25% too large."""
  n, s = 4000, np.array([1.0, 2.0])
  log_density = lambda x, t: 3.0 - 0.5 * jnp.sum((x / jnp.asarray(s)[None]) ** 2, axis=1)
  start = 1 + 2 * np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
  sample = compiled(lambda x: jd.samplers.mala(0.8, 150)(KEY, x, log_density), start)
  np.testing.assert_allclose(sample.x.var(axis=0), s**2, rtol=4 * np.sqrt(2 / n))
  assert np.all(np.abs(sample.x.mean(axis=0)) < 4 * s / np.sqrt(n))
  assert sample.nfe.tolist() == [151] * n
  np.testing.assert_array_equal(sample.status.accepted + sample.status.rejected, 150)
  assert 0.85 < sample.status.accepted.mean() / 150 < 0.99


def test_mala_keeps_a_mixture_and_langevin_does_not():
  """Energies and nearest modes of 4000 samples that start exact, 30 steps of eta = 0.06 at modes of std 0.2.

  Energies (-log p) against fresh samples, 4 standard errors; chi-square of (mode, quartile of the distance), 11 degrees
  of freedom, below its 1e-4 quantile 37.4. Langevin's variance at this step is 1.6 times too large.
  """
  data, n, sde = mixture(), 4000, jd.VE(sigma_min=1e-6)
  log_density = lambda x, t: data.log_prob(x, sde, t)

  def run():
    fresh, start = data.sample(jax.random.key(1), 50_000), data.sample(jax.random.key(2), n)
    sample = jd.samplers.mala(0.06, 30)(KEY, start, log_density)
    plain = jd.samplers.langevin(0.06, 30)(KEY, start, data.score(sde)).x
    energy = lambda x: -log_density(x, jnp.zeros(len(x)))
    return sample, [(x, energy(x)) for x in (fresh, start, sample.x, plain)]

  sample, ((fresh, reference), (start, _), adjusted, plain) = compiled(run)
  quartiles = data.std * np.sqrt(-2 * np.log([0.75, 0.5, 0.25]))

  def cells(x):
    away = np.linalg.norm(np.asarray(x)[:, None] - data.means[None], axis=-1)
    return np.bincount(4 * away.argmin(axis=1) + np.searchsorted(quartiles, away.min(axis=1)), minlength=12)

  def misfit(x, energies):
    expected = cells(fresh) * (n / len(fresh))
    away = (energies.mean() - reference.mean()) / (reference.std() / np.sqrt(n))
    return abs(away), np.sum((cells(x) - expected) ** 2 / expected)

  adjusted, plain = misfit(*adjusted), misfit(*plain)
  assert adjusted[0] < 4
  assert adjusted[1] < 37.4
  assert plain[0] > 20
  assert plain[1] > 200
  assert 0.5 < sample.status.accepted.mean() / 30 < 0.98
  assert np.all(np.any(sample.x != start, axis=1))


def test_mala_stays_within_the_support():
  """The exponential density on x > 0: mean 1 and variance 1 of 3000 examples, 4 standard errors (kurtosis 9)."""
  log_density = lambda x, t: jnp.where(x[:, 0] > 0, -x[:, 0], -jnp.inf)
  start = np.random.default_rng(0).exponential(size=(3000, 1)).astype(np.float32)
  sample = compiled(lambda x: jd.samplers.mala(0.5, 50)(KEY, x, log_density), start)
  jd.raise_if_failed(sample)
  assert np.all(sample.x > 0)
  assert abs(sample.x.mean() - 1) < 4 / np.sqrt(3000)
  assert abs(sample.x.var() - 1) < 4 * np.sqrt(8 / 3000)


def test_annealed_langevin_finds_the_weights_that_langevin_does_not():
  """Modes at +-(5, 5) of weights 0.8 and 0.2, as Figure 3 of Song & Ermon (2019): 4 standard errors plus 0.02."""
  data, n = Mixture(np.array([0.8, 0.2]), np.array([[5.0, 5.0], [-5.0, -5.0]]), 1.0), 1000
  share = lambda x: np.mean(x.sum(axis=1) > 0)

  def run():
    chain = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(12, sigma_min=0.1, sigma_max=20.0))
    score, start = data.score(chain.sde()), chain.sde().prior_sample(jax.random.key(1), (n, 2))
    annealed, plain = jd.samplers.annealed_langevin(chain, 0.01, 40), jd.samplers.langevin(0.1, 480)
    return annealed(KEY, start, score).x, plain(KEY, start, score).x

  x, plain = compiled(run)
  assert abs(share(x) - 0.8) < 4 * np.sqrt(0.16 / n) + 0.02
  near = x[x.sum(axis=1) > 0] - 5
  assert np.all(np.abs(near.mean(axis=0)) < 0.2)
  assert abs(share(plain) - 0.8) > 0.2


def test_annealed_langevin_steps_by_the_size_of_its_level_at_its_time():
  sampler = jd.samplers.annealed_langevin(chain_of_four(), 0.01, 2, denoise=False, path=1)
  times = []

  def score(x, t):
    jax.debug.callback(lambda t: times.append(float(t[0])), t)
    return jnp.zeros_like(x)

  def run(x):
    with unit_noise(first=0):
      path = sampler(KEY, x, score).path
    with unit_noise(first=9):
      return path, sampler(KEY, x, lambda x, t: jnp.ones_like(x)).x

  path, pushed = compiled(run, np.zeros((1, 1), np.float32))
  jax.effects_barrier()
  sigmas = np.repeat(SIGMAS[::-1], 2)
  np.testing.assert_allclose(np.diff(path[:, 0, 0]), np.sqrt(0.01) * sigmas / 0.1, rtol=1e-4)
  np.testing.assert_allclose(sorted(times, reverse=True), np.repeat([1, 2 / 3, 1 / 3, 0], 2), atol=1e-6)
  np.testing.assert_allclose(pushed[0, 0], np.sum(0.5 * 0.01 * (sigmas / 0.1) ** 2), rtol=1e-5)


def test_annealed_langevin_ends_with_its_denoising_step():
  """x + sigma_1^2 score(x, sigma_1), eq. (4)."""
  score = lambda x, t: -x / (1 + t[:, None])
  samplers = [jd.samplers.annealed_langevin(chain_of_four(), 0.01, 3, denoise=denoise) for denoise in (False, True)]
  x_T = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
  noisy, clean = compiled(lambda x: [sampler(KEY, x, score) for sampler in samplers], x_T)
  np.testing.assert_allclose(clean.x, noisy.x + 0.1**2 * -noisy.x, rtol=1e-5)
  assert noisy.nfe.tolist() == [12] * 3
  assert clean.nfe.tolist() == [13] * 3


SAMPLERS = {
  "langevin": (lambda: jd.samplers.langevin(0.1, 6, t=0.3), jd.score_of, 6),
  "mala": (lambda: jd.samplers.mala(0.1, 6, t=0.3), lambda log_density: log_density, 7),
  "annealed": (lambda: jd.samplers.annealed_langevin(chain_of_four(), 0.01, 2), jd.score_of, 9),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted_examples_are_their_own_and_a_broken_one_is_reported(name):
  make, read, nfe = SAMPLERS[name]
  calls = []

  def log_density(x, t, scale):
    jax.debug.callback(lambda t: calls.append(t), t)
    return scale * NORMAL(x, t)

  run = jax.jit(lambda keys, x, scale: make()(keys, x, read(log_density), {"scale": scale}))
  keys, x, scale = jd.example_keys(KEY, 0, 3), np.arange(6, dtype=np.float32).reshape(3, 2), np.float32([1, np.nan, 3])
  whole = jax.device_get(run(keys, x, scale))
  jax.effects_barrier()
  assert whole.nfe.tolist() == [nfe] * 3
  assert len(calls) == nfe
  if name != "annealed":
    np.testing.assert_allclose(calls, np.full((nfe, 3), 0.3), rtol=1e-6)
  order = np.asarray([2, 1, 0])
  other = jax.device_get(run(keys[order], x[order], np.float32([3, 2, 1])))
  np.testing.assert_allclose(whole.x[[0, 2]], other.x[[2, 0]], rtol=1e-5)
  assert whole.status.accepted[2] == other.status.accepted[0]
  assert whole.status.code.tolist() == [0, 2, 0]
  assert np.isnan(whole.x[:, 0]).tolist() == [False, True, False]
  with pytest.raises(jd.SolveError, match=r"1 of 3 examples \(index 1; the first after 0 steps\): .*not finite"):
    jd.raise_if_failed(whole)


def test_mala_reports_a_log_density_that_breaks_later():
  """NaN beyond x = 1: a comparison with NaN is false, so that the proposal would only be refused."""
  log_density = lambda x, t: jnp.where(x[:, 0] > 1, jnp.nan, 1.0) * NORMAL(x, t)
  sample = compiled(lambda x: jd.samplers.mala(1.0, 50)(KEY, x, log_density), np.zeros((4, 2), np.float32))
  assert sample.status.code.tolist() == [2] * 4
  assert np.all(np.isnan(sample.x))


def test_path_of_langevin_is_every_kth_state():
  x, score = np.ones((2, 3), np.float32), jd.score_of(NORMAL)
  full, thin = compiled(lambda x: [jd.samplers.langevin(0.1, 6, path=path)(KEY, x, score) for path in (1, 3)], x)
  np.testing.assert_array_equal(thin.path, full.path[::3])
  np.testing.assert_array_equal(full.path[0], x)
  np.testing.assert_array_equal(full.path[-1], full.x)


def test_bad_input_is_refused(untyped):
  samplers, x = jd.samplers, np.ones((2, 3), np.float32)
  for factory in (samplers.langevin, samplers.mala, lambda *a: samplers.annealed_langevin(chain_of_four(), *a)):
    with pytest.raises(ValueError, match="step_size must be positive.*got 0"):
      factory(0.0, 5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
      factory(0.1, 0)
  with pytest.raises(ValueError, match="path must divide the number of steps, 5; got 2"):
    samplers.langevin(0.1, 5, path=2)
  with pytest.raises(TypeError, match="chain must be the noise levels of NCSN, a jaxdiff.ncsn.Chain; got VP"):
    samplers.annealed_langevin(jd.VP(), 0.1, 5)
  with pytest.raises(TypeError, match="chain must be the noise levels of NCSN, a jaxdiff.ncsn.Chain; got Chain"):
    samplers.annealed_langevin(jd.ddpm.Chain([0.1, 0.2]), 0.1, 5)
  with pytest.raises(ValueError, match="log_density must return one number per example"):
    jax.eval_shape(lambda x: samplers.mala(0.1, 5)(KEY, x, lambda x, t: -x), x)
  with pytest.raises(ValueError, match="score must return an array of the shape of x"):
    jax.eval_shape(lambda x: samplers.langevin(0.1, 5)(KEY, x, NORMAL), x)
