"""The mixed score: its two ends, its mean, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Gaussian

import jaxdiff as jd
from jaxdiff import losses

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def apply(params, x, t, scale=None):
  out = jnp.tanh(x @ params) + t.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
  return out if scale is None else out * scale.reshape((-1,) + (1,) * (x.ndim - 1))


NETWORK = jax.random.normal(jax.random.key(0), (3, 3))


def at(mix, std=1.0, sde=SDES["vp"]):
  mixed = jd.mixed_score(apply, sde, std)
  return jd.score_fn(mixed.apply, {"network": NETWORK, "mix": mix}, sde, jd.predictions.noise())


@EACH_SDE
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_without_the_network_it_is_the_score_of_a_normal(sde, std):
  x, t = jax.random.normal(jax.random.key(1), (4, 3)), sde.t1 * jnp.linspace(0.01, 1.0, 4)
  expected = Gaussian(np.zeros(3), np.full(3, std)).score(sde)(x, t)
  np.testing.assert_allclose(at(jnp.full(3, -jnp.inf), std, sde)(x, t), expected, rtol=1e-5)


@EACH_SDE
def test_without_the_normal_it_is_the_network(sde):
  x, t = jax.random.normal(jax.random.key(1), (4, 3)), sde.t1 * jnp.linspace(0.01, 1.0, 4)
  expected = jd.score_fn(apply, NETWORK, sde, jd.predictions.noise())(x, t)
  np.testing.assert_allclose(at(jnp.full(3, jnp.inf), 0.3, sde)(x, t), expected, rtol=1e-5)


def test_each_channel_has_its_share():
  """Of images; sigmoid(log 3) = 3/4."""
  x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)), jnp.asarray([0.2, 0.7])
  normal, network = at(jnp.full(3, -jnp.inf))(x, t), at(jnp.full(3, jnp.inf))(x, t)
  share = jnp.asarray([0.5, 0.75, 0.25]).reshape(1, 1, 1, 3)
  found = at(jnp.asarray([0.0, np.log(3), -np.log(3)], jnp.float32))(x, t)
  np.testing.assert_allclose(found, (1 - share) * normal + share * network, rtol=1e-4, atol=1e-6)


def test_the_start_is_near_the_normal_and_the_mix_learns(x64):
  """The gradient of a loss by the logits is (1 - a) a times what the two scores differ in, in float64."""
  sde = jd.VP()
  mixed = jd.mixed_score(apply, sde, share=0.02)
  params = mixed.init(NETWORK.astype(jnp.float64), channels=3)
  np.testing.assert_allclose(jax.nn.sigmoid(params["mix"]), 0.02, rtol=1e-6)
  x = jax.random.normal(jax.random.key(1), (8, 3))
  u = jnp.linspace(0.0, 0.9, 8)
  loss = losses.denoising(sde, jd.predictions.noise())
  value = lambda mix: loss(jax.random.key(2), x, lambda x, t: mixed.apply(params | {"mix": mix}, x, t), u=u)[0].sum()
  gradient = jax.grad(value)(params["mix"])
  step = 1e-5
  for i in range(3):
    away = jnp.zeros(3).at[i].set(step)
    slope = (value(params["mix"] + away) - value(params["mix"] - away)) / (2 * step)
    np.testing.assert_allclose(gradient[i], slope, rtol=1e-5)
  assert jnp.all(gradient != 0)


@pytest.mark.parametrize("sde", [SDES["vp"], SDES["ve"]], ids=["vp", "ve"])
def test_it_goes_everywhere_a_network_goes(sde):
  """Sampler, log-density and LSGM, with a condition; jitted, parameters an argument."""
  mixed = jd.mixed_score(apply, sde)
  params = mixed.init(NETWORK, channels=3)
  loss = losses.lsgm(sde, losses.observations.gaussian(1.0))
  autoencoder = jd.typing.Autoencoder(lambda x: (x, jnp.zeros_like(x)), lambda z: z)
  solve = jd.likelihood.log_prob(sde, rtol=1e-2, atol=1e-2)
  sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 4))

  @jax.jit
  def run(params, key, x, cond):
    score = jd.score_fn(mixed.apply, params, sde, jd.predictions.noise())
    network = jax.tree_util.Partial(mixed.apply, params)
    value, _ = loss(key, x, losses.LatentModel(autoencoder, network), cond)
    return value, solve(key, x, score, cond).value, sampler(key, sde.prior_sample(key, x.shape), score, cond).x

  x, cond = jax.random.normal(jax.random.key(1), (4, 3)), {"scale": jnp.ones(4)}
  for value in run(params, jax.random.key(3), x, cond):
    assert jnp.all(jnp.isfinite(value))


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
    mixed.apply(mixed.init(NETWORK, 2), jnp.zeros((4, 3)), 0.5)
  wrong = jd.mixed_score(lambda params, x, t: x[:, :1], jd.VP())
  with pytest.raises(ValueError, match=r"network must return an array of the shape of x, \(4, 3\); got \(4, 1\)"):
    wrong.apply(wrong.init(None, 3), jnp.zeros((4, 3)), 0.5)
