"""What the commands ask of a run, whatever it is of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jaxdiff.data.examples import Source
from jaxdiff.objectives import Batch, Evaluation
from jaxdiff.schema import Config
from jaxdiff.typing import State

Decode = Callable[[Any, State], State]
Reconstruct = Callable[[Any, jax.Array, Batch], jax.Array]


class System(NamedTuple):
  """A kind of run: functions of its config.

  Attributes:
    check: `config`: refuses what cannot work, before any work; needs no data.
    init_params: `(config, source)` -> the parameters, a pytree, of several groups by their names.
    optimizer: `config` -> what updates them.
    objective: `(config, source, training=True)` -> the objective of the train step.
    process: `(config, params)` -> what has the prior that samples start from.
    shape: `(config, source)` -> of one state of it.
    score: `config` -> from the parameters to what the sampler is given.
    sampler: `(config, process, **more)`; `more` are arguments in the place of its own.
    decode: `config` -> `(params, state) -> x`, from states of the process to data; None where they are the data.
    log_likelihood: `(config, params, source, seen=None)` -> values in bits/dim or nats; None where there is no density.
    statement: `(config, params, source)` -> what these are: a sentence, and all settings they depend on.
    bound: `(config, params, source, draws)` -> a variational bound on them; None where there is none.
    row: what these values are, in a word or two.
    reconstruct: `(config, source)` -> `(params, keys, batch) -> x` from data through latents and back; None without.
    limits: `(config, source)` -> by the name of a metric what ends a training that exceeds it.
    resolve: `config` -> the config with what it takes from other runs.
    pretrained: `config` -> groups of parameters, by name, that a training starts with in the place of initial ones.
  """

  check: Callable[[Config], None]
  init_params: Callable[[Config, Source], Any]
  optimizer: Callable[[Config], optax.GradientTransformation]
  objective: Callable[..., Callable[..., Any]]
  process: Callable[..., Any]
  shape: Callable[[Config, Source], tuple[int, ...]]
  score: Callable[[Config], Callable[[Any], Any]]
  sampler: Callable[..., Callable[..., Any]]
  decode: Callable[[Config], Decode | None]
  log_likelihood: Callable[..., Evaluation] | None = None
  statement: Callable[..., tuple[str, Config]] | None = None
  bound: Callable[..., Evaluation] | None = None
  row: str = "model"
  reconstruct: Callable[[Config, Source], Reconstruct] | None = None
  limits: Callable[[Config, Source], Mapping[str, float]] = lambda config, source: {}
  resolve: Callable[[Config], Config] = lambda config: config
  pretrained: Callable[[Config], Mapping[str, Any]] = lambda config: {}
