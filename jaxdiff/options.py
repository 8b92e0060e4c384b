"""The settings of each step of the work, from the sections of a config that make no component: their numbers in range.

`train(config)`, `sample(config)`, `likelihood(config)` and `evaluate(config)`; and what other settings depend on.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import schema
from jaxdiff.data.examples import SPLITS, check_choice
from jaxdiff.schema import Config, ConfigError
from jaxdiff.settings import (
  EditSettings,
  EvaluateSettings,
  GuidanceSettings,
  LikelihoodSettings,
  SampleSettings,
  TrainSettings,
)
from jaxdiff.training import ema

INTERVAL = "config.guidance.interval must be LOW,HIGH, two values of sigma / alpha with 0 <= LOW < HIGH; got {}"


def is_flow(config: Config) -> bool:
  """Whether the run is of a normalizing flow: its network is a vector field, and there are no scores and no noise."""
  return config.get("sde", {}).get("type") == "CNF"


def _at_least(path: str, settings: Any, least: int, *names: str) -> None:
  for name in names:
    if (value := getattr(settings, name)) < least:
      raise ConfigError(f"config.{path}.{name} must be at least {least}, got {value}")


def check_seed(path: str, seed: Any) -> None:
  """Refuse a seed that is no 32-bit number."""
  if not 0 <= seed < 2**32:
    raise ConfigError(f"config.{path} must be an integer from 0 to 2**32 - 1, got {seed!r}")


def train(config: Config) -> TrainSettings:
  """The section `train`, its numbers in range."""
  settings = schema.component("train", config["train"])
  _at_least("train", settings, 1, "batch_size", "steps", "log_every", "checkpoint_every", "keep", "snapshot_every")
  _at_least("train", settings, 1, "fsdp", "microbatches", "steps_per_dispatch", "max_skipped", "validate_examples")
  _at_least("train", settings, 0, "sample_every", "validate_every")
  if settings.keep_every is not None:
    _at_least("train", settings, 1, "keep_every")
  if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
    raise ConfigError(f"config.train.wandb = {settings.wandb!r} needs the package wandb: pip install wandb")
  for name in ("steps", "log_every", "checkpoint_every"):
    if (value := getattr(settings, name)) % settings.steps_per_dispatch:
      raise ConfigError(
        f"config.train.steps_per_dispatch = {settings.steps_per_dispatch} must divide config.train.{name} = {value}"
      )
  for length in settings.ema_lengths:
    schema.construct(ema.exponent, {}, "train.ema_lengths", length=length)
  if not 0 <= settings.drop_conditions <= 1:
    raise ConfigError(f"config.train.drop_conditions must be in [0, 1], got {settings.drop_conditions}")
  if settings.drop_conditions and not config["network"].get("conditions"):
    raise ConfigError("config.train.drop_conditions needs config.network.conditions; there are none")
  if not 0 <= settings.ema_decay < 1:
    raise ConfigError(f"config.train.ema_decay must be in [0, 1), got {settings.ema_decay}")
  return settings


def _check_length(path: str, length: float | None) -> None:
  if length is not None:
    schema.construct(ema.exponent, {}, f"{path}.ema_length", length=length)


def sample(config: Config) -> SampleSettings:
  """The section `sample`, its numbers in range."""
  settings = schema.component("sample", config["sample"])
  _at_least("sample", settings, 1, "num", "batch_size", "trajectories")
  check_seed("sample.seed", settings.seed)
  _check_split(config, "sample", settings.split)
  _check_length("sample", settings.ema_length)
  return settings


def guidance(config: Config) -> GuidanceSettings:
  """The section `guidance`, which a config may leave out, its numbers in range and all of them of use."""
  settings = schema.component("guidance", config.get("guidance", {}))
  scale, interval = settings.scale, settings.interval
  if scale is not None and not 0 <= scale < float("inf"):
    raise ConfigError(
      f"config.guidance.scale must be at least 0, got {scale}: 1 is the conditional model, more is more guidance"
    )
  if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
    raise ConfigError(INTERVAL.format(interval))
  if not 0 <= settings.rescale <= 1:
    raise ConfigError(f"config.guidance.rescale must be in [0, 1], got {settings.rescale}")
  if settings.classifier is not None and settings.weak is not None:
    raise ConfigError("config.guidance.classifier and weak are two ways of guidance: leave one of them out")
  if settings.classifier is not None and (interval or settings.rescale):
    raise ConfigError(
      "config.guidance.interval and rescale are of guidance without a classifier: leave them or the classifier out"
    )
  if settings.weak is not None and settings.rescale:
    raise ConfigError("config.guidance.rescale is of guidance by the model's own conditions: leave it or weak out")
  if scale is None and (found := [name for name in ("weak", "interval", "rescale") if getattr(settings, name)]):
    raise ConfigError(f"config.guidance.{found[0]} needs a scale, such as --guidance=2 (1 is no guidance)")
  return settings


OF_TASK = {"mask": "inpaint", "blur": "deblur", "factor": "superres", "strength": "sdedit"}


def edit(config: Config) -> EditSettings:
  """The section `edit`, its numbers in range and all that is given of use to the task."""
  section = config.get("edit", {})
  settings = schema.component("edit", section)
  for name, task in OF_TASK.items():
    if section.get(name) is not None and settings.task != task:
      raise ConfigError(f"config.edit.{name} is of --task={task}, and this is {settings.task}: leave it out")
  if settings.task == "sdedit" and (of_others := [name for name in ("method", "noise", "degrade") if name in section]):
    raise ConfigError(f"config.edit.{of_others[0]} is of tasks with a measurement, and sdedit has none: leave it out")
  if settings.task == "inpaint" and settings.mask is None:
    raise ConfigError("--task=inpaint needs --mask=PATH, an image of the size of the input, white where to paint anew")
  if "factor" in section and not settings.degrade:
    raise ConfigError("config.edit.factor is of --degrade: without it the sizes of input and model say it")
  if settings.resize and settings.task == "superres" and not settings.degrade:
    raise ConfigError("--resize with --task=superres needs --degrade: what is to be enlarged says its size")
  if not 0 < settings.strength <= 1:
    raise ConfigError(f"config.edit.strength must be in (0, 1], the part of the steps to take; got {settings.strength}")
  if not 0 < settings.blur < float("inf"):
    raise ConfigError(f"config.edit.blur must be positive, a standard deviation in pixels; got {settings.blur}")
  if settings.noise is not None and not 0 <= settings.noise < float("inf"):
    raise ConfigError(f"config.edit.noise must be at least 0, a standard deviation in [-1, 1]; got {settings.noise}")
  _at_least("edit", settings, 1, "num")
  _at_least("edit", settings, 2, "factor")
  check_seed("edit.seed", settings.seed)
  return settings


def likelihood_fields(section: Mapping[str, Any]) -> set[str]:
  """The fields of the section `likelihood` that are `LikelihoodSettings`."""
  return {field.name for field in dataclasses.fields(LikelihoodSettings)} & section.keys()


def likelihood(config: Config) -> LikelihoodSettings:
  """What the section `likelihood` says of the data; the rest of it are the options of the log-density.

  Flows have no variational bound.
  """
  section = config["likelihood"]
  schema.check_section("likelihood", section)
  settings = LikelihoodSettings(**{name: section[name] for name in likelihood_fields(section)})
  if is_flow(config):
    settings = dataclasses.replace(settings, bound_draws=0)
  _at_least("likelihood", settings, 1, "batch_size", "draws")
  _at_least("likelihood", settings, 0, "bound_draws")
  check_seed("likelihood.seed", settings.seed)
  _check_length("likelihood", settings.ema_length)
  trace = section.get("divergence", {"type": "exact"})["type"]
  if settings.importance and trace != "exact":
    raise ConfigError(
      f"config.likelihood.importance needs the exact trace, got {trace}: the mean of exp(log p) over noisy estimates "
      "is too large and bounds nothing. Take --probes=exact, or leave importance out"
    )
  if settings.limit < 0:
    raise ConfigError(f"config.likelihood.limit must be at least 1, or 0 for all; got {settings.limit}")
  _check_split(config, "likelihood", settings.split)
  return settings


def precision(config: Config) -> contextlib.AbstractContextManager[Any]:
  """Within this context arrays are made in float64 if the likelihood is to be evaluated so."""
  return jax.enable_x64(True) if likelihood(config).dtype == "float64" else contextlib.nullcontext()


def in_precision(config: Config, params: Any) -> tuple[Config, Any]:
  """A config whose network computes in float64, and the parameters in float64, if the likelihood is to be so.

  Only within `precision` are they kept so.
  """
  if likelihood(config).dtype == "float32":
    return config, params
  wide = lambda leaf: np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
  config = config | {"network": config["network"] | {"dtype": "float64"}}
  if "autoencoder" in config:
    inner = config["autoencoder"]["network"] | {"dtype": "float64"}
    config = config | {"autoencoder": config["autoencoder"] | {"network": inner}}
  return config, jax.tree.map(wide, params)


def _check_split(config: Config, path: str, split: str) -> None:
  if config["data"].get("type") != "tfds":
    schema.construct(check_choice, {"value": split, "choices": SPLITS}, path, argument="split")


def evaluate(config: Config) -> EvaluateSettings:
  """The section `evaluate`, which a config may leave out, its numbers in range."""
  settings = schema.component("evaluate", config.get("evaluate", {}))
  _at_least("evaluate", settings, 1, "batch_size", "manifold_k", "coverage_k")
  least = 0 if schema.is_classifier(config) else 1 + max(settings.manifold_k, settings.coverage_k)
  _at_least("evaluate", settings, least, "num")
  _at_least("evaluate", settings, 0, "reference")
  check_seed("evaluate.seed", settings.seed)
  _check_length("evaluate", settings.ema_length)
  _check_split(config, "evaluate", settings.split)
  return settings
