"""The commands `import`, from published weights to the directory of a run, and `export`, from that to safetensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxdiff import arguments, factory, options, rundir, schema, systems, training, weights
from jaxdiff.commands import console
from jaxdiff.schema import Config, ConfigError
from jaxdiff.weights import files, score_sde

_LOSSES = {1: "ddpm_simple", 2: "ddpm_hybrid"}  # by the parts of the output


class _Model(NamedTuple):
  """What is imported: sections of a config, and the parameters."""

  sections: Config
  params: Any


def import_model(path: Path, workdir: Path, texts: Mapping[str, str]) -> None:
  """Make the directory of a run of published weights, in which samples can be drawn and likelihoods evaluated.

  Raises:
    ConfigError: weights that cannot be read or do not fit, data of another shape, or a directory that holds a run.
  """
  if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
    raise ConfigError(f"{workdir} holds a run already: import into another workdir")
  texts = dict(texts)
  preset = texts.pop("--preset", None)
  try:
    model = _read(path, preset)
  except weights.WeightsError as error:
    raise ConfigError(str(error)) from error
  shape = model.sections["data"]["shape"]
  named: Config = {"data": {}} if "data.type" in texts else {}
  config = factory.normalize(arguments.override(_defaults(model.sections) | model.sections | named, texts))
  systems.check(config)
  source = factory.make_source(config, "train")
  if source.shape != shape:
    raise ConfigError(f"config.data: {source.name} has the shape {source.shape}, the model is for {shape}")
  _check_fit(config, source, model.params)
  _write(config, source, model.params, workdir)
  count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  console.say(f"{config['network']['type']} of {count:,} parameters for {shape}; data: {source.name}")
  console.list_files(workdir, "checkpoints", "config.json")


def _read(path: Path, preset: str | None) -> _Model:
  if preset is not None:
    return _score_sde(score_sde.load(path, preset))
  if path.is_dir() and (path / files.CONFIG).is_file() and "network" in (saved := files.read_json(path / files.CONFIG)):
    return _exported(path, factory.normalize(saved))
  published = weights.load(path)
  if published.type != "UNet":
    raise ConfigError(
      f"{path} holds a {published.type}, which a run cannot be made of yet: a DiT works on the latents of an "
      "autoencoder and is told a class, and the commands work on the data themselves. In programs "
      "jaxdiff.weights.load reads both"
    )
  chain, parts = published.chain or weights.Chain(), published.fields["parts"]
  sections = {
    "data": {"type": "absent", "shape": published.shape, "levels": 256},
    "sde": {"type": "DDPM", "steps": chain.steps, "schedule": chain.schedule},
    "prediction": {"type": chain.prediction},
    "loss": {"type": _LOSSES[parts]},
    "network": {"type": published.type, **published.fields},
  }
  return _Model(sections, published.params)


def _score_sde(published: score_sde.ScoreSDE) -> _Model:
  sections = {
    "data": {"type": "absent", "shape": published.shape, "levels": 256},
    "sde": published.sde,
    "prediction": published.prediction,
    "loss": {"type": "denoising"},
    "network": {"type": "UNet", **published.fields},
  }
  return _Model(sections, published.params)


def _exported(path: Path, saved: Config) -> _Model:
  shape, levels = saved["data"]["shape"], saved["data"]["levels"]
  model = {name: saved[name] for name in ("sde", "prediction", "loss", "network")}
  sections = model | {"data": {"type": "absent", "shape": shape, "levels": levels}}
  config = _defaults(sections) | sections
  systems.check(config)
  shapes = jax.eval_shape(lambda: factory.init_params(config, factory.make_source(config, "train")))
  return _Model(sections, weights.restore(path, shapes))


def _defaults(sections: Config) -> Config:
  """The settings that a published model comes without.

  A chain has no time between its first step and the data for which its network was trained: there the likelihood
  starts, and there samplers end, with the data prediction.
  """
  t0 = 1 / sections["sde"].get("steps", 1000) if sections["sde"]["type"] == "DDPM" else None
  sampler = {"type": "dpm_solver_pp", "grid": {"steps": 50, "kind": "log_snr", "t0": t0}, "denoise": True}
  return {
    "seed": 0,
    "optimizer": {"learning_rate": 2e-4, "warmup_steps": 1000, "schedule": "constant"},
    "train": {"batch_size": 128, "steps": 100_000, "ema_decay": 0.9999},
    "sample": {"num": 64, "batch_size": 64},
    "sampler": sampler,
    "likelihood": {"t0": t0, "batch_size": 64},
  }


def _check_fit(config: Config, source: Any, params: Any) -> None:
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  plain = lambda tree: {
    jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  if found := factory.differences(plain(params), plain(shapes), "params"):
    raise ConfigError(f"config.network is not that of the weights: {'; '.join(found)}")


def _write(config: Config, source: Any, params: Any, workdir: Path) -> None:
  settings = options.train(config)
  key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
  state = training.init_state(params, factory.make_optimizer_of(config), key, settings.ema_lengths)
  with rundir.claimed(workdir, config):
    fingerprint = rundir.fingerprint(config, source)
    with training.Checkpoints(workdir / "checkpoints", fingerprint) as checkpoints:
      checkpoints.save(state, {"next_index": 0})
    factory.write(config, workdir / "config.json")


def export_model(path: Path, workdir: Path, texts: Mapping[str, str]) -> None:
  """Write the averaged parameters of a run as safetensors, and what they are.

  Raises:
    ConfigError: there is no run, its parameters are more than arrays by name, or the folder cannot be written.
  """
  if texts:
    raise ConfigError("jaxdiff export takes no settings: the model is as it was trained")
  config = factory.read(workdir / "config.json")
  if (kind := schema.kind(config)) not in ("diffusion", "classifier"):
    raise ConfigError(f"jaxdiff export is for diffusions of the data, and {workdir} holds a run of the kind {kind!r}")
  source, params, step = rundir.load(workdir, config)
  sections = {name: config[name] for name in ("sde", "prediction", "loss", "network")}
  about = {"data": {"name": source.name, "shape": source.shape, "levels": source.levels}, "step": step}
  try:
    weights.save(path, params, sections | about)
  except (OSError, TypeError, ValueError) as error:
    raise ConfigError(f"{path}: {error}") from error
  console.say(f"step {step}, {sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)):,} parameters")
  console.list_files(path, "model.safetensors", "config.json")
