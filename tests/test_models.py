"""Networks: shapes, initialization, independence of batch mates, gradients, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import scipy.special

from jaxdiff.models import MLP, UNet
from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.layers import fourier_features, sinusoidal_embedding

NETS = {
  "unet": (UNet(channels=4, blocks=1, groups=2, attention_levels=(1,), heads=2), (4, 8, 3)),
  "mlp": (MLP(width=16, depth=2), (3,)),
  "mlp of images": (MLP(width=16, depth=2), (2, 3, 1)),
}
EACH = pytest.mark.parametrize("kind", NETS)
T = np.array([1e-5, 0.01, 0.5, 1.0], np.float32)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def case(kind):
  """Network, input, parameters and their program, the output, and a cotangent of the first example alone."""
  net, shape = NETS[kind]
  x, run = normal(1, 4, *shape), networks.program(net)
  params = networks.moved(net, x, T)
  cotangent = normal(2, 4, *shape) * np.reshape([1, 0, 0, 0], (4,) + (1,) * len(shape)).astype(np.float32)
  y, of_params, of_x = jax.device_get(run(params, x, T, {}, cotangent))
  apply = lambda params, x, t: jax.device_get(run(params, x, t, {}, cotangent)[0])
  return net, apply, x, params, y, of_params, of_x


@EACH
def test_output_has_the_shape_of_the_input_and_is_zero_at_initialization(kind):
  """Its last layer is, whatever the others are."""
  net, apply, x, params, y, _, _ = case(kind)
  assert y.shape == x.shape
  assert y.dtype == x.dtype
  assert np.abs(y).max() > 1e-3
  np.testing.assert_array_equal(apply(networks.at_first(net, params, ["output"], x, T), x, T), 0.0)


@EACH
def test_examples_do_not_see_their_batch_mates(kind):
  """In any order; beside any others; and no gradient reaches others."""
  _, apply, x, params, y, _, of_x = case(kind)
  order = np.array([2, 0, 3, 1])
  # The same sums in another order: float32 rounding of values of order 1.
  np.testing.assert_allclose(apply(params, x[order], T[order]), y[order], rtol=1e-4, atol=1e-4)
  others = apply(params, np.concatenate([x[:1], 1 - 2 * x[1:]]), np.concatenate([T[:1], T[:0:-1]]))
  np.testing.assert_allclose(others[0], y[0], rtol=1e-4, atol=1e-4)
  assert np.abs(others[1:] - y[1:]).max() > 1e-2
  np.testing.assert_array_equal(of_x[1:], 0.0)
  assert np.abs(of_x[0]).max() > 0


@EACH
def test_output_depends_on_time(kind):
  _, apply, x, params, _, _, _ = case(kind)
  y = apply(params, np.repeat(x[:1], 4, axis=0), T).reshape(len(T), -1)
  gaps = np.abs(y[:, None] - y[None]).max(-1) + np.eye(len(T))
  assert gaps.min() > 1e-4


@EACH
def test_gradient_reaches_every_parameter(kind):
  assert not networks.silent(case(kind)[5])


@EACH
@pytest.mark.standard_promotion  # linen's norms mix types in bfloat16
def test_bfloat16_computes_near_float32_with_float32_parameters(kind):
  net, _, x, params, y, _, _ = case(kind)
  half = net.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(half.init, jax.random.key(0), x, T)
  z = jax.jit(half.apply)(params, x, T)
  assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  assert z.dtype == x.dtype
  error = np.linalg.norm(z - y) / np.linalg.norm(y)
  # bfloat16 has 8 bits: each layer rounds by 0.4%, tens of layers add up; exactly zero would mean float32 was used.
  assert 0 < error < 0.05


def test_dropout_acts_in_training_only():
  net = UNet(channels=4, channel_multipliers=(1,), blocks=1, groups=2, dropout=0.5, middle_attention=False)
  x, t = np.ones((2, 4, 4, 1), np.float32), np.array([0.1, 0.9], np.float32)
  params = networks.moved(net, x, t)

  @jax.jit
  def both(key):
    train = net.apply(params, x, t, train=True, rngs={"dropout": key})
    return train, net.apply(params, x, t), net.clone(dropout=0.0).apply(params, x, t)

  (one, plain, without), (two, _, _), (again, _, _) = (jax.device_get(both(jax.random.key(seed))) for seed in (0, 1, 0))
  np.testing.assert_array_equal(plain, without)
  assert np.abs(one - two).max() > 1e-3
  assert np.abs(one - plain).max() > 1e-3
  np.testing.assert_array_equal(one, again)


def test_attention_equals_the_textbook_formula():
  layer, x = SelfAttention(heads=2, groups=2), normal(0, 3, 2, 4, 8)
  params = networks.filled(jax.eval_shape(layer.init, jax.random.key(1), x))["params"]
  groups = x.reshape(3, 8, 2, 4)
  mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  y = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(3, 8, 8)
  y = y * params["GroupNorm_0"]["scale"] + params["GroupNorm_0"]["bias"]
  qkv = y @ params["query_key_value"]["kernel"]
  query, key, value = (a.reshape(3, 8, 2, 4) for a in np.split(qkv, 3, axis=-1))
  weights = scipy.special.softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / 2.0, axis=-1)
  y = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(3, 8, 8)
  expected = x + (y @ params["output"]["kernel"] + params["output"]["bias"]).reshape(x.shape)
  np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_time_embedding_is_that_of_ddpm_and_resolves_small_times():
  t = np.array([0.0, 1e-5, 1e-4, 0.5], np.float32)
  steps = 1000.0 * t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(32) / 31)
  embed = jax.jit(lambda t: (sinusoidal_embedding(t, 64), sinusoidal_embedding(t, 64, max_frequency=1e4)))
  plain, fine = jax.device_get(embed(t))
  np.testing.assert_allclose(plain, np.concatenate([np.cos(steps), np.sin(steps)], axis=-1), atol=1e-4)
  # w t = 0.1 and 1 at the two smallest times: the largest change is |e^{i w t} - e^{i w t'}| of the fastest wave.
  assert np.linalg.norm(fine[1] - fine[0]) > 0.1
  assert np.linalg.norm(fine[2] - fine[1]) > 0.8


def test_digits_network_has_the_stated_size():
  net = UNet(channels=32, blocks=1)
  x, t = np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), x, t)
  assert sum(p.size for p in jax.tree.leaves(params)) == 657_089


@pytest.mark.parametrize(
  ("net", "x_shape", "t_shape", "message"),
  [
    (UNet(channels=12), (2, 8, 8, 1), (2,), "channels at level 0=12 is not divisible by groups=8"),
    (UNet(channels=8, heads=3), (2, 8, 8, 1), (2,), "channels at level 1=16 is not divisible by heads=3"),
    (UNet(channels=8), (2, 7, 8, 1), (2,), "height of x=7 is not divisible by"),
    (UNet(channels=8, channel_multipliers=(1, 1, 1)), (2, 8, 6, 1), (2,), "width of x=6 is not divisible by"),
    (UNet(channels=8, attention_levels=(2,)), (2, 8, 8, 1), (2,), "there is no level 2, take 0..1"),
    (UNet(channels=8, attention_levels=(-1,)), (2, 8, 8, 1), (2,), "there is no level -1, take 0..1"),
    (UNet(channels=8), (8, 8, 1), (8,), "x has shape"),
    (UNet(channels=8), (2, 8, 8, 1), (), "t has shape"),
    (UNet(channels=8), (2, 8, 8, 1), (3,), "t has shape"),
    (MLP(width=8), (2,), (2,), "x has shape"),
    (MLP(width=8), (2, 3), (2, 1), "t has shape"),
    (MLP(width=8), (2, 3), (5,), "pass one time per example"),
  ],
)
def test_wrong_arguments_are_named(net, x_shape, t_shape, message):
  x, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, t_shape))
  with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("^", r"\^")):
    jax.eval_shape(net.init, jax.random.key(0), x, t)


@pytest.mark.parametrize(("net", "x_shape"), [(UNet(channels=8), (2, 8, 8, 1)), (MLP(width=8), (2, 3))])
def test_integers_are_refused(net, x_shape):
  with pytest.raises(TypeError, match="x has dtype int32: pass floats"):
    jax.eval_shape(net.init, jax.random.key(0), np.zeros(x_shape, np.int32), np.zeros(2, np.float32))


@pytest.mark.parametrize("features", [3, 2, 7])
def test_odd_embeddings_are_refused(features):
  with pytest.raises(ValueError, match=f"features={features}"):
    sinusoidal_embedding(np.zeros(1, np.float32), features)


def test_fourier_features_tell_neighbouring_levels_apart():
  """At the centres of L cells the wave of two levels alternates, that of one stays; they are n = 7, 8 for 256."""
  of = jax.jit(fourier_features, static_argnums=1)
  for levels in (17, 256):
    x = -1 + (2 * np.arange(levels) + 1) / levels
    features = jax.device_get(of(x[:, None].astype(np.float32), levels))
    assert features.shape == (levels, 5)
    np.testing.assert_allclose(features[:, 0], x, rtol=1e-6)
    two = features[:, 1:3]
    np.testing.assert_allclose(two[2:], two[:-2], atol=2e-4)
    assert np.all(np.sum((two[1:] - two[:-1]) ** 2, axis=1) > 3.9)
    np.testing.assert_allclose(features[1:, 3:], features[:-1, 3:], atol=3e-4)
  waves = [wave(2.0**n * np.pi * x[:, None]) for n in (7, 8) for wave in (np.sin, np.cos)]
  np.testing.assert_allclose(features[:, 1:], np.concatenate(waves, axis=1), atol=2e-4)


def test_the_unet_takes_fourier_features():
  x, t = np.ones((1, 8, 8, 1), np.float32), np.ones(1, np.float32)
  count = lambda levels: sum(
    leaf.size
    for leaf in jax.tree.leaves(jax.eval_shape(UNet(channels=8, fourier_levels=levels).init, jax.random.key(0), x, t))
  )
  assert count(17) - count(0) == 9 * 4 * 8
