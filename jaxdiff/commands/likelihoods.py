"""The command `likelihood`: every held-out example under the model, and other data beside them.

The evaluation goes through files in `likelihood/`, a chunk a batch: stopped and started again it goes on where it was,
and several processes share it. The first process writes the report.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff import factory, objectives, options, parallel, rundir, status, systems
from jaxdiff.commands import console
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import baselines, chunks, densities, pictures, runs
from jaxdiff.schema import Config, ConfigError

_FREE = ("split", "limit", "batch_size", "bound_draws")  # what the values of an example do not depend on
_SEEN = 20_000  # training examples that the reference densities are fitted to


class _Model(NamedTuple):
  """A trained model, and how to evaluate it: `config` and `params` in the precision that is wanted."""

  trained: Config
  config: Config
  params: Any
  step: int
  mesh: Mesh
  folder: Path
  seen: jax.Array | None


def likelihood(config: Config, workdir: Path) -> None:
  """Evaluate the trained model on held-out data, and on other data if the config names some."""
  rundir.check_examples(config)
  settings, mesh = options.likelihood(config), parallel.make_mesh()
  console.check_batch("likelihood.batch_size", settings.batch_size, mesh.size)
  source, params, step = rundir.load(workdir, config, settings.ema_length)
  held_out = factory.make_source(config, settings.split)
  other = _other(config, settings.split, held_out) if "other" in config else None
  console.say(f"evaluating step {step} on {settings.split}")
  if config.get("guidance"):
    console.say("config.guidance is of samples: the likelihood is that of the model without it")
  for name in (*_files("likelihood"), *_files("likelihood_other")) if console.first_process() else ():
    (workdir / name).unlink(missing_ok=True)  # those of an evaluation that this one replaces
  with options.precision(config):
    if config["likelihood"].get("divergence", {}).get("basis") == "auto":
      console.say("measuring the trace estimators on a batch")
    config, spreads = objectives.choose_trace(config, params, source, held_out)
    _say_pilot(config, spreads)
    seen = objectives.seen_states(config, source)
    model = _Model(config, *options.in_precision(config, params), step, mesh, workdir / "likelihood", seen)
    values, report = _evaluate(model, held_out, "likelihood")
    report |= {"pilot": spreads} if spreads else {}
    bound = _bound(model, held_out) if settings.bound_draws and systems.of(config).bound else {}
    others = None if other is None else _evaluate(model, other, "other")
  if console.first_process():
    rows = {} if held_out.levels is None else _reference_rows(source, held_out, len(values["value"]))
    row = systems.of(config).row
    _write(workdir, "likelihood", row, values | bound, report, rows)
    if others is not None:
      _write_other(workdir, row, values, report, *others)
    console.list_files(workdir, "checkpoints", *_files("likelihood"), *(_files("likelihood_other") if other else ()))
    console.list_files(workdir, "samples.png", "denoising.png", "loss.png", "config.json")
  for checked in (values, *([] if others is None else others[:1])):
    status.check(checked["code"], checked["accepted"])


def _say_pilot(config: Config, spreads: dict[str, float]) -> None:
  if spreads:
    shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(spreads.items(), key=lambda item: item[1]))
    trace = config["likelihood"]["divergence"]
    console.say(
      f"standard deviation of one probe, bits/dim: {shown}; basis {trace['basis']}, control {trace['control']}"
    )


def _other(config: Config, split: str, held_out: Source) -> Source:
  other = factory.make_source(config, split, "other")
  for what in ("shape", "levels"):
    theirs, ours = getattr(other, what), getattr(held_out, what)
    if theirs != ours:
      raise ConfigError(
        f"config.other: {other.name} has {what} {theirs}, the model's data have {ours}: give data of the same {what}, "
        "scaled as those were"
      )
  return other


def _evaluate(model: _Model, source: Source, name: str) -> tuple[dict[str, np.ndarray], Config]:
  """The values of all examples, and a report that lacks their mean."""
  config, system = model.config, systems.of(model.config)
  assert system.log_likelihood is not None  # a config with a section likelihood is of a system that has one
  assert system.statement is not None
  one_batch = system.log_likelihood(config, model.params, source, model.seen)
  statement, facts = system.statement(config, model.params, source)
  values = _in_chunks(model, source, one_batch, name, {field: facts[field] for field in facts if field not in _FREE})
  values["code"] = np.where(densities.failed(values) & (values["code"] == 0), status.NON_FINITE, values["code"])
  report = {
    "unit": "log-density, nats" if source.levels is None else "bits/dim",
    "bound": statement,
    "model": _sections(model),
    "data": {"name": source.name, "content": source.content_hash},
    "split": facts["split"],
    "examples": len(values["value"]),
    "failed": int(np.count_nonzero(values["code"])),
    "checkpoint_step": model.step,
    "nfe": {"mean": float(values["nfe"].mean()), "min": int(values["nfe"].min()), "max": int(values["nfe"].max())},
    "settings": facts,
  }
  return values, report


def _sections(model: _Model) -> Config:
  return {name: model.trained[name] for name in factory.MODEL_SECTIONS[1:] if name in model.trained}


def _bound(model: _Model, source: Source) -> dict[str, np.ndarray]:
  """The variational bound on the same examples."""
  settings = options.likelihood(model.config)
  make = systems.of(model.config).bound
  assert make is not None
  one_batch = make(model.config, model.params, source, settings.bound_draws)
  facts = {"draws": settings.bound_draws, "t0": model.config["likelihood"].get("t0"), "dtype": settings.dtype}
  values = _in_chunks(model, source, one_batch, "bound", facts | {"seed": settings.seed, "loss": model.config["loss"]})
  return {name: value for name, value in values.items() if name != "index"}


def _in_chunks(model: _Model, source: Source, one_batch: Any, name: str, facts: Config) -> dict[str, np.ndarray]:
  settings = options.likelihood(model.config)
  count = min(len(source), settings.limit or len(source))
  size = console.batch_size(settings.batch_size, count, model.mesh.size)
  sections = _sections(model)
  data = [source.name, source.split, source.content_hash]
  identity = chunks.identify(model.params, data=data, settings=facts, **sections)
  batch = runs.evaluator(one_batch, model.params, source, size, settings.seed, model.mesh)
  share = jax.process_index(), jax.process_count()
  return chunks.in_chunks(model.folder, name, identity, count, size, batch, share)


def _write(
  folder: Path, name: str, row: str, values: dict[str, np.ndarray], report: Config, rows: dict[str, Any]
) -> None:
  """Write the values, the report and the histogram, and print the table."""
  result = densities.estimate(values)
  title = row if not result.failed else f"{row}, without the {result.failed} that failed"
  if result.failed < result.examples:
    rows[title] = baselines.Bits(result.mean, result.standard_error_over_examples)
  if "bound" in values:
    rows["model, variational bound"] = baselines.mean_and_error(values["bound"])
  report["results"] = {
    row: {"mean": _finite(mean), "standard_error": _finite(error)} for row, (mean, error) in rows.items()
  }
  errors = (
    "standard_error_over_examples",
    *(f"rms_standard_error_over_{name}" for name in ("probes", "dequantization")),
  )
  report["errors"] = {name: _finite(getattr(result, name)) for name in errors}
  np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **values)
  (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  heading = f"{report['data']['name']}, {report['split']}: {result.examples} examples, {report['unit']}"
  pictures.save_histograms(folder / f"{name}.png", {title: values["value"]}, report["unit"], heading)
  print(_table(heading, rows))
  print(f"  {report['bound']}")
  print(f"{report['nfe']['mean']:.0f} network evaluations an example ({report['nfe']['min']}-{report['nfe']['max']})")


def _write_other(
  folder: Path, row: str, known: dict[str, np.ndarray], ours: Config, values: dict[str, np.ndarray], report: Config
) -> None:
  """The same of the other data, and how well the likelihood tells the two sets apart."""
  usual, strange = (x["value"][~densities.failed(x)] for x in (known, values))
  sign = -1 if report["settings"]["dequantization"] is None else 1  # bits grow where the density falls
  area = densities.auroc(sign * usual, sign * strange) if len(usual) and len(strange) else None
  report |= {"against": ours["data"] | {"split": ours["split"], "examples": len(usual)}, "auroc": area}
  _write(folder, "likelihood_other", row, values, report, {})
  names = [f"{side['data']['name']}, {side['split']}" for side in (ours, report)]
  title = "AUROC cannot be known" if area is None else f"AUROC {area:.4f}"
  sides = dict(zip(names if names[0] != names[1] else [*names[:1], f"other {names[1]}"], (usual, strange), strict=True))
  pictures.save_histograms(folder / "likelihood_other.png", sides, report["unit"], title)
  print(f"{title}: how often an example of {names[1]} is less likely than one of {names[0]}")


def _files(name: str) -> tuple[str, ...]:
  return f"{name}.json", f"{name}.npz", f"{name}.png"


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def _reference_rows(source: Source, held_out: Source, count: int) -> dict[str, baselines.Bits]:
  seen = source.gather(np.arange(min(len(source), _SEEN)))["x"]
  unseen = held_out.gather(np.arange(count))["x"]
  levels = held_out.levels or 0
  rows = {"uniform": baselines.uniform(levels), "per-pixel histogram": baselines.histogram(seen, unseen, levels)}
  if np.prod(held_out.shape) <= 1024:
    rows["full-covariance Gaussian"] = baselines.gaussian(seen, unseen)
  return rows


def _table(title: str, rows: dict[str, baselines.Bits]) -> str:
  width = max(map(len, rows), default=0)
  lines = [f"  {name:<{width}}  {row.mean:8.4f} +- {row.standard_error:.4f}" for name, row in rows.items()]
  return "\n".join([title, *lines])
