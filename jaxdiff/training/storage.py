"""Steps on disk: items in one directory a step, written by orbax all or none, read by every process for itself.

Orbax writes a step under a temporary name and renames it when all processes have written their part, so a directory
whose name is a number is complete. JSON items carry a checksum of themselves, arrays those of their manifest.

Orbax's own restore ends in a barrier, which a process that cannot read its part never reaches: the others would wait
for it until a time-out. So every process reads without barriers, all exchange what went wrong (`together`), and all
go on or all give up. Nothing is ever unpickled.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxdiff.training.manifest import Manifest, describe, differences, manifest

T = TypeVar("T")
_CHECKSUM = "__crc32__"
_FULL = ("No space left", "File too large", "quota exceeded")  # ENOSPC, EFBIG, EDQUOT


class CheckpointError(RuntimeError):
  """There are checkpoints, but none of them can be read; or one could not be written."""


class SaveError(CheckpointError):
  """A step could not be written: the disk is full, for example. Those written before stay."""


class UnreadableError(Exception):
  """This step is damaged."""


class StepWriter:
  """Writes steps into a directory in the background; an error is raised by the next call.

  Args:
    directory: where the step directories go; created if missing. What was left unfinished there is removed.
    keep: how many of the newest to keep; None for all.
    keep_every: of the older ones, those whose step is a multiple of this stay too.
  """

  _writing: ClassVar["StepWriter | None"] = None  # the one that saved last, of all in this process

  def __init__(self, directory: str | Path, keep: int | None = None, keep_every: int | None = None):
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options)
    self._failed = False

  def save(self, step: int, arrays: dict[str, PyTree], values: dict[str, dict]) -> None:
    """Writes pytrees of arrays, which may change once this returns, and dicts of JSON values."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    items |= {name: ocp.args.JsonSave(_sealed(value)) for name, value in values.items()}
    if (other := StepWriter._writing) not in (None, self):
      other.wait()  # of several processes, orbax confuses the barriers of two saves at a time
    StepWriter._writing = self
    with self._errors():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def wait(self) -> None:
    """Returns when everything saved so far is complete on disk."""
    with self._errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the threads; an error that was raised before is not raised again."""
    if StepWriter._writing is self:
      StepWriter._writing = None
    with contextlib.suppress(SaveError) if self._failed else contextlib.nullcontext(), self._errors():
      self._manager.close()

  def set_aside(self, steps: list[int]) -> None:
    """Renames damaged steps to "<step>.corrupt", so that they can be written again."""
    if steps and jax.process_index() == 0:
      for step in steps:
        target = self.directory / f"{step}.corrupt"
        shutil.rmtree(target, ignore_errors=True)
        (self.directory / str(step)).rename(target)
    if steps:
      together(lambda: None)
      self._manager.reload()

  @contextlib.contextmanager
  def _errors(self):
    try:
      yield
    except (MemoryError, SaveError, ocp.checkpoint_manager.StepAlreadyExistsError):
      raise
    except Exception as error:
      self._failed = True
      complete = steps_in(self.directory)
      kept = f"the last complete one is of step {complete[-1]} and stays" if complete else "there is no complete one"
      full = next((words for words in _FULL if words.lower() in str(error).lower()), None)
      reason = f"the disk is full or a limit is reached: {full}" if full else _one_line(error)
      raise SaveError(
        f"writing to {self.directory} failed ({reason}); {kept}. {'Free space' if full else 'Mend the cause'} and "
        "start again to continue from there"
      ) from error


def steps_in(directory: Path) -> list[int]:
  """The complete steps, in order; the same on all processes if they see the same directory."""
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and path.is_dir())


def read_value(directory: Path, step: int, name: str) -> dict[str, Any]:
  """Reads the JSON item `name`; call it in `together`."""
  value = json.loads((directory / str(step) / name / "metadata").read_text())
  if value.pop(_CHECKSUM, None) not in (None, _checksum(value)):  # those of version 0.1 have none
    raise ValueError(f"the checksum of {name} does not match")
  return value


def read_arrays(directory: Path, step: int, name: str, abstract: PyTree) -> PyTree:
  """Reads the item `name`, or what `abstract` has of it, onto the shardings of `abstract`; call it in `together`."""
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.restore(directory / str(step) / name, args=args)


def verify(tree: PyTree, saved: Manifest) -> None:
  """Compares arrays with the manifest written beside them.

  Raises:
    UnreadableError: they differ.
  """
  if changed := [path for path, entry in manifest(tree).items() if entry != saved[path]]:
    raise UnreadableError(f"the checksums of {len(changed)} arrays do not match, first {changed[0]}")


def read_saved(directory: Path, step: int, name: str, group: str, abstract: PyTree, saved: Manifest) -> PyTree:
  """Reads and verifies entry `group` of the item `name`, in the dtypes that it was saved in.

  Args:
    directory: that of the steps.
    step: one of them.
    name: an item with arrays.
    group: a name at the top of that item.
    abstract: what is below: names and shapes. Leaves with a sharding are placed there, others on the first device.
    saved: its manifest.

  Raises:
    ValueError: `saved` has other names or shapes than `abstract`.
    UnreadableError: it is damaged.
  """
  was, given = ({path: e["shape"] for path, e in entries.items()} for entries in (saved, describe(abstract)))
  if found := differences(was, given):
    raise ValueError(f"checkpoint {step} holds another model: {found}")

  def target(path, leaf):
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, saved[jax.tree_util.keystr(path)]["dtype"], sharding=sharding)

  targets = {group: jax.tree_util.tree_map_with_path(target, abstract)}
  tree = together(lambda: read_arrays(directory, step, name, targets))[group]
  verify(tree, saved)
  return tree


def together(read: Callable[[], T]) -> T:
  """What `read()` returns, on all processes or on none.

  Args:
    read: reads files, and waits for no other process; for damaged ones orbax raises anything from KeyError to a bare
      Exception.

  Raises:
    UnreadableError: on every process if `read` failed on one.
  """
  result, reason = cast(T, None), ""
  try:
    result = read()
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    reason = _one_line(error)
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(bool(reason)))
    if failed.any():
      reason = reason or f"process {int(np.argmax(failed))} cannot read it"
  if reason:
    raise UnreadableError(reason)
  return result


def _sealed(value: dict[str, Any]) -> dict[str, Any]:
  return {**value, _CHECKSUM: _checksum(json.loads(json.dumps(value)))}


def _checksum(value: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _one_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
