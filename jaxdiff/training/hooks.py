"""Hooks of the training loop: `hook(step, state)` is called after every dispatch.

`every(n, run, last)` calls `run(step, state)` each n steps and after the last; `Profile` traces some steps. The loop
knows neither.
"""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxdiff.training.state import TrainState


def every(steps: int, run: Callable[[int, TrainState], None], last: int) -> Callable[[int, TrainState], None]:
  """Calls `run` after each multiple of `steps`, and after step `last`.

  Example:
    >>> import optax
    >>> from jaxdiff.training.state import init_state
    >>> seen, state = [], init_state(jax.numpy.ones(()), optax.sgd(0.1), jax.random.key(0))
    >>> hook = every(3, lambda step, state: seen.append(step), last=7)
    >>> for step in range(1, 8):
    ...   hook(step, state)
    >>> seen
    [3, 6, 7]
  """

  def hook(step: int, state: TrainState) -> None:
    if step % steps == 0 or step == last:
      run(step, state)

  return hook


class Profile:
  """Traces steps start + 1 to stop with JAX's profiler into a directory for TensorBoard, Perfetto or XProf.

  Args:
    directory: where the trace goes.
    start: the first of them is the one after this step; at least 1, so that compiling is left out.
    stop: the last of them.

  Raises:
    ValueError: not 1 <= start < stop.
  """

  def __init__(self, directory: Path, start: int, stop: int):
    if not 1 <= start < stop:
      raise ValueError(f"profile={start}:{stop}: give 1 <= start < stop")
    self._directory, self._start, self._stop = directory, start, stop
    self._running = False

  def __call__(self, step: int, state: TrainState) -> None:
    if not self._running and self._start <= step < self._stop:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._directory)
      self._running = True
    elif self._running and step >= self._stop:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes the trace if one is running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
