"""The mixed score: its two ends, its mean, its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Gaussian, compiled
from switch import EACH_SDE, NAMES, Switch

import jaxdiff as jd
from jaxdiff import losses

NETWORK = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def apply(params, x, t, scale=None):
  out = jnp.tanh(x @ params) + t.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
  return out if scale is None else out * scale.reshape((-1,) + (1,) * (x.ndim - 1))


def at(mix, std, sde):
  mixed = jd.mixed_score(apply, sde, std)
  return jd.score_fn(mixed.apply, {"network": jnp.asarray(NETWORK), "mix": mix}, sde, jd.predictions.noise())


@functools.cache
def both_ends(std):
  """The mixed score without and with nothing but the network, and the scores of a normal and of the network."""

  def run(sde):
    t, x = sde.t1 * jnp.linspace(0.01, 1.0, 4), jnp.asarray(X)
    without, alone = (at(jnp.full(3, end), std, sde)(x, t) for end in (-jnp.inf, jnp.inf))
    normal = Gaussian(np.zeros(3), np.full(3, std)).score(sde)(x, t)
    return (without, normal), (alone, jd.score_fn(apply, jnp.asarray(NETWORK), sde, jd.predictions.noise())(x, t))

  return jax.jit(run)


@EACH_SDE
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_without_the_network_it_is_the_score_of_a_normal(sde, std):
  np.testing.assert_allclose(*both_ends(std)(sde)[0], rtol=1e-5)


@EACH_SDE
def test_without_the_normal_it_is_the_network(sde):
  np.testing.assert_allclose(*both_ends(0.3)(sde)[1], rtol=1e-5)


def test_each_channel_has_its_share():
  """Of images; sigmoid(log 3) = 3/4."""
  x, t = np.random.default_rng(2).standard_normal((2, 4, 4, 3)).astype(np.float32), np.asarray([0.2, 0.7], np.float32)
  mixes = np.asarray([[-np.inf] * 3, [np.inf] * 3, [0.0, np.log(3), -np.log(3)]], np.float32)
  normal, network, found = compiled(jax.vmap(lambda mix: at(mix, 1.0, jd.VP())(jnp.asarray(x), t)), mixes)
  share = np.asarray([0.5, 0.75, 0.25]).reshape(1, 1, 1, 3)
  np.testing.assert_allclose(found, (1 - share) * normal + share * network, rtol=1e-4, atol=1e-6)


def test_the_start_is_near_the_normal_and_the_mix_learns(x64):
  """The gradient of a loss by the logits is (1 - a) a times what the two scores differ in, in float64."""
  sde = jd.VP()
  mixed = jd.mixed_score(apply, sde, share=0.02)
  loss, x = losses.denoising(sde, jd.predictions.noise()), np.random.default_rng(1).standard_normal((8, 3))
  params = mixed.init(NETWORK.astype(np.float64), channels=3)
  np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(params["mix"]))), 0.02, rtol=1e-6)

  @jax.jit
  @jax.value_and_grad
  def value(mix, x):
    network = lambda x, t: mixed.apply({"network": jnp.asarray(params["network"]), "mix": mix}, x, t)
    return loss(jax.random.key(2), x, network, u=jnp.linspace(0.0, 0.9, 8))[0].sum()

  mix, step = np.asarray(params["mix"]), 1e-5 * np.eye(3)
  slopes = [(value(mix + away, x)[0] - value(mix - away, x)[0]) / 2e-5 for away in step]
  np.testing.assert_allclose(value(mix, x)[1], slopes, rtol=1e-5)
  assert np.all(np.asarray(slopes) != 0)


@functools.cache
def everywhere():
  """Sampler, log-density and LSGM, with a condition; parameters and the process are arguments."""
  autoencoder = jd.typing.Autoencoder(lambda x: (x, jnp.zeros_like(x)), lambda z: z)
  observation = losses.observations.gaussian(1.0)

  def run(sde, params, key, x, cond):
    mixed = jd.mixed_score(apply, sde)
    score = jd.score_fn(mixed.apply, params, sde, jd.predictions.noise())
    network = jax.tree_util.Partial(mixed.apply, params)
    value, _ = losses.lsgm(sde, observation)(key, x, losses.LatentModel(autoencoder, network), cond)
    solve = jd.likelihood.log_prob(sde, rtol=1e-2, atol=1e-2)
    sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 4))
    return value, solve(key, x, score, cond).value, sampler(key, sde.prior_sample(key, x.shape), score, cond).x

  return jax.jit(run)


@pytest.mark.parametrize("sde", [Switch(NAMES.index(name)) for name in ("vp", "ve")], ids=["vp", "ve"])
def test_it_goes_everywhere_a_network_goes(sde):
  params = {"network": NETWORK, "mix": np.zeros(3, np.float32)}
  for value in everywhere()(sde, params, jax.random.key(3), X, {"scale": np.ones(4, np.float32)}):
    assert np.all(np.isfinite(value))


def test_bad_input_is_named():
  with pytest.raises(ValueError, match=r"std must be positive.*got 0.0"):
    jd.mixed_score(apply, jd.VP(), std=0.0)
  with pytest.raises(ValueError, match=r"share must be in \(0, 1\).*got 1.0"):
    jd.mixed_score(apply, jd.VP(), share=1.0)
  with pytest.raises(TypeError, match=r"sde is a class: did you forget to call it: VP\(\)"):
    jd.mixed_score(apply, jd.VP)
  mixed = jd.mixed_score(apply, jd.VP())
  with pytest.raises(ValueError, match="channels must be at least 1"):
    mixed.init(NETWORK, 0)
  with pytest.raises(ValueError, match=r"params\['mix'\] must be one number per channel of x, \(3,\); got \(2,\)"):
    mixed.apply(mixed.init(NETWORK, 2), X, 0.5)
  wrong = jd.mixed_score(lambda params, x, t: x[:, :1], jd.VP())
  with pytest.raises(ValueError, match=r"network must return an array of the shape of x, \(4, 3\); got \(4, 1\)"):
    wrong.apply(wrong.init(None, 3), X, 0.5)
