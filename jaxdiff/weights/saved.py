"""Our parameters as safetensors: a folder of model.safetensors, with flat names such as "params.Conv_0.kernel", and of
config.json, which says what they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from jaxdiff.weights import files
from jaxdiff.weights.files import WeightsError

_FILE = "model.safetensors"
_SEPARATOR = "."


def save(folder: str | Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Write parameters, bit by bit as they are, and what they are.

  Args:
    folder: made if need be; what it holds of an earlier `save` is replaced.
    params: nested dicts of arrays, such as `{"params": {...}}`; none of the names has a dot in it.
    config: JSON values, such as `{"network": {"type": "UNet", "channels": 32}}`.

  Raises:
    TypeError: for params that are no dicts of arrays, or a config that JSON cannot hold.
    ValueError: for a name with a dot.

  Example:
    >>> save("digits-unet", params, {"network": {"type": "UNet"}})  # doctest: +SKIP
  """
  folder, text = Path(folder), json.dumps(dict(config), indent=2) + "\n"
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [getattr(part, "key", None) for part in path]
    if not all(isinstance(name, str) for name in names) or not hasattr(leaf, "dtype"):
      raise TypeError(f"params{jax.tree_util.keystr(path)}: pass nested dicts of arrays")
    if any(_SEPARATOR in str(name) for name in names):
      raise ValueError(f"params{jax.tree_util.keystr(path)}: no name may have a {_SEPARATOR!r} in it")
  flat = flax.traverse_util.flatten_dict(dict(params), sep=_SEPARATOR)
  folder.mkdir(parents=True, exist_ok=True)
  files.write(folder / _FILE, {name: np.asarray(leaf) for name, leaf in flat.items()})
  (folder / files.CONFIG).write_text(text, encoding="utf-8")


def restore(folder: str | Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters that `save` wrote, bit by bit, in the types that they were saved in.

  Args:
    folder: of `save`.
    shapes: names and shapes of the parameters, such as `jax.eval_shape` of the network's `init`.

  Raises:
    WeightsError: there are none, or a damaged file, or others than these: every name that is missing, is not used, or
      has another shape is listed.
  """
  path = Path(folder) / _FILE
  if not path.is_file():
    raise WeightsError(f"{path} does not exist: give a folder that was exported")
  tensors = files.read(path, half=True)
  due = flax.traverse_util.flatten_dict(dict(shapes), sep=_SEPARATOR)
  wrong = [f"missing: {name}" for name in sorted(due.keys() - tensors.keys())]
  wrong += [f"not used: {name}, shape {list(tensors[name].shape)}" for name in sorted(tensors.keys() - due.keys())]
  wrong += [
    f"wrong shape: {name} {list(tensors[name].shape)}; the network has {list(due[name].shape)}"
    for name in sorted(due.keys() & tensors.keys())
    if tensors[name].shape != due[name].shape
  ]
  files.refuse_misfits(str(path), wrong)
  return flax.traverse_util.unflatten_dict(tensors, sep=_SEPARATOR)
