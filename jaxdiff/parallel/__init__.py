"""Training and sampling over the devices of one process or of many: meshes, shardings, launchers, processes.

A mesh has the axes "data" and "fsdp" (`make_mesh`). Examples are split over both. A train step is one global program
with two launchers: `jit_launcher` (`jax.jit` over the mesh; parameters, averages and optimizer state lie in parts over
"fsdp", XLA inserts what the devices exchange) and `pmap_launcher` (`jax.pmap`; everything but the examples is whole on
every device). Samplers and likelihoods are independent per example and may loop adaptively, so every device runs its
own program on its own examples (`shard_examples`: `jax.shard_map`; `pmap_examples`: `jax.pmap`). Nothing here knows
what is trained or sampled.

Example:
  >>> import jax, jax.numpy as jnp, numpy as np
  >>> mesh = make_mesh()
  >>> batch = shard_batch(mesh, {"x": np.ones((8 * mesh.size, 2), np.float32)})
  >>> scale = shard_examples(lambda params, keys, x: params * x, mesh)
  >>> keys = jax.random.split(jax.random.key(0), 8 * mesh.size)
  >>> scale(jnp.float32(3.0), keys, batch["x"]).shape[1]
  2
"""

from jaxdiff.parallel.examples import pmap_examples, shard_examples
from jaxdiff.parallel.launchers import Launcher, jit_launcher, pmap_launcher
from jaxdiff.parallel.mesh import (
  DATA_AXIS,
  FSDP_AXIS,
  batch_sharding,
  make_mesh,
  replicate,
  replicated,
  shard_batch,
)
from jaxdiff.parallel.processes import gather_json, join, preempted, to_host
from jaxdiff.parallel.sharding import fsdp_shardings, gathered

__all__ = [
  "DATA_AXIS",
  "FSDP_AXIS",
  "Launcher",
  "batch_sharding",
  "fsdp_shardings",
  "gather_json",
  "gathered",
  "jit_launcher",
  "join",
  "make_mesh",
  "pmap_examples",
  "pmap_launcher",
  "preempted",
  "replicate",
  "replicated",
  "shard_batch",
  "shard_examples",
  "to_host",
]
