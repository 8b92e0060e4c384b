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

from jaxdiff import components, conditions, likelihood
from jaxdiff.components import Constructor, Table
from jaxdiff.settings import (
  AutoencoderSettings,
  EditSettings,
  EvaluateSettings,
  GuidanceSettings,
  LikelihoodSettings,
  SampleSettings,
  TrainSettings,
)
from jaxdiff.training import make_optimizer

Config = dict[str, Any]

_FROM_PROGRAM = ("sde", "chain", "gamma", "prediction", "autoencoding", "levels", "data_range", "t", "t1")
_MADE_TO_MEASURE = ("parent", "name", "image_channels", "output_channels")
_OF_SAMPLERS = ("sde", "forward", "chain", "latent_dim", "path")
_FROM_PYTHON = (
  *("log_prob", "mixed", "base", "decoder", "reconstruction", "prior", "prior_log_prob", "data_variance", "every_step"),
)


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
    parts={name: name for name in ("weight", "prior_weight", "time", "divergence")},
  ),
  "loss.weight": Section(components.WEIGHTS),
  "loss.prior_weight": Section(components.WEIGHTS),
  "loss.time": Section(components.TIMES),
  "loss.divergence": Section(components.DIVERGENCES),
  "network": Section(components.NETWORKS, given=_MADE_TO_MEASURE, parts={"conditions": "conditions"}),
  "network.conditions.*": Section(conditions.CONDITIONS, given=("dtype", "param_dtype")),
  "autoencoder": Section((AutoencoderSettings,), parts={"network": "network", "loss": "loss"}),
  "autoencoder.network": Section(components.AUTOENCODERS, given=_MADE_TO_MEASURE),
  "autoencoder.loss": Section(components.AUTOENCODING, given=_FROM_PROGRAM),
  "discriminator": Section(components.DISCRIMINATORS, given=("parent", "name", "conditions")),
  "optimizer": Section((make_optimizer,), given=("total_steps",)),
  "discriminator_optimizer": Section((make_optimizer,), given=("total_steps",)),
  "train": Section((TrainSettings,)),
  "sample": Section((SampleSettings,)),
  "guidance": Section((GuidanceSettings,)),
  "edit": Section((EditSettings,)),
  "sampler": Section(components.SAMPLERS, given=_OF_SAMPLERS, parts={"ts": "grid"}),
  "sampler.grid": Section((components.time_grid,), given=("sde",)),
  "likelihood": Section(
    (LikelihoodSettings, likelihood.log_prob),
    given=("sde", "prior_log_prob", "adjoint"),
    parts={"divergence": "divergence"},
  ),
  "likelihood.divergence": Section(components.DIVERGENCES, given=("seen",)),
  "evaluate": Section((EvaluateSettings,)),
  "other": Section(components.SOURCES, given=("split",)),
}
OPTIONAL = ("guidance", "edit", "evaluate", "other", "autoencoder", "discriminator", "discriminator_optimizer")
_ADVERSARY = ("discriminator", "discriminator_optimizer")
_FOREIGN: Mapping[str, tuple[str, tuple[str, ...]]] = {
  "diffusion": ("a diffusion model", _ADVERSARY),
  "augmented": ("a diffusion with velocities", (*_ADVERSARY, "guidance", "edit")),
  "classifier": ("a classifier", ("sampler", "sample", "likelihood", "guidance", "edit", *_ADVERSARY)),
  "autoencoder": ("an autoencoder", ("sde", "prediction", "sampler", "guidance", "edit")),
  "latent": ("a diffusion of latents", (*_ADVERSARY, "edit")),
  "gan": ("a denoising diffusion GAN, which has no score", ("likelihood", "guidance", "edit")),
}
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
  return _type(config, "network") == "Classifier"


def kind(config: Config) -> str:
  """What a run is of: "diffusion", also a flow; "classifier", "autoencoder", "latent", "gan", or "augmented"."""
  if is_classifier(config):
    return "classifier"
  if _type(config, "network") in components.AUTOENCODERS:
    return "autoencoder"
  if "autoencoder" in config:
    return "latent"
  if _type(config, "loss") == "denoising_gan":
    return "gan"
  return "augmented" if _type(config, "sde") == "CLD" else "diffusion"


def check_command(command: str, config: Config) -> None:
  """Refuse a command that a run of this kind has no use for."""
  words, foreign = _FOREIGN[kind(config)]
  section = "sample" if command == "evaluate" and not is_classifier(config) else command
  if section in foreign:
    raise ConfigError(f"{command} is not for {words}: take the --workdir of another run")


def _type(config: Config, name: str) -> Any:
  section = config.get(name)
  return section.get("type") if isinstance(section, Mapping) else None


def check_sections(config: Config) -> None:
  """Refuse a config with sections that are unknown, missing or wrong in themselves."""
  for name in config:
    if name not in TOP:
      raise ConfigError(f"config.{name} does not exist; {nearest(name, TOP)}")
  words, foreign = _FOREIGN[kind(config)]
  if found := [name for name in foreign if name in config]:
    raise ConfigError(f"config.{found[0]} is no part of {words}: leave it out")
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
