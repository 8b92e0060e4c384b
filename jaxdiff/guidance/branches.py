"""Several conditions of every example in one call of the network.

The n branches of an example stand beside each other in the batch, [b, n] -> [n b]: so an example stays on its device
where the batch is split over devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from jaxdiff.losses.dropping import as_type
from jaxdiff.typing import Scalar, State

Null = Mapping[str, Scalar | Any]


def in_one_call(
  call: Callable[[State, Array, dict[str, Array]], tuple[State, ...]],
  x: State,
  t: Array,
  cond: Mapping[str, Array],
  branches: Mapping[str, Array],
  count: int,
) -> tuple[Shaped[Array, "b n ..."], ...]:
  """What `call(x, t, cond)` returns for n branches of every example, each `[b, n, *d]`.

  Args:
    call: of a batch `[n b]`.
    x: the state.
    t: times `[b]`.
    cond: the conditions that are the same in all branches, `[b, ...]`.
    branches: the others, `[b, n, ...]`.
    count: n.
  """
  flat = lambda value: value.reshape(-1, *value.shape[2:])
  same = lambda value: jnp.repeat(value, count, axis=0)
  told = {name: same(value) for name, value in cond.items()} | {name: flat(value) for name, value in branches.items()}
  return tuple(value.reshape(len(x), count, *value.shape[1:]) for value in call(same(x), same(t), told))


def check_null(null: Any) -> None:
  """Refuse what is no dict of conditions, or an empty one."""
  if not isinstance(null, Mapping):
    raise TypeError(f"null must be a dict of what stands for no condition, by name; got {type(null).__name__}")
  if not null:
    raise ValueError(
      "null is empty, so that nothing is guided: give it what stands for no condition, such as {'label': 10} or "
      "jaxdiff.models.conditioning.null(conditions) of a network that was trained with dropped conditions"
    )


def check_present(null: Null, cond: Mapping[str, Array]) -> None:
  """Refuse conditions without those that null names."""
  if missing := sorted(null.keys() - cond.keys()):
    raise ValueError(
      f"cond lacks {', '.join(map(repr, missing))}, which null names; it has {sorted(cond) or 'none'}: guidance "
      "needs a condition to lead to"
    )


def filled(name: str, nothing: Any, like: Array) -> Array:
  """The condition `[b, ...]` that says what null says: a number everywhere, or the array of one example.

  Raises:
    ValueError: for an array of another shape, a number that the type of the condition cannot hold.
  """
  one = as_type(nothing, like.dtype, name)
  if one.ndim and one.shape != like.shape[1:]:
    raise ValueError(
      f"null[{name!r}] must be a number, or an array of the shape of one example's cond[{name!r}], {like.shape[1:]}; "
      f"got shape {one.shape}"
    )
  return jnp.broadcast_to(one, like.shape)
