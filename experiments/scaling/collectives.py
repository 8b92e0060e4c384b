"""Collectives of a compiled program: what each moves, and what a ring sends for it.

A ring of n devices sends, a device and an array of S bytes (the whole result, or what is reduced):
  all-gather, reduce-scatter, all-to-all   S (n - 1) / n
  all-reduce                               2 S (n - 1) / n
  collective-permute                       S
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
_BYTES |= {"s64": 8, "u64": 8}
_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")


class Collective(NamedTuple):
  """One collective: its kind, the bytes of the whole array, the devices of a group, and whether these are neighbours."""

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
  """The collectives in the text of an optimized HLO module that runs on so many devices."""
  for line in hlo.splitlines():
    if match := _OPERATION.search(line):
      kind, sizes = match["kind"], [_size(*array) for array in _ARRAY.findall(match["shape"])]
      # An asynchronous gather names its operand and its result, a permutation also its context.
      whole = max(sizes) if match["start"] and kind != "all-reduce" else sum(sizes)
      group, neighbours = _groups(line, devices)
      yield Collective(kind, whole * group if kind == "reduce-scatter" else whole, group, neighbours)


def _size(dtype: str, shape: str) -> int:
  size = _BYTES.get(dtype, 0)
  for dimension in filter(None, shape.split(",")):
    size *= int(dimension)
  return size


def _groups(line: str, devices: int) -> tuple[int, bool]:
  """The size of the groups, and whether the first one is of consecutive devices."""
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[[\d,]+\](T\([\d,]+\))?", line):
    return int(match[2]), match[3] is None
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    first = [int(device) for device in match[1].split(",")]
    return len(first), first[-1] - first[0] == len(first) - 1
  return devices, True
