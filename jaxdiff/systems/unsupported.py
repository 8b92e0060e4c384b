"""Settings that other kinds of runs have a use for, refused where they would be without effect or fail late."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import losses, options
from jaxdiff.schema import Config, ConfigError


def refuse_threshold(config: Config) -> None:
  """Refuse to keep data predictions within [-1, 1]."""
  if options.sample(config).threshold != "none":
    raise ConfigError("config.sample.threshold is of diffusions of the data themselves: leave it out")


def refuse_dropout(config: Config) -> None:
  """Refuse to drop activations."""
  if dropout := config["network"].get("dropout", 0.0):
    raise ConfigError(f"config.network.dropout = {dropout} is of diffusions of the data themselves: leave it out")


def refuse_fields(config: Config, section: str, what: str, *names: str) -> None:
  """Refuse fields of a section that are given though they mean nothing there."""
  if found := [name for name in names if name in config[section]]:
    raise ConfigError(f"config.{section}.{found[0]} is no setting of {what}: leave it out")


def try_on(process: Any, time: losses.times.Times, **weights: losses.weights.Weight | None) -> None:
  """Refuse times and weights that the process has no numbers for."""
  t = jax.ShapeDtypeStruct((2,), jnp.float32)
  trials: dict[str, Callable[[Any], Any]] = {"time": lambda t: time.place(process, jnp.float32(0.01), t)}
  for name, weight in weights.items():
    if weight is not None:
      trials[name] = functools.partial(weight, process)
  for name, trial in trials.items():
    try:
      jax.eval_shape(trial, t)
    except (AttributeError, TypeError) as error:
      raise ConfigError(f"config.loss.{name} does not go with {type(process).__name__}: {error}") from error
