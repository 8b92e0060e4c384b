"""`UNet2DModel` of diffusers as our `UNet`: the DDPM of CIFAR-10, CelebA-HQ, LSUN and their relatives.

The network here takes a time t = (n + 1) / T for the step n = 0 .. T - 1 there: see `names.one_step_later`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.weights import names
from jaxdiff.weights.files import Tensors
from jaxdiff.weights.names import Map
from jaxdiff.weights.settings import Settings

_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}
_PADDING = {0: "conv", 1: "conv_symmetric"}
_DEFAULTS = {
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
  "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
  "block_out_channels": (224, 448, 672, 896),
}
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PERIOD = 1e4


def fields(config: Mapping[str, Any], steps: int, what: str) -> tuple[dict[str, Any], tuple[int, ...]]:
  """The fields of our network, and the shape of the images.

  Args:
    config: the published one.
    steps: T.
    what: its file, for messages.

  Raises:
    WeightsError: lists every key whose value there is no network for.
  """
  settings = Settings(config, what)
  for key, *values in (
    ("center_input_sample", False),
    ("time_embedding_type", "positional"),
    ("mid_block_type", "UNetMidBlock2D"),
    ("mid_block_scale_factor", 1),
    ("act_fn", "silu", "swish"),
    ("class_embed_type", None),
    ("num_class_embeds", None),
  ):
    settings.only(key, *values)
  settings.without_effect("num_train_timesteps", "flip_sin_to_cos")  # the latter only orders what a layer reads
  made = _sizes(settings) | _levels(settings)
  made |= _time(settings, made["channels"], steps) | _attention(settings, made["groups"], made["modulation"])
  shape = _shape(settings, made)
  settings.finish()
  return made, shape


def _sizes(settings: Settings) -> dict[str, Any]:
  channels = settings.take("block_out_channels", _DEFAULTS["block_out_channels"])
  if any(number % channels[0] for number in channels):
    settings.refuse("block_out_channels", channels, "must be multiples of the first here")
  inputs, outputs = settings.take("in_channels", 3), settings.take("out_channels", 3)
  if outputs not in (inputs, 2 * inputs):
    settings.refuse("out_channels", outputs, f"can be in_channels = {inputs} here, or twice as many")
  return {
    "channels": channels[0],
    "channel_multipliers": tuple(number // channels[0] for number in channels),
    "blocks": settings.take("layers_per_block", 2),
    "groups": settings.take("norm_num_groups", 32),
    "norm_epsilon": float(settings.take("norm_eps", 1e-5)),
    "dropout": float(settings.take("dropout", 0.0)),
    "parts": 2 if outputs == 2 * inputs else 1,
    "modulation": "scale_shift"
    if settings.only("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift"
    else "add",
    "all_biases": True,
    "_inputs": inputs,
  }


def _levels(settings: Settings) -> dict[str, Any]:
  """Where there is attention, and how the levels are joined."""
  down = settings.take("down_block_types", _DEFAULTS["down_block_types"])
  up = settings.take("up_block_types", _DEFAULTS["up_block_types"])
  kinds = {way: settings.only(f"{way}sample_type", "conv", "resnet") for way in ("down", "up")}
  padding = settings.only("downsample_padding", 1, 0)
  for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
    if unknown := [kind for kind in types if kind not in known]:
      settings.refuse(key, types, f"has {unknown[0]}; blocks can be {', '.join(known)} here")
      return {}
  there = lambda types, known: [known[kind] for kind in types]
  if there(down, _DOWN) != there(reversed(up), _UP):
    settings.refuse("up_block_types", up, f"must have attention at the levels where down_block_types = {down} have it")
  joined = {
    "resnet" if kind.startswith("Resnet") or (kind.startswith("Attn") and kinds[way] == "resnet") else "conv"
    for way, types in (("down", down[:-1]), ("up", up[:-1]))
    for kind in types
  }
  if len(joined) > 1:
    settings.refuse("down_block_types", down, "and up_block_types resample by convolutions here and by blocks there")
  by_blocks = joined == {"resnet"}
  return {
    "attention_levels": tuple(level for level, kind in enumerate(down) if _DOWN[kind]),
    "resampling": "pool" if by_blocks else _PADDING[padding],
    "resample_in_blocks": by_blocks,
  }


def _time(settings: Settings, channels: int, steps: int) -> dict[str, Any]:
  if (features := settings.take("time_embedding_dim", None)) not in (None, 0, 4 * channels):
    settings.refuse("time_embedding_dim", features, f"must be 4 block_out_channels[0] = {4 * channels} here")
  frequencies = wave_numbers(channels, settings.take("freq_shift", 0))
  return {
    "time_features": channels,
    "max_frequency": float(steps * frequencies[0]),
    "min_frequency": float(steps * frequencies[-1]),
  }


def wave_numbers(features: int, shift: int | float) -> np.ndarray:
  """Angular frequencies of the published sinusoids, radians per step: 10000^(-k / (features / 2 - shift))."""
  half = features // 2
  return PERIOD ** (-np.arange(half) / (half - shift))


def _attention(settings: Settings, groups: int, modulation: str) -> dict[str, Any]:
  head = settings.take("attention_head_dim", 8)
  middle = settings.only("add_attention", True, False)
  in_middle = settings.take("attn_norm_num_groups", None)
  if in_middle is None and modulation == "scale_shift" and middle:
    settings.refuse("attn_norm_num_groups", None, f"with scale_shift leaves out a norm that must be there: {groups}")
  if in_middle not in (None, groups):
    settings.refuse("attn_norm_num_groups", in_middle, f"must be norm_num_groups = {groups} here")
  return {"head_channels": head or 0, "middle_attention": middle}


def _shape(settings: Settings, made: dict[str, Any]) -> tuple[int, ...]:
  size = settings.take("sample_size", None)
  if size is None:
    settings.refuse("sample_size", None, "must be the height and width of the images")
    size = 0
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, made.pop("_inputs")


def renamed(tensors: Tensors) -> Tensors:
  """The tensors under the names that attention has now; the first published files have others."""

  def name(old: str) -> str:
    head, dot, kind = old.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{_OLD_NAMES[layer]}{dot}{kind}" if "attentions." in block and layer in _OLD_NAMES else old

  return {name(old): value for old, value in tensors.items()}


def parameters(made: Mapping[str, Any], config: Mapping[str, Any]) -> Map:
  """The map to the parameters of a `UNet` of these fields."""
  frequencies = wave_numbers(made["channels"], config.get("freq_shift", 0))
  sines_first = not config.get("flip_sin_to_cos", True)
  found = names.one_step_later("time_embedding.linear_1", "TimeEmbedding_0/Dense_0", frequencies, sines_first)
  found |= names.linear("time_embedding.linear_2", "TimeEmbedding_0/Dense_1")
  found |= names.conv("conv_in", "Conv_0") | names.conv("conv_out", "output")
  found |= names.norm("conv_norm_out", "GroupNorm_0")
  places = _places(made)
  for number, place in enumerate(places["resnets"]):
    found |= _residual(place, f"ResidualBlock_{number}", projected=place in places["projected"])
  for number, place in enumerate(places["attentions"]):
    found |= self_attention(place, f"SelfAttention_{number}")
  for place, here in places["resampled"].items():
    if made["resample_in_blocks"]:
      found |= _residual(place, here, projected=False)
    else:
      found |= names.conv(f"{place}.conv", f"{here}/Conv_0")
  return found


def _places(made: Mapping[str, Any]) -> dict[str, Any]:
  """The prefixes of blocks and attentions in the order of the computation, and what resamples."""
  features = [made["channels"] * multiplier for multiplier in made["channel_multipliers"]]
  last, blocks = len(features) - 1, made["blocks"]
  resnets, attentions, projected, resampled = [], [], set(), {}
  skips, inputs = [features[0]], features[0]

  def block(place: str, number: int, inputs: int, level: int) -> None:
    resnets.append(f"{place}.resnets.{number}")
    if inputs != features[level]:
      projected.add(resnets[-1])
    if level in made["attention_levels"]:
      attentions.append(f"{place}.attentions.{number}")

  for level in range(last + 1):
    for number in range(blocks):
      block(f"down_blocks.{level}", number, inputs, level)
      inputs = features[level]
      skips.append(inputs)
    if level < last:
      resampled[f"down_blocks.{level}.downsamplers.0"] = f"down_{level}"
      skips.append(inputs)
  resnets += ["mid_block.resnets.0", "mid_block.resnets.1"]
  attentions += ["mid_block.attentions.0"] if made["middle_attention"] else []
  for level in reversed(range(last + 1)):
    for number in range(blocks + 1):
      block(f"up_blocks.{last - level}", number, inputs + skips.pop(), level)
      inputs = features[level]
    if level > 0:
      resampled[f"up_blocks.{last - level}.upsamplers.0"] = f"up_{level}"
  return {"resnets": resnets, "attentions": attentions, "projected": projected, "resampled": resampled}


def _residual(there: str, here: str, projected: bool) -> Map:
  found = names.norm(f"{there}.norm1", f"{here}/GroupNorm_0") | names.conv(f"{there}.conv1", f"{here}/Conv_0")
  found |= names.norm(f"{there}.norm2", f"{here}/GroupNorm_1") | names.conv(f"{there}.conv2", f"{here}/Conv_1")
  found |= names.linear(f"{there}.time_emb_proj", f"{here}/Dense_0")
  return found | (names.pointwise(f"{there}.conv_shortcut", f"{here}/shortcut") if projected else {})


def self_attention(there: str, here: str) -> Map:
  """The map of one attention, of this prefix there and this path here."""
  found = names.norm(f"{there}.group_norm", f"{here}/GroupNorm_0")
  found |= names.together(tuple(f"{there}.to_{letter}" for letter in "qkv"), f"{here}/query_key_value")
  return found | names.linear(f"{there}.to_out.0", f"{here}/output")
