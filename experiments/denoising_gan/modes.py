"""Denoising diffusion GANs of 1, 2, 4 and 8 steps on 25 Gaussians: which modes they find. modes.png, modes.jsonl.

    python experiments/denoising_gan/modes.py [--chain-steps 1 2 4 8] [--seeds 0 1 2] [--steps 20000] [--out FOLDER]

The data are 25 Gaussians of standard deviation 0.035 on a grid of spacing 0.7, all equally likely: mean 0, variance 1.
Everything but the number of steps T of the chain is the same for all: networks, optimizers, batch, training steps. Of
10,000 samples a point belongs to the nearest mode, and is good where it lies within 4 standard deviations of it
(99.97 % of the data do); a mode is found by 20 good points, of 400 to be expected. The distance of the shares is the
total variation between the modes' shares of the good points and 1 / 25 (data: 0.04).
"""

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array

import jaxdiff as jd
from jaxdiff.models import MLP, VectorDiscriminator, conditioning
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

matplotlib.use("Agg")

SPACING, STD = 2.0, 0.1
CENTERS = SPACING * (np.indices((5, 5)).reshape(2, -1).T - 2.0)
LATENT, BATCH, CHUNK, SAMPLES = 4, 256, 500, 10_000
FAR, LEAST = 4.0, 20

GENERATOR = MLP(width=128, depth=2, max_frequency=20.0, conditions={"latent": conditioning.Embedding(LATENT)})
DISCRIMINATOR = VectorDiscriminator(width=128, depth=2, max_frequency=20.0)


class Found(NamedTuple):
  """What 10,000 samples have of the data."""

  modes: int
  good: float
  distance: float


def data(key: Array, count: int) -> Array:
  """Points `[count, 2]`."""
  pick, noise = jax.random.split(key)
  centers = jnp.asarray(CENTERS, jnp.float32)[jax.random.randint(pick, (count,), 0, len(CENTERS))]
  return centers + STD * jax.random.normal(noise, (count, 2))


def found(points: np.ndarray) -> Found:
  """Modes found, the share of good points, the distance of the modes' shares from equal ones."""
  distance = np.linalg.norm(points[:, None] - CENTERS, axis=-1)
  good = distance.min(axis=1) < FAR * STD
  counts = np.bincount(distance.argmin(axis=1)[good], minlength=len(CENTERS))
  shares = counts / max(1, counts.sum())
  return Found(int(np.sum(counts >= LEAST)), float(good.mean()), float(0.5 * np.abs(shares - 1 / len(CENTERS)).sum()))


def parameters(key: Array) -> dict[str, Array]:
  """Of both networks, before training."""
  generator, discriminator = jax.random.split(key)
  x, t, z = jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros((1, LATENT))
  return {
    "generator": GENERATOR.init(generator, x, t, latent=z),
    "discriminator": DISCRIMINATOR.init(discriminator, x, t, x_t=x),
  }


def optimizer(steps: int, rate: float) -> optax.GradientTransformation:
  """Adam without momentum for each, the discriminator's twice as fast; both rates fall along half a cosine."""
  each = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.5, b2=0.9)
  groups = {"generator": each(rate), "discriminator": each(rate)}
  label = lambda params: {name: jax.tree.map(lambda _: name, group) for name, group in params.items()}
  return optax.partition(groups, label)


def trained(chain_steps: int, seed: int, steps: int, rate: float, r1: float) -> tuple[np.ndarray, dict[str, float]]:
  """Samples `[SAMPLES, 2]` of the averaged generator, and the last losses."""
  chain = jd.ddpm.Chain(jd.ddpm.vp_betas(chain_steps))
  loss = jd.losses.denoising_gan(chain, LATENT, r1=r1, r1_every=8)
  partial = jax.tree_util.Partial

  def objective(params, keys, batch):
    generator = partial(GENERATOR.apply, params["generator"])
    players = jd.losses.Players(generator, partial(DISCRIMINATOR.apply, params["discriminator"]))
    return loss(keys, batch["x"], players, u=batch["u"], step=batch["step"][0])

  update = optimizer(steps, rate)
  key, data_key, sample_key = jax.random.split(jax.random.key(seed), 3)
  state = init_state(parameters(key), update, key)
  train_step = make_train_step(objective, update, ema_decay=0.999, global_batch=BATCH)

  @jax.jit
  def chunk(state):
    def one(state, _):
      x = data(jax.random.fold_in(data_key, state.step), BATCH)
      return train_step(state, {"x": x}, jnp.arange(BATCH))

    return jax.lax.scan(one, state, None, length=CHUNK)

  @jax.jit
  def draw(params):
    prior, path = jax.random.split(sample_key)
    x_T = chain.sde().prior_sample(prior, (SAMPLES, 2))
    return jd.samplers.denoising_gan(chain, LATENT)(path, x_T, partial(GENERATOR.apply, params["generator"])).x

  for i in range(steps // CHUNK):
    state, metrics = chunk(state)
    if (i + 1) % 10 == 0:
      means = {name: round(float(jnp.mean(value)), 3) for name, value in metrics.items()}
      print(chain_steps, seed, (i + 1) * CHUNK, found(np.asarray(draw(state.ema_params))), means, flush=True)
  return np.asarray(draw(state.ema_params)), {name: float(jnp.mean(value)) for name, value in metrics.items()}


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--T", type=int, nargs="+", default=[4, 1])
  parser.add_argument("--steps", type=int, default=10000)
  parser.add_argument("--rate", type=float, default=5e-4)
  parser.add_argument("--r1", type=float, default=0.05)
  parser.add_argument("--seed", type=int, default=0)
  a = parser.parse_args()
  for T in a.T:
    start = time.time()
    points, _ = trained(T, a.seed, a.steps, a.rate, a.r1)
    print("FINAL", T, found(points), time.time() - start, flush=True)
