"""Joint densities of positions and velocities, and bounds on that of positions, on Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from phase import PhaseGaussian, phase_gaussian

import jaxdiff as jd
from jaxdiff import likelihood

DATA = phase_gaussian()
SDE, T0 = jd.CLD(gamma=0.5), 0.01
EXACT = jd.divergence.exact()


def exact_prior(data, sde):
  return lambda u: data.log_prob(u, sde, sde.t1)


def joint(base_log_prob, **options):
  base = jd.flow.Base(SDE.prior_sample, base_log_prob)
  return jd.flow.cnf(base, EXACT, t0=T0, t1=SDE.t1, **options).log_prob


def test_the_joint_density_of_gaussian_data_is_exact(x64):
  """log p(x, v) at t0 by the flow, 1e-6 at tolerance 1e-8; no score of positions. The default prior is off by what it
  is off itself."""
  score = DATA.score(SDE)
  half = lambda u, t: score(u, t) * jnp.asarray([0.0, 1.0])[None, None]
  field = jd.reverse(SDE, half, 0.0)[0]
  log_prob = joint(SDE.prior_log_prob, rtol=1e-8, atol=1e-8, steps="shared")

  @jax.jit
  def run(key):
    u, _ = jd.cld.perturb(key, DATA.sample(key, 5), jnp.full(5, T0), SDE)
    result = log_prob(key, u, field)
    missing = exact_prior(DATA, SDE)(result.latent) - SDE.prior_log_prob(result.latent)
    return result, missing, DATA.log_prob(u, SDE, T0)

  result, missing, exact = jax.tree.map(np.asarray, run(jax.random.key(0)))
  jd.raise_if_failed(result)
  np.testing.assert_allclose(result.value + missing, exact, atol=1e-6)
  assert 1e-5 < np.max(np.abs(missing)) < 6 * 1e-2


def bound(draws, importance, divergence=EXACT, data=DATA, sde=SDE, **options):
  options = {"rtol": 1e-4, "atol": 1e-4, "t0": T0, "prior_log_prob": exact_prior(data, sde)} | options
  return likelihood.position_bound(likelihood.augmented(sde, divergence, **options), draws, importance)


NARROW = PhaseGaussian(np.array([0.3, -0.2]), np.array([0.1, 0.2]))


@functools.cache
def plain_bound(t0=0.02):
  """The bound of 128 velocities as a jitted function of (data, sde, x [50, 2])."""

  def run(mean, std, sde, x):
    data = PhaseGaussian(mean, std)
    return bound(128, False, data=data, sde=sde, t0=t0)(jax.random.key(0), x, data.score(sde))

  jitted = jax.jit(run)
  return lambda data, sde, x: jax.tree.map(np.asarray, jitted(data.mean, data.std, sde, np.float32(x)))


def narrow_sample():
  return NARROW.mean + NARROW.std * np.random.default_rng(3).normal(size=(50, 2))


def test_the_bounds_are_below_the_density_of_positions_and_importance_is_tighter():
  """Narrow data at a time at which positions and velocities know of each other. The plain bound loses KL(q(v) ||
  p(v | x)), a closed form, within 3 standard errors over 50 x and 128 velocities, and 15%; importance less than a
  tenth of it."""
  data, t0, x = NARROW, 0.02, narrow_sample()
  exact = data.position_log_prob(x, SDE, t0)
  plain = plain_bound()(data, SDE, x)
  fn = bound(128, True, data=data, t0=t0)
  tight = jax.jit(lambda x: fn(jax.random.key(0), x, data.score(SDE)))(np.float32(x))
  jd.raise_if_failed(plain)
  assert np.all(plain.standard_error == 0)
  mean, cov = (np.asarray(v[0], np.float64) for v in data.moments(SDE, jnp.full(1, t0)))
  slope = cov[:, 0, 1] / cov[:, 0, 0]
  variance = cov[:, 1, 1] - slope * cov[:, 0, 1]
  centre = mean[:, 1] + slope * (x - mean[:, 0])
  ratio = SDE.velocity_std**2 / variance
  loss = 0.5 * np.sum(ratio - 1 - np.log(ratio) + centre**2 / variance, axis=1)
  z = (plain.value - (exact - loss)) / plain.velocity_error
  assert abs(z.mean()) < 3 / np.sqrt(50) * max(1, z.std())
  assert loss.mean() > 0.1
  gap, tight_gap = (np.mean(exact - np.asarray(r.value)) for r in (plain, tight))
  np.testing.assert_allclose(gap, loss.mean(), rtol=0.15)
  assert -0.02 < tight_gap < 0.1 * gap


def test_velocities_that_say_nothing_of_positions_cost_nothing():
  """gamma = 1 and N(0, I) data: every single draw is log p(x), to the tolerance of the solve."""
  x = np.random.default_rng(0).normal(size=(50, 2))
  result = plain_bound()(PhaseGaussian(np.zeros(2), np.ones(2)), jd.CLD(gamma=1.0), x)
  np.testing.assert_allclose(result.value, scipy.stats.norm.logpdf(x).sum(axis=1), atol=3e-3)
  assert np.all(result.velocity_error < 2e-3)


def test_draws_and_examples_are_the_same_in_any_batch():
  """Per-example steps and keys; probes of the trace have an error of their own, and guided scores count twice."""

  class Guided:
    def __call__(self, u, t, shift):
      return -u + shift[:, None, None]

    def evaluations(self, times=None):
      return 2

  x, shift = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32), np.float32([0.0, 1.0, 2.0])
  fn = bound(2, False, jd.divergence.hutchinson(2), prior_log_prob=None, rtol=1e-3, atol=1e-3)
  run = jax.jit(lambda key, x, shift: fn(key, x, Guided(), {"shift": shift}))
  keys, order = jd.example_keys(jax.random.key(0), 0, 3), np.array([2, 0, 1])
  whole = run(keys, x, shift)
  moved = run(keys[order], x[order] + np.float32([[0], [1], [1]]), shift[order] + np.float32([0, 1, 1]))
  np.testing.assert_allclose(np.asarray(moved.value)[0], np.asarray(whole.value)[2], rtol=1e-5)
  assert moved.nfe.tolist()[0] == whole.nfe.tolist()[2]
  steps = np.asarray(whole.status.accepted) + np.asarray(whole.status.rejected)
  np.testing.assert_array_equal(whole.nfe, 2 * (6 * steps + 2))  # tsit5, two draws
  assert np.all(np.asarray(whole.standard_error) > 0)


def test_bits_per_dim_of_integers_are_those_of_their_cells():
  """The importance-weighted probabilities of 8 integers against the normal's own, 4 standard errors of 16 draws and
  2e-3 for the noise at t0."""
  data, sde = PhaseGaussian(np.array([0.1]), np.array([0.4])), SDE
  log_prob = likelihood.augmented(sde, t0=1e-3, rtol=1e-4, atol=1e-4, prior_log_prob=exact_prior(data, sde))
  bits = likelihood.bits_per_dim(log_prob, levels=8, data_range=(-2.0, 2.0), draws=16, importance=True)
  n = np.arange(8)[:, None]
  result = jax.jit(lambda n: bits(jax.random.key(0), n, data.score(sde)))(n)
  probability = 2.0 ** -np.asarray(result.value)
  edges = scipy.stats.norm(0.1, 0.4).cdf(np.linspace(-2, 2, 9))
  error = np.asarray(result.dequantization_error) * probability * np.log(2)
  assert np.all(np.abs(probability - np.diff(edges)) < 4 * error + 2e-3)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: likelihood.augmented(jd.VP()), TypeError, "got VP, which lacks given_position, velocity_std"),
    (lambda: likelihood.augmented(SDE, t0=0.0), ValueError, r"t0 must lie in \(0, t1\)"),
    (lambda: likelihood.augmented(SDE, jd.divergence.exact), TypeError, r"divergence.exact\(\)"),
    (lambda: likelihood.augmented(SDE, rtol=0.0), ValueError, "rtol"),
    (lambda: likelihood.position_bound(likelihood.augmented), TypeError, r"likelihood.augmented\(\)"),
    (lambda: likelihood.position_bound(likelihood.augmented(SDE), draws=0), ValueError, "draws must be at least 1"),
    (
      lambda: bound(2, True, jd.divergence.hutchinson()),
      ValueError,
      "importance=True needs the exact trace.*Give likelihood.augmented divergence",
    ),
    (
      lambda: bound(2, True, None)(jax.random.key(0), jnp.zeros((1, 65)), lambda u, t: -u),
      ValueError,
      "importance=True needs the exact trace",
    ),
    (
      lambda: bound(1, False)(jax.random.key(0), jnp.zeros((2, 3), int), lambda u, t: -u),
      TypeError,
      "x0 must be floating point",
    ),
    (lambda: bound(1, False)(jax.random.key(0), jnp.zeros(2), lambda u, t: -u), ValueError, r"with an axis of data"),
    (
      lambda: bound(1, False)(jax.random.key(0), jnp.zeros((2, 3)), lambda u, t: u[..., 0]),
      ValueError,
      "score must return an array",
    ),
    (
      lambda: likelihood.bits_per_dim(
        likelihood.augmented(SDE), 8, dequantization=likelihood.dequantization.gaussian(jd.VP())
      ),
      ValueError,
      r"Take dequantization.uniform\(\)",
    ),
  ],
)
def test_bad_input_is_refused(call, error, message, untyped):
  with pytest.raises(error, match=message):
    call()
