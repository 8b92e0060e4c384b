"""Classification by the conditional bound, argmax_c of L(x | c): a check that conditional bounds mean something.

    python experiments/objectives/classify.py [STEPS]

A small U-Net that is given the class as ten more channels is trained on labelled digits by `losses.bound`, and every
held-out digit goes to the class with the lowest bound, averaged over 32 draws with noise common to all classes.
"""

import sys
from functools import partial
from time import perf_counter
from typing import Any

import jaxdiff.cli  # before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxdiff as jd
from jaxdiff.models import UNet

CLASSES, HELD_OUT, BATCH, DRAWS, LEVELS = 10, 360, 128, 32, 17
GAMMA = jd.schedules.Gamma(-9.0, 6.0)


def main() -> None:
  steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
  digits = load_digits()
  order = jax.random.permutation(jax.random.key(0), len(digits.target))
  images = jnp.asarray(digits.images, jnp.uint8)[order, ..., None]
  labels = jnp.asarray(digits.target)[order]
  (x, unseen), (y, truth) = ((part[HELD_OUT:], part[:HELD_OUT]) for part in (images, labels))
  module = UNet(channels=32, blocks=1, max_frequency=10.0)

  def network(params: Any, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    planes = jnp.broadcast_to(jax.nn.one_hot(label, CLASSES)[:, None, None], (*x.shape[:-1], CLASSES))
    return module.apply(params, jnp.concatenate([x, planes], axis=-1), t)[..., :1]

  loss = jd.losses.bound(jd.VariancePreserving(GAMMA), jd.predictions.noise(log_snr_time=True), levels=LEVELS)
  params = module.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1 + CLASSES)), jnp.zeros(1))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps)))

  @jax.jit
  def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
    pick, noise = jax.random.split(key)
    rows = jax.random.choice(pick, len(x), (BATCH,), replace=False)
    mean = lambda params: loss(noise, x[rows], partial(network, params), {"label": y[rows]})[1]["bits_per_dim"].mean()
    bits, gradient = jax.value_and_grad(mean)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, bits

  state, start = optimizer.init(params), perf_counter()
  for i, key in enumerate(jax.random.split(jax.random.key(2), steps)):
    params, state, bits = step(params, state, key)
    if (i + 1) % 100 == 0:
      print(f"step {i + 1}/{steps}: {bits:.3f} bits/dim, {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

  @jax.jit
  def bound(params: Any, label: jax.Array) -> jax.Array:
    cond = {"label": jnp.full(HELD_OUT, label)}
    return jd.losses.averaged(loss, DRAWS)(jax.random.key(3), unseen, partial(network, params), cond)[1]["bits_per_dim"]

  bounds = jnp.stack([bound(params, label) for label in jnp.arange(CLASSES)])
  right = jnp.argmin(bounds, axis=0) == truth
  own = jnp.take_along_axis(bounds, truth[None], axis=0)[0]
  error = right.std() / HELD_OUT**0.5
  print(f"{HELD_OUT} held-out digits: {100 * right.mean():.1f} +- {100 * error:.1f} % right by the lowest bound")
  print(f"bound on -log2 p(x | own class): {own.mean():.4f} +- {own.std() / HELD_OUT**0.5:.4f} bits/dim")


if __name__ == "__main__":
  main()
