"""The kinds of runs: what a config is of, and what the commands do with it.

diffusion      of the data themselves; also normalizing flows and classifiers of noised data
autoencoder    variational, vector-quantized or with categorical latents
latent         diffusion of the latents of an autoencoder, that of another run or one trained with it (LSGM)
gan            a generator of few large steps and its discriminator
augmented      diffusion of data with velocities beside them (CLD)
"""

from jaxdiff import schema
from jaxdiff.schema import Config
from jaxdiff.systems import augmented, autoencoder, diffusion, gan, latent
from jaxdiff.systems.system import System as System

_OF_KIND = {
  "diffusion": diffusion.SYSTEM,
  "classifier": diffusion.SYSTEM,
  "autoencoder": autoencoder.SYSTEM,
  "latent": latent.SYSTEM,
  "gan": gan.SYSTEM,
  "augmented": augmented.SYSTEM,
}


def of(config: Config) -> System:
  """The kind of run that a config describes."""
  return _OF_KIND[schema.kind(config)]


def resolve(config: Config) -> Config:
  """The config with what it takes from other runs."""
  schema.check_sections(config)
  return of(config).resolve(config)


def check(config: Config) -> None:
  """Build everything that needs no data, so that a mistake anywhere in the config shows before any work."""
  schema.check_sections(config)
  of(config).check(config)
