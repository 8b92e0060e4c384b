"""The training loop: batches in, steps, metrics and checkpoints out.

Step and batch counts run together (batch s makes update s), noise depends on (key, step) only, and a checkpoint is
taken between two steps with the iterator standing at the same place: so a run that was interrupted and continued ends
at the same parameters, bit for bit. The device is never waited for except for its step before last, so that the next
batch is prepared while a step runs, and metrics come to the host only when they are logged.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.parallel import shard_batch
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.metrics import MetricsWriter
from jaxdiff.training.progress import Progress
from jaxdiff.training.state import TrainState, all_finite


class NonFiniteError(RuntimeError):
  """The loss, the gradient or the parameters became infinite or NaN."""


def train(
  state: TrainState,
  step_fn: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  iterator: Any,
  *,
  mesh: Mesh,
  global_batch: int,
  total_steps: int,
  log_every: int = 50,
  workdir: str | Path | None = None,
  checkpoints: Checkpoints | None = None,
  checkpoint_every: int = 1000,
  should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
  """Runs `step_fn` from `state.step` to `total_steps`.

  Metrics are means over the steps since the last record, written every `log_every` steps, at every checkpoint and at
  the end.

  Args:
    state: where to start, on the devices of `mesh`; donated, use the returned one.
    step_fn: `step_fn(state, batch, index) -> (state, metrics)` from `jaxdiff.parallel.jit_train_step`.
    iterator: yields dicts of host arrays [global_batch, ...]; a grain iterator if there are checkpoints, at the
      position of `state`.
    mesh: the devices, from `jaxdiff.parallel.make_mesh`.
    global_batch: examples per step, divisible by the number of devices.
    total_steps: the step to stop at; nothing happens if `state` is there already.
    log_every: steps between two records.
    workdir: gets metrics.jsonl and tensorboard/; None for neither.
    checkpoints: where to save every `checkpoint_every` steps and at the end; None for never. All are complete on
      return.
    checkpoint_every: steps between two checkpoints.
    should_stop: asked after every step; the step at which it says yes is the last, recorded and saved as such.

  Returns:
    The state at `total_steps`, or where it was to stop.

  Raises:
    ValueError: an argument is out of range, the batch cannot be split over the devices, or the iterator ends too early.
    NonFiniteError: loss, gradient or parameters became infinite or NaN; names the steps and the last good checkpoint,
      which is kept.
  """
  for name, value in {
    "log_every": log_every,
    "checkpoint_every": checkpoint_every,
    "global_batch": global_batch,
  }.items():
    if value < 1:
      raise ValueError(f"{name}={value!r}: must be at least 1")
  index = shard_batch(mesh, np.arange(global_batch, dtype=np.int32))
  start = int(state.step)
  pending: list[dict[str, jax.Array]] = []
  with MetricsWriter(workdir, start) as writer, Progress(total_steps, start) as progress:
    since = time.perf_counter()
    for step in range(start + 1, total_steps + 1):
      batch = shard_batch(mesh, _next_batch(iterator, step, total_steps))
      state, metrics = step_fn(state, batch, index)
      jax.block_until_ready(pending[-1:])
      pending.append(metrics)
      progress.advance()

      last = step == total_steps or should_stop()
      saving = checkpoints is not None and (step % checkpoint_every == 0 or last)
      if saving or step % log_every == 0 or last:
        record = _mean_metrics(jax.device_get(pending), step, checkpoints)
        record["steps_per_second"] = len(pending) / (time.perf_counter() - since)
        writer.write(step, record)
        progress.report(step, record)
        pending, since = [], time.perf_counter()
      if checkpoints is not None and saving:
        if not all_finite(state):
          raise NonFiniteError(f"the parameters are not finite at step {step}; {_advice(checkpoints)}")
        checkpoints.save(state, iterator.get_state())
      if last:
        break
  if checkpoints is not None:
    checkpoints.wait()
  return state


def _next_batch(iterator: Iterator[dict[str, Any]], step: int, total_steps: int) -> dict[str, Any]:
  try:
    return next(iterator)
  except StopIteration:
    raise ValueError(
      f"iterator: ended before step {step} of total_steps={total_steps}; repeat the data set, or lower total_steps"
    ) from None


def _mean_metrics(records: list[dict[str, np.ndarray]], step: int, checkpoints: Checkpoints | None) -> dict[str, float]:
  first = step - len(records) + 1
  for i, record in enumerate(records):
    if not (np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"])):
      raise NonFiniteError(
        f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {first + i}, "
        f"the first of steps {first} to {step} that is not finite; {_advice(checkpoints)}"
      )
  return {name: math.fsum(float(record[name]) for record in records) / len(records) for name in records[0]}


def _advice(checkpoints: Checkpoints | None) -> str:
  kept = "there is no checkpoint"
  if checkpoints is not None and (good := checkpoints.latest_step()) is not None:
    kept = f"the last good checkpoint, of step {good}, is kept in {checkpoints.directory}"
  return f"{kept}. Lower the learning rate, clip the gradient, or look for bad values in the data"
