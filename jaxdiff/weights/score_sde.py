"""Checkpoints of the published JAX code of score-based models through SDEs (Song et al. 2021), as our `UNet`.

They are flax-msgpack of a train state, in which `params_ema` holds the average by the names that old Flax gave: of each
class in the order of the calls. No class of that code, and no old Flax, is needed to read them, and nothing is
unpickled. A file does not say which network and process it is of; a preset does:

| preset | network | process | images |
|---|---|---|---|
| `ncsnpp_cifar10_ve` | NCSN++ cont. | VE | 32x32x3 |
| `ddpmpp_cifar10_vp` | DDPM++ cont. | VP | 32x32x3 |
| `ddpmpp_cifar10_subvp` | DDPM++ cont. | sub-VP | 32x32x3 |

The number of blocks is read from the file, so the deep networks are included. Two things are turned so that the network
here is what all of jaxdiff expects, data in [-1, 1] and the noise as output:

- VE was trained on data x in [0, 1], of which the network sees y = 2 x - 1: here y is the state, with twice the noise,
  sigma from 0.02 to 100. Its time is log(sigma / 2), which waves of log(sigma) / 4 at four times the frequencies give
  up to a phase, and the layer after them takes up that.
- Its output is sigma times the score, which is minus the noise: the last layer has the other sign.

References:
  Song et al. 2021, Score-Based Generative Modeling through Stochastic Differential Equations, Appendices C and H.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models import UNet, presets
from jaxdiff.weights import files, names
from jaxdiff.weights.files import Tensors, WeightsError
from jaxdiff.weights.names import Made, Map, same

_BLOCK, _ATTENTION = "ResnetBlockBigGANpp", "AttnBlockpp"
_SMALLEST = 128  # channels from which on all norms have 32 groups
_SHAPE = (32, 32, 3)


class Preset(NamedTuple):
  """What a checkpoint is of.

  Attributes:
    network: the preset whose fields the network has.
    sde: the section of a config.
    prediction: the section of a config.
  """

  network: UNet
  sde: dict[str, Any]
  prediction: dict[str, Any]


class ScoreSDE(NamedTuple):
  """A published network as one of ours.

  Attributes:
    fields: of the `UNet`.
    network: the module.
    params: its parameters, `{"params": {...}}`.
    shape: of the images.
    sde: section of a config: the process that it was trained on.
    prediction: section of a config: what it outputs, and of which time.
  """

  fields: dict[str, Any]
  network: nn.Module
  params: dict[str, Any]
  shape: tuple[int, ...]
  sde: dict[str, Any]
  prediction: dict[str, Any]


_VP, _NOISE = {"beta_min": 0.1, "beta_max": 20.0}, {"type": "noise"}
PRESETS: Mapping[str, Preset] = {
  "ncsnpp_cifar10_ve": Preset(
    presets.ncsnpp_cifar10(),
    {"type": "VE", "sigma_min": 0.02, "sigma_max": 100.0},
    {"type": "noise", "log_snr_time": True},
  ),
  "ddpmpp_cifar10_vp": Preset(presets.ddpmpp_cifar10(), {"type": "VP", **_VP}, _NOISE),
  "ddpmpp_cifar10_subvp": Preset(presets.ddpmpp_cifar10(), {"type": "SubVP", **_VP}, _NOISE),
}


def load(path: str | Path, preset: str) -> ScoreSDE:
  """The averaged network of a checkpoint.

  Args:
    path: the file, such as checkpoint_26.
    preset: what it is of.

  Raises:
    WeightsError: an unknown preset, a file that cannot be read, or parameters that do not fit, all of which are listed.

  Example:
    >>> load("checkpoint_26", "ncsnpp_cifar10_ve").shape  # doctest: +SKIP
    (32, 32, 3)
  """
  if preset not in PRESETS:
    raise WeightsError(f"preset={preset!r} is not known: take {', '.join(PRESETS)}")
  made, tensors = PRESETS[preset], read(path)
  fields = fields_of(made.network, tensors, str(path))
  network, params = convert(fields, tensors, str(path))
  return ScoreSDE(fields, network, params, _SHAPE, made.sde, made.prediction)


def read(path: str | Path) -> Tensors:
  """The averaged parameters of a checkpoint by name, such as "Conv_0/kernel".

  Raises:
    WeightsError: there is no such file, it is a pickle, damaged, or lacks `params_ema`.
  """
  path = Path(path)
  if not path.is_file():
    raise WeightsError(f"{path} is not a file: give a checkpoint, such as checkpoint_26")
  files.refuse_pickle(path)
  try:
    state = flax.serialization.msgpack_restore(path.read_bytes())
  except Exception as error:
    raise WeightsError(f"{path} cannot be read as flax-msgpack ({error}): it is damaged or another file") from error
  if not isinstance(state, dict) or not isinstance(state.get("params_ema"), dict):
    there = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
    raise WeightsError(f"{path} holds no params_ema, the averaged parameters of score-SDE; it holds {there}")
  flat = flax.traverse_util.flatten_dict(state["params_ema"], sep="/")
  return {name: np.asarray(value) for name, value in flat.items()}


def fields_of(network: UNet, tensors: Tensors, what: str) -> dict[str, Any]:
  """The fields of a network, with the blocks per level that the file has.

  Raises:
    WeightsError: the number of blocks fits no such network.
  """
  resampled = len(network.channel_multipliers) - 1
  blocks = len({name.split("/")[0] for name in tensors if name.startswith(f"{_BLOCK}_")})
  per_level, rest = divmod(blocks - 2 - 3 * resampled - 1, 2 * (resampled + 1))
  if rest or per_level < 1:
    raise WeightsError(
      f"{what} has {blocks} residual blocks {_BLOCK}, which no network of {resampled + 1} levels has: take "
      "another preset"
    )
  left_out = ("parent", "name", "conditions", "dtype", "param_dtype")
  fields = {name: getattr(network, name) for name in UNet.__dataclass_fields__ if name not in left_out}
  return fields | {"blocks": per_level}


def convert(fields: Mapping[str, Any], tensors: Tensors, what: str) -> tuple[UNet, dict[str, Any]]:
  """The network of these fields, and its parameters made of published ones.

  Raises:
    WeightsError: lists all that is missing, superfluous, or of another shape.
  """
  if fields["channels"] < _SMALLEST:
    raise WeightsError(f"channels = {fields['channels']}: published networks have {_SMALLEST} and more")
  network = UNet(**fields)
  size = 2 ** len(fields["channel_multipliers"])
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.ones(1))
  return network, names.assemble(parameters(fields, tensors), tensors, shapes, what)


def parameters(fields: Mapping[str, Any], tensors: Tensors) -> Map:
  """The map to the parameters of a `UNet` of these fields; of the tensors it looks at the random frequencies alone."""
  found = (
    _layer("Dense_1", "TimeEmbedding_0/Dense_1") | _layer("Conv_0", "Conv_0") | _layer("GroupNorm_0", "GroupNorm_0")
  )
  if fields["time_embedding"] == "fourier":
    frequencies = np.asarray(tensors.get("GaussianFourierProjection_0/W", np.zeros(1)), np.float64)
    found |= _after_waves(2 * math.pi * frequencies * math.log(2))
    found["TimeEmbedding_0/frequencies"] = Made(("GaussianFourierProjection_0/W",), lambda w: 4 * w)
    found |= {f"output/{name}": Made((f"Conv_1/{name}",), np.negative) for name in ("kernel", "bias")}
  else:
    found |= _after_waves(np.zeros(1)) | _layer("Conv_1", "output")
  numbers: dict[str, int] = {}

  def next_of(kind: str) -> str:
    numbers[kind] = numbers.get(kind, -1) + 1
    return f"{kind}_{numbers[kind]}"

  for kind, here, projected in _calls(fields):
    if kind == _BLOCK:
      found |= _residual(next_of(kind), here, projected)
    elif kind == _ATTENTION:
      found |= _attention(next_of(kind), here)
    else:
      there = f"{next_of(kind)}/Conv2d_0"
      found |= {f"{here}/kernel": same(f"{there}/weight"), f"{here}/bias": same(f"{there}/bias")}
  return found


def _calls(fields: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
  """Blocks, attentions and what carries the input down, in the order of their calls: class there, name here, and
  whether the shortcut is projected."""
  features = [fields["channels"] * multiplier for multiplier in fields["channel_multipliers"]]
  blocks, attended, last = fields["blocks"], fields["attention_levels"], len(features) - 1
  calls: list[tuple[str, str, bool]] = []
  numbers = {"ResidualBlock": 0, "SelfAttention": 0}

  def ours(kind: str) -> str:
    numbers[kind] += 1
    return f"{kind}_{numbers[kind] - 1}"

  block = lambda inputs, level: calls.append((_BLOCK, ours("ResidualBlock"), inputs != features[level]))
  attend = lambda: calls.append((_ATTENTION, ours("SelfAttention"), False))
  skips, inputs = [features[0]], features[0]
  for level in range(last + 1):
    for _ in range(blocks):
      block(inputs, level)
      inputs = features[level]
      skips.append(inputs)
      if level in attended:
        attend()
    if level < last:
      calls.append((_BLOCK, f"down_{level}", True))
      skips.append(inputs)
      if fields["progressive_input"] == "residual":
        calls.append(("Downsample", f"pyramid_down_{level}/Conv_0", False))
  block(inputs, last)
  attend()
  block(inputs, last)
  for level in reversed(range(last + 1)):
    for _ in range(blocks + 1):
      block(inputs + skips.pop(), level)
      inputs = features[level]
    if level in attended:
      attend()
    if level > 0:
      calls.append((_BLOCK, f"up_{level}", True))
  return calls


def _layer(there: str, here: str) -> Map:
  parts = ("scale", "bias") if there.rpartition("/")[2].startswith("GroupNorm") else ("kernel", "bias")
  return {f"{here}/{part}": same(f"{there}/{part}") for part in parts}


def _after_waves(angles: np.ndarray) -> Map:
  """The layer after [sin(p - a), cos(p - a)] of the published code, for the [cos p, sin p] of ours."""
  turned = lambda kernel: names.turned(kernel, angles, sines_first=True)
  return {
    "TimeEmbedding_0/Dense_0/kernel": Made(("Dense_0/kernel",), turned),
    "TimeEmbedding_0/Dense_0/bias": same("Dense_0/bias"),
  }


def _residual(there: str, here: str, projected: bool) -> Map:
  found: Map = {}
  for layer in ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1"):
    found |= _layer(f"{there}/{layer}", f"{here}/{layer}")
  if projected:
    kernel = Made((f"{there}/Conv_2/kernel",), lambda kernel: kernel.reshape(kernel.shape[-2:]))
    found |= {f"{here}/shortcut/kernel": kernel, f"{here}/shortcut/bias": same(f"{there}/Conv_2/bias")}
  return found


def _attention(there: str, here: str) -> Map:
  layers = [f"{there}/NIN_{k}" for k in range(4)]
  beside = lambda *parts: np.concatenate(parts, axis=-1)
  return _layer(f"{there}/GroupNorm_0", f"{here}/GroupNorm_0") | {
    f"{here}/query_key_value/kernel": Made(tuple(f"{layer}/W" for layer in layers[:3]), beside),
    f"{here}/query_key_value/bias": Made(tuple(f"{layer}/b" for layer in layers[:3]), beside),
    f"{here}/output/kernel": same(f"{layers[3]}/W"),
    f"{here}/output/bias": same(f"{layers[3]}/b"),
  }
