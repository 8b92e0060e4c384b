"""From a command line to a config: a Python file or the run's own config, with fields set by --config.field=value."""

import ast
import copy
import dataclasses
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ml_collections import ConfigDict

from jaxdiff import factory, schema
from jaxdiff.options import INTERVAL
from jaxdiff.schema import Config, ConfigError

_TOLD = {"--label": "sample.label", "--prompt": "sample.prompt", "--guidance": "guidance.scale"} | {
  f"--{name}": f"guidance.{name}" for name in ("classifier", "weak", "interval", "rescale")
}
_SAMPLE = {"--sampler": "sampler.type", "--num": "sample.num", "--seed": "sample.seed", "--gif": "sample.gif", **_TOLD}
_EDIT = {"--sampler": "sampler.type", **_TOLD} | {
  f"--{name}": f"edit.{name}"
  for name in (
    *("task", "input", "mask", "method", "strength", "blur", "factor", "noise", "degrade", "resize", "num", "seed"),
  )
}
_LIKELIHOOD = {
  f"--{name}": f"likelihood.{name}"
  for name in (
    *("split", "limit", "seed", "batch_size", "dtype", "dequantization", "draws", "importance"),
    *("solver", "rtol", "atol", "variable", "steps"),
  )
}
_LIKELIHOOD["--basis"] = "likelihood.divergence.basis"
_SWITCHES = ("--gif", "--importance", "--degrade", "--resize")
_TRAIN = {"--launcher": "train.launcher", "--fsdp": "train.fsdp"}
_STEPS = ("sampler.grid.steps", "sampler.steps")
_TRACE = "likelihood.divergence"


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a command is started: what is no part of the run.

  Attributes:
    distributed: whether this is one of several processes, which JAX finds by itself.
    coordinator: HOST:PORT of the first of several processes.
    processes: how many they are.
    process: which of them this is.
    timeout: seconds to wait for the others.
    profile: the steps of a training to trace, from after the first to the second.
  """

  distributed: bool = False
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  timeout: int = 300
  profile: tuple[int, int] | None = None


def launch(command: str, argv: list[str]) -> tuple[Launch, list[str]]:
  """The flags that say how the command is started, and the others.

  Args:
    command: the command; --profile=START:STOP is for "train".
    argv: what follows the command.

  Raises:
    ConfigError: a value that cannot be read, or --processes or --process without --coordinator.
  """
  names, found, rest, left = _launch_flags(command), {}, [], list(argv)
  while left:
    name, equals, value = left.pop(0).partition("=")
    if name not in names:
      rest.append(name + equals + value)
      continue
    if name != "--distributed" and not equals and left:
      value = left.pop(0)
    found[name.removeprefix("--")] = _launch_value(name, value)
  if {"processes", "process"} & found.keys() and "coordinator" not in found:
    raise ConfigError("--processes and --process need --coordinator=HOST:PORT, the address of process 0")
  if {"distributed", "coordinator"} <= found.keys():
    raise ConfigError("--distributed is for processes that JAX finds by itself: leave it out, or --coordinator")
  return Launch(**found), rest


def _launch_flags(command: str) -> list[str]:
  return [f"--{field.name}" for field in dataclasses.fields(Launch) if field.name != "profile" or command == "train"]


def _launch_value(name: str, text: str) -> Any:
  if name == "--distributed":
    if text not in ("", "True", "true"):
      raise ConfigError(f"--distributed takes no value, got {text!r}; leave it out for one process")
    return True
  if name == "--coordinator":
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
      raise ConfigError(f"--coordinator must be HOST:PORT, the address of process 0; got {text!r}")
    return text
  if name == "--profile":
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) < int(stop)):
      raise ConfigError(f"--profile must be START:STOP, two steps with 1 <= START < STOP; got {text!r}")
    return int(start), int(stop)
  if not text.isdecimal():
    raise ConfigError(f"{name} must be a whole number, got {text!r}")
  return int(text)


def parse(command: str, argv: list[str]) -> tuple[Config, Path]:
  """The resolved config and the workdir.

  Args:
    command: the command; for "likelihood" the short flags stand for fields of that section, and --other.field for those
      of the section other; for "train" --launcher and --fsdp for those of train; for all others --sampler and --steps
      for those of sampler, --label, --prompt, --guidance and its kin for those of sample and guidance; for "edit" the
      other ones for those of that section, else --num, --seed and --gif for those of sample.
    argv: what follows the command: --workdir=DIR, --config=FILE, --config.field=value; a space may replace the "=".

  Raises:
    ConfigError: for anything that cannot be read, does not exist or has another type.
  """
  options = _options(command, argv)
  if "--workdir" not in options:
    raise ConfigError("--workdir=DIR is needed: the directory of the run")
  workdir = Path(options.pop("--workdir")).expanduser()
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"--workdir={workdir} is a file; give the directory of the run")
  file, own = options.pop("--config", None), workdir / "config.json"
  if file is None and not own.exists():
    raise ConfigError(f"{own} does not exist: train first, or give --config=FILE")
  config = factory.read(own) if file is None else load(Path(file).expanduser())
  if command in ("sample", "edit", "likelihood") and schema.is_classifier(config):
    raise ConfigError(
      f"{command} is for models that generate, and config.network.type = 'Classifier' says of which class an example "
      "is: take evaluate, or the --workdir of another run"
    )
  schema.check_command(command, config)
  short = _short(command)
  texts = {short.get(name, name.removeprefix("--config.")): value for name, value in options.items()}
  if command == "edit" and (missing := _missing(config, texts)):
    raise ConfigError(f"edit needs {' and '.join(missing)}")
  if command == "likelihood" and any(path.split(".")[0] == "guidance" for path in texts):
    raise ConfigError("config.guidance is of samples: the likelihood is that of the model without it, so leave it out")
  return override(config, texts), workdir


def _missing(config: Config, texts: Mapping[str, str]) -> list[str]:
  """The flags that edit cannot do without, where neither they nor the config say it."""
  *tasks, last = get_args(schema.EditSettings.__annotations__["task"])
  needed = {"task": f"--task={', '.join(tasks)} or {last}", "input": "--input=PATH, images to start from"}
  return [text for name, text in needed.items() if f"edit.{name}" not in texts and name not in config.get("edit", {})]


def transfer(command: str, argv: list[str]) -> tuple[Path, Path, dict[str, str]]:
  """The path outside, the workdir, and the fields of the config that are set, by their path.

  Args:
    command: "import" or "export".
    argv: what follows the command: PATH, --workdir=DIR and, for "import", --config.field=value and --preset=NAME.

  Raises:
    ConfigError: for anything else, or one of the first two missing.
  """
  paths = [text for text in argv[:1] if not text.startswith("-")]
  options = _options(command, argv[len(paths) :])
  if not paths or "--workdir" not in options or "--config" in options:
    more = " [--config.data.type=NAME ...]" if command == "import" else ""
    raise ConfigError(f"usage: jaxdiff {command} PATH --workdir=DIR{more}")
  workdir = Path(options.pop("--workdir")).expanduser()
  return Path(paths[0]).expanduser(), workdir, {name.removeprefix("--config."): options[name] for name in options}


def directories(argv: list[str]) -> list[Path]:
  """The directories that --compare=DIR,DIR names.

  Raises:
    ConfigError: for fewer than two, one that is none, or other flags beside it.
  """
  name, equals, value = argv[0].partition("=")
  texts = [text for text in (value if equals else "".join(argv[1:2])).split(",") if text]
  if name != "--compare" or len(argv) > (1 if equals else 2):
    raise ConfigError("--compare=DIR,DIR reads what was evaluated in those directories; it takes no other flags")
  if len(texts) < 2:
    raise ConfigError("--compare needs at least two directories of runs: --compare=DIR,DIR")
  folders = [Path(text).expanduser() for text in texts]
  if missing := [folder for folder in folders if not folder.is_dir()]:
    raise ConfigError(f"--compare: {missing[0]} is not a directory")
  return folders


def _short(command: str) -> dict[str, str]:
  others: dict[str, dict[str, str]] = {"train": _TRAIN, "edit": _EDIT, "import": {"--preset": ""}, "export": {}}
  return {"likelihood": _LIKELIHOOD, **others}.get(command, _SAMPLE)


def _options(command: str, argv: list[str]) -> dict[str, str]:
  options, rest = {}, list(argv)
  special = {"likelihood": ("--probes",), "train": (), "import": (), "export": ()}.get(command, ("--steps",))
  flags = ("--workdir", "--config", *special, *_short(command))
  while rest:
    name, equals, value = rest.pop(0).partition("=")
    if command == "likelihood" and name.startswith("--other."):
      name = name.replace("--", "--config.", 1)
    if name not in flags and not name.startswith("--config."):
      raise ConfigError(
        f"unexpected argument {name + equals + value!r}: settings are given as --config.field=value, some of those of "
        f"{command} by a short flag; {schema.nearest(name, (*flags, *_launch_flags(command)))}"
      )
    if name in _SWITCHES and not equals and (not rest or rest[0].startswith("--")):
      value = "True"
    elif not equals and rest and not rest[0].startswith("--"):
      value = rest.pop(0)
    if not value:
      raise ConfigError(f"{name} needs a value: {name}=VALUE")
    options[name] = value
  return options


def load(file: Path) -> Config:
  """What get_config() of a Python file returns, as a plain dict."""
  if not file.is_file():
    raise ConfigError(f"--config={file} is not a file")
  try:
    get_config = runpy.run_path(str(file)).get("get_config")
    config = get_config() if callable(get_config) else None
    plain = factory.normalize(config) if isinstance(config, ConfigDict | Mapping) else None
  except ConfigError:
    raise
  except Exception as error:
    text = " ".join(str(error).split())
    raise ConfigError(f"--config={file} cannot be run: {type(error).__name__}: {text}{_line(error, file)}") from error
  if not callable(get_config):
    raise ConfigError(f"--config={file} has no function get_config(); see configs/digits.py")
  if plain is None:
    raise ConfigError(f"--config={file}: get_config() must return a ConfigDict, got {config!r}")
  return plain


def _line(error: Exception, file: Path) -> str:
  """Where in the file an error arose."""
  line, trace = None, error.__traceback__
  while trace is not None:
    line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(file) else line
    trace = trace.tb_next
  return "" if line is None else f" (line {line})"


def override(config: Config, texts: Mapping[str, str]) -> Config:
  """A config with fields set, the types of components first; paths are made absolute.

  A field that belongs to the former type of a component alone is dropped, with a line on standard error.

  Args:
    config: left as it is.
    texts: values by the path of their field, such as {"sde.type": "VE"}.

  Raises:
    ConfigError: a field that the schema does not know, or a value of another type.
  """
  config, texts = copy.deepcopy(config), dict(texts)
  if "--probes" in texts:
    texts = _probes(config, texts.pop("--probes"), texts)
  for path in sorted(texts, key=lambda path: (not path.endswith(".type"), path.count("."))):
    _set(config, _steps(config) if path == "--steps" else path, texts[path])
  schema.check_sections(config)
  for section in ("data", "other", "guidance", "edit"):
    fields = config.get(section, {})
    for name in schema.paths(section, fields) if fields else ():
      if (value := fields.get(name)) is not None:
        fields[name] = str(Path(value).expanduser().absolute())
  return config


def _probes(config: Config, text: str, texts: dict[str, str]) -> dict[str, str]:
  """The fields that --probes stands for: the exact trace, or so many probes of the estimator there is, or Hutchinson's.

  An estimator that is named beside it is left as it is.
  """
  if text == "exact":
    return {f"{_TRACE}.type": "exact", **texts}
  if not text.isdecimal():
    raise ConfigError(f"--probes must be a whole number, or exact; got {text!r}")
  section = config.get("likelihood", {}).get("divergence", {})
  has_probes = "type" in section and "probes" in schema.parameters(_TRACE, section)
  kind = {} if has_probes else {f"{_TRACE}.type": "hutchinson"}
  return kind | {f"{_TRACE}.probes": text} | texts


def _steps(config: Config) -> str:
  """The field that holds the number of steps of the config's sampler."""
  if "sampler" not in config:
    raise ConfigError("--steps is of samplers, and there is no config.sampler: leave it out")
  section = config["sampler"]
  fields = [*schema.subsections("sampler", section), *schema.parameters("sampler", section)]
  for path in _STEPS:
    if path.split(".")[1] in fields:
      return path
  remedy = "set its tolerances, --config.sampler.rtol" if "rtol" in fields else "they are those of its training"
  raise ConfigError(f"--steps: {section['type']} chooses its steps by itself; {remedy}")


def _set(config: Config, path: str, text: str) -> None:
  *parents, name = path.split(".")
  section, where = config, ""
  for parent in parents:
    section, where = _enter(section, where, parent), f"{where}.{parent}".lstrip(".")
  if schema.exists(path):
    raise ConfigError(f"config.{path} is a section: set its fields, --config.{path}.field=value")
  if path == "seed":
    section[name] = _value(path, text, int)
  elif where and name == "type" and isinstance(schema.section_at(where).makes, Mapping):
    _set_type(section, where, text)
  else:
    _check_name(where, section, name)
    section[name] = _value(path, text, schema.parameters(where, section)[name].annotation)


def _enter(section: Config, where: str, name: str) -> Config:
  """The section of this name within a section, made where there is none."""
  _check_name(where, section, name)
  if not schema.exists(f"{where}.{name}".lstrip(".")):
    raise ConfigError(f"config.{where}.{name} is a value and has no fields".replace("..", "."))
  return section.setdefault(name, {})


def _check_name(where: str, section: Config, name: str) -> None:
  if where:
    schema.check_name(where, section, name)
  elif name not in schema.TOP:
    raise ConfigError(f"config.{name} does not exist; {schema.nearest(name, schema.TOP)}")


def _set_type(section: Config, where: str, kind: str) -> None:
  former = section.get("type")
  section["type"] = kind
  known = {"type", *schema.parameters(where, section), *schema.subsections(where, section)}
  if dropped := [name for name in section if name not in known and kind != former]:
    print(f"jaxdiff: config.{where}.type={kind} drops {', '.join(dropped)} of {former}", file=sys.stderr)
  for name in dropped:
    del section[name]


def _value(path: str, text: str, annotation: Any) -> Any:
  """The value that a text stands for: a Python literal where the field takes it, else the text itself."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError):
    value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
  value = tuple(value) if isinstance(value, list) else value
  if not schema.fits(value, annotation) and schema.fits(text, annotation):
    value = text
  if path == "guidance.interval" and not schema.fits(value, annotation):
    raise ConfigError(INTERVAL.format(text))
  schema.check_type(path, value, annotation)
  return value
