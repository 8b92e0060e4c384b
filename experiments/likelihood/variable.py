"""Which variable to integrate over, which solver, whose steps: evaluations and errors of likelihoods of a trained run.

    python experiments/likelihood/variable.py runs/digits

One probe and one dequantization, the same for every row, so that only the solver differs. The error is against the
same solve at a tolerance of 1e-7 in float64 (of the state and times; a network that computes in float32 does so still).
Evaluations are the network's, each with a Jacobian-vector product: the mean is what the examples need, the largest what
a batch waits for.
"""

import argparse
import math
from pathlib import Path

import jaxdiff.cli  # noqa: F401  before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import divergence, factory, keys, likelihood, rundir

REFERENCE = 1e-7


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--examples", type=int, default=48)
  parser.add_argument("--reference", type=float, default=REFERENCE)
  parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5])
  options = parser.parse_args()
  config = factory.read(options.workdir / "config.json")
  _, params, _ = rundir.load(options.workdir, config)
  held_out, process = factory.make_source(config, "test"), factory.make_process(config)
  score = factory.make_score(config)
  integers = jnp.asarray(held_out.gather(np.arange(options.examples))["x"])
  example = keys.example_keys(jax.random.key(0), 0, len(integers))
  dequantize_key, probe_key = keys.split(example)
  x = likelihood.dequantize(dequantize_key, integers, held_out.levels)
  unit = math.prod(held_out.shape) * math.log(2)

  def evaluate(tolerance: float, dtype=jnp.float32, **how) -> likelihood.LogDensity:
    log_prob = likelihood.log_prob(process, divergence.hutchinson(), tolerance, tolerance, **how)
    run = jax.jit(lambda params, x: log_prob(probe_key, x, score(params)))
    return jax.device_get(run(jax.tree.map(lambda leaf: leaf.astype(dtype), params), x.astype(dtype)))

  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    exact = evaluate(options.reference, jnp.float64, variable="log_snr")
  print(f"{options.workdir.name}: {len(x)} examples, reference {-exact.value.mean() / unit:.4f} bits/dim before levels")
  print(f"{'variable':<9} {'solver':<7} {'steps':<12} {'tolerance':<9} {'nfe mean':>8} {'largest':>8}", end="")
  print(f" {'rms error':>10} {'worst':>9}  bits/dim")
  for tolerance in options.tolerances:
    for how in (
      {"variable": "time"},
      {"variable": "log_snr"},
      {"variable": "log_snr", "solver": "dopri5"},
      {"variable": "log_snr", "steps": "shared"},
    ):
      result = evaluate(tolerance, **how)
      done = result.status.code == 0
      error = (result.value - exact.value)[done] / unit
      print(
        f"{how['variable']:<9} {how.get('solver', 'tsit5'):<7} {how.get('steps', 'per_example'):<12} {tolerance:<9.0e} "
        f"{result.nfe.mean():8.1f} {result.nfe.max():8d} {np.sqrt(np.mean(error**2)):10.6f} {np.abs(error).max():9.6f}"
        + (f"  {np.count_nonzero(~done)} failed" if not done.all() else ""),
        flush=True,
      )


if __name__ == "__main__":
  main()
