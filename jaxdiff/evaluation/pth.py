"""Weights from PyTorch files (.pth), read without PyTorch and without unpickling: nothing in a file is ever executed.

A file holds a pickle, a program of a small stack machine, and the numbers of its tensors beside it. Here that program
is read opcode by opcode; only those that build dicts, lists, tuples and numbers are known, and of the names it may call
only those that make a tensor of a known type. Anything else is refused.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of files older than PyTorch 1.6, which are no zip files
_TYPES = {
  "torch FloatStorage": "<f4",
  "torch DoubleStorage": "<f8",
  "torch HalfStorage": "<f2",
  "torch LongStorage": "<i8",
  "torch IntStorage": "<i4",
  "torch ByteStorage": "|u1",
}
_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class _Name(NamedTuple):
  text: str


class _Storage(NamedTuple):
  dtype: str
  key: str
  size: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a state dict by name.

  Args:
    path: a file that `torch.save(module.state_dict(), path)` wrote, of either format.

  Returns:
    Arrays by name.

  Raises:
    ValueError: the file is damaged, no state dict, or its pickle asks for more than tensors; nothing of it has run.
    OSError: it cannot be read.
  """
  try:
    tensors, storages = _zip(path) if zipfile.is_zipfile(path) else _legacy(path)
    return {name: _array(tensor, storages) for name, tensor in tensors.items() if isinstance(tensor, _Tensor)}
  except ValueError as error:
    raise ValueError(f"{path} is not read: {error}") from error
  except (IndexError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is damaged or no state dict of PyTorch ({type(error).__name__}: {error})") from error


def _zip(path: Path) -> tuple[dict, Callable[[_Storage], bytes]]:
  with zipfile.ZipFile(path) as file:
    names = [name for name in file.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
      raise ValueError("it holds no data.pkl, or several")
    parts = {name: file.read(name) for name in file.namelist()}
  folder = names[0].removesuffix("data.pkl")
  if parts.get(f"{folder}byteorder", b"little") != b"little":
    raise ValueError("its numbers are big-endian")
  return _interpret(parts[names[0]]), lambda storage: parts[f"{folder}data/{storage.key}"]


def _legacy(path: Path) -> tuple[dict, Callable[[_Storage], bytes]]:
  with open(path, "rb") as file:
    if _interpret(file) != _MAGIC:
      raise ValueError("it is neither a zip file nor of PyTorch's older format")
    _interpret(file)
    if not _interpret(file)["little_endian"]:
      raise ValueError("its numbers are big-endian")
    tensors, keys = _interpret(file), _interpret(file)
    sizes = {tensor.storage.key: tensor.storage for tensor in tensors.values() if isinstance(tensor, _Tensor)}
    parts = {}
    for key in keys:
      storage = sizes[key]
      if int.from_bytes(file.read(8), "little") != storage.size:
        raise ValueError(f"its storage {key} has another size than its tensors say")
      parts[key] = file.read(storage.size * np.dtype(storage.dtype).itemsize)
  return tensors, lambda storage: parts[storage.key]


def _array(tensor: _Tensor, storages: Callable[[_Storage], bytes]) -> np.ndarray:
  storage, (offset, shape, strides) = tensor.storage, tensor[1:]
  values = np.frombuffer(storages(storage), storage.dtype)
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if len(values) != storage.size or min(offset, 0, *shape, *strides) < 0 or not math.prod(shape) <= len(values) > last:
    raise ValueError(f"a tensor of shape {shape} does not fit its storage of {len(values)} numbers")
  steps = [stride * values.itemsize for stride in strides]
  return np.lib.stride_tricks.as_strided(values[offset:], shape, steps).copy()


def _interpret(file: bytes | IO[bytes]) -> Any:
  """What one pickle describes, built without calling anything that it names."""
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def since_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  argument: Any
  for opcode, argument, _ in pickletools.genops(file):
    match opcode.name:
      case "PROTO" | "FRAME":
        pass
      case "STOP":
        return stack.pop()
      case "MARK":
        marks.append(len(stack))
      case name if name in _PUSH:
        stack.append(argument)
      case name if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
      case name if name in _EMPTY:
        stack.append(_EMPTY[name]())
      case "TUPLE":
        stack.append(tuple(since_mark()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        size = int(name[-1])
        stack[-size:] = [tuple(stack[-size:])]
      case "SETITEMS":
        items = since_mark()
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
      case "APPENDS":
        items = since_mark()
        stack[-1].extend(items)
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "GLOBAL":
        stack.append(_name(argument))
      case "REDUCE":
        arguments, name = stack.pop(), stack.pop()
        stack.append(_reduce(name, arguments))
      case "BUILD":
        stack.pop()  # attributes of the dict, such as the versions of its modules
      case "BINPERSID":
        _, kind, key, _, count = stack.pop()[:5]
        stack.append(_Storage(_TYPES[kind.text], str(key), int(count)))
      case name:
        raise ValueError(f"its pickle has the opcode {name}, which tensors do not need; refused, nothing was run")
  raise ValueError("its pickle has no end")


def _name(text: str) -> _Name:
  known = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", *_TYPES}
  if text not in known:
    raise ValueError(f"its pickle names {text.replace(' ', '.')}, which tensors do not need; refused, nothing was run")
  return _Name(text)


def _reduce(name: _Name, arguments: tuple[Any, ...]) -> Any:
  """What the call of a known name makes."""
  if name.text == "torch._utils _rebuild_tensor_v2":
    return _Tensor(*arguments[:4])
  if name.text == "torch._utils _rebuild_parameter":
    return arguments[0]
  if name.text == "collections OrderedDict" and not arguments:
    return {}
  raise ValueError(f"its pickle calls {name.text} with {len(arguments)} arguments; refused, nothing was run")
