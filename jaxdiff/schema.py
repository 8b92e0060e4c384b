"""What a config may hold: its sections, their fields and types.

A section with a `type` is one component: a table of `components` gives its constructor, and the constructor's signature
is the schema of the rest. A section without holds the settings of a step of the work. Anything unknown or of another
type is refused with its path and the nearest valid spelling.
"""

import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jaxdiff import components, likelihood, schedules
from jaxdiff.components import Constructor, Table
from jaxdiff.training import make_optimizer

Config = dict[str, Any]

_FROM_PROGRAM = ("sde", "chain", "gamma", "prediction", "levels", "data_range", "t", "t1")
_FROM_PYTHON = ("base", "decoder", "reconstruction", "prior", "prior_log_prob", "data_variance", "every_step")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How to train. Steps count updates; every n-th step of 0 means never.

  `random_flip` mirrors half of the images left to right. `ema_decay` is that of the usual moving average, `ema_lengths`
  are relative widths of power-function averages, of which snapshots allow any other width afterwards.

  On the devices: `launcher` is what spreads a step over them; `fsdp` how many share one copy of the state (jit alone);
  `microbatches` the parts that a batch is worked through in; `steps_per_dispatch` the steps of one call.

  `drop_conditions` is the probability with which an example is trained without its conditions.

  `keep` of the newest checkpoints stay and every `keep_every`-th step. `max_skipped` steps in a row may be without
  finite loss and gradient. `wandb` is a project to report to.
  """

  batch_size: int = 128
  steps: int = 1000
  ema_decay: float = 0.999
  ema_lengths: tuple[float, ...] = ()
  random_flip: bool = False
  launcher: Literal["jit", "pmap"] = "jit"
  fsdp: int = 1
  microbatches: int = 1
  steps_per_dispatch: int = 1
  max_skipped: int = 10
  drop_conditions: float = 0.0
  log_every: int = 50
  checkpoint_every: int = 500
  keep: int = 3
  keep_every: int | None = None
  snapshot_every: int = 500
  sample_every: int = 0
  validate_every: int = 0
  validate_examples: int = 1024
  wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """How many samples to draw, how many at a time, how many trajectories to show, and whether to animate them.

  Where the model has conditions, sample k is given those of example k of the `split`; but for the class `label`, or of
  several labels number k mod n, and the text `prompt`, where they are given.
  `threshold` keeps the data prediction within [-1, 1]: "static" by clipping, "dynamic" by the quantile 0.995.
  `ema_length` is the relative width of a power-function average, made of the snapshots of the run; None for the usual
  average.
  """

  num: int = 100
  batch_size: int = 100
  split: str = "test"
  label: int | tuple[int, ...] = ()
  prompt: str | tuple[str, ...] = ()
  trajectories: int = 6
  seed: int = 0
  threshold: Literal["none", "static", "dynamic"] = "none"
  gif: bool = False
  ema_length: float | None = None


@dataclasses.dataclass(frozen=True)
class GuidanceSettings:
  """What the samples of a trained model are guided by; of likelihoods it is no part.

  `scale` is gamma in gamma s(x | y) + (1 - gamma) s(x): 1 is the conditional model without guidance. With the directory
  of a run of a `classifier` it is the factor of the gradient of log p(y | x), 1 if it is left out; with that of a
  `weak` model the one in gamma s + (1 - gamma) s_weak. Outside of `interval`, low < sigma / alpha <= high, there is no
  guidance. `rescale` is the share in which the guided data prediction is given the spread of the conditional one.
  """

  scale: float | None = None
  classifier: str | Path | None = None
  weak: str | Path | None = None
  interval: tuple[float, ...] = ()
  rescale: float = 0.0


@dataclasses.dataclass(frozen=True)
class EditSettings:
  """What to do with which images: of `num` results each, in a file, a folder or the array `x` of an .npz file.

  "inpaint" paints anew where the image `mask` is white; "colorize" colours what is grey; "superres" enlarges; "deblur"
  undoes a Gaussian `blur` of so many pixels, periodic at the borders; "sdedit" noises and samples again, so much of
  the steps as `strength` says. With `degrade` the images are clean ones, degraded first, made smaller by `factor` (2).
  The measurement has noise of a standard deviation `noise` in [-1, 1]: 0 but for "deblur", 1/255. `method` is that of
  the restoration. Images of another size are cropped and resized by area averages where `resize` says so.
  """

  task: Literal["inpaint", "colorize", "superres", "deblur", "sdedit"]
  input: str | Path
  mask: str | Path | None = None
  method: Literal["pigdm", "reconstruction", "dps", "projection", "repaint"] = "pigdm"
  strength: float = 0.6
  blur: float = 1.0
  factor: int = 2
  noise: float | None = None
  degrade: bool = False
  resize: bool = False
  num: int = 4
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
  """What to evaluate: a split, or its first `limit` examples (0 for all); how many at a time.

  The variational bound is averaged over `bound_draws` evaluations of the network an example; 0 leaves it out. Integers
  are dequantized `draws` times, "auto" as the loss had them: uniformly, or by the noise of the process where it took
  the integers themselves. `importance` averages probabilities over the draws instead of their logarithms. In float64
  the parameters, the data, the process and the network are so. `ema_length` as in `SampleSettings`.
  """

  split: str = "test"
  limit: int = 0
  bound_draws: int = 32
  batch_size: int = 120
  seed: int = 0
  dequantization: Literal["auto", "uniform", "truncated_normal", "gaussian"] = "auto"
  draws: int = 1
  importance: bool = False
  dtype: Literal["float32", "float64"] = "float32"
  ema_length: float | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """How to measure samples: how many, how many at a time, against which held-out split and up to how many training
  examples (0 for all), by which features, and k of the neighbours of precision and recall, density and coverage.

  `weights` is the path of the file that the features "mobilenet" and "inception" need. `ema_length` as in
  `SampleSettings`. Of a classifier: how many held-out examples (0 for all), of which split, how many at a time.
  """

  num: int = 1000
  batch_size: int = 120
  split: str = "test"
  reference: int = 50_000
  features: Literal["auto", "cnn", "raw", "mobilenet", "inception"] = "auto"
  weights: str | None = None
  manifold_k: int = 3
  coverage_k: int = 5
  seed: int = 0
  ema_length: float | None = None


class ConfigError(ValueError):
  """A config names something that does not exist or holds a value out of range."""


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section may hold.

  Attributes:
    makes: constructors by `type`, or the constructors whose arguments the section holds.
    given: arguments that the program gives, and no config.
    parts: arguments that are sections of their own, with the names of these.
  """

  makes: Table | tuple[Constructor, ...]
  given: tuple[str, ...] = ()
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)


SECTIONS: Mapping[str, Section] = {
  "data": Section(components.SOURCES, given=("split",)),
  "sde": Section(components.PROCESSES),
  "prediction": Section(components.PREDICTIONS),
  "loss": Section(
    components.LOSSES,
    given=(*_FROM_PROGRAM, *_FROM_PYTHON),
    parts={"weight": "weight", "time": "time", "divergence": "divergence"},
  ),
  "loss.weight": Section(components.WEIGHTS),
  "loss.time": Section(components.TIMES),
  "loss.divergence": Section(components.DIVERGENCES),
  "network": Section(components.NETWORKS, given=("parent", "name"), parts={"conditions": "conditions"}),
  "network.conditions.*": Section(components.CONDITIONS, given=("dtype", "param_dtype")),
  "optimizer": Section((make_optimizer,), given=("total_steps",)),
  "train": Section((TrainSettings,)),
  "sample": Section((SampleSettings,)),
  "guidance": Section((GuidanceSettings,)),
  "edit": Section((EditSettings,)),
  "sampler": Section(components.SAMPLERS, given=("sde", "forward", "path"), parts={"ts": "grid"}),
  "sampler.grid": Section((schedules.time_grid,), given=("sde",)),
  "likelihood": Section(
    (LikelihoodSettings, likelihood.log_prob),
    given=("sde", "prior_log_prob", "adjoint"),
    parts={"divergence": "divergence"},
  ),
  "likelihood.divergence": Section(components.DIVERGENCES, given=("seen",)),
  "evaluate": Section((EvaluateSettings,)),
  "other": Section(components.SOURCES, given=("split",)),
}
OPTIONAL = ("guidance", "edit", "evaluate", "other")
GENERATIVE = ("sampler", "sample", "likelihood", "guidance", "edit")
TOP = ("seed", *(path for path in SECTIONS if "." not in path))


def nearest(word: str, words: Any) -> str:
  """The nearest valid spelling, if there is one, and all valid ones."""
  names = sorted(words)
  close = difflib.get_close_matches(word.lower(), [w.lower() for w in names], n=1, cutoff=0.5)
  hint = f"did you mean {next(w for w in names if w.lower() == close[0])!r}? " if close else ""
  return f"{hint}valid: {', '.join(names)}"


def section_at(path: str) -> Section:
  """What the section at `path` may hold; a condition may have any name."""
  return SECTIONS[path if path in SECTIONS else f"{path.rpartition('.')[0]}.*"]


def exists(path: str) -> bool:
  """Whether there can be a section at `path`."""
  return path in SECTIONS or f"{path.rpartition('.')[0]}.*" in SECTIONS or f"{path}.*" in SECTIONS


def constructors(path: str, section: Any) -> tuple[Constructor, ...]:
  """What the section at `path` makes; for a component, as its `type` says."""
  if not isinstance(section, Mapping):
    raise ConfigError(f"config.{path} must be a section, a ConfigDict or dict of fields; got {section!r}")
  makes = section_at(path).makes
  if isinstance(makes, tuple):
    return makes
  if "type" not in section:
    raise ConfigError(f"config.{path} needs a type: {', '.join(sorted(makes))}")
  kind = str(section["type"])
  if kind not in makes:
    raise ConfigError(f"config.{path}.type is {kind!r}; {nearest(kind, makes)}")
  return (makes[kind],)


def _arguments(path: str, section: Any) -> dict[str, inspect.Parameter]:
  signatures = [inspect.signature(make).parameters for make in constructors(path, section)]
  return {name: argument for signature in signatures for name, argument in signature.items()}


def parameters(path: str, section: Any) -> dict[str, inspect.Parameter]:
  """The fields of the section at `path`, sections within it not among them."""
  taken = (*section_at(path).given, *section_at(path).parts)
  return {name: argument for name, argument in _arguments(path, section).items() if name not in taken}


def subsections(path: str, section: Any) -> list[str]:
  """The names of the sections within the section at `path`."""
  arguments = _arguments(path, section)
  return [name for argument, name in section_at(path).parts.items() if argument in arguments]


def resolved(path: str, section: Mapping[str, Any]) -> Config:
  """The section at `path` with the defaults of what it leaves out; sections within it as they are."""
  fields = parameters(path, section).items()
  return {name: field.default for name, field in fields if field.default is not inspect.Parameter.empty} | dict(section)


def check_name(path: str, section: Any, name: str) -> None:
  """Refuse a field that the section at `path` cannot have."""
  if f"{path}.*" in SECTIONS:
    return
  valid = [*parameters(path, section), *subsections(path, section)]
  if name not in valid and not (name == "type" and isinstance(section_at(path).makes, Mapping)):
    raise ConfigError(f"config.{path}.{name} does not exist; {nearest(name, valid)}")


def check_section(path: str, section: Any) -> None:
  """Refuse a section with unknown fields, missing ones, or values of another type; sections within it included."""
  if f"{path}.*" in SECTIONS:
    for name, part in section.items():
      check_section(f"{path}.{name}", part)
    return
  fields = parameters(path, section)
  for name in section:
    check_name(path, section, name)
  if missing := [name for name in fields if name not in section and fields[name].default is inspect.Parameter.empty]:
    raise ConfigError(f"config.{path} needs a value for {', '.join(missing)}")
  for name in fields.keys() & section.keys():
    check_type(f"{path}.{name}", section[name], fields[name].annotation)
  for name in subsections(path, section):
    if name in section:
      check_section(f"{path}.{name}", section[name])


def construct(constructor: Callable[..., Any], fields: Mapping[str, Any], path: str, /, **given: Any) -> Any:
  """`constructor(**given, **fields)`, with errors that name the path in the config."""
  try:
    return constructor(**given, **fields)
  except (ValueError, TypeError, OSError) as error:
    raise ConfigError(f"config.{path}: {error}") from error


def component(path: str, section: Any, /, **given: Any) -> Any:
  """What a section makes, given what its own sections have made."""
  check_section(path, section)
  (constructor,) = constructors(path, section)
  known = parameters(path, section)
  fields = {name: cast(section[name], known[name].annotation) for name in section.keys() & known.keys()}
  return construct(constructor, fields, path, **given)


def is_classifier(config: Config) -> bool:
  """Whether the run is of a classifier: it has neither samples nor likelihoods."""
  network = config.get("network")
  return isinstance(network, Mapping) and network.get("type") == "Classifier"


def check_sections(config: Config) -> None:
  """Refuse a config with sections that are unknown, missing or wrong in themselves."""
  for name in config:
    if name not in TOP:
      raise ConfigError(f"config.{name} does not exist; {nearest(name, TOP)}")
  foreign = GENERATIVE if is_classifier(config) else ()
  if found := [name for name in foreign if name in config]:
    raise ConfigError(
      f"config.{found[0]} is of models that generate; leave it out for config.network.type='Classifier'"
    )
  if missing := [name for name in TOP if name not in config and name not in (*OPTIONAL, *foreign)]:
    raise ConfigError(f"config needs {', '.join(missing)}")
  check_type("seed", config["seed"], int)
  for name in TOP[1:]:
    if name in config:
      check_section(name, config[name])


def check_type(path: str, value: Any, annotation: Any) -> None:
  """Refuse a value that a field of this annotation cannot hold."""
  if not fits(value, annotation):
    raise ConfigError(f"config.{path} must be {_text(annotation)}, got {value!r}")


def fits(value: Any, annotation: Any) -> bool:
  """Whether a value of a config is one of the annotated type; whole numbers are floats, too.

  Example:
    >>> fits(1, float), fits(1.5, int), fits((1, 2), tuple[int, ...]), fits(None, int | None)
    (True, False, True, True)
  """
  if annotation in (Any, inspect.Parameter.empty):
    return True
  origin, arguments = get_origin(annotation), get_args(annotation)
  if origin in (Union, types.UnionType):
    return any(fits(value, option) for option in arguments)
  if origin is Literal:
    return value in arguments
  if origin is tuple:
    return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
  if annotation in (None, type(None)):
    return value is None
  if annotation is float:
    return isinstance(value, float | int) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return annotation in (str, bool) and isinstance(value, annotation)


def cast(value: Any, annotation: Any) -> Any:
  """The value, a whole number as a float where the annotation has floats."""
  if isinstance(value, tuple) and annotation == tuple[float, ...]:
    return tuple(map(float, value))
  whole = isinstance(value, int) and not isinstance(value, bool)
  return float(value) if whole and float in (annotation, *get_args(annotation)) else value


def paths(path: str, section: Any) -> list[str]:
  """The fields of the section at `path` that hold the path of a file or folder."""
  return [name for name, field in parameters(path, section).items() if Path in get_args(field.annotation)]


def _text(annotation: Any) -> str:
  """An annotation in words."""
  origin, arguments = get_origin(annotation), get_args(annotation)
  if origin is Literal:
    return " or ".join(map(repr, arguments))
  if origin in (Union, types.UnionType):
    plain = [option for option in arguments if get_origin(option) or option in (str, bool, int, float, type(None))]
    return " or ".join(_text(option) for option in plain if not (option is int and float in plain))
  if origin is tuple:
    return f"a tuple of {_text(arguments[0])}"
  words = {int: "an integer", float: "a number", str: "a text", bool: "True or False", type(None): "None"}
  return words.get(annotation, str(annotation))
