"""Progress on the terminal: a tqdm bar, or plain lines at intervals where the output is a file or a pipe."""

import sys
import time
from io import TextIOBase

from tqdm import tqdm


class Progress:
  """Shows step, loss, steps per second and time left.

  Args:
    total: the last step.
    start: the step that training continues from.
    out: the stream to write to; standard error by default.
    every: seconds between two plain lines where `out` is no terminal; the first report and the last step always print.
    silent: whether to show nothing: of several processes one reports.

  Example:
    >>> with Progress(total=100, start=0, out=sys.stdout) as progress:
    ...   progress.report(100, {"loss": 0.25})  # doctest: +ELLIPSIS
    step 100/100, loss 0.25, ... steps/s, 00:00 left
  """

  def __init__(self, total: int, start: int, out: TextIOBase | None = None, every: float = 10.0, silent: bool = False):
    self._out = sys.stderr if out is None else out
    self._silent = silent
    self._total, self._start, self._every = total, start, every
    self._begin: float | None = None
    self._printed = -float("inf")
    bar = self._out.isatty() and not silent
    self._bar = tqdm(total=total, initial=start, file=self._out, unit="step", dynamic_ncols=True) if bar else None

  def advance(self, steps: int = 1) -> None:
    """Counts more steps; the first ones compile, and are not those whose speed is shown."""
    if self._begin is None:
      self._begin, self._start = time.monotonic(), self._start + steps
    if self._bar is not None:
      self._bar.update(steps)

  def report(self, step: int, values: dict[str, float]) -> None:
    """Shows the newest loss: `values["loss_per_dim"]` where it is there, else `values["loss"]`."""
    name, label = ("loss_per_dim", "loss/dim") if "loss_per_dim" in values else ("loss", "loss")
    loss = f"{label} {values.get(name, float('nan')):.4g}"
    if self._bar is not None:
      self._bar.set_postfix_str(loss, refresh=False)
      return
    now = time.monotonic()
    if self._silent or (step < self._total and now - self._printed < self._every):
      return
    self._printed = now
    pace = "" if step == self._start else self._pace(step, now)
    print(f"step {step}/{self._total}, {loss}{pace}", file=self._out, flush=True)

  def _pace(self, step: int, now: float) -> str:
    speed = (step - self._start) / max(now - (self._begin or now), 1e-9)
    left = tqdm.format_interval((self._total - step) / max(speed, 1e-9))
    return f", {speed:.3g} steps/s, {left} left"

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exc_info) -> None:
    if self._bar is not None:
      self._bar.close()
