"""Fully sharded data parallelism: which dimension of which array lies in parts over the axis "fsdp" (Rajbhandari et al.
2020, "ZeRO: memory optimizations toward training trillion parameter models", stage 3).

Of n devices along the axis each keeps 1/n of the parameters, of their averages and of the optimizer state. XLA gathers
the parameters where a network needs them and scatters the sums of the gradients.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxdiff.parallel.mesh import FSDP_AXIS

# Gathering 16 KiB takes the latency of a collective, about 10 us, in which a link moves a hundred times as much; biases
# and scales of norms are smaller, and together under 1% of a network.
SMALLEST = 2**12


def fsdp_shardings(mesh: Mesh, tree: PyTree, smallest: int = SMALLEST) -> PyTree:
  """The sharding of every array of a train state, by its shape alone, so that moments lie as their parameters.

  An array lies in parts along its largest dimension that the size of "fsdp" divides, the last one of several; arrays
  of fewer than `smallest` elements, scalars, and arrays without such a dimension are whole on every device.

  Args:
    mesh: a mesh from `make_mesh`.
    tree: arrays, or their `jax.ShapeDtypeStruct`.
    smallest: how many elements an array needs to be split.

  Returns:
    A `NamedSharding` for every array.

  Raises:
    ValueError: the size of "fsdp" divides no dimension of any array.

  Example:
    >>> from jaxdiff.parallel.mesh import make_mesh
    >>> mesh = make_mesh(jax.local_devices()[:1])
    >>> fsdp_shardings(mesh, jax.ShapeDtypeStruct((3, 3, 64, 128), "float32")).spec
    P()
  """
  fsdp = mesh.shape[FSDP_AXIS]
  shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
  sizes = {size for shape in shapes for size in shape}
  if not any(size and size % fsdp == 0 for size in sizes) and fsdp > 1:
    raise ValueError(
      f"fsdp={fsdp}: divides no dimension of any parameter, of which the largest is {max(sizes, default=1)}; take "
      f"{_nearest(fsdp, mesh.size, sizes)}"
    )
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, fsdp, smallest)), tree)


def gathered(params: PyTree) -> PyTree:
  """The parameters as a loss uses them: whole on every device, if the train step runs on a mesh with "fsdp".

  The gradient is then the sum over all examples of which every device keeps its part. Left to itself XLA may split a
  network's features instead, since gradients and moments are split, and exchange the activations.

  Args:
    params: what the loss is differentiated by; call this inside of the differentiated function.

  Returns:
    The same values.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get(FSDP_AXIS, 1) == 1 or AxisType.Manual in mesh.axis_types:
    return params
  return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), params)


def _spec(shape: tuple[int, ...], fsdp: int, smallest: int) -> P:
  divisible = [(size, dimension) for dimension, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or not divisible or math.prod(shape) < smallest:
    return P()
  return P(*[None] * max(divisible)[1], FSDP_AXIS)


def _nearest(fsdp: int, devices: int, sizes: set[int]) -> str:
  fitting = [n for n in range(2, fsdp) if devices % n == 0 and any(size % n == 0 for size in sizes)]
  return f"fsdp={max(fitting)}" if fitting else "fsdp=1, which keeps them whole on every device"
