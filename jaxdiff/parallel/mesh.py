"""Devices as a mesh with the axes "data" and "fsdp", and the two placements of arrays on it: whole, and by examples."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

DATA_AXIS, FSDP_AXIS = "data", "fsdp"


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
  """Lays devices out along the axes "data" and "fsdp".

  Examples are split over both axes, parameters over "fsdp" alone (`jaxdiff.parallel.fsdp_shardings`). Neighbours along
  "fsdp" exchange the parameters, so keep this axis within the devices that have the fastest links.

  Args:
    devices: the devices to use; all local devices by default, `jax.devices()` for those of all processes.
    fsdp: over how many devices the parameters are split; divides the number of devices.

  Returns:
    A mesh of shape {"data": number of devices / fsdp, "fsdp": fsdp}.

  Raises:
    ValueError: `fsdp` does not divide the number of devices.

  Example:
    >>> dict(make_mesh(jax.local_devices()[:1]).shape)
    {'data': 1, 'fsdp': 1}
  """
  devices = jax.local_devices() if devices is None else devices
  count = len(devices)
  if fsdp < 1 or count % fsdp:
    valid = [size for size in range(1, count + 1) if count % size == 0]
    raise ValueError(
      f"fsdp={fsdp}: {count} device{'s' * (count > 1)} cannot be laid out as data x {fsdp}; valid values are "
      f"{', '.join(map(str, valid))}"
    )
  shape = count // fsdp, fsdp
  # jax.make_mesh refuses to lay 8 x 8 out on the 4 x 4 x 4 torus of a TPU slice.
  laid_out = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
  return Mesh(laid_out, (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a whole copy on every device of `mesh` (parameters, metrics)."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding that splits the leading axis over all devices of `mesh` (examples, keys, indices)."""
  return NamedSharding(mesh, examples_spec(mesh))


def examples_spec(mesh: Mesh) -> P:
  """The leading axis split over all axes of the mesh."""
  return P(tuple(mesh.axis_names))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
  """Puts a copy of every array of `tree` on every device of `mesh`.

  Args:
    mesh: a mesh from `make_mesh`; if it is of several processes, all of them call this.
    tree: arrays on these devices, in any parts, or arrays of this process, the same in all.
  """

  def local(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable

  if process_count(mesh) > 1:
    tree = jax.tree.map(lambda leaf: np.asarray(leaf) if local(leaf) else leaf, tree)
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
  check_divisible(mesh, batch, "batch")
  return jax.device_put(batch, batch_sharding(mesh))


def process_count(mesh: Mesh) -> int:
  """How many processes own devices of the mesh."""
  return len({device.process_index for device in mesh.devices.flat})


def check_divisible(mesh: Mesh, examples: PyTree, name: str, *, steps: int | None = None, processes: int = 1) -> None:
  """Refuses arrays that do not split over the devices of `mesh`.

  Args:
    mesh: the devices.
    examples: arrays [b / processes, ...], with `steps` [steps, b / processes, ...].
    name: of the argument.
    steps: the size of the axis before that of the examples; None if there is none.
    processes: how many processes have such arrays.

  Raises:
    ValueError: the leading sizes differ, are missing, or do not fit.
  """
  leading = 0 if steps is None else 1
  shapes = {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(examples)}
  if steps is not None and any(shape[:1] != (steps,) for shape in shapes.values()):
    raise ValueError(f"{name}: every array needs the leading axis of steps={steps} batches, got the shapes {shapes}")
  sizes = {shape[leading : leading + 1] for shape in shapes.values()}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(f"{name}: every array needs the same leading (example) axis, got the shapes {shapes}")
  size = sizes.pop()[0] * processes
  if size == 0 or size % mesh.size:
    nearest = max(mesh.size, mesh.size * round(size / mesh.size))
    raise ValueError(
      f"{name}: {size} examples cannot be split over {mesh.size} devices; the nearest valid batch size is {nearest}"
    )
