"""RefineNet and VDMNet: sizes, initialization, conditions, gradients, translations, norms, dtypes, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from jaxdiff.models import RefineNet, VDMNet, conditioning
from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.blocks import ResidualBlock
from jaxdiff.models.layers import TimeEmbedding, fourier_features
from jaxdiff.models.ncsn import ConditionalInstanceNorm

CONDITIONS = {"label": conditioning.Label(3), "image": conditioning.Image(2)}
NETS = {
  "refine": RefineNet(channels=4, dilations=(1, 2), blocks=1),
  "vdm": VDMNet(depth=2, channels=4, groups=2, fourier_levels=17),
}
EACH = pytest.mark.parametrize("name", NETS)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, T = normal(1, 3, 8, 8, 1), np.array([1e-3, 0.5, 1.0], np.float32)
COND = {"label": np.array([0, 2, 3]), "image": normal(4, 3, 8, 8, 2)}
COTANGENT = normal(5, *X.shape) * np.array([1, 0, 0], np.float32)[:, None, None, None]


def count(net, shape):
  shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, *shape), np.float32), np.zeros(1, np.float32))
  return sum(p.size for p in jax.tree.leaves(shapes))


@functools.cache
def case(name):
  """A network of two conditions, its output for any parameters and inputs, moved parameters, and both gradients."""
  net = NETS[name].clone(conditions=CONDITIONS)
  params, run = networks.moved(net, X, T, **COND), networks.program(net)
  apply = lambda params, x=X, t=T, **cond: jax.device_get(run(params, x, t, COND | cond, COTANGENT)[0])
  return net, apply, params, *jax.device_get(run(params, X, T, COND, COTANGENT)[1:])


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (5, 9, 3)])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_any_size_of_image_is_kept(net, shape):
  x, t = np.zeros((2, *shape), np.float32), np.zeros(2, np.float32)
  y, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)
  assert y.shape == x.shape
  assert y.dtype == x.dtype


@EACH
def test_output_is_zero_at_initialization_and_depends_on_all_it_is_told(name):
  net, apply, params, _, _ = case(name)
  np.testing.assert_array_equal(apply(networks.at_first(net, params, ["output"], X, T, **COND)), 0.0)
  y = apply(params)
  others = {
    "x": apply(params, X + 0.1),
    "t": apply(params, t=T[::-1])[::2],
    "label": apply(params, label=np.array([1, 1, 1])),
    "image": apply(params, image=np.zeros_like(COND["image"])),
  }
  for told, other in others.items():
    change = np.abs(other - (y[::2] if told == "t" else y)).max(axis=(1, 2, 3))
    assert change.min() > 1e-4, (told, change)


@EACH
def test_examples_do_not_see_their_batch_mates(name):
  _, apply, params, _, of_x = case(name)
  turned = apply(params, X[::-1], T[::-1], **{told: value[::-1] for told, value in COND.items()})
  np.testing.assert_allclose(turned[::-1], apply(params), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(of_x[1:], 0.0)
  assert np.abs(of_x[0]).max() > 0


@EACH
def test_gradient_reaches_every_parameter(name):
  assert not networks.silent(case(name)[3])


@EACH
@pytest.mark.standard_promotion
def test_bfloat16_computes_near_float32(name):
  net, apply, params, _, _ = case(name)
  half = net.clone(dtype=jnp.bfloat16, conditions={name: m.clone(dtype=jnp.bfloat16) for name, m in CONDITIONS.items()})
  y, z = apply(params), jax.jit(half.apply)(params, X, T, **COND)
  assert z.dtype == X.dtype
  assert 0 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.02  # exactly zero would mean that float32 was used


@pytest.mark.standard_promotion
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_parameters_have_their_own_type(net):
  y, params = jax.eval_shape(net.clone(param_dtype=jnp.bfloat16).init_with_output, jax.random.key(0), X, T)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert y.dtype == X.dtype
  params = jax.eval_shape(net.clone(dtype=jnp.bfloat16).init, jax.random.key(0), X, T)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@EACH
def test_with_periodic_borders_translations_stay_translations(name):
  """Of any number of pixels along both axes, of x and an image beside it."""
  net, apply, params, _, _ = case(name)
  periodic = jax.jit(net.clone(padding="CIRCULAR").apply)
  move = lambda x: np.roll(x, (3, -2), axis=(1, 2))
  image = move(COND["image"])
  y = jax.device_get(periodic(params, X, T, **COND))
  size = np.abs(y).max()
  np.testing.assert_allclose(periodic(params, move(X), T, **COND | {"image": image}), move(y), atol=1e-4 * size)
  other = apply(params, move(X), image=image) - move(apply(params))  # with zeros beyond the border
  assert np.abs(other).max() > 1e-2 * size


def test_the_norm_is_its_formula():
  x, embedding = 2.0 + 3.0 * normal(0, 2, 4, 6, 5) * np.arange(1.0, 6.0, dtype=np.float32), normal(1, 2, 7)
  norm = ConditionalInstanceNorm()
  params = networks.filled(jax.eval_shape(norm.init, jax.random.key(2), x, embedding))
  weights, e = params["params"]["Dense_0"], embedding
  gamma, alpha, beta = np.split((e / (1 + np.exp(-e))) @ weights["kernel"] + weights["bias"], 3, axis=-1)
  mu, s = x.mean((1, 2)), x.std((1, 2))
  offset = (mu - mu.mean(-1, keepdims=True)) / mu.std(-1, keepdims=True)
  normalized = (x - mu[:, None, None]) / s[:, None, None]
  expected = (1 + gamma)[:, None, None] * normalized + ((1 + alpha) * offset + beta)[:, None, None]
  np.testing.assert_allclose(jax.jit(norm.apply)(params, x, embedding), expected, rtol=1e-3, atol=1e-3)


@jax.jit
def one_by_one(params):
  """`NETS["vdm"]` without scan."""
  layer = lambda module, name, *args: module.apply({"params": params[name]}, *args)
  conv = lambda features: nn.Conv(features, (3, 3))
  block = ResidualBlock(4, groups=2, modulation="add", all_biases=True)
  embedding = layer(TimeEmbedding(16, inputs=4), "TimeEmbedding_0", T)
  row = lambda name, k, h: block.apply({"params": jax.tree.map(lambda p: p[k], params[name])}, h, embedding)
  h = layer(conv(4), "Conv_0", fourier_features(X, 17))
  skips = [h]
  for k in range(2):
    skips.append(h := row("down", k, h))
  h = layer(SelfAttention(1, groups=2, all_biases=True), "SelfAttention_0", layer(block, "middle_1", h, embedding))
  h = layer(block, "middle_2", h, embedding)
  for k in range(3):
    h = row("up", k, jnp.concatenate([h, skips.pop()], axis=-1))
  return layer(conv(1), "output", nn.silu(layer(nn.GroupNorm(2), "GroupNorm_0", h)))


@pytest.mark.slow
def test_the_scanned_rows_are_blocks_one_by_one_and_the_last_result_is_read_first():
  net = NETS["vdm"]
  params = networks.moved(net, X, T)
  np.testing.assert_allclose(jax.jit(net.apply)(params, X, T), one_by_one(params["params"]), rtol=1e-4, atol=1e-5)


def test_fourier_features_are_what_the_first_convolution_reads():
  net, x = NETS["vdm"].clone(depth=1), X[:1]
  params = networks.moved(net, x, T[:1])
  assert count(net, (8, 8, 3)) - count(net.clone(fourier_levels=0), (8, 8, 3)) == 9 * 4 * 3 * 4
  kernel = params["params"]["Conv_0"]["kernel"]
  assert kernel.shape == (3, 3, 5, 4)
  # A network whose convolution reads the four waves alone is periodic in x: two levels are 4/17.
  waves = kernel.copy()
  waves[:, :, 0] = 0.0
  alone = {"params": params["params"] | {"Conv_0": params["params"]["Conv_0"] | {"kernel": waves}}}
  apply = jax.jit(net.apply)
  y = apply(alone, x, T[:1])
  np.testing.assert_allclose(apply(alone, x + 4 / 17, T[:1]), y, rtol=1e-3, atol=1e-4)
  assert np.abs(apply(params, x + 4 / 17, T[:1]) - apply(params, x, T[:1])).max() > 1e-3
  assert np.abs(apply(alone, x + 1 / 17, T[:1]) - y).max() > 1e-2


def test_dropout_acts_in_training_only():
  net = NETS["vdm"].clone(depth=1, dropout=0.5)
  params = networks.moved(net, X, T)

  @jax.jit
  def both(key):
    train = net.apply(params, X, T, train=True, rngs={"dropout": key})
    return train, net.apply(params, X, T), net.clone(dropout=0.0).apply(params, X, T)

  (one, plain, without), (two, _, _) = (jax.device_get(both(jax.random.key(seed))) for seed in (0, 1))
  np.testing.assert_array_equal(plain, without)
  assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
  ("net", "shape", "parameters"),
  [
    (RefineNet(), (28, 28, 1), 444_865),
    (VDMNet(), (32, 32, 3), 30_586_243),
  ],
)
def test_networks_have_the_stated_size(net, shape, parameters):
  assert count(net, shape) == parameters


@pytest.mark.parametrize(
  ("make", "x_shape", "message"),
  [
    (RefineNet, (2, 8, 8), "x has shape"),
    (lambda: RefineNet(dilations=()), (2, 8, 8, 1), "dilations=(): pass at least one"),
    (lambda: RefineNet(dilations=(1, 0)), (2, 8, 8, 1), "dilations=(1, 0): pass at least one, each of 1 or more"),
    (lambda: RefineNet(padding="VALID"), (2, 8, 8, 1), "padding='VALID': must be 'SAME' or 'CIRCULAR'"),
    (VDMNet, (3, 8, 8, 1), "t has shape (2,)"),
    (lambda: VDMNet(depth=0), (2, 8, 8, 1), "depth=0: pass 1 or more"),
    (lambda: VDMNet(channels=20, groups=8), (2, 8, 8, 1), "channels=20 is not divisible by groups=8"),
  ],
)
def test_wrong_arguments_are_named(make, x_shape, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
    jax.eval_shape(make().init, jax.random.key(0), np.zeros(x_shape, np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_tokens_and_unknown_conditions_are_refused(net):
  told = net.clone(conditions={"words": conditioning.Embedding(3, sequence=True)})
  with pytest.raises(ValueError, match=f"{type(net).__name__} has no cross-attention to read the tokens"):
    jax.eval_shape(told.init, jax.random.key(0), X, T, words=np.ones((3, 2, 3), np.float32))
  with pytest.raises(ValueError, match="cond has 'label', a condition that the network lacks"):
    jax.eval_shape(net.init, jax.random.key(0), X, T, label=np.zeros(3, int))
  with pytest.raises(TypeError, match="x has dtype int32: pass floats"):
    jax.eval_shape(net.init, jax.random.key(0), X.astype(int), T)
