"""Denoising diffusion GANs on 25 Gaussians: which modes chains of T = 1, 2, 4 steps find. modes.png and a table.

    python experiments/denoising_gan/modes.py [--chains 4 1] [--seeds 0 1] [--steps 20000] [--out FOLDER]

The data are 25 Gaussians of standard deviation 0.3 on a grid of spacing 4, all equally likely. Everything but the
number T of steps of the chain is the same for all: networks, optimizers, batch, number of training steps. Of 10,000
samples one belongs to the nearest mode, and is good where it lies within 4 standard deviations of it (99.97 % of the
data do); a mode is found by 20 good samples, of 400 to be expected. The distance is the total variation between the
shares of the modes among the good samples and 1 / 25 each (0.02 for as many data).
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

import jaxdiff as jd
from jaxdiff.models import MLP, VectorDiscriminator, conditioning
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

matplotlib.use("Agg")
from matplotlib import pyplot

SPACING, STD = 4.0, 0.3
CENTERS = SPACING * (np.indices((5, 5)).reshape(2, -1).T - 2.0)
LATENT, BATCH, CHUNK, SAMPLES = 4, 256, 500, 10_000
FAR, LEAST = 4.0, 20

GENERATOR = MLP(width=64, depth=3, max_frequency=20.0, conditions={"latent": conditioning.Embedding(LATENT)})
DISCRIMINATOR = VectorDiscriminator(width=64, depth=3, max_frequency=20.0)


class Found(NamedTuple):
  """What samples have of the data: modes, the share of good ones, the distance of the shares of the modes."""

  modes: int
  good: float
  distance: float


def data(key: Array, count: int) -> Array:
  """Points `[count, 2]`."""
  pick, noise = jax.random.split(key)
  centers = jnp.asarray(CENTERS, jnp.float32)[jax.random.randint(pick, (count,), 0, len(CENTERS))]
  return centers + STD * jax.random.normal(noise, (count, 2))


def found(points: np.ndarray) -> Found:
  """Counts the modes of points `[n, 2]`."""
  distance = np.linalg.norm(points[:, None] - CENTERS, axis=-1)
  good = distance.min(axis=1) < FAR * STD
  counts = np.bincount(distance.argmin(axis=1)[good], minlength=len(CENTERS))
  shares = counts / max(1, counts.sum())
  return Found(int(np.sum(counts >= LEAST)), float(good.mean()), float(0.5 * np.abs(shares - 1 / len(CENTERS)).sum()))


def parameters(key: Array) -> dict[str, Any]:
  """Of both networks, before training."""
  generator, discriminator = jax.random.split(key)
  x, t, z = jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros((1, LATENT))
  return {
    "generator": GENERATOR.init(generator, x, t, latent=z),
    "discriminator": DISCRIMINATOR.init(discriminator, x, t, x_t=x),
  }


def optimizer(steps: int) -> optax.GradientTransformation:
  """Adam without momentum, the discriminator's twice as fast; both rates fall to 0 along half a cosine."""
  adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.0, b2=0.99)
  label = lambda name, group: jax.tree.map(lambda _: name, group)
  return optax.partition(
    {"generator": adam(1e-3), "discriminator": adam(2e-3)},
    lambda params: {name: label(name, group) for name, group in params.items()},
  )


def trained(chain: jd.ddpm.Chain, seed: int, steps: int) -> np.ndarray:
  """Samples `[SAMPLES, 2]` of the averaged generator after that many steps of training."""
  loss = jd.losses.denoising_gan(chain, LATENT, r1=1e-3, r1_every=8)
  update = optimizer(steps)
  init_key, run_key, data_key, sample_key = jax.random.split(jax.random.key(seed), 4)

  def objective(params: Any, keys: Array, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    networks = {"generator": GENERATOR, "discriminator": DISCRIMINATOR}
    players = jd.losses.Players(**{name: Partial(net.apply, params[name]) for name, net in networks.items()})
    return loss(keys, batch["x"], players, u=batch["u"], step=batch["step"][0])

  train_step = make_train_step(objective, update, ema_decay=0.999, global_batch=BATCH)

  @functools.partial(jax.jit, donate_argnums=0)
  def chunk(state: Any) -> tuple[Any, Any]:
    def one(state: Any, _: None) -> tuple[Any, Any]:
      return train_step(state, {"x": data(jax.random.fold_in(data_key, state.step), BATCH)}, jnp.arange(BATCH))

    state, metrics = jax.lax.scan(one, state, None, length=CHUNK)
    return state, jax.tree.map(jnp.mean, metrics)

  @jax.jit
  def draw(params: Any) -> Array:
    prior, path = jax.random.split(sample_key)
    x_T = chain.sde().prior_sample(prior, (SAMPLES, 2))
    return jd.samplers.denoising_gan(chain, LATENT)(path, x_T, Partial(GENERATOR.apply, params["generator"])).x

  state = init_state(parameters(init_key), update, run_key)
  for i in range(steps // CHUNK):
    state, metrics = chunk(state)
    if (i + 1) % 10 == 0:
      losses = {name: round(float(metrics[name]), 3) for name in ("generator_loss", "discriminator_loss", "r1")}
      print(chain.steps, seed, CHUNK * (i + 1), found(np.asarray(draw(state.ema_params))), losses, flush=True)
  return np.asarray(draw(state.ema_params))


def row(chain: Any, seed: Any, points: np.ndarray) -> str:
  """A row of the table."""
  count = found(points)
  return f"| {chain} | {seed} | {count.modes} | {100 * count.good:.1f} % | {count.distance:.3f} |"


def draw(points: dict[str, np.ndarray], out: Path) -> None:
  """One panel for each entry."""
  figure, axes = pyplot.subplots(1, len(points), figsize=(3.4 * len(points), 3.6), layout="constrained", squeeze=False)
  for axis, (name, x) in zip(axes[0], points.items(), strict=True):
    count = found(x)
    axis.plot(*x[:5000].T, ",", alpha=0.6)
    axis.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(f"{name}: {count.modes} modes, {100 * count.good:.0f} % good", fontsize=10)
  figure.savefig(out / "modes.png", dpi=100)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chains", type=int, nargs="+", default=[4, 1], help="numbers T of steps")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
  parser.add_argument("--steps", type=int, default=20_000, help="of training")
  parser.add_argument("--runs", type=Path, default=Path("runs/denoising_gan"), help="where samples are kept")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent)
  flags = parser.parse_args()
  flags.runs.mkdir(parents=True, exist_ok=True)
  shown = {"data": np.asarray(data(jax.random.key(99), SAMPLES))}
  rows = [row("data", "", shown["data"])]
  for steps in flags.chains:
    for seed in flags.seeds:
      file, start = flags.runs / f"T{steps}_seed{seed}_{flags.steps}.npy", time.time()
      if not file.exists():
        np.save(file, trained(jd.ddpm.Chain(jd.ddpm.vp_betas(steps)), seed, flags.steps))
        print(f"{time.time() - start:.0f} seconds", flush=True)
      points = np.load(file)
      shown.setdefault(f"T = {steps}", points)
      rows.append(row(steps, seed, points))
  print("\n".join(rows))
  draw(shown, flags.out)


if __name__ == "__main__":
  main()
