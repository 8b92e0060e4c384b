"""The noise of the training loss: its standard deviation from batch to batch at fixed, trained parameters.

    python experiments/objectives/variance.py RUNS SEED

For the two variational diffusion runs also with the schedules exchanged: the same network under the learned and under
the straight schedule, so that the difference is the schedule's alone. All in bits per dimension, over 400 batches of
128 training digits, with stratified times and, beside it, for one example at one independent time.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxdiff.cli  # before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import factory, objectives, rundir
from jaxdiff.losses import times

BATCHES, BATCH = 400, 128


def spread(objective: Callable[..., Any], params: Any, x: np.ndarray) -> tuple[float, float, float]:
  """(mean, standard deviation of the mean of a batch, standard deviation of one example), nats per dimension."""

  @jax.jit
  def losses(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    pick, noise, offset, alone = jax.random.split(key, 4)
    batch = jnp.asarray(x)[jax.random.choice(pick, len(x), (BATCH,), replace=False)]
    keys = jd.example_keys(noise, 0, BATCH)
    stratified = times.stratified(jax.random.uniform(offset), jnp.arange(BATCH), BATCH)
    value = lambda u: objective(params, keys, {"x": batch, "u": u})[1]["loss_per_dim"]
    return value(stratified).mean(), value(jax.random.uniform(alone, (BATCH,)))

  means, singles = map(np.asarray, jax.lax.map(losses, jax.random.split(jax.random.key(7), BATCHES)))
  return float(means.mean()), float(means.std(ddof=1)), float(singles.std(ddof=1))


def main() -> None:
  runs, seed = Path(sys.argv[1]), sys.argv[2]
  loaded = {}
  for name in ("vdm_learned", "vdm_straight", "vp_likelihood", "vp_simple"):
    config = factory.read(runs / f"{name}-{seed}" / "config.json")
    source, params, _ = rundir.load(runs / f"{name}-{seed}", config)
    loaded[name] = config, source, params
  config, source, params = loaded["vdm_learned"]
  network = {"network": loaded["vdm_straight"][2], "gamma": params["gamma"]}
  loaded["vdm_straight, learned schedule"] = config, source, network
  loaded["vdm_learned, straight schedule"] = loaded["vdm_straight"][0], source, params["network"]
  print(f"{'':32} {'loss':>8} {'batch s.d.':>11} {'example s.d.':>13}   (bits/dim)")
  for name in sorted(loaded):
    config, source, params = loaded[name]
    x = source.gather(np.arange(len(source)))["x"]
    values = spread(objectives.make_objective(config, source), params, x)
    mean, batch, single = (value / np.log(2) for value in values)
    print(f"{name:32} {mean:8.4f} {batch:11.4f} {single:13.4f}", flush=True)


if __name__ == "__main__":
  main()
