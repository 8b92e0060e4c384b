"""Exact moments of a sampler on Gaussian data, where every step is affine in its state and its noises."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import Field


def unit_noise(first):
  """A patch of `keys.normal`: the j-th draw of a step is 1 for example `first + j`, and 0 for the others."""
  draw = itertools.count(first)
  return mock.patch.object(
    jd.keys, "normal", lambda keys, shape, dtype=jnp.float32: jnp.zeros(shape, dtype).at[next(draw)].set(1)
  )


def affine_steps(sampler, score, d, draws=1):
  """Every step x' = slope x + shift + noise z of a sampler without memory, from its own code: each [steps, d].

  The step is run for x = 0 and x = 1 without noise, then for x = 0 with a unit of one noise after the other; what it
  draws in a loop counts as one draw.
  """

  def step(node):
    x = jnp.zeros((2 + draws, d)).at[1].set(1)
    with unit_noise(first=2):
      field, keys = Field(sampler.sde, score, {}), jd.example_keys(jax.random.key(0), 0, 2 + draws)
      return sampler.method.step(field, x, (), node, keys)[0]

  ends = jax.jit(jax.vmap(step))(sampler.method.nodes)
  noise = jnp.sqrt(jnp.sum((ends[:, 2:] - ends[:, :1]) ** 2, axis=1))
  return ends[:, 1] - ends[:, 0], ends[:, 0], noise


def moments(sampler, data, draws=1, offset=0.0):
  """Mean and variance [d] of the last state, from the exact p_t at the first time, its mean moved by `offset`."""
  sde = sampler.sde
  mean, variance = (np.asarray(v[0]) for v in data.moments(sde, sampler.ts[:1]))
  mean = mean + offset
  steps = affine_steps(sampler, data.score(sde), len(mean), draws)
  for slope, shift, noise in zip(*(np.asarray(v) for v in steps), strict=True):
    mean, variance = slope * mean + shift, slope**2 * variance + noise**2
  return mean, variance


def errors(sampler, data, eta=1.0, draws=1):
  """The largest errors of mean and variance at the last time, in units of the exact ones, from a mean that is off.

  (Where f = 0 the exact mean is kept without error.) The distance from the exact mean obeys
  d log|m| / dt = f + (1 + eta^2) / 2 g^2 / v, and v' = 2 f v + g^2: it goes as v^((1 + eta^2) / 2) alpha^(-eta^2).
  """
  means, variances = (np.asarray(v) for v in data.moments(sampler.sde, sampler.ts[jnp.asarray([0, -1])]))
  alpha = np.asarray(sampler.sde.marginal(sampler.ts)[0])
  offset = np.sqrt(variances[0])
  left = offset * (variances[1] / variances[0]) ** ((1 + eta**2) / 2) * (alpha[0] / alpha[-1]) ** (eta**2)
  mean, variance = moments(sampler, data, draws, offset)
  return np.array([np.max(np.abs(mean - means[1] - left) / left), np.max(np.abs(variance / variances[1] - 1))])
