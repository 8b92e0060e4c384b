"""What a data set is: `Source`, its checks, and the one way to make it from arrays.

A `Source` is a named split with random access: `source.examples[i]` is a dict of numpy arrays, `source.gather(indices)`
is a batch of them. Two kinds of `x` exist:

- integers in 0..levels-1 (images [h, w, c] or vectors [d]): stored unsigned, dequantized inside the train step;
- float32 of any shape with `levels=None`: continuous data, used as it is.

Everything that can be wrong with the data is refused here, before anything is compiled.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np

SPLITS = ("train", "test")
_SCAN = 4096  # examples read at a time by `validate`


@runtime_checkable
class Examples(Protocol):
  """Random access to examples. A method `gather(indices) -> batch`, where present, is used to read whole batches."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayExamples:
  """Examples held in memory: a dict of arrays with a common leading axis; a batch is one gather."""

  arrays: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(self.arrays["x"])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: array[index] for name, array in self.arrays.items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[indices] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedExamples:
  """Examples from elsewhere, with their texts, bytes [n, length], in memory."""

  examples: Examples
  text: np.ndarray

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {**self.examples[index], "text": self.text[index]}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {**gather(self.examples, indices), "text": self.text[indices]}


def gather(examples: Examples, indices: np.ndarray) -> dict[str, np.ndarray]:
  """The examples at `indices` as one batch, by their own method where they have one."""
  if (own := getattr(examples, "gather", None)) is not None:
    return own(indices)
  rows = [examples[int(i)] for i in indices]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class NoExamples:
  """None, of data whose shape alone is known."""

  shape: tuple[int, ...]
  dtype: type

  def __len__(self) -> int:
    return 0

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    raise IndexError("there are no examples")

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": np.empty((0, *self.shape), self.dtype)[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """One split of one data set.

  Args:
    name: what the data are, for messages and the fingerprint.
    examples: random access to dicts of `x`, and, where known, `label` (int32 scalar) and `text` (uint8 [length]).
    levels: number of integer levels of `x`; None for continuous data.
    shape: shape of one `x`.
    split: name of the split.
    content_hash: any string that changes when the data change; compared when a run is resumed.

  Raises:
    ValueError: the split is empty, though not meant to be, or its first example does not have the given shape and
      kind.

  Example:
    >>> source = from_arrays(np.zeros((5, 8, 8, 1), np.uint8), levels=17)
    >>> source.gather([0, 3])["x"].shape
    (2, 8, 8, 1)
  """

  name: str
  examples: Examples
  levels: int | None
  shape: tuple[int, ...]
  split: str
  content_hash: str

  def __post_init__(self):
    if self.levels is not None and self.levels < 2:
      raise ValueError(f"levels: got {self.levels}; pass the number of integer levels (256 for 8-bit images) or None")
    if isinstance(self.examples, NoExamples):
      return
    if len(self.examples) == 0:
      raise ValueError(f"split: {self.split!r} of {self.name!r} is empty; training and evaluation need examples")
    x = self.examples[0]["x"]
    _check_kind(x, self.levels, self.name)
    if x.shape != tuple(self.shape):
      raise ValueError(f"shape: examples of {self.name!r} have shape {x.shape}, not {tuple(self.shape)}")

  def __len__(self) -> int:
    return len(self.examples)

  def gather(self, indices: Iterable[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices` as one batch: a dict of arrays with a leading axis [b]."""
    return gather(self.examples, np.asarray(indices))


def from_arrays(
  x: np.ndarray,
  label: np.ndarray | None = None,
  *,
  text: np.ndarray | None = None,
  more: Mapping[str, np.ndarray] = MappingProxyType({}),
  levels: int | None = None,
  name: str = "arrays",
  split: str = "train",
) -> Source:
  """Makes a source from arrays in memory, checks every value, and keeps the smallest type that holds the levels.

  Args:
    x: integers [n, h, w, c] or [n, d] in 0..levels-1, or real numbers [n, ...] with `levels=None`.
    label: integers [n], optional.
    text: bytes uint8 [n, length] of `encode_text`, optional.
    more: other numbers of the examples by name, [n, ...]: 8-bit images, embeddings, scalars. Floats become float32.
    levels: number of integer levels; None for continuous data, which are kept as float32.
    name: what the data are.
    split: name of the split.

  Returns:
    A source whose `x` is uint8, uint16 or uint32 (by `levels`) or float32, whose `label` is int32, whose `text` uint8.

  Raises:
    ValueError: values that are not finite or not levels, a wrong shape or type, an empty split.

  Example:
    >>> from_arrays(np.array([[0.5, 2.0]])).gather([0])["x"].dtype
    dtype('float32')
  """
  if x.ndim < 2:
    raise ValueError(f"x: {name!r} has shape {x.shape}; expected a leading example axis and at least one more")
  if levels is None and x.dtype.kind == "f":
    with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite
      x = x.astype(np.float32)
  validate(Source(name, ArrayExamples({"x": x}), levels, x.shape[1:], split, content_hash=""))
  arrays = {"x": _read_only(x if levels is None else x.astype(np.min_scalar_type(levels - 1)))}
  if label is not None:
    arrays["label"] = _read_only(_int32_label(label, len(x), name))
  if text is not None:
    check_text(text, len(x), name)
    arrays["text"] = _read_only(text)
  for field, array in more.items():
    if array.shape[:1] != x.shape[:1] or array.dtype.kind not in "fiu":
      raise ValueError(f"{field}: {name!r} has {array.dtype}{list(array.shape)}; expected {len(x)} entries of numbers")
    kind = np.float32 if array.dtype.kind == "f" else np.uint8 if array.dtype == np.uint8 else np.int32
    arrays[field] = _read_only(array.astype(kind))
  return Source(name, ArrayExamples(arrays), levels, x.shape[1:], split, _content_hash(arrays))


def validate(source: Source) -> None:
  """Reads every example once and refuses data that would train a wrong model in silence.

  `from_arrays` has done this already; call it for sources of your own.

  Raises:
    ValueError: NaN or infinite values (how many, and the first example), values outside 0..levels-1, examples of
      another shape or type.

  Example:
    >>> validate(from_arrays(np.zeros((5, 2))))
  """
  broken, first_broken = 0, None
  for start in range(0, len(source), _SCAN):
    x = source.gather(np.arange(start, min(start + _SCAN, len(source))))["x"]
    _check_kind(x[0], source.levels, source.name)
    if x.shape[1:] != tuple(source.shape):
      raise ValueError(f"x: {source.name!r} has examples of shape {x.shape[1:]} from {start} on, not {source.shape}")
    rows = x.reshape(len(x), -1)
    if source.levels is not None:
      _check_levels(rows, source.levels, source, start)
    elif not np.isfinite(rows).all():
      unusable = ~np.isfinite(rows)
      broken += int(unusable.sum())
      first_broken = start + int(unusable.any(axis=1).argmax()) if first_broken is None else first_broken
  if broken:
    raise ValueError(
      f"x: {source.name!r} ({source.split}) holds {broken} values that are NaN or infinite in float32, the first in "
      f"example {first_broken}; remove or repair those examples"
    )


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
  """Refuses an unknown name and suggests the nearest known one.

  Example:
    >>> check_choice("split", "tset", SPLITS)
    Traceback (most recent call last):
    ...
    ValueError: split: got 'tset'; choose from 'train', 'test' (did you mean 'test'?)
  """
  choices = list(choices)
  if value in choices:
    return
  nearest = difflib.get_close_matches(value, choices, n=1)
  hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
  raise ValueError(f"{argument}: got {value!r}; choose from {', '.join(map(repr, choices))}{hint}")


def split_indices(split: str, count: int, held_out: int, seed: int) -> np.ndarray:
  """Positions of one split: the first `held_out` of one permutation of `seed` are the test set, the others train.

  Raises:
    ValueError: an unknown split, or `held_out` leaves one of the two splits empty.

  Example:
    >>> [len(split_indices(split, 10, 3, seed=0)) for split in SPLITS]
    [7, 3]
  """
  check_choice("split", split, SPLITS)
  if not 1 <= held_out < count:
    raise ValueError(f"held_out: got {held_out} of {count} examples; both splits need at least one example")
  order = np.random.default_rng(seed).permutation(count)
  return order[:held_out] if split == "test" else order[held_out:]


def split_fraction(split: str, count: int, test_fraction: float, seed: int) -> np.ndarray:
  """`split_indices` with the test set given as a fraction, rounded to at least one example."""
  if not 0 < test_fraction < 1:
    raise ValueError(f"test_fraction: got {test_fraction}; pass a number between 0 and 1, both excluded")
  return split_indices(split, count, max(1, round(test_fraction * count)), seed)


def _check_kind(x: np.ndarray, levels: int | None, name: str) -> None:
  if levels is None and x.dtype != np.float32:
    remedy = "pass levels (256 for 8-bit images)" if x.dtype.kind in "iu" else "convert to float32"
    raise ValueError(f"x: {name!r} has dtype {x.dtype} and levels=None, which means float32 data; {remedy}")
  if levels is not None and x.dtype.kind not in "iu":
    raise ValueError(
      f"x: {name!r} has dtype {x.dtype} where integers 0..{levels - 1} are expected (levels={levels}); pass the "
      "original integers, or levels=None for continuous data"
    )
  if levels is not None and x.ndim not in (1, 3):
    raise ValueError(f"x: {name!r} has examples of shape {x.shape}; expected [h, w, c] or [d] (grey images: c = 1)")


def _check_levels(rows: np.ndarray, levels: int, source: Source, start: int) -> None:
  for extreme in (rows.min(), rows.max()):
    if not 0 <= extreme < levels:
      example = start + int((rows == extreme).any(axis=1).argmax())
      raise ValueError(
        f"x: {source.name!r} ({source.split}) holds the value {extreme} in example {example}, outside "
        f"0..{levels - 1}; set levels to the number of levels of the data (got levels={levels})"
      )


def _int32_label(label: np.ndarray, count: int, name: str) -> np.ndarray:
  if label.shape != (count,) or label.dtype.kind not in "iu":
    raise ValueError(f"label: {name!r} has labels {label.dtype}{list(label.shape)}; expected {count} integers")
  limits = np.iinfo(np.int32)
  if count and not limits.min <= int(label.min()) <= int(label.max()) <= limits.max:
    raise ValueError(f"label: {name!r} has labels from {label.min()} to {label.max()}, which do not fit int32")
  return label.astype(np.int32)


def check_text(text: np.ndarray, count: int, name: str) -> None:
  """Refuses texts that are not bytes [count, length]."""
  if text.dtype != np.uint8 or text.ndim != 2 or len(text) != count:
    raise ValueError(
      f"text: {name!r} has texts {text.dtype}{list(text.shape)}; expected uint8 [{count}, length], as "
      "data.text.encode_text makes it of strings"
    )


def _read_only(array: np.ndarray) -> np.ndarray:
  view = np.ascontiguousarray(array).view()
  view.flags.writeable = False
  return view


def _content_hash(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(f"{name}:{arrays[name].dtype.str}:{arrays[name].shape};".encode())
    digest.update(arrays[name].data)
  return digest.hexdigest()[:16]
