"""Checkpoints of the JAX code of score-SDE: names, msgpack, and the score against a network written for this test."""

import json
import math

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
import scipy.special

from jaxdiff import cli, predictions, sde, weights
from jaxdiff.models import presets
from jaxdiff.weights import score_sde

CHANNELS = 128  # the fewest that published networks have


class Tape:
  """A network in the names and the order of calls of the published code; it draws the parameters that it asks for."""

  def __init__(self, seed=0):
    self.rng, self.params, self.numbers = np.random.default_rng(seed), {}, {}

  def name(self, kind, within=""):
    count = self.numbers.setdefault((within, kind), 0)
    self.numbers[within, kind] = count + 1
    return f"{within}{kind}_{count}"

  def param(self, name, *shape):
    if name not in self.params:
      scale = 1 / math.sqrt(max(1, math.prod(shape[:-1])))
      self.params[name] = (scale * self.rng.standard_normal(shape)).astype(np.float32)
    return self.params[name]

  def conv(self, x, outputs, size=3, within=""):
    name = self.name("Conv", within)
    kernel = self.param(f"{name}/kernel", size, size, x.shape[-1], outputs)
    return convolved(x, kernel, 1, size // 2) + self.param(f"{name}/bias", outputs)[None, None, None]

  def dense(self, x, outputs, within=""):
    name = self.name("Dense", within)
    return x @ self.param(f"{name}/kernel", x.shape[-1], outputs) + self.param(f"{name}/bias", outputs)[None]

  def norm(self, x, within=""):
    name = self.name("GroupNorm", within)
    b, h, w, c = x.shape
    groups = x.reshape(b, h, w, min(c // 4, 32), -1)
    centred = groups - groups.mean(axis=(1, 2, 4), keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-6)
    scale, bias = (self.param(f"{name}/{part}", c)[None, None, None] for part in ("scale", "bias"))
    return y.reshape(x.shape) * scale + bias


def convolved(x, kernel, stride, pad):
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
  return np.einsum("bhwcuv,uvco->bhwo", windows, kernel, optimize=True)


def matrices(size, fir):
  """From a line of pixels to one of half, and of twice the size."""
  down, up = np.zeros((size // 2, size)), np.zeros((2 * size, size))
  taps = {-1: 1, 0: 3, 1: 3, 2: 1} if fir else {0: 4, 1: 4}
  for i in range(size // 2):
    for offset, tap in taps.items():
      if 0 <= 2 * i + offset < size:
        down[i, 2 * i + offset] = tap / 8
  for i in range(2 * size):
    neighbour = i // 2 + (1 if i % 2 else -1)
    up[i, i // 2] = 0.75 if fir else 1.0
    if fir and 0 <= neighbour < size:
      up[i, neighbour] = 0.25
  return down, up


def resampled(x, way, fir):
  for axis in (1, 2):
    matrix = matrices(x.shape[axis], fir)[0 if way == "down" else 1]
    x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
  return x


def silu(x):
  return x / (1 + np.exp(-x))


def block(tape, x, embedding, outputs, fir, way=None):
  within = tape.name("ResnetBlockBigGANpp") + "/"
  h = silu(tape.norm(x, within))
  projected = way is not None or x.shape[-1] != outputs
  if way is not None:
    h, x = resampled(h, way, fir), resampled(x, way, fir)
  h = tape.conv(h, outputs, within=within) + tape.dense(silu(embedding), outputs, within)[:, None, None]
  h = tape.conv(silu(tape.norm(h, within)), outputs, within=within)
  x = tape.conv(x, outputs, 1, within) if projected else x
  return (x + h) / math.sqrt(2)


def attention(tape, x):
  within, (b, h, w, c) = tape.name("AttnBlockpp") + "/", x.shape

  def nin(y):
    name = tape.name("NIN", within)
    return y @ tape.param(f"{name}/W", c, c) + tape.param(f"{name}/b", c)[None, None]

  y = tape.norm(x, within).reshape(b, h * w, c)
  query, key, value = nin(y), nin(y), nin(y)
  weight = scipy.special.softmax(np.einsum("bnc,bmc->bnm", query, key) / math.sqrt(c), axis=-1)
  return (x + nin(np.einsum("bnm,bmc->bnc", weight, value)).reshape(x.shape)) / math.sqrt(2)


def carried(tape, x, outputs):
  """The input, filtered and convolved with stride 2."""
  name = tape.name("Downsample") + "/Conv2d_0"
  kernel, bias = tape.param(f"{name}/weight", 3, 3, x.shape[-1], outputs), tape.param(f"{name}/bias", outputs)
  line = np.array([1, 3, 3, 1]) / 8
  fir = np.einsum("i,j,ab->ijab", line, line, np.eye(x.shape[-1]))
  return convolved(convolved(x, fir, 1, 2), kernel, 2, 0) + bias[None, None, None]


def published(tape, x, label, multipliers, blocks, attended, ve):
  """NCSN++ (ve: data x in [0, 1], label sigma; returns the score) or DDPM++ (label 999 t; returns the noise)."""
  features = [CHANNELS * multiplier for multiplier in multipliers]
  if ve:
    phase = 2 * math.pi * np.log(label)[:, None] * tape.param("GaussianFourierProjection_0/W", CHANNELS)[None]
  else:
    phase = label[:, None] * np.exp(-math.log(10000) / (CHANNELS // 2 - 1) * np.arange(0.0, CHANNELS // 2))[None]
  embedding = tape.dense(np.concatenate([np.sin(phase), np.cos(phase)], axis=-1), 4 * CHANNELS)
  embedding = tape.dense(silu(embedding), 4 * CHANNELS)
  x = carry = 2 * x - 1 if ve else x
  hs = [tape.conv(x, features[0])]
  for level, outputs in enumerate(features):
    for _ in range(blocks):
      h = block(tape, hs[-1], embedding, outputs, ve)
      hs.append(attention(tape, h) if level in attended else h)
    if level < len(features) - 1:
      h = block(tape, hs[-1], embedding, outputs, ve, "down")
      if ve:
        carry = h = (carried(tape, carry, outputs) + h) / math.sqrt(2)
      hs.append(h)
  h = block(tape, hs[-1], embedding, features[-1], ve)
  h = block(tape, attention(tape, h), embedding, features[-1], ve)
  for level, outputs in reversed(list(enumerate(features))):
    for _ in range(blocks + 1):
      h = block(tape, np.concatenate([h, hs.pop()], axis=-1), embedding, outputs, ve)
    h = attention(tape, h) if level in attended else h
    h = block(tape, h, embedding, outputs, ve, "up") if level else h
  h = tape.conv(silu(tape.norm(h)), x.shape[-1])
  return h / label[:, None, None, None] if ve else h


def checkpoint(path, params):
  """What the old code saved: a train state of which params_ema is one entry."""
  tree = flax.traverse_util.unflatten_dict(params, sep="/")
  state = {
    "step": 3,
    "optimizer": {"target": jax.tree.map(np.zeros_like, tree), "state": {"step": 3}},
    "lr": 2e-4,
    "model_state": {},
    "ema_rate": 0.999,
    "params_ema": tree,
    "rng": np.zeros(2, np.uint32),
  }
  path.write_bytes(flax.serialization.msgpack_serialize(state))
  return path


@pytest.fixture(scope="module", params=["ve", "vp"])
def case(request, tmp_path_factory):
  """A small network of each kind: its function, its checkpoint, the fields of ours."""
  tape, ve = Tape(), request.param == "ve"
  sizes = {"multipliers": (1, 2), "blocks": 1, "attended": (1,), "ve": ve}
  call = lambda x, label: published(tape, x, label, **sizes)
  call(np.zeros((1, 4, 4, 3)), np.ones(1))
  path = checkpoint(tmp_path_factory.mktemp("score_sde") / "checkpoint_26", tape.params)

  def with_names_anew(x, label):
    tape.numbers = {}
    return call(x, label)

  full = presets.ncsnpp_cifar10() if ve else presets.ddpmpp_cifar10()
  return with_names_anew, path, full.clone(channel_multipliers=(1, 2), attention_levels=(1,)), ve


def test_the_score_is_that_of_the_published_network(case):
  call, path, network, ve = case
  tensors = score_sde.read(path)
  fields = score_sde.fields_of(network, tensors, "file")
  assert fields["blocks"] == 1
  ours, params = score_sde.convert(fields, tensors, "file")
  made = score_sde.PRESETS["ncsnpp_cifar10_ve" if ve else "ddpmpp_cifar10_vp"]
  process = sde.VE(0.02, 100.0) if ve else sde.VP()
  read = predictions.noise(log_snr_time=True) if ve else predictions.noise()
  assert made.sde["type"] == ("VE" if ve else "VP")
  y, t = (
    np.random.default_rng(1).standard_normal((3, 4, 4, 3)).astype(np.float32),
    np.array([0.01, 0.4, 0.9], np.float32),
  )
  run = lambda params: (predictions.score_fn(ours.apply, params, process, read)(y, t), process.marginal(t)[1])
  score, sigma = jax.device_get(jax.jit(run)(params))
  # For VE of x = (y + 1) / 2, which has half the noise and twice the score.
  due = 0.5 * call((y + 1) / 2, sigma / 2) if ve else -call(y, 999 * t) / sigma[:, None, None, None]
  relative = np.abs(score - due) * sigma[:, None, None, None]
  assert np.max(np.abs(due) * sigma[:, None, None, None]) > 0.1
  assert np.max(relative) < 1e-4


def test_what_is_missing_or_superfluous_is_listed(case):
  _, path, network, _ = case
  tensors = score_sde.read(path)
  fields = score_sde.fields_of(network, tensors, "file")
  del tensors["AttnBlockpp_0/NIN_1/W"]
  tensors["Combine_0/Conv_0/kernel"] = np.zeros((1, 1, 3, 128), np.float32)
  tensors["ResnetBlockBigGANpp_0/Dense_0/bias"] = np.zeros(5, np.float32)
  with pytest.raises(weights.WeightsError) as info:
    score_sde.convert(fields, tensors, "file")
  for line in ("missing: AttnBlockpp_0/NIN_1/W", "not used: Combine_0", "ResnetBlockBigGANpp_0/Dense_0/bias [5]"):
    assert line in str(info.value)
  with pytest.raises(weights.WeightsError, match="residual blocks"):
    score_sde.fields_of(network, {f"ResnetBlockBigGANpp_{k}/x": np.zeros(1) for k in range(9)}, "file")


@pytest.mark.parametrize(
  ("content", "text"),
  [
    (b"\x80\x04\x95abc", "is a pickle"),
    (b"", "damaged"),
    (b"\xde\xff", "damaged"),
    (flax.serialization.msgpack_serialize({"params": {}}), "holds no params_ema.*it holds params"),
    (flax.serialization.msgpack_serialize([1]), "it holds list"),
  ],
)
def test_other_files_are_refused(content, text, tmp_path):
  (tmp_path / "checkpoint_1").write_bytes(content)
  with pytest.raises(weights.WeightsError, match=text):
    score_sde.load(tmp_path / "checkpoint_1", "ncsnpp_cifar10_ve")


def test_presets_and_paths_that_do_not_exist_are_refused(case, tmp_path):
  _, path, _, _ = case
  with pytest.raises(weights.WeightsError, match="preset='ncsnpp' is not known: take ncsnpp_cifar10_ve"):
    score_sde.load(path, "ncsnpp")
  with pytest.raises(weights.WeightsError, match="is not a file"):
    score_sde.load(tmp_path, "ncsnpp_cifar10_ve")
  with pytest.raises(weights.WeightsError, match="needs --preset"):
    weights.load(path)


def test_presets_are_of_the_processes_that_they_name():
  assert {name: made.sde["type"] for name, made in score_sde.PRESETS.items()} == {
    "ncsnpp_cifar10_ve": "VE",
    "ddpmpp_cifar10_vp": "VP",
    "ddpmpp_cifar10_subvp": "SubVP",
  }


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_checkpoint_is_imported(tmp_path):
  tape = Tape()
  published(tape, np.zeros((1, 8, 8, 3)), np.ones(1), (1, 2, 2, 2), 1, (1,), ve=True)
  path, workdir = checkpoint(tmp_path / "checkpoint_26", tape.params), tmp_path / "run"
  cli.main(["import", str(path), "--preset=ncsnpp_cifar10_ve", f"--workdir={workdir}"])
  config = json.loads((workdir / "config.json").read_text())
  assert config["network"]["blocks"] == 1
  assert config["sde"]["type"] == "VE"
