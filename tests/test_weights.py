"""Weights in files: safetensors, what is refused, published names, import and export. No test here needs torch."""

import io
import json
import pickle
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import networks
import numpy as np
import pytest

from jaxdiff import cli, weights
from jaxdiff.models import AutoencoderKL, UNet
from jaxdiff.weights import files, unet2d

CONFIG = {
  "_class_name": "UNet2DModel",
  "_diffusers_version": "0.0.4",
  "sample_size": 4,
  "block_out_channels": [4, 8],
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
  "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
  "attention_head_dim": None,
  "norm_eps": 1e-6,
}


def published_tensors(seed=0):
  """Random weights under the names that the first published files have, written down from those of diffusers."""
  rng, tensors = np.random.default_rng(seed), {}

  def add(name, *shape):
    tensors[name] = rng.standard_normal(shape).astype(np.float32) / np.sqrt(max(1, np.prod(shape[1:])))

  def layer(name, *shape):
    add(f"{name}.weight", *shape)
    add(f"{name}.bias", shape[0])

  def residual(name, inputs, outputs):
    layer(f"{name}.norm1", inputs)
    layer(f"{name}.conv1", outputs, inputs, 3, 3)
    layer(f"{name}.time_emb_proj", outputs, 16)
    layer(f"{name}.norm2", outputs)
    layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
      layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

  def attention(name, channels):
    layer(f"{name}.group_norm", channels)
    for part in ("query", "key", "value", "proj_attn"):
      layer(f"{name}.{part}", channels, channels)

  layer("conv_in", 4, 3, 3, 3)
  layer("time_embedding.linear_1", 16, 4)
  layer("time_embedding.linear_2", 16, 16)
  residual("down_blocks.0.resnets.0", 4, 4)
  layer("down_blocks.0.downsamplers.0.conv", 4, 4, 3, 3)
  residual("down_blocks.1.resnets.0", 4, 8)
  attention("down_blocks.1.attentions.0", 8)
  residual("mid_block.resnets.0", 8, 8)
  attention("mid_block.attentions.0", 8)
  residual("mid_block.resnets.1", 8, 8)
  residual("up_blocks.0.resnets.0", 16, 8)
  residual("up_blocks.0.resnets.1", 12, 8)
  attention("up_blocks.0.attentions.0", 8)
  attention("up_blocks.0.attentions.1", 8)
  layer("up_blocks.0.upsamplers.0.conv", 8, 8, 3, 3)
  residual("up_blocks.1.resnets.0", 12, 4)
  residual("up_blocks.1.resnets.1", 8, 4)
  layer("conv_norm_out", 4)
  layer("conv_out", 3, 4, 3, 3)
  return tensors


def write(folder, config=CONFIG, tensors=None):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  files.write(folder / files.NAME, published_tensors() if tensors is None else tensors)
  return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return write(tmp_path_factory.mktemp("published"))


def test_tensors_return_bit_by_bit(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {
    "wide": rng.standard_normal((3, 5)),
    "strided": rng.standard_normal((4, 6)).astype(np.float32).T,
    "scalar": np.float32(2.5),
    "whole": np.arange(4, dtype=np.int32),
    "half": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
    "nan": np.array([np.nan, -0.0, np.inf], np.float32),
  }
  files.write(tmp_path / "x.safetensors", tensors)
  read = files.read(tmp_path / "x.safetensors", half=True)
  assert read.keys() == tensors.keys()
  for name, value in tensors.items():
    assert read[name].dtype == np.asarray(value).dtype
    assert read[name].shape == np.shape(value)
    assert read[name].tobytes() == np.asarray(value, order="C").tobytes()
  assert files.read(tmp_path / "x.safetensors")["half"].dtype == np.float32


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path):
  files.write(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
  files.write(tmp_path / "b.safetensors", {"y": np.zeros(3, np.float32)})
  index = tmp_path / "m.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
  assert {name: value.shape for name, value in files.read(index).items()} == {"x": (2,), "y": (3,)}
  index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
  with pytest.raises(weights.WeightsError, match="lack z"):
    files.read(index)
  for name in ("c.safetensors", "../a.safetensors"):
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(weights.WeightsError, match=f"names the shard {name!r}"):
      files.read(index)


class Trap:
  """Its pickle writes a file when it is read."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "model.safetensors", "zip.safetensors"])
def test_pickles_are_refused_and_not_run(name, tmp_path):
  content = io.BytesIO()
  pickle.dump(Trap(tmp_path / "ran"), content)
  (tmp_path / name).write_bytes(b"PK\x03\x04 and more" if "zip" in name else content.getvalue())
  for read in (files.read, weights.load):
    with pytest.raises(weights.WeightsError, match=r"is a pickle.*convert it"):
      read(tmp_path / name)
  assert not (tmp_path / "ran").exists()


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
  with pytest.raises(weights.WeightsError, match="is a pickle"):
    weights.load(tmp_path)


def test_a_length_that_looks_like_a_pickle_is_none(tmp_path):
  header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x0280)
  path = tmp_path / "x.safetensors"
  path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2.0))
  assert path.read_bytes().startswith(b"\x80\x02")
  assert files.read(path)["x"] == 2.0


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_files_are_refused(keep, published, tmp_path):
  content = (published / files.NAME).read_bytes()
  (tmp_path / files.NAME).write_bytes(content[:keep])
  with pytest.raises(weights.WeightsError, match="damaged or cut off"):
    files.read(tmp_path / files.NAME)


def test_missing_superfluous_and_misshapen_tensors_are_all_listed(tmp_path):
  tensors = published_tensors()
  del tensors["conv_in.weight"], tensors["mid_block.attentions.0.key.bias"]
  tensors["extra.weight"] = np.zeros((2, 3), np.float32)
  tensors["conv_out.weight"] = np.zeros((3, 5, 3, 3), np.float32)
  tensors["conv_norm_out.bias"] = np.zeros(7, np.float32)
  write(tmp_path / "model", tensors=tensors)
  with pytest.raises(weights.WeightsError) as info:
    weights.load(tmp_path / "model")
  for line in (
    "missing: conv_in.weight",
    "missing: mid_block.attentions.0.to_k.bias",
    "not used: extra.weight, shape [2, 3]",
    "wrong shape: conv_out.weight [3, 5, 3, 3], which gives [3, 3, 5, 3]; the network has output/kernel [3, 3, 4, 3]",
    "wrong shape: conv_norm_out.bias [7]",
    "nothing was written",
  ):
    assert line in str(info.value)
  with pytest.raises(SystemExit) as info:
    cli.main(["import", str(tmp_path / "model"), f"--workdir={tmp_path / 'run'}"])
  assert info.value.code == 2
  assert not (tmp_path / "run").exists()


REFUSED = {
  "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
  "up_block_types": ["UpBlock2D", "UpBlock2D"],
  "block_out_channels": [4, 6],
  "act_fn": "gelu",
  "center_input_sample": True,
  "time_embedding_type": "fourier",
  "resnet_time_scale_shift": "spatial",
  "mid_block_scale_factor": 2,
  "num_class_embeds": 10,
  "out_channels": 4,
  "time_embedding_dim": 7,
  "attn_norm_num_groups": 4,
  "downsample_padding": 2,
  "sample_size": None,
  "invented": 3,
}


@pytest.mark.parametrize("key", REFUSED)
def test_configurations_without_a_network_are_refused_by_name_and_value(key, tmp_path):
  write(tmp_path, CONFIG | {key: REFUSED[key]}, tensors={})
  value = tuple(REFUSED[key]) if isinstance(REFUSED[key], list) else REFUSED[key]
  with pytest.raises(weights.WeightsError) as info:
    weights.load(tmp_path)
  assert f"{key} = {value!r}" in str(info.value)


@pytest.mark.parametrize("config", [{"_class_name": "UNet2DConditionModel"}, {}, {"_class_name": None}])
def test_other_networks_are_refused(config, tmp_path):
  write(tmp_path, config, tensors={})
  with pytest.raises(weights.WeightsError, match="what can be read is UNet2DModel, DiT"):
    weights.load(tmp_path)


@pytest.mark.parametrize(
  ("scheduler", "text"),
  [
    ({"beta_schedule": "scaled_linear"}, "beta_schedule = 'scaled_linear'"),
    ({"prediction_type": "flow"}, "prediction_type = 'flow'"),
    ({"beta_end": 0.012}, "beta_end = 0.012; must be 0.02"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
  ],
)
def test_chains_that_there_are_none_for_are_refused(scheduler, text, tmp_path):
  write(tmp_path)
  (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
  with pytest.raises(weights.WeightsError, match=text):
    weights.load(tmp_path)


def test_the_scheduler_of_a_pipeline_is_read(tmp_path):
  write(tmp_path / "unet")
  (tmp_path / "scheduler").mkdir()
  scheduler = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
  (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
  for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / files.NAME):
    assert weights.load(path).chain == weights.Chain(500, "cosine", "data")


def test_sinusoids_of_the_step_before():
  """W [sin w n, cos w n] + b of the published layer is what ours makes of the time (n + 1) / T."""
  tensors, frequencies, n = published_tensors(), unet2d.wave_numbers(4, 1), np.arange(0.0, 1000.0, 7.3)
  layer = unet2d.parameters(unet2d.fields(CONFIG, 1000, "config")[0], CONFIG)["TimeEmbedding_0/Dense_0/kernel"]
  kernel = layer.make(tensors["time_embedding.linear_1.weight"]).astype(np.float64)
  waves = lambda n, *order: np.concatenate([wave(n[:, None] * frequencies) for wave in order], axis=1)
  due = waves(n, np.sin, np.cos) @ tensors["time_embedding.linear_1.weight"].T
  np.testing.assert_allclose(waves(n + 1, np.cos, np.sin) @ kernel, due, atol=1e-6)


@pytest.mark.standard_promotion
def test_saved_parameters_return_bit_by_bit(tmp_path):
  net = AutoencoderKL(channels=4, channel_multipliers=(1,), blocks=1, groups=2, param_dtype=jnp.bfloat16)
  x = jnp.zeros((1, 4, 4, 3))
  rng, shapes = np.random.default_rng(0), jax.eval_shape(net.init, jax.random.key(0), x)
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
  weights.save(tmp_path / "ours", params, {"network": {"channels": 4}})
  restored = weights.restore(tmp_path / "ours", shapes)
  assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {"network": {"channels": 4}}
  assert jax.tree.structure(restored) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
    assert a.dtype == b.dtype
    assert a.tobytes() == np.asarray(b).tobytes()
  other = jax.eval_shape(net.clone(channels=8).init, jax.random.key(0), x)
  with pytest.raises(weights.WeightsError, match=r"params.encoder.input.bias \[4\]; the network has \[8\]"):
    weights.restore(tmp_path / "ours", other)
  with pytest.raises(TypeError, match="pass nested dicts of arrays"):
    weights.save(tmp_path, {"a": [jnp.zeros(2)]}, {})
  with pytest.raises(ValueError, match="no name may have a '.'"):
    weights.save(tmp_path, {"a.b": jnp.zeros(2)}, {})


def test_the_autoencoder_scales_its_latents():
  net = AutoencoderKL(channels=4, channel_multipliers=(1, 2), blocks=1, groups=2)
  halved, x = net.clone(scaling=0.5), np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
  params = networks.filled(jax.eval_shape(net.init, jax.random.key(0), x))

  @jax.jit
  def every(params, x):
    mean, log_variance = net.apply(params, x, method="encode")
    scaled, scaled_log_variance = halved.apply(params, x, method="encode")
    decoded = net.apply(params, mean, method="decode"), halved.apply(params, scaled, method="decode")
    return mean, log_variance, scaled, scaled_log_variance, *decoded, net.apply(params, x)

  mean, log_variance, scaled, scaled_log_variance, decoded, of_scaled, whole = jax.device_get(every(params, x))
  assert mean.shape == (2, 2, 3, 4)
  np.testing.assert_allclose(scaled, 0.5 * mean, rtol=1e-6)
  np.testing.assert_allclose(scaled_log_variance, log_variance + 2 * np.log(0.5), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(of_scaled, decoded, atol=1e-5 * np.abs(decoded).max())
  np.testing.assert_allclose(whole, decoded, atol=1e-5 * np.abs(decoded).max())
  for wrong, text in ((x[..., :2], r"pass images \[b, h, w, 3\]"), (x[:, :3], "height of x=3 is not divisible by")):
    with pytest.raises(ValueError, match=text):
      jax.eval_shape(lambda x: net.apply(params, x, method="encode"), wrong)
  with pytest.raises(ValueError, match="scaling=0.0: must be positive"):
    jax.eval_shape(lambda x: net.clone(scaling=0.0).apply(params, x), x)


def run(*argv):
  cli.main([str(argument) for argument in argv])


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "imported"
  with jax.numpy_dtype_promotion("standard"):
    run("import", published, f"--workdir={workdir}")
  return workdir


def test_an_imported_model_says_what_it_is(imported):
  config = json.loads((imported / "config.json").read_text())
  assert config["sde"] == {"type": "DDPM", "steps": 1000, "schedule": "linear"}
  assert config["prediction"] == {"type": "noise"}
  assert config["data"] == {"type": "absent", "shape": [4, 4, 3], "levels": 256}
  assert config["network"]["channel_multipliers"] == [1, 2]


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_an_imported_model_is_sampled(imported):
  few = ["--steps=2", "--num=8", "--config.sample.batch_size=8"]
  run("sample", f"--workdir={imported}", "--sampler=dpm_solver_pp", *few)
  x = np.load(imported / "samples.npz")["x"]
  assert x.shape == (8, 4, 4, 3)
  assert np.isfinite(x).all()


@pytest.mark.standard_promotion
def test_an_imported_model_is_exported_and_imported_again(imported, published, tmp_path):
  run("export", tmp_path / "exported", f"--workdir={imported}")
  expected = weights.load(published)
  restored = weights.restore(tmp_path / "exported", expected.params)
  jax.tree.map(np.testing.assert_array_equal, restored, expected.params)
  run("import", tmp_path / "exported", f"--workdir={tmp_path / 'again'}")
  again, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", imported))
  assert again == first


@pytest.mark.standard_promotion
@pytest.mark.parametrize("command", ["likelihood", "evaluate", "train"])
def test_without_data_there_is_nothing_to_evaluate(command, imported, capsys):
  with pytest.raises(SystemExit) as info:
    run(command, f"--workdir={imported}")
  assert info.value.code == 2
  assert "imported without data: name them, --config.data.type=tfds" in capsys.readouterr().err


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_the_likelihood_of_named_data(imported, published, tmp_path):
  """Named now; or at import, which writes them down."""
  x = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3)).astype(np.uint8)
  np.savez(tmp_path / "x.npz", x=x)
  data = ["--config.data.type=npz", f"--config.data.path={tmp_path / 'x.npz'}", "--config.data.levels=256"]
  run("import", published, f"--workdir={tmp_path / 'run'}", *data)
  written = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
  assert (written["type"], written["path"], written["levels"]) == ("npz", str(tmp_path / "x.npz"), 256)
  workdir = imported
  short = ["--limit=2", "--batch_size=8", "--rtol=1e-2", "--atol=1e-2", "--config.likelihood.bound_draws=1"]
  run("likelihood", f"--workdir={workdir}", *data, *short, "--limit=8")
  report = json.loads((workdir / "likelihood.json").read_text())
  assert report["unit"] == "bits/dim"
  assert report["results"]["model"]["mean"] > 0


@pytest.mark.standard_promotion
def test_import_refuses_a_directory_in_use_and_data_of_another_shape(imported, published, tmp_path, capsys):
  np.savez(tmp_path / "x.npz", x=np.zeros((40, 8, 8, 3), np.uint8))
  other = ["--config.data.type=npz", f"--config.data.path={tmp_path / 'x.npz'}", "--config.data.levels=256"]
  for argv, text in (
    ((published, f"--workdir={imported}"), "holds a run already"),
    ((published, f"--workdir={tmp_path / 'run'}", *other), "the model is for (4, 4, 3)"),
    ((published, f"--workdir={tmp_path / 'run'}", "--config.network.channels=8"), "is not that of the weights"),
    ((f"--workdir={tmp_path / 'run'}",), "usage: jaxdiff import PATH --workdir=DIR"),
    ((published,), "usage: jaxdiff import PATH --workdir=DIR"),
    ((tmp_path / "nowhere", f"--workdir={tmp_path / 'run'}"), "does not exist"),
  ):
    with pytest.raises(SystemExit) as info:
      run("import", *argv)
    assert info.value.code == 2
    assert text in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_unet_fields_of_the_published_cifar10_model():
  config = CONFIG | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
  }
  fields, shape = unet2d.fields(config, 1000, "config")
  shapes = jax.eval_shape(UNet(**fields).init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones(1))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307
  names = {name for made in unet2d.parameters(fields, config).values() for name in made.names}
  residuals, projected, attentions, resampled = 8 + 2 + 12, 1 + 12, 2 + 1 + 3, 3 + 3
  assert len(names) == 2 * (5 + 5 * residuals + projected + 5 * attentions + resampled)
