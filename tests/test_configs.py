"""The configs whose data lie on disk: as they are on paper, and small ones trained through the command line."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import arguments, cli, factory, systems
from jaxdiff.data import prepared
from jaxdiff.data.manifest import Manifest
from jaxdiff.models import conditioning
from jaxdiff.training.metrics import read_metrics

pytestmark = pytest.mark.standard_promotion
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHAPES = {
  "fashion_mnist_vp": (28, 28, 1),
  "fashion_mnist_labels": (28, 28, 1),
  "emoji64": (64, 64, 3),
  "emoji64_text": (32, 32, 3),
  "emoji32_colorization": (32, 32, 3),
  "emoji32_superresolution": (32, 32, 3),
  "cifar10_vp": (32, 32, 3),
  "imagenet64": (64, 64, 3),
}
MILLIONS = {"fashion_mnist_vp": 6.5, "emoji64": 48.2, "cifar10_vp": 35.7, "imagenet64": 295.1}
MILLIONS |= {
  "emoji64_text": 1.52,
  "emoji32_colorization": 0.61,
  "emoji32_superresolution": 0.61,
  "fashion_mnist_labels": 0.66,
}
SMALL = (
  "--config.network.channels=8",
  "--config.network.channel_multipliers=(1,1)",
  "--config.network.groups=4",
  "--config.network.blocks=1",
  "--config.network.attention_levels=()",
  "--config.train.batch_size=8",
  "--config.train.steps=3",
  "--config.train.log_every=1",
  "--config.optimizer.warmup_steps=1",
)

LEAST = ("--config.network.channel_multipliers=(1,)", "--config.network.middle_attention=False")


def train(name, workdir, *argv):
  cli.main(["train", f"--config={CONFIGS / name}.py", f"--workdir={workdir}", *SMALL, *argv])
  return [record["loss"] for record in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("name", SHAPES)
def test_configs_build_without_their_data(name):
  """Nothing is computed and nothing allocated: 295 million parameters are shapes alone."""
  config = arguments.load(CONFIGS / f"{name}.py")
  systems.check(config)
  network = factory.make_network(config)

  def start(key, x, t):
    cond = conditioning.nothing(network.conditions, x)
    return network.init_with_output(key, x, t, **cond)

  x, t = jax.ShapeDtypeStruct((2, *SHAPES[name]), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
  output, params = jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(0)), x, t)
  assert (output.shape, output.dtype) == (x.shape, jnp.float32)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
  assert count == pytest.approx(MILLIONS[name], abs=0.05)
  text = (CONFIGS / f"{name}.py").read_text()
  assert f"jaxdiff train --config=configs/{name}.py" in text
  assert "jaxdiff data " in text or "download_and_prepare()" in text
  assert "measured" in ast.get_docstring(ast.parse(text))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_vp", "imagenet64"])
def test_tfds_configs_train(name, tmp_path):
  import tensorflow_datasets as tfds

  flags = [*LEAST, *(["--config.network.head_channels=4"] if name == "imagenet64" else [])]
  with tfds.testing.mock_data(num_examples=16):
    losses = train(name, tmp_path, f"--config.data.data_dir={tmp_path / 'tfds'}", *flags)
  assert len(losses) == 3
  assert np.isfinite(losses).all()


def test_a_tfds_config_without_data_names_the_command(tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    train("cifar10_vp", tmp_path / "run", f"--config.data.data_dir={tmp_path}")
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert "jaxdiff: config.data: name: 'cifar10' is not prepared in" in error
  assert f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()" in error
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_array_record_trains_and_refuses_what_has_changed(tmp_path, capsys):
  """Three steps, and none when a byte on disk is another."""
  folder = tmp_path / "clothes"
  about = Manifest("clothes", (28, 28, 1), "uint8", 256, True, None, {}, "jaxdiff data clothes --output=DIR")
  x = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)
  prepared.write(folder, about, {s: prepared.Part(20, zip(x, range(20), strict=True)) for s in ("train", "test")})
  argv = (f"--config.data.path={folder}", *LEAST)
  assert np.isfinite(train("fashion_mnist_vp", tmp_path / "run", *argv)).all()
  path = folder / "train-00000-of-00001.array_record"
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  capsys.readouterr()
  for spoiled, message in ((None, f"{path} is corrupted"), (folder / "manifest.json", "holds no manifest.json")):
    if spoiled:
      spoiled.unlink()
    with pytest.raises(SystemExit) as stop:
      train("fashion_mnist_vp", tmp_path / "run", *argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
