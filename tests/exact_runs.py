"""Runs of exact networks, for tests of the commands: classes of images that are normal distributions.

x_0 of class c is N(mean_c * pattern, SPREAD^2 I). A run is made of its parameters, the means; nothing is trained.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import components, factory, systems
from jaxdiff.commands import transfer

SPREAD = 0.2
MEANS = np.array([-0.6, 0.1, 0.7], np.float32)


def spread_of(x, t):
  """alpha, and the variance of x_t within a class."""
  alpha, sigma = (value.reshape(-1, *(1,) * (x.ndim - 1)) for value in jd.VP().marginal(t))
  return alpha, (alpha * SPREAD) ** 2 + sigma**2


def pattern(x):
  """By what the mean of a class is multiplied from value to value, 1 on average."""
  return jnp.linspace(0.5, 1.5, x[0].size).reshape(*x.shape[1:], 1)


def class_logits(x, t, means):
  """log p(x_t | class) + constant, [b, k]."""
  alpha, variance = spread_of(x, t)
  distance = (x[..., None] - alpha[..., None] * means * pattern(x)) ** 2 / variance[..., None]
  return -0.5 * distance.sum(axis=tuple(range(1, x.ndim)))


class Exact(nn.Module):
  """E[x_0 | x_t, label]; without a label of the mixture; with a text of a mean that its first byte says."""

  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(self, x, t, *, train=False, **cond):
    means = self.param("means", nn.initializers.zeros, (len(MEANS),))
    posterior = jax.nn.softmax(class_logits(x, t, means))
    if "text" in cond:
      mean = (cond["text"][:, 0].astype(jnp.float32) / 128 - 1)[:, None]
      posterior, means = jnp.ones((len(x), 1)), mean
    elif "label" in cond:
      known = jax.nn.one_hot(cond["label"], len(MEANS))
      posterior = jnp.where((cond["label"] < len(MEANS))[:, None], known, posterior)
    alpha, variance = spread_of(x, t)
    means = jnp.broadcast_to(means, posterior.shape)[:, None, None, None] * pattern(x)
    denoised = means + (alpha * SPREAD**2 / variance)[..., None] * (x[..., None] - alpha[..., None] * means)
    return (denoised * posterior[:, None, None, None]).sum(axis=-1)


class ExactClassifier(nn.Module):
  """The posterior of the classes."""

  classes: int
  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(self, x, t, *, train=False, **cond):
    return class_logits(x, t, self.param("means", nn.initializers.zeros, (self.classes,)))


LABEL = {"label": {"type": "label", "classes": 3}}
TEXT = {"text": {"type": "text", "length": 6}}


def config_of(data, conditions=None, drop=0.1):
  return {
    "seed": 0,
    "data": {"type": "npz", "path": str(data), "levels": 16},
    "sde": {"type": "VP"},
    "prediction": {"type": "data"},
    "loss": {"type": "denoising"},
    "network": {"type": "Exact", **({"conditions": conditions} if conditions else {})},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "train": {"batch_size": 8, "steps": 4, "drop_conditions": drop if conditions else 0.0},
    "sampler": {"type": "ddim", "grid": {"steps": 12}},
    "sample": {"num": 16, "batch_size": 16, "trajectories": 2},
    "likelihood": {"rtol": 0.1, "atol": 0.1, "batch_size": 8, "bound_draws": 0, "limit": 8},
    "evaluate": {"num": 16, "batch_size": 16, "features": "raw"},
  }


def classifier_config(data, **changes):
  config = config_of(data)
  config = {name: config[name] for name in ("seed", "data", "sde", "optimizer", "train")}
  parts = {"prediction": {"type": "classes"}, "loss": {"type": "classification"}}
  return config | parts | {"network": {"type": "Classifier", "classes": 3}} | changes


def write_data(path, shape, shift=0):
  """An .npz file of 16 levels with labels."""
  rng, label = np.random.default_rng(0), np.arange(24) % 3
  x = (8 + 8 * MEANS[label][:, None, None, None] + rng.integers(-1, 2, (24, *shape)) + shift).astype(np.uint8)
  np.savez(path, x_train=x, x_test=x[:18], label_train=label, label_test=label[:18])
  return path


def write_run(folder, config, params):
  """The directory of a run with these parameters, as if it had been trained."""
  config = factory.normalize(config)
  systems.check(config)
  transfer._write(config, factory.make_source(config, "train"), params, folder)
  return folder


def make_run(folder, config, means=MEANS):
  return write_run(folder, config, {"params": {"means": jnp.asarray(means)}})


def random_params(config, scale=0.3):
  """Normal numbers in the place of initial parameters, by which many networks are zero."""
  source, rng = factory.make_source(config, "train"), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(scale=scale, size=leaf.shape), leaf.dtype), shapes)


@contextlib.contextmanager
def networks():
  """Within this context configs can name the networks "Exact" and, in the place of the usual one, "Classifier"."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(components.NETWORKS, "Exact", Exact)
    patch.setitem(components.NETWORKS, "Classifier", ExactClassifier)
    yield
