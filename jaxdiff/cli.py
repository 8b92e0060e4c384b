"""The command line: `jaxdiff train | sample | likelihood --config=FILE --workdir=DIR [--config.field=value ...]`.

A run lives in its workdir: config.json, checkpoints/, metrics.jsonl, and what sample and likelihood write beside them.
All commands find the run's own config there when --config is not given.
"""

import difflib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

USAGE = """usage: jaxdiff COMMAND --workdir=DIR [--config=FILE] [--config.field=value ...]

  train        train, or continue from the newest checkpoint in DIR
  sample       draw samples: samples.png, samples.npz, denoising.png
  likelihood   evaluate held-out data: likelihood.json, likelihood.npz, a table

--config is a Python file with get_config(), such as configs/digits.py; without it the run's own config in DIR is used.
"""


def _avoid_miscompiled_reductions() -> None:
  """The CPU backend of jaxlib 0.10.2 to 0.12.0 gives wrong numbers for some large sums: turn that path off."""
  version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:3])
  flag = "--xla_cpu_experimental_ynn_fusion_type"
  if (0, 10, 2) <= version <= (0, 12, 0) and flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=-reduce".strip()


_avoid_miscompiled_reductions()

import jax  # noqa: E402, XLA reads its flags once
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from jaxdiff import factory, parallel, status, training  # noqa: E402
from jaxdiff.data import pipeline  # noqa: E402
from jaxdiff.evaluation import baselines, pictures, runs  # noqa: E402
from jaxdiff.factory import Config, ConfigError  # noqa: E402
from jaxdiff.training.metrics import read_metrics  # noqa: E402


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def _check_batch(name: str, size: int, devices: int) -> None:
  if size % devices:
    nearest = max(devices, devices * round(size / devices))
    raise ConfigError(f"config.{name} = {size} cannot be split over {devices} devices; take {nearest}")


def _claim(workdir: Path, config: Config) -> None:
  """Make the workdir this run's own; refuse one that holds another run."""
  path = workdir / "config.json"
  if path.exists():
    differences = _differences(factory.identity(factory.read(path)), factory.identity(config))
    if differences:
      raise ConfigError(
        f"{workdir} holds another run: {'; '.join(differences)}. Take another workdir, or leave these settings alone"
      )
  workdir.mkdir(parents=True, exist_ok=True)
  factory.write(config, path)


def _differences(saved: Any, given: Any, path: str = "config") -> list[str]:
  if isinstance(saved, dict) and isinstance(given, dict):
    names = sorted(saved.keys() | given.keys())
    return [line for name in names for line in _differences(saved.get(name), given.get(name), f"{path}.{name}")]
  return [] if saved == given else [f"{path} was {saved!r}, is {given!r}"]


def train(config: Config, workdir: Path) -> None:
  """Train from the newest checkpoint in the workdir, or from the start."""
  settings, mesh = factory.train_settings(config), parallel.make_mesh()
  _check_batch("train.batch_size", settings.batch_size, mesh.size)
  source = factory.make_source(config, "train")
  if settings.batch_size > len(source):
    raise ConfigError(f"config.train.batch_size = {settings.batch_size} exceeds the {len(source)} training examples")
  objective, optimizer = factory.make_objective(config, source), factory.make_optimizer_of(config)
  params = factory.init_params(config, source)
  _claim(workdir, config)

  iterator = pipeline.train_batches(source, settings.batch_size, config["seed"])
  key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
  state = parallel.replicate(mesh, training.init_state(params, optimizer, key))
  step = training.make_train_step(objective, optimizer, settings.ema_decay, settings.batch_size)
  data = pipeline.fingerprint(source, settings.batch_size, config["seed"])
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  _say(f"{source.name}: {len(source)} examples {source.shape}; {count:,} parameters; {mesh.size} {jax.devices()[0]}")
  fingerprint = {"config": factory.identity(config), "data": data}
  with training.Checkpoints(workdir / "checkpoints", fingerprint, keep=settings.keep) as checkpoints:
    restored = checkpoints.restore_latest(training.abstract_state(state), iterator)
    if restored is not None:
      state = restored
      _say(f"continuing from step {int(state.step)}")
    training.train(
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
    )
  records = read_metrics(workdir / "metrics.jsonl")
  pictures.save_loss(
    workdir / "loss.png",
    [int(record["step"]) for record in records],
    [record["loss"] / np.prod(source.shape) for record in records],
    "loss per dimension",
  )
  _list(workdir, "checkpoints", "loss.png", "metrics.jsonl", "config.json")


def _load(config: Config, workdir: Path) -> tuple[Any, Any, int]:
  """(training source, parameters, step) of the run in the workdir."""
  source = factory.make_source(config, "train")
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  try:
    params, step = training.load_params(workdir / "checkpoints", shapes)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  return source, params, step


def sample(config: Config, workdir: Path) -> None:
  """Draw samples of the trained model."""
  settings, mesh = factory.sample_settings(config), parallel.make_mesh()
  _check_batch("sample.batch_size", settings.batch_size, mesh.size)
  source, params, step = _load(config, workdir)
  process = factory.make_process(config)
  score = factory.make_score(config)
  _say(f"sampling from step {step}")
  drawn = runs.draw(
    score,
    params,
    process,
    factory.make_sampler(config),
    source.shape,
    settings.num,
    settings.batch_size,
    settings.seed,
    mesh,
  )
  np.savez_compressed(workdir / "samples.npz", x=drawn["x"], nfe=drawn["nfe"])
  status.check(drawn["code"], drawn["accepted"])
  paths = runs.trajectories(
    score(params),
    process,
    factory.make_sampler(config, path=True),
    source.shape,
    min(settings.trajectories, settings.num),
    settings.seed,
  )
  if len(source.shape) == 3 and source.shape[-1] in (1, 3):
    pictures.save_grid(workdir / "samples.png", drawn["x"], columns=round(settings.num**0.5))
    # Most of the way is pure noise or all but done: ten of twelve columns show the middle half.
    fractions = np.array([0.0, *np.linspace(0.25, 0.75, 10), 1.0])
    shown = paths[(fractions * (len(paths) - 1)).round().astype(int)]
    pictures.save_grid(workdir / "denoising.png", shown.swapaxes(0, 1).reshape(-1, *source.shape), columns=12)
  elif source.shape == (2,):
    data = source.gather(np.arange(min(len(source), settings.num)))["x"]
    pictures.save_scatter(workdir / "samples.png", drawn["x"], data)
    pictures.save_paths(workdir / "denoising.png", paths, data)
  _list(workdir, "samples.png", "denoising.png", "samples.npz")


def likelihood(config: Config, workdir: Path) -> None:
  """Evaluate the trained model on held-out data."""
  settings, mesh = factory.likelihood_settings(config), parallel.make_mesh()
  _check_batch("likelihood.batch_size", settings.batch_size, mesh.size)
  held_out = factory.make_source(config, settings.split)
  source, params, step = _load(config, workdir)
  _say(f"evaluating step {step} on {settings.split}")
  values = runs.log_likelihoods(
    factory.make_score(config),
    params,
    factory.make_log_prob(config),
    held_out,
    settings.limit,
    _batch_size(settings.batch_size, min(len(held_out), settings.limit or len(held_out)), mesh.size),
    settings.seed,
    mesh,
  )
  np.savez_compressed(workdir / "likelihood.npz", allow_pickle=False, **values)
  failed = int(np.count_nonzero(values["code"]))
  rows = {} if held_out.levels is None else _reference_rows(source, held_out, len(values["value"]))
  if not failed:
    rows["model"] = baselines.mean_and_error(values["value"])
  unit = "nats" if held_out.levels is None else "bits/dim"
  report = {
    "unit": f"log-density, {unit}" if held_out.levels is None else unit,
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


COMMANDS: dict[str, Callable[[Config, Path], None]] = {"train": train, "sample": sample, "likelihood": likelihood}


def parse(argv: list[str]) -> tuple[str, Config, Path]:
  """The command, the resolved config and the workdir of a command line."""
  command = argv[0] if argv else ""
  if command not in COMMANDS:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"unknown command {command!r}{hint}\n\n{USAGE}" if command else USAGE)
  workdir, file = _argument(argv, "--workdir"), _argument(argv, "--config")
  if workdir is None:
    raise ConfigError("--workdir=DIR is needed: the directory of the run")
  own, values = Path(workdir) / "config.json", flags.FlagValues()
  flags.DEFINE_string("workdir", None, "The directory of the run.", flag_values=values)
  if file is not None and not Path(file).is_file():
    raise ConfigError(f"--config={file} is not a file")
  if file is None and not own.exists():
    raise ConfigError(f"{own} does not exist: train first, or give --config=FILE")
  sys.argv = ["jaxdiff", *argv]
  try:
    if file is not None:
      config_flags.DEFINE_config_file("config", flag_values=values)
    else:
      config_flags.DEFINE_config_dict("config", ConfigDict(factory.read(own)), flag_values=values)
    rest = values(sys.argv)[2:]
    config = factory.normalize(values["config"].value)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"cannot read the config: {_message(error)}") from error
  if rest:
    raise ConfigError(f"unexpected argument {rest[0]!r}: settings are given as --config.field=value")
  return command, config, Path(workdir)


def _message(error: Exception) -> str:
  """The text of an error that may hold another one, on one line."""
  text: Any = error
  while isinstance(text, Exception):
    text = text.args[0] if text.args else type(text).__name__
  return " ".join(str(text).split())


def _argument(argv: list[str], name: str) -> str | None:
  """The value of `--name=value` or `--name value`."""
  for arg, following in zip(argv, [*argv[1:], None], strict=True):
    if arg == name:
      return following
    if arg.startswith(f"{name}="):
      return arg.split("=", 1)[1]
  return None


def main(argv: list[str] | None = None) -> None:
  """Run a command; exit with 2 for a mistake in the input, 1 for a run that failed."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(USAGE)
    return
  try:
    command, config, workdir = parse(argv)
    factory.check(config)
    COMMANDS[command](config, workdir)
  except (ConfigError, training.FingerprintError) as error:
    _say(f"jaxdiff: {error}")
    sys.exit(2)
  except (training.CheckpointError, training.NonFiniteError, status.SolveError) as error:
    _say(f"jaxdiff: {error}")
    sys.exit(1)
  except KeyboardInterrupt:
    _say("jaxdiff: interrupted; the same command continues a training from its newest checkpoint")
    sys.exit(130)


if __name__ == "__main__":
  main()
