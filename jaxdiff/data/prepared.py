"""Prepared data: array_record files beside a manifest, read at random from disk, so that they need not fit in memory.

A record is the raw pixels of one example, lowest byte first, then its label as int32, if it has one: no pickles, no
compression formats of pictures. Every record is a group of its own, which array_record reads without its neighbours.
`jaxdiff.data.preparation` makes such folders of raw data, `sources.array_record` opens them.
"""

import hashlib
import itertools
import json
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxdiff.data import manifest as manifests
from jaxdiff.data.manifest import File, Manifest, Split

_WRITER = "group_size:1"
_READER = "readahead_buffer_size:0"
_READER_BUFFER = 32768
SHARD_BYTES = 256 << 20


class Records:
  """Examples of one split; readers are opened when first needed and may be used by several threads.

  Args:
    folder: where the files are.
    manifest: what they hold.
    split: name of the split.
  """

  def __init__(self, folder: Path, manifest: Manifest, split: str):
    self._manifest, self._part = manifest, manifest.splits[split]
    self._paths = [folder / file.name for file in self._part.files]
    self._starts = np.cumsum([0, *(file.count for file in self._part.files)])
    self._readers: list[Any] = [None] * len(self._paths)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._part.count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in self.gather(np.array([index])).items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `indices`, one read a file: a dict of arrays with a leading axis."""
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
      raise IndexError(f"indices: got {indices.min()}..{indices.max()} of {len(self)} examples")
    records: list[bytes] = [b""] * len(indices)
    shards = np.searchsorted(self._starts, indices, side="right") - 1
    for shard in np.unique(shards):
      rows = np.flatnonzero(shards == shard)
      found = self._read(int(shard), indices[rows] - self._starts[shard])
      for row, record in zip(rows, found, strict=True):
        records[row] = record
    return self._decode(records)

  def _read(self, shard: int, positions: np.ndarray) -> Sequence[bytes]:
    size = self._manifest.record_bytes
    try:
      found = self._reader(shard).read(positions.tolist())
    except Exception as error:  # array_record raises what its C++ library gives it
      raise OSError(f"{self._paths[shard]} cannot be read: {error}") from error
    if len(found) != len(positions) or any(len(record) != size for record in found):
      raise OSError(f"{self._paths[shard]} does not hold records of {size} bytes: it has changed since it was checked")
    return found

  def _reader(self, shard: int) -> Any:
    with self._lock:
      if self._readers[shard] is None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._readers[shard] = ArrayRecordReader(
          str(self._paths[shard]), options=_READER, file_reader_buffer_size=_READER_BUFFER
        )
      return self._readers[shard]

  def _decode(self, records: list[bytes]) -> dict[str, np.ndarray]:
    about = self._manifest
    raw = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), about.record_bytes)
    end = about.record_bytes - 4 * about.labelled
    x = np.ascontiguousarray(raw[:, :end]).view(about.stored).reshape(-1, *about.shape)
    batch = {"x": x.astype(about.dtype, copy=False)}
    if about.labelled:
      batch["label"] = np.ascontiguousarray(raw[:, end:]).view("<i4")[:, 0].astype(np.int32, copy=False)
    return batch


def read_texts(folder: Path, manifest: Manifest, split: str) -> list[str]:
  """What is said of each example of a split: the `text` of every line, in order.

  Raises:
    ValueError: the split has no texts, or a line has none.
  """
  about = manifest.splits[split].texts
  if about is None:
    raise ValueError(f"path: {folder} has no captions of {split!r}; set text_length=0, or prepare data that have them")
  lines = (folder / about.name).read_text(encoding="utf-8").split("\n")[:-1]
  if len(lines) != manifest.splits[split].count:
    raise ValueError(f"path: {folder / about.name} has {len(lines)} lines for {manifest.splits[split].count} examples")
  texts = []
  for number, line in enumerate(lines, start=1):
    try:
      texts.append(json.loads(line)["text"] + "")
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"path: {folder / about.name} has no text in line {number} ({error!r})") from error
  return texts


class Part(NamedTuple):
  """A split to be written.

  Attributes:
    total: number of examples.
    examples: (x, label) in order; the label is None where the data have none. Read once, one example at a time.
    texts: something in words about each example, in the same order.
  """

  total: int
  examples: Iterable[tuple[np.ndarray, int | None]]
  texts: Sequence[Mapping[str, Any]] | None = None


def write(output: Path, about: Manifest, parts: Mapping[str, Part], shard_bytes: int = SHARD_BYTES) -> Manifest:
  """Write prepared data: under a temporary name beside `output`, which gets its own when all is there.

  What fails is removed; a process that is killed leaves `.NAME.unfinished-*`, which can be deleted.

  Args:
    output: the folder to make.
    about: the manifest without its splits.
    parts: the splits by name.
    shard_bytes: about how many bytes of records go into one file.

  Returns:
    The manifest.

  Raises:
    FileExistsError: `output` is there already.
    ValueError: an example has another shape, type or level than `about` says, or their number is not `total`.
    OSError: the folder cannot be written.
  """
  output = Path(output)
  if output.exists() or output.is_symlink():
    raise FileExistsError(f"output: {output} is there already; delete it, or take another folder")
  output.parent.mkdir(parents=True, exist_ok=True)
  unfinished = output.with_name(f".{output.name}.unfinished-{secrets.token_hex(4)}")
  unfinished.mkdir()
  try:
    splits = {name: _write_split(unfinished, about, name, part, shard_bytes) for name, part in parts.items()}
    made = Manifest(**(vars(about) | {"splits": splits}))
    manifests.write(made, unfinished)
    unfinished.rename(output)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise
  return made


def _write_split(folder: Path, about: Manifest, name: str, part: Part, shard_bytes: int) -> Split:
  """Writes the files of a split, of equal numbers of examples up to one."""
  shards = max(1, min(part.total, -(-part.total * about.record_bytes // shard_bytes)))
  pixels, labels, files = hashlib.sha256(), hashlib.sha256(), []
  bar = tqdm(part.examples, desc=name, total=part.total, unit="example", disable=None)
  records = _records(iter(bar), about, pixels, labels)
  for shard in range(shards):
    count = part.total * (shard + 1) // shards - part.total * shard // shards
    path = folder / f"{name}-{shard:05d}-of-{shards:05d}.array_record"
    files.append(_write_file(path, records, count))
  if next(records, None) is not None:
    raise ValueError(f"total: {name!r} has more than the {part.total} examples announced")
  texts = None if part.texts is None else _write_texts(folder / f"{name}.jsonl", part.texts)
  return Split(part.total, pixels.hexdigest(), labels.hexdigest() if about.labelled else None, tuple(files), texts)


def _records(examples: Iterator[tuple[np.ndarray, int | None]], about: Manifest, pixels: Any, labels: Any) -> Any:
  for x, label in examples:
    if x.shape != about.shape or x.dtype != np.dtype(about.dtype):
      raise ValueError(f"x: an example is {x.dtype}{list(x.shape)}, not {about.dtype}{list(about.shape)}")
    if about.levels is not None and int(x.max()) >= about.levels:
      raise ValueError(f"x: an example holds the value {x.max()}, outside 0..{about.levels - 1}")
    if (label is not None) != about.labelled:
      raise ValueError(f"label: got {label!r} in data that are {'' if about.labelled else 'not '}labelled")
    record = x.astype(about.stored, copy=False).tobytes()
    pixels.update(record)
    if label is not None:
      bits = np.array(label, "<i4").tobytes()
      labels.update(bits)
      record += bits
    yield record


def _write_file(path: Path, records: Iterator[bytes], count: int) -> File:
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  written = 0
  try:
    writer = ArrayRecordWriter(str(path), _WRITER)
    for record in itertools.islice(records, count):
      writer.write(record)
      written += 1
    writer.close()
  except RuntimeError as error:  # what array_record makes of any trouble with the disk
    raise OSError(f"{path} cannot be written: {error}") from error
  if written != count:
    raise ValueError(f"total: {path.name} got {written} examples where {count} were announced")
  reader = ArrayRecordReader(str(path), options=_READER)
  if reader.num_records() != count:
    raise OSError(f"{path} holds {reader.num_records()} of {count} records: is the disk full?")
  reader.close()
  return File(path.name, path.stat().st_size, manifests.digest(path), count)


def _write_texts(path: Path, texts: Sequence[Mapping[str, Any]]) -> File:
  path.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
  return File(path.name, path.stat().st_size, manifests.digest(path), len(texts))
