"""The U-Nets of the literature: counts, gradients, precision, shifts; the default network, against plain sums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from jaxdiff.models import UNet, presets
from jaxdiff.models.conditioning import Embedding, Image, Label
from jaxdiff.models.layers import sinusoidal_embedding

SMALL = {"channels": 8, "blocks": 0, "groups": 4}
KINDS = {
  "ddpm": UNet(**SMALL, modulation="add", all_biases=True, resampling="conv"),
  "ncsnpp": UNet(
    **SMALL,
    modulation="add",
    all_biases=True,
    attention_levels=(1,),
    up_attention="level",
    resampling="fir",
    resample_in_blocks=True,
    project_resampled=True,
    skip_rescale=True,
    progressive_input="residual",
    progressive_output="residual",
    time_embedding="fourier",
    time_features=16,
    fourier_scale=1.0,
  ),
  "ncsnpp 256": UNet(
    **SMALL,
    resampling="fir",
    resample_in_blocks=True,
    skip_rescale=True,
    progressive_input="input_skip",
    progressive_output="output_skip",
    parts=2,
  ),
  "adm": UNet(
    **SMALL,
    attention_levels=(1,),
    head_channels=4,
    all_biases=True,
    norm_epsilon=1e-5,
    resample_in_blocks=True,
    parts=2,
    conditions={"label": Label(10), "text": Embedding(5, sequence=True), "small": Image(2)},
  ),
}


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TEXT = normal(7, 2, 3, 5)
TEXT[0, 2] = 0.0
COND = {"label": np.array([3, 10]), "text": TEXT, "small": normal(8, 2, 2, 2, 2)}
X, T = normal(1, 2, 4, 4, 3), np.array([0.1, 0.9], np.float32)


def cond_of(net):
  return COND if net.conditions else {}


@functools.cache
def case(kind):
  """Network, parameters, outputs of any parameters and conditions, and the gradient of a product with the output."""
  net = KINDS[kind]
  params, run = networks.moved(net, X, T, **cond_of(net)), networks.program(net)
  cotangent = normal(2, *X.shape[:-1], net.parts * X.shape[-1])
  apply = lambda params, cond=cond_of(net): jax.device_get(run(params, X, T, cond, cotangent)[0])
  return net, params, apply, jax.device_get(run(params, X, T, cond_of(net), cotangent)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_have_the_shape_of_x_and_are_zero_at_initialization(kind):
  """The last layers are, whatever the others are."""
  net, params, apply, _ = case(kind)
  y = apply(params)
  assert y.shape == (*X.shape[:-1], net.parts * X.shape[-1])
  assert np.abs(y).max() > 1e-2
  last = [name for name in params["params"] if name == "output" or name.startswith("pyramid_output")]
  np.testing.assert_array_equal(apply(networks.at_first(net, params, last, X, T, **cond_of(net))), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_parameter(kind):
  net, params, _, gradients = case(kind)
  names = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  fixed = [name for name in names if name.endswith("frequencies")]  # drawn once, not trained
  assert networks.silent(gradients) == fixed
  assert len(fixed) == (net.time_embedding == "fourier")
  if net.all_biases:
    # The same number added to all logits of a query: the weights do not see biases of keys.
    bias = gradients["params"]["SelfAttention_0"]["query_key_value"]["bias"]
    query, key, value = np.split(bias, 3)
    assert np.abs(key).max() < 1e-4 * min(np.abs(query).max(), np.abs(value).max())


@pytest.mark.standard_promotion
def test_bfloat16_is_within_two_percent():
  net, params, apply, _ = case("ncsnpp")
  y, z = apply(params), jax.jit(net.clone(dtype=jnp.bfloat16).apply)(params, X, T, **cond_of(net))
  assert z.dtype == X.dtype
  assert 0 < np.linalg.norm(z - y) < 0.02 * np.linalg.norm(y)


@pytest.mark.standard_promotion
def test_parameters_have_the_type_asked_for():
  for kind in ("ddpm", "ncsnpp"):
    net = KINDS[kind].clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(net.init, jax.random.key(0), X, T)["params"]
    shapes["TimeEmbedding_0"].pop("frequencies", None)  # of which bfloat16 would keep three digits
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


PRESETS = {
  # exact count, size of the images, published: Ho et al. 2020, Appendix B; Dhariwal and Nichol 2021, Appendix I
  "ddpm_cifar10": (35_746_307, 32, 35.7),
  "ddpm_256": (113_673_219, 256, 114),
  "ddpmpp_cifar10": (61_804_419, 32, 62),
  "ncsnpp_cifar10": (62_758_915, 32, 63),
  "adm_imagenet64": (295_904_454, 64, 296),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
  """Shapes alone: nothing is computed."""
  exact, size, millions = PRESETS[name]
  net = getattr(presets, name)()
  x, t = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)} if net.conditions else {}
  params = jax.eval_shape(net.init, jax.random.key(0), x, t, **cond)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == exact
  decimals = 1 if millions == 35.7 else 0
  assert round(count / 1e6, decimals) == millions


def test_frequencies_are_those_of_the_papers():
  """10000^(-k/(n-1)) per step in DDPM, 10000^(-k/n) in ADM, for n frequencies and 1000 steps of time 1."""
  t = np.array([0.0, 0.001, 0.7], np.float32)
  embed = jax.jit(sinusoidal_embedding, static_argnums=1)
  for net, last in ((presets.ddpm_cifar10(), 63), (presets.adm_imagenet64(), 96)):
    n = net.channels // 2
    phase = 1000.0 * t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(n) / last)
    waves = embed(t, net.channels, net.max_frequency, net.min_frequency)
    np.testing.assert_allclose(waves, np.concatenate([np.cos(phase), np.sin(phase)], axis=-1), atol=3e-4)


@pytest.mark.parametrize("name", COND)
def test_every_condition_matters(name):
  _, params, apply, _ = case("adm")
  other = COND | {name: np.array([4, 9]) if name == "label" else 2 * COND[name] + 1}
  assert np.all(np.abs(apply(params, other) - apply(params)).max((1, 2, 3)) > 1e-4)


PERIODIC = {
  "pool": {},
  "conv": {"resampling": "conv", "modulation": "add"},
  "conv_symmetric": {"resampling": "conv_symmetric"},
  "fir": {
    "resampling": "fir",
    "resample_in_blocks": True,
    "progressive_input": "residual",
    "progressive_output": "residual",
  },
}


def shifts(fields):
  """The output of a network without attention for a shifted input, beside the shifted output, and of what size."""
  net = UNet(channels=4, blocks=0, groups=2, middle_attention=False, **fields)
  x = normal(3, 2, 8, 8, 3)
  params = networks.moved(net, x, T)
  shift = lambda x: np.roll(x, (2, -4), axis=(1, 2))
  apply = jax.jit(lambda x: net.apply(params, x, T))
  y = jax.device_get(apply(x))
  return apply(shift(x)), shift(y), np.abs(y).max()


@pytest.mark.parametrize("kind", PERIODIC)
def test_periodic_networks_commute_with_shifts(kind):
  """By the factor between the lowest resolution and the full one: to the rounding of float32."""
  shifted_in, shifted_out, size = shifts(PERIODIC[kind] | {"padding": "CIRCULAR"})
  assert size > 0.1
  np.testing.assert_allclose(shifted_in, shifted_out, atol=1e-5 * size)


def test_zeros_beyond_the_border_break_shifts():
  shifted_in, shifted_out, size = shifts(PERIODIC["fir"])
  assert np.abs(shifted_in - shifted_out).max() > 1e-2 * size


def plain(p, x, t, net):
  """The default network by the names of its parameters, in numpy: the contract with what was trained before."""
  p, blocks, attentions = p["params"], itertools.count(), itertools.count()
  silu = lambda x: x / (1 + np.exp(-x))
  dense = lambda x, p: x @ p["kernel"] + p.get("bias", 0.0)

  def norm(x, p=None):
    y = x.reshape(len(x), -1, net.groups, x.shape[-1] // net.groups)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    return y.reshape(x.shape) * p["scale"] + p["bias"] if p else y.reshape(x.shape)

  def conv(x, p):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ p["kernel"][i, j] for i, j in np.ndindex(3, 3)]
    return sum(taps) + p.get("bias", 0.0)

  def block(x):
    q = p[f"ResidualBlock_{next(blocks)}"]
    scale, shift = np.split(dense(silu(embedding), q["Dense_0"])[:, None, None], 2, axis=-1)
    h = norm(conv(silu(norm(x, q["GroupNorm_0"])), q["Conv_0"])) * (1 + scale) + shift
    return (dense(x, q["shortcut"]) if "shortcut" in q else x) + conv(silu(h), q["Conv_1"])

  def attend(x):
    q, (b, h, w, c) = p[f"SelfAttention_{next(attentions)}"], x.shape
    qkv = dense(norm(x, q["GroupNorm_0"]), q["query_key_value"]).reshape(b, h * w, 3, net.heads, -1)
    logits = np.einsum("bqhc,bkhc->bhqk", qkv[:, :, 0], qkv[:, :, 1]) / np.sqrt(c // net.heads)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return x + dense(np.einsum("bhqk,bkhc->bqhc", weights, qkv[:, :, 2]).reshape(x.shape), q["output"])

  phase = t[:, None] * 1000.0 * 10000.0 ** (-np.arange(4) / 3)[None]
  waves = np.concatenate([np.cos(phase), np.sin(phase)], axis=-1)
  embedding = dense(silu(dense(waves, p["TimeEmbedding_0"]["Dense_0"])), p["TimeEmbedding_0"]["Dense_1"])
  first = conv(x, p["Conv_0"])
  full = block(first)
  half = full.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
  low = attend(block(half))
  h = block(attend(block(low)))
  for skip in (low, half):
    h = attend(block(np.concatenate([h, skip], axis=-1)))
  h = h.repeat(2, axis=1).repeat(2, axis=2)
  for skip in (full, first):
    h = block(np.concatenate([h, skip], axis=-1))
  return conv(silu(norm(h, p["GroupNorm_0"])), p["output"])


def test_the_default_network_is_that_of_its_parameters_names():
  """Trained runs load and give the outputs that they gave: names, shapes and formulas are fixed."""
  net = UNet(channels=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, groups=4)
  shapes = jax.eval_shape(net.init, jax.random.key(0), X, T)
  numbered = [f"ResidualBlock_{k}" for k in range(8)] + [f"SelfAttention_{k}" for k in range(4)]
  assert set(shapes["params"]) == {"TimeEmbedding_0", "Conv_0", "GroupNorm_0", "output", *numbered}
  block = jax.tree.map(lambda leaf: leaf.shape, shapes["params"]["ResidualBlock_1"])
  assert block == {
    "GroupNorm_0": {"scale": (8,), "bias": (8,)},
    "Conv_0": {"kernel": (3, 3, 8, 16)},
    "Dense_0": {"kernel": (32, 32), "bias": (32,)},
    "Conv_1": {"kernel": (3, 3, 16, 16), "bias": (16,)},
    "shortcut": {"kernel": (8, 16), "bias": (16,)},
  }
  params = networks.filled(shapes)
  wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  expected = plain(wide, np.asarray(X, np.float64), np.asarray(T, np.float64), net)
  np.testing.assert_allclose(jax.jit(net.apply)(params, X, T), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"head_channels": 6}, "channels at level 1=16 is not divisible by head_channels=6: use channels at level 1="),
    ({"groups": 3}, "channels at level 0=8 is not divisible by groups=3"),
    ({"resampling": "bilinear"}, "resampling='bilinear': must be 'pool', 'conv', 'conv_symmetric' or 'fir'"),
    ({"resampling": "conv", "resample_in_blocks": True}, "resampling='conv' with resample_in_blocks=True: take 'pool'"),
    ({"modulation": "film"}, "modulation='film': must be 'add' or 'scale_shift'"),
    ({"time_embedding": "random"}, "time_embedding='random': must be 'sinusoidal' or 'fourier'"),
    ({"up_attention": "none"}, "up_attention='none': must be 'block' or 'level'"),
    ({"progressive_input": "sum"}, "progressive_input='sum': must be 'none', 'input_skip' or 'residual'"),
    ({"progressive_output": "sum"}, "progressive_output='sum': must be 'none', 'output_skip' or 'residual'"),
    ({"padding": "VALID"}, "padding='VALID': must be 'SAME' or 'CIRCULAR'"),
    ({"attention_implementation": "flash"}, "attention_implementation='flash': must be 'xla' or 'cudnn'"),
    ({"channel_multipliers": (1, 1, 1, 1)}, "height of x=4 is not divisible by"),
    ({"time_features": 5}, "features=5 of the time embedding is odd"),
    ({"time_features": 5, "time_embedding": "fourier"}, "features=5 of the time embedding is odd"),
  ],
)
def test_wrong_fields_are_named_with_the_remedy(fields, message):
  net = UNet(channels=8, groups=8).clone(**fields)
  with pytest.raises(ValueError, match=message.replace("(", r"\(")):
    jax.eval_shape(net.init, jax.random.key(0), X, T)


def test_wrong_conditions_are_named_with_the_remedy():
  net, params, _, _ = case("adm")
  for cond, message in (
    ({}, "cond lacks 'label', 'small', 'text'"),
    (
      COND | {"class": COND["label"]},
      "cond has 'class', a condition that the network lacks; it has label, small, text",
    ),
    (COND | {"label": np.zeros((2, 1), int)}, r"cond\['label'\] has shape \(2, 1\) beside x of shape"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(net.apply, params, X, T, **cond)
