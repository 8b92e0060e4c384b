"""The directory of a run: one trainer at a time, one run for ever, and commands that fit the model in it."""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jaxdiff import factory, parallel, systems, training
from jaxdiff.data import pipeline
from jaxdiff.data.examples import Source
from jaxdiff.schema import Config, ConfigError
from jaxdiff.training.snapshots import reconstruct

_DATA = ("name", "count", "shape", "levels", "content")
_ABSENT_DATA = ("shape", "levels")


@contextlib.contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
  """Keep other trainers out of the directory, which is made if need be.

  Raises:
    ConfigError: another trainer is in it, it holds another run, or it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115, closed below
  except OSError as error:
    raise ConfigError(f"--workdir={workdir} cannot be written: {error}") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ConfigError(
        f"{workdir} is being trained in by process {file.read()}: wait for its end, or take another workdir"
      ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _check_same_run(workdir, config)
    yield


def _check_same_run(workdir: Path, config: Config) -> None:
  path = workdir / "config.json"
  if path.exists() and (found := factory.differences(factory.identity(factory.read(path)), factory.identity(config))):
    raise ConfigError(
      f"{workdir} holds another run: {'; '.join(found)}. Take another workdir, or leave these settings alone"
    )


def fingerprint(config: Config, source: Source) -> dict[str, Any]:
  """What must be equal for a training to continue."""
  batch_size, seed = config["train"]["batch_size"], config["seed"]
  return {"config": factory.identity(config), "data": pipeline.fingerprint(source, batch_size, seed)}


def load(workdir: Path, config: Config, ema_length: float | None = None) -> tuple[Source, Any, int]:
  """(training source, parameters, step) of the run in the directory: of its usual average, or of the power-function
  average of that relative width, reconstructed from its snapshots.

  Raises:
    ConfigError: there is no run, or it was trained with another process, prediction, network or data than the config
      has.
  """
  try:
    trained = factory.normalize(training.load_fingerprint(workdir / "checkpoints"))
  except ValueError as error:
    raise ConfigError(str(error)) from error
  then, given = trained["config"], factory.identity(config)
  if imported := then["data"]["type"] == "absent":  # which data it meets is for later
    then = then | {"data": given["data"]}
  ours, theirs = ({name: side[name] for name in factory.MODEL_SECTIONS if name in side} for side in (given, then))
  _check_same_model(workdir, factory.differences(theirs, ours))
  if unused := factory.differences(then, given):
    print(f"jaxdiff: the run is trained, so without effect: {'; '.join(unused)}", file=sys.stderr)
  source = factory.make_source(config, "train")
  _check_same_model(workdir, _differences_of_data(trained["data"], _facts_of_data(source), imported))
  shapes = jax.eval_shape(lambda: systems.of(config).init_params(config, source))
  everywhere = parallel.replicated(parallel.make_mesh(jax.devices()))  # of all processes, as orbax wants it
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
  try:
    if ema_length is None:
      params, step = training.load_params(workdir / "checkpoints", shapes)
    else:
      params, step, distance = reconstruct(workdir / "snapshots", shapes, ema_length)
      print(f"jaxdiff: average of length {ema_length}, reconstructed to {distance:.2%}", file=sys.stderr)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  return source, jax.tree.map(lambda leaf: leaf.addressable_data(0), params), step


def _facts_of_data(source: Source) -> Config:
  return factory.normalize(pipeline.fingerprint(source, 1, 0))


def _differences_of_data(saved: Config, given: Config, shapes_alone: bool) -> list[str]:
  names = _ABSENT_DATA if shapes_alone else _DATA
  return [text for name in names for text in factory.differences(saved[name], given[name], f"data.{name}")]


def differences_of_data(source: Source, other: Source) -> list[str]:
  """What the data of two runs differ in, a text for each fact: not in their name alone.

  Of data that are not there the shape counts alone.
  """
  found = _differences_of_data(_facts_of_data(source), _facts_of_data(other), not (len(source) and len(other)))
  return [] if all(text.startswith("data.name ") for text in found) else found


def check_examples(config: Config) -> None:
  """Refuse data that are not there.

  Raises:
    ConfigError: the model was imported without its data.
  """
  if config["data"]["type"] == "absent":
    raise ConfigError(
      "the model was imported without data: name them, --config.data.type=tfds --config.data.name=cifar10 or "
      "--config.data.type=npz --config.data.path=FILE --config.data.levels=256, of the shape "
      f"{config['data']['shape']}; given to `jaxdiff import` they are remembered"
    )


def _check_same_model(workdir: Path, found: list[str]) -> None:
  if found:
    raise ConfigError(
      f"the model in {workdir} was trained otherwise: {'; '.join(found)}. Leave these settings as they were (without "
      "--config they are), or train another model in another workdir"
    )


def check_same_everywhere(what: dict[str, Any]) -> None:
  """Compare a config and the fingerprint of the data over the processes of a training.

  Raises:
    ConfigError: on all processes, if one has others than the first.
  """
  first, *others = [factory.normalize(value) for value in parallel.gather_json(what)]
  for number, other in enumerate(others, start=1):
    for name in first:
      if found := factory.differences(first[name], other[name], name):
        raise ConfigError(
          f"the processes were not started alike: {'; '.join(found)} on process {number}. Give all of them one config"
        )


class Stopped(Exception):
  """A signal ended the training after a step, which is saved.

  Attributes:
    signum: the number of the signal.
  """

  def __init__(self, signum: int, step: int):
    super().__init__(f"stopped at step {step}, which is saved; the same command continues from there")
    self.signum = signum


class StopSignal:
  """Within this context the first SIGTERM or Ctrl-C is noted in `signum`; a second one ends the process at once.

  Of several processes, each passes on to all that it was to stop (`parallel.preempted`): they stop after the same step.
  """

  signum: int | None = None
  _asked = 0

  def agreed(self, step: int) -> bool:
    """Whether to stop after this step: the same on all processes, which ask after the same steps."""
    self._asked += 1  # not the step: a dispatch of several would leave numbers out
    if parallel.preempted(self._asked):
      self.signum = signal.SIGTERM
    return self.signum is not None

  def __enter__(self) -> "StopSignal":
    alone = jax.process_count() == 1  # else JAX itself waits for SIGTERM
    numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    self._usual = {number: signal.signal(number, self._note if alone else self._pass_on) for number in numbers}
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._usual.items():
      signal.signal(number, handler)

  def _note(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    self.__exit__()
    os.write(2, b"\njaxdiff: saving a checkpoint after this step; once more to end at once\n")

  def _pass_on(self, signum: int, frame: FrameType | None) -> None:
    self.__exit__()
    os.kill(os.getpid(), signal.SIGTERM)
    os.write(2, b"\njaxdiff: all processes will save a checkpoint; once more to end this one at once\n")
