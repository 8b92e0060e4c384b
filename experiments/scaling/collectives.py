"""Collectives of a compiled program: what each moves, and what a ring sends for it.

A ring of n devices sends, a device and an array of S bytes (the whole result, or what is reduced):
  all-gather, reduce-scatter, all-to-all   S (n - 1) / n
  all-reduce                               2 S (n - 1) / n
  collective-permute                       S
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
_BYTES |= {"s64": 8, "u64": 8}
_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))? \{([^}]*)\}")


class Collective(NamedTuple):
  """One collective: its kind, the bytes of the whole array, the size of a group, and whether it is of neighbours."""

  kind: str
  size: int
  group: int
  neighbours: bool


def ring_bytes(kind: str, size: float, group: int) -> float:
  """Bytes that each device of a ring sends."""
  if group == 1:
    return 0.0
  factor = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}
  return size * factor.get(kind, (group - 1) / group)


def collectives(hlo: str, devices: int) -> Iterator[Collective]:
  """The collectives in the text of an optimized HLO module that runs on so many devices.

  On TPUs a scattered sum is an all-reduce and a slice of it, in a computation that is named "all-reduce-scatter".
  """
  scattered = False
  for line in hlo.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      scattered = line.startswith("%all-reduce-scatter")
    if match := _OPERATION.search(line):
      kind, sizes = match["kind"], [_size(*array) for array in _ARRAY.findall(match["shape"])]
      # An asynchronous gather names its operand and its result, a permutation also its context.
      whole = max(sizes) if match["start"] and kind != "all-reduce" else sum(sizes)
      group = _group(line, devices)
      whole *= len(group) if kind == "reduce-scatter" else 1
      kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
      yield Collective(kind, whole, len(group), bool(np.ptp(group) == len(group) - 1))


def _size(dtype: str, shape: str) -> int:
  size = _BYTES.get(dtype, 0)
  for dimension in filter(None, shape.split(",")):
    size *= int(dimension)
  return size


def _group(line: str, devices: int) -> np.ndarray:
  """The devices of the first group."""
  if match := _AXES.search(line):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    kept = match[5].replace("'", "").split(",")
    sizes = [int(size) for size in axes.values()]
    order = _iota(match[3] or match[2], match[4]) if match[2] else np.arange(math.prod(sizes))
    return order.reshape(sizes)[tuple(slice(None) if axis in kept else 0 for axis in axes)].ravel()
  if match := re.search("replica_groups=" + _IOTA, line):
    return _iota(match[2], match[3]).reshape(_numbers(match[1]))[0]
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return np.array(_numbers(match[1]))
  return np.arange(devices)


def _iota(shape: str, order: str | None) -> np.ndarray:
  """0, 1, 2, ... in an array of this shape, its axes in this order, flat."""
  sizes = _numbers(shape)
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else range(len(sizes))).ravel()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]
