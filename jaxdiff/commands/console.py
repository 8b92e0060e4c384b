"""What the commands share: lines on the terminal, of one process alone, and the sizes of their batches."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.data.examples import Source
from jaxdiff.schema import ConfigError

T = TypeVar("T")
_FAR, _MANY = 1.5, 0.1  # of values in [-1, 1]; the part of them that may be further away


def first_process() -> bool:
  """Whether this is the only process, or the first of several: the one that reports."""
  return jax.process_index() == 0


def say(message: str) -> None:
  """A line on standard error."""
  if first_process():
    print(message, file=sys.stderr, flush=True)


def together(action: Callable[[], T]) -> T:
  """What `action` returns, where it does on all processes; else all of them fail, with the first message.

  Without this a process that meets a mistake of its own would leave, and the others wait for it.
  """
  if jax.process_count() == 1:
    return action()
  result, message = None, None
  try:
    result = action()
  except (ConfigError, OSError) as error:
    message = f"process {jax.process_index()}: {error}"
  if messages := [text for text in parallel.gather_json(message) if text is not None]:
    raise ConfigError(messages[0])
  return result  # type: ignore[return-value]


def can_be_shown(source: Source) -> bool:
  """Whether samples of these data are images or points in the plane."""
  return source.shape == (2,) or (len(source.shape) == 3 and source.shape[-1] in (1, 3))


def warn_far(source: Source, x: np.ndarray, remedy: str) -> None:
  """Say that many values of images lie far outside [-1, 1], where those of their data do not."""
  if source.levels is None or len(source.shape) != 3:
    return
  share = float((np.abs(x) > _FAR).mean())
  if share > _MANY:
    say(
      f"jaxdiff: warning: {share:.0%} of the values lie outside [-{_FAR}, {_FAR}], those of images in [-1, 1]: {remedy}"
    )


def as_text(settings: Mapping[str, Any]) -> np.ndarray:
  """Settings as a JSON text, an array that an .npz file holds without pickle."""
  return np.asarray(json.dumps(settings, default=str))


def list_files(workdir: Path, *names: str) -> None:
  """Print the paths of what is there."""
  for name in names:
    if (workdir / name).exists():
      print(workdir / name)


def check_batch(name: str, size: int, devices: int, microbatches: int = 1) -> None:
  """Refuse a batch size that the devices cannot share, each in so many parts."""
  if size % (parts := devices * microbatches):
    nearest = max(parts, parts * round(size / parts))
    each = f" in {microbatches} microbatches each" if microbatches > 1 else ""
    raise ConfigError(f"config.{name} = {size} cannot be split over {devices} devices{each}; take {nearest}")


def batch_size(wanted: int, examples: int, devices: int) -> int:
  """The wanted batch size, or what the examples fill."""
  if examples < devices:
    raise ConfigError(
      f"{examples} examples cannot be split over {devices} devices: evaluate more, or use fewer devices"
    )
  return min(wanted, examples - examples % devices)
