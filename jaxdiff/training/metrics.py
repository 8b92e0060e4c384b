"""Metrics and pictures of a run: one JSON object a line in metrics.jsonl, TensorBoard event files, and wandb."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter


class MetricsWriter:
  """Appends metrics to `directory/metrics.jsonl` and `directory/tensorboard`; with `directory=None` it writes nothing.

  What an earlier run of the same directory wrote beyond `start` (it was killed after its last checkpoint) is dropped,
  so no step occurs twice.

  Args:
    directory: where to write; created if missing.
    start: the step of the state that training continues from, 0 for a new run.
    wandb: project of Weights & Biases to report to as well; None for none. A run that goes on keeps its id.

  Raises:
    ValueError: `wandb` is given and that package is not installed.

  Example:
    >>> with MetricsWriter(None, start=0) as writer:
    ...   writer.write(10, {"loss": 0.5})
  """

  def __init__(self, directory: str | Path | None, start: int, wandb: str | None = None):
    self._file = self._events = self._wandb = None
    if directory is None:
      return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _drop_beyond(directory / "metrics.jsonl", start)
    self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed by __exit__
    self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1 if start else None)
    self._wandb = None if wandb is None else _start_wandb(wandb, directory)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes the values of one step; the line is on its way to the disk when this returns."""
    if self._file is None or self._events is None:
      return
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Shows a picture of one step."""
    if self._events is not None:
      self._events.add_image(name, image, step, dataformats="HWC")
    if self._wandb is not None:
      import wandb

      self._wandb.log({name: wandb.Image(image)}, step=step)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    for output in (self._file, self._events):
      if output is not None:
        output.close()
    if self._wandb is not None:
      self._wandb.finish()


def _start_wandb(project: str, directory: Path) -> Any:
  try:
    import wandb
  except ModuleNotFoundError:
    raise ValueError(f"wandb={project!r} needs the package wandb: pip install wandb, or leave it out") from None
  identity = directory / "wandb_id"
  if not identity.exists():
    identity.write_text(wandb.util.generate_id(), encoding="utf-8")
  return wandb.init(project=project, id=identity.read_text(encoding="utf-8"), resume="allow", dir=str(directory))


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
