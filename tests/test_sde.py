import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES

import jaxdiff as jd
from jaxdiff import keys

EACH = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def interior(sde, count=20):
  return np.linspace(0.02, 0.98, count) * sde.t1


@EACH
def test_marginal_solves_the_moment_equations(sde, x64):
  """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, with f read off the drift."""

  @jax.jit
  def run(sde, t):
    f = sde.drift(jnp.ones((20, 1)), t)[:, 0]
    return f, sde.diffusion(t), jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))

  f, g, ((alpha, sigma), (d_alpha, d_sigma)) = jax.tree.map(np.asarray, run(sde, interior(sde)))
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(2 * sigma * d_sigma, 2 * f * sigma**2 + g**2, rtol=1e-9)


@EACH
def test_marginal_starts_at_the_data(sde):
  alpha, sigma = sde.marginal(0.0)
  assert alpha == 1
  assert sigma == (pytest.approx(0.01, rel=1e-6) if isinstance(sde, jd.VE) else 0)


@EACH
def test_time_of_log_snr_inverts_log_snr(sde, x64):
  t = interior(sde)
  there_and_back = jax.jit(lambda sde, t: sde.time_of_log_snr(jd.log_snr(sde, t)))
  np.testing.assert_allclose(there_and_back(sde, t), t, rtol=1e-9)


@EACH
def test_float32_has_all_its_digits_at_both_ends_of_time(sde):
  """sigma = sqrt(1 - alpha^2) would be 5% off at t = 1e-5."""
  t = np.array([1e-6, 1e-5, 1e-3, 0.5, 0.99, 0.999, 1.0]) * sde.t1
  run = jax.jit(lambda sde, t: (*sde.marginal(t), sde.diffusion(t)))
  single = run(sde, t.astype(np.float32))
  with jax.enable_x64(True):
    double = run(sde, t)
  for low, high in zip(single, double, strict=True):
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-5)


@EACH
def test_log_snr_inverse_in_float32_near_the_data(sde):
  t = jd.schedules.start_time(sde, None, 1e-3)
  alpha, sigma = sde.marginal(t)
  expected = 0.01 if isinstance(sde, jd.VE) else 1e-3
  np.testing.assert_allclose(sigma / alpha, expected, rtol=2e-4)


def test_subvp_standard_deviation_is_that_of_its_own_sde():
  """A peer's kernel has 1 - exp(-2 B), 0.197 instead of 0.104 at t = 0.1."""
  np.testing.assert_allclose(jd.SubVP().marginal(0.1)[1], 0.1037, atol=1e-4)


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_state_keeps_its_type_and_schedules_stay_float32(sde, dtype):
  x, t = jax.ShapeDtypeStruct((3, 2), dtype), jax.ShapeDtypeStruct((3,), dtype)
  state = lambda x, t: (sde.drift(x, t), sde.diffuse(t, x), *jd.perturb(jax.random.key(0), x, t, sde))
  assert {value.dtype for value in jax.eval_shape(state, x, t)} == {jnp.dtype(dtype)}
  assert jax.eval_shape(sde.marginal, t)[0].dtype == jnp.float32


@EACH
def test_time_may_be_scalar_or_one_per_example(sde):
  x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  t, run = np.float32(0.3 * sde.t1), jax.jit(lambda sde, x, t: (sde.drift(x, t), sde.diffuse(t, x)))
  for scalar, each in zip(run(sde, x, t), run(sde, x, np.full(4, t)), strict=True):
    np.testing.assert_array_equal(scalar, each)


@EACH
def test_perturb_draws_from_the_marginal(sde):
  """20 000 draws of one example: mean and standard deviation within 4 standard errors."""
  n, t = 20_000, 0.4 * sde.t1
  x0 = np.full((n, 1), 1.5, np.float32)
  run = jax.jit(lambda key, x0, t, sde: (jd.perturb(key, x0, t, sde), sde.marginal(t)))
  (x_t, noise), (alpha, sigma) = jax.tree.map(np.asarray, run(jax.random.key(1), x0, t, sde))
  assert abs(x_t.mean() - alpha * 1.5) < 4 * sigma / np.sqrt(n)
  assert abs(x_t.std() / sigma - 1) < 4 / np.sqrt(2 * n)
  np.testing.assert_allclose(x_t, alpha * x0 + sigma * noise, rtol=1e-6, atol=5e-7)


@EACH
def test_prior_density_is_that_of_prior_samples(sde):
  """Mean log-density of samples of N(0, s^2 I) is -d (1/2 + log(s sqrt(2 pi))), with standard deviation sqrt(d / 2)."""
  n, d = 4000, 6

  @jax.jit
  def run(sde):
    return sde.prior_log_prob(sde.prior_sample(jax.random.key(2), (n, 2, 3))), sde.marginal(sde.t1)[1]

  log_prob, sigma = jax.tree.map(np.asarray, run(sde))
  scale = getattr(sde, "sigma_max", 1.0)
  entropy = d * (0.5 + np.log(scale * np.sqrt(2 * np.pi)))
  assert abs(log_prob.mean() + entropy) < 4 * np.sqrt(d / 2 / n)
  if scale > 1:
    np.testing.assert_allclose(sigma, scale, rtol=1e-5)


@EACH
def test_reverse_keeps_the_marginals_for_every_eta(sde, x64):
  """On N(0, s^2) data the variance of x_t obeys dv/dt = 2 a v - b^2, for the reversed process with drift a, noise b."""
  s = 0.6

  @jax.jit
  def run(sde, t):
    variance = lambda t: sde.marginal(t)[0] ** 2 * s**2 + sde.marginal(t)[1] ** 2
    score = lambda x, t: -x / variance(t)[:, None]
    value, rate = jax.jvp(variance, (t,), (jnp.ones_like(t),))
    sides = []
    for eta in (0.0, 0.5, 1.0):
      drift, diffuse = jd.reverse(sde, score, eta)
      a, b = drift(jnp.ones((5, 1)), t)[:, 0], diffuse(t, jnp.ones((5, 1)))[:, 0]
      sides.append(2 * a * value - b**2)
    return jnp.stack(sides), rate

  sides, rate = run(sde, interior(sde, 5))
  for side in np.asarray(sides):
    np.testing.assert_allclose(side, rate, rtol=1e-9)


@EACH
def test_process_is_a_pytree_traced_once_for_all_values(sde):
  traces = []

  @jax.jit
  def sigma(sde, t):
    traces.append(1)
    return sde.marginal(t)[1]

  other = jax.tree.map(lambda v: 1.1 * v, sde)
  first, second = sigma(sde, 0.3), sigma(other, 0.3)
  np.testing.assert_allclose(first, sde.marginal(0.3)[1], rtol=1e-6)
  assert len(traces) == 1
  assert hash(sde) == hash(dataclasses.replace(sde))
  if not isinstance(sde, jd.EDM):
    assert second != first
    assert all(np.isfinite(v) and v != 0 for v in jax.tree.leaves(jax.grad(lambda s: s.marginal(0.3)[1])(sde)))


def test_noise_belongs_to_the_example_not_to_the_batch():
  key, x = jax.random.key(3), jnp.zeros((6, 4))
  _, whole = jd.perturb(key, x, 0.5, jd.VP())
  _, tail = jd.perturb(jd.example_keys(key, start=4, count=2), x[:2], 0.5, jd.VP())
  np.testing.assert_array_equal(whole[4:], tail)
  np.testing.assert_array_equal(
    jd.VP().prior_sample(key, (6, 4))[4:], jd.VP().prior_sample(jd.example_keys(key, 4, 2), (2, 4))
  )


@pytest.mark.parametrize(
  ("key", "error", "message"),
  [
    (jnp.zeros(2, jnp.uint32), TypeError, r"typed key made by jax.random.key"),
    (jax.random.key(0, impl="rbg"), ValueError, "threefry2x32"),
    (jax.random.split(jax.random.key(0), 3), ValueError, r"one per example, \[2\]; got shape \(3,\)"),
  ],
)
def test_bad_keys_are_refused(key, error, message, untyped):
  with pytest.raises(error, match=message):
    keys.per_example(key, 2)
