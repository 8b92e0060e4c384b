"""`AutoencoderKL` of diffusers as ours: those of latent diffusion, of Stable Diffusion 1 and 2, of DiT."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.weights import names
from jaxdiff.weights.names import Map
from jaxdiff.weights.settings import Settings
from jaxdiff.weights.unet2d import renamed as renamed
from jaxdiff.weights.unet2d import self_attention


def fields(config: Mapping[str, Any], what: str) -> tuple[dict[str, Any], tuple[int, ...]]:
  """The fields of our network, and the shape of the images.

  Args:
    config: the published one.
    what: its file, for messages.

  Raises:
    WeightsError: lists every key whose value there is no network for.
  """
  settings = Settings(config, what)
  channels = settings.take("block_out_channels", (64,))
  if any(number % channels[0] for number in channels):
    settings.refuse("block_out_channels", channels, "must be multiples of the first here")
  settings.only("down_block_types", ("DownEncoderBlock2D",) * len(channels))
  settings.only("up_block_types", ("UpDecoderBlock2D",) * len(channels))
  for key, *values in (
    ("act_fn", "silu", "swish"),
    ("shift_factor", None),
    ("latents_mean", None),
    ("latents_std", None),
    ("use_quant_conv", True),
    ("use_post_quant_conv", True),
    ("mid_block_add_attention", True),
  ):
    settings.only(key, *values)
  settings.without_effect("force_upcast")
  size, images = settings.take("sample_size", 32), settings.take("in_channels", 3)
  if (outputs := settings.take("out_channels", 3)) != images:
    settings.refuse("out_channels", outputs, f"must be in_channels = {images} here")
  made = {
    "channels": channels[0],
    "channel_multipliers": tuple(number // channels[0] for number in channels),
    "blocks": settings.take("layers_per_block", 1),
    "latent_channels": settings.take("latent_channels", 4),
    "image_channels": images,
    "groups": settings.take("norm_num_groups", 32),
    "scaling": float(settings.take("scaling_factor", 0.18215)),
  }
  settings.finish()
  return made, (*((size, size) if isinstance(size, int) else size), images)


def parameters(made: Mapping[str, Any]) -> Map:
  """The map to the parameters of an `AutoencoderKL` of these fields."""
  multipliers, blocks = made["channel_multipliers"], made["blocks"]
  found = names.pointwise("quant_conv", "moments") | names.pointwise("post_quant_conv", "latents")
  for half in ("encoder", "decoder"):
    found |= names.conv(f"{half}.conv_in", f"{half}/input") | names.conv(f"{half}.conv_out", f"{half}/output")
    found |= names.norm(f"{half}.conv_norm_out", f"{half}/norm") | _middle(f"{half}.mid_block", f"{half}/middle")
  inputs, last = multipliers[0], len(multipliers) - 1
  for level, multiplier in enumerate(multipliers):
    for block in range(blocks):
      place, here = f"encoder.down_blocks.{level}", f"encoder/level_{level}_block_{block}"
      found |= _residual(f"{place}.resnets.{block}", here, projected=inputs != multiplier)
      inputs = multiplier
    if level < last:
      found |= names.conv(f"{place}.downsamplers.0.conv", f"encoder/down_{level}")
  for level, multiplier in reversed(list(enumerate(multipliers))):
    for block in range(blocks + 1):
      place, here = f"decoder.up_blocks.{last - level}", f"decoder/level_{level}_block_{block}"
      found |= _residual(f"{place}.resnets.{block}", here, projected=inputs != multiplier)
      inputs = multiplier
    if level > 0:
      found |= names.conv(f"{place}.upsamplers.0.conv", f"decoder/up_{level}")
  return found


def _middle(there: str, here: str) -> Map:
  found: Map = {}
  for block in range(2):
    found |= _residual(f"{there}.resnets.{block}", f"{here}/block_{block}", projected=False)
  found |= self_attention(f"{there}.attentions.0", f"{here}/attention")
  return found


def _residual(there: str, here: str, projected: bool) -> Map:
  found: Map = {}
  for k in range(2):
    found |= names.norm(f"{there}.norm{k + 1}", f"{here}/norm_{k}")
    found |= names.conv(f"{there}.conv{k + 1}", f"{here}/conv_{k}")
  return found | (names.pointwise(f"{there}.conv_shortcut", f"{here}/shortcut") if projected else {})
