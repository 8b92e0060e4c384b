"""Denoising diffusion GANs: a generator of few large steps, and the discriminator it is trained against."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff import factory, keys, likelihood, losses, options, schema
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.models import conditioning
from jaxdiff.objectives import Batch
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems.groups import partitioned
from jaxdiff.systems.system import System
from jaxdiff.systems.unsupported import refuse_dropout, refuse_fields, refuse_threshold

_BLOWN_UP = 1e3  # either loss, a few nats where all is well


def _check(config: Config) -> None:
  if "discriminator" not in config:
    raise ConfigError("config.loss.type = 'denoising_gan' needs config.discriminator: add the section")
  for path, due in (("sde", "DDPM"), ("prediction", "data"), ("sampler", "denoising_gan")):
    if (kind := config[path]["type"]) != due:
      raise ConfigError(f"config.{path}.type must be {due!r} for config.loss.type = 'denoising_gan', got {kind!r}")
  if config["discriminator"]["type"] == "PatchDiscriminator":
    raise ConfigError(
      "config.discriminator.type = 'PatchDiscriminator' knows no steps: take 'StepDiscriminator' for images, "
      "'VectorDiscriminator' for points"
    )
  refuse_fields(config, "prediction", "a denoising diffusion GAN", "log_snr_time")
  refuse_threshold(config)
  refuse_dropout(config)
  if options.train(config).drop_conditions:
    raise ConfigError("config.train.drop_conditions is for guidance, which a GAN has not: leave it out")
  options.check_seed("seed", config["seed"])
  for build in (_generator, _discriminator, _loss, _optimizer, options.train, options.evaluate):
    build(config)
  _sampler(config, None)


def _latent_dim(config: Config) -> int:
  return schema.resolved("loss", config["loss"])["latent_dim"]


def _generator(config: Config) -> Any:
  """The network, told a latent beside its conditions."""
  return factory.make_network(config, {"latent": conditioning.Embedding(_latent_dim(config))})


def _discriminator(config: Config) -> Any:
  """Told the same conditions as the generator."""
  told = {name: made.module for name, made in factory.make_conditions(config).items()}
  return schema.component("discriminator", config["discriminator"], parent=None, name=None, conditions=told)


def _loss(config: Config) -> Callable[..., Any]:
  return schema.component("loss", config["loss"], chain=factory.make_forward(config))


def _init_params(config: Config, source: Source) -> Any:
  t, x = jnp.ones(1), jnp.zeros((1, *source.shape))
  init = lambda name, network, **told: factory.init_network(name, network, source.shape, config["seed"], t, **told)
  judge = init("discriminator", _discriminator(config), x_t=x)
  return {"generator": init("network", _generator(config)), "discriminator": judge}


def _optimizer(config: Config) -> optax.GradientTransformation:
  name = "discriminator_optimizer" if "discriminator_optimizer" in config else "optimizer"
  optimizers = {
    "generator": factory.make_optimizer_of(config),
    "discriminator": factory.make_optimizer_of(config, name),
  }
  return partitioned(optimizers, usual="generator")


def _objective(config: Config, source: Source, training: bool = True) -> Callable[..., Any]:
  loss, settings, cond = _loss(config), options.train(config), factory.make_cond(config, source)
  stratified = schema.resolved("loss", config["loss"])["stratified"]
  makes, judges = _generator(config).apply, _discriminator(config).apply

  def objective(params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    data_key, flip_key, loss_key = keys.split(key, 3)
    if training and settings.random_flip:
      batch = {name: random_flip(flip_key, value) if value.ndim == 4 else value for name, value in batch.items()}
    x = batch["x"] if source.levels is None else likelihood.dequantize(data_key, batch["x"], source.levels)
    part = lambda apply, name: jax.tree_util.Partial(apply, params[name])
    players = losses.Players(part(makes, "generator"), part(judges, "discriminator"))
    step = batch["step"][0] if training else None
    return loss(loss_key, x, players, cond(batch), u=batch["u"] if stratified else None, step=step)

  return objective


def _score(config: Config) -> Callable[[Any], Any]:
  """What the sampler is given: the generator."""
  apply = _generator(config).apply
  return lambda params: jax.tree_util.Partial(apply, params["generator"])


def _sampler(config: Config, process: Any, **more: Any) -> Callable[..., Any]:
  chain, latent_dim = factory.make_forward(config), _latent_dim(config)
  return schema.component("sampler", config["sampler"], chain=chain, latent_dim=latent_dim, **more)


def _limits(config: Config, source: Source) -> Mapping[str, float]:
  return {"generator_loss": _BLOWN_UP, "discriminator_loss": _BLOWN_UP}


SYSTEM = System(
  check=_check,
  init_params=_init_params,
  optimizer=_optimizer,
  objective=_objective,
  process=lambda config, params=None: factory.make_forward(config).sde(),
  shape=lambda config, source: source.shape,
  score=_score,
  sampler=_sampler,
  decode=lambda config: None,
  limits=_limits,
)
