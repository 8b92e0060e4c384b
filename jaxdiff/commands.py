"""The commands: train, sample, likelihood, evaluate, each from a checked config and the directory of the run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff import factory, objectives, parallel, rundir, samplers, status, training
from jaxdiff.data import pipeline
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import baselines, chunks, features, neighbours, pictures, report, runs
from jaxdiff.schema import Config, ConfigError, EvaluateSettings, LikelihoodSettings, SampleSettings
from jaxdiff.training.metrics import read_metrics

_ANIMATED = 100  # samples in an animation
_FRAMES = 60
_QUANTILES = {"static": None, "dynamic": 0.995}
_SHOWN = 10, 7  # samples in neighbours.png, and training images beside each


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def _check_batch(name: str, size: int, devices: int) -> None:
  if size % devices:
    nearest = max(devices, devices * round(size / devices))
    raise ConfigError(f"config.{name} = {size} cannot be split over {devices} devices; take {nearest}")


def train(config: Config, workdir: Path) -> None:
  """Train from the newest checkpoint in the workdir, or from the start."""
  settings, mesh = factory.train_settings(config), parallel.make_mesh()
  _check_batch("train.batch_size", settings.batch_size, mesh.size)
  source = factory.make_source(config, "train")
  if settings.batch_size > len(source):
    raise ConfigError(f"config.train.batch_size = {settings.batch_size} exceeds the {len(source)} training examples")
  loss, optimizer = objectives.make_objective(config, source), factory.make_optimizer_of(config)
  params = factory.init_params(config, source)

  iterator = pipeline.train_batches(source, settings.batch_size, config["seed"])
  key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
  state = parallel.replicate(mesh, training.init_state(params, optimizer, key))
  step = training.make_train_step(loss, optimizer, settings.ema_decay, settings.batch_size)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  _say(f"{source.name}: {len(source)} examples {source.shape}; {count:,} parameters; {mesh.size} {jax.devices()[0]}")
  fingerprint = rundir.fingerprint(config, source)
  with (
    rundir.claimed(workdir, config),
    training.Checkpoints(workdir / "checkpoints", fingerprint, keep=settings.keep) as checkpoints,
  ):
    state = checkpoints.restore_latest(training.abstract_state(state), iterator) or state
    factory.write(config, workdir / "config.json")
    _say(_standing(int(state.step), settings.steps))
    with rundir.StopSignal() as stop:
      state = training.train(
        state,
        parallel.jit_train_step(step, mesh),
        iterator,
        mesh=mesh,
        global_batch=settings.batch_size,
        total_steps=settings.steps,
        log_every=settings.log_every,
        workdir=workdir,
        checkpoints=checkpoints,
        checkpoint_every=settings.checkpoint_every,
        should_stop=lambda: stop.signum is not None,
      )
  if stop.signum is not None:
    raise rundir.Stopped(stop.signum, int(state.step))
  records = read_metrics(workdir / "metrics.jsonl")
  pictures.save_loss(
    workdir / "loss.png",
    [int(record["step"]) for record in records],
    [record["loss"] / np.prod(source.shape) for record in records],
    "loss/dim",
  )
  _list(workdir, "checkpoints", "loss.png", "metrics.jsonl", "config.json")


def _standing(step: int, steps: int) -> str:
  if step >= steps:
    return f"this run is finished: {step} of {steps} steps are done; to train longer, take another workdir"
  return f"continuing from step {step}" if step else f"training for {steps} steps"


def sample(config: Config, workdir: Path) -> None:
  """Draw samples of the trained model."""
  settings, mesh = factory.sample_settings(config), parallel.make_mesh()
  _check_batch("sample.batch_size", settings.batch_size, mesh.size)
  source, params, step = rundir.load(workdir, config)
  process = factory.make_process(config, params)
  score = _thresholded(factory.make_score(config), process, settings.threshold)
  sampler = factory.make_sampler(config, process)
  _say(f"sampling from step {step} by {config['sampler']['type']}")
  drawn = runs.draw(
    score, params, process, sampler, source.shape, settings.num, settings.batch_size, settings.seed, mesh
  )
  np.savez_compressed(workdir / "samples.npz", x=drawn["x"], nfe=drawn["nfe"])
  (workdir / "denoising.gif").unlink(missing_ok=True)  # that of other samples
  status.check(drawn["code"], drawn["accepted"])
  _say(f"{drawn['nfe'].mean():.0f} network evaluations a sample")
  if _can_be_shown(source):
    _show_samples(workdir, source, drawn["x"])
    if factory.has_path(config):
      count = max(_ANIMATED if settings.gif else 0, settings.trajectories)
      with_path = factory.make_sampler(config, process, path=_path(sampler))
      paths = runs.trajectories(
        score(params), process, with_path, source.shape, min(count, settings.num), settings.seed
      )
      _show_paths(workdir, source, paths, settings)
  _list(workdir, "samples.png", "denoising.png", *(["denoising.gif"] if settings.gif else []), "samples.npz")


def _can_be_shown(source: Source) -> bool:
  return source.shape == (2,) or (len(source.shape) == 3 and source.shape[-1] in (1, 3))


def _thresholded(score: Callable[[Any], Any], process: Any, threshold: str) -> Callable[[Any], Any]:
  if threshold == "none":
    return score
  return lambda params: samplers.thresholded(process, score(params), quantile=_QUANTILES[threshold])


def _path(sampler: Any) -> int:
  """Every how many steps to keep a state: a divisor of the steps that leaves about `_FRAMES`, or 1."""
  if not hasattr(sampler, "ts"):
    return True
  steps = len(sampler.ts) - 1
  divisors = [k for k in range(1, steps + 1) if steps % k == 0]
  return min(divisors, key=lambda k: abs(np.log(steps / k / _FRAMES)))


def _show_samples(workdir: Path, source: Source, x: np.ndarray) -> None:
  if source.shape == (2,):
    pictures.save_scatter(workdir / "samples.png", x, source.gather(np.arange(min(len(source), len(x))))["x"])
  else:
    pictures.save_grid(workdir / "samples.png", x, columns=round(len(x) ** 0.5))


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


def likelihood(config: Config, workdir: Path) -> None:
  """Evaluate the trained model on held-out data."""
  settings, mesh = factory.likelihood_settings(config), parallel.make_mesh()
  _check_batch("likelihood.batch_size", settings.batch_size, mesh.size)
  source, params, step = rundir.load(workdir, config)
  held_out = factory.make_source(config, settings.split)
  _say(f"evaluating step {step} on {settings.split}")
  size = _batch_size(settings.batch_size, min(len(held_out), settings.limit or len(held_out)), mesh.size)
  values = _evaluate(config, settings, params, held_out, size, mesh)
  np.savez_compressed(workdir / "likelihood.npz", allow_pickle=False, **values)
  failed = int(np.count_nonzero(values["code"]))
  rows = {} if held_out.levels is None else _reference_rows(source, held_out, len(values["value"]))
  if not failed:
    rows["model"] = baselines.mean_and_error(values["value"])
  if "bound" in values:
    rows["model, variational bound"] = baselines.mean_and_error(values["bound"])
  unit = "nats" if held_out.levels is None else "bits/dim"
  report = {
    "unit": f"log-density, {unit}" if held_out.levels is None else unit,
    "model": {name: config[name] for name in ("sde", "prediction", "network")},
    "data": {"name": held_out.name, "content": held_out.content_hash},
    "split": settings.split,
    "examples": len(values["value"]),
    "failed": failed,
    "checkpoint_step": step,
    "nfe": {"mean": float(values["nfe"].mean()), "min": int(values["nfe"].min()), "max": int(values["nfe"].max())},
    "probe_standard_error": _finite(float(np.sqrt(np.mean(values["standard_error"] ** 2)))),
    "settings": config["likelihood"],
    "results": {name: {"mean": row.mean, "standard_error": _finite(row.standard_error)} for name, row in rows.items()},
  }
  (workdir / "likelihood.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  status.check(values["code"], values["accepted"])
  print(_table(f"{held_out.name}, {settings.split}: {report['examples']} examples, {report['unit']}", rows))
  print(f"{report['nfe']['mean']:.0f} network evaluations an example ({report['nfe']['min']}-{report['nfe']['max']})")
  _list(
    workdir,
    "checkpoints",
    "likelihood.json",
    "likelihood.npz",
    "samples.png",
    "denoising.png",
    "loss.png",
    "config.json",
  )


def _evaluate(
  config: Config, settings: LikelihoodSettings, params: Any, held_out: Source, size: int, mesh: Mesh
) -> dict[str, np.ndarray]:
  """The probability flow's log-likelihoods and, if wanted, their variational bounds, on the same dequantized data."""
  run = lambda one_batch, what: runs.evaluate(
    one_batch, params, held_out, settings.limit, size, settings.seed, mesh, what
  )
  values = run(objectives.make_log_likelihood(config, params, held_out), "likelihood")
  if settings.bound_draws:
    values |= run(objectives.make_bound(config, params, held_out, settings.bound_draws), "bound")
  return values


def evaluate(config: Config, workdir: Path) -> None:
  """Measure samples of the trained model against its data; what was finished before a stop is not done again."""
  settings, mesh = factory.evaluate_settings(config), parallel.make_mesh()
  _check_batch("evaluate.batch_size", settings.batch_size, mesh.size)
  source, params, step = rundir.load(workdir, config)
  held_out = factory.make_source(config, settings.split)
  train = source.gather(np.arange(min(len(source), settings.reference or len(source))))
  unseen = held_out.gather(np.arange(min(len(held_out), settings.num)))["x"]
  _check_enough(settings, len(train["x"]), len(unseen))
  _say(f"evaluating {settings.num} samples from step {step}")
  chosen = _features(settings, train, source.levels)
  drawn, identity = _draw_in_chunks(config, settings, source, params, workdir / "evaluation", mesh)
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
    "model": {name: config[name] for name in ("sde", "prediction", "network")},
    "checkpoint_step": step,
    "sampler": config["sampler"],
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
  _list(workdir, "evaluation.json", "neighbours.png")


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
  config: Config, settings: EvaluateSettings, source: Source, params: Any, folder: Path, mesh: Mesh
) -> tuple[dict[str, np.ndarray], str]:
  """The samples, and what they depend on."""
  process = factory.make_process(config, params)
  sampler, size = factory.make_sampler(config, process), settings.batch_size
  draw = runs.drawer(factory.make_score(config), params, process, sampler, source.shape, size, settings.seed, mesh)
  facts = {name: config[name] for name in ("sde", "prediction", "network", "sampler")}
  identity = chunks.identify(params, seed=settings.seed, **facts)

  def batch(start: int) -> dict[str, np.ndarray]:
    drawn = draw(start)
    status.check(drawn["code"], drawn["accepted"])
    return drawn

  return chunks.in_chunks(folder, "samples", identity, settings.num, size, batch), identity


def _batch_size(wanted: int, examples: int, devices: int) -> int:
  """The wanted batch size, or what the examples fill."""
  if examples < devices:
    raise ConfigError(
      f"{examples} examples cannot be split over {devices} devices: evaluate more, or use fewer devices"
    )
  return min(wanted, examples - examples % devices)


def _finite(value: float) -> float | None:
  return value if np.isfinite(value) else None


def _reference_rows(source: Any, held_out: Any, count: int) -> dict[str, baselines.Bits]:
  seen = source.gather(np.arange(min(len(source), 20_000)))["x"]
  unseen = held_out.gather(np.arange(count))["x"]
  rows = {
    "uniform": baselines.uniform(held_out.levels),
    "per-pixel histogram": baselines.histogram(seen, unseen, held_out.levels),
  }
  if np.prod(held_out.shape) <= 1024:
    rows["full-covariance Gaussian"] = baselines.gaussian(seen, unseen)
  return rows


def _table(title: str, rows: dict[str, baselines.Bits]) -> str:
  width = max(map(len, rows))
  lines = [f"  {name:<{width}}  {row.mean:8.4f} +- {row.standard_error:.4f}" for name, row in rows.items()]
  return "\n".join([title, *lines])


def _list(workdir: Path, *names: str) -> None:
  """Print the paths of what is there."""
  for name in names:
    if (workdir / name).exists():
      print(workdir / name)
