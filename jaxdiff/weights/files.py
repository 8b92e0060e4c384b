"""Tensors by name in safetensors files, whole or in shards, and the config.json beside them.

Nothing is ever unpickled: a file of PyTorch is refused, whatever its name says.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Tensors = dict[str, np.ndarray]

CONFIG = "config.json"
NAME = "diffusion_pytorch_model.safetensors"
_NAMES = (NAME, "model.safetensors")
_PARTS = ("", "unet", "transformer")  # of a pipeline, where its network may lie
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6)))
_CONVERT = (
  'convert it where PyTorch is and the file is trusted: python -c "import torch, safetensors.torch as s; '
  "s.save_file(torch.load('{0}', weights_only=True), '{1}')\""
)


class WeightsError(ValueError):
  """A file of weights that cannot be read, or whose contents do not fit."""


class Found(NamedTuple):
  """Where a model lies.

  Attributes:
    weights: the safetensors file, or the index of its shards.
    config: the config.json beside it.
    folder: of the whole, which may hold a scheduler, too.
  """

  weights: Path
  config: Path
  folder: Path


def find(path: str | Path) -> Found:
  """The files of a model.

  Args:
    path: a safetensors file with config.json beside it, the folder of both, or that of a pipeline with `unet` or
      `transformer` in it.

  Raises:
    WeightsError: there are none, or there is a pickle in their place.
  """
  path = Path(path)
  if path.is_file():
    refuse_pickle(path)
    if path.suffix not in (".safetensors", ".json"):
      raise WeightsError(f"{path} is no safetensors file; a checkpoint of score-SDE in JAX needs --preset=NAME")
    return Found(path, path.parent / CONFIG, path.parent)
  if not path.is_dir():
    raise WeightsError(f"{path} does not exist: give a safetensors file, or the folder that holds it")
  pickles: list[Path] = []
  for folder in (path / part for part in _PARTS):
    if not (folder / CONFIG).is_file():
      continue
    if (weights := _in_folder(folder)) is not None:
      return Found(weights, folder / CONFIG, path)
    pickles += [file for file in sorted(folder.iterdir()) if file.suffix in _PICKLES]
  if pickles:
    refuse_pickle(pickles[0])
  raise WeightsError(
    f"{path} holds no model: expected {CONFIG} beside {NAME}, in it or in its folder {' or '.join(_PARTS[1:])}"
  )


def _in_folder(folder: Path) -> Path | None:
  there = [folder / name for name in _NAMES if (folder / name).is_file()]
  there += sorted(folder.glob("*.safetensors.index.json"))
  whole = [file for file in sorted(folder.glob("*.safetensors")) if "-of-" not in file.name]
  if not there and len(whole) > 1:
    raise WeightsError(f"{folder} holds {', '.join(file.name for file in whole)}: give the path of one of them")
  return next(iter([*there, *whole]), None)


def refuse_pickle(path: Path) -> None:
  """Raises a WeightsError for a pickle, by its name or its first bytes, with the remedy."""
  with path.open("rb") as file:
    start = file.read(9)
  # A safetensors file begins with 8 bytes of a length, which can be any, and a bracket.
  if path.suffix in _PICKLES or (start.startswith(_MAGIC) and start[8:] != b"{"):
    raise WeightsError(
      f"{path} is a pickle, which may run any code when it is read, so it is not: use the safetensors file of the same "
      f"model, or {_CONVERT.format(path.name, path.with_suffix('.safetensors').name)}"
    )


def read(path: str | Path, half: bool = False) -> Tensors:
  """The tensors of a safetensors file or, of an index, those of all its shards.

  Args:
    path: the file, or FILE.safetensors.index.json beside its shards.
    half: whether bfloat16 and float16 stay so; else they become float32.

  Returns:
    Arrays by name.

  Raises:
    WeightsError: a pickle, a damaged or truncated file, a missing shard, or one that lacks what the index says.
  """
  path = Path(path)
  if not path.name.endswith(".index.json"):
    return _read_one(path, half)
  index = read_json(path).get("weight_map")
  if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
    raise WeightsError(f"{path} has no weight_map from names of tensors to files: it is damaged, fetch it again")
  tensors: Tensors = {}
  for name in sorted(set(index.values())):
    if Path(name).name != name or not (path.parent / name).is_file():
      raise WeightsError(f"{path} names the shard {name!r}, which is not beside it: fetch it, too")
    tensors |= _read_one(path.parent / name, half)
  if lacking := sorted(index.keys() - tensors.keys()):
    raise WeightsError(f"the shards of {path} lack {', '.join(lacking)}: fetch them again")
  return tensors


def _read_one(path: Path, half: bool) -> Tensors:
  import safetensors

  refuse_pickle(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return {name: _widened(file.get_tensor(name), half) for name in file.keys()}  # noqa: SIM118, it is no mapping
  except (safetensors.SafetensorError, OSError, struct.error) as error:
    raise WeightsError(
      f"{path} cannot be read as safetensors ({error}): it is damaged or cut off, fetch it again"
    ) from (error)


def _widened(array: np.ndarray, half: bool) -> np.ndarray:
  return array.astype(np.float32) if not half and array.dtype.name in ("bfloat16", "float16") else array


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Write a safetensors file, whole or not at all."""
  import safetensors.numpy

  path = Path(path)
  partial = path.with_name(f".{path.name}.partial")
  safetensors.numpy.save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, partial)
  partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
  """An object of JSON.

  Raises:
    WeightsError: it cannot be read as one.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise WeightsError(
      f"{path} cannot be read ({error}): the config.json of a model lies beside its weights"
    ) from error
  if not isinstance(value, dict):
    raise WeightsError(f"{path} holds {type(value).__name__} where an object of JSON is expected")
  return value


def refuse_misfits(what: str, wrong: list[str]) -> None:
  """Raises a WeightsError that lists what does not fit, if anything does not."""
  if wrong:
    listed = "\n".join(f"  {line}" for line in wrong)
    raise WeightsError(f"{what} does not fit the network of its configuration; nothing was written:\n{listed}")
