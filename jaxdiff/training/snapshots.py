"""Snapshots of the power-function averages, from which the average of any length at any step is made afterwards.

A snapshot is a directory workdir/snapshots/STEP, written like a checkpoint (`jaxdiff.training.storage`) and never
deleted: the items profile (step and lengths), average_0, average_1, ... and manifest. `reconstruct` combines them by
the weights of `jaxdiff.training.ema.combination` and holds two trees at a time, however many snapshots there are.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxdiff.training import ema, storage
from jaxdiff.training.manifest import manifest
from jaxdiff.training.state import TrainState

_NEGLIGIBLE = 1e-7  # of the largest weight; two averages differ by little, and their sum has the rounding of float32


class Snapshots:
  """Where a run stores its averages; saving is asynchronous, `wait` or leaving the context completes it.

  Args:
    directory: where the step directories go; created if missing.
    lengths: the relative widths given to `make_train_step`, at least one.

  Raises:
    ValueError: `lengths` is empty.

  Example:
    ```python
    with Snapshots(workdir / "snapshots", lengths=(0.05, 0.1)) as snapshots:
      ...
      snapshots.save(state)
    params, step, distance = reconstruct(workdir / "snapshots", abstract_params, length=0.07)
    ```
  """

  def __init__(self, directory: str | Path, lengths: Sequence[float]):
    if not lengths:
      raise ValueError("lengths: is empty; name the lengths of the averages, e.g. (0.05, 0.1)")
    self._lengths = [float(length) for length in lengths]
    self._writer = storage.StepWriter(directory)
    self._there = set(storage.steps_in(self._writer.directory))

  def __enter__(self) -> "Snapshots":
    return self

  def __exit__(self, *exc_info) -> None:
    self._writer.close()

  def wait(self) -> None:
    """Returns when everything saved so far is complete on disk."""
    self._writer.wait()

  def save(self, state: TrainState) -> None:
    """Starts to save `state.averages`, unless there is a snapshot of this step: a run that continues from an earlier
    step makes the same again.

    Raises:
      ValueError: `state` has another number of averages than there are lengths.
      SaveError: this snapshot, or the one before, could not be written.
    """
    if len(state.averages) != len(self._lengths):
      raise ValueError(f"state: has {len(state.averages)} averages for the lengths {self._lengths}")
    step = int(state.step)
    if step in self._there:
      return
    self._there.add(step)
    arrays = {_item(i): {"average": average} for i, average in enumerate(state.averages)}
    checksums = {name: manifest(tree["average"]) for name, tree in arrays.items()}
    self._writer.save(step, arrays, {"profile": {"step": step, "lengths": self._lengths}, "manifest": checksums})


def stored(directory: str | Path) -> list[tuple[int, tuple[float, ...]]]:
  """The snapshots in `directory`: (step, lengths) of each, in order. Those that cannot be read are left out, with a
  warning.
  """
  directory, found = Path(directory).absolute(), []
  for step in storage.steps_in(directory):
    try:
      profile = storage.together(lambda: storage.read_value(directory, step, "profile"))  # noqa: B023, called at once
      found.append((step, tuple(profile["lengths"])))
    except storage.UnreadableError as error:
      _warn(directory, step, error)
  return found


def reconstruct(
  directory: str | Path, abstract_params: PyTree, length: float, step: int | None = None
) -> tuple[PyTree, int, float]:
  """The power-function average of any length at any step, as near as the snapshots allow.

  Exact for the length and step of a snapshot. Snapshots that cannot be read are reported by a warning, and the others
  are combined.

  Args:
    directory: that given to `Snapshots`.
    abstract_params: the names and shapes of the parameters. Leaves with a sharding are placed there, others on the
      first device.
    length: relative width σ_rel, in (0, 1 / sqrt(12)].
    step: the step of the average; that of the last snapshot by default.

  Returns:
    (params, step, distance): the average in float32 or wider, and the distance between its profile and the wanted one
    in the L2 norm, relative to the norm of the wanted one: above a few percent, store snapshots more often.

  Raises:
    ValueError: there is no snapshot up to `step`, `length` is out of range, or the snapshots are of other parameters.
  """
  directory = Path(directory).absolute()
  available = [(t, i, width) for t, lengths in stored(directory) for i, width in enumerate(lengths)]
  while available:
    at = available[-1][0] if step is None else step
    weights, distance = ema.combination([(t, width) for t, _, width in available], at, length)
    total = None
    try:
      for weight, (t, i, _) in zip(weights, available, strict=True):
        if abs(weight) > _NEGLIGIBLE * abs(weights).max():
          average = _read(directory, t, i, abstract_params)
          total = jax.tree.map(jnp.zeros_like, average) if total is None else total
          total = _add(total, average, jnp.asarray(weight))
    except storage.UnreadableError as error:
      _warn(directory, t, error)
      available = [entry for entry in available if entry[0] != t]
      continue
    return total, at, distance
  raise ValueError(f"directory={str(directory)!r} holds no snapshot: train with ema_lengths and save some")


def _read(directory: Path, step: int, i: int, abstract_params: PyTree) -> PyTree:
  saved = storage.together(lambda: storage.read_value(directory, step, "manifest")[_item(i)])
  return storage.read_saved(directory, step, _item(i), "average", abstract_params, saved)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: PyTree, average: PyTree, weight: Float[Array, ""]) -> PyTree:
  return jax.tree.map(lambda t, a: t + weight.astype(t.dtype) * a, total, average)


def _item(i: int) -> str:
  return f"average_{i}"


def _warn(directory: Path, step: int, error: Exception) -> None:
  warnings.warn(f"snapshot {step} in {directory} cannot be read ({error}); doing without it", stacklevel=3)
