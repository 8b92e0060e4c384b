"""What the objectives cost: the gradient of each over that of denoising score matching, same network and batch.

    python experiments/benchmarks/objectives.py

Sliced score matching takes a Jacobian-vector product of the network, and its gradient: at most 2.5 denoising gradients
by the project's target. The schedule gradients of variational diffusion should cost nothing. All run in turns in one
process, as in overhead.py.
"""

import argparse
import runpy
from functools import partial
from typing import Any

from overhead import CONFIG, in_turns

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import factory, likelihood

GAMMA = jd.schedules.Gamma(-9.0, 6.0, jd.schedules.monotone_network())
TARGETS = {"sliced, 1 probe": 2.5, "sliced reduced, 1 probe": 2.5}


def losses(process: jd.ScalarSDE) -> dict[str, Any]:
  """Objectives by name; every network output is taken for the score or the noise, which costs the same."""
  noise = jd.predictions.noise(log_snr_time=True)
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
  return {
    "denoising": jd.losses.denoising(process, noise),
    "sliced, 1 probe": jd.losses.sliced(1, sde=process, prediction=noise),
    "sliced reduced, 1 probe": jd.losses.sliced(1, True, process, noise),
    "sliced reduced, 4 probes": jd.losses.sliced(4, True, process, noise),
    "bound": jd.losses.bound(process, noise),
    "vdm": None,
    "ddpm_simple": jd.losses.ddpm_simple(chain, noise),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--turns", type=int, default=12)
  options = parser.parse_args()
  config = factory.normalize(runpy.run_path(str(CONFIG))["get_config"]())
  source = factory.make_source(config, "train")
  module, params = factory.make_network(config), factory.init_params(config, source)
  x = likelihood.dequantize(jax.random.key(0), jnp.asarray(source.gather(np.arange(options.batch))["x"]), source.levels)

  def gradient(loss: Any, trained: Any, key: jax.Array) -> Any:
    def mean(trained: Any) -> jax.Array:
      params, gamma = trained
      objective = loss or jd.losses.vdm(gamma)
      return objective(key, x, partial(module.apply, params))[0].mean()

    return jax.value_and_grad(mean)(trained)

  runs = {name: jax.jit(partial(gradient, loss)) for name, loss in losses(factory.make_process(config)).items()}
  calls = {name: partial(run, (params, GAMMA), jax.random.key(1)) for name, run in runs.items()}
  times = in_turns(calls, options.turns)
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, batch {options.batch}, medians of {options.turns} turns"
  )
  print(f"denoising gradient: {1e3 * np.median(times['denoising'][:, 0]):.0f} ms\n")
  for name in list(times)[1:]:
    low, middle, high = np.percentile(times[name] / times["denoising"], [25, 50, 75], axis=0)[:, 0]
    print(f"{name:<26} {middle:.2f} ({low:.2f}-{high:.2f})   {TARGETS.get(name, '')}")


if __name__ == "__main__":
  main()
