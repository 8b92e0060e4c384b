"""Bounds in data space of latent diffusion: against the exact likelihood of a linear-Gaussian model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_gaussian import LATENTS, MODEL, X, at_time, gap

import jaxdiff as jd
from jaxdiff import likelihood
from jaxdiff.losses import LatentModel, observations, times
from jaxdiff.schedules import start_time

SCORE = lambda z, t: -z
SDE = jd.VP()


def data(n, dtype=np.float32):
  return np.broadcast_to(X.astype(dtype), (n, 3))


def at_t0(sde):
  """The model whose prior is the diffusion's density at t0, where the latents stand."""
  return dataclasses.replace(MODEL, prior=at_time(LATENTS, sde, start_time(sde, None, 1e-3)))


def closed_form(noise=0.0, divergence=None):
  """A `LogDensity` of LATENTS without a solve, up to `noise` times a standard normal of the probes."""

  def evaluate(key, z, score, cond):
    error, counts = jnp.full(len(z), noise, z.dtype), jnp.ones(len(z), jnp.int32)
    away = (z - jnp.asarray(LATENTS.mean, z.dtype)[None]) / jnp.asarray(LATENTS.std, z.dtype)[None]
    value = -0.5 * jnp.sum(away**2, axis=1) - float(np.sum(np.log(LATENTS.std))) - float(np.log(2 * np.pi))
    value = value + error * jd.keys.normal(key, (len(z),), z.dtype)
    return jd.typing.LogProb(value, z, 7 * counts, jd.typing.Status(0 * counts, counts, 2 * counts), error)

  with jax.ensure_compile_time_eval():
    t0 = start_time(SDE, None, 1e-3)
  return likelihood.LogDensity(SDE, t0, divergence or jd.divergence.exact(), evaluate)


def numbers(tree):
  return jax.tree.map(np.asarray, tree)


def within(values, expected, slack=0.0):
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values)) + slack


def test_every_draw_of_the_exact_posterior_is_the_exact_likelihood(x64):
  """Of the exact score and prior, by solves with tolerances of 1e-7: 1e-5 nats, with importance."""
  sde, model = SDE, at_t0(SDE)
  prior = likelihood.log_prob(sde, rtol=1e-7, atol=1e-7, prior_log_prob=lambda z: LATENTS.log_prob(z, sde, sde.t1))
  fn = likelihood.latent_ode(prior, model.observation, draws=2, importance=True)
  result = jax.jit(lambda x: fn(jax.random.key(0), x, model.autoencoder(), LATENTS.score(sde)))(data(3, np.float64))
  jd.raise_if_failed(result)
  np.testing.assert_allclose(result.value, -model.log_prob(X), atol=1e-5)
  np.testing.assert_allclose(result.draw_error, 0.0, atol=1e-5)
  np.testing.assert_array_equal(result.standard_error, 0.0)
  assert np.all(np.asarray(result.nfe) > 2 * 20)


def test_another_posterior_costs_its_divergence_and_importance_weights_regain_it(x64):
  """KL(q || posterior) for the mean of 8 draws, within 4 s.e.; less than a third of it with importance weights."""
  n, lack = 20_000, gap(0.5, -0.3)
  bound = lambda importance, x: likelihood.latent_ode(closed_form(), MODEL.observation, 8, importance)(
    jax.random.key(0), x, MODEL.autoencoder(0.5, -0.3), SCORE
  )
  mean, tight = numbers(jax.jit(lambda x: (bound(False, x), bound(True, x)))(data(n, np.float64)))
  within(mean.value, lack - MODEL.log_prob(X))
  assert np.all(mean.value - tight.value >= -1e-12)  # never looser
  excess = tight.value + MODEL.log_prob(X)
  assert 0 < excess.mean() < lack / 3
  np.testing.assert_allclose(mean.value, mean.reconstruction + mean.prior - mean.entropy, rtol=1e-10)
  np.testing.assert_allclose(np.sqrt(np.mean(mean.draw_error**2)), mean.value.std(), rtol=0.03)  # what it claims to be
  np.testing.assert_array_equal(mean.nfe, 8 * 7)
  np.testing.assert_array_equal(mean.status.accepted, 8)
  np.testing.assert_array_equal(mean.status.rejected, 16)


def test_by_elbo_it_is_the_exact_likelihood_in_the_mean(x64):
  """Within 4 s.e. and 1e-3 nats of t0; KL(q || posterior) above for another posterior; what `losses.lsgm` averages."""
  n, draws, sde = 4000, 16, SDE
  options = {"prior_log_prob": lambda z: LATENTS.log_prob(z, sde, sde.t1)}
  prior = jd.losses.bound(sde, jd.predictions.score(), **options)
  fn = likelihood.latent_elbo(prior, MODEL.observation, draws)
  x, score = data(n, np.float64), LATENTS.score(sde)
  run = jax.jit(lambda x, shift, widen: fn(jax.random.key(0), x, MODEL.autoencoder(shift, widen), score))
  exact, wrong = numbers((run(x, 0.0, 0.0), run(x, 0.5, -0.7)))
  assert exact.value.std() / np.sqrt(n) < 0.08
  within(exact.value, -MODEL.log_prob(X), slack=1e-3)
  within(wrong.value - exact.value, gap(0.5, -0.7), slack=1e-3)
  np.testing.assert_array_equal(exact.nfe, draws)
  np.testing.assert_array_equal(exact.standard_error, 0.0)
  loss = jd.losses.lsgm(sde, MODEL.observation, jd.predictions.score(), **options)
  model = LatentModel(MODEL.autoencoder(), score)
  trained = np.asarray(jax.jit(lambda x: jd.losses.averaged(loss, draws)(jax.random.key(0), x, model)[0])(x))
  spread = np.hypot(trained.std(), exact.value.std()) / np.sqrt(n)
  assert abs(trained.mean() - exact.value.mean()) < 4 * spread


def test_the_times_of_an_example_s_draws_are_spread_evenly():
  """One offset an example: 1 / sqrt(8) of the spread of 8 independent times."""
  prior = lambda key, z, network, cond, u: (100 * u, {})
  fn = jax.jit(
    lambda x: likelihood.latent_elbo(prior, MODEL.observation, 8)(jax.random.key(0), x, MODEL.autoencoder(), SCORE)
  )
  result = numbers(fn(data(500)))
  np.testing.assert_allclose(result.prior.mean(), 50, atol=0.5)
  assert 0.3 < result.prior.std() / (100 / np.sqrt(12 * 8)) < 0.4  # 1 / sqrt(8)


def test_integers_are_told_in_bits_per_dimension():
  """The same model of the same integers, as integers and as floats: a factor, in every number."""
  bits = observations.discretized(17, (-3.0, 3.0))
  nats = bits._replace(
    log_prob=lambda x, output: bits.log_prob(x.astype(jnp.int32), output),
    to_state=lambda x: bits.to_state(x.astype(jnp.int32)),
  )
  decode = lambda z: jnp.concatenate([MODEL.autoencoder().decode(z), jnp.full((len(z), 3), -1.0)], axis=1)
  autoencoder = jd.typing.Autoencoder(lambda x: (x[:, :2], jnp.full((len(x), 2), -1.0)), decode)
  x = np.random.default_rng(0).integers(0, 17, (5, 3)).astype(np.uint8)
  fn = lambda observation: likelihood.latent_ode(closed_form(0.1), observation, draws=3)
  run = lambda observation, x: fn(observation)(jax.random.key(0), x, autoencoder, SCORE)
  told = jax.jit(lambda x, same: (run(bits, x), run(nats, same)))(x, x.astype(np.float32))
  for name in ("value", "reconstruction", "prior", "entropy", "standard_error", "draw_error"):
    np.testing.assert_allclose(getattr(told[1], name), 3 * np.log(2) * getattr(told[0], name), rtol=1e-5)
  np.testing.assert_allclose(told[1].standard_error, 0.1 / np.sqrt(3), rtol=1e-5)


def test_examples_keep_their_bound_in_any_batch_and_their_draws_in_any_number():
  """Both kinds of prior, in one program; float32 rounding."""
  solved = likelihood.latent_ode(likelihood.log_prob(SDE, rtol=1e-2, atol=1e-2), MODEL.observation, draws=2)
  elbo = likelihood.latent_elbo(jd.losses.bound(SDE, jd.predictions.score()), MODEL.observation, draws=2)
  score = lambda z, t, c: -z * c[:, None]
  few = lambda draws, key, x: likelihood.latent_ode(closed_form(), MODEL.observation, draws)(
    key, x, MODEL.autoencoder(1.0), SCORE
  )

  @jax.jit
  def run(key, x, c):
    return [fn(key, x, MODEL.autoencoder(), score, {"c": c}) for fn in (solved, elbo)] + [
      few(k, key, x) for k in (1, 2)
    ]

  x, c = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.linspace(0.8, 1.2, 4, dtype=np.float32)
  key, order = jd.example_keys(jax.random.key(0), 0, 4), np.array([2, 3, 0, 1])
  mates = np.float32([0, 0, 1, 1])
  whole, moved = numbers((run(key, x, c), run(key[order], x[order] + mates[:, None], c[order] + mates)))
  for expected, value in zip(whole, moved, strict=True):
    np.testing.assert_allclose(value.value[:2], expected.value[2:], rtol=1e-4)
    np.testing.assert_array_equal(value.nfe[:2], expected.nfe[2:])
  *_, one, two = whole
  second = 2 * two.value - one.value
  np.testing.assert_allclose(np.abs(second - one.value) / 2, two.draw_error, rtol=1e-3, atol=1e-5)
  assert np.all(np.isnan(one.draw_error))


def test_failures_are_told():
  """A solve out of steps keeps its code; a value that is not finite has its own."""
  solved = likelihood.latent_ode(likelihood.log_prob(SDE, max_steps=3), MODEL.observation)
  broken = MODEL.observation._replace(log_prob=lambda x, output: jnp.where(jnp.arange(len(x)) == 1, jnp.nan, 0.0))
  others = (
    likelihood.latent_ode(closed_form(), broken),
    likelihood.latent_elbo(jd.losses.bound(SDE, time=times.importance()), broken),
  )

  @jax.jit
  def run(x):
    first = solved(jax.random.key(0), x, MODEL.autoencoder(), LATENTS.score(SDE))
    return first, [fn(jax.random.key(0), x, MODEL.autoencoder(), lambda z, t: z) for fn in others]

  out_of_steps, results = run(data(2))
  with pytest.raises(jd.SolveError, match="2 of 2 examples.*raise max_steps"):
    jd.raise_if_failed(out_of_steps)
  for result in results:
    np.testing.assert_array_equal(result.status.code, [0, 2])
    with pytest.raises(jd.SolveError, match=r"1 of 2 examples \(index 1"):
      jd.raise_if_failed(result)


def test_bad_input_is_named(untyped):
  probes, observation = jd.divergence.hutchinson(2), MODEL.observation
  with pytest.raises(ValueError, match="importance=True needs the exact trace"):
    likelihood.latent_ode(closed_form(divergence=probes), observation, importance=True)
  wide = jd.typing.Autoencoder(lambda x: (jnp.zeros((len(x), 100)),) * 2, lambda z: z[:, :3])
  with pytest.raises(ValueError, match="importance=True needs the exact trace"):
    likelihood.latent_ode(likelihood.log_prob(jd.VP()), observation, importance=True)(
      jax.random.key(0), data(2), wide, lambda z, t: -z
    )
  with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
    likelihood.latent_ode(closed_form(), observation, draws=0)
  with pytest.raises(TypeError, match="draws must be an integer, got 2.5"):
    likelihood.latent_elbo(jd.losses.bound(jd.VP()), observation, draws=2.5)
  with pytest.raises(TypeError, match="prior is a factory: did you forget to call it: likelihood.log_prob"):
    likelihood.latent_ode(likelihood.log_prob, observation)
  with pytest.raises(TypeError, match="prior must be a log-density, got CNF: pass its log_prob"):
    likelihood.latent_ode(jd.flow.cnf(), observation)
  with pytest.raises(TypeError, match="prior is a factory: did you forget to call it: losses.bound"):
    likelihood.latent_elbo(jd.losses.bound, observation)
  with pytest.raises(TypeError, match="prior is a log-density: pass it to likelihood.latent_ode"):
    likelihood.latent_elbo(closed_form(), observation)
  with pytest.raises(TypeError, match="observation must be a Observation, got function, which lacks"):
    likelihood.latent_ode(closed_form(), observation.log_prob)
