"""Checkpoints of a run: train state, data iterator, fingerprint and manifest, saved together or not at all (orbax).

Each step directory holds the items state, data, fingerprint and manifest; orbax writes it under a temporary name and
renames it when it is complete. `Checkpoints` writes and resumes a run; `load_params` reads the parameters alone, for
sampling and evaluation. Both use the newest checkpoint that can be read and say which ones could not. Nothing is ever
unpickled.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxdiff.training.manifest import Manifest, describe, manifest
from jaxdiff.training.state import TrainState


class CheckpointError(RuntimeError):
  """There are checkpoints, but none of them can be read."""


class FingerprintError(ValueError):
  """The checkpoints in the directory belong to a run with another seed, data set, batch size or model."""


class _UnreadableError(Exception):
  """This checkpoint is damaged."""


class Checkpoints:
  """The checkpoints of one run in one directory; saving is asynchronous, `wait` or leaving the context completes it.

  Args:
    directory: where the step directories go; created if missing.
    fingerprint: what must be equal for a run to be continued (seed, batch size, data, configuration): a dict of JSON
      values.
    keep: how many of the newest checkpoints to keep, at least 1.

  Raises:
    ValueError: `keep` < 1.
    TypeError: `fingerprint` cannot be written as JSON.

  Example:
    ```python
    with Checkpoints(workdir / "checkpoints", {"seed": 0, "batch_size": 128}) as checkpoints:
      state = checkpoints.restore_latest(abstract_state(state), iterator) or state
      state = train(state, step_fn, iterator, checkpoints=checkpoints, ...)
    ```
  """

  def __init__(self, directory: str | Path, fingerprint: dict[str, Any], *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep={keep!r}: at least 1 checkpoint must be kept")
    self.directory = Path(directory).absolute()
    self._fingerprint = json.loads(json.dumps(fingerprint))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info) -> None:
    self._manager.close()

  def wait(self) -> None:
    """Returns when everything saved so far is complete on disk."""
    self._manager.wait_until_finished()

  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    self.wait()
    return self._manager.latest_step()

  def save(self, state: TrainState, iterator: Any) -> None:
    """Saves `state` under its step with the position of the grain `iterator`; both may change once this returns."""
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain.checkpoint.CheckpointSave(iterator),
      fingerprint=ocp.args.JsonSave(self._fingerprint),
      manifest=ocp.args.JsonSave(manifest(state)),
    )
    self._manager.save(int(state.step), args=items)

  def restore_latest(self, abstract_state: TrainState, iterator: Any) -> TrainState | None:
    """Restores the newest readable checkpoint onto the devices of `abstract_state` and moves `iterator` to its
    position.

    Newer ones that cannot be read are reported by a warning and renamed to "<step>.corrupt", so that their steps can
    be saved again.

    Args:
      abstract_state: shapes, dtypes and shardings from `jaxdiff.training.abstract_state`; any number of devices.
      iterator: the grain iterator of the same pipeline; set to where it stood when the checkpoint was saved.

    Returns:
      The restored state, or None if the directory has no checkpoint.

    Raises:
      FingerprintError: the newest readable checkpoint belongs to another run; names the entries that differ.
      CheckpointError: there are checkpoints but none can be read; gives the reason for each.
    """
    unreadable = {}
    for step in reversed(self._manager.all_steps()):
      try:
        state = self._restore(step, abstract_state, iterator)
      except _UnreadableError as error:
        unreadable[step] = str(error)
        continue
      _warn(self.directory, unreadable, step)
      self._set_aside(unreadable)
      return state
    _raise_if_any(self.directory, unreadable)
    return None

  def _restore(self, step: int, abstract_state: TrainState, iterator: Any) -> TrainState:
    saved = _read(self._manager, step, fingerprint=ocp.args.JsonRestore(), manifest=ocp.args.JsonRestore())
    given, where = describe(abstract_state), f"checkpoint {step} in {self.directory}"
    differences = _differences(saved["fingerprint"], self._fingerprint)
    if differences := differences or _differences(_described(saved["manifest"]), given):
      raise FingerprintError(
        f"{where} belongs to another run: {differences}; restore these settings or use another directory"
      )
    state_args, data_args = ocp.args.StandardRestore(abstract_state), grain.checkpoint.CheckpointRestore(iterator)
    state = _read(self._manager, step, state=state_args, data=data_args)["state"]
    _verify(state, saved["manifest"])
    return state

  def _set_aside(self, steps: dict[int, str]) -> None:
    for step in steps:
      target = self.directory / f"{step}.corrupt"
      shutil.rmtree(target, ignore_errors=True)
      (self.directory / str(step)).rename(target)
    if steps:
      self._manager.reload()


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
  return _newest(directory, lambda manager, step: _read_params(manager, step, group, abstract_params))


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

  def read(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return _read(manager, step, fingerprint=ocp.args.JsonRestore())["fingerprint"]

  return _newest(directory, read, warn=False)[0]


def _newest(directory: str | Path, read: Callable[..., Any], warn: bool = True) -> tuple[Any, int]:
  """What `read(manager, step)` returns of the newest checkpoint that it can read, and its step."""
  directory, unreadable = Path(directory).absolute(), {}
  if directory.is_dir():
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False)) as manager:
      for step in reversed(manager.all_steps()):
        try:
          result = read(manager, step)
        except _UnreadableError as error:
          unreadable[step] = str(error)
          continue
        if warn:
          _warn(directory, unreadable, step)
        return result, step
  _raise_if_any(directory, unreadable)
  raise ValueError(
    f"directory={str(directory)!r} holds no checkpoint: train first, or give the directory of a trained run"
  )


def _read_params(manager: ocp.CheckpointManager, step: int, group: str, abstract_params: PyTree) -> PyTree:
  saved = _read(manager, step, manifest=ocp.args.JsonRestore())["manifest"]
  saved = {path.removeprefix(f".{group}"): entry for path, entry in saved.items() if path.startswith(f".{group}")}
  shapes = {path: entry["shape"] for path, entry in describe(abstract_params).items()}
  if differences := _differences({path: entry["shape"] for path, entry in saved.items()}, shapes):
    raise ValueError(
      f"abstract_params: checkpoint {step} holds another model: {differences}; use the run's own configuration"
    )

  def target(path, leaf):
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, saved[jax.tree_util.keystr(path)]["dtype"], sharding=sharding)

  item = {group: jax.tree_util.tree_map_with_path(target, abstract_params)}
  restore_args = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
  params = _read(manager, step, state=args)["state"][group]
  _verify(params, saved)
  return params


def _read(manager: ocp.CheckpointManager, step: int, **items: ocp.args.CheckpointArgs) -> dict[str, Any]:
  """Restores items; for damaged ones orbax raises anything from KeyError to a bare Exception."""
  try:
    restored = manager.restore(step, args=ocp.args.Composite(**items))
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise _UnreadableError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
  return {name: restored[name] for name in items}


def _verify(tree: PyTree, saved: Manifest) -> None:
  if changed := [path for path, entry in manifest(tree).items() if entry != saved[path]]:
    raise _UnreadableError(f"the checksums of {len(changed)} arrays do not match, first {changed[0]}")


def _described(saved: Manifest) -> Manifest:
  return {path: {"shape": entry["shape"], "dtype": entry["dtype"]} for path, entry in saved.items()}


def _differences(saved: dict[str, Any], given: dict[str, Any], limit: int = 5) -> str:
  """The entries of two nested dicts that differ, as text; empty if none."""
  saved, given = _flatten(saved), _flatten(given)
  names = [
    name for name in sorted(saved.keys() | given.keys()) if saved.get(name, "absent") != given.get(name, "absent")
  ]
  texts = [f"{name} was {saved.get(name, 'absent')!r}, now {given.get(name, 'absent')!r}" for name in names[:limit]]
  return ", ".join(texts + ([f"and {len(names) - limit} more"] if len(names) > limit else []))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return flat


def _warn(directory: Path, unreadable: dict[int, str], used: int) -> None:
  for step, reason in unreadable.items():
    warnings.warn(f"checkpoint {step} in {directory} cannot be read ({reason}); using checkpoint {used}", stacklevel=4)


def _raise_if_any(directory: Path, unreadable: dict[int, str]) -> None:
  if unreadable:
    reasons = "\n".join(f"  checkpoint {step}: {reason}" for step, reason in unreadable.items())
    raise CheckpointError(
      f"none of the checkpoints in {directory} can be read:\n{reasons}\n"
      "Restore the directory from a copy, or choose an empty one to start again"
    )
