"""How many codes held-out digits use: the perplexity of runs of VQVAE and GumbelVAE.

python experiments/autoencoders/usage.py runs/vq_digits runs/gumbel_digits
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import factory, quantization, rundir
from jaxdiff.systems import coding


def counts(workdir: Path) -> jax.Array:
  """How often each code occurs in the held-out data."""
  config = factory.read(workdir / "config.json")
  _, params, _ = rundir.load(workdir, config)
  held_out = factory.make_source(config, "test")
  made = coding.make(config, held_out)
  network, observation = made.network(params["autoencoder"]), made.made.observation
  z = jax.jit(network.encode)(observation.to_state(jnp.asarray(held_out.gather(np.arange(len(held_out)))["x"])))
  if config["network"]["type"] == "VQVAE":
    codes = quantization.nearest(z, network.codebook["vectors"])
  else:
    codes = jnp.argmax(z, axis=-1)
  return quantization.usage(codes, config["network"]["codes"])


def main(workdirs: list[str]) -> None:
  for workdir in workdirs:
    found = counts(Path(workdir))
    used, size = int(jnp.sum(found > 0)), len(found)
    print(f"{workdir}: perplexity {float(quantization.perplexity(found)):.1f} of {size} codes, {used} in use")


if __name__ == "__main__":
  main(sys.argv[1:])
