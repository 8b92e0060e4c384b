"""`DiTTransformer2DModel` of diffusers as our `DiT`; older files call it `Transformer2DModel`.

The network here takes a time t = (n + 1) / T for the step n = 0 .. T - 1 there: see `names.one_step_later`. Each block
there has an embedding of time and class of its own; all are copies of one, which is checked.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.weights import names
from jaxdiff.weights.files import Tensors, refuse_misfits
from jaxdiff.weights.names import Made, Map
from jaxdiff.weights.settings import Settings
from jaxdiff.weights.unet2d import wave_numbers

_EMBEDDING = ".norm1.emb."
_FIRST = f"transformer_blocks.0{_EMBEDDING}"
_SINUSOIDS = 256
_FIXED = (
  ("norm_type", "ada_norm_zero"),
  ("activation_fn", "gelu-approximate"),
  ("attention_bias", True),
  ("norm_elementwise_affine", False),
  ("norm_eps", 1e-5, 1e-6),
  ("dropout", 0.0),
  ("cross_attention_dim", None),
  ("double_self_attention", False),
  ("only_cross_attention", False),
  ("num_vector_embeds", None),
  ("attention_type", "default"),
  ("caption_channels", None),
)
_WITHOUT_EFFECT = (
  *("norm_num_groups", "upcast_attention", "use_linear_projection", "interpolation_scale"),
  "use_additional_conditions",
)


def fields(config: Mapping[str, Any], steps: int, what: str) -> tuple[dict[str, Any], int, tuple[int, ...]]:
  """The fields of our network but its condition, the number of classes, and the shape of its latents.

  Args:
    config: the published one.
    steps: T.
    what: its file, for messages.

  Raises:
    WeightsError: lists every key whose value there is no network for.
  """
  settings = Settings(config, what)
  for key, *values in _FIXED:
    settings.only(key, *values)
  settings.without_effect(*_WITHOUT_EFFECT)
  heads = settings.take("num_attention_heads", 16)
  inputs, size = settings.take("in_channels", 4), settings.take("sample_size", 32)
  outputs = settings.take("out_channels", None) or inputs
  if outputs not in (inputs, 2 * inputs):
    settings.refuse("out_channels", outputs, f"can be in_channels = {inputs} here, or twice as many")
  frequencies = wave_numbers(_SINUSOIDS, 1)
  made = {
    "patch": settings.take("patch_size", 2),
    "width": heads * settings.take("attention_head_dim", 72),
    "depth": settings.take("num_layers", 28),
    "heads": heads,
    "parts": outputs // inputs,
    "max_frequency": float(steps * frequencies[0]),
    "min_frequency": float(steps * frequencies[-1]),
  }
  classes = settings.take("num_embeds_ada_norm", 1000)
  settings.finish()
  return made, classes, (size, size, inputs)


def one_embedding(tensors: Tensors, what: str) -> Tensors:
  """The tensors without the copies of the embedding of time and class that the blocks have.

  Raises:
    WeightsError: they are no copies.
  """
  kept, other = {}, []
  for name, value in tensors.items():
    block, found, layer = name.partition(_EMBEDDING)
    if not found or block + found == _FIRST:
      kept[name] = value
    elif _FIRST + layer not in tensors or not np.array_equal(value, tensors[_FIRST + layer]):
      other.append(f"{name} is not equal to {_FIRST}{layer}: blocks here share their embedding")
  refuse_misfits(what, other)
  return kept


def parameters(made: Mapping[str, Any]) -> Map:
  """The map to the parameters of a `DiT` of these fields, with `conditions={"label": Label(classes)}`."""
  time = f"{_FIRST}timestep_embedder"
  found = names.one_step_later(f"{time}.linear_1", "time_1", wave_numbers(_SINUSOIDS, 1), sines_first=False)
  found |= names.linear(f"{time}.linear_2", "time_2")
  found["conditions_label/table"] = names.same(f"{_FIRST}class_embedder.embedding_table.weight")
  patches = Made(("pos_embed.proj.weight",), lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]))
  found |= {"patches/kernel": patches, "patches/bias": names.same("pos_embed.proj.bias")}
  for k in range(made["depth"]):
    there, here = f"transformer_blocks.{k}", f"block_{k}"
    found |= names.linear(f"{there}.norm1.linear", f"{here}/modulation")
    found |= names.together(tuple(f"{there}.attn1.to_{letter}" for letter in "qkv"), f"{here}/query_key_value")
    found |= names.linear(f"{there}.attn1.to_out.0", f"{here}/attention_output")
    found |= names.linear(f"{there}.ff.net.0.proj", f"{here}/perceptron_1")
    found |= names.linear(f"{there}.ff.net.2", f"{here}/perceptron_2")
  return found | names.linear("proj_out_1", "modulation") | names.linear("proj_out_2", "output")
