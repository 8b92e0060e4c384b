"""The manifest of prepared data: which files a folder must hold, down to the last bit, and what is in them.

`manifest.json` is written last, so a folder without one is not finished. It says of every split how many examples it
has, the sha256 of all pixels and of all labels in order (whatever files they lie in), and of every file its size, its
sha256 and its number of examples. `verify` compares the files with it before anything is read from them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

FILE = "manifest.json"
FORMAT = 1
_KINDS = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "float32": "<f4"}
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class File:
  """A file in the folder: its name, its size, its sha256, and how many examples it holds."""

  name: str
  bytes: int
  sha256: str
  count: int


@dataclasses.dataclass(frozen=True)
class Split:
  """A split: the sha256 of its raw pixels and of its int32 labels in order, its files, and where its texts are.

  `texts` has one JSON object a line, in the order of the examples.
  """

  count: int
  pixels: str
  labels: str | None
  files: tuple[File, ...]
  texts: File | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of prepared data holds.

  Attributes:
    name: what the data are.
    shape: shape of one example.
    dtype: "uint8", "uint16", "uint32" or "float32"; stored with the lowest byte first.
    levels: number of integer levels; None for continuous data.
    labelled: whether each example has an int32 label.
    classes: names of the labels 0, 1, ..., where they have names.
    source: what the data were made from.
    command: the command that makes them, with DIR and PATH for folders and files.
    splits: the splits by name.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  levels: int | None
  labelled: bool
  classes: tuple[str, ...] | None
  source: Mapping[str, Any]
  command: str
  splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)

  @property
  def stored(self) -> np.dtype:
    """The type of the numbers in the files."""
    return np.dtype(_KINDS[self.dtype])

  @property
  def record_bytes(self) -> int:
    """The length of a record: raw pixels, then the label."""
    return int(np.prod(self.shape)) * self.stored.itemsize + 4 * self.labelled


def content_hash(manifest: Manifest, split: str) -> str:
  """A text that changes when a pixel, a label, the shape or the type of a split does, however it is cut into files."""
  part = manifest.splits[split]
  facts = [manifest.dtype, list(manifest.shape), part.count, part.pixels, part.labels]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def write(manifest: Manifest, folder: Path) -> None:
  """Write the manifest into its folder."""
  plain = {"format": FORMAT, **dataclasses.asdict(manifest)}
  (folder / FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
  """The manifest of a folder.

  Raises:
    FileNotFoundError: there is no manifest.
    ValueError: it is damaged, or of another version of the format.
  """
  path = folder / FILE
  if not path.is_file():
    raise FileNotFoundError(
      f"path: {folder} holds no {FILE}, so no prepared data; prepare them there: jaxdiff data NAME ... "
      f"--output={folder}, where NAME is fashion_mnist, emoji, folder or npz (jaxdiff data --help says what they need)"
    )
  try:
    plain = json.loads(path.read_text(encoding="utf-8"))
    version = plain.pop("format")
    if version == FORMAT:
      return _manifest(plain)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"path: {path} is damaged ({error!r}); restore it, or prepare the data anew") from error
  raise ValueError(
    f"path: {path} has format {version!r}, this version reads {FORMAT}; prepare the data anew, or update jaxdiff"
  )


def _manifest(plain: Any) -> Manifest:
  splits = {str(name): _split(dict(part)) for name, part in plain.pop("splits").items()}
  classes = plain.pop("classes")
  shape = tuple(_whole(n, least=1) for n in plain.pop("shape"))
  made = Manifest(shape=shape, splits=splits, classes=None if classes is None else tuple(classes), **plain)
  known = made.dtype in _KINDS and isinstance(made.labelled, bool)
  if not known or (made.levels is None) != (made.dtype == "float32"):
    raise ValueError(f"dtype {made.dtype!r}, levels {made.levels!r}, labelled {made.labelled!r}")
  return made


def _split(plain: dict[str, Any]) -> Split:
  files, texts = tuple(_file(file) for file in plain.pop("files")), plain.pop("texts")
  made = Split(files=files, texts=None if texts is None else _file(texts), **plain)
  if sum(file.count for file in files) != _whole(made.count, least=1):
    raise ValueError(f"count {made.count} is not the sum of those of the files")
  return made


def _file(plain: Any) -> File:
  made = File(**plain)
  if not re.fullmatch(r"\w[\w.-]*", made.name):  # in the folder, never beside it
    raise ValueError(f"file name {made.name!r}")
  _whole(made.bytes, least=0)
  _whole(made.count, least=1)
  return made


def _whole(value: Any, least: int) -> int:
  if not isinstance(value, int) or value < least:
    raise ValueError(f"{value!r} where a whole number of at least {least} is expected")
  return value


def digest(path: Path, bar: Any = None) -> str:
  """The sha256 of a file."""
  found = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      found.update(block)
      if bar is not None:
        bar.update(len(block))
  return found.hexdigest()


def verify(folder: Path, manifest: Manifest, splits: Iterable[str]) -> None:
  """Compare the files of some splits with the manifest: first that they are there, then sizes, then every byte.

  Args:
    folder: where the data are.
    manifest: its manifest.
    splits: the names of the splits.

  Raises:
    ValueError: a file is missing, of another size or has changed; all such files are named.
  """
  parts = [manifest.splits[split] for split in splits]
  files = [file for part in parts for file in (*part.files, *([part.texts] if part.texts else []))]
  wrong = [text for file in files if (text := _wrong_size(folder / file.name, file.bytes))]
  if not wrong:
    wrong = _wrong_content(folder, files)
  if wrong:
    command = manifest.command.replace("--output=DIR", f"--output={folder}")
    raise ValueError(f"path: {'; '.join(wrong)}. Restore the file, or delete {folder} and prepare it anew: {command}")


def _wrong_size(path: Path, size: int) -> str:
  if not path.is_file():
    return f"{path} is missing"
  found = path.stat().st_size
  return "" if found == size else f"{path} has {found} bytes, not {size}"


def _wrong_content(folder: Path, files: list[File]) -> list[str]:
  total = sum(file.bytes for file in files)
  bar = tqdm(desc="checking data", total=total, unit="B", unit_scale=True, delay=1, leave=False, disable=None)
  with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = list(pool.map(lambda file: digest(folder / file.name, bar), files))
  return [
    f"{folder / file.name} is corrupted: its sha256 is not the one in {FILE}"
    for file, sha256 in zip(files, found, strict=True)
    if sha256 != file.sha256
  ]
