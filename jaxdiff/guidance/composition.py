"""Composition: one score of several conditions at once, by sums of log-densities.

    s = s(x) + sum_i w_i (s(x | c_i) - s(x))                                                                         (1)

With exact scores this is the score of p_t(x) prod_i p_t(c_i | x)^w_i: for w_i = 1 that of all conditions at once (AND),
where they are independent given x_t; w_i < 0 leads away from a condition (NOT).

References:
  Liu et al. 2022, Compositional Visual Generation with Composable Diffusion Models, Section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, predictions
from jaxdiff.guidance.branches import Null, check_null, check_present, filled, in_one_call
from jaxdiff.guidance.guided import Guided, Reading, check_score
from jaxdiff.typing import Scalar, ScoreFn, State


@checks.pytree
@dataclass(frozen=True)
class _Composition:
  null: Null
  scales: Float[Array, " k"]

  def __call__(self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> tuple[State, ...]:
    check_present(self.null, cond)
    count = len(self.scales)
    same = {name: value for name, value in cond.items() if name not in self.null}
    branches = {name: _with_null(name, nothing, cond[name], count) for name, nothing in self.null.items()}
    call = lambda x, t, cond: read.values(score, x, t, cond)
    value, *v = in_one_call(call, x, t, same, branches, count + 1)
    untold, told = value[:, 0], value[:, 1:]
    towards = jnp.tensordot(self.scales.astype(x.dtype), told - untold[:, None], (0, 1), precision="highest")
    return untold + towards, *(one[:, 0] for one in v)

  def evaluations(self, score: ScoreFn, times: Array | None) -> int | Array:
    return (len(self.scales) + 1) * predictions.evaluations(score, times)


def _with_null(name: str, nothing: Any, value: Array, count: int) -> Array:
  """The branches [b, k + 1, ...] of a condition: nothing, and the k of the example."""
  if value.ndim < 2 or value.shape[1] != count:
    raise ValueError(
      f"cond[{name!r}] must be [b, {count}, ...], a condition of every example for each of the {count} scales; got "
      f"shape {value.shape}"
    )
  return jnp.concatenate([filled(name, nothing, value[:, 0])[:, None], value], axis=1)


def composed(score: ScoreFn, null: Null, scales: Sequence[Scalar] | Array) -> Guided:
  """A score led to k conditions of every example at once; all in one call of the network, of batch (k + 1) b.

  Args:
    score: conditional, trained with dropped conditions (`losses.drop_conditions`).
    null: by name what stands for no condition, as in `classifier_free`. The conditions that it names are `[b, k, ...]`
      in cond; those that it does not name are `[b, ...]` and told to all branches.
    scales: w_i of eq. (1), `[k]`; negative ones lead away from a condition.

  Returns:
    A score, at k + 1 times the evaluations of `score`. A learned variance is that under the null condition.

  Raises:
    ValueError: for scales that are no `[k]`, an empty null; when called, for cond without what null names, or not with
      k conditions an example.
    TypeError: for a score or a null that is none.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> score = lambda x, t, label: label[:, None] - x
    >>> guided = jd.guidance.composed(score, {"label": 0.0}, [1.0, 2.0])
    >>> guided(jnp.zeros((1, 2)), 0.5, label=jnp.asarray([[1.0, 10.0]])).tolist()
    [[21.0, 21.0]]
  """
  check_score("score", score)
  check_null(null)
  weights = jnp.asarray(scales, jnp.result_type(float))
  if weights.ndim != 1 or not len(weights):
    raise ValueError(f"scales must be [k], a number for each condition of an example; got shape {weights.shape}")
  return Guided(score, _Composition(dict(null), weights))
