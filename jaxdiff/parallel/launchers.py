"""Two ways to run one train step over a mesh: `jit_launcher` and `pmap_launcher`, with the same methods and results.

```python
launcher = jit_launcher(make_mesh(jax.devices(), fsdp=4))
state = launcher.create(lambda: init_state(network.init(key), optimizer, key))
step_fn, index = launcher.compile(train_step), launcher.put(rows)
for batch in batches:
  state, metrics = step_fn(state, launcher.put(batch), index)
```
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxdiff.parallel.mesh import batch_sharding, check_divisible, examples_spec, process_count, replicated
from jaxdiff.parallel.pmapped import AXIS, pmap, pmap_mesh, whole_sharding
from jaxdiff.parallel.sharding import fsdp_shardings


class Launcher(NamedTuple):
  """How a train step is run.

  Attributes:
    mesh: the devices.
    create: `create(init) -> state`: what the pure `init()` returns, made on the devices where it belongs.
    abstract: `abstract(init) -> state`: the same as `jax.ShapeDtypeStruct` with shardings, for which nothing is
      allocated: what restoring a checkpoint needs.
    put: `put(batch, steps=None) -> batch`: host arrays [b / processes, ...], the rows of this process, as `compile`'s
      function takes them; with steps=k arrays [k, b / processes, ...]. Does not wait for the devices. On CPU the
      devices may share the memory of the host arrays: do not write to them afterwards. ValueError if the global batch
      does not split over the devices.
    compile: `compile(train_step, steps=1) -> step_fn(state, batch, index) -> (state, metrics)`, for the pure
      `train_step(state, batch, index, axis_name=None)`. `batch` and `index` come from `put`, `state` from `create` or
      from a checkpoint; it is donated: its arrays must not be used after the call. The metrics are whole on every
      device. With steps=k one call does k steps on `put(batches, steps=k)` with one and the same `index`, and every
      metric is [k]; this saves the host's share of a step where the step takes less than a few milliseconds. On CPU the
      k steps are compiled one after the other, which takes k times as long, since a loop is 20 times slower there.
  """

  mesh: Mesh
  create: Callable[[Callable[[], PyTree]], PyTree]
  abstract: Callable[[Callable[[], PyTree]], PyTree]
  put: Callable[..., PyTree]
  compile: Callable[..., Callable[..., tuple[Any, Any]]]


def jit_launcher(mesh: Mesh) -> Launcher:
  """Runs train steps as one global program by `jax.jit`, with state in parts over the axis "fsdp".

  Parameters, averages and optimizer state lie as `fsdp_shardings` says: the parameters are gathered where they are
  used, the optimizer state never is (unless the optimizer itself couples the entries of a matrix, as Muon does). For
  this the train step has to use `gathered` inside its loss, as that of `jaxdiff.training` does.

  Args:
    mesh: a mesh from `make_mesh`, over the devices of one process or of all.

  Returns:
    The launcher. Its `create` and `abstract` raise ValueError if the size of "fsdp" divides no dimension of the state.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff.parallel.mesh import make_mesh
    >>> launcher = jit_launcher(make_mesh(jax.local_devices()[:1]))
    >>> train_step = lambda state, batch, index: (state + batch.sum(), {"loss": batch.mean()})
    >>> state, metrics = launcher.compile(train_step)(
    ...   launcher.create(lambda: jnp.float32(1.0)),
    ...   launcher.put(np.ones(4, np.float32)),
    ...   launcher.put(np.arange(4)),
    ... )
    >>> float(state), float(metrics["loss"])
    (5.0, 1.0)
  """

  def abstract(init: Callable[[], PyTree]) -> PyTree:
    shapes = jax.eval_shape(init)
    return jax.tree.map(_placed, shapes, fsdp_shardings(mesh, shapes))

  def create(init: Callable[[], PyTree]) -> PyTree:
    return jax.jit(init, out_shardings=fsdp_shardings(mesh, jax.eval_shape(init)))()

  def put(batch: PyTree, steps: int | None = None) -> PyTree:
    check_divisible(mesh, batch, "batch", steps=steps, processes=process_count(mesh))
    sharding = _batches_sharding(mesh, 1 if steps is None else 2)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)

  def compile(train_step: Callable, steps: int = 1) -> Callable[..., tuple[Any, Any]]:
    def placed(state: PyTree, batch: PyTree, index: PyTree) -> tuple[Any, Any]:
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state, metrics = train_step(state, batch, index)
      return jax.lax.with_sharding_constraint(state, fsdp_shardings(mesh, state)), metrics

    split = _batches_sharding(mesh, 1 if steps == 1 else 2)
    return jax.jit(
      _several(placed, steps, mesh),
      in_shardings=(None, split, batch_sharding(mesh)),
      out_shardings=(None, replicated(mesh)),
      donate_argnums=0,
    )

  return Launcher(mesh, create, abstract, put, compile)


def pmap_launcher(devices: Sequence[jax.Device] | None = None) -> Launcher:
  """Runs train steps as one program a device by `jax.pmap`, with a whole state on every device.

  `jax.pmap(train_step, in_axes=(None, 0, 0), out_axes=None)`: the state has no axis of devices; `put` gives arrays
  [local devices, b / devices, ...] (with steps=k [local devices, k, b / devices, ...]). With several processes pmap
  handles every array of the state on the host, about 0.05 ms each and call: take `jit_launcher` where that counts.

  Args:
    devices: the devices of one process or of all; by default those of all.

  Returns:
    The launcher.

  Example:
    >>> pmap_launcher(jax.local_devices()[:1]).put(np.zeros((4, 3))).shape
    (1, 4, 3)
  """
  mesh = pmap_mesh(jax.devices() if devices is None else devices)
  whole, processes = whole_sharding(mesh), process_count(mesh)
  local = NamedSharding(mesh.local_mesh, examples_spec(mesh))

  def abstract(init: Callable[[], PyTree]) -> PyTree:
    return jax.tree.map(lambda leaf: _placed(leaf, whole), jax.eval_shape(init))

  def create(init: Callable[[], PyTree]) -> PyTree:
    return jax.jit(init, out_shardings=whole)()

  def put(batch: PyTree, steps: int | None = None) -> PyTree:
    check_divisible(mesh, batch, "batch", steps=steps, processes=processes)

    def split(leaf: np.ndarray) -> np.ndarray:
      lead = () if steps is None else (steps,)
      leaf = leaf.reshape(*lead, mesh.size // processes, -1, *leaf.shape[len(lead) + 1 :])
      return np.moveaxis(leaf, len(lead), 0)

    return jax.device_put(jax.tree.map(split, batch), local)

  def compile(train_step: Callable, steps: int = 1) -> Callable[..., tuple[Any, Any]]:
    several = _several(functools.partial(train_step, axis_name=AXIS), steps, mesh)
    return pmap(several, mesh, in_axes=(None, 0, 0), out_axes=None, donate=True)

  return Launcher(mesh, create, abstract, put, compile)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batches_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  return NamedSharding(mesh, P(*[None] * (rank - 1), *examples_spec(mesh)))


def _several(train_step: Callable, steps: int, mesh: Mesh) -> Callable[..., tuple[Any, Any]]:
  """`train_step`, or what does it `steps` times, each time on one of the batches [steps, ...]."""
  if steps < 1:
    raise ValueError(f"steps={steps!r}: must be at least 1")
  if steps == 1:
    return train_step
  # XLA's CPU backend runs the convolutions of a loop body on one thread, without its fast kernels.
  unroll = steps if mesh.devices.flat[0].platform == "cpu" else 1

  def several(state: PyTree, batches: PyTree, index: PyTree) -> tuple[Any, Any]:
    return jax.lax.scan(lambda state, batch: train_step(state, batch, index), state, batches, unroll=unroll)

  return several
