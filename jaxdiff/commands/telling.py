"""What samples are told: classes and texts as the section `sample` says, in the place of those of the examples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff import options
from jaxdiff.data.text import encode_text
from jaxdiff.schema import Config, ConfigError

Arrays = Mapping[str, np.ndarray]
_SHOWN = 40  # characters of a prompt in messages


class Told(NamedTuple):
  """What samples are told; sample k has entry k mod n of n.

  Attributes:
    stated: arrays by the name of the condition.
    written: the same, as they are to be read: `label`, integers, and `prompt`, texts.
  """

  stated: Arrays
  written: Arrays


def told(config: Config, classes: int | None = None) -> Told:
  """What samples of this config are told, beside what they have of examples.

  Args:
    config: of the run.
    classes: of the classifier that leads the samples, if one does. It needs labels: all classes one after the other,
      where none are given and the model is told none of the examples.

  Raises:
    ConfigError: a class or a text that the model does not know.
  """
  conditions = config["network"].get("conditions", {})
  stated, label = _labels(options.sample(config).label, conditions, classes)
  texts, prompt = _prompts(options.sample(config).prompt, conditions)
  return Told({**stated, **texts}, {**label, **prompt})


def _labels(given: Any, conditions: Mapping[str, Config], classes: int | None) -> tuple[Arrays, Arrays]:
  names = _of_type(conditions, "label", "label", given == () and classes is None)
  known = [conditions[name]["classes"] for name in names]
  if classes is not None:
    names, known = list(dict.fromkeys([*names, "label"])), [*known, classes]
  if given == () and (classes is None or "label" in conditions):
    return {}, {}
  if not names:
    raise ConfigError(
      f"config.sample.label = {given} is for models that are told a class, and config.network.conditions has none of "
      "the type 'label': leave it out, or guide by a classifier, --classifier=DIR"
    )
  labels = range(min(known)) if given == () else _several(given)
  if wrong := [label for label in labels if not 0 <= label < min(known)]:
    raise ConfigError(f"config.sample.label = {wrong[0]} is no class of the model: take 0 to {min(known) - 1}")
  value = np.asarray(labels, np.int32)
  return dict.fromkeys(names, value), {"label": value}


def _prompts(given: Any, conditions: Mapping[str, Config]) -> tuple[Arrays, Arrays]:
  if given == ():
    return {}, {}
  names = _of_type(conditions, "text", "prompt")
  if not names:
    raise ConfigError(
      f"config.sample.prompt = {_start(given)} is for models that are told a text, and config.network.conditions has "
      "none of the type 'text': leave it out"
    )
  prompts, length = _several(given), conditions[names[0]]["length"]
  for prompt in prompts:
    if (size := len(prompt.encode(errors="replace"))) > length:
      raise ConfigError(
        f"config.sample.prompt = {_start(prompt)} has {size} bytes in UTF-8, of which the model reads {length}: "
        "shorten it"
      )
  try:
    encoded = encode_text(list(prompts), length)
  except ValueError as error:
    raise ConfigError(f"config.sample.prompt: {error}") from error
  return {names[0]: encoded}, {"prompt": np.asarray(prompts)}


def _start(value: Any) -> str:
  """A value in a message, cut off where it is long."""
  text = repr(value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _several(value: Any) -> Sequence[Any]:
  return value if isinstance(value, tuple) else (value,)


def _of_type(conditions: Mapping[str, Config], kind: str, field: str, unused: bool = False) -> list[str]:
  """The name of the condition of this type; none where there is none, or where it is unused."""
  names = [] if unused else [name for name, section in conditions.items() if section["type"] == kind]
  if len(names) > 1:
    raise ConfigError(f"config.sample.{field} is for one condition; the model has {', '.join(names)}: leave it out")
  return names
