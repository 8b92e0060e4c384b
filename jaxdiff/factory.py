"""From a config to components: the only file that knows configs.

A config is a nested dict. A section with a `type` is one component: the tables below give its constructor, and the
constructor's signature is the schema of the rest. A section without is the settings of a step of the work. Anything
unknown is refused at once, with its path and the nearest valid spelling.
"""

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxdiff import divergence, keys, likelihood, losses, predictions, samplers, schedules, sde
from jaxdiff.data import sources
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.models import MLP, UNet
from jaxdiff.training import make_optimizer

Table = Mapping[str, Callable[..., Any]]

SOURCES: Table = {
  "digits": sources.digits,
  "toy2d": sources.toy2d,
  "npz": sources.npz,
  "image_folder": sources.image_folder,
  "tfds": sources.tfds_source,
}
PROCESSES: Table = {"VP": sde.VP, "SubVP": sde.SubVP, "CosineVP": sde.CosineVP, "VE": sde.VE, "EDM": sde.EDM}
PREDICTIONS: Table = {
  "noise": predictions.noise,
  "data": predictions.data,
  "velocity": predictions.velocity,
  "score": predictions.score,
  "edm": predictions.edm,
}
LOSSES: Table = {"denoising": losses.denoising}
WEIGHTS: Table = {
  "noise": losses.weights.noise,
  "likelihood": losses.weights.likelihood,
  "edm": losses.weights.edm,
  "min_snr": losses.weights.min_snr,
}
TIMES: Table = {
  "uniform": losses.times.uniform,
  "importance": losses.times.importance,
  "log_normal": losses.times.log_normal,
}
NETWORKS: Table = {"UNet": UNet, "MLP": MLP}
SAMPLERS: Table = {"reverse_sde": samplers.reverse_sde, "probability_flow": samplers.probability_flow}
DIVERGENCES: Table = {"exact": divergence.exact, "hutchinson": divergence.hutchinson}


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How to train. Steps count updates; `random_flip` mirrors half of the images left to right."""

  batch_size: int = 128
  steps: int = 1000
  ema_decay: float = 0.999
  random_flip: bool = False
  log_every: int = 50
  checkpoint_every: int = 500
  keep: int = 3


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """How many samples to draw, how many at a time, and how many trajectories to show."""

  num: int = 100
  batch_size: int = 100
  trajectories: int = 6
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
  """What to evaluate: a split, or its first `limit` examples (0 for all); how many at a time."""

  split: str = "test"
  limit: int = 0
  batch_size: int = 120
  seed: int = 0


Config = dict[str, Any]
SECTIONS = (
  "seed",
  "data",
  "sde",
  "prediction",
  "loss",
  "network",
  "optimizer",
  "train",
  "sample",
  "sampler",
  "likelihood",
)
TRAINING_SECTIONS = ("seed", "data", "sde", "prediction", "loss", "network", "optimizer")
_FREE_TRAIN_FIELDS = ("log_every", "checkpoint_every", "keep")


class ConfigError(ValueError):
  """A config names something that does not exist or holds a value out of range."""


def normalize(config: ConfigDict | Mapping[str, Any]) -> Config:
  """A plain dict of numbers, strings, None, tuples and dicts: what JSON keeps, with its lists read as tuples."""
  tree = json.loads(config.to_json() if isinstance(config, ConfigDict) else json.dumps(config))

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: tuples(item) for name, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  return tuples(tree)


def read(path: Path) -> Config:
  """The config that a run wrote into its directory."""
  return normalize(json.loads(path.read_text(encoding="utf-8")))


def write(config: Config, path: Path) -> None:
  """Write the resolved config as JSON."""
  path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def identity(config: Config) -> Config:
  """The part of a config that decides what a training run computes: two runs with the same are the same run."""
  train = {name: value for name, value in config["train"].items() if name not in _FREE_TRAIN_FIELDS}
  return {name: config[name] for name in TRAINING_SECTIONS} | {"train": train}


def _nearest(word: str, words: Any) -> str:
  close = difflib.get_close_matches(word.lower(), [w.lower() for w in words], n=1, cutoff=0.5)
  names = sorted(words)
  hint = f"did you mean {next(w for w in names if w.lower() == close[0])!r}? " if close else ""
  return f"{hint}valid: {', '.join(names)}"


def _construct(constructor: Callable[..., Any], fields: Mapping[str, Any], path: str, **given: Any) -> Any:
  """`constructor(**given, **fields)`, with errors that name the path in the config."""
  signature = inspect.signature(constructor).parameters
  valid = [name for name in signature if name not in given]
  for name in fields:
    if name not in valid:
      raise ConfigError(f"config.{path}.{name} does not exist; {_nearest(name, valid)}")
  missing = [n for n in valid if n not in fields and signature[n].default is inspect.Parameter.empty]
  if missing:
    raise ConfigError(f"config.{path} needs a value for {', '.join(missing)}")
  try:
    return constructor(**given, **fields)
  except (ValueError, TypeError, FileNotFoundError) as error:
    raise ConfigError(f"config.{path}: {error}") from error


def _component(table: Table, section: Any, path: str, **given: Any) -> Any:
  """The component that a section names by its `type`."""
  kind = str(section.get("type")) if isinstance(section, Mapping) else "missing"
  if kind not in table:
    raise ConfigError(f"config.{path}.type is {kind!r}; {_nearest(kind, table)}")
  return _construct(table[kind], {name: value for name, value in section.items() if name != "type"}, path, **given)


def check_sections(config: Config) -> None:
  """Refuse sections that do not exist, and name those that are missing."""
  for name in config:
    if name not in SECTIONS:
      raise ConfigError(f"config.{name} does not exist; {_nearest(name, SECTIONS)}")
  if missing := [name for name in SECTIONS if name not in config]:
    raise ConfigError(f"config needs {', '.join(missing)}")


def make_source(config: Config, split: str) -> Source:
  """The examples of a split."""
  return _component(SOURCES, config["data"], "data", split=split)


def make_process(config: Config) -> sde.ScalarSDE:
  """The forward process; its log-SNR must be finite and fall with time."""
  process = _component(PROCESSES, config["sde"], "sde")
  snr = np.asarray(sde.log_snr(process, jnp.linspace(0.1, 1.0, 10) * process.t1))
  if not (np.isfinite(snr).all() and (np.diff(snr) < 0).all()):
    raise ConfigError(f"config.sde: the log-SNR must be finite and fall with time, got {snr} from {process}")
  return process


def make_prediction(config: Config) -> predictions.Prediction:
  """What the network outputs."""
  return _component(PREDICTIONS, config["prediction"], "prediction")


def make_loss(config: Config) -> tuple[losses.score_matching.Loss, bool]:
  """The loss, and whether its times are stratified over the batch."""
  section = dict(config["loss"])
  weight = _component(WEIGHTS, section.pop("weight", {"type": "noise"}), "loss.weight")
  time = _component(TIMES, section.pop("time", {"type": "uniform"}), "loss.time")
  given = {"sde": make_process(config), "prediction": make_prediction(config), "weight": weight, "time": time}
  return _component(LOSSES, section, "loss", **given), time.stratified


def make_network(config: Config) -> UNet | MLP:
  """The linen module."""
  return _component(NETWORKS, config["network"], "network", parent=None, name=None)


def init_params(config: Config, source: Source) -> Any:
  """Initial parameters, from the seed of the config; `jax.eval_shape` of this gives their shapes."""
  x = jnp.zeros((1, *source.shape))
  try:
    return jax.jit(make_network(config).init)(jax.random.key(config["seed"]), x, jnp.ones(1))
  except ValueError as error:
    raise ConfigError(f"config.network does not fit data of shape {source.shape}: {error}") from error


def make_optimizer_of(config: Config) -> optax.GradientTransformation:
  """The optimizer; its schedule ends with the training."""
  return _construct(make_optimizer, config["optimizer"], "optimizer", total_steps=train_settings(config).steps)


def train_settings(config: Config) -> TrainSettings:
  """The section `train`, its numbers in range."""
  settings = _construct(TrainSettings, config["train"], "train")
  for name in ("batch_size", "steps", "log_every", "checkpoint_every", "keep"):
    if getattr(settings, name) < 1:
      raise ConfigError(f"config.train.{name} must be at least 1, got {getattr(settings, name)}")
  if not 0 <= settings.ema_decay < 1:
    raise ConfigError(f"config.train.ema_decay must be in [0, 1), got {settings.ema_decay}")
  return settings


def sample_settings(config: Config) -> SampleSettings:
  """The section `sample`, its numbers in range."""
  settings = _construct(SampleSettings, config["sample"], "sample")
  for name in ("num", "batch_size"):
    if getattr(settings, name) < 1:
      raise ConfigError(f"config.sample.{name} must be at least 1, got {getattr(settings, name)}")
  return settings


def likelihood_settings(config: Config) -> LikelihoodSettings:
  """What the section `likelihood` says of the data; the rest of it are the options of the log-density."""
  names = [field.name for field in dataclasses.fields(LikelihoodSettings)]
  settings = LikelihoodSettings(**{n: v for n, v in config["likelihood"].items() if n in names})
  if settings.batch_size < 1:
    raise ConfigError(f"config.likelihood.batch_size must be at least 1, got {settings.batch_size}")
  if settings.limit < 0:
    raise ConfigError(f"config.likelihood.limit must be at least 1, or 0 for all; got {settings.limit}")
  return settings


def make_log_prob(config: Config) -> Callable[..., Any]:
  """The log-density of the config's process."""
  names = [field.name for field in dataclasses.fields(LikelihoodSettings)]
  section = {name: value for name, value in config["likelihood"].items() if name not in names}
  trace = _component(DIVERGENCES, section.pop("divergence", {"type": "hutchinson"}), "likelihood.divergence")
  return _construct(likelihood.log_prob, section, "likelihood", sde=make_process(config), divergence=trace)


def make_sampler(config: Config, **options: Any) -> Callable[..., Any]:
  """The sampler, on its time grid if it has one; `options` override the config's."""
  section, process = dict(config["sampler"]) | options, make_process(config)
  given: dict[str, Any] = {"sde": process}
  if section.get("type") in SAMPLERS and "ts" in inspect.signature(SAMPLERS[section["type"]]).parameters:
    given["ts"] = _construct(schedules.time_grid, section.pop("grid", {}), "sampler.grid", sde=process)
  return _component(SAMPLERS, section, "sampler", **given)


def make_score(config: Config) -> Callable[[Any], Any]:
  """From parameters to the score that the network is with them."""
  apply: Callable[..., Any] = make_network(config).apply
  process, prediction = make_process(config), make_prediction(config)
  return lambda params: predictions.score_fn(apply, params, process, prediction)


def make_objective(config: Config, source: Source) -> Callable[..., Any]:
  """`objective(params, keys [b], batch) -> (loss [b], aux)` for the train step: prepare the data, then the loss."""
  loss, stratified = make_loss(config)
  module, settings, levels = make_network(config), train_settings(config), source.levels
  if settings.random_flip and len(source.shape) != 3:
    raise ConfigError(f"config.train.random_flip mirrors images [h, w, c]; the data have shape {source.shape}")

  def objective(params: Any, key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    data_key, flip_key, drop_key, loss_key = keys.split(key, 4)
    x = batch["x"] if levels is None else likelihood.dequantize(data_key, batch["x"], levels)
    if settings.random_flip:
      x = random_flip(flip_key, x)
    network: Callable[..., Any] = functools.partial(module.apply, params)
    if getattr(module, "dropout", 0.0) > 0:
      network = _with_dropout(network, drop_key)
    return loss(loss_key, x, network, u=batch["u"] if stratified else None)

  return objective


def _with_dropout(network: Callable[..., jax.Array], key: jax.Array) -> Callable[..., jax.Array]:
  """The network in training mode, each example dropping activations by its own key."""

  def one(key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    return network(x[None], t[None], train=True, rngs={"dropout": key})[0]

  return lambda x, t: jax.vmap(one)(key, x, t)


def check(config: Config) -> None:
  """Build everything that needs no data, so that a mistake anywhere in the config shows before any work."""
  check_sections(config)
  if not isinstance(config["seed"], int) or not 0 <= config["seed"] < 2**32:
    raise ConfigError(f"config.seed must be an integer from 0 to 2**32 - 1, got {config['seed']!r}")
  for build in (
    make_loss,
    make_network,
    make_optimizer_of,
    make_sampler,
    make_log_prob,
    train_settings,
    sample_settings,
    likelihood_settings,
  ):
    build(config)
