"""Networks: shapes, initialization, independence of batch mates, gradients, dtypes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxdiff.models import MLP, UNet
from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.layers import fourier_features, sinusoidal_embedding

NETS = {
  "unet": (UNet(channels=4, blocks=1, groups=2), (4, 4, 1)),
  "unet-all": (
    UNet(
      channels=4,
      channel_multipliers=(1, 2, 2),
      blocks=2,
      attention_levels=(1,),
      heads=2,
      groups=4,
    ),
    (4, 8, 3),
  ),
  "mlp": (MLP(width=16, depth=2), (3,)),
  "mlp of images": (MLP(width=16, depth=2), (2, 3, 1)),
}


@pytest.fixture(params=NETS, scope="module")
def case(request):
  """Network, its jitted `apply`, input, times and initial parameters."""
  net, shape = NETS[request.param]
  x = jax.random.normal(jax.random.key(1), (4, *shape))
  t = jnp.array([1e-5, 0.01, 0.5, 1.0])
  return net, jax.jit(net.apply), x, t, jax.jit(net.init)(jax.random.key(0), x, t)


def perturbed(params, scale=0.1):
  """Moves every parameter, so that no zero initialization hides a path."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  return tree.unflatten([p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def test_output_has_the_shape_of_the_input_and_is_zero_at_initialization(case):
  _, apply, x, t, params = case
  y = apply(params, x, t)
  assert y.shape == x.shape
  assert y.dtype == x.dtype
  np.testing.assert_array_equal(y, 0.0)
  assert jnp.abs(apply(perturbed(params), x, t)).max() > 1e-3


def test_examples_do_not_see_their_batch_mates(case):
  _, apply, x, t, params = case
  params = perturbed(params)
  y = apply(params, x, t)
  order = jnp.array([2, 0, 3, 1])
  # The same sums in another order: float32 rounding of values of order 1.
  np.testing.assert_allclose(apply(params, x[order], t[order]), y[order], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(apply(params, x[1:2], t[1:2]), y[1:2], rtol=1e-4, atol=1e-4)
  jacobian = jax.jit(jax.grad(lambda x: apply(params, x, t)[0].sum()))(x)
  np.testing.assert_array_equal(jacobian[1:], 0.0)
  assert jnp.abs(jacobian[0]).max() > 0


def test_output_depends_on_time(case):
  _, apply, x, t, params = case
  params = perturbed(params)
  same = jnp.broadcast_to(x[:1], x.shape)
  y = apply(params, same, t).reshape(len(t), -1)
  gaps = jnp.abs(y[:, None] - y[None]).max(-1) + jnp.eye(len(t))
  assert gaps.min() > 1e-4


def test_gradient_reaches_every_parameter(case):
  _, apply, x, t, params = case
  target = jax.random.normal(jax.random.key(3), x.shape)
  gradients = jax.jit(jax.grad(lambda p: jnp.sum((apply(p, x, t) - target) ** 2)))(perturbed(params))
  silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradients) if not jnp.any(g != 0)]
  assert not silent


def test_bfloat16_computes_near_float32_with_float32_parameters(case):
  net, apply, x, t, params = case
  half = net.clone(dtype=jnp.bfloat16)
  with jax.numpy_dtype_promotion("standard"):  # linen's norms mix types in bfloat16
    shapes = jax.eval_shape(half.init, jax.random.key(0), x, t)
    z = jax.jit(half.apply)(perturbed(params), x, t)
  y = apply(perturbed(params), x, t)
  assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  assert z.dtype == x.dtype
  error = jnp.linalg.norm(z - y) / jnp.linalg.norm(y)
  # bfloat16 has 8 bits: each layer rounds by 0.4%, tens of layers add up; exactly zero would mean float32 was used.
  assert 0 < error < 0.05


def test_dropout_acts_in_training_only():
  net = UNet(channels=4, channel_multipliers=(1,), blocks=1, groups=2, dropout=0.5)
  x, t = jnp.ones((2, 4, 4, 1)), jnp.array([0.1, 0.9])
  params = perturbed(jax.jit(net.init)(jax.random.key(0), x, t))

  @jax.jit
  def train(seed):
    return net.apply(params, x, t, train=True, rngs={"dropout": jax.random.key(seed)})

  without = net.clone(dropout=0.0)
  np.testing.assert_array_equal(jax.jit(net.apply)(params, x, t), jax.jit(without.apply)(params, x, t))
  assert jnp.abs(train(0) - train(1)).max() > 1e-3
  np.testing.assert_array_equal(train(0), train(0))


def test_attention_equals_the_textbook_formula():
  layer = SelfAttention(heads=2, groups=2)
  x = jax.random.normal(jax.random.key(0), (3, 2, 4, 8))
  params = jax.tree.map(np.asarray, perturbed(jax.jit(layer.init)(jax.random.key(1), x)))["params"]
  groups = np.asarray(x).reshape(3, 8, 2, 4)
  mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  y = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(3, 8, 8)
  y = y * params["GroupNorm_0"]["scale"] + params["GroupNorm_0"]["bias"]
  qkv = y @ params["query_key_value"]["kernel"]
  query, key, value = (a.reshape(3, 8, 2, 4) for a in np.split(qkv, 3, axis=-1))
  weights = scipy.special.softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / 2.0, axis=-1)
  y = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(3, 8, 8)
  expected = x + (y @ params["output"]["kernel"] + params["output"]["bias"]).reshape(x.shape)
  np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_time_embedding_is_that_of_ddpm_and_resolves_small_times():
  t = jnp.array([0.0, 1e-5, 1e-4, 0.5])
  steps = 1000.0 * np.asarray(t, np.float64)[:, None] * 10000.0 ** (-np.arange(32) / 31)
  np.testing.assert_allclose(
    sinusoidal_embedding(t, 64), np.concatenate([np.cos(steps), np.sin(steps)], axis=-1), atol=1e-4
  )
  fine = sinusoidal_embedding(t, 64, max_frequency=1e4)
  # w t = 0.1 and 1 at the two smallest times: the largest change is |e^{i w t} - e^{i w t'}| of the fastest wave.
  assert jnp.linalg.norm(fine[1] - fine[0]) > 0.1
  assert jnp.linalg.norm(fine[2] - fine[1]) > 0.8


def test_digits_network_has_the_stated_size():
  net = UNet(channels=32, blocks=1)
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
  assert sum(p.size for p in jax.tree.leaves(params)) == 657_089


@pytest.mark.usefixtures("untyped")
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
  with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("^", r"\^")):
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(x_shape), jnp.zeros(t_shape))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("net", "x_shape"), [(UNet(channels=8), (2, 8, 8, 1)), (MLP(width=8), (2, 3))])
def test_integers_are_refused(net, x_shape):
  with pytest.raises(TypeError, match="x has dtype int32: pass floats"):
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(x_shape, jnp.int32), jnp.zeros(2))


@pytest.mark.parametrize("features", [3, 2, 7])
def test_odd_embeddings_are_refused(features):
  with pytest.raises(ValueError, match=f"features={features}"):
    sinusoidal_embedding(jnp.zeros(1), features)


def test_fourier_features_tell_neighbouring_levels_apart():
  """At the centres of L cells the wave of two levels alternates, that of one stays; they are n = 7, 8 for 256."""
  for levels in (17, 256):
    x = -1 + (2 * jnp.arange(levels) + 1) / levels
    features = fourier_features(x[:, None].astype(jnp.float32), levels)
    assert features.shape == (levels, 5)
    np.testing.assert_allclose(features[:, 0], x, rtol=1e-6)
    two = features[:, 1:3]
    np.testing.assert_allclose(two[2:], two[:-2], atol=2e-4)
    assert jnp.all(jnp.sum((two[1:] - two[:-1]) ** 2, axis=1) > 3.9)
    np.testing.assert_allclose(features[1:, 3:], features[:-1, 3:], atol=3e-4)
  x = jnp.asarray([[0.3]])
  waves = [wave(2.0**n * np.pi * 0.3) for n in (7, 8) for wave in (np.sin, np.cos)]
  np.testing.assert_allclose(fourier_features(x, 256)[0, 1:], waves, atol=1e-4)


def test_the_unet_takes_fourier_features():
  x, t = jnp.ones((1, 8, 8, 1)), jnp.ones(1)
  count = lambda levels: sum(
    leaf.size
    for leaf in jax.tree.leaves(jax.eval_shape(UNet(channels=8, fourier_levels=levels).init, jax.random.key(0), x, t))
  )
  assert count(17) - count(0) == 9 * 4 * 8
