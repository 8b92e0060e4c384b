"""Ancestral steps whose variance a network learns: its second half, read by the score."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, compiled

import jaxdiff as jd

LEAPS = (40, 37, 21, 20, 7, 2, 0)
TO_ONE = (40, 37, 21, 20, 7, 2, 1)
KEY = jax.random.key(0)


def cosine_chain():
  return jd.ddpm.Chain(jd.ddpm.cosine_betas(40))


def two_parts(v):
  return lambda params, x, t: jnp.concatenate([jnp.tanh(params * x), jnp.full_like(x, 1) * (2 * v - 1)], axis=-1)


@functools.cache
def learned():
  """Samples of a learned variance at v, those of the two fixed ones, and the times of the learned one's calls."""
  calls = []

  def counted(v):
    def apply(params, x, t):
      jax.debug.callback(lambda _: calls.append(1), t)
      return two_parts(v)(params, x, t)

    return apply

  def run(steps, v):
    chain, x = cosine_chain(), jnp.asarray([[0.5, -1.0]])
    sde, noise = chain.sde(), jd.predictions.noise()
    one = jd.score_fn(lambda params, x, t: jnp.tanh(params * x), 0.7, sde, noise)
    two = jd.score_fn(counted(v), 0.7, sde, noise, learned_variance=True)
    draw = lambda variance, score: jd.samplers.ancestral(chain, steps, variance)(KEY, x, score)
    return draw("learned", two), draw("beta_tilde", one).x, draw("beta", one).x

  return jax.jit(run), calls


@pytest.mark.parametrize("steps", [LEAPS, TO_ONE], ids=["to the data", "to one"])
def test_learned_variance_runs_from_beta_tilde_to_beta(steps, x64):
  """v = 0 and v = 1 give those samplers sample for sample, at one evaluation a step."""
  run, calls = learned()
  for v, which in ((0.0, 0), (1.0, 1)):
    calls.clear()
    found, *fixed = run(np.asarray(steps), v)
    jax.effects_barrier()
    np.testing.assert_allclose(found.x, fixed[which], rtol=1e-10)
    assert found.nfe.tolist() == [len(calls)] == [6]


@functools.cache
def learned_step():
  def run(v, t):
    noise_keys = jd.keys.fold_in(jd.example_keys(KEY, 0, 1), 0)
    chain, x = cosine_chain(), jnp.asarray([[0.5, -1.0]])
    score = jd.score_fn(two_parts(v), 0.7, chain.sde(), jd.predictions.noise(), learned_variance=True)
    found = jd.samplers.ancestral(chain, jnp.stack([t, t - 1]), "learned")(KEY, x, score).x
    mean, _ = chain.posterior(score.denoised(x, chain.time(t)), x, t)
    return found, mean, chain.interpolated_log_variance(v, t), jd.keys.normal(noise_keys, x.shape, x.dtype)

  return jax.jit(run)


def test_learned_variance_is_that_of_the_chain(x64):
  """Nichol & Dhariwal eq. 15 as `Chain.interpolated_log_variance` has it, for v outside [0, 1] as well."""
  for v in (0.3, 1.4):
    for t in (2, 40):
      found, mean, log_variance, z = jax.device_get(learned_step()(v, t))
      np.testing.assert_allclose(found, mean + np.exp(0.5 * log_variance) * z, rtol=1e-10)


X, T, SCALE = (np.asarray(v, np.float32) for v in ([[0.5, -1.0], [1.0, 2.0]], [0.2, 0.8], [1.0, 3.0]))


def half(params, x, t, scale):
  return jnp.tanh(params * x) * scale[:, None]


def whole(params, x, t, scale):
  return jnp.concatenate([half(params, x, t, scale), jnp.cos(x)], axis=-1)


@functools.cache
def halves():
  """What a score of each prediction says of one network and of one with a second half, and the second half's input."""

  def one(prediction):
    plain = jd.score_fn(half, jnp.float32(0.7), jd.VP(), prediction)
    learned = jd.score_fn(whole, jnp.float32(0.7), jd.VP(), prediction, learned_variance=True)
    values = [(score(X, T, scale=SCALE), score.denoised(X, T, scale=SCALE)) for score in (plain, learned)]
    return *values, learned.denoised_and_v(X, T, scale=SCALE), prediction.precondition(X, T, *jd.VP().marginal(T))[0]

  return compiled(lambda: {name: one(prediction) for name, prediction in PREDICTIONS.items()})


@pytest.mark.parametrize("name", PREDICTIONS)
def test_score_reads_the_first_half_of_the_network(name):
  plain, learned, (data, v), seen = halves()[name]
  np.testing.assert_allclose(learned, plain, rtol=1e-6)
  np.testing.assert_allclose(data, plain[1], rtol=1e-5)
  np.testing.assert_allclose(v, 0.5 * (np.cos(seen) + 1), rtol=1e-5)


def test_a_network_without_a_second_half_is_refused():
  score = jd.score_fn(half, jnp.float32(0.7), jd.VP(), jd.predictions.noise(), learned_variance=True)
  with pytest.raises(ValueError, match="network must return 2 times the channels of x"):
    jax.eval_shape(lambda x: score(x, T, scale=SCALE), X)


def test_a_score_without_a_variance_is_refused(untyped):
  chain = jd.ddpm.Chain([0.1, 0.2])
  sampler = jd.samplers.ancestral(chain, None, "learned")
  plain = jd.score_fn(lambda params, x, t: params * x, jnp.float32(1.0), chain.sde(), jd.predictions.noise())
  for score in (lambda x, t: -x, plain):
    with pytest.raises(TypeError, match=r"score_fn\(\.\.\., learned_variance=True\)"):
      jax.eval_shape(lambda x, score=score: sampler(KEY, x, score), X)
