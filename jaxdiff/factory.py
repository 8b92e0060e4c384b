"""From a config to components: the only file that builds from configs; `schema` says what a config may hold."""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxdiff import components, divergence, flow, likelihood, options, predictions, schedules, schema, sde
from jaxdiff.conditions import Condition, noises
from jaxdiff.data.examples import Source
from jaxdiff.evaluation.runs import Given
from jaxdiff.losses import decoders
from jaxdiff.models import conditioning
from jaxdiff.schema import Config as Config
from jaxdiff.schema import ConfigError as ConfigError

MODEL_SECTIONS = ("data", "sde", "prediction", "network", "autoencoder")
TRAINING_SECTIONS = ("seed", *MODEL_SECTIONS, "loss", "discriminator", "optimizer", "discriminator_optimizer")
_DECIDING_TRAIN_FIELDS = ("batch_size", "steps", "ema_decay", "ema_lengths", "random_flip", "drop_conditions")
LARGEST_SIGNAL_AT_PRIOR = 0.05
_LOOKED_AT = 4096  # examples whose conditions are checked before any work


def normalize(config: ConfigDict | Mapping[str, Any], path: str = "config") -> Config:
  """A plain dict of numbers, strings, None, tuples and dicts: what JSON keeps, with its lists read as tuples."""

  def plain(value: Any, path: str) -> Any:
    if isinstance(value, ConfigDict | Mapping):
      return normalize(value, path)
    if isinstance(value, list | tuple):
      return tuple(plain(item, path) for item in value)
    if isinstance(value, np.generic):
      return value.item()
    if value is None or isinstance(value, bool | int | float | str):
      return value
    raise ConfigError(f"{path} holds {value!r}; give a number, a text, None, a tuple or a ConfigDict")

  return {str(name): plain(value, f"{path}.{name}") for name, value in config.items()}


def read(path: Path) -> Config:
  """The config that a run wrote into its directory."""
  try:
    return normalize(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, AttributeError, OSError) as error:
    raise ConfigError(f"{path} cannot be read as the config of a run ({error}); restore it, or train anew") from error


def write(config: Config, path: Path) -> None:
  """Write the resolved config as JSON."""
  path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def identity(config: Config) -> Config:
  """The part of a config that decides what a training run computes: two runs with the same are the same run.

  Where the data lie is no part of it; what they are is compared by their content.
  """
  train = {name: value for name, value in config["train"].items() if name in _DECIDING_TRAIN_FIELDS}
  paths = schema.paths("data", config["data"])
  data = {name: value for name, value in config["data"].items() if name not in paths}
  present = {name: config[name] for name in TRAINING_SECTIONS if name in config}
  if "autoencoder" in present:
    present["autoencoder"] = {name: value for name, value in config["autoencoder"].items() if name != "workdir"}
  return present | {"data": data, "train": train}


def differences(saved: Any, given: Any, path: str = "config") -> list[str]:
  """What two configs differ in, a text for each field."""
  if isinstance(saved, dict) and isinstance(given, dict):
    names = sorted(saved.keys() | given.keys())
    return [text for name in names for text in differences(saved.get(name), given.get(name), f"{path}.{name}")]
  return [] if saved == given else [f"{path} was {saved!r}, is {given!r}"]


def make_source(config: Config, split: str, section: str = "data") -> Source:
  """The examples of a split, of the run's data or of another section that names a source."""
  return schema.component(section, config[section], split=split)


def make_forward(config: Config) -> Any:
  """What the section `sde` names: a process, a discrete chain, or a normalizing flow."""
  return schema.component("sde", config["sde"])


def _check_flow(config: Config) -> None:
  """Refuse a flow with the parts of a process, and a process with those of a flow."""
  process = config["sde"]["type"]
  for path, due in components.WITH_CNF.items():
    kind = config[path]["type"]
    if options.is_flow(config) and kind != due:
      raise ConfigError(f"config.{path}.type must be {due!r} for config.sde.type = 'CNF', got {kind!r}")
    if not options.is_flow(config) and kind == due:
      raise ConfigError(f"config.{path}.type = {kind!r} needs config.sde.type = 'CNF', got {process!r}")
  if options.is_flow(config) and options.sample(config).threshold != "none":
    raise ConfigError("config.sample.threshold must be 'none' for config.sde.type = 'CNF', which predicts no data")


def _check_classifier(config: Config) -> None:
  """Refuse a classifier with the parts of a score, and a score with those of a classifier."""
  for path, due in components.WITH_CLASSIFIER.items():
    kind, network = config[path]["type"], config["network"]["type"]
    if schema.is_classifier(config) and kind != due:
      raise ConfigError(f"config.{path}.type must be {due!r} for config.network.type = 'Classifier', got {kind!r}")
    if not schema.is_classifier(config) and kind == due:
      raise ConfigError(f"config.{path}.type = {kind!r} needs config.network.type = 'Classifier', got {network!r}")
  if schema.is_classifier(config) and "label" in config["network"].get("conditions", {}):
    raise ConfigError("config.network.conditions.label is what config.network.type = 'Classifier' learns: leave it out")
  if schema.is_classifier(config) and options.is_flow(config):
    raise ConfigError(
      "config.sde.type = 'CNF' has no noise, which config.network.type = 'Classifier' is to see through"
    )
  if schema.is_classifier(config) and options.train(config).sample_every:
    raise ConfigError(
      "config.train.sample_every must be 0 for config.network.type = 'Classifier', which has no samples"
    )


def learned(config: Config) -> Any:
  """What of the process is trained: all of its gamma, its interior, or None."""
  section = config.get("sde", {})
  if section.get("learn_ends"):
    gamma = make_forward(config).gamma
    return dataclasses.replace(gamma, minimum=jnp.float32(gamma.minimum), maximum=jnp.float32(gamma.maximum))
  return make_forward(config).gamma.interior if section.get("interior") == "learned" else None


def make_process(config: Config, params: Any = None) -> Any:
  """The forward process, with what the parameters hold of it; without them as it starts. Of a flow the flow itself.

  Its log-SNR must be finite and fall with time, its noise positive and its prior reached.
  """
  made = make_forward(config)
  if options.is_flow(config):
    return made
  process = made.sde() if hasattr(made, "sde") else made
  if params is None or learned(config) is None:
    with jax.ensure_compile_time_eval():
      _check_process(process)
    return process
  if config["sde"].get("learn_ends"):
    return sde.VariancePreserving(params["gamma"])
  return sde.VariancePreserving(dataclasses.replace(process.gamma, interior=params["gamma"]))


def _check_process(process: sde.ScalarSDE) -> None:
  first = float(schedules.start_time(process, None, schedules.TRAINING_NOISE_TO_SIGNAL))
  last = float(process.t1)
  if not 0 <= first < last:
    raise ConfigError(f"config.sde: no time before t1 = {last} has little noise: check the values of {process}")
  times = jnp.asarray(np.geomspace(min(first or 1e-3 * last, 1e-3 * last), last, 50), jnp.float32)
  snr, diffusion = np.asarray(sde.log_snr(process, times)), np.asarray(process.diffusion(times))
  if not (np.isfinite(snr).all() and (np.diff(snr) < 0).all()):
    raise ConfigError(f"config.sde: the log-SNR must be finite and fall with time, got {snr[[0, -1]]} from {process}")
  if not (np.isfinite(diffusion).all() and (diffusion > 0).all() and float(process.diffusion(0.0)) >= 0):
    raise ConfigError(f"config.sde: the diffusion g(t) must be positive, it is not for {process}: check the signs")
  if (signal := np.exp(0.5 * snr[-1])) > LARGEST_SIGNAL_AT_PRIOR:
    warnings.warn(
      f"config.sde: alpha / sigma is {signal:.2g} at t1, so noised data do not match the prior; choose values with at "
      f"most {LARGEST_SIGNAL_AT_PRIOR}, got {process}",
      stacklevel=1,
    )


def make_prediction(config: Config) -> Any:
  """What the network outputs."""
  return schema.component("prediction", config["prediction"])


def make_network(config: Config, told: Mapping[str, Any] = MappingProxyType({})) -> Any:
  """The linen module; `told` are modules of conditions, by name, that no config names."""
  conditions = {name: made.module for name, made in make_conditions(config).items()} | dict(told)
  given = {"conditions": conditions} if conditions else {}
  made = schema.component("network", config["network"], parent=None, name=None, **given)
  if not 0 <= getattr(made, "dropout", 0.0) < 1:
    raise ConfigError(f"config.network.dropout must be in [0, 1), got {made.dropout}")
  return made


def make_conditions(config: Config) -> dict[str, Condition]:
  """What the network is told of an example, by name."""
  network, made = config["network"], {}
  for name, section in network.get("conditions", {}).items():
    path = f"network.conditions.{name}"
    (constructor,) = schema.constructors(path, section)
    takes = inspect.signature(constructor).parameters
    types = {kind: network[kind] for kind in ("dtype", "param_dtype") if kind in network and kind in takes}
    made[name] = schema.component(path, section, **types)
  schema.construct(noises, {}, "network.conditions", conditions=made)
  return made


def make_cond(config: Config, source: Source) -> Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]:
  """From a batch of the source to the conditions of the network; images are in [-1, 1], without noise."""
  conditions, levels = make_conditions(config), source.levels
  check_conditions(config, source)

  def of_batch(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    x = batch["x"] if levels is None else decoders.integer_values(batch["x"], levels, (-1.0, 1.0))
    return {name: _scaled(batch[name]) if made.of is None else made.of(x) for name, made in conditions.items()}

  return of_batch


def _scaled(value: jax.Array) -> jax.Array:
  """A field of the examples as the network is told it: 8-bit images in [-1, 1]."""
  return value / 127.5 - 1 if value.dtype == jnp.uint8 and value.ndim == 4 else value


def make_given(config: Config, split: str, stated: Mapping[str, np.ndarray] = MappingProxyType({})) -> Given | None:
  """What samples are told, where anything: the conditions of the examples of a split, but for those that are stated."""
  conditions = make_conditions(config).keys()
  if not (conditions or stated):
    return None
  of_stated = lambda batch: {name: batch[name] for name in stated}
  if conditions <= stated.keys():
    return Given(None, of_stated, stated)
  source = make_source(config, split)
  of_examples = make_cond(config, source)
  return Given(source, lambda batch: {**of_examples(batch), **of_stated(batch)}, stated)


def check_conditions(config: Config, source: Source) -> None:
  """Refuse data that lack what the network is told, or have it of another shape or with classes beyond those it knows.

  Of data that are not in memory so many examples are looked at, spread over all.
  """
  conditions = make_conditions(config)
  if not (conditions or schema.is_classifier(config)):
    return
  spread = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)) if len(source) else np.arange(0)
  known = {**source.gather(spread), **getattr(source.examples, "arrays", {})}
  for name, made in conditions.items():
    path = f"network.conditions.{name}"
    if made.of is None:
      _check_field(f"config.{path}", name, known, source, getattr(made.module, "classes", None))
    elif len(source.shape) != 3:
      raise ConfigError(f"config.{path} is made of images [h, w, c]; the data have shape {source.shape}")
    x = jax.ShapeDtypeStruct((1, *source.shape), jnp.float32)
    field = known[name][:1] if made.of is None else x
    told = lambda x, field, made=made: _scaled(field) if made.of is None else made.of(x)
    check = lambda x, field, made=made, name=name, told=told: made.module.check(name, told(x, field), x)
    schema.construct(
      lambda check, x, field: jax.eval_shape(check, x, field), {"check": check, "x": x, "field": field}, path
    )
  if schema.is_classifier(config):
    _check_field("config.network", "label", known, source, make_network(config).classes)


def _check_field(path: str, name: str, known: Mapping[str, Any], source: Source, classes: int | None) -> None:
  if name not in known:
    raise ConfigError(f"{path} needs data with {name!r}; {source.name} has {', '.join(sorted(known))}")
  if classes is not None and not 0 <= known[name].min() <= known[name].max() < classes:
    low, high = known[name].min(), known[name].max()
    raise ConfigError(
      f"{path}.classes = {classes}, but {source.name} has labels from {low} to {high}: labels count from 0, so set "
      f"classes={high + 1}"
    )


def init_params(config: Config, source: Source) -> Any:
  """Initial parameters, from the seed of the config; `jax.eval_shape` of this gives their shapes."""
  network = make_network(config)
  params = init_network("network", network, source.shape, config["seed"], jnp.ones(1))
  return params if (part := learned(config)) is None else {"network": params, "gamma": part}


def init_network(path: str, network: Any, shape: tuple[int, ...], seed: int, *args: Any, **cond: Any) -> Any:
  """Initial parameters of the network of the section at `path`, for data of a shape.

  `args` follow x in its call, with conditions: those given, and nothing for the others it has.
  """
  x = jnp.zeros((1, *shape))
  try:
    cond = conditioning.nothing(getattr(network, "conditions", {}), x) | cond
    params = jax.jit(network.init)(jax.random.key(seed), x, *args, **cond)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ConfigError(f"config.{path} does not fit data of shape {shape}: {error}") from error
  if empty := [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.size == 0]:
    raise ConfigError(
      f"config.{path} has no parameters in {jax.tree_util.keystr(empty[0])}: its sizes must be positive"
    )
  return params


def network_params(config: Config, params: Any) -> Any:
  """The parameters of the network among those of the run."""
  return params if learned(config) is None else params["network"]


def make_optimizer_of(config: Config, name: str = "optimizer") -> optax.GradientTransformation:
  """The optimizer that a section describes; its schedule ends with the training."""
  section, steps = config[name], options.train(config).steps
  schema.check_section(name, section)
  if section["warmup_steps"] >= steps:
    raise ConfigError(
      f"config.train.steps = {steps} must exceed config.{name}.warmup_steps = {section['warmup_steps']}: "
      "train longer, or warm up in fewer steps"
    )
  return schema.component(name, section, total_steps=steps)


def likelihood_facts(config: Config, dimension: int) -> Config:
  """The section `likelihood` with all its defaults, those of the trace estimator included."""
  section = config["likelihood"]
  usual = {"type": "exact" if dimension <= divergence.EXACT_UP_TO else "hutchinson"}
  trace = section.get("divergence", usual)
  resolved = {"divergence": schema.resolved("likelihood.divergence", trace)}
  return schema.resolved("likelihood", section) | resolved


def make_log_prob(config: Config, process: Any, seen: jax.Array | None = None) -> likelihood.LogDensity:
  """The log-density of a process or a flow; in float64 it takes x so, as what dequantizes them need not be.

  Without the training data that its trace estimator may need, `seen`, that is one without them.
  """
  section = config["likelihood"]
  schema.check_section("likelihood", section)
  trace = make_trace(section["divergence"], seen) if "divergence" in section else None
  taken = {"divergence", *options.likelihood_fields(section)}
  fields = {name: value for name, value in section.items() if name not in taken}
  if options.is_flow(config):
    if foreign := sorted(fields.keys() - inspect.signature(flow.cnf).parameters.keys() | fields.keys() & {"t0"}):
      raise ConfigError(f"config.likelihood.{foreign[0]} is of processes with noise; leave it out for a CNF")
    made = schema.construct(flow.cnf, fields, "likelihood", t1=process.t1, divergence=trace).log_prob
  else:
    made = schema.construct(likelihood.log_prob, fields, "likelihood", sde=process, divergence=trace)
  if options.likelihood(config).dtype == "float32":
    return made
  return dataclasses.replace(made, evaluate=lambda key, x, *rest: made.evaluate(key, x.astype(jnp.float64), *rest))


def make_trace(section: Config, seen: jax.Array | None) -> divergence.Divergence:
  """The trace estimator, fitted to data that the model has seen where it needs them."""
  (constructor,) = schema.constructors("likelihood.divergence", section)
  takes = inspect.signature(constructor).parameters
  return schema.component("likelihood.divergence", section, **({"seen": seen} if "seen" in takes else {}))


def make_sampler(config: Config, process: Any, **more: Any) -> Callable[..., Any]:
  """The sampler, on its time grid if it has one; `more` are arguments in the place of its own."""
  section = config["sampler"]
  (constructor,) = schema.constructors("sampler", section)
  if section.get("variance") == "learned" and getattr(make_network(config), "parts", 1) != 2:
    raise ConfigError(
      "config.sampler.variance = 'learned' needs a network that learns it: config.network.parts = 2, trained by the "
      "loss ddpm_hybrid or ddpm_elbo"
    )
  takes = inspect.signature(constructor).parameters
  given: dict[str, Any] = {"sde": process} if "sde" in takes else {}
  if "forward" in takes:
    forward = make_forward(config)
    given["forward"] = forward if hasattr(forward, "sde") else process
  if "grid" in schema.subsections("sampler", section):
    given["ts"] = schema.component("sampler.grid", section.get("grid", {}), sde=process)
  return schema.component("sampler", section, **{**given, **more})


def has_path(config: Config) -> bool:
  """Whether there is a sampler that can return the path to its samples."""
  if "sampler" not in config:
    return False
  (constructor,) = schema.constructors("sampler", config["sampler"])
  return "path" in inspect.signature(constructor).parameters


def make_apply(config: Config) -> Callable[..., jax.Array]:
  """`(params, x, t, **cond) -> output`, without what the network says of its variance."""
  module = make_network(config)
  apply: Callable[..., Any] = module.apply
  if getattr(module, "parts", 1) == 1:
    return apply
  return lambda params, x, t, **cond: apply(params, x, t, **cond)[..., : x.shape[-1]]


def make_score(config: Config) -> Callable[[Any], Any]:
  """From the parameters of the run to the score that the network is with them, or to the vector field of a flow."""
  module, prediction = make_network(config), make_prediction(config)
  if options.is_flow(config):
    return lambda params: prediction(module.apply, params)
  learned_variance = getattr(module, "parts", 1) == 2
  apply: Callable[..., Any] = module.apply if learned_variance else make_apply(config)
  fixed = make_process(config)

  def score(params: Any) -> Any:
    process = fixed if learned(config) is None else make_process(config, params)
    return predictions.score_fn(apply, network_params(config, params), process, prediction, learned_variance)

  return score


def check_components(config: Config) -> None:
  """Build everything that needs no data and no loss."""
  options.check_seed("seed", config["seed"])
  _check_classifier(config)
  classifier = schema.is_classifier(config)
  if not classifier:
    _check_flow(config)
  process = make_process(config)
  generative = () if classifier else (options.sample, options.guidance, options.likelihood)
  for build in (make_network, make_optimizer_of, options.train, options.evaluate, *generative):
    build(config)
  if classifier:
    return
  make_sampler(config, process)
  with options.precision(config):
    make_log_prob(config, make_process(config))
