import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Gaussian, gaussian

import jaxdiff as jd
from jaxdiff import ode

KEY = jax.random.key(0)
NORMAL = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)


@pytest.mark.slow
def test_samples_have_the_moments_of_the_data():
  """1000 samples of VE: 4 standard errors plus 4% for the tolerance, together 22%. New noise after a rejection would
  give 40%."""
  sde, n, data = jd.VE(0.01, 50.0), 1000, Gaussian(np.array([1.0, -0.5, 0.2]), np.array([0.5, 1.0, 0.3]))
  x_T, _ = jd.perturb(jax.random.key(1), data.sample(jax.random.key(2), n), sde.t1, sde)
  sampler = jd.samplers.adaptive_sde(sde, 0.03, 0.03)
  sample = jax.jit(lambda x: sampler(KEY, x, data.score(sde)))(x_T)
  jd.raise_if_failed(sample)
  assert sample.status.rejected.mean() > 0.1 * sample.status.accepted.mean()
  mean, variance = data.moments(sde, jnp.full(1, jd.schedules.start_time(sde, None, 2e-3)))
  assert np.all(np.abs(sample.x.mean(axis=0) - mean[0]) < (4 / np.sqrt(n) + 0.02) * np.sqrt(variance[0]))
  np.testing.assert_allclose(sample.x.var(axis=0), variance[0], rtol=4 * np.sqrt(2 / n) + 0.04)


@functools.cache
def program():
  """A denoised solve of VP, and the states at which the score was called; it breaks below 0.5 for some examples."""
  sde, data, calls = jd.VP(), gaussian(), []

  def score(x, t, broken):
    jax.debug.callback(calls.append, x, ordered=True)
    return jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, data.score(sde)(x, t))

  def run(tolerance, keys, x, broken, max_steps):
    with mock.patch.object(ode, "Solver"):  # whose checks want numbers that are known
      sampler = jd.samplers.adaptive_sde(sde, tolerance, tolerance, 0.1, max_steps, denoise=True)
    return sampler(keys, x, score, {"broken": broken})

  return jax.jit(run), calls


def solve(tolerance, keys=None, x=NORMAL, broken=(), max_steps=4096):
  """16 samples and the states at which the score was called.

  One program for all: another one may round otherwise, and the next step then ends where the path is another one.
  """
  keys = jd.example_keys(KEY, 0, 16) if keys is None else keys
  run, calls = program()
  calls.clear()
  sample = run(tolerance, keys, x, np.isin(np.arange(16), broken), max_steps)
  jax.effects_barrier()
  return jax.device_get(sample), list(calls)


def test_a_tighter_tolerance_follows_the_same_path_more_closely():
  """One key is one Brownian path, so samples converge one by one."""
  loose, middle, tight = (solve(tolerance)[0] for tolerance in (0.1, 0.02, 0.002))
  error = [float(np.sqrt(np.mean((sample.x - tight.x) ** 2))) for sample in (loose, middle)]
  assert error[1] < 0.5 * error[0] < 0.1
  assert np.all(middle.nfe > loose.nfe)


def test_evaluations_are_counted_example_by_example():
  """Two a step, taken or refused, and one to denoise; the whole batch is asked until the slowest has arrived."""
  sample, calls = solve(0.2)
  tried = sample.status.accepted + sample.status.rejected
  np.testing.assert_array_equal(sample.nfe, 2 * tried + 1)
  assert sample.nfe.max() == len(calls)
  assert sample.status.rejected[0] > 0


def test_example_k_is_the_same_in_any_batch():
  """Beside an example that takes other steps, and among others: rounding may differ, steps do not."""
  far = NORMAL.copy()
  far[1] *= 40
  order = np.arange(16)[::-1]
  (whole, _), (other, _) = solve(0.1, x=far), solve(0.1, jd.example_keys(KEY, 0, 16)[order], NORMAL[order])
  assert whole.nfe[1] != whole.nfe[2]
  np.testing.assert_array_equal(whole.nfe[2:], other.nfe[order][2:])
  np.testing.assert_allclose(whole.x[2:], other.x[order][2:], atol=1e-4)


def test_the_last_denoising_is_tweedies():
  sample, calls = solve(0.2)
  data, (alpha, sigma) = gaussian(), (float(v) for v in jd.VP().marginal(0.1))
  last = np.asarray(calls[-1])
  score = (alpha * data.mean - last) / (alpha**2 * data.std**2 + sigma**2)
  np.testing.assert_allclose(sample.x, (last + sigma**2 * score) / alpha, rtol=1e-3, atol=1e-5)


def test_failures_are_reported_and_nan():
  """The score breaks below t = 0.5 for one example of 16, and 5 steps are too few for any."""
  sample, _ = solve(0.1, broken=[1])
  assert np.flatnonzero(sample.status.code).tolist() == [1]
  assert sample.status.code[1] == 2
  assert np.flatnonzero(np.isnan(sample.x[:, 0])).tolist() == [1]
  assert sample.status.accepted[1] > 0
  assert sample.nfe[1] < 500  # it creeps up to t = 0.5 before its steps vanish; max_steps are 4096
  with pytest.raises(jd.SolveError, match="1 of 16 examples .* not finite"):
    jd.raise_if_failed(sample)
  short, _ = solve(0.1, max_steps=5)
  assert short.status.code.tolist() == [1] * 16
  assert short.nfe.tolist() == [11] * 16
  assert np.all(np.isnan(short.x))
  with pytest.raises(jd.SolveError, match="16 of 16 examples .* raise max_steps"):
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
    jax.eval_shape(lambda x: jd.samplers.adaptive_sde(jd.VP())(KEY, x, lambda x, t: x[:, :1]), NORMAL)
