"""Diffusions of latents: of the autoencoder of another run, or of one that is trained together with them (LSGM).

The parameters are {"autoencoder": .., "prior": ..}. Those of another run are copied at the start and stay as they are;
its config, the scale that gives its latents unit variance, and the hash of its parameters go into the config of this
one. So checkpoints are whole, and another autoencoder under the same directory is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff import (
  components,
  factory,
  keys,
  latents,
  likelihood,
  losses,
  mixing,
  objectives,
  options,
  predictions,
  schema,
)
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.models import conditioning
from jaxdiff.objectives import Batch, Evaluation
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems import coding, pretrained
from jaxdiff.systems.groups import partitioned
from jaxdiff.systems.system import Decode, Reconstruct, System
from jaxdiff.systems.unsupported import refuse_dropout, refuse_fields, refuse_threshold, try_on

_BLOWN_UP = 1e3, 1e6  # nats of the cross-entropy, and of the reconstruction, for a dimension of the data


def _is_joint(config: Config) -> bool:
  return config["loss"]["type"] == "lsgm"


def _check(config: Config) -> None:
  section = config["autoencoder"]
  if (kind := config["loss"]["type"]) in components.AUTOENCODING:
    raise ConfigError(f"config.loss.type = {kind!r} is of autoencoders; of latents take 'denoising' or 'lsgm'")
  for part in ("network", "loss"):
    if section.get(part) is None:
      raise ConfigError(
        f"config.autoencoder.{part} is missing: give config.autoencoder.workdir, the run of an autoencoder, or the "
        "sections network and loss of one to be trained with config.loss.type = 'lsgm'"
      )
  if (joint := _is_joint(config)) == ("workdir" in section):
    raise ConfigError(
      "config.loss.type = 'lsgm' trains the autoencoder of config.autoencoder.network, any other loss is of the "
      f"latents of config.autoencoder.workdir; got {config['loss']['type']!r} {'with' if joint else 'without'} it"
    )
  if section["network"]["type"] != "AutoencoderKL":
    raise ConfigError(
      f"config.autoencoder.network.type must be 'AutoencoderKL', whose latents are Gaussian; got "
      f"{section['network']['type']!r}"
    )
  coding.check(section, "autoencoder.")
  if _is_joint(config):
    refuse_fields(section, "loss", "an autoencoder that is trained by 'lsgm'", "beta", "patch_weight", "patch_start")
  factory.check_components(config)
  _make_loss(config, None)
  if factory.learned(config) is not None or options.is_flow(config):
    raise ConfigError("config.sde of latents must be a process without learned parts")
  refuse_threshold(config)
  refuse_dropout(config)
  settings, trace = options.likelihood(config), config["likelihood"].get("divergence", {})
  if settings.dequantization != "auto":
    raise ConfigError("config.likelihood.dequantization is of diffusions of the data: leave it out")
  if trace.get("basis") in ("pca", "auto") or trace.get("control", "none") != "none":
    raise ConfigError("config.likelihood.divergence of latents has the basis 'identity' or 'dct' and no control")


def _coding(config: Config, source: Source) -> coding.Coding:
  return coding.make(config["autoencoder"], source, "autoencoder.")


def _shape(config: Config, source: Source) -> tuple[int, ...]:
  made = _coding(config, source)
  variables = jax.eval_shape(lambda: coding.init(made, source.shape, config["seed"], "autoencoder."))
  return made.prior_shape(variables, source.shape)


def _init_params(config: Config, source: Source) -> Any:
  shape = _shape(config, source)
  prior = factory.init_network("network", factory.make_network(config), shape, config["seed"], jnp.ones(1))
  if (mixed := _mixed(config)) is not None:
    prior = mixed.init(prior, shape[-1])
  autoencoder = coding.init(_coding(config, source), source.shape, config["seed"], "autoencoder.")
  return {"autoencoder": autoencoder, "prior": prior}


def _mixed(config: Config) -> mixing.MixedScore | None:
  if config["prediction"]["type"] != "mixed_noise":
    return None
  prediction = factory.make_prediction(config)
  return mixing.mixed_score(factory.make_apply(config), factory.make_process(config), prediction.std, prediction.share)


def _network(config: Config) -> tuple[Callable[..., Any], Any]:
  """The function of parameters and noised latents that scores are made of, and what it predicts."""
  if (mixed := _mixed(config)) is not None:
    return mixed.apply, predictions.noise()
  return factory.make_apply(config), factory.make_prediction(config)


def _optimizer(config: Config) -> optax.GradientTransformation:
  optimizer = factory.make_optimizer_of(config)
  frozen = {} if _is_joint(config) else {"autoencoder": optax.set_to_zero()}
  return partitioned({"prior": optimizer, **frozen}, usual="prior")


def _make_loss(config: Config, made: coding.Coding | None) -> tuple[Callable[..., Any], bool]:
  """The loss of latents, or of both together, and whether its times are stratified."""
  _, prediction = _network(config)
  section, process = config["loss"], factory.make_process(config)
  if not _is_joint(config):
    plain = config if _mixed(config) is None else config | {"prediction": {"type": "noise"}}
    return objectives.make_loss(plain)
  time = schema.component("loss.time", section.get("time", {"type": "importance"}))
  weight = schema.component("loss.prior_weight", section["prior_weight"]) if "prior_weight" in section else None
  try_on(process, time=time, prior_weight=weight)
  autoencoding = components.vae(None, "gaussian") if made is None else made.made
  given = {"sde": process, "autoencoding": autoencoding, "prediction": prediction}
  given |= {"prior_weight": weight, "time": time}
  return schema.component("loss", section, **given), time.stratified


def _objective(config: Config, source: Source, training: bool = True) -> Callable[..., Any]:
  made, settings = _coding(config, source), options.train(config)
  (loss, stratified), (apply, _) = _make_loss(config, made), _network(config)
  cond, null = factory.make_cond(config, source), conditioning.null(factory.make_network(config).conditions)
  if training and settings.drop_conditions:
    loss = losses.drop_conditions(loss, null, settings.drop_conditions)

  def objective(params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    flip_key, sample_key, loss_key = keys.split(key, 3)
    told, x = cond(batch), batch["x"]
    if training and settings.random_flip:
      x = random_flip(flip_key, x)
    autoencoder = made.network(params["autoencoder"])
    network = jax.tree_util.Partial(apply, params["prior"])
    u = batch["u"] if stratified else None
    if _is_joint(config):
      value, aux = loss(loss_key, x, losses.LatentModel(autoencoder, network), told, u)
      unit = coding.bits_per_dim(source)
      return value, aux if source.levels is None else {**aux, "bits_per_dim": unit * value}
    posterior = latents.posterior(autoencoder, made.made.observation.to_state(x))
    z = jax.lax.stop_gradient(latents.sample(sample_key, posterior))
    value, aux = loss(loss_key, z, network, told, u)
    return value, {**aux, "loss_per_dim": value / z[0].size}

  return objective


def _score(config: Config) -> Callable[[Any], Any]:
  apply, prediction = _network(config)
  process = factory.make_process(config)
  return lambda params: predictions.score_fn(apply, params["prior"], process, prediction)


def _decode(config: Config) -> Decode:
  made = _coding(config, factory.make_source(config, "train"))
  return lambda params, z: made.made.observation.image(made.network(params["autoencoder"]).decode(z))


def _reconstruct(config: Config, source: Source) -> Reconstruct:
  made = _coding(config, source)
  observation = made.made.observation

  def run(params: Any, key: jax.Array, batch: Batch) -> jax.Array:
    network = made.network(params["autoencoder"])
    return observation.image(made.reconstruct(network, observation.to_state(batch["x"])))

  return run


def _log_likelihood(config: Config, params: Any, source: Source, seen: Any = None) -> Evaluation:
  """The bound with the density of latents under the flow, and its parts: costs in bits/dim of integers, less the
  entropy; of other data lower bounds on log p in nats, and the entropy.
  """
  made, settings, score = _coding(config, source), options.likelihood(config), _score(config)
  prior = factory.make_log_prob(config, factory.make_process(config))
  bound = schema.construct(
    likelihood.latent_ode,
    {"draws": settings.draws, "importance": settings.importance},
    "likelihood",
    prior=prior,
    observation=made.made.observation,
  )
  cond, sign = factory.make_cond(config, source), 1 if source.levels is not None else -1

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    result = bound(key, batch["x"], made.network(params["autoencoder"]), score(params), cond(batch))
    parts = {name: sign * getattr(result, name) for name in ("value", "reconstruction", "prior")}
    parts |= {"entropy": result.entropy}
    errors = {"standard_error": result.standard_error, "dequantization_error": result.draw_error}
    return parts | errors | {"nfe": result.nfe, "code": result.status.code, "accepted": result.status.accepted}

  return run


def _bound(config: Config, params: Any, source: Source, draws: int) -> Evaluation:
  """The bound with that of the latents under the reverse SDE."""
  made, cond, (apply, prediction) = _coding(config, source), factory.make_cond(config, source), _network(config)
  prior = losses.bound(factory.make_process(config), prediction, t0=config["likelihood"].get("t0"))
  bound, sign = likelihood.latent_elbo(prior, made.made.observation, draws), 1 if source.levels is not None else -1

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    network = jax.tree_util.Partial(apply, params["prior"])
    result = bound(key, batch["x"], made.network(params["autoencoder"]), network, cond(batch))
    return {"bound": sign * result.value, "bound_standard_error": result.draw_error}

  return run


def _statement(config: Config, params: Any, source: Source) -> tuple[str, Config]:
  log_prob = factory.make_log_prob(config, factory.make_process(config))
  words, facts = objectives.flow_in_words(config, log_prob, _shape(config, source))
  settings = options.likelihood(config)
  how = "importance-weighted" if settings.importance else "averaged"
  draws = "one draw of the posterior" if settings.draws == 1 else f"{settings.draws} draws of the posterior, {how}"
  between = f"encoder entropy, decoder, and of the latents the {words}; {draws}"
  facts |= {"autoencoder": schema.resolved("autoencoder.loss", config["autoencoder"]["loss"])}
  if source.levels is None:
    return f"nats, lower bound on log p(x): {between}", facts | {"dequantization": None}
  return f"bits/dim, upper bound on -log2 P(x) / d: {between}", facts | {"dequantization": "none, p(n | z)"}


def _limits(config: Config, source: Source) -> Mapping[str, float]:
  if not _is_joint(config):
    return {}
  dimension = source.gather([0])["x"][0].size
  return {"cross_entropy": _BLOWN_UP[0] * dimension, "reconstruction": _BLOWN_UP[1] * dimension}


SYSTEM = System(
  check=_check,
  init_params=_init_params,
  optimizer=_optimizer,
  objective=_objective,
  process=lambda config, params=None: factory.make_process(config),
  shape=_shape,
  score=_score,
  sampler=factory.make_sampler,
  decode=_decode,
  log_likelihood=_log_likelihood,
  statement=_statement,
  bound=_bound,
  row="model, bound with latent ODE",
  reconstruct=_reconstruct,
  limits=_limits,
  resolve=pretrained.resolve,
  pretrained=pretrained.load,
)
