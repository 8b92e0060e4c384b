"""Long evaluations in chunks: every finished one is kept in a file, and a run that was stopped goes on there.

Several processes share the work by the files alone, on a file system that all of them see: process p of n computes the
chunks p, p + n, p + 2n, ... and waits for those of the others.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

_POLL = 0.2  # seconds between two looks for the chunk of another process


def identify(arrays: Any, **facts: Any) -> str:
  """A hash of a pytree of arrays, to the bit, and of facts that JSON can hold.

  Example:
    >>> identify({"w": np.zeros(2)}, seed=0) == identify({"w": np.zeros(2)}, seed=1)
    False
  """
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
    value = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)}:{value.dtype.str}:{value.shape};".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()[:32]


def in_chunks(
  folder: Path,
  name: str,
  identity: str,
  count: int,
  size: int,
  compute: Callable[[int], Mapping[str, np.ndarray]],
  share: tuple[int, int] = (0, 1),
) -> dict[str, np.ndarray]:
  """Arrays of `count` examples, computed `size` at a time; chunks that are there already are read.

  A chunk is there if its file is whole and has the same identity and size. It belongs to its examples alone, so that
  more examples reuse the chunks of fewer.

  Args:
    folder: where the chunks are kept, one file each; made if need be.
    name: of the files, and of the progress bar.
    identity: of what the arrays depend on.
    count: how many examples.
    size: how many a chunk.
    compute: from the first example of a chunk to arrays `[size, ...]`, filled up where the examples end.
    share: (index of this process, number of processes).

  Returns:
    Arrays `[count, ...]`, named as those of `compute`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  stamp, starts, (index, processes) = f"{identity}:{size}", range(0, count, size), share
  parts: dict[int, dict[str, np.ndarray]] = {}
  with tqdm(total=count, unit="example", desc=name, disable=None if index == 0 else True) as bar:
    for chunk in sorted(range(len(starts)), key=lambda chunk: chunk % processes != index):
      start, path = starts[chunk], folder / f"{name}-{starts[chunk]:08d}.npz"
      part = _read(path, stamp)
      if part is None and chunk % processes == index:
        part = dict(compute(start))
        _write(path, stamp, part)
      while part is None:
        time.sleep(_POLL)
        part = _read(path, stamp)
      parts[start] = part
      bar.update(min(size, count - start))
  return {key: np.concatenate([parts[start][key] for start in starts])[:count] for key in parts[0]}


def _read(path: Path, stamp: str) -> dict[str, np.ndarray] | None:
  """The arrays of a chunk, or None where it is not there, damaged or another's."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {key: file[key] for key in file if key != "stamp"} if str(file["stamp"]) == stamp else None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _write(path: Path, stamp: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Write the file whole or not at all."""
  part = path.with_suffix(".part")
  with open(part, "wb") as file:
    np.savez(file, allow_pickle=False, stamp=np.array(stamp), **arrays)
  os.replace(part, path)
