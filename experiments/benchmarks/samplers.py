"""What the samplers add to the network: wall time over that of their network evaluations alone, at 32x32x3.

    python experiments/benchmarks/samplers.py

Each sampler on a grid takes `--evaluations` network evaluations, and is timed against one jitted loop of as many bare
evaluations, in turns within one process, as in overhead.py. The memory that the compiled program needs beside its
arguments is given for as many steps and for ten times as many: it must not grow.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

from overhead import evaluations, in_turns

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import components, schema
from jaxdiff.models import UNet

TARGET = 1.03
SHAPE = (32, 32, 3)
PER_STEP = {"stochastic_heun": 2, "predictor_corrector": 2, "dpm_solver": 2, "edm": 2}
ON_A_GRID = [kind for kind in components.SAMPLERS if "grid" in schema.subsections("sampler", {"type": kind})]


def make(kind: str, sde: Any, count: int) -> Any:
  """The sampler of this name in as many steps as take `count` evaluations."""
  first = {"forward": sde} if kind == "ancestral" else {"sde": sde}
  last = {"denoise": False} if kind == "predictor_corrector" else {}
  return components.SAMPLERS[kind](**first, ts=jd.time_grid(sde, count // PER_STEP.get(kind, 1)), **last)


def program(sampler: Any, apply: Callable[..., jax.Array], sde: Any) -> Any:
  """The jitted function of (params, x)."""
  key, prediction = jax.random.key(0), jd.predictions.noise()
  return jax.jit(lambda params, x: sampler(key, x, jd.score_fn(apply, params, sde, prediction)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--evaluations", type=int, default=12)
  parser.add_argument("--channels", type=int, default=32, help="of the U-Net, which is what an evaluation costs")
  parser.add_argument("--samplers", nargs="+", choices=ON_A_GRID, default=ON_A_GRID)
  options = parser.parse_args()
  sde, count = jd.VP(), options.evaluations
  net = UNet(channels=options.channels, channel_multipliers=(1, 2), blocks=1)
  x = sde.prior_sample(jax.random.key(1), (options.batch, *SHAPE))
  params = jax.jit(net.init)(jax.random.key(2), x[:1], jnp.ones(1))
  runs = {kind: program(make(kind, sde, count), net.apply, sde) for kind in options.samplers}
  for kind, run in runs.items():
    nfe = int(run(params, x).nfe[0])
    if nfe != count:
      raise SystemExit(f"{kind} took {nfe} evaluations where {count} were due")
  bare = evaluations(net.apply, params, x, count)["loop"]
  print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}; ", end="")
  print(f"batch {options.batch}, {count} evaluations, median (quartiles) of {options.turns} turns")
  print(f"{'':20} {'wall ratio':<22} {'CPU ratio':<22} {'MiB':>6} {'10x':>6}   target {TARGET}")
  for kind, run in runs.items():
    times = in_turns({"jaxdiff": lambda run=run: run(params, x), "bare": bare}, options.turns)
    ratios = np.percentile(times["jaxdiff"] / times["bare"], [25, 50, 75], axis=0)
    wall, cpu = (f"{middle:6.3f} ({low:.3f}-{high:.3f})" for low, middle, high in ratios.T)
    longer = program(make(kind, sde, 10 * count), net.apply, sde)
    memory = [f.lower(params, x).compile().memory_analysis().temp_size_in_bytes / 2**20 for f in (run, longer)]
    print(f"{kind:<20} {wall:<22} {cpu:<22} {memory[0]:6.1f} {memory[1]:6.1f}", flush=True)
  print(f"bare: {1e3 * np.median(times['bare'][:, 0]) / count:.0f} ms an evaluation")


if __name__ == "__main__":
  main()
