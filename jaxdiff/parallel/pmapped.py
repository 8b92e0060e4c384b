"""`jax.pmap` over the devices of all processes, from global arrays to global arrays.

Across processes pmap takes and returns arrays of this process's devices alone, and copies typed keys through the host.
Here they stay global and on the devices: what comes out is what a checkpoint of all processes needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxdiff.parallel.mesh import DATA_AXIS, FSDP_AXIS, examples_spec, process_count

AXIS = "devices"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["impl"])
@dataclasses.dataclass(frozen=True)
class _RawKey:
  """A typed key as numbers."""

  data: Array
  impl: Any


def pmap_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """The mesh of shape (devices, 1) in the order of pmap: process by process."""
  ordered = sorted(devices, key=lambda device: device.process_index)
  return Mesh(np.array(ordered).reshape(-1, 1), (DATA_AXIS, FSDP_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))


def whole_sharding(mesh: Mesh) -> NamedSharding:
  """That of what pmap keeps whole on every device; another that is equivalent would be traced again."""
  return NamedSharding(Mesh(mesh.devices.ravel(), (AXIS,)), P())


def pmap(fn: Callable, mesh: Mesh, in_axes: tuple[int | None, ...], out_axes: int | None, donate: bool) -> Callable:
  """`jax.pmap` of `fn` over `mesh`, with the mapped axis `AXIS`.

  Args:
    fn: what every device runs.
    mesh: from `pmap_mesh`.
    in_axes: of each argument, 0 (arrays [devices, ...], or those of this process [local devices, ...]) or None (whole
      on every device).
    out_axes: of the results, the same.
    donate: whether the first argument is donated.

  Returns:
    A function of the same arguments, with a method `lower` as that of a jitted function.
  """
  if process_count(mesh) == 1:
    return jax.pmap(
      fn, AXIS, in_axes=in_axes, out_axes=out_axes, devices=list(mesh.devices.flat), donate_argnums=(0,) * donate
    )
  inner = jax.pmap(
    lambda *args: _raw(fn(*_typed(args))),
    AXIS,
    in_axes=in_axes,
    out_axes=out_axes,
    devices=list(mesh.devices.flat),
    donate_argnums=(0,) * donate,
  )
  sharding = whole_sharding(mesh) if out_axes is None else NamedSharding(mesh, examples_spec(mesh))

  def whole(leaf: Array) -> Array:
    shape = leaf.shape if out_axes is None else (mesh.size, *leaf.shape[1:])
    shards = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)

  def mapped(*args: PyTree) -> Any:
    return _typed(jax.tree.map(whole, inner(*_raw(args))))

  mapped.lower = lambda *args: inner.lower(*_raw(args))  # type: ignore[attr-defined]
  return mapped


def _raw(tree: PyTree) -> PyTree:
  def raw(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return _RawKey(jax.random.key_data(leaf), jax.random.key_impl(leaf))
    return leaf

  return jax.tree.map(raw, tree)


def _typed(tree: PyTree) -> PyTree:
  def typed(leaf: Any) -> Any:
    return jax.random.wrap_key_data(leaf.data, impl=leaf.impl) if isinstance(leaf, _RawKey) else leaf

  return jax.tree.map(typed, tree, is_leaf=lambda leaf: isinstance(leaf, _RawKey))
