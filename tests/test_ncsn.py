"""The chain of NCSN and its process, against NumPy in float64; its loss is denoising at the times of the levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, compiled, gaussian

import jaxdiff as jd
from jaxdiff.schedules import start_time

SIGMAS = {
  "geometric": np.geomspace(0.01, 5.0, 10),
  "two": np.array([0.1, 2.0]),
  "uneven": np.array([0.02, 0.03, 0.2, 0.21, 4.0]),
}
EACH = pytest.mark.parametrize("name", SIGMAS)
KEY = jax.random.key(0)
TIMES = np.linspace(0.0213, 0.9871, 20)


def chain_of(name):
  return jd.ncsn.Chain(SIGMAS[name])


def draws(count, seed=1):
  data = gaussian()
  return data.mean + data.std * np.random.default_rng(seed).normal(size=(count, 3))


@jax.jit
def quantities(chain, x0, x_i):
  """Every number of a chain, at all of its levels."""
  i, sde, times = jnp.arange(1, chain.steps + 1), chain.sde(), jnp.asarray(TIMES, chain.sigmas.dtype)
  (alpha, sigma), slopes = jax.jvp(sde.marginal, (times,), (jnp.ones_like(times),))
  return {
    "sigmas": chain.sigmas,
    "marginal": chain.marginal(jnp.arange(chain.steps + 1)),
    "posterior": chain.posterior(x0, x_i, i),
    "perturbed": (*chain.perturb(KEY, x0, i), jd.perturb(KEY, x0, 0.5, jd.VP())[1]),
    "nodes": (chain.time(i), chain.index(chain.time(i)), sde.marginal(chain.time(i))),
    "process": (alpha, sigma, *slopes),
    "coefficients": (sde.drift(jnp.ones((len(TIMES), 1)), times), sde.diffusion(times)),
    "inverse": sde.time_of_log_snr(2 * (jnp.log(alpha) - jnp.log(sigma))),
  }


def states(name):
  return np.random.default_rng(0).normal(size=(2, len(SIGMAS[name]), 2))


@functools.cache
def double(name):
  with jax.enable_x64(True):
    return jax.device_get(quantities(chain_of(name), *states(name)))


@EACH
def test_posterior_is_bayes_rule(name):
  """Conditioning of the joint Gaussian of (x_{i-1}, x_i) given x_0, built up step by step."""
  (x0, x_i), (mean, variance) = states(name), double(name)["posterior"]
  v_before = np.concatenate([[0.0], SIGMAS[name][:-1] ** 2])
  v = v_before + (SIGMAS[name] ** 2 - v_before)
  gain = v_before / v
  np.testing.assert_allclose(mean, x0 + gain[:, None] * (x_i - x0), rtol=1e-10)
  np.testing.assert_allclose(variance, v_before - gain**2 * v, rtol=1e-9, atol=1e-18)


@EACH
def test_marginal_and_perturb(name):
  found, sigmas = double(name), SIGMAS[name]
  np.testing.assert_array_equal(found["marginal"], (np.ones(len(sigmas) + 1), np.concatenate([[0.0], sigmas])))
  x_i, noise, expected = found["perturbed"]
  np.testing.assert_allclose(x_i, states(name)[0] + sigmas[:, None] * noise, rtol=1e-6)
  np.testing.assert_allclose(noise, expected)


@EACH
def test_time_and_index_are_inverse_and_the_process_is_the_chain_there(name):
  """In float32; in float64 it solves its moment equations, alpha = 1 and d sigma^2 / dt = g^2, off the kinks."""
  x0, x_i = states(name).astype(np.float32)
  time, index, marginal = jax.device_get(quantities(chain_of(name), x0, x_i)["nodes"])
  np.testing.assert_array_equal(index, np.arange(1, len(time) + 1))
  np.testing.assert_array_equal(time[[0, -1]], [0, 1])
  np.testing.assert_allclose(marginal, (np.ones(len(time)), SIGMAS[name]), rtol=1e-5)

  found = double(name)
  (alpha, sigma, d_alpha, d_sigma), (drift, g) = found["process"], found["coefficients"]
  np.testing.assert_array_equal(alpha, 1)
  np.testing.assert_array_equal([*d_alpha, *drift[:, 0]], 0)
  np.testing.assert_allclose(2 * sigma * d_sigma, g**2, rtol=1e-9)
  np.testing.assert_allclose(found["inverse"], TIMES, rtol=1e-8)


@pytest.mark.parametrize(("single", "rtol"), [(True, 2e-4), (False, 1e-10)])
def test_geometric_levels_give_ve(single, rtol):
  """At any time, between the levels and beyond; in float32 the rate is a difference of rounded logarithms."""

  def run(key, sde, t, level):
    z = sde.prior_sample(key, (4, 3))
    return sde.marginal(t), sde.diffusion(t), sde.time_of_log_snr(level), (z, sde.prior_log_prob(z))

  with jax.enable_x64(not single):
    kind = np.float32 if single else np.float64
    t, level = np.linspace(0.0, 1.0, 101, dtype=kind), np.linspace(-8.0, 10.0, 30, dtype=kind)
    chain = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(232, 0.01, 50.0))
    both = compiled(lambda *given: (run(KEY, chain.sde(), *given), run(KEY, jd.VE(0.01, 50.0), *given)), t, level)
  options = [{"rtol": min(rtol, 1e-5)}, {"rtol": rtol}, {"rtol": rtol, "atol": 1e-5 * single}, {"rtol": 1e-5}]
  for found, expected, tolerance in zip(*both, options, strict=True):
    jax.tree.map(lambda a, b, tolerance=tolerance: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_process_works_with_samplers():
  """Probability flow with the exact score is the exact map of Gaussian data."""
  data, sde = gaussian(), chain_of("geometric").sde()
  assert isinstance(sde, jd.ScalarSDE)

  def run(sde, key):
    z = sde.prior_sample(key, (4, 3))
    sample = jd.samplers.probability_flow(sde)(key, z, data.score(sde))
    return sample, data.flow(sde, z, 1.0, start_time(sde, None, 2e-3))

  sample, expected = compiled(run, sde, KEY)
  jd.raise_if_failed(sample)
  np.testing.assert_allclose(sample.x, expected, atol=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "edm"])
def test_loss_is_denoising_at_the_times_of_the_levels(prediction, x64):
  """So its minimizer is the score, as that of denoising is for every weight and time."""

  def run(chain, key, x0, u):
    network = lambda x, t: 0.3 * x
    value, aux = jd.losses.ncsn(chain, PREDICTIONS[prediction])(key, x0, network, u=u)
    at = jnp.where(aux["t"] < 1, aux["t"], 0.5)
    expected, _ = jd.losses.denoising(chain.sde(), PREDICTIONS[prediction], t0=0.0)(key, x0, network, u=at)
    return value, expected, aux["t"], chain.index(aux["t"])

  value, expected, t, index = compiled(run, chain_of("uneven"), KEY, draws(10), (np.arange(10.0) + 0.5) / 10)
  np.testing.assert_array_equal(index, np.repeat(np.arange(1, 6), 2))
  np.testing.assert_allclose(value[t < 1], expected[t < 1], rtol=1e-9)


def test_loss_is_that_of_the_paper(x64):
  """1/2 sigma^2 |s(x~) + (x~ - x) / sigma^2|^2 with s = -F / sigma as `score_fn` reads it, at every level once."""
  x0, sigma = draws(5), SIGMAS["uneven"][:, None]
  apply = lambda params, x, t: jnp.tanh(params * x) + t[:, None]

  def run(chain, key, x0):
    u = (jnp.arange(5.0) + 0.5) / 5
    value, aux = jd.losses.ncsn(chain)(key, x0, lambda x, t: apply(0.7, x, t), u=u)
    noise_key = jax.vmap(lambda key: jax.random.split(key)[0])(jd.example_keys(key, 0, 5))
    x_i, _ = chain.perturb(noise_key, x0, jnp.arange(1, 6))
    return value, x_i, jd.score_fn(apply, 0.7, chain.sde(), jd.predictions.noise())(x_i, aux["t"])

  value, x_i, score = compiled(run, chain_of("uneven"), KEY, x0)
  expected = 0.5 * np.sum(sigma**2 * (score + (x_i - x0) / sigma**2) ** 2, axis=1)
  np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_conditions_half_precision_and_gradients():
  """A bf16 network with an embedding of the level; the loss stays float32, and every level's embedding is trained."""

  def loss(embedding, label):
    chain = chain_of("geometric")

    def network(x, t, label):
      scale = embedding[chain.index(t) - 1] * label
      return scale[:, None].astype(jnp.bfloat16) * x.astype(jnp.bfloat16)

    return jd.losses.ncsn(chain)(KEY, jnp.ones((20, 3)), network, {"label": label})[0]

  run = lambda embedding, label: (
    loss(embedding, label),
    loss(embedding, label + 1),
    jax.jacfwd(loss)(embedding, label),
  )
  value, other, gradient = compiled(run, np.ones(10, np.float32), np.linspace(0.5, 1.0, 20, dtype=np.float32))
  assert value.dtype == np.float32
  assert np.all(np.sum(gradient != 0, axis=0) == 2)
  assert np.all(other != value)


def test_chain_is_a_pytree_validated_only_when_made(x64):
  run = lambda chain: (
    jax.grad(lambda chain: chain.sde().marginal(0.25)[1])(chain),
    jd.ncsn.Chain(chain.sigmas).marginal(3)[1],
  )
  gradient, traced = compiled(run, chain_of("uneven"))
  np.testing.assert_allclose(gradient.sigmas, [0, 1, 0, 0, 0], atol=1e-12)
  np.testing.assert_allclose(traced, SIGMAS["uneven"][2])


def test_wrong_use_is_refused():
  with pytest.raises(ValueError, match=r"pass sigmas\[::-1\]"):
    jd.ncsn.Chain(SIGMAS["geometric"][::-1])
  with pytest.raises(ValueError, match="sigmas must increase"):
    jd.ncsn.Chain([0.1, 0.1])
  for sigmas in ([0.0, 1.0], [0.1, np.inf], [0.1, np.nan]):
    with pytest.raises(ValueError, match="positive and finite"):
      jd.ncsn.Chain(sigmas)
  for sigmas in ([0.1], np.ones((2, 2)), 1.0):
    with pytest.raises(ValueError, match=r"shape \[N\] with N >= 2"):
      jd.ncsn.Chain(sigmas)
  with pytest.raises(ValueError, match="levels must be at least 2"):
    jd.ncsn.geometric_sigmas(1)
  with pytest.raises(ValueError, match="positive and increase"):
    jd.ncsn.geometric_sigmas(5, 1.0, 0.1)
  chain = chain_of("two")
  with pytest.raises(ValueError, match=r"must lie in 0..2, got 3"):
    jax.eval_shape(lambda chain: chain.marginal(3), chain)
  with pytest.raises(TypeError, match="the step must be an integer"):
    jax.eval_shape(chain.marginal, np.array([0.5], np.float32))
  sigma = compiled(lambda chain: chain.marginal(jnp.asarray([-1, 3, 2]))[1], chain)
  np.testing.assert_array_equal(np.isnan(sigma), [True, True, False])
  with pytest.raises(TypeError, match="x0 must be floating point"):
    jax.eval_shape(lambda x: jd.losses.ncsn(chain)(KEY, x, lambda x, t: x), np.zeros((2, 2), np.int32))
