"""What the compiler says of one train step, a JSON line: FLOPs, bytes, memory, collectives; nothing is allocated.

    python experiments/scaling/measure.py --net=dit --depth=2 --remat=full --devices=16 --fsdp=8 --platform=tpu

`--platform=cpu` compiles for simulated devices. `--platform=tpu` compiles for TPU v5p without having one; it needs
`pip install libtpu` in the version that this jax asks for (`jax[tpu]`).
"""

import argparse
import functools
import json
import os
from time import perf_counter
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--net", choices=("unet", "dit"), required=True)
parser.add_argument("--depth", type=int, required=True, help="residual blocks a level, or layers")
parser.add_argument("--width", type=int, help="channels at full resolution, or of the transformer")
parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--fsdp", type=int, default=1)
parser.add_argument("--batch", type=int, default=8, help="examples a device")
parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
parser.add_argument("--dtype", default="bfloat16")

SLICES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}
# Least effort: a third of the time, and the same memory and bytes within a tenth (README).
QUICK = {"exec_time_optimization_effort": -1.0}
SHAPES = {"unet": (64, 64, 3), "dit": (32, 32, 4)}


def network(net: str, depth: int, width: int | None, remat: str, dtype: str) -> Any:
  """The network of ADM at 64 x 64, or DiT-XL/2."""
  from dit import DiT

  from jaxdiff.models import UNet

  if net == "dit":
    width = width or 1152
    return DiT(depth=depth, width=width, heads=max(1, width // 72), dtype=dtype, remat=remat)
  return UNet(
    channels=width or 192,
    channel_multipliers=(1, 2, 3, 4),
    blocks=depth,
    attention_levels=(1, 2, 3),
    heads=6 if width is None else 2,
    groups=32 if width is None else 4,
    dtype=dtype,
    remat=remat,
  )


def mesh_of(devices: int, fsdp: int, platform: str) -> Any:
  """A mesh of simulated devices, or of those of a TPU slice that is not there."""
  import jax
  from jax.experimental import topologies

  from jaxdiff import parallel

  if platform == "cpu":
    return parallel.make_mesh(jax.devices()[:devices], fsdp=fsdp)
  name = SLICES[min(size for size in SLICES if size >= devices)]
  chips = topologies.get_topology_desc(platform="tpu", topology_name=f"v5p:{name}").devices
  return parallel.make_mesh(chips[:devices], fsdp=fsdp)


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Compiles the train step of denoising score matching with Adam and reads off what it costs each device."""
  import jax
  import jax.numpy as jnp
  import optax
  from collectives import collectives

  import jaxdiff as jd
  from jaxdiff import parallel, training

  mesh, shape = mesh_of(args.devices, args.fsdp, args.platform), SHAPES[args.net]
  net, optimizer = network(args.net, args.depth, args.width, args.remat, args.dtype), optax.adam(1e-4)
  denoising = jd.losses.denoising(jd.VP(), jd.predictions.noise())

  def objective(params: Any, key: jax.Array, batch: Any) -> Any:
    return denoising(key, batch["x"], functools.partial(net.apply, params), u=batch["u"])

  def init() -> Any:
    key = jax.random.key(0)
    return training.init_state(net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1)), optimizer, key)

  batch = args.batch * args.devices
  split = parallel.batch_sharding(mesh)
  examples = {"x": jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=split)}
  index = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
  launcher = parallel.jit_launcher(mesh)
  state, started = launcher.abstract(init), perf_counter()
  step = launcher.compile(training.make_train_step(objective, optimizer, 0.999, batch))
  lowered = step.lower(state, examples, index)
  traced = perf_counter()
  compiled = lowered.compile(QUICK if args.platform == "tpu" else {})
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  sums: dict[str, int] = {}
  for found in collectives(compiled.as_text(), args.devices):
    name = f"{found.kind} {'neighbours' if found.neighbours else 'strided'} {found.group}"
    sums[name] = sums.get(name, 0) + found.size
  return vars(args) | {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    "flops": cost["flops"],
    "bytes": cost["bytes accessed"],
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "collectives": sums,
    "trace_seconds": round(traced - started, 1),
    "compile_seconds": round(perf_counter() - traced, 1),
    "jax": jax.__version__,
  }


def main() -> None:
  args = parser.parse_args()
  os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices), "TPU_SKIP_MDS_QUERY": "1"}
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  print(json.dumps(measure(args)), flush=True)


if __name__ == "__main__":
  main()
