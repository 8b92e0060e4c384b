"""One training step as a pure function: per-example randomness, mean loss, gradient, Optax update, moving average.

Randomness, for step s (updates done so far), global index i in the batch and batch size B:
  noise key   k_i = fold_in(fold_in(key, s), i)
  time        u_i = frac(u + i / B),  u ~ U[0, 1) from fold_in(fold_in(key, s), 2^32 - 1), which no index can reach
so one u_i falls into every cell of width 1/B, and neither depends on how the batch is laid out over devices. What else
an objective may depend on, s and i themselves, is in the batch as well.

Mean and cross-device sum happen here and only here: loss = sum over all examples / B. With m microbatches, number j
holds the rows j, j + m, j + 2 m, ... (of every device the same, so nothing moves), and the gradients are summed one
after the other: the loss and its gradient are the same up to rounding, the memory for activations is 1/m.

A step whose loss or gradient is not finite leaves parameters, averages and optimizer state as they were and is counted.
The averages are in `jaxdiff.training.ema`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdiff.parallel import gathered
from jaxdiff.training import ema
from jaxdiff.training.state import TrainState, wide

_TIME_STREAM = np.uint32(2**32 - 1)
_TAKEN = {"loss", "grad_norm", "skipped", "skipped_in_a_row"}
_ADDED = {"u": "stratified uniforms", "step": "number of steps done", "index": "global indices"}


@runtime_checkable
class Objective(Protocol):
  """What is trained: per-example losses and per-example diagnostics."""

  def __call__(
    self, params: PyTree, key: Key[Array, "b"], batch: dict[str, Any]
  ) -> tuple[Float[Array, "b"], dict[str, Array]]:
    """Returns (loss [b], {name: [b]}), each example its own; `key` is one per example.

    The batch has what the data have and, each `[b]`, "u", stratified uniforms in [0, 1), "step", the number of steps
    done (one for all), and "index", where in the global batch an example is.
    """
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
  objective: Objective,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  global_batch: int,
  *,
  ema_lengths: Sequence[float] = (),
  microbatches: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
  """Makes `train_step(state, batch, index, axis_name=None) -> (state, metrics)`.

  `batch` is a dict of arrays [b, ...] and `index` int32 [b] their global positions in the batch. Without `axis_name` b
  is the global batch (under `jax.jit`, on any sharding); inside `pmap` or `shard_map` b is the local share and
  `axis_name` the mapped axis to sum over. `metrics` are float scalars left on the device: the means over the global
  batch of the loss ("loss") and of each aux array, "grad_norm", the global norm before clipping, "skipped", 1 if loss
  or grad_norm is not finite and the step therefore changed nothing, else 0, and "skipped_in_a_row".

  Args:
    objective: `objective(params, keys, batch) -> (loss [b], aux)`, see `Objective`.
    optimizer: an Optax transformation; `init_state` must have got the same one.
    ema_decay: asymptotic decay of the moving average per step, in [0, 1).
    global_batch: number of examples of a step over all devices.
    ema_lengths: relative widths of the power-function averages, each in (0, 1 / sqrt(12)]; `init_state` must have got
      as many.
    microbatches: in how many parts, one after the other, a device takes its examples.

  Returns:
    The pure train step; compile it by a launcher of `jaxdiff.parallel`.

  Raises:
    ValueError: an argument is out of range; when traced, wrong shapes or names from the objective.

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
  if microbatches < 1 or global_batch % microbatches:
    raise ValueError(f"microbatches={microbatches!r}: must be a divisor of global_batch={global_batch}")
  for length in ema_lengths:
    ema.exponent(length)

  def train_step(state: TrainState, batch: dict[str, Any], index: Int[Array, "b"], axis_name: str | None = None):
    _check_index(index, batch, global_batch, microbatches, axis_name)
    if len(state.averages) != len(ema_lengths):
      raise ValueError(f"state: has {len(state.averages)} averages; give init_state ema_lengths={tuple(ema_lengths)!r}")
    keys = noise_keys(state.key, state.step, index)
    u = stratified_uniforms(state.key, state.step, index, global_batch)
    batch = {**batch, "u": u, "step": jnp.broadcast_to(state.step, index.shape), "index": index}

    def mean_loss(params, keys, batch):
      losses, aux = objective(gathered(params), keys, batch)
      _check_objective(losses, aux, keys)
      means = jax.tree.map(lambda v: _sum(v) / global_batch, {"loss": losses, **aux})
      return means["loss"], means

    params = state.params
    if axis_name is not None:
      # Differentiated as each device's own, or shard_map would sum the gradient over devices before psum does.
      params = _varying(params, axis_name)
    gradient = jax.grad(mean_loss, has_aux=True)
    grads, metrics = _accumulate(gradient, params, (keys, batch), microbatches, axis_name)
    if axis_name is not None:
      grads, metrics = jax.lax.psum((grads, metrics), axis_name)

    with jax.numpy_dtype_promotion("standard"):
      metrics["grad_norm"] = optax.tree.norm(jax.tree.map(lambda g: g.astype(wide(g.dtype)), grads))
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    updated = state._replace(
      params=params,
      ema_params=ema.decay_update(state.ema_params, params, state.step, ema_decay),
      opt_state=opt_state,
      averages=tuple(
        ema.power_update(average, params, state.step, length)
        for average, length in zip(state.averages, ema_lengths, strict=True)
      ),
    )
    return _keep_finite(state, updated, metrics)

  return train_step


def _accumulate(
  gradient: Callable[..., tuple[PyTree, PyTree]], params: PyTree, examples: PyTree, parts: int, axis_name: str | None
) -> tuple[PyTree, PyTree]:
  """The sum of `gradient(params, *part)` over the parts of `examples`, one after the other."""
  if parts == 1:
    return gradient(params, *examples)
  examples = jax.tree.map(lambda v: jnp.moveaxis(v.reshape(-1, parts, *v.shape[1:]), 1, 0), examples)
  shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda v: v[0], examples))
  zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, wide(v.dtype)), shapes)
  if axis_name is not None:
    zeros = _varying(zeros, axis_name)
  add = lambda sums, part: (jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, gradient(params, *part)), None)
  # Inside a loop, XLA's CPU backend runs convolutions about 15 times slower.
  sums, _ = jax.lax.scan(add, zeros, examples, unroll=jax.default_backend() == "cpu")
  return jax.tree.map(lambda s, v: s.astype(v.dtype), sums, shapes)


def _keep_finite(
  before: TrainState, after: TrainState, metrics: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
  """`after`, or `before` if loss or gradient is not finite, at the next step, with what was skipped counted."""
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
  kept = jax.tree.map(lambda old, new: jax.lax.select(finite, new, old), before, after)
  skipped = 1 - finite.astype(jnp.int32)
  in_a_row = skipped * (before.skipped_in_a_row + 1)
  metrics |= {"skipped": skipped.astype(jnp.float32), "skipped_in_a_row": in_a_row.astype(jnp.float32)}
  return kept._replace(step=before.step + 1, skipped=before.skipped + skipped, skipped_in_a_row=in_a_row), metrics


def _varying(tree: PyTree, axis_name: str) -> PyTree:
  return jax.tree.map(lambda v: jax.lax.pcast(v, axis_name, to="varying"), tree)


def _sum(values: Array) -> Array:
  return jnp.sum(values.astype(wide(values.dtype)))


def _check_index(
  index: Array, batch: dict[str, Any], global_batch: int, microbatches: int, axis_name: str | None
) -> None:
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if index.shape != (global_batch // devices,) or global_batch % devices:
    raise ValueError(
      f"index: shape {index.shape} on {devices} mapped devices does not make up global_batch={global_batch}; "
      "give make_train_step the batch size of the data"
    )
  if index.shape[0] % microbatches:
    raise ValueError(
      f"microbatches={microbatches}: must divide the {index.shape[0]} examples of each of the {devices} mapped devices"
    )
  for name in sorted(_ADDED.keys() & batch.keys()):
    raise ValueError(f'batch: the name "{name}" is taken by the {_ADDED[name]} of the train step; rename this entry')


def _check_objective(losses: Array, aux: dict[str, Array], keys: Array) -> None:
  for name, value in {"loss": losses, **{f"aux[{name!r}]": value for name, value in aux.items()}}.items():
    if value.shape != keys.shape:
      raise ValueError(f"objective: {name} has shape {value.shape}, needs one value per example, {keys.shape}")
  if taken := _TAKEN & aux.keys():
    raise ValueError(f"objective: the aux names {sorted(taken)} are taken by the train step; rename them")
