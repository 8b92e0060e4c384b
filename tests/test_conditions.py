"""Conditions of a config: from the data to the network, in training, samples and likelihoods."""

import json

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
  batch = source.gather([0, 1])
  cond = jax.jit(factory.make_cond(with_conditions(config, **conditions), source))(batch)
  centres = (np.asarray(batch["x"], np.float64) + 0.5) / 2.5 - 1  # five cells in [-1, 1]
  np.testing.assert_allclose(cond["small"], centres.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(cond["grey"][..., 0], centres @ [0.299, 0.587, 0.114], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(cond["label"], [0, 1])


def test_mirrored_images_have_mirrored_conditions(config, monkeypatch):
  """The network is told the brightness of the image that it is to denoise, whichever way round that is."""
  conditions = {"grey": {"type": "greyscale"}, "side": {"type": "image"}}
  config = with_conditions(config, **conditions) | {"train": config["train"] | {"random_flip": True}}
  config["train"]["drop_conditions"], source = 0.0, images()
  loss = lambda key, x0, network, cond, u: (jnp.zeros(len(x0)), {"x0": x0, **cond})
  monkeypatch.setattr(objectives, "make_loss", lambda *_: (loss, True))
  objective = objectives.make_objective(config, source)

  @jax.jit
  def run(batch):
    aux = objective(None, jd.example_keys(jax.random.key(0), 0, 8), batch | {"u": jnp.zeros(8)})[1]
    return [aux[name] for name in ("x0", "grey", "side")], factory.make_cond(config, source)(batch)["grey"]

  (x0, grey, side), plain = jax.device_get(run(source.gather(np.arange(8))))
  flipped = np.abs(grey - plain).max(axis=(1, 2, 3)) > 0.1
  assert 0 < flipped.sum() < 8
  expected = x0 @ np.array([[0.299], [0.587], [0.114]])
  assert np.abs(grey - expected).max() < 0.2 + 1e-6  # the noise of dequantization is within half a cell
  assert np.abs((10 * side + 0.5) / 2.5 - 1 - x0).max() < 0.2 + 1e-6


def test_super_resolution_of_a_config_is_trained_on_noised_images(config):
  """The small image is noised by the level that the network is told, in training alone, and dropped after that."""
  conditions = {"small": {"type": "downsampled"}, "level": {"type": "noise_level", "image": "small", "most": 0.8}}
  config, source = with_conditions(config, **conditions), images()
  batch = source.gather(np.arange(24))
  clean = jax.device_get(jax.jit(factory.make_cond(config, source))(batch))
  assert not clean["level"].any()

  def told(dropping, training):
    config["train"] = {"drop_conditions": dropping}
    with pytest.MonkeyPatch.context() as patch:
      loss = lambda key, x0, network, cond, u: (jnp.zeros(len(x0)), {"told": cond})
      patch.setattr(objectives, "make_loss", lambda *_: (loss, True))
      objective = objectives.make_objective(config, source, training)
    run = jax.jit(
      lambda batch: objective(None, jd.example_keys(jax.random.key(0), 0, 24), batch | {"u": jnp.zeros(24)})
    )
    aux = jax.device_get(run(batch)[1])
    return aux.pop("told"), aux

  cond, aux = told(0.0, True)
  level = cond["level"][:, None, None, None]
  np.testing.assert_array_equal(aux["level"], cond["level"])
  assert 0 < cond["level"].min() < cond["level"].max() < 0.8
  noise = (cond["small"] - np.sqrt(1 - level**2) * clean["small"]) / level
  assert abs(float(noise.std()) - 1) < 4.5 / (2 * noise.size) ** 0.5
  jax.tree.map(np.testing.assert_array_equal, told(0.0, False)[0], clean)
  cond, aux = told(0.5, True)
  dropped = aux["dropped"] == 1
  assert 0 < dropped.sum() < 24
  np.testing.assert_array_equal(np.isnan(cond["level"]), dropped)
  np.testing.assert_array_equal(np.all(cond["small"] == 0, axis=(1, 2, 3)), dropped)


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
    keys = jd.example_keys(jax.random.fold_in(jax.random.key(0), i), 0, batch_size)
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


def test_dropping_needs_conditions(config):
  with pytest.raises(ConfigError, match="config.train.drop_conditions needs config.network.conditions; there are none"):
    systems.check(with_conditions(config))


@pytest.mark.standard_promotion
def test_the_likelihood_is_that_of_the_example_s_own_condition(config):
  source, rng = images(), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes)
  batch = source.gather([0, 1, 2, 3])

  @jax.jit
  def run(params, batch):
    key = jd.example_keys(jax.random.key(0), 0, 4)
    value = objectives.make_log_likelihood(config, params, source)(params, key, batch)["value"]
    return value, objectives.make_bound(config, params, source, 2)(params, key, batch)["bound"]

  others = batch | {"label": np.array([0, 1, 2, 1], batch["label"].dtype)}
  for own, other in zip(run(params, batch), run(params, others), strict=True):
    np.testing.assert_array_equal(own[:3], other[:3])
    assert own[3] != other[3]


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
