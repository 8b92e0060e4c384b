"""The train state: what a step carries, arrays only, no functions.

`step` counts the steps done; together with `key` it determines all noise of the next step, so a restored state
continues exactly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key, PyTree

from jaxdiff import keys


class TrainState(NamedTuple):
  """What `train_step` carries from step to step.

  Attributes:
    step: number of steps done, int32 scalar.
    params: the parameters being trained, any pytree of arrays (several groups are one pytree).
    ema_params: their exponential moving average, the same pytree in float32 or wider: the parameters to sample with.
    opt_state: the Optax state.
    key: the typed key of the run; never changes.
    averages: power-function averages of `params` (`jaxdiff.training.ema`), one pytree like `ema_params` a length.
    skipped: number of steps whose loss or gradient was not finite, which changed nothing else, int32 scalar.
    skipped_in_a_row: how many of them were the last ones, int32 scalar.
  """

  step: Int[Array, ""]
  params: PyTree
  ema_params: PyTree
  opt_state: PyTree
  key: Key[Array, ""]
  averages: tuple[PyTree, ...]
  skipped: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]


def init_state(
  params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""], ema_lengths: Sequence[float] = ()
) -> TrainState:
  """Makes the state before the first step; all averages start at the parameters.

  All arrays are copies, so that donating the state leaves `params` and `key` usable.

  Args:
    params: a pytree of float arrays.
    optimizer: the Optax transformation given to `make_train_step`.
    key: one typed threefry key, `jax.random.key(seed)`.
    ema_lengths: relative widths of the power-function averages, as given to `make_train_step`.

  Returns:
    The state at step 0; place it with `jaxdiff.parallel.replicate`.

  Raises:
    TypeError, ValueError: `key` is not one typed threefry key, or a parameter is not a float array.

  Example:
    >>> state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
    >>> int(state.step), state.ema_params["w"].dtype
    (0, dtype('float32'))
  """
  keys.check(key)
  if key.shape != ():
    raise ValueError(f"key must be one key, got shape {key.shape}")
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise TypeError(f"params{jax.tree_util.keystr(path)}: parameters must be floats, got {jnp.result_type(leaf)}")
  # With their types given: weak ones would become strong in the first step, and the second one be compiled again.
  params = jax.tree.map(lambda p: jnp.array(p, jnp.result_type(p)), params)
  ema_params, *averages = [
    jax.tree.map(lambda p: jnp.array(p, wide(p.dtype)), params) for _ in range(1 + len(ema_lengths))
  ]
  with jax.numpy_dtype_promotion("standard"):
    opt_state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), optimizer.init(params))
  step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
  return TrainState(step, params, ema_params, opt_state, jnp.copy(key), tuple(averages), skipped, skipped_in_a_row)


def wide(dtype: Any) -> Any:
  """The dtype to accumulate `dtype` in: float64 for float64, else float32."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def abstract_state(state: PyTree) -> PyTree:
  """Shapes, dtypes and shardings of `state`, what restoring a checkpoint onto these devices needs."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@jax.jit
def all_finite(state: TrainState) -> Bool[Array, ""]:
  """Whether no parameter and no averaged parameter is infinite or NaN."""
  leaves = jax.tree.leaves((state.params, state.ema_params, state.averages))
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
