"""Batches for training (shuffled, endless, resumable) and for evaluation (in order, each example once).

The training order is a function of (seed, number of examples) alone: each epoch has its own permutation, the epochs
are laid end to end, and step k takes the next `batch_size` positions. Repeating before batching keeps the data
unbiased: every example is used exactly once per epoch, and only the batch that crosses the border of two
epochs mixes them. (Dropping each epoch's remainder instead would skip 29 of 1437 digits an epoch at batch
size 128.)

Each process reads its own consecutive rows of that one global batch. So the global batches, row by row, are the same
for any number of processes, also where the data do not divide evenly, and the iterator's state, `{"next_index": k}`, is
the number of batches taken, whatever the topology. It holds neither seed nor data: store `fingerprint` beside it and
compare before resuming.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from jaxdiff.data.examples import Source

_ORDER_PROBE = 1024  # positions hashed into the fingerprint, so that a changed shuffle is noticed


def train_batches(
  source: Source,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 4,
) -> grain.DatasetIterator:
  """Endless shuffled batches of this process.

  Save and restore with orbax through `grain.checkpoint.CheckpointSave(iterator)` and `CheckpointRestore(iterator)`, or
  place it at any step with `iterator.set_state({"next_index": step})`. Grain's checkpoint has one file a process, so
  the second form is the one that resumes on another number of processes.

  Args:
    source: the data.
    batch_size: size of the global batch, over all processes.
    seed: seed of the order, 0..2**32-1.
    process_index: this process.
    process_count: number of processes; divides `batch_size`.
    threads: reader threads; up to twice as many batches are read ahead.

  Returns:
    A grain iterator of dicts of numpy arrays with leading axis batch_size / process_count.

  Raises:
    ValueError: a batch size below 1, above the number of examples or not divisible by `process_count`; a process index
      or seed out of range.

  Example:
    >>> from jaxdiff.data.examples import from_arrays
    >>> source = from_arrays(np.arange(4, dtype=np.float32)[:, None])
    >>> batches = train_batches(source, batch_size=4, seed=0)
    >>> sorted(next(batches)["x"][:, 0].tolist())
    [0.0, 1.0, 2.0, 3.0]
  """
  _check_batch_size(source, batch_size)
  rows = global_index(batch_size, process_index, process_count)
  order = _order(source, seed)

  def read(step: int) -> dict[str, np.ndarray]:
    return source.gather(order(step * batch_size + rows.astype(np.int64)))

  steps = grain.MapDataset.range(sys.maxsize // batch_size)
  return iter(steps.map(read).to_iter_dataset(grain.ReadOptions(threads, 2 * threads)))


def eval_batches(source: Source, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
  """All examples once, in order, in batches of one shape.

  The last batch is filled up by repeating the last example; drop what lies beyond the count before averaging.

  Args:
    source: the data.
    batch_size: number of rows of every batch.

  Returns:
    An iterator of (batch, count): a dict of arrays [batch_size, ...] and the number of leading rows that are examples.

  Raises:
    ValueError: a batch size below 1 or above the number of examples.

  Example:
    >>> from jaxdiff.data.examples import from_arrays
    >>> source = from_arrays(np.arange(5, dtype=np.float32)[:, None])
    >>> [(batch["x"][:, 0].tolist(), count) for batch, count in eval_batches(source, 3)]
    [([0.0, 1.0, 2.0], 3), ([3.0, 4.0, 4.0], 2)]
  """
  _check_batch_size(source, batch_size)
  last = len(source) - 1
  rows = np.arange(batch_size)
  return (
    (source.gather(np.minimum(start + rows, last)), min(batch_size, len(source) - start))
    for start in range(0, len(source), batch_size)
  )


def global_index(batch_size: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
  """Positions in the global batch of the rows that this process reads: int32 [batch_size / process_count].

  Raises:
    ValueError: `batch_size` is not divisible by `process_count`, or the process index is out of range.

  Example:
    >>> global_index(6, process_index=1, process_count=2).tolist()
    [3, 4, 5]
  """
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(f"process_index: got {process_index} of {process_count}; pass 0..process_count-1")
  if batch_size % process_count:
    raise ValueError(f"batch_size: {batch_size} does not divide among {process_count} processes; pass a multiple")
  local = batch_size // process_count
  return np.arange(process_index * local, (process_index + 1) * local, dtype=np.int32)


def fingerprint(source: Source, batch_size: int, seed: int) -> dict[str, Any]:
  """What decides the sequence of global batches, as plain JSON values.

  The number of processes is no part of it: it does not change the batches. `order` is a hash of the beginning of the
  order itself.

  Example:
    >>> from jaxdiff.data.examples import from_arrays
    >>> fingerprint(from_arrays(np.zeros((5, 2)), name="zeros"), batch_size=2, seed=0)["count"]
    5
  """
  order = _order(source, seed)
  probe = order(np.arange(_ORDER_PROBE if len(source) else 0))
  return {
    "name": source.name,
    "split": source.split,
    "count": len(source),
    "shape": [int(n) for n in source.shape],
    "levels": source.levels,
    "content": source.content_hash,
    "batch_size": batch_size,
    "seed": seed,
    "order": hashlib.sha256(probe.tobytes()).hexdigest()[:16],
  }


def _order(source: Source, seed: int) -> Callable[[np.ndarray], np.ndarray]:
  """The endless order: maps positions [b] to example numbers [b]; epoch e is positions e*n .. (e+1)*n - 1."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed: got {seed}; pass an integer from 0 to 2**32 - 1")
  count = len(source)

  @functools.lru_cache(maxsize=2)
  def permutation(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)

  def order(positions: np.ndarray) -> np.ndarray:
    epochs, offsets = np.divmod(positions, max(1, count))
    examples = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
      rows = epochs == epoch
      examples[rows] = permutation(int(epoch))[offsets[rows]]
    return examples

  return order


def _check_batch_size(source: Source, batch_size: int) -> None:
  if not 1 <= batch_size <= len(source):
    raise ValueError(
      f"batch_size: got {batch_size} for the {len(source)} examples of {source.name!r} ({source.split}); pass a number "
      f"from 1 to {len(source)}"
    )
