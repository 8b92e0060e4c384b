"""Autoguidance: a score, led away from what a worse one of the same data says.

    s = gamma s_1 + (1 - gamma) s_0                                                                                  (1)

s_0 is of a smaller network, or one trained for less time, under the same conditions. With `without(s_0, "label")` this
is classifier-free guidance with an unconditional network of its own.

References:
  Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself, eq. 2, there of data predictions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff import checks, predictions
from jaxdiff.guidance.guided import Guided, Reading, check_score
from jaxdiff.guidance.interval import Scale, at, check_scale, is_one
from jaxdiff.sde import expand
from jaxdiff.typing import ScoreFn, State


@checks.pytree
@dataclass(frozen=True)
class _Weak:
  weak: ScoreFn
  scale: Scale

  def __call__(self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> tuple[State, ...]:
    value, *v = read.values(score, x, t, cond)
    scale = at(self.scale, t)
    away = lambda: expand(scale, x) * value + expand(1 - scale, x) * read.value(self.weak, x, t, cond)
    if callable(self.scale):
      return jax.lax.cond(is_one(scale), lambda: value, away), *v
    return away(), *v

  def evaluations(self, score: ScoreFn, times: Array | None) -> int | Array:
    strong, weak = (predictions.evaluations(one, times) for one in (score, self.weak))
    if times is None or not callable(self.scale):
      return strong + weak
    return strong + jnp.where(at(self.scale, times) == 1, 0, weak)


def autoguidance(score: ScoreFn, weak: ScoreFn, scale: Scale) -> Guided:
  """A score led away from a worse one, eq. (1).

  Args:
    score: the good one.
    weak: the worse one, of the same process; told the same conditions.
    scale: gamma, at least 0; 1 leaves the score as it is. Or a function of time `[b] -> [b]` such as `interval(...)`:
      where it is 1 for all examples, the worse score is not computed.

  Returns:
    A score, at the evaluations of both, which are of networks of different cost. A learned variance is that of `score`.

  Raises:
    ValueError: for a negative scale.
    TypeError: for a score that is none.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> guided = jd.guidance.autoguidance(lambda x, t: -x, lambda x, t: -0.5 * x, scale=2.0)
    >>> guided(jnp.ones((1, 2)), 0.5).tolist()
    [[-1.5, -1.5]]
  """
  check_score("score", score)
  check_score("weak", weak)
  check_scale("scale", scale)
  return Guided(score, _Weak(weak, scale))
