"""The command `train`: from a checked config to a trained run, on one process or on several."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdiff import factory, keys, objectives, options, parallel, rundir, schema, systems, training
from jaxdiff.commands import console, telling
from jaxdiff.data import pipeline
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import features, pictures, runs
from jaxdiff.schema import Config, ConfigError
from jaxdiff.settings import TrainSettings
from jaxdiff.training import cost, hooks
from jaxdiff.training.metrics import MetricsWriter, read_metrics
from jaxdiff.training.snapshots import Snapshots
from jaxdiff.training.state import TrainState

_BOUND_DRAWS = 4  # of the variational bound in a validation
_RECONSTRUCTED = 32  # examples in a picture


def train(config: Config, workdir: Path, profile: tuple[int, int] | None = None) -> None:
  """Train from the newest checkpoint in the workdir, or from the start; `profile` traces the steps between its two."""
  rundir.check_examples(config)
  settings = options.train(config)
  launcher = _launcher(settings)
  console.check_batch("train.batch_size", settings.batch_size, launcher.mesh.size, settings.microbatches)
  source = console.together(lambda: factory.make_source(config, "train"))
  if settings.batch_size > len(source):
    raise ConfigError(f"config.train.batch_size = {settings.batch_size} exceeds the {len(source)} training examples")
  if settings.sample_every:
    _check_sampling(config, source, launcher)
  fingerprint = rundir.fingerprint(config, source)
  rundir.check_same_everywhere({"config": config, "data": fingerprint["data"]})

  init, step = _program(config, source)
  iterator = pipeline.train_batches(
    source, settings.batch_size, config["seed"], jax.process_index(), jax.process_count()
  )
  abstract = _placed(launcher, init)
  _introduce(source, abstract, launcher)
  with contextlib.ExitStack() as stack:
    claim = lambda: stack.enter_context(rundir.claimed(workdir, config)) if console.first_process() else None
    console.together(claim)
    checkpoints = stack.enter_context(
      training.Checkpoints(workdir / "checkpoints", fingerprint, keep=settings.keep, keep_every=settings.keep_every)
    )
    state = checkpoints.restore_latest(abstract, iterator) or launcher.create(init)
    start = int(state.step)
    if console.first_process():
      factory.write(config, workdir / "config.json")
    console.say(_standing(start, settings.steps))
    folder = workdir if console.first_process() else None
    writer = stack.enter_context(MetricsWriter(folder, start, settings.wandb))
    stop = stack.enter_context(rundir.StopSignal())
    state = training.train(
      state,
      launcher.compile(step, settings.steps_per_dispatch),
      iterator,
      launcher=launcher,
      global_batch=settings.batch_size,
      total_steps=settings.steps,
      steps_per_dispatch=settings.steps_per_dispatch,
      log_every=settings.log_every,
      writer=writer,
      rates=cost.rates(_flops(config, source, abstract)),
      checkpoints=checkpoints,
      checkpoint_every=settings.checkpoint_every,
      max_skipped=settings.max_skipped,
      limits=systems.of(config).limits(config, source),
      hooks=list(_hooks(config, source, launcher, writer, workdir, profile, stack)),
      should_stop=stop.agreed,
    )
  if stop.signum is not None:
    raise rundir.Stopped(stop.signum, int(state.step))
  if console.first_process():
    _show_loss(workdir, None if schema.is_classifier(config) else source)
    console.list_files(workdir, "checkpoints", "loss.png", "metrics.jsonl", "samples", "reconstructions", "config.json")


def _program(config: Config, source: Source) -> tuple[Callable[[], TrainState], Callable[..., Any]]:
  """What is run wherever that is: the state before the first step, and the train step."""
  settings, key = options.train(config), jax.random.fold_in(jax.random.key(config["seed"]), 1)
  system = systems.of(config)
  objective, optimizer = system.objective(config, source), system.optimizer(config)
  pretrained = system.pretrained(config)
  lengths, parts = settings.ema_lengths, settings.microbatches

  def init() -> TrainState:
    params = system.init_params(config, source)
    return training.init_state({**params, **pretrained} if pretrained else params, optimizer, key, lengths)

  step = training.make_train_step(
    objective, optimizer, settings.ema_decay, settings.batch_size, ema_lengths=lengths, microbatches=parts
  )
  return init, step


def _flops(config: Config, source: Source, state: TrainState) -> float | None:
  """Those of one step of the model: in one part, and without what rematerialization computes again."""
  plain = {name: value for name, value in config["network"].items() if name != "remat"}
  config = config | {"network": plain, "train": {**config["train"], "microbatches": 1}}
  batch_size = options.train(config).batch_size
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), source.gather([0]))
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
  return cost.step_flops(_program(config, source)[1], shapes, batch, jax.ShapeDtypeStruct((batch_size,), jnp.int32))


def _launcher(settings: TrainSettings) -> parallel.Launcher:
  if settings.launcher == "pmap":
    if settings.fsdp > 1:
      raise ConfigError(f"config.train.fsdp = {settings.fsdp} needs config.train.launcher = 'jit': pmap replicates")
    return parallel.pmap_launcher()
  try:
    return parallel.jit_launcher(parallel.make_mesh(jax.devices(), settings.fsdp))
  except ValueError as error:
    raise ConfigError(f"config.train.fsdp: {error}") from error


def _placed(launcher: parallel.Launcher, init: Callable[[], TrainState]) -> TrainState:
  try:
    return launcher.abstract(init)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f"config.train.fsdp: {error}") from error


def _introduce(source: Source, state: TrainState, launcher: parallel.Launcher) -> None:
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  devices = f"{launcher.mesh.size} {jax.devices()[0].device_kind}"
  among = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  console.say(f"{source.name}: {len(source)} examples {source.shape}; {count:,} parameters; {devices}{among}")


def _standing(step: int, steps: int) -> str:
  if step >= steps:
    return f"this run is finished: {step} of {steps} steps are done; to train longer, take another workdir"
  return f"continuing from step {step}" if step else f"training for {steps} steps"


def _hooks(
  config: Config,
  source: Source,
  launcher: parallel.Launcher,
  writer: MetricsWriter,
  workdir: Path,
  profile: tuple[int, int] | None,
  stack: contextlib.ExitStack,
) -> Iterator[training.Hook]:
  settings = options.train(config)
  if settings.ema_lengths:
    stored = stack.enter_context(Snapshots(workdir / "snapshots", settings.ema_lengths))
    yield hooks.every(settings.snapshot_every, lambda step, state: stored.save(state), settings.steps)
  if settings.validate_every:
    run = _validation(config, launcher, writer)
    yield hooks.every(settings.validate_every, run, settings.steps)
  if settings.sample_every:
    draw = _sampling(config, source, launcher, writer, workdir / "samples")
    yield hooks.every(settings.sample_every, draw, settings.steps)
  if settings.sample_every and (reconstruct := systems.of(config).reconstruct):
    show = _reconstructing(config, reconstruct, launcher, writer, workdir / "reconstructions")
    yield hooks.every(settings.sample_every, show, settings.steps)
  if profile is not None:
    traced = hooks.Profile(workdir / "profile", *profile)
    stack.callback(traced.close)
    yield traced


def _validation(config: Config, launcher: parallel.Launcher, writer: MetricsWriter) -> training.Hook:
  """Writes the means of the loss and its diagnostics over held-out examples and, where there is one, of their
  variational bound, of the average.

  The noise is the same each time, so that the numbers can be compared.
  """
  settings, classifier, system = options.train(config), schema.is_classifier(config), systems.of(config)
  split = options.evaluate(config).split
  if "likelihood" in config:
    split = options.likelihood(config).split
    config = config | {"likelihood": {**config["likelihood"], "dtype": "float32"}}
  held_out = factory.make_source(config, split)
  count = min(settings.validate_examples, len(held_out))
  size = console.batch_size(settings.batch_size, count, launcher.mesh.size)
  objective = system.objective(config, held_out, training=False)

  def one_batch(params: Any, key: jax.Array, batch: objectives.Batch) -> dict[str, jax.Array]:
    loss_key, time_key, bound_key = keys.split(key, 3)
    loss, aux = objective(params, loss_key, {**batch, "u": keys.uniform(time_key, key.shape)})
    values = {"validation_loss": loss} | {f"validation_{name}": value for name, value in aux.items() if name != "t"}
    if system.bound is not None and not (classifier or options.is_flow(config)):
      bound = system.bound(config, params, held_out, _BOUND_DRAWS)
      values["validation_bound"] = bound(params, bound_key, batch)["bound"]
    return values

  evaluate = runs.evaluation(one_batch, held_out, size, config["seed"], launcher.mesh)

  def run(step: int, state: TrainState) -> None:
    params = parallel.replicate(launcher.mesh, state.ema_params)
    parts = [evaluate(params, start) for start in range(0, count, size)]
    names = [name for name in parts[0] if name != "index"]
    writer.write(step, {n: float(np.concatenate([part[n] for part in parts])[:count].mean()) for n in names})

  return run


def _check_sampling(config: Config, source: Source, launcher: parallel.Launcher) -> None:
  if not console.can_be_shown(source):
    raise ConfigError(f"config.train.sample_every shows images or points in the plane; the data are {source.shape}")
  console.check_batch("sample.batch_size", options.sample(config).batch_size, launcher.mesh.size)


def _sampling(
  config: Config, source: Source, launcher: parallel.Launcher, writer: MetricsWriter, folder: Path
) -> training.Hook:
  """Draws samples of the average into a picture a step, and shows it."""
  settings, mesh, system = options.sample(config), launcher.mesh, systems.of(config)
  given = factory.make_given(config, settings.split, telling.told(config).stated)
  beside = source if given is None or given.source is None else given.source

  def make(params: Any) -> Callable[..., Any]:
    process, shape = system.process(config, params), system.shape(config, source)
    sampler, score, decode = system.sampler(config, process), system.score(config), system.decode(config)
    return runs.sampling(score, process, sampler, shape, settings.batch_size, settings.seed, mesh, given, decode)

  fixed = make(None) if factory.learned(config) is None else None

  def run(step: int, state: TrainState) -> None:
    params = parallel.replicate(mesh, state.ema_params)
    draw = fixed or make(parallel.to_host(params))
    parts = [draw(params, start)["x"] for start in range(0, settings.num, settings.batch_size)]
    shown = beside.gather(np.arange(min(len(beside), settings.num)))["x"]
    save = lambda path: pictures.save_samples(path, np.concatenate(parts)[: settings.num], shown)
    _picture(step, folder, writer, save)

  return run


def _reconstructing(
  config: Config, reconstruct: Any, launcher: parallel.Launcher, writer: MetricsWriter, folder: Path
) -> training.Hook:
  """Encodes and decodes held-out examples by the average into a picture a step: each above what became of it."""
  held_out = factory.make_source(config, "test")
  size = console.batch_size(_RECONSTRUCTED, len(held_out), launcher.mesh.size)
  size -= size % launcher.mesh.size
  run_batch = reconstruct(config, held_out)
  one_batch = lambda params, key, batch: {"x": run_batch(params, key, batch)}
  evaluate = runs.evaluation(one_batch, held_out, size, config["seed"], launcher.mesh)
  x = np.asarray(features.to_values(held_out.gather(np.arange(size))["x"], held_out.levels))

  def run(step: int, state: TrainState) -> None:
    y = evaluate(parallel.replicate(launcher.mesh, state.ema_params), 0)["x"]
    _picture(step, folder, writer, lambda path: pictures.save_pairs(path, x, y))

  return run


def _picture(step: int, folder: Path, writer: MetricsWriter, save: Callable[[Path], None]) -> None:
  """Save a picture as that of a step, and show it."""
  if console.first_process():
    folder.mkdir(exist_ok=True)
    path = folder / f"{step:08}.png"
    save(path)
    writer.picture(step, folder.name, np.asarray(Image.open(path).convert("RGB")))


def _show_loss(workdir: Path, source: Source | None) -> None:
  """Per dimension of the source, if there is one, and else as it is."""
  records = [record for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
  pictures.save_loss(
    workdir / "loss.png",
    [int(record["step"]) for record in records],
    [record["loss"] / (1 if source is None else np.prod(source.shape)) for record in records],
    "loss" if source is None else "loss/dim",
  )
