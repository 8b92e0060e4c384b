"""RefineNet and VDMNet: sizes, initialization, conditions, gradients, translations, norms, dtypes, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
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
X = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
T = jnp.array([1e-3, 0.5, 1.0])
COND = {"label": jnp.array([0, 2, 3]), "image": jax.random.normal(jax.random.key(4), (3, 8, 8, 2))}


def perturbed(params, scale=0.1):
  """Moves every parameter, so that no zero initialization hides a path."""
  return jax.tree.map(lambda p: p + scale * jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), params)


def count(net, shape):
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))
  return sum(p.size for p in jax.tree.leaves(params))


@functools.cache
def conditional(name):
  """A network of two conditions, its jitted `apply`, initial parameters and others."""
  net = NETS[name].clone(conditions=CONDITIONS)
  params = jax.jit(net.init)(jax.random.key(0), X, T, **COND)
  return net, jax.jit(net.apply), params, perturbed(params)


@pytest.fixture(params=NETS, scope="module")
def case(request):
  return conditional(request.param)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (5, 9, 3)])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_any_size_of_image_is_kept(net, shape):
  x, t = jnp.zeros((2, *shape)), jnp.zeros(2)
  y, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)
  assert y.shape == x.shape
  assert y.dtype == x.dtype


def test_output_is_zero_at_initialization_and_depends_on_all_it_is_told(case):
  _, apply, params, moved = case
  np.testing.assert_array_equal(apply(params, X, T, **COND), 0.0)
  y = apply(moved, X, T, **COND)
  others = {
    "x": apply(moved, X + 0.1, T, **COND),
    "t": apply(moved, X, T[::-1], **COND)[::2],
    "label": apply(moved, X, T, **COND | {"label": jnp.array([1, 1, 1])}),
    "image": apply(moved, X, T, **COND | {"image": jnp.zeros_like(COND["image"])}),
  }
  for name, other in others.items():
    change = jnp.abs(other - (y[::2] if name == "t" else y)).max(axis=(1, 2, 3))
    assert change.min() > 1e-4, (name, change)


def test_examples_do_not_see_their_batch_mates(case):
  _, apply, _, moved = case
  y = apply(moved, X, T, **COND)
  turned = apply(moved, X[::-1], T[::-1], **{name: value[::-1] for name, value in COND.items()})
  np.testing.assert_allclose(turned[::-1], y, rtol=1e-4, atol=1e-5)
  jacobian = jax.jit(jax.grad(lambda x: apply(moved, x, T, **COND)[0].sum()))(X)
  np.testing.assert_array_equal(jacobian[1:], 0.0)
  assert jnp.abs(jacobian[0]).max() > 0


def test_gradient_reaches_every_parameter(case):
  _, apply, _, moved = case
  target = jax.random.normal(jax.random.key(3), X.shape)
  gradients = jax.jit(jax.grad(lambda p: jnp.sum((apply(p, X, T, **COND) - target) ** 2)))(moved)
  silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradients) if not jnp.any(g != 0)]
  assert not silent


@pytest.mark.standard_promotion
def test_bfloat16_computes_near_float32(case):
  net, apply, params, _ = case
  # As initialized, but for the layers that are zero then: their products must not be.
  moved = jax.tree.map(lambda p: p if jnp.any(p != 0) else perturbed(p), params)
  half = net.clone(dtype=jnp.bfloat16, conditions={name: m.clone(dtype=jnp.bfloat16) for name, m in CONDITIONS.items()})
  y, z = apply(moved, X, T, **COND), jax.jit(half.apply)(moved, X, T, **COND)
  assert z.dtype == X.dtype
  error = jnp.linalg.norm(z - y) / jnp.linalg.norm(y)
  assert 0 < error < 0.02  # exactly zero would mean that float32 was used


@pytest.mark.standard_promotion
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_parameters_have_their_own_type(net):
  y, params = jax.eval_shape(net.clone(param_dtype=jnp.bfloat16).init_with_output, jax.random.key(0), X, T)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert y.dtype == X.dtype
  params = jax.eval_shape(net.clone(dtype=jnp.bfloat16).init, jax.random.key(0), X, T)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_with_periodic_borders_translations_stay_translations(case):
  """Of any number of pixels along both axes, of x and an image beside it."""
  net, apply, _, moved = case
  periodic = jax.jit(net.clone(padding="CIRCULAR").apply)
  move = lambda x: jnp.roll(x, (3, -2), axis=(1, 2))
  told = COND | {"image": move(COND["image"])}
  y = periodic(moved, X, T, **COND)
  np.testing.assert_allclose(periodic(moved, move(X), T, **told), move(y), rtol=1e-3, atol=1e-4)
  other = apply(moved, move(X), T, **told) - move(apply(moved, X, T, **COND))  # with zeros beyond the border
  assert jnp.abs(other).max() > 1e-2


def test_the_norm_is_its_formula():
  x = 2.0 + 3.0 * jax.random.normal(jax.random.key(0), (2, 4, 6, 5)) * jnp.arange(1.0, 6.0)[None, None, None]
  embedding = jax.random.normal(jax.random.key(1), (2, 7))
  norm = ConditionalInstanceNorm()
  params = perturbed(norm.init(jax.random.key(2), x, embedding))
  weights = jax.tree.map(np.asarray, params["params"]["Dense_0"])
  e = np.asarray(embedding)
  gamma, alpha, beta = np.split((e / (1 + np.exp(-e))) @ weights["kernel"] + weights["bias"], 3, axis=-1)
  mu, s = np.asarray(x).mean((1, 2)), np.asarray(x).std((1, 2))
  offset = (mu - mu.mean(-1, keepdims=True)) / mu.std(-1, keepdims=True)
  normalized = (np.asarray(x) - mu[:, None, None]) / s[:, None, None]
  expected = (1 + gamma)[:, None, None] * normalized + ((1 + alpha) * offset + beta)[:, None, None]
  np.testing.assert_allclose(norm.apply(params, x, embedding), expected, rtol=1e-3, atol=1e-3)


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
  params = perturbed(jax.jit(net.init)(jax.random.key(0), X, T))
  np.testing.assert_allclose(jax.jit(net.apply)(params, X, T), one_by_one(params["params"]), rtol=1e-4, atol=1e-5)


def test_fourier_features_are_what_the_first_convolution_reads():
  net, x = NETS["vdm"], X[:1]
  params = perturbed(jax.jit(net.init)(jax.random.key(0), x, T[:1]))
  assert count(net, (8, 8, 3)) - count(net.clone(fourier_levels=0), (8, 8, 3)) == 9 * 4 * 3 * 4
  moved = jax.tree.map(lambda p: p, params)
  kernel = params["params"]["Conv_0"]["kernel"]
  np.testing.assert_array_equal(kernel.shape, (3, 3, fourier_features(x, 17).shape[-1], 4))
  # A network whose convolution reads the four waves alone is periodic in x: two levels are 4/17.
  moved["params"]["Conv_0"]["kernel"] = kernel.at[:, :, 0].set(0.0)
  apply = jax.jit(net.apply)
  y = apply(moved, x, T[:1])
  np.testing.assert_allclose(apply(moved, x + 4 / 17, T[:1]), y, rtol=1e-3, atol=1e-4)
  assert jnp.abs(apply(params, x + 4 / 17, T[:1]) - y).max() > 1e-3
  assert jnp.abs(apply(moved, x + 1 / 17, T[:1]) - y).max() > 1e-2


def test_dropout_acts_in_training_only():
  net = NETS["vdm"].clone(dropout=0.5)
  params = perturbed(jax.jit(net.init)(jax.random.key(0), X, T))
  train = jax.jit(lambda seed: net.apply(params, X, T, train=True, rngs={"dropout": jax.random.key(seed)}))
  np.testing.assert_array_equal(jax.jit(net.apply)(params, X, T), jax.jit(NETS["vdm"].apply)(params, X, T))
  assert jnp.abs(train(0) - train(1)).max() > 1e-3


@pytest.mark.parametrize(
  ("net", "shape", "parameters"),
  [
    (RefineNet(), (28, 28, 1), 444_865),
    (VDMNet(), (32, 32, 3), 30_586_243),
  ],
)
def test_networks_have_the_stated_size(net, shape, parameters):
  assert count(net, shape) == parameters


@pytest.mark.usefixtures("untyped")
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
    jax.eval_shape(make().init, jax.random.key(0), jnp.zeros(x_shape), jnp.zeros(2))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_tokens_and_unknown_conditions_are_refused(net):
  told = net.clone(conditions={"words": conditioning.Embedding(3, sequence=True)})
  with pytest.raises(ValueError, match=f"{type(net).__name__} has no cross-attention to read the tokens"):
    jax.eval_shape(told.init, jax.random.key(0), X, T, words=jnp.ones((3, 2, 3)))
  with pytest.raises(ValueError, match="cond has 'label', a condition that the network lacks"):
    jax.eval_shape(net.init, jax.random.key(0), X, T, label=jnp.zeros(3, int))
  with pytest.raises(TypeError, match="x has dtype int32: pass floats"):
    jax.eval_shape(net.init, jax.random.key(0), X.astype(int), T)
