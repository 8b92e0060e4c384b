"""Conditional likelihoods log p(x | c), and with them the classifier that a conditional model is:

    argmax_c  log p(x | c) + log p(c)

References:
  Zimmermann et al. 2021, Score-Based Generative Classifiers, Section 2.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jaxdiff import checks, keys
from jaxdiff.typing import Keys, ScoreFn, Status


class EachCondition(NamedTuple):
  """What examples are worth under each of n conditions.

  Attributes:
    value: `[b, n]`, in the unit of the function that was evaluated: nats for a log-density, of which the class is the
      argmax; bits per dimension for `bits_per_dim`, of which it is the argmin.
    standard_error: of `value`, over the probes. Differences between conditions are known better: their probes are the
      same.
    nfe: network evaluations spent on each example, over all conditions.
    status: how the solves went, over all conditions.
  """

  value: Float[Array, "b n"]
  standard_error: Float[Array, "b n"]
  nfe: Int[Array, " b"]
  status: Status


def each_condition(fn: Callable[..., Any]) -> Callable[..., EachCondition]:
  """Evaluates every example under every condition, one condition after the other.

  Args:
    fn: what `likelihood.log_prob` or `likelihood.bits_per_dim` returned.

  Returns:
    fn(key, x: [b, *d], score, conds) -> EachCondition. conds: arrays `[n, ...]` by name, the n conditions. They all see
    the same dequantization and the same probes.

  Raises:
    ValueError: when called, for conditions of different numbers, or none.
    TypeError: for `likelihood.log_prob` itself; when called, for conditions that are no dict.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> classify = jd.likelihood.each_condition(jd.likelihood.log_prob(jd.VP()))
    >>> score = lambda x, t, mean: mean - x  # of N(mean, I), were mean scaled with the time
    >>> means = {"mean": jnp.array([[0.0, 0.0], [9.0, 9.0]])}
    >>> result = jax.jit(lambda x: classify(jax.random.key(0), x, score, means))(jnp.ones((1, 2)))
    >>> result.value.shape, jnp.argmax(result.value, axis=1).tolist()
    ((1, 2), [0])
  """

  checks.made("fn", fn)

  def evaluate(key: Keys, x: Shaped[Array, "b *d"], score: ScoreFn, conds: Mapping[str, Array]) -> EachCondition:
    _check(conds)
    example_key = keys.per_example(key, len(x))

    def one(cond: dict[str, Array]) -> tuple[Array, Array, Array, Status]:
      everywhere = {name: jnp.broadcast_to(value[None], (len(x), *value.shape)) for name, value in cond.items()}
      result = fn(example_key, x, score, everywhere)
      return result.value, result.standard_error, result.nfe, result.status

    value, error, nfe, status = jax.lax.map(one, dict(conds))
    accepted, rejected = (jnp.sum(count, axis=0) for count in (status.accepted, status.rejected))
    return EachCondition(
      value.T, error.T, jnp.sum(nfe, axis=0), Status(jnp.max(status.code, axis=0), accepted, rejected)
    )

  return evaluate


def _check(conds: Any) -> None:
  if not isinstance(conds, Mapping):
    raise TypeError(f"conds must be a dict of arrays with a leading axis of conditions, got {type(conds).__name__}")
  if wrong := [name for name, value in conds.items() if not hasattr(value, "shape")]:
    raise TypeError(f"conds[{wrong[0]!r}] must be an array [n, ...], got {type(conds[wrong[0]]).__name__}")
  counts = {name: jnp.shape(value)[:1] for name, value in conds.items()}
  if len(set(counts.values())) != 1 or () in counts.values() or (0,) in counts.values():
    raise ValueError(f"conds must hold arrays [n, ...] of one number of conditions, n at least 1; got {counts}")
