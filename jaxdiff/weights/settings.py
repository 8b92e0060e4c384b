"""Published configurations: every key is used, known to be without effect, or refused by name and value."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.weights.files import WeightsError


class Settings:
  """A configuration that is being read; `finish` refuses what nobody asked for.

  Args:
    config: keys and values; those that begin with an underscore say where it comes from.
    what: the file, for messages.
  """

  def __init__(self, config: Mapping[str, Any], what: str):
    self._left = {key: value for key, value in config.items() if not key.startswith("_")}
    self._what = what
    self._wrong: list[str] = []

  def take(self, key: str, default: Any) -> Any:
    """The value of a key, or the default that the published code has."""
    value = self._left.pop(key, default)
    return tuple(value) if isinstance(value, list) else value

  def only(self, key: str, *values: Any) -> Any:
    """The value of a key that can be one of few; the first of them is the default."""
    value = self.take(key, values[0])
    if value not in values or isinstance(value, bool) != any(isinstance(v, bool) for v in values if v == value):
      self.refuse(key, value, f"can be {' or '.join(map(repr, values))} here")
      return values[0]
    return value

  def without_effect(self, *keys: str) -> None:
    """Keys whose value does not matter to what the network computes."""
    for key in keys:
      self._left.pop(key, None)

  def refuse(self, key: str, value: Any, reason: str) -> None:
    """Note a value that there is nothing for."""
    self._wrong.append(f"{key} = {value!r} {reason}")

  def finish(self) -> None:
    """Raises a WeightsError that lists all that is refused."""
    wrong = self._wrong + [f"{key} = {value!r} is not known" for key, value in self._left.items()]
    if wrong:
      listed = "\n".join(f"  {line}" for line in wrong)
      raise WeightsError(f"{self._what} describes a network that there is none for here:\n{listed}")
