"""Batches on the devices, one ahead of the step that takes them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class Feed:
  """Reads from an iterator and puts on the devices; what `take` returns was fetched while the step before ran.

  Args:
    iterator: yields dicts of host arrays.
    put: sends a batch to the devices without waiting for them, see `jaxdiff.parallel.Launcher`.
    steps: batches of the iterator that make one batch of the feed, stacked; 1 for no stacking.
    total: batches of the iterator to read in all.

  Attributes:
    waited: seconds spent waiting for the iterator.
    position: the state of the iterator behind what was taken, for a checkpoint; None if it has no `get_state`.

  Raises:
    ValueError: (by `take`) the iterator has ended.
  """

  def __init__(self, iterator: Iterator[dict[str, np.ndarray]], put: Callable[..., Any], steps: int, total: int):
    self._iterator, self._put, self._steps, self._left = iterator, put, steps, total
    self._next: Any = None
    self.waited, self.position = 0.0, self._state()
    self._read = self.position
    self.fetch()

  def take(self, step: int) -> Any:
    """The next batch, on the devices; `step` is named if there is none."""
    if self._next is None:
      raise ValueError(f"iterator: ended before the batch of step {step}; repeat the data set, or lower total_steps")
    batch, self._next, self.position = self._next, None, self._read
    return batch

  def fetch(self) -> None:
    """Reads the next batch and sends it to the devices."""
    if self._left <= 0:
      return
    begin, self._left = time.perf_counter(), self._left - self._steps
    try:
      batches = [next(self._iterator) for _ in range(self._steps)]
    except StopIteration:
      return
    self.waited += time.perf_counter() - begin
    self._read = self._state()
    if self._steps == 1:
      self._next = self._put(batches[0])
    else:
      self._next = self._put(jax.tree.map(lambda *rows: np.stack(rows), *batches), steps=self._steps)

  def _state(self) -> Any:
    get_state = getattr(self._iterator, "get_state", None)
    return None if get_state is None else get_state()
