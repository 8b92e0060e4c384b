import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, gaussian

import jaxdiff as jd
from jaxdiff.schedules import start_time

SIGMAS = {
  "geometric": lambda: jd.ncsn.geometric_sigmas(10, 0.01, 5.0),
  "two": lambda: [0.1, 2.0],
  "uneven": lambda: [0.02, 0.03, 0.2, 0.21, 4.0],
}
EACH = pytest.mark.parametrize("name", SIGMAS)


def chain_of(name):
  return jd.ncsn.Chain(SIGMAS[name]())


@EACH
def test_posterior_is_bayes_rule(name, x64):
  """Conditioning of the joint Gaussian of (x_{i-1}, x_i) given x_0, built up step by step."""
  chain = chain_of(name)
  x0, x_i = jnp.asarray([[1.3, -0.2]]), jnp.asarray([[0.4, 2.0]])
  for i in range(1, chain.steps + 1):
    v_before = float(chain.sigmas[i - 2]) ** 2 if i > 1 else 0.0
    v = v_before + (float(chain.sigmas[i - 1]) ** 2 - v_before)
    gain = v_before / v
    mean, variance = chain.posterior(x0, x_i, i)
    np.testing.assert_allclose(mean, x0 + gain * (x_i - x0), rtol=1e-10)
    np.testing.assert_allclose(variance, v_before - gain**2 * v, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(chain.posterior(x0, x_i, jnp.asarray([i]))[0], mean, rtol=1e-12)


def test_marginal_and_perturb():
  chain = chain_of("geometric")
  i = jnp.arange(11)
  alpha, sigma = chain.marginal(i)
  np.testing.assert_array_equal(alpha, 1)
  np.testing.assert_array_equal(sigma, jnp.concatenate([jnp.zeros(1), chain.sigmas]))
  x0 = jnp.ones((11, 2))
  x_i, noise = chain.perturb(jax.random.key(0), x0, i)
  np.testing.assert_allclose(x_i, x0 + sigma[:, None] * noise, rtol=1e-6)
  np.testing.assert_allclose(noise, jd.perturb(jax.random.key(0), x0, 0.5, jd.VP())[1])


@EACH
def test_time_and_index_are_inverse_and_the_process_is_the_chain_there(name):
  chain = chain_of(name)
  i = jnp.arange(1, chain.steps + 1)
  np.testing.assert_array_equal(chain.index(chain.time(i)), i)
  np.testing.assert_array_equal(chain.time(jnp.asarray([1, chain.steps])), [0, 1])
  np.testing.assert_allclose(chain.sde().marginal(chain.time(i)), chain.marginal(i), rtol=1e-5)


@EACH
def test_process_solves_its_moment_equations(name, x64):
  """alpha = 1 and d sigma^2 / dt = g^2, off the kinks."""
  sde = chain_of(name).sde()
  for t in np.linspace(0.0213, 0.9871, 20):
    t = jnp.asarray(t)
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))
    assert (alpha, d_alpha) == (1, 0)
    assert sde.drift(jnp.ones((1, 1)), t) == 0
    np.testing.assert_allclose(2 * sigma * d_sigma, sde.diffusion(t) ** 2, rtol=1e-9)
    np.testing.assert_allclose(sde.time_of_log_snr(jd.log_snr(sde, t)), t, rtol=1e-8)


@pytest.mark.parametrize(("single", "rtol"), [(True, 2e-4), (False, 1e-10)])
def test_geometric_levels_give_ve(single, rtol):
  """At any time, between the levels and beyond; in float32 the rate is a difference of rounded logarithms."""
  with jax.enable_x64(not single):
    sde, ve = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(232, 0.01, 50.0)).sde(), jd.VE(0.01, 50.0)
    t = jnp.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(sde.marginal(t), ve.marginal(t), rtol=min(rtol, 1e-5))
    np.testing.assert_allclose(sde.diffusion(t), ve.diffusion(t), rtol=rtol)
    level = jnp.linspace(-8.0, 10.0, 30)
    np.testing.assert_allclose(sde.time_of_log_snr(level), ve.time_of_log_snr(level), rtol=rtol, atol=1e-5 * single)
    z = sde.prior_sample(jax.random.key(0), (4, 3))
    np.testing.assert_allclose(z, ve.prior_sample(jax.random.key(0), (4, 3)), rtol=1e-5)
    np.testing.assert_allclose(sde.prior_log_prob(z), ve.prior_log_prob(z), rtol=1e-5)


def test_process_works_with_samplers():
  """Probability flow with the exact score is the exact map of Gaussian data."""
  data, sde = gaussian(), chain_of("geometric").sde()
  assert isinstance(sde, jd.ScalarSDE)
  z = sde.prior_sample(jax.random.key(0), (16, 3))
  sampler = jd.samplers.probability_flow(sde)
  sample = jax.jit(lambda key, z: sampler(key, z, data.score(sde)))(jax.random.key(1), z)
  jd.raise_if_failed(sample)
  end = start_time(sde, None, 2e-3)
  np.testing.assert_allclose(sample.x, data.flow(sde, z, 1.0, end), atol=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "data", "score", "edm"])
def test_loss_is_denoising_at_the_times_of_the_levels(prediction, x64):
  chain, data, key = chain_of("uneven"), gaussian(), jax.random.key(0)
  x0 = data.sample(jax.random.key(1), 10)
  u = (jnp.arange(10.0) + 0.5) / 10
  network = lambda x, t: 0.3 * x
  value, aux = jd.losses.ncsn(chain, PREDICTIONS[prediction])(key, x0, network, u=u)
  np.testing.assert_array_equal(chain.index(aux["t"]), np.repeat(np.arange(1, 6), 2))
  inside = aux["t"] < 1
  at = jnp.where(inside, aux["t"], 0.5)
  expected, _ = jd.losses.denoising(chain.sde(), PREDICTIONS[prediction], t0=0.0)(key, x0, network, u=at)
  np.testing.assert_allclose(value[inside], expected[inside], rtol=1e-9)


def test_loss_is_that_of_the_paper(x64):
  """1/2 sigma^2 |s(x~) + (x~ - x) / sigma^2|^2 with s = -F / sigma as `score_fn` reads it, at every level once."""
  chain, key, x0 = chain_of("uneven"), jax.random.key(0), gaussian().sample(jax.random.key(1), 5)
  sde, apply = chain.sde(), lambda params, x, t: jnp.tanh(params * x) + t[:, None]
  value, aux = jd.losses.ncsn(chain)(key, x0, lambda x, t: apply(0.7, x, t), u=(jnp.arange(5.0) + 0.5) / 5)
  i = jnp.arange(1, 6)
  noise_key = jax.vmap(lambda key: jax.random.split(key)[0])(jd.example_keys(key, 0, 5))
  x_i, _ = chain.perturb(noise_key, x0, i)
  sigma = chain.sigmas[:, None]
  score = jd.score_fn(apply, 0.7, sde, jd.predictions.noise())(x_i, aux["t"])
  expected = 0.5 * jnp.sum(sigma**2 * (score + (x_i - x0) / sigma**2) ** 2, axis=1)
  np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_minimizer_is_the_score():
  """Per-example gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  data, chain, n = gaussian(), jd.ncsn.Chain(jd.ncsn.geometric_sigmas(20, 0.01, 10.0)), 20_000
  loss, sde = jd.losses.ncsn(chain), chain.sde()
  x0, u = data.sample(jax.random.key(1), n), jnp.linspace(0.0, 1.0, n, endpoint=False)

  @jax.grad
  def gradient(tilt, x0, key, u):
    exact = lambda x, t: -sde.marginal(t)[1][:, None] * data.score(sde)(x, t)
    network = lambda x, t: exact(x, t) * (1 + tilt[0]) + tilt[1]
    return jnp.sum(loss(key[None], x0[None], network, u=u[None])[0])

  run = jax.jit(
    lambda tilt: jax.vmap(gradient, in_axes=(None, 0, 0, 0))(tilt, x0, jd.example_keys(jax.random.key(0), 0, n), u)
  )
  z = lambda g: np.asarray(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(n)))
  assert np.all(np.abs(z(run(jnp.zeros(2)))) < 4)
  assert np.all(np.abs(z(run(jnp.full(2, 0.1)))) > 4)


def test_conditions_half_precision_and_gradients():
  """A bf16 network with an embedding of the level; the loss stays float32, and every level's embedding is trained."""
  chain, x0 = chain_of("geometric"), jnp.ones((20, 3), jnp.float32)
  cond = {"label": jnp.linspace(0.5, 1.0, 20)}

  def loss(embedding, label):
    def network(x, t, label):
      scale = embedding[chain.index(t) - 1] * label
      return scale[:, None].astype(jnp.bfloat16) * x.astype(jnp.bfloat16)

    return jd.losses.ncsn(chain)(jax.random.key(0), x0, network, {"label": label})[0]

  value = jax.jit(loss)(jnp.ones(10), cond["label"])
  assert value.dtype == jnp.float32
  gradient = jax.jacrev(loss)(jnp.ones(10), cond["label"])
  assert jnp.all(jnp.sum(gradient != 0, axis=0) == 2)
  assert jnp.all(loss(jnp.ones(10), cond["label"] + 1) != value)


def test_chain_is_a_pytree_validated_only_when_made(x64):
  chain = chain_of("uneven")
  gradient = jax.grad(lambda chain: chain.sde().marginal(0.25)[1])(chain)
  np.testing.assert_allclose(gradient.sigmas, [0, 1, 0, 0, 0], atol=1e-12)
  traced = jax.jit(lambda sigmas: jd.ncsn.Chain(sigmas).marginal(3)[1])(chain.sigmas)
  np.testing.assert_allclose(traced, chain.sigmas[2])


def test_wrong_use_is_refused(untyped):
  with pytest.raises(ValueError, match=r"pass sigmas\[::-1\]"):
    jd.ncsn.Chain(jd.ncsn.geometric_sigmas(10)[::-1])
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
    chain.marginal(3)
  with pytest.raises(TypeError, match="the step must be an integer"):
    chain.marginal(jnp.asarray([0.5]))
  np.testing.assert_array_equal(jnp.isnan(chain.marginal(jnp.asarray([-1, 3, 2]))[1]), [True, True, False])
  with pytest.raises(TypeError, match="x0 must be floating point"):
    jd.losses.ncsn(chain)(jax.random.key(0), jnp.zeros((2, 2), int), lambda x, t: x)
