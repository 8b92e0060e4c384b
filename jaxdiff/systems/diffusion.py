"""Diffusions of the data themselves, and what is built alike: normalizing flows and classifiers of noised data."""

from jaxdiff import components, factory, objectives
from jaxdiff.data.examples import Source
from jaxdiff.schema import Config, ConfigError
from jaxdiff.systems.system import System

_PREDICTIONS_OF_OTHERS = ("mixed_noise", "velocity_noise")


def _check(config: Config) -> None:
  """Refuse also the parts that other kinds of runs have."""
  for path, others in (("prediction", _PREDICTIONS_OF_OTHERS), ("loss", (*components.AUTOENCODING, "lsgm"))):
    if (kind := config[path]["type"]) in others:
      raise ConfigError(
        f"config.{path}.type = {kind!r} is not for {config['network']['type']} on {config['sde']['type']}"
      )
  factory.check_components(config)
  objectives.make_loss(config)


def _shape(config: Config, source: Source) -> tuple[int, ...]:
  return source.shape


SYSTEM = System(
  check=_check,
  init_params=factory.init_params,
  optimizer=factory.make_optimizer_of,
  objective=objectives.make_objective,
  process=factory.make_process,
  shape=_shape,
  score=factory.make_score,
  sampler=factory.make_sampler,
  decode=lambda config: None,
  log_likelihood=objectives.make_log_likelihood,
  statement=objectives.likelihood_statement,
  bound=objectives.make_bound,
)
