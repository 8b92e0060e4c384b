"""Metrics of a run on disk: one JSON object a line in metrics.jsonl, and TensorBoard event files."""

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsWriter:
  """Appends metrics to `directory/metrics.jsonl` and `directory/tensorboard`; with `directory=None` it writes nothing.

  What an earlier run of the same directory wrote beyond `start` (it was killed after its last checkpoint) is dropped,
  so no step occurs twice.

  Args:
    directory: where to write; created if missing.
    start: the step of the state that training continues from, 0 for a new run.

  Example:
    >>> with MetricsWriter(None, start=0) as writer:
    ...   writer.write(10, {"loss": 0.5})
  """

  def __init__(self, directory: str | Path | None, start: int):
    self._file = self._events = None
    if directory is None:
      return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _drop_beyond(directory / "metrics.jsonl", start)
    self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
    self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the values of one step; the line is on its way to the disk when this returns."""
    if self._file is None or self._events is None:
      return
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    for output in (self._file, self._events):
      if output is not None:
        output.close()


def read_metrics(path: str | Path) -> list[dict[str, int | float]]:
  """The records of a metrics.jsonl, without a last line cut short by a kill."""
  records = []
  for line in Path(path).read_text(encoding="utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


def _drop_beyond(path: Path, start: int) -> None:
  if not path.exists():
    return
  kept = [record for record in read_metrics(path) if record["step"] <= start]
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
  os.replace(temporary, path)
