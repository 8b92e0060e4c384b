"""A score that is not told some conditions: for an unconditional network beside a classifier that needs the label."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

from jaxdiff import checks, predictions
from jaxdiff.guidance.guided import check_score
from jaxdiff.sde import ScalarSDE, batch_time
from jaxdiff.typing import ScoreFn, State, Time


@functools.partial(checks.pytree, static=("names",))
@dataclass(frozen=True)
class _Without:
  score: ScoreFn
  names: tuple[str, ...]

  @property
  def sde(self) -> ScalarSDE | None:
    return getattr(self.score, "sde", None)

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    return self.score(x, batch_time(t, x), **self._told(cond))

  @property
  def denoised(self) -> Callable[..., Any] | None:
    return self._untold("denoised")

  @property
  def denoised_and_v(self) -> Callable[..., Any] | None:
    return self._untold("denoised_and_v")

  def evaluations(self, times: Array | None) -> int | Array:
    return predictions.evaluations(self.score, times)

  def _untold(self, name: str) -> Callable[..., Any] | None:
    method = getattr(self.score, name, None)
    return None if method is None else lambda x, t, /, **cond: method(x, t, **self._told(cond))

  def _told(self, cond: dict[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in cond.items() if name not in self.names}


def without(score: ScoreFn, *names: str) -> _Without:
  """The score, not told the conditions of these names.

  Args:
    score: from `jd.score_fn`, or any score.
    names: of conditions in cond that it is not told.

  Returns:
    A score that does all that `score` does, a pytree if that is one.

  Raises:
    TypeError: for a score that is none, names that are no words.
    ValueError: for no names.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> score = jd.guidance.without(lambda x, t: -x, "label")
    >>> score(jnp.ones((1, 2)), 0.5, label=jnp.asarray([3])).tolist()
    [[-1.0, -1.0]]
  """
  check_score("score", score)
  if not names:
    raise ValueError('names is empty: say what the score is not told, such as without(score, "label")')
  if wrong := [name for name in names if not isinstance(name, str)]:
    raise TypeError(f"names must be words, got {wrong[0]!r}")
  return _Without(score, names)
