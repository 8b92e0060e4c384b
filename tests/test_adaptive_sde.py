import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Gaussian, gaussian

import jaxdiff as jd

KEY = jax.random.key(0)


def exact_start(data, sde, n):
  mean, variance = data.moments(sde, jnp.full(1, sde.t1))
  return mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(1), (n, mean.shape[1]), mean.dtype)


def solve(sde, tolerance, data, x_T, **options):
  sampler = jd.samplers.adaptive_sde(sde, tolerance, tolerance, **options)
  return jax.jit(lambda x: sampler(KEY, x, data.score(sde)))(x_T)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_samples_have_the_moments_of_the_data(name):
  """2000 samples: 4 standard errors plus 4% for the tolerance. New noise after a rejection gives 15% (VP), 40% (VE)."""
  sde, n, data = SDES[name], 2000, Gaussian(np.array([1.0, -0.5, 0.2]), np.array([0.5, 1.0, 0.3]))
  sample = solve(sde, 0.03, data, exact_start(data, sde, n))
  jd.raise_if_failed(sample)
  assert sample.status.rejected.mean() > 0.1 * sample.status.accepted.mean()
  mean, variance = data.moments(sde, jnp.full(1, jd.schedules.start_time(sde, None, 2e-3)))
  assert np.all(np.abs(sample.x.mean(axis=0) - mean[0]) < (4 / np.sqrt(n) + 0.02) * np.sqrt(variance[0]))
  np.testing.assert_allclose(sample.x.var(axis=0), variance[0], rtol=4 * np.sqrt(2 / n) + 0.04)


def test_a_tighter_tolerance_follows_the_same_path_more_closely():
  """One key is one Brownian path, so samples converge one by one."""
  sde, data = jd.SubVP(), gaussian()
  x_T = exact_start(data, sde, 32)
  loose, middle, tight = (solve(sde, tolerance, data, x_T, t0=0.05) for tolerance in (0.1, 0.02, 0.002))
  error = [float(jnp.sqrt(jnp.mean((sample.x - tight.x) ** 2))) for sample in (loose, middle)]
  assert error[1] < 0.5 * error[0] < 0.1
  assert np.all(middle.nfe > loose.nfe)


def test_evaluations_are_counted_example_by_example():
  sde, calls, data = jd.VP(), [], gaussian()

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return data.score(sde)(x, t)

  sample = jd.samplers.adaptive_sde(sde, 0.2, 0.2, denoise=True)(KEY, jnp.ones((1, 3)), score)
  jax.effects_barrier()
  tried = sample.status.accepted + sample.status.rejected
  assert sample.nfe.tolist() == [len(calls)] == (2 * tried + 1).tolist()
  assert sample.status.rejected[0] > 0


def test_example_k_is_the_same_in_any_batch():
  """Beside an example that takes other steps, and alone: rounding may differ, steps do not."""
  sde, data = jd.VP(), gaussian()
  x_T = exact_start(data, sde, 3) * jnp.asarray([[1.0], [40.0], [1.0]])
  sampler = jax.jit(lambda key, x: jd.samplers.adaptive_sde(sde, 0.1, 0.1)(key, x, data.score(sde)))
  whole, alone = sampler(KEY, x_T), sampler(jd.example_keys(KEY, 2, 1), x_T[2:])
  assert whole.nfe[1] != whole.nfe[2] == alone.nfe[0]
  np.testing.assert_allclose(whole.x[2:], alone.x, atol=1e-4)


def test_the_last_denoising_is_tweedies():
  sde, data = jd.VP(), gaussian()
  x_T = exact_start(data, sde, 4)
  noisy, clean = (solve(sde, 0.2, data, x_T, t0=0.1, denoise=denoise) for denoise in (False, True))
  alpha, sigma = sde.marginal(0.1)
  np.testing.assert_allclose(
    clean.x, (noisy.x + sigma**2 * data.score(sde)(noisy.x, jnp.full(4, 0.1))) / alpha, rtol=1e-3, atol=1e-5
  )


def test_failures_are_reported_and_nan():
  """The score breaks below t = 0.5 for one example of three, and 5 steps are too few for any."""
  sde = jd.VP()
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  run = lambda x, cond, **options: jd.samplers.adaptive_sde(sde, 0.1, 0.1, **options)(KEY, x, score, cond)
  cond = {"broken": jnp.asarray([False, True, False])}
  sample = jax.jit(run)(jnp.ones((3, 2)), cond)
  assert sample.status.code.tolist() == [0, 2, 0]
  assert jnp.isnan(sample.x[:, 0]).tolist() == [False, True, False]
  assert sample.status.accepted[1] > 0
  assert sample.nfe[1] < 500  # it creeps up to t = 0.5 before its steps vanish; max_steps are 4096
  with pytest.raises(jd.SolveError, match="1 of 3 examples .* not finite"):
    jd.raise_if_failed(sample)
  short = jax.jit(lambda x: run(x, cond, max_steps=5))(jnp.ones((3, 2)))
  assert short.status.code.tolist() == [1, 1, 1]
  assert short.nfe.tolist() == [10, 10, 10]
  assert jnp.all(jnp.isnan(short.x))
  with pytest.raises(jd.SolveError, match="3 of 3 examples .* raise max_steps"):
    jd.raise_if_failed(short)


def test_bad_input_is_refused(untyped):
  with pytest.raises(ValueError, match="rtol must be positive, got 0"):
    jd.samplers.adaptive_sde(jd.VP(), rtol=0.0)
  with pytest.raises(ValueError, match="max_steps must be at least 1"):
    jd.samplers.adaptive_sde(jd.VP(), max_steps=0)
  with pytest.raises(ValueError, match="t0 = 0.0 has no noise"):
    jd.samplers.adaptive_sde(jd.VP(), t0=0.0)
  with pytest.raises(TypeError, match="did you forget to call it"):
    jd.samplers.adaptive_sde(jd.VP)
  with pytest.raises(ValueError, match="score must return an array of the shape of x"):
    jd.samplers.adaptive_sde(jd.VP())(KEY, jnp.ones((4, 2)), lambda x, t: x[:, :1])
