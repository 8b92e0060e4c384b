"""Joint densities of positions and velocities, and bounds on that of positions, on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from phase import PhaseGaussian, phase_gaussian

import jaxdiff as jd
from jaxdiff import likelihood

KEY, DATA = jax.random.key(0), phase_gaussian()
SDE, T0 = jd.CLD(gamma=0.5), 0.01
EXACT = jd.divergence.exact()


def exact_prior(data, sde):
  return lambda u: data.log_prob(u, sde, sde.t1)


def joint(base_log_prob, **options):
  base = jd.flow.Base(SDE.prior_sample, base_log_prob)
  return jd.flow.cnf(base, EXACT, t0=T0, t1=SDE.t1, **options).log_prob


def test_the_joint_density_of_gaussian_data_is_exact(x64):
  """log p(x, v) at t0 by the flow with the exact density at t1, 1e-6 at tolerance 1e-8; no score of positions."""
  t, score = jnp.full(5, T0), DATA.score(SDE)
  u, _ = jd.cld.perturb(KEY, DATA.sample(KEY, 5), t, SDE)
  half = lambda u, t: score(u, t) * jnp.asarray([0.0, 1.0])[None, None]
  field = jd.reverse(SDE, half, 0.0)[0]
  log_prob = joint(exact_prior(DATA, SDE), rtol=1e-8, atol=1e-8, steps="shared")
  result = jax.jit(lambda u: log_prob(KEY, u, field))(u)
  jd.raise_if_failed(result)
  np.testing.assert_allclose(result.value, DATA.log_prob(u, SDE, T0), atol=1e-6)


def test_the_joint_density_in_single_precision_with_the_default_prior():
  """1e-3 nats a dimension of the exact one with the exact prior; the default one is off by what it is off itself."""
  t, score = jnp.full(5, T0), DATA.score(SDE)
  u, _ = jd.cld.perturb(KEY, DATA.sample(KEY, 5), t, SDE)
  result = jax.jit(lambda u: joint(SDE.prior_log_prob)(KEY, u, jd.reverse(SDE, score, 0.0)[0]))(u)
  missing = exact_prior(DATA, SDE)(result.latent) - SDE.prior_log_prob(result.latent)
  np.testing.assert_allclose(result.value + missing, DATA.log_prob(u, SDE, T0), atol=6e-3)
  assert np.all(np.abs(missing) < 6 * 1e-2)


def bound(draws, importance, divergence=EXACT, data=DATA, sde=SDE, **options):
  options = {"rtol": 1e-4, "atol": 1e-4, "t0": T0, "prior_log_prob": exact_prior(data, sde)} | options
  return likelihood.position_bound(likelihood.augmented(sde, divergence, **options), draws, importance)


def test_the_bounds_are_below_the_density_of_positions_and_importance_is_tighter():
  """Narrow data at a time at which positions and velocities know of each other. The plain bound loses KL(q(v) ||
  p(v | x)), a closed form, within 3 standard errors over 50 x and 32 velocities; importance less than a tenth of it."""
  data, t0 = PhaseGaussian(np.array([0.3, -0.2]), np.array([0.1, 0.2])), 0.02
  x = data.sample(jax.random.key(3), 50)
  exact = data.position_log_prob(x, SDE, t0)
  plain, tight = (
    jax.jit(lambda x, k=k: bound(32, k, data=data, t0=t0)(KEY, x, data.score(SDE)))(x) for k in (False, True)
  )
  jd.raise_if_failed(plain)
  assert np.all(np.asarray(plain.standard_error) == 0)
  mean, cov = (np.asarray(v[0], np.float64) for v in data.moments(SDE, jnp.full(1, t0)))
  slope = cov[:, 0, 1] / cov[:, 0, 0]
  variance = cov[:, 1, 1] - slope * cov[:, 0, 1]
  centre = mean[:, 1] + slope * (np.asarray(x) - mean[:, 0])
  ratio = SDE.velocity_std**2 / variance
  loss = 0.5 * np.sum(ratio - 1 - np.log(ratio) + centre**2 / variance, axis=1)
  z = (np.asarray(plain.value) - (exact - loss)) / np.asarray(plain.velocity_error)
  assert abs(z.mean()) < 3 / np.sqrt(50) * max(1, z.std())
  assert loss.mean() > 0.1
  gap, tight_gap = (np.mean(exact - np.asarray(r.value)) for r in (plain, tight))
  np.testing.assert_allclose(gap, loss.mean(), rtol=0.15)
  assert -0.02 < tight_gap < 0.1 * gap


def test_velocities_that_say_nothing_of_positions_cost_nothing():
  """gamma = 1 and N(0, I) data: every single draw is log p(x), to the tolerance of the solve."""
  sde = jd.CLD(gamma=1.0)
  score = jd.cld.score_fn(lambda _, u, t: jnp.zeros_like(u[..., 0]), None, sde)
  x = jax.random.normal(KEY, (4, 3))
  fn = bound(2, False, data=PhaseGaussian(np.zeros(3), np.ones(3)), sde=sde)
  result = jax.jit(lambda x: fn(KEY, x, score))(x)
  np.testing.assert_allclose(result.value, scipy.stats.norm.logpdf(x).sum(axis=1), atol=3e-3)
  assert np.all(np.asarray(result.velocity_error) < 2e-3)


def test_draws_and_examples_are_the_same_in_any_batch():
  """Per-example steps and keys; probes of the trace have an error of their own, and guided scores count twice."""

  class Guided:
    def __call__(self, u, t, shift):
      return -u + shift[:, None, None]

    def evaluations(self, times=None):
      return 2

  x, cond = DATA.sample(KEY, 3), {"shift": jnp.asarray([0.0, 1.0, 2.0])}
  fn = bound(2, False, jd.divergence.hutchinson(2), prior_log_prob=None, rtol=1e-3, atol=1e-3)
  whole = jax.jit(lambda x, cond: fn(KEY, x, Guided(), cond))(x, cond)
  rest = {"shift": cond["shift"][2:]}
  alone = jax.jit(lambda x, cond: fn(jd.example_keys(KEY, 2, 1), x, lambda u, t, shift: Guided()(u, t, shift), cond))(
    x[2:], rest
  )
  np.testing.assert_allclose(whole.value[2:], alone.value, rtol=1e-5)
  np.testing.assert_array_equal(whole.nfe[2:], 2 * alone.nfe)
  assert np.all(np.isfinite(np.asarray(whole.standard_error)))


def test_bits_per_dim_of_integers_are_those_of_their_cells():
  """The importance-weighted probabilities of 8 integers against the normal's own, 4 standard errors of 16 draws and
  2e-3 for the noise at t0."""
  data, sde = PhaseGaussian(np.array([0.1]), np.array([0.4])), SDE
  log_prob = likelihood.augmented(sde, t0=1e-3, rtol=1e-4, atol=1e-4, prior_log_prob=exact_prior(data, sde))
  bits = likelihood.bits_per_dim(log_prob, levels=8, data_range=(-2.0, 2.0), draws=16, importance=True)
  n = jnp.arange(8)[:, None]
  result = jax.jit(lambda n: bits(KEY, n, data.score(sde)))(n)
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
      lambda: bound(2, True, None)(KEY, jnp.zeros((1, 65)), lambda u, t: -u),
      ValueError,
      "importance=True needs the exact trace",
    ),
    (lambda: bound(1, False)(KEY, jnp.zeros((2, 3), int), lambda u, t: -u), TypeError, "x0 must be floating point"),
    (lambda: bound(1, False)(KEY, jnp.zeros(2), lambda u, t: -u), ValueError, r"with an axis of data"),
    (lambda: bound(1, False)(KEY, jnp.zeros((2, 3)), lambda u, t: u[..., 0]), ValueError, "score must return an array"),
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
