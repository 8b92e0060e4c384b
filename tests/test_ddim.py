"""DDIM: ancestral sampling at eta = 1, the flow to order one at eta = 0, and its inversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, SDES, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
KEY = jax.random.key(0)


def slope(errors, steps):
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def scaled(sde, t, shape=(8, 3)):
  """Normal numbers of the scale of x_t, data of variance 1."""
  alpha, sigma = sde.marginal(t)
  return jnp.hypot(alpha, sigma) * jax.random.normal(KEY, shape)


def run(sampler, score):
  return jax.jit(lambda x: sampler(KEY, x, score).x)


@EACH_SDE
def test_full_noise_is_ancestral_sampling(sde, x64):
  """Sample for sample, with the same keys; by another formula, so to rounding."""
  ts, score = jd.time_grid(sde, 6), gaussian().score(sde)
  x_T = scaled(sde, sde.t1)
  found, expected = (run(make, score)(x_T) for make in (jd.samplers.ddim(sde, ts, 1.0), jd.samplers.ancestral(sde, ts)))
  np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_full_noise_is_the_posterior_of_the_chain(x64):
  """Mean and variance of `Chain.posterior` at D, with the noise that the step draws; the last step draws none."""
  chain, x = jd.ddpm.Chain(jd.ddpm.cosine_betas(40)), jnp.asarray([[1.3, -0.4]])
  sde = chain.sde()
  score = lambda x, t: -jnp.tanh(x) * t[:, None]
  z = jd.keys.normal(jd.keys.fold_in(jd.example_keys(KEY, 0, 1), 0), x.shape, x.dtype)
  for t in (40, 17, 2, 1):
    mean, variance = chain.posterior(jd.denoised(sde, score, x, chain.time(t)), x, t)
    found = run(jd.samplers.ddim(sde, chain.time(jnp.asarray([t, t - 1])), eta=1.0), score)(x)
    np.testing.assert_allclose(found, mean + jnp.sqrt(variance) * z, rtol=1e-9, atol=1e-11)


@EACH_SDE
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_step_is_the_formula_of_the_paper(sde, eta, x64):
  """alpha_s D + sqrt(sigma_s^2 - v) eps + sqrt(v) z, v = eta^2 s_s^2 / s_t^2 (s_t^2 - a_t^2 s_s^2 / a_s^2)."""
  ts = jd.time_grid(sde, 6)[2:4]
  x, score = scaled(sde, ts[0], (1, 3)), gaussian().score(sde)
  (a_t, a_s), (s_t, s_s) = (np.asarray(v) for v in sde.marginal(ts))
  data = np.asarray(jd.denoised(sde, score, x, ts[0]))
  v = eta**2 * s_s**2 / s_t**2 * (s_t**2 - a_t**2 * s_s**2 / a_s**2)
  z = np.asarray(jd.keys.normal(jd.keys.fold_in(jd.example_keys(KEY, 0, 1), 0), x.shape, x.dtype))
  expected = a_s * data + np.sqrt(s_s**2 - v) * (np.asarray(x) - a_t * data) / s_t + np.sqrt(v) * z
  np.testing.assert_allclose(run(jd.samplers.ddim(sde, ts, eta), score)(x), expected, rtol=1e-9)


@EACH_SDE
def test_without_noise_it_is_the_flow_to_first_order(sde, x64):
  data, x_T = gaussian(), scaled(sde, sde.t1)
  t0 = jd.schedules.start_time(sde, None, 2e-3)
  exact = data.flow(sde, x_T, sde.t1, t0)
  errors, steps = [], [80, 160, 320]
  for n in steps:
    x = run(jd.samplers.ddim(sde, jd.time_grid(sde, n)), data.score(sde))(x_T)
    errors.append(float(jnp.max(jnp.abs(x - exact))))
  assert 0.9 < slope(errors, steps) < 1.15


@EACH_SDE
def test_encoding_is_the_flow_to_first_order_and_sampling_returns(sde, x64):
  """Both errors halve when the steps double."""
  data = gaussian()
  t0 = jd.schedules.start_time(sde, None, 2e-3)
  mean, variance = data.moments(sde, jnp.full(8, t0))
  x = mean + jnp.sqrt(variance) * jax.random.normal(KEY, mean.shape)
  exact, steps = data.flow(sde, x, t0, sde.t1), [80, 160, 320]
  there, back = [], []
  for n in steps:
    ts = jd.time_grid(sde, n)
    latent = run(jd.samplers.ddim_encode(sde, ts), data.score(sde))(x)
    there.append(float(jnp.max(jnp.abs(latent - exact))))
    back.append(float(jnp.max(jnp.abs(run(jd.samplers.ddim(sde, ts), data.score(sde))(latent) - x))))
  assert 0.85 < slope(there, steps) < 1.15
  assert 0.85 < slope(back, steps) < 1.15


@EACH_SDE
def test_an_encoding_step_solves_the_step_of_the_sampler_for_its_start(sde, x64):
  """With one eps at both ends the two undo each other: a score of constant eps, -e / sigma."""
  ts, e = jd.time_grid(sde, 6), 0.7
  score = lambda x, t: jnp.full_like(x, -e) / sde.marginal(t)[1][:, None]
  x = scaled(sde, ts[-1])
  latent = run(jd.samplers.ddim_encode(sde, ts), score)(x)
  np.testing.assert_allclose(run(jd.samplers.ddim(sde, ts), score)(latent), x, rtol=1e-7, atol=1e-9)


@EACH_SDE
def test_few_steps_are_finite_for_every_prediction(sde):
  """2, 5 and 20 steps of a bounded network in float32, to the default end and, where sigma is 0 there, to t = 0."""
  x_T, zero = scaled(sde, sde.t1), float(sde.marginal(0.0)[1]) == 0

  def draw(x_T, grids):
    found = []
    for prediction in PREDICTIONS.values():
      score = jd.score_fn(lambda params, x, t: jnp.tanh(params * x), jnp.float32(0.7), sde, prediction)
      for ts in grids:
        found += [jd.samplers.ddim(sde, ts, eta)(KEY, x_T, score).x for eta in (0.0, 1.0)]
    return jnp.stack(found)

  grids = [jd.time_grid(sde, steps) for steps in (2, 20)]
  grids += [ts.at[-1].set(0.0) for ts in grids] if zero else []
  x = jax.jit(draw)(x_T, grids)
  assert jnp.all(jnp.isfinite(x))
  assert jnp.all(jnp.abs(x) < 1e4 * jnp.abs(x_T).max())


def test_a_last_step_to_the_data_returns_the_denoised(x64):
  sde, score = jd.VP(), gaussian().score(jd.VP())
  x = scaled(sde, 0.3)
  for eta in (0.0, 0.5, 1.0):
    found = run(jd.samplers.ddim(sde, jnp.asarray([0.3, 0.0]), eta), score)(x)
    np.testing.assert_allclose(found, jd.denoised(sde, score, x, 0.3), rtol=1e-12)


@EACH_SDE
def test_gradient_in_the_latent(sde, x64):
  """Data of std s: a step has the slope (sigma_t sigma_s + alpha_t alpha_s s^2) / (alpha_t^2 s^2 + sigma_t^2)."""
  data, ts = gaussian(), jd.time_grid(sde, 6)
  alpha, sigma = (np.asarray(v)[:, None] for v in sde.marginal(ts))
  squared = np.asarray(data.std)[None] ** 2
  steps = (sigma[:-1] * sigma[1:] + alpha[:-1] * alpha[1:] * squared) / (alpha[:-1] ** 2 * squared + sigma[:-1] ** 2)
  sampler = jd.samplers.ddim(sde, ts)
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(sampler(KEY, x, data.score(sde)).x)))(scaled(sde, sde.t1))
  np.testing.assert_allclose(gradient, np.broadcast_to(steps.prod(axis=0), (8, 3)), rtol=1e-8)


def test_evaluations_path_denoise_and_examples():
  """Both directions count every call; every third state; D of the last state; example 3 alone as in a batch of 5."""
  sde, calls = jd.VP(), []
  ts, exact = jd.time_grid(sde, 6), gaussian().score(sde)
  x = scaled(sde, 0.9, (5, 3))

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return exact(x, t)

  for sampler in (jd.samplers.ddim(sde, ts, denoise=True), jd.samplers.ddim_encode(sde, ts)):
    calls.clear()
    sample = sampler(KEY, x, score)
    jax.effects_barrier()
    assert sample.nfe.tolist() == [len(calls)] * 5
  for make in (jd.samplers.ddim, jd.samplers.ddim_encode):
    sample = make(sde, ts, path=3)(KEY, x, exact)
    assert sample.path.shape == (3, 5, 3)
    np.testing.assert_array_equal(sample.path[0], x)
    np.testing.assert_array_equal(sample.path[-1], sample.x)
  plain, denoised = (jd.samplers.ddim(sde, ts, 0.5, denoise)(KEY, x, exact) for denoise in (False, True))
  np.testing.assert_allclose(denoised.x, jd.denoised(sde, exact, plain.x, ts[-1]), rtol=1e-4)
  alone = jd.samplers.ddim(sde, ts, 0.5)(jd.example_keys(KEY, 3, 1), x[3:4], exact)
  np.testing.assert_allclose(alone.x, plain.x[3:4], rtol=1e-5)


def test_nan_is_reported_with_its_step():
  sde, cond = jd.VP(), {"broken": jnp.asarray([False, True])}
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  ts = jd.time_grid(sde, 10, "uniform")
  sample = jd.samplers.ddim(sde, ts)(KEY, jnp.ones((2, 1)), score, cond)
  assert sample.status.code.tolist() == [0, 2]
  assert sample.status.accepted[0] == 10
  assert sample.status.accepted[1] in (5, 6)


def test_schedule_grid_and_noise_may_be_traced():
  """A process, a grid and an eta that are arguments of a jitted function."""
  x, ts = jnp.ones((2, 3)), jd.time_grid(jd.VP(), 6)

  def sample(beta_max, ts, eta):
    sde = jd.VP(0.1, beta_max)
    latent = jd.samplers.ddim_encode(sde, ts)(KEY, x, lambda x, t: -1.3 * x).x
    return jd.samplers.ddim(sde, ts, eta)(KEY, latent, lambda x, t: -1.3 * x).x

  traced = jax.jit(sample)(jnp.float32(20.0), ts, jnp.float32(0.4))
  np.testing.assert_allclose(traced, sample(20.0, ts, 0.4), rtol=1e-4)


def test_bad_options_are_refused(untyped):
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 4)
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
  for make, error, message in (
    (lambda: jd.samplers.ddim(sde, ts, -0.1), ValueError, r"eta must lie in \[0, 1\] .* got -0.1"),
    (lambda: jd.samplers.ddim(sde, ts, 1.5), ValueError, r"eta must lie in \[0, 1\]"),
    (lambda: jd.samplers.ddim(sde, ts, float("nan")), ValueError, r"eta must lie in \[0, 1\]"),
    (lambda: jd.samplers.ddim(sde, ts[::-1]), ValueError, "ts must decrease"),
    (lambda: jd.samplers.ddim_encode(sde, ts[::-1]), ValueError, "ts must decrease"),
    (lambda: jd.samplers.ddim(chain, ts), TypeError, r"discrete chain .* chain.sde\(\)"),
    (lambda: jd.samplers.ddim_encode(chain, ts), TypeError, r"discrete chain .* chain.sde\(\)"),
    (lambda: jd.samplers.ddim(jd.VP, ts), TypeError, "did you forget to call it"),
    (lambda: jd.samplers.ddim(sde, ts.at[-1].set(0.0), denoise=True), ValueError, "denoise=True needs noise"),
    (lambda: jd.samplers.ddim_encode(sde, ts.at[-1].set(0.0)), ValueError, "ddim_encode needs noise at its last time"),
    (lambda: jd.samplers.ddim_encode(sde, ts, path=3), ValueError, "path must divide the number of steps"),
  ):
    with pytest.raises(error, match=message):
      make()
