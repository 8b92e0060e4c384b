"""Settings that only diffusions of the data have a use for, refused where they would be without effect."""

from jaxdiff import options
from jaxdiff.schema import Config, ConfigError


def refuse_threshold(config: Config) -> None:
  """Refuse to keep data predictions within [-1, 1]."""
  if options.sample(config).threshold != "none":
    raise ConfigError("config.sample.threshold is of diffusions of the data themselves: leave it out")


def refuse_dropout(config: Config) -> None:
  """Refuse to drop activations."""
  if dropout := config["network"].get("dropout", 0.0):
    raise ConfigError(f"config.network.dropout = {dropout} is of diffusions of the data themselves: leave it out")
