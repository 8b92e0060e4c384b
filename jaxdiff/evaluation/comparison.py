"""Likelihoods of several runs, paired on the same examples: read from what `jaxdiff likelihood` wrote, and compared.

Refused is what would not be a comparison: other data, other examples of them, another unit or bound, failed examples.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.evaluation import densities

_MAKE = "jaxdiff likelihood --workdir={}"


class ComparisonError(ValueError):
  """Runs that cannot be compared, or that were not evaluated."""


class Evaluated(NamedTuple):
  """What was evaluated in the directory of a run.

  Attributes:
    name: of the directory.
    report: its likelihood.json.
    values: its likelihood.npz.
  """

  name: str
  report: dict[str, Any]
  values: dict[str, np.ndarray]


def read(folder: Path) -> Evaluated:
  """What `jaxdiff likelihood` wrote into a directory.

  Raises:
    ComparisonError: there is nothing, or it cannot be read; with the command that makes it.
  """
  remedy = f"make it by {_MAKE.format(folder)}"
  try:
    report = json.loads((folder / "likelihood.json").read_text(encoding="utf-8"))
    with np.load(folder / "likelihood.npz", allow_pickle=False) as file:
      values = {name: file[name] for name in file.files}
    needed = report["settings"]["dtype"], report["bound"], report["data"]["content"], values["index"], values["code"]
    if not len(values["value"]) == len(needed[3]) == len(needed[4]) == report["examples"]:
      raise ValueError("likelihood.npz and likelihood.json are of different evaluations")
  except FileNotFoundError as error:
    raise ComparisonError(f"{folder} has no {Path(error.filename).name}: {remedy}") from error
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise ComparisonError(f"the likelihoods in {folder} cannot be read ({error!r}): {remedy}") from error
  return Evaluated(str(folder), report, values)


def check(evaluated: Sequence[Evaluated]) -> None:
  """Refuse runs that were not evaluated on the same examples and by the same measure.

  Raises:
    ComparisonError: naming both runs, what differs and the remedy.
  """
  first = evaluated[0]
  for run in evaluated:
    if count := int(np.count_nonzero(densities.failed(run.values))):
      raise ComparisonError(f"{count} of {run.report['examples']} examples of {run.name} failed: evaluate them first")
    _same(first, run, "data", _data, "evaluate both on the same data and split")
    _same(first, run, "unit", lambda run: run.report["unit"], "nats and bits/dim have no common scale")
    _same(first, run, "bound", _measure, "give both the same --dequantization, and --draws with --importance")
    ours, theirs = (set(side.values["index"].tolist()) for side in (first, run))
    if ours != theirs:
      raise ComparisonError(
        f"{first.name} and {run.name} hold different examples ({len(ours)} and {len(theirs)}, {len(ours & theirs)} of "
        "them in both), and whole evaluations are paired: evaluate both with the same --limit"
      )


def _same(first: Evaluated, run: Evaluated, what: str, of: Callable[[Evaluated], Any], remedy: str) -> None:
  ours, theirs = of(first), of(run)
  if ours != theirs:
    raise ComparisonError(f"{first.name} and {run.name} differ in {what}: {ours} and {theirs}. {remedy.capitalize()}")


def _data(run: Evaluated) -> str:
  return f"{run.report['data']['name']} {run.report['split']} ({run.report['data']['content']})"


def _measure(run: Evaluated) -> str:
  settings = run.report["settings"]
  kind = settings["dequantization"]
  weights = f", {settings['draws']} importance-weighted draws" if settings["importance"] else ""
  return "log-density" if kind is None else f"{kind} dequantization{weights}"


def shared(evaluated: Sequence[Evaluated]) -> dict[str, bool | None]:
  """Whether the runs had the same random numbers for dequantization and for probes; None where none has any.

  Both come from the seed and the number of the example. Probes also depend on the estimator and, but for Rademacher's,
  on the type of the computation.
  """
  settings = [run.report["settings"] for run in evaluated]
  alike = lambda *names: all([s[name] for name in names] == [settings[0][name] for name in names] for s in settings)
  exact = all(s["divergence"]["type"] == "exact" for s in settings)
  dequantized = None if settings[0]["dequantization"] is None else alike("seed", "dequantization", "draws")
  drawn = [] if all(s["divergence"].get("noise") == "rademacher" for s in settings) else ["dtype"]
  probes = None if exact else alike("seed", "divergence", "dequantization", "draws", *drawn)
  return {"dequantization": dequantized, "probes": probes}


def table(evaluated: Sequence[Evaluated]) -> str:
  """The mean of each run, and its difference to the first with the 95 % confidence interval of paired examples."""
  check(evaluated)
  first = evaluated[0]
  order = np.argsort(first.values["index"])
  values = [run.values["value"][np.argsort(run.values["index"])] for run in evaluated]
  width = max(len(run.name) for run in evaluated)
  lines = [f"{_data(first)}: the same {len(order)} examples, {first.report['unit']}, {_measure(first)}"]
  words = {None: "not used", True: "the same", False: "not the same"}
  lines += [f"{what}: {words[same]}" for what, same in shared(evaluated).items()]
  lines.append(f"  {'':<{width}}      mean  difference to the first, 95 % interval")
  for run, x in zip(evaluated, values, strict=True):
    line = f"  {run.name:<{width}}  {densities.estimate(run.values).mean:8.4f}"
    if run is not first:
      apart = densities.difference(values[0], x)
      line += f"  {apart.mean:+8.4f}  [{apart.low:+.4f}, {apart.high:+.4f}]"
    lines.append(line)
  return "\n".join(lines)
