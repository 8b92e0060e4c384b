"""The autoencoder of another run, whose latents a diffusion is of: what it was goes into the config of that."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import factory, latents, schema, training
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import chunks
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems import autoencoder, coding

_ENCODED, _AT_A_TIME = 10_000, 500  # training examples that say how far latents spread


def resolve(config: Config) -> Config:
  """The config with the sections `network` and `loss` of the autoencoder in `config.autoencoder.workdir`, its latents
  scaled to unit variance over training examples, and the hash of its parameters.

  A config that has them already, or trains its own autoencoder, is left as it is.

  Raises:
    ConfigError: there is no run of an autoencoder, it is of other data, or it has collapsed altogether.
  """
  section = config["autoencoder"]
  if section.get("workdir") is None or "fingerprint" in section:
    return config
  theirs, variables = _read(section["workdir"])
  source = factory.make_source(config, "train")
  _check_data(config, theirs, section["workdir"])
  made = coding.make(theirs, source, "autoencoder.")
  found = _statistics(made, variables, source)
  latents.warn_if_collapsed(found)
  if not np.isfinite(found.scale):
    raise ConfigError(
      f"config.autoencoder.workdir = {section['workdir']}: the latents have the standard deviation "
      f"{float(found.std):g}, which no scale brings to 1: train it with a smaller config.loss.beta, or longer"
    )
  scaling = schema.resolved("autoencoder.network", theirs["network"])["scaling"] * float(found.scale)
  network = dict(theirs["network"]) | {"scaling": scaling}
  parts = {"network": network, "loss": dict(theirs["loss"]), "fingerprint": _fingerprint(variables)}
  return config | {"autoencoder": {**section, **parts}}


def load(config: Config) -> dict[str, Any]:
  """The parameters of that autoencoder, under their name; none where it is trained with the prior.

  Raises:
    ConfigError: it is another one than that of the config.
  """
  section = config["autoencoder"]
  if section.get("workdir") is None:
    return {}
  _, variables = _read(section["workdir"])
  if (now := _fingerprint(variables)) != section["fingerprint"]:
    raise ConfigError(
      f"config.autoencoder.workdir = {section['workdir']} holds another autoencoder than the prior is of: its "
      f"parameters have the hash {now[:12]}, those of the config {section['fingerprint'][:12]}. Restore it, or train a "
      "prior of it in another workdir"
    )
  return {"autoencoder": variables}


def _read(directory: Any) -> tuple[Config, Any]:
  """The config of the run, and the averaged variables of its autoencoder."""
  folder = Path(directory)
  path = folder / "config.json"
  if not path.is_file():
    raise ConfigError(
      f"config.autoencoder.workdir = {folder} is no directory of a run: it has no config.json. Train one there, "
      "or bring it back: jaxdiff train --config=configs/vae_digits.py --config.loss.beta=0.1 --workdir=DIR"
    )
  config = factory.read(path)
  schema.check_sections(config)
  if config["network"]["type"] != "AutoencoderKL":
    raise ConfigError(
      f"config.autoencoder.workdir = {folder} holds a {config['network']['type']}; latents that a diffusion is of must "
      "be Gaussian: take the run of an AutoencoderKL, such as configs/vae_digits.py makes"
    )
  source = factory.make_source(config, "train")
  shapes = jax.eval_shape(lambda: autoencoder.SYSTEM.init_params(config, source))
  try:
    params, _ = training.load_params(folder / "checkpoints", shapes)
  except ValueError as error:
    raise ConfigError(f"config.autoencoder.workdir = {folder}: {error}") from error
  return config, params["autoencoder"]


def _check_data(config: Config, theirs: Config, directory: Any) -> None:
  of = lambda side: factory.identity(side)["data"]
  if found := factory.differences(of(theirs), of(config), "config.data"):
    raise ConfigError(
      f"config.autoencoder.workdir = {directory} was trained on other data: {'; '.join(found)} here. Take the same "
      "data, or the run of another autoencoder"
    )


def _statistics(made: coding.Coding, variables: Any, source: Source) -> latents.Statistics:
  observation = made.made.observation
  encode = jax.jit(lambda v, x: latents.posterior(made.network(v), observation.to_state(x)))
  rows = np.arange(min(len(source), _ENCODED))
  parts = [encode(variables, source.gather(part)["x"]) for part in np.array_split(rows, -(-len(rows) // _AT_A_TIME))]
  return latents.statistics(jax.tree.map(lambda *values: jnp.concatenate(values), *parts))


def _fingerprint(variables: Any) -> str:
  return chunks.identify(variables)
