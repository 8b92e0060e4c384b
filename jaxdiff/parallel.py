"""Data parallelism over the devices of this process: a mesh, two shardings and three launchers.

Parameters are replicated, examples are split along their leading axis. A train step is one global program
(`jit_train_step`: `jax.jit` over the mesh, XLA inserts the all-reduce); samplers and likelihoods are independent per
example and may loop adaptively, so every device runs its own program on its own examples (`shard_examples`:
`jax.shard_map`; `pmap_examples`: `jax.pmap`). Nothing here knows what is trained or sampled.

Example:
  >>> import jax.numpy as jnp, numpy as np
  >>> mesh = make_mesh()
  >>> batch = shard_batch(mesh, {"x": np.ones((8 * mesh.size, 2), np.float32)})
  >>> scale = shard_examples(lambda params, keys, x: params * x, mesh)
  >>> keys = jax.random.split(jax.random.key(0), 8 * mesh.size)
  >>> scale(jnp.float32(3.0), keys, batch["x"]).shape[1]
  2
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays devices out along the one axis "data".

  Args:
    devices: the devices to use; all local devices by default.

  Returns:
    A mesh of shape {"data": number of devices}.

  Example:
    >>> make_mesh(jax.local_devices()[:1]).shape["data"]
    1
  """
  devices = jax.local_devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a whole copy on every device of `mesh` (parameters, optimizer state, metrics)."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding that splits the leading axis over the devices of `mesh` (examples, keys, indices)."""
  return NamedSharding(mesh, P(DATA_AXIS))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
  """Puts a copy of every array of `tree` on every device of `mesh`."""
  return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh: Mesh, batch: PyTree) -> PyTree:
  """Puts host arrays onto the devices, split along the leading axis.

  On CPU the device arrays may share the memory of the host arrays: do not write to `batch` afterwards.

  Args:
    mesh: a mesh from `make_mesh`.
    batch: a pytree of arrays [b, ...] with one common b that is a multiple of the number of devices.

  Returns:
    The same pytree of global jax arrays [b, ...].

  Raises:
    ValueError: the leading sizes differ, are missing, or are not divisible by the number of devices.
  """
  _check_divisible(mesh, batch, "batch")
  return jax.device_put(batch, batch_sharding(mesh))


def jit_train_step(train_step: Callable, mesh: Mesh) -> Callable:
  """Compiles `train_step(state, batch, index) -> (state, metrics)` for `mesh`.

  The state and the metrics are replicated, batch and index are split along their leading axis. The state is donated:
  its arrays must not be used after the call.

  Args:
    train_step: a pure function, e.g. from `jaxdiff.training.make_train_step`.
    mesh: a mesh from `make_mesh`.

  Returns:
    The jitted function with the same signature; place its first state with `replicate(mesh, state)`.
  """
  whole, split = replicated(mesh), batch_sharding(mesh)
  return jax.jit(train_step, in_shardings=(whole, split, split), out_shardings=(whole, whole), donate_argnums=0)


def shard_examples(fn: Callable, mesh: Mesh) -> Callable:
  """Runs a per-example function on every device's own examples, without communication.

  Every device loops on its own, so that an adaptive solve ends on each device when that device's examples are done.
  The per-example results do not depend on the number of devices if the keys are per example (`jaxdiff.example_keys`).

  Args:
    fn: `fn(params, *examples) -> out`: `examples` are pytrees of arrays [b, ...] (keys, x, cond, ...), `out` is a
      pytree of arrays [b, ...].
    mesh: a mesh from `make_mesh`.

  Returns:
    A function of global arrays with the same signature; wrap it in `jax.jit` (or call it inside one).

  Raises:
    ValueError: (when called) a leading size differs or is not divisible by the number of devices, or an output has
      another leading axis than the examples.

  Example:
    >>> draw = shard_examples(
    ...   lambda params, keys: jax.vmap(jax.random.normal)(keys) + params, make_mesh(jax.local_devices()[:1])
    ... )
    >>> jax.jit(draw)(1.0, jax.random.split(jax.random.key(0), 4)).shape
    (4,)
  """

  def sharded(params: PyTree, *examples: PyTree) -> Any:
    _check_divisible(mesh, examples, "examples")
    in_specs = (P(), *(P(DATA_AXIS) for _ in examples))

    def checked(params: PyTree, *examples: PyTree) -> Any:
      size, out = jax.tree.leaves(examples)[0].shape[0], fn(params, *examples)
      if wrong := [leaf.shape for leaf in jax.tree.leaves(out) if leaf.shape[:1] != (size,)]:
        raise ValueError(
          f"fn must return arrays whose leading axis is that of the examples, [{size}, ...] on each device; got shapes "
          f"{wrong}: of a path, return jnp.moveaxis(sample.path, 1, 0)"
        )
      return out

    # check_vma=False: the while loops of diffrax carry values whose replication JAX cannot infer.
    mapped = jax.shard_map(checked, mesh=mesh, in_specs=in_specs, out_specs=P(DATA_AXIS), check_vma=False)
    return mapped(params, *examples)

  return sharded


def pmap_examples(fn: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
  """`shard_examples` by `jax.pmap`: the same results, for programs that are built on it. Not for use inside jit.

  Args:
    fn: as for `shard_examples`.
    devices: the devices to use; all local devices by default.

  Returns:
    A function of arrays [b, ...] with the same signature.

  Raises:
    ValueError: (when called) a leading size differs or is not divisible by the number of devices.

  Example:
    >>> draw = pmap_examples(lambda scale, keys: scale * jax.vmap(jax.random.normal)(keys), jax.local_devices()[:1])
    >>> draw(2.0, jax.random.split(jax.random.key(0), 4)).shape
    (4,)
  """
  mesh = make_mesh(devices)
  mapped = jax.pmap(lambda params, examples: fn(params, *examples), in_axes=(None, 0), devices=list(mesh.devices.flat))

  def sharded(params: PyTree, *examples: PyTree) -> Any:
    _check_divisible(mesh, examples, "examples")
    split = jax.tree.map(lambda leaf: leaf.reshape(mesh.size, -1, *leaf.shape[1:]), examples)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped(params, split))

  return sharded


def _check_divisible(mesh: Mesh, examples: PyTree, name: str) -> None:
  devices = mesh.shape[DATA_AXIS]
  shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(examples)}
  if not shapes or any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
    raise ValueError(f"{name}: every array needs the same leading (example) axis, got the shapes {shapes}")
  size = next(iter(shapes.values()))[0]
  if size == 0 or size % devices:
    nearest = max(devices, devices * round(size / devices))
    raise ValueError(
      f"{name}: {size} examples cannot be split over {devices} devices; the nearest valid batch size is {nearest}"
    )
