"""Conditions: how networks read them, how they are dropped, and their way from configs to samples and likelihoods."""

import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdiff as jd
from jaxdiff import cli, factory, objectives, systems
from jaxdiff.data import sources
from jaxdiff.data.examples import from_arrays
from jaxdiff.factory import ConfigError
from jaxdiff.models import Text, conditioning
from jaxdiff.models.conditioning import Embedding, Encoded, Image, Label, Scalar

X = jnp.zeros((3, 4, 4, 2))
KEY = jax.random.key(0)


def encode(conditions, cond, features=8, x=X, key=KEY):
  """What a network of this many features is told, with random parameters."""

  class Net(nn.Module):
    conditions: Mapping[str, Any]

    @nn.compact
    def __call__(self, cond):
      return conditioning.encode(self.conditions, cond, x, features)

  encoded, params = Net(conditions).init_with_output(key, cond)
  noise = lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape)
  return Net(conditions).apply(jax.tree.map(noise, params), cond) if params else encoded


def test_a_label_has_its_vector_and_beyond_the_classes_there_is_none():
  vector = encode({"label": Label(4)}, {"label": jnp.array([1, 4, 1])}).vector
  assert vector.shape == (3, 8)
  np.testing.assert_array_equal(vector[0], vector[2])
  assert jnp.abs(vector[0] - vector[1]).max() > 0.1
  for wrong in ([5, 3, -9], [-1, 3, -2]):  # negative numbers do not count from the end
    vector = encode({"label": Label(4)}, {"label": jnp.array(wrong)}).vector
    assert jnp.isnan(vector[jnp.array([0, 2])]).all()
    assert jnp.isfinite(vector[1]).all()
  assert jnp.isnan(encode({"label": Label(4, droppable=False)}, {"label": jnp.array([4, 0, 0])}).vector[0]).all()
  with pytest.raises(ValueError, match="Label has droppable=False, so nothing stands for no label"):
    conditioning.null({"label": Label(4, droppable=False)})


def test_an_unknown_scalar_has_a_vector_of_its_own():
  level = lambda *values: encode({"level": Scalar()}, {"level": jnp.array(values)}).vector
  vector, other = level(0.0, jnp.nan, 0.3), level(0.0, jnp.nan, 0.31)
  assert jnp.isfinite(vector).all()
  np.testing.assert_array_equal(vector[:2], other[:2])
  assert 0 < jnp.abs(vector[2] - other[2]).max() < 1  # smooth
  assert jnp.abs(vector[0] - vector[1]).max() > 0.1


def test_a_small_image_is_enlarged_by_linear_interpolation():
  small = jnp.arange(3 * 2 * 2 * 1, dtype=jnp.float32).reshape(3, 2, 2, 1)
  large = encode({"small": Image(1)}, {"small": small}).channels
  axis = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # centres of pixels, the border repeated
  np.testing.assert_allclose(large[..., 0], np.einsum("yi,xj,bij->byx", axis, axis, small[..., 0]), rtol=1e-6)
  whole = jax.random.normal(KEY, (3, 4, 4, 2))
  np.testing.assert_array_equal(encode({"image": Image(2)}, {"image": whole}).channels, whole)


def test_vectors_of_zeros_fill_up_a_sequence_and_are_not_there():
  words = jax.random.normal(KEY, (3, 2, 5)).at[1].set(0.0).at[2, 1].set(0.0)
  short = encode({"words": Embedding(5, sequence=True)}, {"words": words})
  long = encode({"words": Embedding(5, sequence=True)}, {"words": jnp.pad(words, ((0, 0), (0, 3), (0, 0)))})
  assert short.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
  np.testing.assert_allclose(long.vector, short.vector, rtol=1e-5)
  np.testing.assert_array_equal(long.mask[:, :3], short.mask)
  np.testing.assert_allclose(long.tokens[:, :3], short.tokens, rtol=1e-5, atol=1e-6)
  assert not long.mask[:, 3:].any()
  assert not short.vector[1].any()  # the null condition


def test_all_conditions_together_are_their_sum_or_side_by_side():
  conditions = {"b": Label(3), "a": Scalar(), "small": Image(3), "image": Image(1), "words": Embedding(5, True)}
  image, small = jnp.ones((3, 4, 4, 1)), jnp.full((3, 2, 2, 3), 2.0)
  cond = {"a": jnp.ones(3), "b": jnp.arange(3), "image": image, "small": small, "words": jnp.ones((3, 2, 5))}
  encoded = encode(conditions, cond)
  np.testing.assert_array_equal(encoded.channels[0, 0, 0], [1.0, 2.0, 2.0, 2.0])
  assert encoded.tokens.shape == (3, 3, 8)
  rest = {name: value for name, value in cond.items() if name in ("a", "b", "words")}
  alone = [encode({name: conditions[name]}, {name: value}).vector for name, value in rest.items()]
  np.testing.assert_allclose(encoded.vector, sum(alone), rtol=1e-4, atol=1e-5)
  assert encode({}, {}) == Encoded()


def test_nothing_is_full_of_null():
  conditions = {"label": Label(7), "level": Scalar(), "image": Image(2), "words": Embedding(5, True)}
  nothing, null = conditioning.nothing(conditions, X), conditioning.null(conditions)
  for name, value in nothing.items():
    np.testing.assert_array_equal(value, np.full(value.shape, null[name], value.dtype))
    conditions[name].check(name, value, X)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("conditions", "cond", "error", "message"),
  [
    (
      {"t": Scalar()},
      {"t": jnp.zeros(3)},
      ValueError,
      "conditions has the name 't', which is that of another argument",
    ),
    ({"label": Label(3)}, {"lable": jnp.zeros(3, int)}, ValueError, "cond has 'lable', .* it has label"),
    ({}, {"label": jnp.zeros(3, int)}, ValueError, "cond has 'label', .* it has none: give it `conditions`"),
    ({"label": Label(3), "a": Scalar()}, {"a": jnp.zeros(3)}, ValueError, "cond lacks 'label': pass all of a, label"),
    ({"label": Label(3)}, {"label": jnp.zeros(3)}, TypeError, r"cond\['label'\] has dtype float32: pass integers"),
    ({"label": Label(3)}, {"label": jnp.zeros((3, 1), int)}, ValueError, r"has shape \(3, 1\) beside x .* from 0 to 2"),
    ({"a": Scalar()}, {"a": jnp.zeros(2)}, ValueError, r"cond\['a'\] has shape \(2,\)"),
    ({"i": Image(3)}, {"i": jnp.zeros((3, 4, 4, 1))}, ValueError, r"floats \[b, h, w, 3\]"),
    ({"i": Image(1)}, {"i": jnp.zeros((3, 3, 3, 1))}, ValueError, "smaller by a whole factor"),
    ({"w": Embedding(5)}, {"w": jnp.zeros((3, 2, 5))}, ValueError, r"pass floats \[b, 5\], null 0"),
  ],
)
def test_wrong_conditions_are_named_with_the_remedy(conditions, cond, error, message):
  with pytest.raises(error, match=message):
    encode(conditions, cond)


def told(x, t, label, level):
  """A network that says what it was told."""
  return jnp.broadcast_to((label + 100 * level)[:, None], x.shape).astype(x.dtype)


def dropping(probability, null, key=KEY, count=64):
  """(what each example was told, aux) of a loss that is the output of the network itself."""
  inner = lambda key, x0, network, cond, u: (network(x0, x0[:, 0], **cond)[:, 0], {})
  cond = {"label": jnp.arange(count, dtype=jnp.float32), "level": jnp.full(count, 1.0)}
  return jd.losses.drop_conditions(inner, null, probability)(key, jnp.zeros((count, 2)), told, cond)


def test_dropped_conditions_equal_the_null_condition_exactly():
  value, aux = dropping(1.0, {"label": -1.0, "level": jnp.nan})
  assert jnp.isnan(value).all()
  assert aux["dropped"].all()
  value, aux = dropping(1.0, {"label": -1.0})
  np.testing.assert_array_equal(value, np.full(64, 99.0))  # what null does not name stays
  value, aux = dropping(0.0, {"label": -1.0})
  np.testing.assert_array_equal(value, 100 + np.arange(64.0))
  assert not aux["dropped"].any()


def test_conditions_are_dropped_together_and_as_often_as_asked():
  value, aux = dropping(0.3, {"label": -1.0, "level": 0.0}, count=4096)
  np.testing.assert_array_equal(value, np.where(aux["dropped"], -1.0, 100 + np.arange(4096)))
  assert abs(aux["dropped"].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4096)
  keys = jd.example_keys(KEY, 0, 64)
  whole, half = dropping(0.3, {"label": -1.0}, keys)[1], dropping(0.3, {"label": -1.0}, keys[:32], 32)[1]
  np.testing.assert_array_equal(whole["dropped"][:32], half["dropped"])  # each example by its own key


def test_the_loss_with_dropping_is_the_loss_of_what_it_tells():
  loss, key = jd.losses.denoising(jd.VP(), jd.predictions.noise()), jd.example_keys(KEY, 0, 8)
  x0, u, cond = jnp.ones((8, 2)), jnp.linspace(0.0, 0.9, 8), {"label": jnp.ones(8), "level": jnp.ones(8)}
  value, aux = jd.losses.drop_conditions(loss, {"label": -1.0}, 0.5)(key, x0, told, cond, u)
  cond["label"] = jnp.where(aux["dropped"] == 1, -1.0, 1.0)
  assert 0 < aux["dropped"].sum() < 8
  np.testing.assert_array_equal(value, loss(jd.keys.split(key)[1], x0, told, cond, u)[0])


def test_networks_are_told_the_null_condition_for_dropped_examples():
  """To the last bit, by labels, images and sequences."""
  conditions = {"label": Label(4), "image": Image(2), "words": Embedding(5, sequence=True)}
  cond = {"label": jnp.arange(3), "image": jnp.ones((3, 4, 4, 2)), "words": jnp.ones((3, 1, 5))}
  seen = []
  inner = lambda key, x0, network, cond, u: (seen.append(cond), (jnp.zeros(len(x0)), {}))[1]
  jd.losses.drop_conditions(inner, conditioning.null(conditions), 1.0)(KEY, X, told, cond)
  expected = encode(conditions, conditioning.nothing(conditions, X))
  jax.tree.map(np.testing.assert_array_equal, encode(conditions, seen[0]), expected)


@pytest.mark.standard_promotion
def test_parameters_of_conditions_are_of_the_type_asked_for():
  types = {"param_dtype": jnp.bfloat16}
  for module in (Label(4, **types), Scalar(**types), Embedding(5, True, **types), Text(3, 8, 1, 2, **types)):
    shapes = jax.eval_shape(lambda value, module=module: module.init(KEY, value, X, 8), module.nothing(X))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("untyped")
def test_wrong_dropping_is_refused():
  loss = jd.losses.denoising(jd.VP(), jd.predictions.noise())
  with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 10"):
    jd.losses.drop_conditions(loss, {"label": 3}, 10)
  with pytest.raises(ValueError, match="cond lacks 'text', which null says how to drop"):
    jd.losses.drop_conditions(loss, {"text": 0}, 0.1)(KEY, jnp.zeros((2, 2)), told, {"label": jnp.zeros(2)})
  for null, dtype in ((256, jnp.uint8), (float("nan"), jnp.int32)):
    with pytest.raises(ValueError, match=f"dtype {np.dtype(dtype)}, which cannot hold its null {null}"):
      jd.losses.drop_conditions(loss, {"label": null}, 0.1)(KEY, X, told, {"label": jnp.zeros(3, dtype)})


@pytest.fixture(scope="module")
def config():
  fields = {"batch_size": 8, "steps": 4, "log_every": 2, "checkpoint_every": 4, "drop_conditions": 0.5}
  return {
    "seed": 0,
    "data": {"type": "npz", "path": "", "levels": 5},
    "sde": {"type": "VP"},
    "prediction": {"type": "edm"},
    "loss": {"type": "denoising"},
    "network": {"type": "MLP", "width": 8, "depth": 1, "conditions": {"label": {"type": "label", "classes": 3}}},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "train": fields,
    "sampler": {"type": "ddim", "grid": {"steps": 2}},
    "sample": {"num": 8, "batch_size": 8},
    "likelihood": {"rtol": 0.1, "atol": 0.1, "batch_size": 8, "bound_draws": 2, "limit": 8},
  }


def images(count=24, labels=3):
  x = np.random.default_rng(0).integers(0, 5, (count, 4, 4, 3)).astype(np.uint8)
  return from_arrays(x, np.arange(count) % labels, more={"side": x * np.float32(0.1)}, levels=5)


def with_conditions(config, **conditions):
  return config | {"network": config["network"] | {"conditions": conditions}}


def test_images_made_of_the_example_itself_are_those_of_the_training_without_noise(config):
  conditions = {
    "small": {"type": "downsampled"},
    "grey": {"type": "greyscale"},
    "label": {"type": "label", "classes": 3},
  }
  source = images()
  batch = {name: jnp.asarray(value) for name, value in source.gather([0, 1]).items()}
  cond = factory.make_cond(with_conditions(config, **conditions), source)(batch)
  centres = (np.asarray(batch["x"], np.float64) + 0.5) / 2.5 - 1  # five cells in [-1, 1]
  np.testing.assert_allclose(cond["small"], centres.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(cond["grey"][..., 0], centres @ [0.299, 0.587, 0.114], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(cond["label"], [0, 1])


def test_mirrored_images_have_mirrored_conditions(config, monkeypatch):
  """The network is told the brightness of the image that it is to denoise, whichever way round that is."""
  conditions = {"grey": {"type": "greyscale"}, "side": {"type": "image"}}
  config = with_conditions(config, **conditions) | {"train": config["train"] | {"random_flip": True}}
  config["train"]["drop_conditions"], source, seen = 0.0, images(), []

  def loss(key, x0, network, cond, u):
    seen.append((x0, cond["grey"], cond["side"]))
    return jnp.zeros(len(x0)), {}

  monkeypatch.setattr(objectives, "make_loss", lambda *_: (loss, True))
  batch = {name: jnp.asarray(value) for name, value in source.gather(np.arange(8)).items()} | {"u": jnp.zeros(8)}
  objectives.make_objective(config, source)(None, jd.example_keys(KEY, 0, 8), batch)
  (x0, grey, side), plain = seen[0], factory.make_cond(config, source)(batch)["grey"]
  flipped = np.array([not np.array_equal(a, b) for a, b in zip(grey, plain, strict=True)])
  assert 0 < flipped.sum() < 8
  expected = x0 @ jnp.array([[0.299], [0.587], [0.114]])
  assert jnp.abs(grey - expected).max() < 0.2 + 1e-6  # the noise of dequantization is within half a cell
  assert jnp.abs((10 * side + 0.5) / 2.5 - 1 - x0).max() < 0.2 + 1e-6


def test_super_resolution_of_a_config_is_trained_on_noised_images(config):
  """The small image is noised by the level that the network is told, in training alone, and dropped after that."""
  conditions = {"small": {"type": "downsampled"}, "level": {"type": "noise_level", "image": "small", "most": 0.8}}
  config, source, seen = with_conditions(config, **conditions), images(), []
  batch = {name: jnp.asarray(value) for name, value in source.gather(np.arange(24)).items()} | {"u": jnp.zeros(24)}
  clean = factory.make_cond(config, source)(batch)
  assert not clean["level"].any()

  def told(dropping, training):
    config["train"] = {"drop_conditions": dropping}
    with pytest.MonkeyPatch.context() as patch:
      loss = lambda key, x0, network, cond, u: (seen.append(cond), (jnp.zeros(len(x0)), {}))[1]
      patch.setattr(objectives, "make_loss", lambda *_: (loss, True))
      aux = objectives.make_objective(config, source, training)(None, jd.example_keys(KEY, 0, 24), batch)[1]
    return seen[-1], aux

  cond, aux = told(0.0, True)
  level = cond["level"][:, None, None, None]
  np.testing.assert_array_equal(aux["level"], cond["level"])
  assert 0 < cond["level"].min() < cond["level"].max() < 0.8
  noise = (cond["small"] - jnp.sqrt(1 - level**2) * clean["small"]) / level
  assert abs(float(noise.std()) - 1) < 4.5 / (2 * noise.size) ** 0.5
  jax.tree.map(np.testing.assert_array_equal, told(0.0, False)[0], clean)
  cond, aux = told(0.5, True)
  dropped = aux["dropped"] == 1
  assert 0 < dropped.sum() < 24
  np.testing.assert_array_equal(jnp.isnan(cond["level"]), dropped)
  np.testing.assert_array_equal(jnp.all(cond["small"] == 0, axis=(1, 2, 3)), dropped)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_network_trained_on_noised_images_trusts_them_as_far_as_their_level(config):
  """Images of one brightness z ~ N(0, 1), and z itself noised: E[z | x_t, z_s, s] weighs both by their precision."""
  conditions = {
    "small": {"type": "downsampled", "channels": 1},
    "level": {"type": "noise_level", "image": "small", "most": 0.9},
  }
  t, batch_size, steps = 0.5, 256, 1500
  config = with_conditions(config, **conditions) | {
    "train": {"batch_size": batch_size},
    "prediction": {"type": "data"},
    "loss": {"type": "denoising", "time": {"type": "fixed", "t": t}},
  }
  config["network"] = config["network"] | {"width": 64, "depth": 2}
  brightness = np.random.default_rng(0).normal(size=(4096, 1, 1, 1)).astype(np.float32)
  source = from_arrays(np.broadcast_to(brightness, (4096, 2, 2, 1)).copy())
  objective, tx = objectives.make_objective(config, source), optax.adam(optax.linear_schedule(5e-3, 0.0, steps))

  def step(state, i):
    params, opt = state
    keys = jd.example_keys(jax.random.fold_in(KEY, i), 0, batch_size)
    rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (batch_size,), 0, 4096)
    batch = {"x": jnp.asarray(source.examples.arrays["x"])[rows], "u": jnp.zeros(batch_size)}
    grads = jax.grad(lambda params: jnp.mean(objective(params, keys, batch)[0]))(params)
    updates, opt = tx.update(grads, opt)
    return (optax.apply_updates(params, updates), opt), None

  params = factory.init_params(config, source)
  (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))((params, tx.init(params)))
  process, count = jd.VP(), 2000
  alpha, sigma = (float(value) for value in process.marginal(t))
  z, z_noise = np.random.default_rng(1).normal(size=(2, count, 1, 1, 1)).astype(np.float32)
  x_t = alpha * z + sigma * np.random.default_rng(2).normal(size=(count, 2, 2, 1)).astype(np.float32)
  for s in (0.1, 0.4, 0.8):
    c = np.sqrt(1 - s**2)
    small = c * z + s * z_noise
    of_x, of_small = 4 * alpha**2 / sigma**2, c**2 / s**2
    exact = (of_x * x_t.mean((1, 2, 3), keepdims=True) / alpha + of_small * small / c) / (1 + of_x + of_small)
    told = {"small": jnp.asarray(small), "level": jnp.full(count, s, jnp.float32)}
    made = factory.make_score(config)(params).denoised(jnp.asarray(x_t), t, **told)
    assert float(np.sqrt(np.mean((made - exact) ** 2))) < 0.1
    assert float(np.sqrt(np.mean((made - small / c) ** 2))) > (0.0 if s < 0.3 else 0.2)


@pytest.mark.parametrize(
  ("conditions", "message"),
  [
    ({"label": {"type": "label", "classes": 2}}, "classes = 2, but .* has labels from 0 to 2: .* set classes=3"),
    (
      {"text": {"type": "text", "length": 4}},
      r"config.network.conditions.text needs data with 'text'; .* has label, side, x",
    ),
    ({"label": {"type": "lable"}}, r"config.network.conditions.label.type is 'lable'; did you mean 'label'\?"),
    ({"label": {"type": "label"}}, "config.network.conditions.label needs a value for classes"),
    ({"label": {"type": "label", "clases": 3}}, r"conditions.label.clases does not exist; did you mean 'classes'\?"),
    (
      {"small": {"type": "downsampled", "factor": 3}},
      "conditions.small: factor=3 does not divide the 4x4 pixels",
    ),
    ({"small": {"type": "downsampled", "channels": 1}}, r"conditions.small: cond\['small'\] has shape \(1, 2, 2, 3\)"),
    ({"small": {"type": "downsampled", "factor": 0}}, "conditions.small: factor must be at least 1, got 0"),
    ({"grey": {"type": "image", "channels": 1}}, "config.network.conditions.grey needs data with 'grey'"),
    (
      {"small": {"type": "downsampled"}, "level": {"type": "noise_level", "image": "smal"}},
      r"config.network.conditions: level.image must name one of the images among them \(small\), got 'smal'",
    ),
    (
      {"small": {"type": "downsampled"}, "level": {"type": "noise_level", "image": "small", "most": 1.0}},
      r"config.network.conditions.level: most must lie in \(0, 1\), the largest level of noise; got 1.0",
    ),
  ],
)
def test_conditions_that_the_data_do_not_have_are_refused_before_any_work(config, conditions, message):
  def start(config):
    systems.check(config)
    factory.check_conditions(config, images())

  with pytest.raises(ConfigError, match=message):
    start(with_conditions(config, **conditions))


def test_all_labels_and_the_shape_of_every_field_are_checked(config):
  """Sorted labels, whose last ones are too large; and bytes of another length than the network reads."""
  label = np.repeat(np.arange(4), 5000)
  source = from_arrays(np.zeros((len(label), 2), np.float32), label)
  with pytest.raises(ConfigError, match="labels from 0 to 3: labels count from 0, so set classes=4"):
    factory.check_conditions(config, source)
  source = from_arrays(np.zeros((4, 2), np.float32), text=np.ones((4, 6), np.uint8))
  with pytest.raises(ConfigError, match=r"network.conditions.text: cond\['text'\] has shape \(1, 6\)"):
    factory.check_conditions(with_conditions(config, text={"type": "text", "length": 5}), source)


def test_npz_hands_out_other_arrays_under_their_own_names(tmp_path, config):
  rng = np.random.default_rng(0)
  arrays = {"x": rng.normal(size=(20, 2)), "level": rng.normal(size=20), "clip": rng.normal(size=(20, 5))}
  np.savez(tmp_path / "whole.npz", **arrays)
  np.savez(
    tmp_path / "parts.npz", **{f"{name}_{split}": a for name, a in arrays.items() for split in ("train", "test")}
  )
  for name, count in (("whole", 18), ("parts", 20)):
    source = sources.npz("train", tmp_path / f"{name}.npz")
    batch = source.gather(np.arange(count))
    rows = [np.flatnonzero(np.isclose(arrays["x"][:, 0], x[0]))[0] for x in batch["x"]]
    np.testing.assert_allclose(batch["level"], arrays["level"][rows], rtol=1e-6)
    np.testing.assert_allclose(batch["clip"], arrays["clip"][rows], rtol=1e-6)
    told = {"level": {"type": "scalar"}, "clip": {"type": "embedding", "features": 5}}
    factory.check_conditions(with_conditions(config, **told), source)
  np.savez(tmp_path / "short.npz", x=arrays["x"], level=arrays["level"][:-1])
  with pytest.raises(ValueError, match=r"needs x \[n, ...\], .* it holds .*level \[19\]"):
    sources.npz("train", tmp_path / "short.npz")


def test_tokens_without_a_mask_are_all_there():
  class Mine(nn.Module):
    def nothing(self, x):
      return jnp.zeros(len(x))

    def check(self, name, value, x):
      pass

    @nn.compact
    def __call__(self, value, x, features):
      return Encoded(tokens=jnp.broadcast_to(value[:, None, None], (len(x), 2, features)))

  cond = {"mine": jnp.ones(3), "words": jnp.zeros((3, 1, 5))}
  mask = encode({"mine": Mine(), "words": Embedding(5, sequence=True)}, cond).mask
  assert mask.tolist() == [[True, True, True, False]] * 3


def test_dropping_needs_conditions(config):
  with pytest.raises(ConfigError, match="config.train.drop_conditions needs config.network.conditions; there are none"):
    systems.check(with_conditions(config))


@pytest.mark.standard_promotion
def test_the_likelihood_is_that_of_the_example_s_own_condition(config):
  source = images()
  params = factory.init_params(config, source)
  params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  key, batch = jd.example_keys(KEY, 0, 4), {n: jnp.asarray(v) for n, v in source.gather([0, 1, 2, 3]).items()}
  run = jax.jit(objectives.make_log_likelihood(config, params, source))
  value, other = (run(params, key, b)["value"] for b in (batch, batch | {"label": jnp.array([0, 1, 2, 1])}))
  np.testing.assert_array_equal(value[:3], other[:3])
  assert value[3] != other[3]
  bound = jax.jit(objectives.make_bound(config, params, source, 2))
  first, second = (bound(params, key, b)["bound"] for b in (batch, batch | {"label": jnp.array([0, 1, 2, 1])}))
  np.testing.assert_array_equal(first[:3], second[:3])
  assert first[3] != second[3]


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_conditional_model_trains_samples_and_is_evaluated_by_the_commands(config, tmp_path, capsys):
  """Labels from a file; another label of a test example changes its sample and leaves the others alone."""
  rng, drawn = np.random.default_rng(0), {}
  x, label = rng.integers(0, 5, (32, 4, 4, 3)).astype(np.uint8), rng.integers(0, 3, 32)
  for change in (0, 1):
    np.savez(
      tmp_path / "data.npz",
      x_train=x,
      x_test=x,
      label_train=label,
      label_test=(label + change * (x[:, 0, 0, 0] > 2)) % 3,
    )
    run = tmp_path / "run"
    path = tmp_path / "config.json"
    config["data"]["path"] = str(tmp_path / "data.npz")
    path.with_suffix(".py").write_text(
      f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({config!r})\n"
    )
    if not change:
      cli.main(["train", f"--config={path.with_suffix('.py')}", f"--workdir={run}"])
    cli.main(["sample", f"--workdir={run}"])
    drawn[change] = np.load(run / "samples.npz")["x"]
  changed = x[:8, 0, 0, 0] > 2
  assert 0 < changed.sum() < 8
  same = np.array([np.array_equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True)])
  np.testing.assert_array_equal(same, ~changed)
  cli.main(["likelihood", f"--workdir={run}"])
  report = json.loads((run / "likelihood.json").read_text())
  assert report["examples"] == 8
  assert report["model"]["network"]["conditions"] == config["network"]["conditions"]
  with pytest.raises(SystemExit):
    cli.main(["sample", f"--workdir={run}", "--config.network.conditions.label.classes=4"])
  assert "config.network.conditions.label.classes was 3, is 4" in capsys.readouterr().err
