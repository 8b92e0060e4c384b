"""From a config to what is trained and what is evaluated: the objective, the log-density, the variational bound.

A loss that knows levels is given integer data as they are; any other is given them dequantized.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import components, factory, keys, likelihood, losses, schema
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.schema import Config, ConfigError

Evaluation = Callable[[Any, jax.Array, jax.Array], dict[str, jax.Array]]


def _takes(config: Config) -> Mapping[str, inspect.Parameter]:
  (constructor,) = schema.constructors("loss", config["loss"])
  return inspect.signature(constructor).parameters


def _levels(config: Config, source: Source | None) -> int | None:
  """The levels of integer data that the loss is given as they are."""
  return source.levels if source is not None and "levels" in _takes(config) else None


def make_loss(config: Config, source: Source | None = None, params: Any = None) -> tuple[losses.Loss, bool]:
  """The loss, and whether its times are stratified over the batch."""
  section = config["loss"]
  schema.check_section("loss", section)
  kind, process = section["type"], config["sde"]["type"]
  if (due := components.PROCESS_OF_LOSS.get(kind, process)) != process:
    raise ConfigError(f"config.loss.type = {kind!r} needs config.sde.type = {due!r}, got {process!r}")
  if factory.learned(config) is not None and kind != "vdm":
    raise ConfigError(f"config.sde has learned parts, which config.loss.type = {kind!r} does not train: take 'vdm'")
  prediction = config["prediction"]
  if kind == "vdm" and prediction["type"] != "edm" and not prediction.get("log_snr_time"):
    raise ConfigError("config.prediction.log_snr_time must be True for the loss 'vdm', whose times have no meaning")
  parts = 2 if kind == "ddpm_hybrid" or section.get("variance") == "learned" else 1
  if getattr(factory.make_network(config), "parts", 1) != parts:
    raise ConfigError(f"config.network.parts must be {parts} for config.loss.type = {kind!r}: set it, with a UNet")
  given: dict[str, Any] = {"prediction": factory.make_prediction(config), "levels": _levels(config, source)}
  if "divergence" in _takes(config):
    given["divergence"] = factory.component("loss.divergence", section.get("divergence", {"type": "hutchinson"}))
    given["t1"] = factory.make_process(config).t1
  if "gamma" in _takes(config):
    given["gamma"] = factory.make_process(config, params).gamma
  elif "chain" in _takes(config):
    given["chain"] = factory.make_forward(config)
  else:
    given["sde"] = factory.make_process(config)
  stratified = section.get("stratified", True)
  if "time" in _takes(config):
    given["weight"] = factory.component("loss.weight", section.get("weight", {"type": "noise"}))
    given["time"] = factory.component("loss.time", section.get("time", _default_time(config)))
    stratified = given["time"].stratified
  given = {name: value for name, value in given.items() if name in _takes(config)}
  return factory.component("loss", section, **given), stratified


def _default_time(config: Config) -> dict[str, str]:
  return {"type": "importance" if config["loss"]["type"] == "bound" else "uniform"}


def make_objective(config: Config, source: Source) -> Callable[..., Any]:
  """`objective(params, keys [b], batch) -> (loss [b], aux)` for the train step: prepare the data, then the loss."""
  fixed, stratified = make_loss(config, source)
  module, settings = factory.make_network(config), factory.train_settings(config)
  dequantized = source.levels if _levels(config, source) is None else None
  if settings.random_flip and len(source.shape) != 3:
    raise ConfigError(f"config.train.random_flip mirrors images [h, w, c]; the data have shape {source.shape}")

  def objective(params: Any, key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    data_key, flip_key, drop_key, loss_key = keys.split(key, 4)
    x = batch["x"] if dequantized is None else likelihood.dequantize(data_key, batch["x"], dequantized)
    if settings.random_flip:
      x = random_flip(flip_key, x)
    network: Callable[..., Any] = functools.partial(module.apply, factory.network_params(config, params))
    if getattr(module, "dropout", 0.0) > 0:
      network = _with_dropout(network, drop_key)
    loss = fixed if factory.learned(config) is None else make_loss(config, source, params)[0]
    value, aux = loss(loss_key, x, network, u=batch["u"] if stratified else None)
    return value, {**aux, "loss_per_dim": value / math.prod(source.shape)}

  return objective


def _with_dropout(network: Callable[..., jax.Array], key: jax.Array) -> Callable[..., jax.Array]:
  """The network in training mode, each example dropping activations by its own key."""

  def one(key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    return network(x[None], t[None], train=True, rngs={"dropout": key})[0]

  return lambda x, t: jax.vmap(one)(key, x, t)


def make_log_likelihood(config: Config, params: Any, source: Source) -> Evaluation:
  """`(params, keys [b], x) -> values [b]` of the probability flow: bits/dim of integers, else log-density in nats."""
  process = factory.make_process(config, params)
  log_prob, score, levels = factory.make_log_prob(config, process), factory.make_score(config), source.levels
  evaluate: Callable[..., Any] = log_prob
  if levels is not None:
    on_integers = _levels(config, source) is not None
    noise = likelihood.dequantization.gaussian(process, config["likelihood"].get("t0")) if on_integers else None
    evaluate = likelihood.bits_per_dim(log_prob, levels, dequantization=noise)

  def run(params: Any, key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    result = evaluate(key, x, score(params))
    status = {"code": result.status.code, "accepted": result.status.accepted}
    return {"value": result.value, "standard_error": result.standard_error, "nfe": result.nfe, **status}

  return run


def make_bound(config: Config, params: Any, source: Source, draws: int) -> Evaluation:
  """`(params, keys [b], x) -> {"bound": [b], ..}`: the variational bound on what `make_log_likelihood` evaluates."""
  levels, process, t0 = source.levels, factory.make_process(config, params), config["likelihood"].get("t0")
  bound = losses.bound(process, factory.make_prediction(config), _levels(config, source), t0=t0)
  average, apply = losses.averaged(bound, draws), factory.make_apply(config)

  def run(params: Any, key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    data_key, bound_key = keys.split(keys.fold_in(key, 0))  # as the first draw of bits_per_dim
    if levels is not None and _levels(config, source) is None:
      x = likelihood.dequantize(data_key, x, levels)
      offset = math.prod(source.shape) * math.log(levels / 2)
    else:
      offset = 0.0
    network = functools.partial(apply, factory.network_params(config, params))
    nats, aux = average(bound_key, x, network)
    unit = math.prod(source.shape) * math.log(2) if levels is not None else -1.0
    return {"bound": (nats + offset) / unit, "bound_standard_error": jnp.abs(aux["standard_error"] / unit)}

  return run


def check(config: Config) -> None:
  """Build everything that needs no data, so that a mistake anywhere in the config shows before any work."""
  schema.check_sections(config)
  factory.check_components(config)
  make_loss(config)
