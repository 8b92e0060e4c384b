"""The training loop: batches in, steps, metrics and checkpoints out.

Step and batch counts run together (batch s makes update s), noise depends on (key, step) only, and a checkpoint is
taken between two steps with the place of the data at the same step: so a run that was interrupted and continued ends
at the same parameters, bit for bit. While a step runs on the devices the next batch is read and sent to them; the
loop waits for the step before last only, and metrics come to the host when they are logged.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from jaxdiff.parallel import Launcher
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.feed import Feed
from jaxdiff.training.metrics import MetricsWriter
from jaxdiff.training.progress import Progress
from jaxdiff.training.state import TrainState, all_finite

Hook = Callable[[int, TrainState], None]


class NonFiniteError(RuntimeError):
  """Too many steps in a row had a loss or gradient that is infinite or NaN, or the parameters are."""


class DivergedError(RuntimeError):
  """A metric went beyond its limit: one of several losses has got out of hand."""


def train(
  state: TrainState,
  step_fn: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  iterator: Iterator[dict[str, np.ndarray]],
  *,
  launcher: Launcher,
  global_batch: int,
  total_steps: int,
  steps_per_dispatch: int = 1,
  log_every: int = 50,
  writer: MetricsWriter | None = None,
  rates: Callable[[float], dict[str, float]] = lambda steps_per_second: {},
  checkpoints: Checkpoints | None = None,
  checkpoint_every: int = 1000,
  max_skipped: int = 10,
  limits: Mapping[str, float] = MappingProxyType({}),
  hooks: Sequence[Hook] = (),
  should_stop: Callable[[int], bool] = lambda step: False,
) -> TrainState:
  """Runs `step_fn` from `state.step` to `total_steps`.

  Metrics are means over the steps since the last record, written every `log_every` steps, at every checkpoint and at
  the end: those of the steps, without the skipped ones; "skipped", their number; "steps_per_second",
  "examples_per_second", and "input_wait", the share of the time in which the loop waited for the iterator. The first
  dispatch compiles and has no part in these.

  Args:
    state: where to start, as `launcher.create` makes it; donated, use the returned one.
    step_fn: `step_fn(state, batch, index) -> (state, metrics)` from `launcher.compile(train_step, steps_per_dispatch)`.
    iterator: yields dicts of host arrays [global_batch / processes, ...], the rows of this process; with `get_state()`
      (plain JSON, equal on all processes) if there are checkpoints, at the position of `state`.
    launcher: from `jaxdiff.parallel.jit_launcher` or `pmap_launcher`.
    global_batch: examples per step over all processes, divisible by the number of devices.
    total_steps: the step to stop at; nothing happens if `state` is there already.
    steps_per_dispatch: steps in one call of `step_fn`; divides all other numbers of steps.
    log_every: steps between two records.
    writer: where records go; None for nowhere.
    rates: more values for a record, from the steps per second (FLOPs, memory).
    checkpoints: where to save every `checkpoint_every` steps and at the end; None for never. All are complete on
      return.
    checkpoint_every: steps between two checkpoints.
    max_skipped: how many steps in a row may be skipped because they are not finite; noticed when they are logged.
    limits: by the name of a metric what its mean over a record must not exceed; looked at when it is logged.
    hooks: `hook(step, state)`, called after every dispatch (see `jaxdiff.training.hooks`). Not counted in the rates.
    should_stop: asked after every dispatch; the step at which it says yes is the last, recorded and saved as such.
      All processes must say the same.

  Returns:
    The state at `total_steps`, or where it was to stop.

  Raises:
    ValueError: an argument is out of range, the batch cannot be split over the devices, or the iterator ends too early.
    NonFiniteError: more than `max_skipped` steps in a row, or the parameters, were not finite; names the steps and the
      last good checkpoint, which is kept.
    DivergedError: a metric is beyond its limit or not finite; names all that have one.
    CheckpointError: a checkpoint cannot be written; the last good one is kept.
  """
  start, every = int(state.step), {"log_every": log_every, "checkpoint_every": checkpoint_every}
  _check(start, steps_per_dispatch, max_skipped, global_batch, {**every, "total_steps": total_steps})
  rows = np.array_split(np.arange(global_batch, dtype=np.int32), jax.process_count())[jax.process_index()]
  index, pending = launcher.put(rows), list[dict[str, jax.Array]]()
  feed = Feed(iterator, launcher.put, steps_per_dispatch, total_steps - start)
  with Progress(total_steps, start, silent=jax.process_index() > 0) as progress:
    clock = _Clock(feed)
    for step in range(start + steps_per_dispatch, total_steps + 1, steps_per_dispatch):
      state, metrics = step_fn(state, feed.take(step), index)
      feed.fetch()
      first = step == start + steps_per_dispatch
      jax.block_until_ready(metrics if first else pending[-1:])
      pending.append(metrics)
      progress.advance(steps_per_dispatch)
      clock.restart() if first else clock.tick()  # the first has compiled

      last = step == total_steps or should_stop(step)
      saving = checkpoints is not None and (step % checkpoint_every == 0 or last)
      if saving or step % log_every == 0 or last:
        record = _means(jax.device_get(pending), step, max_skipped, limits, checkpoints)
        _check_limits(record, limits, step, checkpoints)
        if speed := clock.steps_per_second(steps_per_dispatch):
          record |= {"steps_per_second": speed, "examples_per_second": speed * global_batch}
          record |= {"input_wait": clock.input_wait(), **rates(speed)}
        progress.report(step, record)
        if writer is not None:
          writer.write(step, record)
        pending = []
        clock.restart()
      if checkpoints is not None and saving:
        if not all_finite(state):
          raise NonFiniteError(f"the parameters are not finite at step {step}; {_advice(checkpoints)}")
        checkpoints.save(state, feed.position)
      with clock.paused():
        for hook in hooks:
          hook(step, state)
      if last:
        break
  if checkpoints is not None:
    checkpoints.wait()
  return state


class _Clock:
  """Times the dispatches since `restart`, and how long of it the feed has waited."""

  def __init__(self, feed: Feed):
    self._feed = feed
    self.restart()

  def restart(self) -> None:
    self._since, self._waited, self._dispatches = time.perf_counter(), self._feed.waited, 0

  def tick(self) -> None:
    self._dispatches += 1

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self._since += time.perf_counter() - begin

  def steps_per_second(self, steps_per_dispatch: int) -> float:
    return self._dispatches * steps_per_dispatch / (time.perf_counter() - self._since)

  def input_wait(self) -> float:
    return (self._feed.waited - self._waited) / (time.perf_counter() - self._since)


def _check(start: int, per_dispatch: int, max_skipped: int, global_batch: int, steps: dict[str, int]) -> None:
  counts = {"steps_per_dispatch": per_dispatch, "max_skipped": max_skipped, "global_batch": global_batch}
  for name, value in {**counts, **steps}.items():
    if value < 1:
      raise ValueError(f"{name}={value!r}: must be at least 1")
  for name, value in {**steps, "the step to continue from": start}.items():
    if value % per_dispatch:
      raise ValueError(f"steps_per_dispatch={per_dispatch} does not divide {name}, {value}; take a divisor, or 1")


def _means(
  records: Sequence[dict[str, np.ndarray]],
  step: int,
  max_skipped: int,
  limits: Mapping[str, float],
  checkpoints: Checkpoints | None,
) -> dict[str, float]:
  """The means over the steps that were not skipped; none of these if all were."""
  columns = {name: np.concatenate([np.atleast_1d(record[name]) for record in records]) for name in records[0]}
  rows = columns.pop("skipped_in_a_row")
  if (rows > max_skipped).any():
    bad = int(np.argmax(rows > max_skipped))
    parts = "".join(f", {name} {columns[name][bad]}" for name in limits if name in columns)
    raise NonFiniteError(
      f"loss {columns['loss'][bad]}, gradient norm {columns['grad_norm'][bad]}{parts} at step "
      f"{step - len(rows) + 1 + bad}, "
      f"the last of {rows[bad]:.0f} steps in a row that were not finite and were skipped (max_skipped={max_skipped}); "
      f"{_advice(checkpoints)}"
    )
  good = columns.pop("skipped") == 0
  with np.errstate(invalid="ignore"):  # of a diagnostic that is infinite, with both signs
    means = {name: float(column[good].mean(dtype=np.float64)) for name, column in columns.items() if good.any()}
  return {**means, "skipped": float((~good).sum())}


def _check_limits(
  record: Mapping[str, float], limits: Mapping[str, float], step: int, checkpoints: Checkpoints | None
) -> None:
  seen = {name: record[name] for name in limits if name in record}
  if beyond := [name for name, value in seen.items() if not value <= limits[name]]:
    values = ", ".join(f"{name} {value:.6g}" for name, value in seen.items())
    raise DivergedError(
      f"{beyond[0]} is beyond its limit {limits[beyond[0]]:g} at step {step}: {values}; {_kept(checkpoints)}. Lower "
      "the learning rate of the part that got ahead, or give its penalty more weight"
    )


def _advice(checkpoints: Checkpoints | None) -> str:
  return f"{_kept(checkpoints)}. Lower the learning rate, clip the gradient, or look for bad values in the data"


def _kept(checkpoints: Checkpoints | None) -> str:
  if checkpoints is not None and (good := checkpoints.latest_step()) is not None:
    return f"the last good checkpoint, of step {good}, is kept in {checkpoints.directory}"
  return "there is no checkpoint"
