"""What guidance adds to the network: wall time of guided DDIM over that of the evaluations it needs, at 32x32x3.

    python experiments/benchmarks/guidance.py

Each is timed against one jitted loop of what it needs at least, in turns within one process, as in overhead.py:
classifier-free guidance against as many bare evaluations of twice the batch, and also of two calls one after the other;
PiGDM and DPS against as many evaluations with a vector-Jacobian product.
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
from jaxdiff.models import UNet, conditioning

TARGET = 1.05
SHAPE = (32, 32, 3)


def guided(name: str, score: Any, sde: Any, steps: int, null: Any) -> tuple[Any, Any]:
  """A sampler and a score that it takes."""
  ddim, operator = jd.samplers.ddim(sde, jd.time_grid(sde, steps)), jd.inverse.downsample(4)
  if name == "dps":
    return jd.inverse.dps(ddim, operator), score
  if name == "pigdm":
    return ddim, jd.inverse.pigdm(score, operator)
  scale = 2.0 if name == "classifier_free" else jd.guidance.interval(sde, 2.0, 0.2, 5.0)
  return ddim, jd.guidance.classifier_free(score, null, scale)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--steps", type=int, default=12)
  options = parser.parse_args()
  sde, conditions = jd.VP(), {"label": conditioning.Label(10)}
  net = UNet(channels=32, channel_multipliers=(1, 2), blocks=1, conditions=conditions)
  x = sde.prior_sample(jax.random.key(1), (options.batch, *SHAPE))
  label = jnp.arange(options.batch) % 10
  params = jax.jit(net.init)(jax.random.key(2), x[:1], jnp.ones(1), label=label[:1])
  apply = lambda params, x, t: net.apply(params, x, t, label=jnp.resize(label, len(x)))

  def with_product(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    value, back = jax.vjp(lambda x: apply(params, x, t), x)
    return back(value)[0]

  def one_after_the_other(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return 2 * apply(params, x, t) - net.apply(params, x, t, label=jnp.full(len(x), 10))

  twice = jnp.concatenate([x, x])
  bare: dict[str, Callable[[], Any]] = {
    name: evaluations(network, params, start, options.steps)["loop"]
    for name, network, start in (
      ("twice the batch", apply, twice),
      ("two calls", one_after_the_other, x),
      ("with a product", with_product, x),
    )
  }
  measured = jnp.zeros((options.batch, 8, 8, 3))
  print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}; ", end="")
  print(f"batch {options.batch}, {options.steps} steps, median (quartiles) of {options.turns} turns; target {TARGET}")
  for name, other in (
    ("classifier_free", "twice the batch"),
    ("classifier_free", "two calls"),
    ("in an interval", "twice the batch"),
    ("pigdm", "with a product"),
    ("dps", "with a product"),
  ):

    def draw(params: Any, x: jax.Array, name: str = name) -> Any:
      score = jd.score_fn(net.apply, params, sde, jd.predictions.noise())
      sampler, score = guided(name, score, sde, options.steps, conditioning.null(conditions))
      told = {"measurement": measured} if name in ("pigdm", "dps") else {}
      return sampler(jax.random.key(0), x, score, {"label": label, **told})

    run = jax.jit(draw)
    times = in_turns({"guided": lambda run=run: run(params, x), "bare": bare[other]}, options.turns)
    ratios = np.percentile(times["guided"] / times["bare"], [25, 50, 75], axis=0)
    wall, cpu = (f"{middle:6.3f} ({low:.3f}-{high:.3f})" for low, middle, high in ratios.T)
    nfe = int(run(params, x).nfe[0])
    print(f"{name:<16} {nfe:>3} evaluations, over {other:<16} wall {wall}   CPU {cpu}", flush=True)


if __name__ == "__main__":
  main()
