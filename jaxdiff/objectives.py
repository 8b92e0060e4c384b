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
import numpy as np

from jaxdiff import components, conditions, factory, flow, keys, likelihood, losses, options, schema
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.models import conditioning
from jaxdiff.schema import Config, ConfigError

_SEEN = 10_000  # training examples that a trace estimator may be fitted to
_PILOT, _PILOT_TOLERANCE = 64, 1e-3

Batch = Mapping[str, jax.Array]
Evaluation = Callable[[Any, jax.Array, Batch], dict[str, jax.Array]]


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
    given["divergence"] = schema.component("loss.divergence", section.get("divergence", {"type": "hutchinson"}))
    given["t1"] = factory.make_process(config).t1
  if "gamma" in _takes(config):
    given["gamma"] = factory.make_process(config, params).gamma
  elif "chain" in _takes(config):
    given["chain"] = factory.make_forward(config)
  else:
    given["sde"] = factory.make_process(config)
  stratified = section.get("stratified", True)
  if "time" in _takes(config):
    given["weight"] = schema.component("loss.weight", section.get("weight", {"type": "noise"}))
    given["time"] = schema.component("loss.time", section.get("time", _default_time(config)))
    stratified = given["time"].stratified
  given = {name: value for name, value in given.items() if name in _takes(config)}
  return schema.component("loss", section, **given), stratified


def _default_time(config: Config) -> dict[str, str]:
  return {"type": "importance" if config["loss"]["type"] == "bound" else "uniform"}


def make_objective(config: Config, source: Source, training: bool = True) -> Callable[..., Any]:
  """`objective(params, keys [b], batch) -> (loss [b], aux)` for the train step: prepare the data, then the loss.

  Without `training` no image is mirrored and no activation dropped.
  """
  fixed, stratified = make_loss(config, source)
  module, settings = factory.make_network(config), options.train(config)
  cond, null = factory.make_cond(config, source), conditioning.null(getattr(module, "conditions", {}))
  noises = conditions.noises(factory.make_conditions(config))
  dequantized = source.levels if _levels(config, source) is None else None
  if settings.random_flip and len(source.shape) != 3:
    raise ConfigError(f"config.train.random_flip mirrors images [h, w, c]; the data have shape {source.shape}")

  def objective(params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    data_key, flip_key, drop_key, loss_key = keys.split(key, 4)
    if training and settings.random_flip:  # of x and of the images beside it
      batch = {name: random_flip(flip_key, value) if value.ndim == 4 else value for name, value in batch.items()}
    x = batch["x"] if dequantized is None else likelihood.dequantize(data_key, batch["x"], dequantized)
    network: Callable[..., Any] = functools.partial(module.apply, factory.network_params(config, params))
    if training and getattr(module, "dropout", 0.0) > 0:
      network = _with_dropout(network, drop_key)
    loss = fixed if factory.learned(config) is None else make_loss(config, source, params)[0]
    if training and settings.drop_conditions:
      loss = losses.drop_conditions(loss, null, settings.drop_conditions)
    if training:
      for name, (image, most) in noises.items():
        loss = losses.noised_condition(loss, image, name, most)
    told = cond(batch)
    if schema.is_classifier(config):
      return loss(loss_key, x, network, {"label": batch["label"], **told}, u=batch["u"] if stratified else None)
    value, aux = loss(loss_key, x, network, told, u=batch["u"] if stratified else None)
    return value, {**aux, "loss_per_dim": value / math.prod(source.shape)}

  return objective


def _with_dropout(network: Callable[..., jax.Array], key: jax.Array) -> Callable[..., jax.Array]:
  """The network in training mode, each example dropping activations by its own key."""

  def one(key: jax.Array, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array]) -> jax.Array:
    alone = {name: value[None] for name, value in cond.items()}
    return network(x[None], t[None], train=True, rngs={"dropout": key}, **alone)[0]

  return lambda x, t, **cond: jax.vmap(one)(key, x, t, cond)


def make_accuracy(config: Config, source: Source, times: jax.Array) -> Evaluation:
  """`(params, keys [b], batch) -> {"accuracy": [b, k], "nats": [b, k]}` of a classifier at times [k], by one noise."""
  process, module, cond = factory.make_process(config), factory.make_network(config), factory.make_cond(config, source)

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    data_key, loss_key = keys.split(key)
    x = batch["x"] if source.levels is None else likelihood.dequantize(data_key, batch["x"], source.levels)
    network, told = functools.partial(module.apply, params), {"label": batch["label"], **cond(batch)}

    def at(t: jax.Array) -> dict[str, jax.Array]:
      nats, aux = losses.classification(process, losses.times.fixed(t))(loss_key, x, network, told)
      return {"accuracy": aux["accuracy"], "nats": nats}

    return jax.tree.map(jnp.transpose, jax.lax.map(at, times))

  return run


def dequantization(config: Config, source: Source) -> str | None:
  """How the integers of a source become continuous in the likelihood; None for data that are so."""
  settings = options.likelihood(config)
  if source.levels is not None:
    if settings.dequantization != "auto":
      return settings.dequantization
    return "uniform" if _levels(config, source) is None else "gaussian"
  if settings.dequantization != "auto" or settings.draws > 1 or settings.importance:
    raise ConfigError(
      "config.likelihood.dequantization, draws and importance belong to integers; these data are continuous, so their "
      "log-density is reported, in nats: leave the settings out, or give the integers themselves and their levels"
    )
  return None


def seen_states(config: Config, source: Source) -> jax.Array | None:
  """The training data as the model sees them, where the trace estimator of the likelihood depends on them."""
  trace = config["likelihood"].get("divergence", {})
  if trace.get("basis", "identity") in ("identity", "dct", "color_dct") and trace.get("control", "none") == "none":
    return None
  x = jnp.asarray(source.gather(np.arange(min(len(source), _SEEN)))["x"])
  if source.levels is None:
    return x
  if _levels(config, source) is None:
    return likelihood.dequantize(jax.random.key(config["seed"]), x, source.levels)
  return losses.decoders.integer_values(x, source.levels, (-1.0, 1.0))


def choose_trace(config: Config, params: Any, source: Source, held_out: Source) -> tuple[Config, dict[str, float]]:
  """A config whose trace estimator has a basis where it left that to a pilot, and the pilot's spreads in bits/dim.

  Without basis="auto" the config is the one given, and there are no spreads.
  """
  trace = config["likelihood"].get("divergence", {})
  if trace.get("basis") != "auto":
    return config, {}
  if config["network"].get("conditions"):
    raise ConfigError("config.likelihood.divergence.basis = 'auto' is for models without conditions: name a basis")
  seen, shown = (seen_states(config, side) for side in (source, held_out))
  if seen is None or shown is None:
    raise ConfigError("config.likelihood.divergence.basis = 'auto' needs data")
  process, score = factory.make_process(config, params), factory.make_score(config)(params)
  rtol = atol = _PILOT_TOLERANCE
  among = likelihood.candidates(seen)
  of = lambda divergence: likelihood.log_prob(process, divergence, rtol, atol)
  if options.is_flow(config):
    of = lambda divergence: flow.cnf(divergence=divergence, t1=process.t1, rtol=rtol, atol=atol).log_prob
    among = {name: made for name, made in among.items() if "control" not in name}
  key = jax.random.key(config["likelihood"].get("seed", 0))
  found = likelihood.pilot(key, shown[:_PILOT], score, of, among)
  basis, _, control = found.best.partition("+")
  chosen = {"basis": "identity" if basis == "pixels" else basis, "control": _control(seen) if control else "none"}
  config = config | {"likelihood": config["likelihood"] | {"divergence": trace | chosen}}
  return config, {name: spread / math.log(2) for name, spread in found.spread.items()}


def _control(seen: jax.Array) -> str:
  """The covariance that `likelihood.candidates` takes for data like these."""
  if math.prod(seen.shape[1:]) <= likelihood.PCA_UP_TO:
    return "pca"
  return "color_dct" if seen.shape[3:] == (3,) else "dct"


def make_log_likelihood(config: Config, params: Any, source: Source, seen: jax.Array | None = None) -> Evaluation:
  """`(params, keys [b], batch) -> values [b]` of the probability flow: bits/dim of integers, else log-density in nats.

  Where the model has conditions, it is the conditional density, given those of the example.

  `seen` is what `seen_states` gives of the training data.
  """
  process, kind = factory.make_process(config, params), dequantization(config, source)
  log_prob, score = factory.make_log_prob(config, process, seen), factory.make_score(config)
  evaluate: Callable[..., Any] = log_prob if kind is None else _make_bits(config, log_prob, source.levels, kind)

  cond = factory.make_cond(config, source)

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    result = evaluate(key, batch["x"], score(params), cond(batch))
    status = {"code": result.status.code, "accepted": result.status.accepted}
    of_draws = getattr(result, "dequantization_error", jnp.zeros_like(result.value))
    errors = {"standard_error": result.standard_error, "dequantization_error": of_draws}
    return {"value": result.value, **errors, "nfe": result.nfe, **status}

  return run


def _make_bits(config: Config, log_prob: likelihood.LogDensity, levels: Any, kind: str) -> Callable[..., Any]:
  """Bits per dimension under a dequantization."""
  settings, makers = options.likelihood(config), likelihood.dequantization
  try:
    if kind == "uniform":
      dequantize = makers.uniform()
    elif log_prob.sde is None:
      raise ValueError(f"dequantization = {kind!r} is the noise of a process, and a flow has none: take 'uniform'")
    else:
      maker = {"truncated_normal": makers.truncated_normal, "gaussian": makers.gaussian}[kind]
      dequantize = maker(log_prob.sde, config["likelihood"].get("t0"))
    return likelihood.bits_per_dim(
      log_prob, levels, dequantization=dequantize, draws=settings.draws, importance=settings.importance
    )
  except ValueError as error:
    raise ConfigError(f"config.likelihood: {error}") from error


def likelihood_statement(config: Config, params: Any, source: Source) -> tuple[str, Config]:
  """What `make_log_likelihood` computes: a sentence, and all the settings it depends on."""
  log_prob = factory.make_log_prob(config, factory.make_process(config, params))
  flow, facts = flow_in_words(config, log_prob, source.shape)
  kind = facts["dequantization"] = dequantization(config, source)
  if kind is None:
    return f"nats, log-density of the model at t0, no bound: {flow}", facts
  by = "noise of the process at t0 and the reconstruction" if kind == "gaussian" else kind.replace("_", " ")
  how = "importance-weighted" if facts["importance"] else "averaged"
  draws = "" if facts["draws"] == 1 else f", {facts['draws']} draws {how}"
  return f"bits/dim, upper bound on -log2 P(x) / d, dequantization: {by}{draws}; {flow}", facts


def flow_in_words(config: Config, log_prob: likelihood.LogDensity, shape: tuple[int, ...]) -> tuple[str, Config]:
  """How a log-density of states of this shape is evaluated: in words, and all settings it depends on."""
  facts = factory.likelihood_facts(config, math.prod(shape)) | {"t0": float(log_prob.t0)}
  return (
    f"probability flow from t0 = {facts['t0']:.3g}, {_trace_in_words(facts['divergence'])}, {facts['solver']}, rtol "
    f"{facts['rtol']:g}, atol {facts['atol']:g}, {facts['dtype']}"
  ), facts


def _trace_in_words(section: Config) -> str:
  if "probes" not in section:
    return f"{section['type']} trace"
  usual = ("type", "probes", None, "identity", "none")
  more = [f"{name} {value}" for name, value in section.items() if name not in usual and value not in usual]
  words = f"{section['probes']} {section['type']} probe{'s' * (section['probes'] > 1)}"
  return f"{words} ({', '.join(more)})" if more else words


def make_bound(config: Config, params: Any, source: Source, draws: int) -> Evaluation:
  """`(params, keys [b], batch) -> {"bound": [b], ..}`: the bound on what `make_log_likelihood` evaluates."""
  levels, process, t0 = source.levels, factory.make_process(config, params), config["likelihood"].get("t0")
  bound = losses.bound(process, factory.make_prediction(config), _levels(config, source), t0=t0)
  average, apply = losses.averaged(bound, draws), factory.make_apply(config)
  dtype, cond = options.likelihood(config).dtype, factory.make_cond(config, source)

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    x = batch["x"]
    data_key, bound_key = keys.split(keys.fold_in(key, 0))  # as the first draw of bits_per_dim
    if levels is not None and _levels(config, source) is None:
      x = likelihood.dequantize(data_key, x, levels).astype(dtype)
      offset = math.prod(source.shape) * math.log(levels / 2)
    else:
      x, offset = x if levels is not None else x.astype(dtype), 0.0
    network = functools.partial(apply, factory.network_params(config, params))
    nats, aux = average(bound_key, x, network, cond(batch))
    unit = math.prod(source.shape) * math.log(2) if levels is not None else -1.0
    return {"bound": (nats + offset) / unit, "bound_standard_error": jnp.abs(aux["standard_error"] / unit)}

  return run
