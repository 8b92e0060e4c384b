"""Per-example functions over all devices, without communication: samplers, likelihoods, networks.

Every device loops on its own, so that an adaptive solve ends on each device when that device's examples are done.
The per-example results do not depend on the number of devices if the keys are per example (`jaxdiff.example_keys`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxdiff.parallel.mesh import batch_sharding, check_divisible, examples_spec, process_count
from jaxdiff.parallel.pmapped import pmap, pmap_mesh


def shard_examples(fn: Callable, mesh: Mesh) -> Callable:
  """Runs a per-example function on every device's own examples, without communication.

  Args:
    fn: `fn(params, *examples) -> out`: `examples` are pytrees of arrays [b, ...] (keys, x, cond, ...), `out` is a
      pytree of arrays [b, ...].
    mesh: a mesh from `make_mesh`, over the devices of one process or of all; examples are split over all its axes.

  Returns:
    A function of global arrays with the same signature; wrap it in `jax.jit` (or call it inside one).

  Raises:
    ValueError: (when called) a leading size differs or is not divisible by the number of devices, or an output has
      another leading axis than the examples.

  Example:
    >>> from jaxdiff.parallel.mesh import make_mesh
    >>> draw = shard_examples(
    ...   lambda params, keys: jax.vmap(jax.random.normal)(keys) + params, make_mesh(jax.local_devices()[:1])
    ... )
    >>> jax.jit(draw)(1.0, jax.random.split(jax.random.key(0), 4)).shape
    (4,)
  """

  def sharded(params: PyTree, *examples: PyTree) -> Any:
    check_divisible(mesh, examples, "examples")
    split = examples_spec(mesh)
    in_specs = (P(), *(split for _ in examples))

    def checked(params: PyTree, *examples: PyTree) -> Any:
      size, out = jax.tree.leaves(examples)[0].shape[0], fn(params, *examples)
      if wrong := [leaf.shape for leaf in jax.tree.leaves(out) if leaf.shape[:1] != (size,)]:
        raise ValueError(
          f"fn must return arrays whose leading axis is that of the examples, [{size}, ...] on each device; got shapes "
          f"{wrong}: of a path, return jnp.moveaxis(sample.path, 1, 0)"
        )
      return out

    # check_vma=False: the while loops of diffrax carry values whose replication JAX cannot infer.
    mapped = jax.shard_map(checked, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
    return mapped(params, *examples)

  return sharded


def pmap_examples(fn: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
  """`shard_examples` by `jax.pmap`: the same results, for programs that are built on it. Not for use inside jit.

  Args:
    fn: as for `shard_examples`.
    devices: the devices to use; all local devices by default. With those of several processes the examples and the
      results are global arrays.

  Returns:
    A function of arrays [b, ...] with the same signature.

  Raises:
    ValueError: (when called) a leading size differs or is not divisible by the number of devices.

  Example:
    >>> draw = pmap_examples(lambda scale, keys: scale * jax.vmap(jax.random.normal)(keys), jax.local_devices()[:1])
    >>> draw(2.0, jax.random.split(jax.random.key(0), 4)).shape
    (4,)
  """
  mesh = pmap_mesh(jax.local_devices() if devices is None else devices)
  mapped = pmap(lambda params, examples: fn(params, *examples), mesh, in_axes=(None, 0), out_axes=0, donate=False)

  def split(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(mesh.size, -1, *leaf.shape[1:]), tree)

  def merge(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

  if process_count(mesh) > 1:
    split, merge = (jax.jit(reshape, out_shardings=batch_sharding(mesh)) for reshape in (split, merge))

  def sharded(params: PyTree, *examples: PyTree) -> Any:
    check_divisible(mesh, examples, "examples")
    return merge(mapped(params, split(examples)))

  return sharded
