"""A small classifier of the run's own images: its features are what FD-cnn compares where no network is given.

It is trained anew with a fixed seed, in seconds: the same data give the same features on one kind of device.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxdiff.typing import Params

FEATURES = 64
_STEPS, _BATCH, _RATE = 400, 128, 2e-3


class Classifier(nn.Module):
  """Three convolutions, a layer of 64 features, a linear layer: images [b, h, w, c] in [-1, 1] -> (features, logits).

  The features have the root mean square 1, which bounds the distances.

  Attributes:
    classes: how many.
  """

  classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b 64"], Float[Array, "b classes"]]:
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
      x = nn.silu(nn.Conv(channels, (3, 3), (stride, stride))(x))
    features = nn.RMSNorm(use_scale=False)(nn.silu(nn.Dense(FEATURES)(x.reshape(len(x), -1))))
    return features, nn.Dense(self.classes)(features)


def fit(images: Float[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"], seed: int) -> Params:
  """Train a classifier by 400 Adam steps on the cross-entropy of 128 images, the rate falling to 0 by a cosine.

  Args:
    images: in [-1, 1].
    labels: 0..classes-1.
    seed: of the parameters and the order of the images.

  Returns:
    Parameters of `Classifier(classes)`, classes being the largest label plus one.
  """
  model, order = Classifier(int(labels.max()) + 1), np.random.default_rng(seed)
  optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

  def loss(params: Params, x: Array, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x)[1], label).mean()

  @jax.jit
  def step(params: Params, state: optax.OptState, x: Array, label: Array) -> tuple[Params, optax.OptState]:
    updates, state = optimizer.update(jax.grad(loss)(params, x, label), state)
    return optax.apply_updates(params, updates), state

  params = jax.jit(model.init)(jax.random.key(seed), jnp.asarray(images[:1]))
  state = optimizer.init(params)
  for _ in range(_STEPS):
    rows = order.integers(len(images), size=_BATCH)
    params, state = step(params, state, images[rows], labels[rows])
  return params
