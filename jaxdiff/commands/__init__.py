"""The commands, each from a checked config and the directory of the run: sample and evaluate here, the others beside;
and the comparison of what was evaluated in several runs.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff import factory, options, parallel, rundir, schema, status, systems
from jaxdiff.commands import console, guiding
from jaxdiff.commands.classifiers import accuracy
from jaxdiff.commands.editing import edit as edit
from jaxdiff.commands.likelihoods import likelihood as likelihood
from jaxdiff.commands.training import train as train
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import chunks, comparison, features, neighbours, pictures, report, runs
from jaxdiff.schema import Config, ConfigError
from jaxdiff.settings import EvaluateSettings, SampleSettings

_ANIMATED = 100  # samples in an animation
_FRAMES = 60
_SHOWN = 10, 7  # samples in neighbours.png, and training images beside each


def sample(config: Config, workdir: Path) -> None:
  """Draw samples of the trained model, on the devices of all processes; the first process writes them."""
  settings, mesh = options.sample(config), parallel.make_mesh(jax.devices())
  console.check_batch("sample.batch_size", settings.batch_size, mesh.size)
  plan = guiding.plan(config)
  source, params, step = rundir.load(workdir, config, settings.ema_length)
  system = systems.of(config)
  process, shape = system.process(config, params), system.shape(config, source)
  guided = guiding.guided(config, plan, source, params)
  sampler, given = system.sampler(config, process), factory.make_given(config, settings.split, plan.told.stated)
  console.say(f"sampling from step {step}{_by(config)}")
  guiding.say(plan)
  drawn = runs.draw(
    *(guided.score, guided.params, process, sampler, shape),
    *(settings.num, settings.batch_size, settings.seed, mesh, given),
    decode=guided.decode,
  )
  if not console.first_process():
    return status.check(drawn["code"], drawn["accepted"])
  numbers, arrays = np.arange(settings.num), {"x": drawn["x"], "nfe": drawn["nfe"]}
  arrays |= {name: values[numbers % len(values)] for name, values in plan.told.written.items()}
  if given is not None and given.source is not None:
    arrays["example"] = numbers % len(given.source)
  how = {"checkpoint_step": step, "sampler": config.get("sampler"), **dataclasses.asdict(settings), **plan.written()}
  arrays["settings"] = console.as_text(how)
  np.savez_compressed(workdir / "samples.npz", allow_pickle=False, **arrays)
  (workdir / "denoising.gif").unlink(missing_ok=True)  # that of other samples
  status.check(drawn["code"], drawn["accepted"])
  console.say(f"{drawn['nfe'].mean():.0f} network evaluations a sample")
  console.warn_far(
    source,
    drawn["x"],
    "train longer"
    if schema.kind(config) != "diffusion"
    else f"try {'a lower --guidance' if plan.line() else 'more --steps'}, or --config.sample.threshold=static",
  )
  if console.can_be_shown(source):
    beside = source if given is None or given.source is None else given.source
    shown = beside.gather(np.arange(min(len(beside), settings.num)))["x"]
    pictures.save_samples(workdir / "samples.png", drawn["x"], shown)
    if factory.has_path(config):
      count = max(_ANIMATED if settings.gif else 0, settings.trajectories)
      with_path = system.sampler(config, process, path=_path(sampler))
      paths = runs.trajectories(
        *(guided.score, guided.params, process, with_path, shape),
        *(min(count, settings.num), settings.seed, given, guided.decode),
      )
      _show_paths(workdir, source, paths, settings)
  console.list_files(
    workdir, "samples.png", "denoising.png", *(["denoising.gif"] if settings.gif else []), "samples.npz"
  )


def _by(config: Config) -> str:
  return f" by {config['sampler']['type']}" if "sampler" in config else ""


def _path(sampler: Any) -> int:
  """Every how many steps to keep a state: a divisor of the steps that leaves about `_FRAMES`, or 1."""
  if not hasattr(sampler, "ts"):
    return True
  steps = len(sampler.ts) - 1
  divisors = [k for k in range(1, steps + 1) if steps % k == 0]
  return min(divisors, key=lambda k: abs(np.log(steps / k / _FRAMES)))


def _show_paths(workdir: Path, source: Source, paths: np.ndarray, settings: SampleSettings) -> None:
  few = paths[:, : settings.trajectories]
  if source.shape == (2,):
    pictures.save_paths(workdir / "denoising.png", few, source.gather(np.arange(min(len(source), 2000)))["x"])
  else:
    # Most of the way is pure noise or all but done: ten of twelve columns show the middle half.
    fractions = np.array([0.0, *np.linspace(0.25, 0.75, 10), 1.0])
    shown = few[np.unique((fractions * (len(few) - 1)).round().astype(int))]
    pictures.save_grid(workdir / "denoising.png", shown.swapaxes(0, 1).reshape(-1, *source.shape), columns=len(shown))
  if settings.gif:
    pictures.save_animation(workdir / "denoising.gif", paths, columns=round(paths.shape[1] ** 0.5))


def evaluate(config: Config, workdir: Path) -> None:
  """Measure samples of the trained model against its data; what was finished before a stop is not done again.

  Of a classifier how often it is right.
  """
  if schema.is_classifier(config):
    return accuracy(config, workdir)
  rundir.check_examples(config)
  settings, mesh = options.evaluate(config), parallel.make_mesh()
  console.check_batch("evaluate.batch_size", settings.batch_size, mesh.size)
  plan = guiding.plan(config)
  source, params, step = rundir.load(workdir, config, settings.ema_length)
  held_out = factory.make_source(config, settings.split)
  train = source.gather(np.arange(min(len(source), settings.reference or len(source))))
  unseen = held_out.gather(np.arange(min(len(held_out), settings.num)))["x"]
  _check_enough(settings, len(train["x"]), len(unseen))
  console.say(f"evaluating {settings.num} samples from step {step}")
  guiding.say(plan)
  if options.sample(config).label != ():
    console.say("samples of these labels are measured against data of all labels")
  chosen = _features(settings, train, source.levels)
  drawn, identity = _draw_in_chunks(config, settings, plan, source, params, workdir / "evaluation", mesh)
  x = features.to_levels(drawn["x"], source.levels)
  extract = features.extractor(chosen, source.levels, settings.batch_size, mesh, workdir / "evaluation")

  def side(name: str, examples: np.ndarray, identity: str) -> report.Side:
    values = np.asarray(features.to_values(examples, source.levels))
    return report.Side(values.reshape(len(values), -1), extract(name, examples, identity))

  known, samples = side("train", train["x"], source.content_hash), side("samples", x, identity)
  floor = side(settings.split, unseen, held_out.content_hash)
  ks = settings.manifold_k, settings.coverage_k
  columns = report.columns(known, floor, samples, chosen.name, settings.seed, *ks)
  closest = neighbours.nearest(samples.x, known.x, _SHOWN[1])
  first = np.argsort(closest.distance[:, 0], kind="stable")[: _SHOWN[0]]
  written = {
    "data": {"name": source.name, "content": source.content_hash},
    "model": {name: config[name] for name in factory.MODEL_SECTIONS if name in config and name != "data"},
    "checkpoint_step": step,
    "sampler": config.get("sampler"),
    **plan.facts(),
    "seed": settings.seed,
    "features": {"name": chosen.name, "count": samples.features.shape[1]},
    "training_examples": len(known.x),
    "nfe": float(drawn["nfe"].mean()),
    "columns": report.plain(columns),
    "nearest": {
      "samples": first.tolist(),
      "training_examples": closest.rows[first].tolist(),
      "distances": closest.distance[first].tolist(),
    },
  }
  (workdir / "evaluation.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
  if len(source.shape) == 3 and source.shape[-1] in (1, 3):
    shown, images = (np.asarray(features.to_values(y, source.levels)) for y in (x[first], train["x"]))
    pictures.save_neighbours(workdir / "neighbours.png", shown, images, closest.rows[first])
  title = f"{source.name}, against {len(known.x)} training examples, {samples.features.shape[1]} features, "
  print(report.table(f"{title}seed {settings.seed}", columns))
  console.list_files(workdir, "evaluation.json", "neighbours.png")


def _check_enough(settings: EvaluateSettings, train: int, held_out: int) -> None:
  least = 1 + max(settings.manifold_k, settings.coverage_k)
  if min(train, held_out) < least:
    raise ConfigError(
      f"config.evaluate.manifold_k and coverage_k need {least} examples a side; there are {train} to train and "
      f"{held_out} held out: lower them, or take another split"
    )


def _features(settings: EvaluateSettings, train: Any, levels: int | None) -> features.Features:
  try:
    return features.choose(settings.features, train, levels, settings.seed, settings.weights)
  except (ValueError, OSError) as error:
    raise ConfigError(f"config.evaluate: {error}") from error


def _draw_in_chunks(
  config: Config,
  settings: EvaluateSettings,
  plan: guiding.Plan,
  source: Source,
  params: Any,
  folder: Path,
  mesh: Mesh,
) -> tuple[dict[str, np.ndarray], str]:
  """The samples, and what they depend on."""
  system, size = systems.of(config), settings.batch_size
  process, shape = system.process(config, params), system.shape(config, source)
  sampler = system.sampler(config, process)
  given = factory.make_given(config, settings.split, plan.told.stated)
  guided = guiding.guided(config, plan, source, params)
  draw = runs.drawer(
    *(guided.score, guided.params, process, sampler, shape, size, settings.seed, mesh, given, guided.decode)
  )
  names = (*factory.MODEL_SECTIONS[1:], "sampler")
  facts = {name: config[name] for name in names if name in config} | plan.facts()
  facts |= {} if given is None or given.source is None else {"given": given.source.content_hash}
  identity = chunks.identify(guided.params, seed=settings.seed, **facts)

  def batch(start: int) -> dict[str, np.ndarray]:
    drawn = draw(start)
    status.check(drawn["code"], drawn["accepted"])
    return drawn

  return chunks.in_chunks(folder, "samples", identity, settings.num, size, batch), identity


def compare(folders: Sequence[Path]) -> None:
  """Print the likelihoods of several runs in one table, paired on the same examples."""
  try:
    print(comparison.table([comparison.read(folder) for folder in folders]))
  except comparison.ComparisonError as error:
    raise ConfigError(str(error)) from error
