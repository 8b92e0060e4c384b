"""One training step as a pure function: per-example randomness, mean loss, gradient, Optax update, moving average.

Randomness, for step s (updates done so far), global index i in the batch and batch size B:
  noise key   k_i = fold_in(fold_in(key, s), i)
  time        u_i = frac(u + i / B),  u ~ U[0, 1) from fold_in(fold_in(key, s), 2^32 - 1), which no index can reach
so one u_i falls into every cell of width 1/B, and neither depends on how the batch is laid out over devices.

Mean and cross-device sum happen here and only here: loss = sum over all examples / B.
Moving average: ema <- ema + (1 - d_s) (params - ema) with d_s = min(ema_decay, (1 + s) / (10 + s)).
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdiff.parallel import gathered
from jaxdiff.training.state import TrainState, wide

_TIME_STREAM = np.uint32(2**32 - 1)


@runtime_checkable
class Objective(Protocol):
  """What is trained: per-example losses and per-example diagnostics."""

  def __call__(
    self, params: PyTree, key: Key[Array, "b"], batch: dict[str, Any]
  ) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """Returns (loss [b], {name: [b]}); `key` is one per example and `batch["u"]` are stratified uniforms in [0, 1)."""
    ...


def noise_keys(key: Key[Array, ""], step: Int[Array, ""], index: Int[Array, "b"]) -> Key[Array, "b"]:
  """The keys of the examples with global indices `index` at `step`: fold_in(fold_in(key, step), index)."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def stratified_uniforms(
  key: Key[Array, ""], step: Int[Array, ""], index: Int[Array, "b"], global_batch: int
) -> Float[Array, "b"]:
  """frac(u(step) + index / global_batch): uniform each, and together one in every cell of width 1 / global_batch."""
  u = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, step), _TIME_STREAM), dtype=jnp.float32)
  return jnp.mod(u + index.astype(jnp.float32) / global_batch, 1.0)


def make_train_step(
  objective: Objective, optimizer: optax.GradientTransformation, ema_decay: float, global_batch: int
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
  """Makes `train_step(state, batch, index, axis_name=None) -> (state, metrics)`.

  `batch` is a dict of arrays [b, ...] and `index` int32 [b] their global positions in the batch. Without `axis_name` b
  is the global batch (under `jax.jit`, on any sharding); inside `pmap` or `shard_map` b is the local share and
  `axis_name` the mapped axis to sum over. `metrics` are the means over the global batch of the loss ("loss") and of
  each aux array, and "grad_norm", the global norm before clipping: float scalars left on the device. Loss and
  grad_norm are non-finite if and when the step is.

  Args:
    objective: `objective(params, keys, batch) -> (loss [b], aux)`, see `Objective`.
    optimizer: an Optax transformation; `init_state` must have got the same one.
    ema_decay: asymptotic decay of the moving average per step, in [0, 1).
    global_batch: number of examples of a step over all devices.

  Returns:
    The pure train step; compile it with `jaxdiff.parallel.jit_train_step`.

  Raises:
    ValueError: `ema_decay` or `global_batch` is out of range; when traced, wrong shapes or names from the objective.

  Example:
    >>> objective = lambda params, keys, batch: ((params - batch["x"]) ** 2, {})
    >>> from jaxdiff.training.state import init_state
    >>> optimizer = optax.sgd(0.5)
    >>> step = make_train_step(objective, optimizer, ema_decay=0.9, global_batch=2)
    >>> state = init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    >>> state, metrics = step(state, {"x": jnp.array([1.0, 3.0])}, jnp.arange(2))
    >>> float(state.params), float(metrics["loss"])
    (2.0, 5.0)
  """
  if not 0 <= ema_decay < 1:
    raise ValueError(f"ema_decay={ema_decay!r}: must be in [0, 1)")
  if global_batch < 1:
    raise ValueError(f"global_batch={global_batch!r}: must be at least 1")

  def train_step(state: TrainState, batch: dict[str, Any], index: Int[Array, "b"], axis_name: str | None = None):
    _check_index(index, batch, global_batch, axis_name)
    keys = noise_keys(state.key, state.step, index)
    batch = {**batch, "u": stratified_uniforms(state.key, state.step, index, global_batch)}

    def mean_loss(params):
      losses, aux = objective(gathered(params), keys, batch)
      _check_objective(losses, aux, index)
      means = jax.tree.map(lambda v: _sum(v) / global_batch, {"loss": losses, **aux})
      return means["loss"], means

    params = state.params
    if axis_name is not None:
      # Differentiated as each device's own, or shard_map would sum the gradient over devices before psum does.
      params = jax.tree.map(lambda p: jax.lax.pcast(p, axis_name, to="varying"), params)
    grads, metrics = jax.grad(mean_loss, has_aux=True)(params)
    if axis_name is not None:
      grads, metrics = jax.lax.psum((grads, metrics), axis_name)

    with jax.numpy_dtype_promotion("standard"):
      metrics["grad_norm"] = optax.tree.norm(grads)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    ema_params = _average(state.ema_params, params, state.step, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state, state.key), metrics

  return train_step


def _sum(values: Array) -> Array:
  return jnp.sum(values.astype(wide(values.dtype)))


def _average(ema_params: PyTree, params: PyTree, step: Int[Array, ""], ema_decay: float) -> PyTree:
  done = step.astype(jnp.float32)
  rate = jnp.maximum(1 - ema_decay, 9 / (10 + done))
  return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p.astype(e.dtype) - e), ema_params, params)


def _check_index(index: Array, batch: dict[str, Any], global_batch: int, axis_name: str | None) -> None:
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if index.shape != (global_batch // devices,) or global_batch % devices:
    raise ValueError(
      f"index: shape {index.shape} on {devices} mapped devices does not make up global_batch={global_batch}; "
      "give make_train_step the batch size of the data"
    )
  if "u" in batch:
    raise ValueError('batch: the name "u" is taken by the stratified uniforms of the train step; rename this entry')


def _check_objective(losses: Array, aux: dict[str, Array], index: Array) -> None:
  for name, value in {"loss": losses, **{f"aux[{name!r}]": value for name, value in aux.items()}}.items():
    if value.shape != index.shape:
      raise ValueError(f"objective: {name} has shape {value.shape}, needs one value per example, {index.shape}")
  if taken := {"loss", "grad_norm"} & aux.keys():
    raise ValueError(f"objective: the aux names {sorted(taken)} are taken by the train step; rename them")
