"""Exact moments of a sampler on Gaussian data, where every step is affine in its state and its noises."""

import itertools
from typing import Any, NamedTuple
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


def step_maps(sampler, nodes, score, d, draws=1):
  """Every step x' = slope x + shift + noise z over these nodes, of a sampler without memory: each [steps, d].

  The step is run for x = 0 and x = 1 without noise, then for x = 0 with a unit of one noise after the other; what it
  draws in a loop counts as one draw. To be called within jit.
  """

  def step(node):
    x = jnp.zeros((2 + draws, d)).at[1].set(1)
    with unit_noise(first=2):
      field, keys = Field(sampler.sde, score, {}), jd.example_keys(jax.random.key(0), 0, 2 + draws)
      return sampler.method.step(field, x, (), node, keys)[0]

  ends = jax.vmap(step)(nodes)
  noise = jnp.sqrt(jnp.sum((ends[:, 2:] - ends[:, :1]) ** 2, axis=1))
  return ends[:, 1] - ends[:, 0], ends[:, 0], noise


def affine_steps(sampler, score, d, draws=1):
  """`step_maps` of all steps of a sampler."""
  return jax.jit(lambda nodes: step_maps(sampler, nodes, score, d, draws))(sampler.method.nodes)


class Walk(NamedTuple):
  """The maps of the steps of a sampler, and alpha [2] and the exact mean and variance [2, d] at its ends."""

  maps: tuple
  alpha: Any
  means: Any
  variances: Any


def walks(samplers, data, draws=1):
  """The walks of samplers that differ in their grids alone; to be called within jit, which vmaps one step."""
  nodes = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(sampler.method.nodes for sampler in samplers))
  maps = step_maps(samplers[0], nodes, data.score(samplers[0].sde), len(data.mean), draws)
  found, start = [], 0
  for sampler in samplers:
    end = start + len(sampler.ts) - 1
    ends = sampler.ts[jnp.asarray([0, -1])]
    own = tuple(value[start:end] for value in maps)
    found.append(Walk(own, sampler.sde.marginal(ends)[0], *data.moments(sampler.sde, ends)))
    start = end
  return found


def moments(walk, offset=0.0):
  """Mean and variance [d] of the last state, from the exact p_t at the first time, its mean moved by `offset`."""
  mean, variance = walk.means[0] + offset, walk.variances[0]
  for slope, shift, noise in zip(*walk.maps, strict=True):
    mean, variance = slope * mean + shift, slope**2 * variance + noise**2
  return mean, variance


def errors(walk, eta=1.0):
  """The largest errors of mean and variance at the last time, in units of the exact ones, from a mean that is off.

  (Where f = 0 the exact mean is kept without error.) The distance from the exact mean obeys
  d log|m| / dt = f + (1 + eta^2) / 2 g^2 / v, and v' = 2 f v + g^2: it goes as v^((1 + eta^2) / 2) alpha^(-eta^2).
  """
  walk = jax.tree.map(np.asarray, walk)
  offset, (before, after) = np.sqrt(walk.variances[0]), walk.variances
  left = offset * (after / before) ** ((1 + eta**2) / 2) * (walk.alpha[0] / walk.alpha[1]) ** (eta**2)
  mean, variance = moments(walk, offset)
  return np.array([np.max(np.abs(mean - walk.means[1] - left) / left), np.max(np.abs(variance / after - 1))])
