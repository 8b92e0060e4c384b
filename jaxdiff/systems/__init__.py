"""The kinds of runs: what a config is of, and what the commands do with it.

diffusion    of the data themselves; also normalizing flows and classifiers of noised data
"""

from jaxdiff import schema
from jaxdiff.schema import Config
from jaxdiff.systems import diffusion
from jaxdiff.systems.system import System as System

_OF_KIND = {"diffusion": diffusion.SYSTEM, "classifier": diffusion.SYSTEM}


def of(config: Config) -> System:
  """The kind of run that a config describes."""
  return _OF_KIND[schema.kind(config)]


def check(config: Config) -> None:
  """Build everything that needs no data, so that a mistake anywhere in the config shows before any work."""
  schema.check_sections(config)
  of(config).check(config)
