"""A guided score: a score, and a rule that combines what it says under several conditions, or adds a gradient to it.

A rule combines either scores or data predictions. They go together because the data prediction is affine in the score,

    D = E[x_0 | x_t] = (x + sigma^2 s) / alpha,                                                                      (1)

(Tweedie's formula; Efron 2011, eq. 1.4): a sum of scores whose weights add up to 1 is the same sum of data predictions,
and a gradient added to the score is added to the data prediction sigma^2 / alpha times. Where the score has a data
prediction of its own, it is combined as it is, not by way of the score: at small alpha that would lose digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, predictions
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import ScoreFn, State, Time


class Reading(NamedTuple):
  """What is asked of every score that a rule combines.

  Attributes:
    sde: the process, a ScalarSDE, or None where it is not known; data predictions need it.
    data: whether the data prediction, else the score itself.
    v: whether also the v of a learned variance.
  """

  sde: Any
  data: bool = False
  v: bool = False

  def value(self, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> State:
    """The score or the data prediction."""
    if self.data:
      return checks.score(x, predictions.denoised(self.sde, score, x, t, **cond))
    return checks.score(x, score(x, t, **cond))

  def values(self, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> tuple[State, ...]:
    """The score or the data prediction, and v where it is asked for."""
    if not self.v:
      return (self.value(score, x, t, cond),)
    data, v = predictions.denoised_and_v(score, x, t, **cond)
    return checks.score(x, data), checks.score(x, v)

  def slope(self, x: State, t: Float[Array, " b"]) -> Array:
    """By how much the value grows with the score, eq. (1): 1, or sigma^2 / alpha."""
    if not self.data:
      return jnp.ones((), x.dtype)
    alpha, sigma = self.sde.marginal(t)
    return expand(sigma**2 / alpha, x)


@runtime_checkable
class Rule(Protocol):
  """How values are combined: a callable pytree."""

  def __call__(
    self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]
  ) -> tuple[State, ...]: ...

  def evaluations(self, score: ScoreFn, times: Float[Array, " n"] | None) -> int | Array: ...


@checks.pytree
@dataclass(frozen=True)
class Guided:
  """A score that is guided by a rule; a pytree if the score and what the rule holds are.

  `denoised` and `denoised_and_v` are None where the score has no data prediction, or no process `sde` to go with it:
  samplers then take Tweedie's formula with the process of their own.

  Attributes:
    score: the score to be guided.
    rule: how.
  """

  score: ScoreFn
  rule: Rule

  @property
  def sde(self) -> ScalarSDE | None:
    """The process of the score."""
    return getattr(self.score, "sde", None)

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    return self.rule(Reading(self.sde), self.score, x, batch_time(t, x), cond)[0]

  @property
  def denoised(self) -> Callable[..., State] | None:
    """(x, t, **cond) -> the guided data prediction."""
    return self._denoised if self._predicts("denoised") else None

  @property
  def denoised_and_v(self) -> Callable[..., tuple[State, State]] | None:
    """(x, t, **cond) -> the guided data prediction, and the v of the variance of the score."""
    return self._denoised_and_v if self._predicts("denoised_and_v") else None

  def evaluations(self, times: Float[Array, " n"] | None) -> int | Array:
    """Network evaluations of one call at these times; None for the most that a call takes."""
    return self.rule.evaluations(self.score, times)

  def _predicts(self, name: str) -> bool:
    return self.sde is not None and getattr(self.score, name, None) is not None

  def _denoised(self, x: State, t: Time, /, **cond: Array) -> State:
    return self.rule(Reading(self.sde, data=True), self.score, x, batch_time(t, x), cond)[0]

  def _denoised_and_v(self, x: State, t: Time, /, **cond: Array) -> tuple[State, State]:
    data, v = self.rule(Reading(self.sde, data=True, v=True), self.score, x, batch_time(t, x), cond)
    return data, v


def check_callable(name: str, value: Any, what: str) -> None:
  """Refuse what is no function, and factories that were not called."""
  checks.made(name, value)
  if not callable(value):
    raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def check_score(name: str, value: Any) -> None:
  """Refuse what is no score."""
  check_callable(name, value, "a score, (x: [b, *d], t: [b], **cond) -> [b, *d], such as jd.score_fn makes")
