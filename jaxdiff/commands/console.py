"""What the commands share: lines on the terminal, of one process alone, and the sizes of their batches."""

import sys
from pathlib import Path

import jax

from jaxdiff.schema import ConfigError


def first_process() -> bool:
  """Whether this is the only process, or the first of several: the one that reports."""
  return jax.process_index() == 0


def say(message: str) -> None:
  """A line on standard error."""
  if first_process():
    print(message, file=sys.stderr, flush=True)


def list_files(workdir: Path, *names: str) -> None:
  """Print the paths of what is there."""
  for name in names:
    if (workdir / name).exists():
      print(workdir / name)


def check_batch(name: str, size: int, devices: int) -> None:
  """Refuse a batch size that the devices cannot share."""
  if size % devices:
    nearest = max(devices, devices * round(size / devices))
    raise ConfigError(f"config.{name} = {size} cannot be split over {devices} devices; take {nearest}")


def batch_size(wanted: int, examples: int, devices: int) -> int:
  """The wanted batch size, or what the examples fill."""
  if examples < devices:
    raise ConfigError(
      f"{examples} examples cannot be split over {devices} devices: evaluate more, or use fewer devices"
    )
  return min(wanted, examples - examples % devices)
