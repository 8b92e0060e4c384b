import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import affine_steps, errors, moments
from oracles import SDES, gaussian

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import FixedGrid, Method

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
KEY = jax.random.key(0)


def predictor(sde, steps, make="reverse_diffusion", **options):
  return getattr(jd.samplers, make)(sde, jd.time_grid(sde, steps, t0=0.05 * sde.t1), **options)


@pytest.mark.parametrize("make", ["reverse_sde", "reverse_diffusion", "stochastic_heun"])
def test_no_corrector_steps_give_the_predictor_bit_for_bit(make):
  sde = jd.VP()
  alone = predictor(sde, 5, make)
  nothing = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(steps=0), path=1)
  x_T = sde.prior_sample(KEY, (3, 3))
  expected, sample = (jax.jit(lambda x, s=s: s(KEY, x, gaussian().score(sde)))(x_T) for s in (alone, nothing))
  np.testing.assert_array_equal(sample.x, expected.x)
  np.testing.assert_array_equal(sample.nfe, expected.nfe)
  assert sample.path.shape == (6, 3, 3)


@EACH_SDE
def test_step_size_of_the_langevin_corrector(sde, x64):
  """eta = 4 (r alpha sigma)^2 at the time of arrival, from the noise and the score that are added."""
  ts = jnp.linspace(1.0, 0.1, 5) * sde.t1
  still = FixedGrid(sde, ts, Method(lambda field, x, memory, node, keys: (x, memory), jnp.arange(4), ts[:0]))
  sampler = jd.samplers.predictor_corrector(still, jd.samplers.langevin_corrector(snr=0.3))
  slope, shift, noise = affine_steps(sampler, lambda x, t: jnp.ones_like(x), 1)
  alpha, sigma = sde.marginal(ts[1:])
  np.testing.assert_allclose(noise[:, 0] ** 2, 4 * (0.3 * alpha * sigma) ** 2, rtol=1e-9)
  np.testing.assert_allclose(shift, 0.5 * noise**2, rtol=1e-9)
  np.testing.assert_allclose(slope, 1, rtol=1e-12)


@EACH_SDE
def test_many_corrector_steps_have_the_variance_of_langevin(sde, x64):
  """The stationary variance of one step at time t on N(m, v): v / (1 - eta / (4 v)); its mean is m."""
  data, ts = gaussian(), jnp.linspace(0.5, 0.1, 3) * sde.t1
  still = FixedGrid(sde, ts, Method(lambda field, x, memory, node, keys: (x, memory), jnp.arange(2), ts[:0]))
  sampler = jd.samplers.predictor_corrector(still, jd.samplers.langevin_corrector())
  slope, shift, noise = affine_steps(sampler, data.score(sde), 3)
  mean, v = data.moments(sde, ts[1:])
  alpha, sigma = sde.marginal(ts[1:])
  eta = (4 * (0.16 * alpha * sigma) ** 2)[:, None]
  np.testing.assert_allclose(shift / (1 - slope), mean, rtol=1e-6)
  np.testing.assert_allclose(noise**2 / (1 - slope**2), v / (1 - eta / (4 * v)), rtol=1e-6)


@EACH_SDE
def test_moments_of_predictor_and_corrector(sde, x64):
  """Exact variance after 400 steps; the corrector's own bias is at most r^2 / (1 - r^2) = 2.6%, the predictor's 1%."""
  sampler = jd.samplers.predictor_corrector(predictor(sde, 400), jd.samplers.langevin_corrector(snr=0.16))
  data = gaussian()
  assert errors(sampler, data, draws=2)[1] < 0.04
  mean, _ = moments(sampler, data, draws=2)
  exact, variance = (np.asarray(v[0]) for v in data.moments(sde, sampler.ts[-1:]))
  assert np.all(np.abs(mean - exact) < 0.02 * np.sqrt(variance))


@pytest.mark.parametrize("sde", [jd.VP(), jd.SubVP(), jd.VE(), jd.EDM()], ids=["vp", "subvp", "ve", "edm"])
def test_samples_have_the_moments_of_the_data(sde):
  """2000 samples, 2 corrector steps each of 60: 5 standard errors, plus 6% for corrector and predictor."""
  data, n = gaussian(), 2000
  sampler = jd.samplers.predictor_corrector(predictor(sde, 60), jd.samplers.langevin_corrector(steps=2))
  mean, variance = data.moments(sde, sampler.ts[:1])
  x_T = mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(1), (n, 3))
  x = jax.jit(lambda x: sampler(KEY, x, data.score(sde)).x)(x_T)
  mean, variance = (v[0] for v in data.moments(sde, sampler.ts[-1:]))
  assert np.all(np.abs(x.mean(axis=0) - mean) < (5 / np.sqrt(n) + 0.02) * np.sqrt(variance))
  np.testing.assert_allclose(x.var(axis=0), variance, rtol=5 * np.sqrt(2 / n) + 0.06)


def test_a_corrector_mends_a_coarse_predictor(x64):
  """Variance after 10 steps of the flow by Euler's method, with and without corrector steps."""
  sde, data = jd.VE(), gaussian()
  alone = predictor(sde, 10, "reverse_sde", eta=0.0)
  mended = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(snr=0.4))
  without, with_corrector = errors(alone, data, eta=0.0)[1], errors(mended, data, eta=0.0, draws=2)[1]
  assert with_corrector < 0.7 * without, (with_corrector, without)


def test_your_own_corrector_acts_at_the_time_of_arrival():
  def step(field, x, t, keys):
    return jnp.broadcast_to(t, x.shape) + 0 * field.score(x, t)

  alone = predictor(jd.VP(), 4)
  sampler = jd.samplers.predictor_corrector(alone, jd.samplers.Corrector(step, 1), path=1)
  sample = sampler(KEY, jnp.ones((2, 1)), lambda x, t: -x)
  np.testing.assert_allclose(sample.path[1:, 0, 0], alone.ts[1:], rtol=1e-6)
  assert sample.nfe.tolist() == [8, 8]


def test_noises_of_predictor_and_corrector_are_independent():
  """Two noises of 10 000 examples in one step, score 0: the correlation is 0 within 4 standard errors."""
  sde, x = jd.VE(sigma_max=2.0), jnp.zeros((10_000, 1))
  alone = jd.samplers.reverse_diffusion(sde, jnp.asarray([1.0, 0.9]))
  both = jd.samplers.predictor_corrector(alone, jd.samplers.langevin_corrector(steps=2))
  score = lambda x, t: jnp.zeros_like(x)
  first = alone(KEY, x, score).x
  second = both(KEY, x, score).x - first
  assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.04
  eta = 4 * (0.16 * sde.marginal(0.9)[1]) ** 2
  np.testing.assert_allclose(second.var(), 2 * eta, rtol=4 * np.sqrt(2 / 10_000))


def test_evaluations_are_counted_and_example_k_is_the_same_in_any_batch():
  sde, calls = jd.SubVP(), []
  corrector = jd.samplers.langevin_corrector(steps=2)
  sampler = jd.samplers.predictor_corrector(predictor(sde, 3, "stochastic_heun"), corrector, denoise=True)

  def score(x, t, broken):
    jax.debug.callback(lambda _: calls.append(1), t)
    return jnp.where(broken[:, None], jnp.nan, gaussian().score(sde)(x, t))

  x_T, broken = sde.prior_sample(KEY, (3, 3)), jnp.asarray([False, True, False])
  whole = sampler(KEY, x_T, score, {"broken": broken})
  jax.effects_barrier()
  assert whole.nfe.tolist() == [len(calls)] * 3 == [3 * (2 + 2) + 1] * 3
  assert whole.status.code.tolist() == [0, 2, 0]
  alone = sampler(jd.example_keys(KEY, 2, 1), x_T[2:], score, {"broken": broken[2:]})
  np.testing.assert_allclose(whole.x[2:], alone.x, rtol=1e-5)


def test_bad_input_is_refused(untyped):
  make, corrector, ts = jd.samplers.predictor_corrector, jd.samplers.langevin_corrector(), jnp.asarray([1.0, 0.5])
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
    make(jd.samplers.reverse_diffusion(jd.VP(), jnp.asarray([1.0, 0.0])), corrector)
  with pytest.raises(ValueError, match="snr must be positive"):
    jd.samplers.langevin_corrector(snr=0.0)
  with pytest.raises(ValueError, match="steps must be at least 0"):
    jd.samplers.langevin_corrector(steps=-1)
