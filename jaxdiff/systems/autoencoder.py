"""Autoencoders: trained by a bound, which is their likelihood; samples are decoded draws of the prior.

With a section `discriminator` the reconstructions are to pass for real before it, patch by patch. Where codes are
moving averages the metric `grad_norm` has their statistics in it, which travel as gradients.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdiff import divergence, factory, flow, keys, latents, likelihood, losses, options, quantization, schema
from jaxdiff.data.examples import Source
from jaxdiff.data.transforms import random_flip
from jaxdiff.objectives import Batch, Evaluation
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems import coding
from jaxdiff.systems.groups import partitioned
from jaxdiff.systems.system import Decode, Reconstruct, System
from jaxdiff.systems.unsupported import refuse_fields, refuse_threshold
from jaxdiff.training.codebook import moving_average
from jaxdiff.typing import Keys, LogProb, Sample, State, Status

_BLOWN_UP = 1e3, 1e6  # of the KL or the commitment, and of the reconstruction, for a dimension of the data


def _check(config: Config) -> None:
  coding.check(config)
  refuse_fields(config, "likelihood", "an autoencoder, which has one bound", "bound_draws", "dequantization")
  if config["loss"]["type"] == "vq":
    refuse_fields(config, "likelihood", "vector quantization, which draws nothing", "draws")
  if "discriminator" not in config:
    refuse_fields(config, "loss", "an autoencoder without a config.discriminator", "patch_weight", "patch_start")
  loss = schema.resolved("loss", config["loss"])
  if loss.get("codebook") == "loss":
    refuse_fields(config, "loss", "codes that are trained by the loss", "decay", "revive_below")
  elif (codes := config["network"].get("codes", 2)) * loss.get("revive_below", 0.0) >= 1:
    raise ConfigError(f"config.loss.revive_below = {loss['revive_below']}: must be below 1 / {codes}, an equal share")
  if foreign := sorted(config["likelihood"].keys() - options.likelihood_fields(config["likelihood"])):
    raise ConfigError(f"config.likelihood.{foreign[0]} is of diffusions, and this is an autoencoder: leave it out")
  options.check_seed("seed", config["seed"])
  for build in (_optimizer, options.train, options.sample, options.evaluate, options.likelihood):
    build(config)
  if options.likelihood(config).importance and config["loss"]["type"] != "vae":
    raise ConfigError("config.likelihood.importance is of config.loss.type = 'vae': leave it out")
  refuse_threshold(config)
  _check_discriminator(config)


def _check_discriminator(config: Config) -> None:
  if "discriminator" not in config:
    if "discriminator_optimizer" in config:
      raise ConfigError("config.discriminator_optimizer needs config.discriminator, and there is none")
    return
  if (kind := config["discriminator"]["type"]) != "PatchDiscriminator":
    raise ConfigError(f"config.discriminator.type must be 'PatchDiscriminator' for an autoencoder, got {kind!r}")
  if config["loss"]["type"] == "gumbel":
    raise ConfigError("config.discriminator goes with the losses 'vae' and 'vq', not with 'gumbel': leave it out")


def _init_params(config: Config, source: Source) -> Any:
  groups = {"autoencoder": coding.init(coding.make(config, source), source.shape, config["seed"])}
  if "discriminator" in config:
    judge = schema.component("discriminator", config["discriminator"], parent=None, name=None)
    groups["discriminator"] = factory.init_network("discriminator", judge, source.shape, config["seed"])
  return groups


def _optimizer(config: Config) -> optax.GradientTransformation:
  optimizers = {"autoencoder": factory.make_optimizer_of(config)}
  if "discriminator" in config:
    name = "discriminator_optimizer" if "discriminator_optimizer" in config else "optimizer"
    optimizers["discriminator"] = factory.make_optimizer_of(config, name)
  if _has_averages(config):
    loss = schema.resolved("loss", config["loss"])
    fields = {name: loss[name] for name in ("decay", "revive_below")}
    optimizers["codebook"] = schema.construct(moving_average, fields, "loss")
  return partitioned(optimizers, usual="autoencoder")


def _has_averages(config: Config) -> bool:
  """Whether the codes of a codebook are moving averages."""
  return schema.resolved("loss", config["loss"]).get("codebook") == "ema"


def _objective(config: Config, source: Source, training: bool = True) -> Callable[..., Any]:
  """The loss of the autoencoder, with that of a discriminator; without `training` nothing that only training does."""
  made, settings = coding.make(config, source), options.train(config)
  loss = _with_patches(config, made) if training and "discriminator" in config else made.made.loss
  takes = inspect.signature(made.made.loss).parameters.keys() & {"step", "index", "global_batch"}
  to_bits, averaged = coding.bits_per_dim(source), training and _has_averages(config)

  def objective(params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    flip_key, loss_key = keys.split(key)
    x, network = batch["x"], made.network(params["autoencoder"])
    if training and settings.random_flip:
      x = random_flip(flip_key, x)
    more = {}
    if training:
      known = {"step": batch["step"][0], "index": batch["index"], "global_batch": settings.batch_size}
      more = {name: known[name] for name in takes}
    if training and "discriminator" in config:
      value, aux = loss(loss_key, x, network, params["discriminator"], batch["step"][0], more)
    else:
      value, aux = loss(loss_key, x, network, **more)
    if source.levels is not None:
      aux = aux | {"bits_per_dim": to_bits * aux["nats"]}
    if averaged:
      counts = params["autoencoder"]["codebook"]["counts"]
      used = jnp.where(jnp.sum(counts) > 0, quantization.perplexity(jnp.maximum(counts, 1e-30)), 1.0)
      aux = aux | {"perplexity": jnp.full(len(x), used)}
    return value, aux

  return objective


def _with_patches(config: Config, made: coding.Coding) -> Callable[..., Any]:
  """`(key, x, network, variables of the discriminator, step, more)`, the loss before a discriminator of patches."""
  judge = schema.component("discriminator", config["discriminator"], parent=None, name=None)
  observation = made.made.observation

  def reconstruct(key: Keys, state: State, network: Any) -> State:
    """What the loss decodes, computed alike."""
    if config["loss"]["type"] == "vae":
      z = latents.sample(keys.per_example(key, len(state)), latents.posterior(network, state))
    else:
      z = network.encode(state)
      vectors = network.codebook["vectors"]
      z = quantization.straight_through(z, vectors[quantization.nearest(z, vectors)])
    return observation.image(network.decode(z))

  def loss(key: Keys, x: Any, network: Any, variables: Any, step: Any, more: Any) -> Any:
    plain = lambda key, state, network: made.made.loss(key, x, network, **more)
    weight, start = made.made.patch_weight, made.made.patch_start
    adversarial = schema.construct(
      losses.patch_adversarial, {}, "loss.patch_weight", loss=plain, reconstruct=reconstruct, weight=weight, start=start
    )
    players = losses.Players(network, jax.tree_util.Partial(judge.apply, variables))
    return adversarial(key, observation.to_state(x), players, step)

  return loss


@dataclasses.dataclass(frozen=True)
class _Prior:
  """What samples start from."""

  draw: Callable[[Keys, tuple[int, ...]], State]

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    return self.draw(key, shape)


def _made(config: Config) -> coding.Coding:
  return coding.make(config, factory.make_source(config, "train"))


def _shape(config: Config, source: Source) -> tuple[int, ...]:
  shapes = jax.eval_shape(lambda: _init_params(config, source))
  return coding.make(config, source).prior_shape(shapes["autoencoder"], source.shape)


def _sampler(config: Config, process: Any, **more: Any) -> Callable[..., Sample]:
  """Nothing is left to do but to decode: one evaluation."""

  def sampler(key: Keys, state: State, model: Any, cond: Any) -> Sample:
    none = jnp.zeros(len(state), jnp.int32)
    return Sample(state, none + 1, None, Status(none, none, none))

  return sampler


def _decode(config: Config) -> Decode:
  made = _made(config)
  return lambda params, state: made.made.observation.image(made.decode(made.network(params["autoencoder"]), state))


def _reconstruct(config: Config, source: Source) -> Reconstruct:
  made = coding.make(config, source)
  observation = made.made.observation

  def run(params: Any, key: jax.Array, batch: Batch) -> jax.Array:
    network = made.network(params["autoencoder"])
    return observation.image(made.reconstruct(network, observation.to_state(batch["x"])))

  return run


def _log_likelihood(config: Config, params: Any, source: Source, seen: Any = None) -> Evaluation:
  """The bound, averaged over draws or importance-weighted: bits/dim of integers, a lower bound on log p else."""
  made, settings = coding.make(config, source), options.likelihood(config)
  bound = _of_gaussian(made, settings) if config["loss"]["type"] == "vae" else _of_codes(made, settings, source)

  def run(params: Any, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    value, error, code = bound(key, batch["x"], made.network(params["autoencoder"]))
    zero, none = jnp.zeros_like(value), jnp.zeros(len(value), jnp.int32)
    errors = {"standard_error": zero, "dequantization_error": error}
    sign = 1 if source.levels is not None else -1
    return {"value": sign * value, **errors, "nfe": none + settings.draws, "code": code, "accepted": none}

  return run


def _of_gaussian(made: coding.Coding, settings: Any) -> Callable[..., Any]:
  observation, normal = made.made.observation, flow.standard_normal()

  def density(key: Keys, z: State, score: Any, cond: Any) -> LogProb:
    none = jnp.zeros(len(z), jnp.int32)
    value = normal.log_prob(z)
    return LogProb(value, z, none, Status(none, none, none), jnp.zeros_like(value))

  prior = flow.LogDensity(None, jnp.zeros(()), divergence.exact(), density)
  fn = likelihood.latent_ode(prior, observation, settings.draws, settings.importance)

  def bound(key: Keys, x: Any, network: Any) -> Any:
    result = fn(key, x, network, lambda z, t: -z)
    return result.value, result.draw_error, result.status.code

  return bound


def _of_codes(made: coding.Coding, settings: Any, source: Source) -> Callable[..., Any]:
  unit = 1.0 if source.levels is None else coding.bits_per_dim(source)

  def bound(key: Keys, x: Any, network: Any) -> Any:
    one = lambda k: made.made.loss(keys.fold_in(key, k), x, network)[1]["nats"]
    nats = unit * jax.lax.map(one, jnp.arange(settings.draws))
    mean, error = likelihood.bits.mean_over_draws(nats)
    return mean, error, jnp.zeros(len(mean), jnp.int32)

  return bound


def _statement(config: Config, params: Any, source: Source) -> tuple[str, Config]:
  settings, loss = options.likelihood(config), schema.resolved("loss", config["loss"])
  how = "importance-weighted" if settings.importance else "averaged"
  draws = "" if settings.draws == 1 else f", {settings.draws} draws {how}"
  between = {"vae": "Gaussian latents", "vq": "vector quantization, uniform codes", "gumbel": "categorical latents"}
  words = f"negative ELBO of {between[loss['type']]}, {loss['observation']} observations{draws}, {settings.dtype}"
  facts = dataclasses.asdict(settings) | {"loss": loss}
  if source.levels is None:
    return f"nats, lower bound on log p(x), {words}", facts | {"dequantization": None}
  return f"bits/dim, upper bound on -log2 P(x) / d, {words}", facts | {"dequantization": "none, p(n | z)"}


def _limits(config: Config, source: Source) -> dict[str, float]:
  dimension = source.gather([0])["x"][0].size
  regular = "commitment" if config["loss"]["type"] == "vq" else "kl"
  return {regular: _BLOWN_UP[0] * dimension, "reconstruction": _BLOWN_UP[1] * dimension}


SYSTEM = System(
  check=_check,
  init_params=_init_params,
  optimizer=_optimizer,
  objective=_objective,
  process=lambda config, params=None: _Prior(_made(config).draw),
  shape=_shape,
  score=lambda config: lambda params: params,
  sampler=_sampler,
  decode=_decode,
  log_likelihood=_log_likelihood,
  statement=_statement,
  row="model, variational bound",
  reconstruct=_reconstruct,
  limits=_limits,
)
