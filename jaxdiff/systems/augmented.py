"""Diffusions with velocities (CLD): states are positions, which are the data, and velocities beside them."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import cld, factory, keys, likelihood, losses, objectives, options, samplers, schema
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.models import conditioning
from jaxdiff.objectives import Batch, Evaluation
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems.system import System
from jaxdiff.systems.unsupported import refuse_dropout, refuse_fields, refuse_threshold, try_on
from jaxdiff.typing import Cond, Keys, Sample, State


def _check(config: Config) -> None:
  for path, due in (("prediction", "velocity_noise"), ("loss", "hybrid")):
    if (kind := config[path]["type"]) != due:
      raise ConfigError(f"config.{path}.type must be {due!r} for config.sde.type = 'CLD', got {kind!r}")
  if (kind := config["sampler"]["type"]) not in ("sscs", "reverse_sde"):
    raise ConfigError(f"config.sampler.type must be 'sscs' or 'reverse_sde' for config.sde.type = 'CLD', got {kind!r}")
  refuse_threshold(config)
  refuse_dropout(config)
  refuse_fields(config, "likelihood", "a diffusion with velocities, which has no such bound", "bound_draws")
  if (kind := options.likelihood(config).dequantization) not in ("auto", "uniform"):
    raise ConfigError(f"config.likelihood.dequantization must be 'uniform' for config.sde.type = 'CLD', got {kind!r}")
  trace = config["likelihood"].get("divergence", {})
  if trace.get("basis", "identity") != "identity" or trace.get("control", "none") != "none":
    raise ConfigError(
      "config.likelihood.divergence has no basis and no control for config.sde.type = 'CLD': leave them out"
    )
  options.check_seed("seed", config["seed"])
  process = factory.make_forward(config)
  builds = (factory.make_network, factory.make_optimizer_of, options.train, options.evaluate, _loss, _log_density)
  for build in builds:
    build(config)
  _sampler(config, process)
  _warn_of_signal(process)


def _process(config: Config, params: Any = None) -> cld.CLD:
  return factory.make_forward(config)


def _warn_of_signal(process: cld.CLD) -> None:
  """Warn of a process whose end is not its prior."""
  mean, cholesky = process.given_position(process.t1)
  signal = float(jnp.abs(mean).max() / cholesky[0, 0])
  if signal > factory.LARGEST_SIGNAL_AT_PRIOR:
    warnings.warn(
      f"config.sde: data over noise is {signal:.2g} at t1, so noised data do not match the prior; choose a larger "
      f"beta / sqrt(mass), with at most {factory.LARGEST_SIGNAL_AT_PRIOR}, got {process}",
      stacklevel=1,
    )


def _init_params(config: Config, source: Source) -> Any:
  """Of a network that sees positions and velocities as channels."""
  *shape, channels = source.shape
  return factory.init_network(
    "network", factory.make_network(config), (*shape, 2 * channels), config["seed"], jnp.ones(1)
  )


def _apply(config: Config) -> Callable[..., State]:
  return cld.on_channels(factory.make_network(config).apply)


def _loss(config: Config) -> tuple[losses.Loss, bool]:
  """The loss, and whether its times are stratified."""
  section = config["loss"]
  weight = schema.component("loss.weight", section.get("weight", {"type": "noise"}))
  time = schema.component("loss.time", section.get("time", {"type": "uniform"}))
  process = _process(config)
  try_on(process, time=time, weight=weight)
  given = {"sde": process, "mixed": factory.make_prediction(config).mixed, "weight": weight, "time": time}
  return schema.component("loss", section, **given), time.stratified


def _objective(config: Config, source: Source, training: bool = True) -> Callable[..., Any]:
  (loss, stratified), apply, settings = _loss(config), _apply(config), options.train(config)
  cond, null = factory.make_cond(config, source), conditioning.null(factory.make_network(config).conditions)
  if training and settings.drop_conditions:
    loss = losses.drop_conditions(loss, null, settings.drop_conditions)

  def objective(params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    data_key, flip_key, loss_key = keys.split(key, 3)
    if training and settings.random_flip:
      batch = {name: random_flip(flip_key, value) if value.ndim == 4 else value for name, value in batch.items()}
    x = batch["x"] if source.levels is None else likelihood.dequantize(data_key, batch["x"], source.levels)
    network = functools.partial(apply, params)
    value, aux = loss(loss_key, x, network, cond(batch), u=batch["u"] if stratified else None)
    return value, {**aux, "loss_per_dim": value / x[0].size}

  return objective


def _score(config: Config) -> Callable[[Any], Any]:
  apply, process, mixed = _apply(config), _process(config), factory.make_prediction(config).mixed
  return lambda params: cld.score_fn(apply, params, process, mixed)


@dataclasses.dataclass(frozen=True)
class _Denoising:
  """A sampler whose last positions become what the model takes for the data, at one more evaluation."""

  sampler: Any

  @property
  def ts(self) -> jax.Array:
    return self.sampler.ts

  def __call__(self, key: Keys, state: State, score: Any, cond: Cond) -> Sample:
    sample = self.sampler(key, state, score, cond)
    _, velocity = cld.split(sample.x)
    last = cld.join(score.denoised(sample.x, self.ts[-1], **cond), velocity)
    return samplers.fixed_grid.replace_last(sample, last, 1)


def _sampler(config: Config, process: Any, **more: Any) -> _Denoising:
  return _Denoising(factory.make_sampler(config, process, **more))


def _log_density(config: Config) -> likelihood.LogDensity:
  """log p(x, v) - log q(v) at a velocity that is drawn."""
  section = config["likelihood"]
  fields = {name: value for name, value in section.items() if name not in options.likelihood_fields(section)}
  trace = factory.make_trace(fields.pop("divergence"), None) if "divergence" in fields else None
  if foreign := sorted(fields.keys() - inspect.signature(likelihood.augmented).parameters.keys()):
    raise ConfigError(f"config.likelihood.{foreign[0]} is of processes without velocities: leave it out")
  made = schema.construct(likelihood.augmented, fields, "likelihood", sde=_process(config), divergence=trace)
  if options.likelihood(config).dtype == "float32":
    return made
  return dataclasses.replace(made, evaluate=lambda key, x, *rest: made.evaluate(key, x.astype(jnp.float64), *rest))


def _log_likelihood(config: Config, params: Any, source: Source, seen: Any = None) -> Evaluation:
  """The bound on the density of positions: bits/dim of integers, else nats; a velocity with every draw."""
  settings, score, cond = options.likelihood(config), _score(config), factory.make_cond(config, source)
  how = {"draws": settings.draws, "importance": settings.importance}
  if source.levels is None:
    bound = schema.construct(likelihood.position_bound, how, "likelihood", log_prob=_log_density(config))
  else:
    given = {"log_prob": _log_density(config), "levels": source.levels}
    bound = schema.construct(likelihood.bits_per_dim, how, "likelihood", **given)

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    result = bound(key, batch["x"], score(params), cond(batch))
    of_draws = result.velocity_error if source.levels is None else result.dequantization_error
    errors = {"standard_error": result.standard_error, "dequantization_error": of_draws}
    status = {"code": result.status.code, "accepted": result.status.accepted}
    return {"value": result.value, **errors, "nfe": result.nfe, **status}

  return run


def _statement(config: Config, params: Any, source: Source) -> tuple[str, Config]:
  words, facts = objectives.flow_in_words(config, _log_density(config), source.shape)  # the trace goes by positions
  how = "importance-weighted" if facts["importance"] else "averaged"
  draws = "one draw" if facts["draws"] == 1 else f"{facts['draws']} draws, {how},"
  if source.levels is None:
    between = f"nats, lower bound on log p(x), E log p(x, v) + H(v): {draws} of velocities"
    return f"{between}; {words}", facts | {"dequantization": None}
  between = f"bits/dim, upper bound on -log2 P(x) / d, E log p(x, v) + H(v): {draws} of uniform dequantization and"
  return f"{between} velocities; {words}", facts | {"dequantization": "uniform"}


SYSTEM = System(
  check=_check,
  init_params=_init_params,
  optimizer=factory.make_optimizer_of,
  objective=_objective,
  process=_process,
  shape=lambda config, source: (*source.shape, 2),
  score=_score,
  sampler=_sampler,
  decode=lambda config: lambda params, state: cld.split(state)[0],
  log_likelihood=_log_likelihood,
  statement=_statement,
  row="model, bound over velocities",
)
