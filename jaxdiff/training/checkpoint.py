"""Checkpoints of a run: train state, position in the data, fingerprint and manifest, saved together or not at all.

Each step directory holds the items state, data, fingerprint and manifest (`jaxdiff.training.storage` says how they are
written and read). `Checkpoints` writes and resumes a run, on any number of processes and devices and with any sharding;
`load_params` reads the parameters alone, for sampling and evaluation. Both use the newest checkpoint that can be read
and say which ones could not.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxdiff.training import storage
from jaxdiff.training.manifest import describe, differences, manifest, within
from jaxdiff.training.state import TrainState
from jaxdiff.training.storage import CheckpointError, UnreadableError


class FingerprintError(ValueError):
  """The checkpoints in the directory belong to a run with another seed, data set, batch size or model."""


class Checkpoints:
  """The checkpoints of one run in one directory; saving is asynchronous, `wait` or leaving the context completes it.

  With several processes, all of them make and call it alike, on one shared file system.

  Args:
    directory: where the step directories go; created if missing.
    fingerprint: what must be equal for a run to be continued (seed, batch size, data, configuration): a dict of JSON
      values.
    keep: how many of the newest checkpoints to keep, at least 1.
    keep_every: checkpoints whose step is a multiple of this are kept for ever; None for none.

  Raises:
    ValueError: `keep` or `keep_every` < 1.
    TypeError: `fingerprint` cannot be written as JSON.

  Example:
    ```python
    with Checkpoints(workdir / "checkpoints", {"seed": 0, "batch_size": 128}) as checkpoints:
      state = checkpoints.restore_latest(abstract_state(state), iterator) or state
      state = train(state, step_fn, iterator, checkpoints=checkpoints, ...)
    ```
  """

  def __init__(
    self, directory: str | Path, fingerprint: dict[str, Any], *, keep: int = 3, keep_every: int | None = None
  ):
    if keep < 1:
      raise ValueError(f"keep={keep!r}: at least 1 checkpoint must be kept")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every={keep_every!r}: must be at least 1, or None")
    self._fingerprint = json.loads(json.dumps(fingerprint))
    self._writer = storage.StepWriter(directory, keep, keep_every)
    self.directory = self._writer.directory

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self._writer.close()

  def wait(self) -> None:
    """Returns when everything saved so far is complete on disk.

    Raises:
      SaveError: it could not be written, e.g. because the disk is full; names the last good checkpoint.
    """
    self._writer.wait()

  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none; waits."""
    self.wait()
    return max(storage.steps_in(self.directory), default=None)

  def save(self, state: TrainState, iterator_state: dict[str, Any]) -> None:
    """Starts to save `state` under its step; it may be donated once this returns.

    Args:
      state: the train state; of several processes, the global arrays.
      iterator_state: the position of the data after that step, JSON values, the same on all processes: of the
        iterators of `jaxdiff.data.pipeline`, {"next_index": step}.

    Raises:
      SaveError: this checkpoint, or the one before, could not be written; names the last good one.
      TypeError: `iterator_state` cannot be written as JSON.
    """
    values = {"data": json.loads(json.dumps(iterator_state)), "fingerprint": self._fingerprint}
    self._writer.save(int(state.step), {"state": state}, {**values, "manifest": manifest(state)})

  def restore_latest(self, abstract_state: TrainState, iterator: Any) -> TrainState | None:
    """Restores the newest readable checkpoint onto the devices of `abstract_state` and moves `iterator` to its
    position.

    Newer ones that cannot be read are reported by a warning and renamed to "<step>.corrupt", so that their steps can
    be saved again. With several processes, what one of them cannot read none of them uses.

    Args:
      abstract_state: shapes, dtypes and shardings from `jaxdiff.training.abstract_state`; any number of processes and
        devices, any sharding.
      iterator: an iterator of the same pipeline, with `set_state(dict)`; set to where it stood when the checkpoint was
        saved.

    Returns:
      The restored state, or None if the directory has no checkpoint.

    Raises:
      FingerprintError: the newest readable checkpoint belongs to another run; names the entries that differ.
      CheckpointError: there are checkpoints but none can be read; gives the reason for each.
    """
    self.wait()
    unreadable = {}
    for step in reversed(storage.steps_in(self.directory)):
      try:
        state = self._restore(step, abstract_state, iterator)
      except UnreadableError as error:
        unreadable[step] = str(error)
        continue
      _warn(self.directory, unreadable, step)
      self._writer.set_aside(list(unreadable))
      return state
    _raise_if_any(self.directory, unreadable)
    return None

  def _restore(self, step: int, abstract_state: TrainState, iterator: Any) -> TrainState:
    fingerprint, saved, position = (_value(self.directory, step, name) for name in ("fingerprint", "manifest", "data"))
    arrays = {path: {"shape": entry["shape"], "dtype": entry["dtype"]} for path, entry in saved.items()}
    if found := differences(fingerprint, self._fingerprint) or differences(arrays, describe(abstract_state)):
      raise FingerprintError(
        f"checkpoint {step} in {self.directory} belongs to another run: {found}; restore these settings or use "
        "another directory"
      )
    state = storage.together(lambda: storage.read_arrays(self.directory, step, "state", abstract_state))
    storage.verify(state, saved)
    storage.together(lambda: iterator.set_state(position))
    return state


def load_params(directory: str | Path, abstract_params: PyTree, *, ema: bool = True) -> tuple[PyTree, int]:
  """Reads the parameters from the newest readable checkpoint, without optimizer, data or fingerprint; changes nothing
  on disk.

  Args:
    directory: the directory given to `Checkpoints`.
    abstract_params: the names and shapes of the parameters, e.g. from `jax.eval_shape`. Leaves with a sharding are
      placed there, others on the first device; dtypes are those saved (float32 or wider for the average).
    ema: whether to read the moving average or the last iterate.

  Returns:
    (params, step).

  Raises:
    ValueError: there is no checkpoint, or its parameters have other names or shapes than `abstract_params`.
    CheckpointError: there are checkpoints but none can be read.

  Example:
    ```python
    params, step = load_params(workdir / "checkpoints", jax.eval_shape(init, jax.random.key(0)))
    ```
  """
  group = "ema_params" if ema else "params"
  return _newest(directory, lambda path, step: _read_params(path, step, group, abstract_params))


def load_fingerprint(directory: str | Path) -> dict[str, Any]:
  """Reads the fingerprint that was given to `Checkpoints`, from the newest readable checkpoint.

  Args:
    directory: the directory given to `Checkpoints`.

  Returns:
    The fingerprint, its tuples as lists.

  Raises:
    ValueError: there is no checkpoint.
    CheckpointError: there are checkpoints but none can be read.
  """

  return _newest(directory, lambda path, step: _value(path, step, "fingerprint"), warn=False)[0]


def _newest(directory: str | Path, read: Callable[[Path, int], Any], warn: bool = True) -> tuple[Any, int]:
  """What `read(directory, step)` returns of the newest checkpoint that it can read, and its step."""
  directory, unreadable = Path(directory).absolute(), {}
  for step in reversed(storage.steps_in(directory)):
    try:
      result = read(directory, step)
    except UnreadableError as error:
      unreadable[step] = str(error)
      continue
    if warn:
      _warn(directory, unreadable, step)
    return result, step
  _raise_if_any(directory, unreadable)
  raise ValueError(
    f"directory={str(directory)!r} holds no checkpoint: train first, or give the directory of a trained run"
  )


def _value(directory: Path, step: int, name: str) -> dict[str, Any]:
  return storage.together(lambda: storage.read_value(directory, step, name))


def _read_params(directory: Path, step: int, group: str, abstract_params: PyTree) -> PyTree:
  saved = _value(directory, step, "manifest")
  try:
    return storage.read_saved(directory, step, "state", group, abstract_params, within(saved, f".{group}"))
  except ValueError as error:
    raise ValueError(f"abstract_params: {error}; use the run's own configuration") from None


def _warn(directory: Path, unreadable: dict[int, str], used: int) -> None:
  for step, reason in unreadable.items():
    warnings.warn(f"checkpoint {step} in {directory} cannot be read ({reason}); using checkpoint {used}", stacklevel=3)


def _raise_if_any(directory: Path, unreadable: dict[int, str]) -> None:
  if unreadable:
    reasons = "\n".join(f"  checkpoint {step}: {reason}" for step, reason in unreadable.items())
    raise CheckpointError(
      f"none of the checkpoints in {directory} can be read:\n{reasons}\n"
      "Restore the directory from a copy, or choose an empty one to start again"
    )
