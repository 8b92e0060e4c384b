"""DDIM: ancestral sampling at eta = 1, the flow to order one at eta = 0, and its inversion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import NORMAL, exact_start, flow_order, slope
from oracles import PREDICTIONS, gaussian
from switch import EACH_SDE

import jaxdiff as jd

KEY = jax.random.key(0)
TS = np.asarray([1.0, 0.8, 0.55, 0.3, 0.15, 0.08, 0.03], np.float32)


def scaled(sde, t):
  """Normal numbers of the scale of x_t, data of variance 1."""
  alpha, sigma = sde.marginal(t)
  return jnp.hypot(alpha, sigma) * jnp.asarray(NORMAL, alpha.dtype)


def noise(shape, dtype):
  """What the first step draws."""
  return jd.keys.normal(jd.keys.fold_in(jd.example_keys(KEY, 0, shape[0]), 0), shape, dtype)


@functools.cache
def all_of_six_steps():
  """What tests of single steps and of exact identities ask for, of any process."""
  data = gaussian()

  def run(sde):
    ts, score = jd.time_grid(sde, 6), data.score(sde)
    x_T, x_0 = scaled(sde, sde.t1), scaled(sde, ts[-1])
    constant = lambda x, t: jnp.full_like(x, -0.7) / sde.marginal(t)[1][:, None]
    there = jd.samplers.ddim_encode(sde, ts)(KEY, x_0, constant).x
    x = scaled(sde, ts[2])
    end = lambda x: jd.samplers.ddim(sde, ts)(KEY, x, score).x
    return {
      "marginal": sde.marginal(ts),
      "full noise": (
        jd.samplers.ddim(sde, ts, 1.0)(KEY, x_T, score).x,
        jd.samplers.ancestral(sde, ts)(KEY, x_T, score).x,
      ),
      "step": (
        x,
        [jd.samplers.ddim(sde, ts[2:4], eta)(KEY, x, score).x for eta in (0.0, 0.6)],
        noise(x.shape, x.dtype),
      ),
      "there and back": (jd.samplers.ddim(sde, ts)(KEY, there, constant).x, x_0),
      "gradient": jax.grad(lambda x: jnp.sum(end(x)))(x_T),
      "nodes": {eta: jd.samplers.ddim(sde, ts, eta).method.nodes[1:] for eta in (0.0, 0.6, 1.0)},
      "nodes back": jd.samplers.ddim_encode(sde, ts).method.nodes[1:],
    }

  return jax.jit(run)


@EACH_SDE
def test_full_noise_is_ancestral_sampling(sde, x64):
  """Sample for sample, with the same keys; by another formula, so to rounding."""
  np.testing.assert_allclose(*all_of_six_steps()(sde)["full noise"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("t", [40, 17, 2, 1])
def test_full_noise_is_the_posterior_of_the_chain(t, x64):
  """Mean and variance of `Chain.posterior` at D, with the noise that the step draws; the last step draws none."""
  found, mean, variance, z = jax.device_get(step_of_chain()(t))
  np.testing.assert_allclose(found, mean + np.sqrt(variance) * z, rtol=1e-9, atol=1e-11)


@functools.cache
def step_of_chain():
  score, x = lambda x, t: -jnp.tanh(x) * t[:, None], np.asarray([[1.3, -0.4]])

  def run(t):
    chain = jd.ddpm.Chain(jd.ddpm.cosine_betas(40))
    sde, ts = chain.sde(), chain.time(jnp.stack([t, t - 1]))
    moments = chain.posterior(jd.denoised(sde, score, jnp.asarray(x), chain.time(t)), jnp.asarray(x), t)
    return jd.samplers.ddim(sde, ts, eta=1.0)(KEY, jnp.asarray(x), score).x, *moments, noise(x.shape, x.dtype)

  return jax.jit(run)


@EACH_SDE
def test_coefficients_are_those_of_the_paper(sde, x64):
  """Eq. 12 and 16 of Song et al.: of x, of D and of the noise; and of x and the score on the way back."""
  found = jax.device_get(all_of_six_steps()(sde))
  (a_t, s_t), (a_s, s_s) = ([v[:-1] for v in found["marginal"]], [v[1:] for v in found["marginal"]])
  for eta, (of_state, of_data, std) in found["nodes"].items():
    v = eta**2 * s_s**2 / s_t**2 * (s_t**2 - a_t**2 * s_s**2 / a_s**2)
    kept = np.sqrt(s_s**2 - v) / s_t
    np.testing.assert_allclose(of_state, kept, rtol=1e-8)
    np.testing.assert_allclose(of_data, a_s - kept * a_t, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(std, np.sqrt(v), rtol=1e-8)
  of_state, of_score = found["nodes back"]
  np.testing.assert_allclose(of_state, (a_t / a_s)[::-1], rtol=1e-12)
  np.testing.assert_allclose(of_score, -((s_t - a_t / a_s * s_s) * s_s)[::-1], rtol=1e-8)


@EACH_SDE
def test_a_step_is_the_formula_of_the_paper(sde, x64):
  """alpha_s D + sqrt(sigma_s^2 - v) eps + sqrt(v) z, v = eta^2 s_s^2 / s_t^2 (s_t^2 - a_t^2 s_s^2 / a_s^2)."""
  found = jax.device_get(all_of_six_steps()(sde))
  (a_t, a_s), (s_t, s_s) = (v[2:4] for v in found["marginal"])
  x, steps, z = found["step"]
  mean, std = gaussian().mean[None], gaussian().std[None]
  data = (x + s_t**2 * (a_t * mean - x) / (a_t**2 * std**2 + s_t**2)) / a_t
  for eta, step in zip((0.0, 0.6), steps, strict=True):
    v = eta**2 * s_s**2 / s_t**2 * (s_t**2 - a_t**2 * s_s**2 / a_s**2)
    expected = a_s * data + np.sqrt(s_s**2 - v) * (x - a_t * data) / s_t + np.sqrt(v) * z
    np.testing.assert_allclose(step, expected, rtol=1e-8, err_msg=eta)


@EACH_SDE
def test_without_noise_it_is_the_flow_to_first_order(sde, x64):
  assert 0.9 < flow_order(jd.samplers.ddim, sde, [80, 160]) < 1.15


@functools.cache
def encoded(steps):
  """Errors of the encoding, against the exact flow, and of the way back to x."""
  data = gaussian()

  def run(sde):
    ts = jd.time_grid(sde, steps)
    x = exact_start(data, sde, 4, ts[-1])
    latent = jd.samplers.ddim_encode(sde, ts)(KEY, x, data.score(sde)).x
    back = jd.samplers.ddim(sde, ts)(KEY, latent, data.score(sde)).x
    away = lambda found, exact: jnp.max(jnp.abs(found - exact))
    return jnp.stack([away(latent, data.flow(sde, x, ts[-1], sde.t1)), away(back, x)])

  return jax.jit(run)


@EACH_SDE
def test_encoding_is_the_flow_to_first_order_and_sampling_returns(sde, x64):
  """Both errors halve when the steps double."""
  there, back = zip(*[encoded(steps)(sde) for steps in (80, 160)], strict=True)
  assert 0.85 < slope(there, [80, 160]) < 1.15
  assert 0.85 < slope(back, [80, 160]) < 1.15


@EACH_SDE
def test_an_encoding_step_solves_the_step_of_the_sampler_for_its_start(sde, x64):
  """With one eps at both ends the two undo each other: a score of constant eps, -e / sigma."""
  np.testing.assert_allclose(*all_of_six_steps()(sde)["there and back"], rtol=1e-7, atol=1e-9)


@functools.cache
def few_steps():
  """Samples with and without noise to the given last time: in 2 steps from every prediction, in 20 from noise."""

  def run(sde, last):
    x_T, found = scaled(sde, sde.t1), []
    for steps, predictions in ((2, PREDICTIONS.values()), (20, [PREDICTIONS["noise"]])):
      ts = jd.time_grid(sde, steps)
      ts = ts.at[-1].set(jnp.where(last >= 0, last, ts[-1]))
      for prediction in predictions:
        score = jd.score_fn(lambda params, x, t: jnp.tanh(params * x), jnp.float32(0.7), sde, prediction)
        found.append(jax.vmap(lambda eta: jd.samplers.ddim(sde, ts, eta)(KEY, x_T, score).x)(jnp.asarray([0.0, 1.0])))
    return jnp.stack(found), jnp.max(jnp.abs(x_T))

  return jax.jit(run)


@EACH_SDE
def test_few_steps_are_finite_for_every_prediction(sde):
  """Of a bounded network in float32, to the default end (-1) and, where sigma is 0 there, to t = 0."""
  silent = float(sde.choices[sde.index].marginal(0.0)[1]) == 0
  for last in (-1.0, 0.0) if silent else (-1.0,):
    x, size = few_steps()(sde, last)
    assert np.all(np.isfinite(x))
    assert np.all(np.abs(x) < 1e4 * size)


def test_a_last_step_to_the_data_returns_the_denoised(x64):
  sde, score, etas = jd.VP(), gaussian().score(jd.VP()), (0.0, 0.5, 1.0)

  def run(ts):
    x = scaled(sde, 0.3)
    return [jd.samplers.ddim(sde, ts, eta)(KEY, x, score).x for eta in etas], jd.denoised(sde, score, x, 0.3)

  found, expected = jax.jit(run)(np.asarray([0.3, 0.0]))
  for x in found:
    np.testing.assert_allclose(x, expected, rtol=1e-12)


@EACH_SDE
def test_gradient_in_the_latent(sde, x64):
  """Data of std s: a step has the slope (sigma_t sigma_s + alpha_t alpha_s s^2) / (alpha_t^2 s^2 + sigma_t^2)."""
  found = jax.device_get(all_of_six_steps()(sde))
  alpha, sigma = (v[:, None] for v in found["marginal"])
  squared = gaussian().std[None] ** 2
  steps = (sigma[:-1] * sigma[1:] + alpha[:-1] * alpha[1:] * squared) / (alpha[:-1] ** 2 * squared + sigma[:-1] ** 2)
  np.testing.assert_allclose(found["gradient"], np.broadcast_to(steps.prod(axis=0), (4, 3)), rtol=1e-8)


def test_evaluations_path_denoise_and_examples():
  """Both directions count every call; every third state; D of the last state; example 3 alone as in a batch of 5."""
  sde, calls, exact = jd.VP(), [], gaussian().score(jd.VP())

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return exact(x, t)

  @jax.jit
  def run(keys, x):
    plain = jd.samplers.ddim(sde, TS, 0.5, path=3)(keys, x, exact)
    clean = jd.samplers.ddim(sde, TS, 0.5, denoise=True)(keys, x, score)
    return plain, clean, jd.denoised(sde, exact, plain.x, TS[-1])

  keys, x = jd.example_keys(KEY, 0, 5), np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
  plain, clean, expected = jax.device_get(run(keys, x))
  jax.effects_barrier()
  assert clean.nfe.tolist() == [len(calls)] * 5 == [7] * 5
  np.testing.assert_allclose(clean.x, expected, rtol=1e-4)
  calls.clear()
  latent = jax.device_get(jax.jit(lambda x: jd.samplers.ddim_encode(sde, TS, path=3)(KEY, x, score))(x))
  jax.effects_barrier()
  assert latent.nfe.tolist() == [len(calls)] * 5 == [6] * 5
  for sample in (plain, latent):
    assert sample.path.shape == (3, 5, 3)
    np.testing.assert_array_equal(sample.path[0], x)
    np.testing.assert_array_equal(sample.path[-1], sample.x)
  order = np.asarray([3, 1, 0, 2, 4])
  np.testing.assert_allclose(run(keys[order], x[order])[0].x, plain.x[order], rtol=1e-5)


def test_nan_is_reported_with_its_step():
  sde, cond = jd.VP(), {"broken": np.asarray([False, True])}
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  sampler = lambda ts, x, cond: jd.samplers.ddim(sde, ts)(KEY, x, score, cond)
  sample = jax.jit(sampler)(np.linspace(1, 0.01, 11, dtype=np.float32), np.ones((2, 1), np.float32), cond)
  assert sample.status.code.tolist() == [0, 2]
  assert sample.status.accepted[0] == 10
  assert sample.status.accepted[1] in (5, 6)


def test_schedule_grid_and_noise_may_be_traced():
  """A process, a grid and an eta that are arguments of a jitted function, against ones that are known."""
  x = np.ones((2, 3), np.float32)

  def sample(beta_max, ts, eta):
    sde = jd.VP(0.1, beta_max)
    latent = jd.samplers.ddim_encode(sde, ts)(KEY, x, lambda x, t: -1.3 * x).x
    return jd.samplers.ddim(sde, ts, eta)(KEY, latent, lambda x, t: -1.3 * x).x

  traced = jax.jit(sample)(np.float32(20.0), TS, np.float32(0.4))
  np.testing.assert_allclose(traced, jax.jit(lambda ts: sample(20.0, ts, 0.4))(TS), rtol=1e-4)


def test_bad_options_are_refused(untyped):
  sde, ts = jd.VP(), jnp.asarray(TS[:5])
  to_zero, chain = np.append(TS[:4], np.float32(0)), jd.ddpm.Chain([0.1, 0.2])
  for make, error, message in (
    (lambda: jd.samplers.ddim(sde, ts, -0.1), ValueError, r"eta must lie in \[0, 1\] .* got -0.1"),
    (lambda: jd.samplers.ddim(sde, ts, 1.5), ValueError, r"eta must lie in \[0, 1\]"),
    (lambda: jd.samplers.ddim(sde, ts, float("nan")), ValueError, r"eta must lie in \[0, 1\]"),
    (lambda: jd.samplers.ddim(sde, ts[::-1]), ValueError, "ts must decrease"),
    (lambda: jd.samplers.ddim_encode(sde, ts[::-1]), ValueError, "ts must decrease"),
    (lambda: jd.samplers.ddim(chain, ts), TypeError, r"discrete chain .* chain.sde\(\)"),
    (lambda: jd.samplers.ddim_encode(chain, ts), TypeError, r"discrete chain .* chain.sde\(\)"),
    (lambda: jd.samplers.ddim(jd.VP, ts), TypeError, "did you forget to call it"),
    (lambda: jd.samplers.ddim(sde, to_zero, denoise=True), ValueError, "denoise=True needs noise"),
    (lambda: jd.samplers.ddim_encode(sde, to_zero), ValueError, "ddim_encode needs noise at its last time"),
    (lambda: jd.samplers.ddim_encode(sde, ts, path=3), ValueError, "path must divide the number of steps"),
  ):
    with pytest.raises(error, match=message):
      make()
