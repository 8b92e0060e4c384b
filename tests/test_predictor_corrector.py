import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import NORMAL
from moments import errors, moments, step_maps, walks
from oracles import compiled, gaussian
from switch import EACH_SDE

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import FixedGrid, Method

KEY = jax.random.key(0)
TS = np.asarray([1.0, 0.7, 0.5, 0.3, 0.1], np.float32)
PREDICTORS = ["reverse_sde", "reverse_diffusion", "stochastic_heun"]


def predictor(sde, steps, make="reverse_diffusion", **options):
  return getattr(jd.samplers, make)(sde, jd.time_grid(sde, steps, t0=0.05 * sde.t1), **options)


def still(sde, ts):
  """A predictor that does nothing."""
  return FixedGrid(sde, ts, Method(lambda field, x, memory, node, keys: (x, memory), jnp.arange(len(ts) - 1), ts[:0]))


@pytest.mark.parametrize("make", PREDICTORS)
def test_no_corrector_steps_give_the_predictor_bit_for_bit(make):
  def run(ts, x_T):
    alone = getattr(jd.samplers, make)(jd.VP(), ts)
    nothing = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(steps=0), path=1)
    return [sampler(KEY, x_T, gaussian().score(jd.VP())) for sampler in (alone, nothing)]

  expected, sample = compiled(run, TS, NORMAL[:3].astype(np.float32))
  np.testing.assert_array_equal(sample.x, expected.x)
  np.testing.assert_array_equal(sample.nfe, expected.nfe)
  assert sample.path.shape == (5, 3, 3)


@functools.cache
def corrections():
  """The corrector's steps alone at four times, for a score of 1 and for that of Gaussian data, with what they need."""

  def run(sde):
    data, ts = gaussian(), jnp.linspace(0.5, 0.1, 5) * sde.t1
    sampler = jd.samplers.predictor_corrector(still(sde, ts), jd.samplers.langevin_corrector(snr=0.3))
    maps = lambda score: step_maps(sampler, sampler.method.nodes, score, 3)
    return maps(lambda x, t: jnp.ones_like(x)), maps(data.score(sde)), sde.marginal(ts[1:]), data.moments(sde, ts[1:])

  return jax.jit(run)


@EACH_SDE
def test_step_size_of_the_langevin_corrector(sde, x64):
  """eta = 4 (r alpha sigma)^2 at the time of arrival, from the noise and the score that are added."""
  (slope, shift, noise), _, (alpha, sigma), _ = jax.device_get(corrections()(sde))
  np.testing.assert_allclose(noise[:, 0] ** 2, 4 * (0.3 * alpha * sigma) ** 2, rtol=1e-9)
  np.testing.assert_allclose(shift, 0.5 * noise**2, rtol=1e-9)
  np.testing.assert_allclose(slope, 1, rtol=1e-12)


@EACH_SDE
def test_many_corrector_steps_have_the_variance_of_langevin(sde, x64):
  """The stationary variance of one step at time t on N(m, v): v / (1 - eta / (4 v)); its mean is m."""
  _, (slope, shift, noise), (alpha, sigma), (mean, v) = jax.device_get(corrections()(sde))
  eta = (4 * (0.3 * alpha * sigma) ** 2)[:, None]
  np.testing.assert_allclose(shift / (1 - slope), mean, rtol=1e-6)
  np.testing.assert_allclose(noise**2 / (1 - slope**2), v / (1 - eta / (4 * v)), rtol=1e-6)


@functools.cache
def corrected():
  def run(sde):
    sampler = jd.samplers.predictor_corrector(predictor(sde, 400), jd.samplers.langevin_corrector(snr=0.16))
    return walks([sampler], gaussian(), draws=2)[0]

  return jax.jit(run)


@EACH_SDE
def test_moments_of_predictor_and_corrector(sde, x64):
  """Exact variance after 400 steps; the corrector's own bias is at most r^2 / (1 - r^2) = 2.6%, the predictor's 1%."""
  walk = jax.device_get(corrected()(sde))
  assert errors(walk)[1] < 0.04
  mean, _ = moments(walk)
  assert np.all(np.abs(mean - walk.means[1]) < 0.02 * np.sqrt(walk.variances[1]))


@functools.cache
def sampled():
  def run(sde):
    data = gaussian()
    sampler = jd.samplers.predictor_corrector(predictor(sde, 60), jd.samplers.langevin_corrector(steps=2))
    (mean, last), (variance, last_variance) = data.moments(sde, sampler.ts[jnp.asarray([0, -1])])
    x_T = mean[None] + jnp.sqrt(variance)[None] * jax.random.normal(jax.random.key(1), (2000, 3))
    return sampler(KEY, x_T, data.score(sde)).x, last, last_variance

  return jax.jit(run)


@EACH_SDE
def test_samples_have_the_moments_of_the_data(sde):
  """2000 samples, 2 corrector steps each of 60: 5 standard errors, plus 6% for corrector and predictor."""
  x, mean, variance = jax.device_get(sampled()(sde))
  assert np.all(np.abs(x.mean(axis=0) - mean) < (5 / np.sqrt(2000) + 0.02) * np.sqrt(variance))
  np.testing.assert_allclose(x.var(axis=0), variance, rtol=5 * np.sqrt(2 / 2000) + 0.06)


def test_a_corrector_mends_a_coarse_predictor(x64):
  """Variance after 10 steps of the flow by Euler's method, with and without corrector steps."""

  def run(sde):
    alone = predictor(sde, 10, "reverse_sde", eta=0.0)
    mended = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(snr=0.4))
    return walks([alone], gaussian())[0], walks([mended], gaussian(), draws=2)[0]

  without, with_corrector = (errors(walk, eta=0.0)[1] for walk in compiled(run, jd.VE()))
  assert with_corrector < 0.7 * without, (with_corrector, without)


def test_your_own_corrector_acts_at_the_time_of_arrival():
  def step(field, x, t, keys):
    return jnp.broadcast_to(t, x.shape) + 0 * field.score(x, t)

  def run(ts):
    alone = jd.samplers.reverse_diffusion(jd.VP(), ts)
    sampler = jd.samplers.predictor_corrector(alone, jd.samplers.Corrector(step, 1), path=1)
    return sampler(KEY, jnp.ones((2, 1)), lambda x, t: -x)

  sample = compiled(run, TS)
  np.testing.assert_allclose(sample.path[1:, 0, 0], TS[1:], rtol=1e-6)
  assert sample.nfe.tolist() == [8, 8]


def test_noises_of_predictor_and_corrector_are_independent():
  """Two noises of 10 000 examples in one step, score 0: the correlation is 0 within 4 standard errors."""
  sde, score = jd.VE(sigma_max=2.0), lambda x, t: jnp.zeros_like(x)

  def run(ts):
    alone = jd.samplers.reverse_diffusion(sde, ts)
    both = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(steps=2))
    first, second = (sampler(KEY, jnp.zeros((10_000, 1)), score).x[:, 0] for sampler in (alone, both))
    return first, second - first, sde.marginal(0.9)[1]

  first, second, sigma = compiled(run, np.asarray([1.0, 0.9], np.float32))
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
  np.testing.assert_allclose(second.var(), 2 * 4 * (0.16 * sigma) ** 2, rtol=4 * np.sqrt(2 / 10_000))


def test_evaluations_are_counted_and_example_k_is_the_same_in_any_batch():
  sde, calls = jd.SubVP(), []

  def score(x, t, broken):
    jax.debug.callback(lambda _: calls.append(1), t)
    return jnp.where(broken[:, None], jnp.nan, gaussian().score(sde)(x, t))

  @jax.jit
  def run(ts, keys, x, broken):
    alone, corrector = jd.samplers.stochastic_heun(sde, ts), jd.samplers.langevin_corrector(steps=2)
    return jd.samplers.predictor_corrector(alone, corrector, denoise=True)(keys, x, score, {"broken": broken})

  keys, x_T = jd.example_keys(KEY, 0, 3), NORMAL[:3].astype(np.float32)
  whole = jax.device_get(run(TS, keys, x_T, np.asarray([False, True, False])))
  jax.effects_barrier()
  assert whole.nfe.tolist() == [len(calls)] * 3 == [4 * (2 + 2) + 1] * 3
  assert whole.status.code.tolist() == [0, 2, 0]
  order = np.asarray([2, 1, 0])
  turned = np.asarray(run(TS, keys[order], x_T[order], np.zeros(3, bool)).x)
  np.testing.assert_allclose(turned[[0, 2]], whole.x[[2, 0]], rtol=1e-5)


def test_bad_input_is_refused(untyped):
  make, corrector, ts = (
    jd.samplers.predictor_corrector,
    jd.samplers.langevin_corrector(),
    np.asarray([1.0, 0.5], np.float32),
  )
  good = jd.samplers.reverse_diffusion(jd.VP(), ts)
  with pytest.raises(ValueError, match="predictor must step from one state alone"):
    make(FixedGrid(jd.VP(), ts, good.method._replace(memory=lambda x: jnp.zeros_like(x))), corrector)
  for options in ({"denoise": True}, {"path": 1}):
    with pytest.raises(ValueError, match="predictor must be made without denoise and path"):
      make(jd.samplers.reverse_diffusion(jd.VP(), ts, **options), corrector)
  with pytest.raises(TypeError, match="predictor must be a FixedGrid, got function"):
    make(lambda key, x, score: x, corrector)
  with pytest.raises(TypeError, match="corrector is a factory: did you forget to call it"):
    make(good, jd.samplers.langevin_corrector)
  with pytest.raises(TypeError, match="corrector must be a Corrector, got function"):
    make(good, lambda x: x)
  with pytest.raises(ValueError, match="predictor_corrector needs noise at its last time, but sigma is 0"):
    make(jd.samplers.reverse_diffusion(jd.VP(), np.asarray([1.0, 0.0], np.float32)), corrector)
  with pytest.raises(ValueError, match="snr must be positive"):
    jd.samplers.langevin_corrector(snr=0.0)
  with pytest.raises(ValueError, match="steps must be at least 0"):
    jd.samplers.langevin_corrector(steps=-1)
