"""Closed-form answers in phase space: Gaussian data under a process of positions and velocities, and exact moments of
samplers on them."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import Field


def matrices(sde):
  """(A, Q) of du = A u dt + noise of covariance Q dt, of one coordinate, read off `drift` and `diffuse`."""
  unit = jnp.eye(2)[:, None]
  drift, noise = (np.asarray(f)[:, 0].T for f in (sde.drift(unit, 0.3), sde.diffuse(0.3, unit)))
  return drift.astype(np.float64), (noise @ noise.T).astype(np.float64)


def kernel(sde, t):
  """(Phi, S) of u_t | u_0 ~ N(Phi u_0, S) by matrix exponentials: S' = A S + S A^T + Q is linear in (S, 1)."""
  drift, noise = matrices(sde)
  generator = np.zeros((5, 5))
  generator[:4, :4] = np.kron(drift, np.eye(2)) + np.kron(np.eye(2), drift)
  generator[:4, 4] = noise.ravel()
  return scipy.linalg.expm(t * drift), scipy.linalg.expm(t * generator)[:4, 4].reshape(2, 2)


@dataclass(frozen=True)
class PhaseGaussian:
  """Data N(mean, diag(std^2)), velocities as the process starts them."""

  mean: np.ndarray
  std: np.ndarray

  def moments(self, sde, t):
    """Means [b, d, 2] and covariances [b, d, 2, 2] of u_t."""
    m, root = sde.given_position(t)
    mean, std = (jnp.asarray(v, m.dtype)[None] for v in (self.mean, self.std))
    outer = m[..., :, None] * m[..., None, :]
    return mean[..., None] * m[:, None], (std**2)[..., None, None] * outer[:, None] + (root @ root.mT)[:, None]

  def score(self, sde):
    """The gradient of log p_t, positions and velocities."""

    def score(u, t):
      mean, cov = self.moments(sde, t)
      away = u - mean
      determinant = cov[..., 0, 0] * cov[..., 1, 1] - cov[..., 0, 1] ** 2
      x = cov[..., 0, 1] * away[..., 1] - cov[..., 1, 1] * away[..., 0]
      v = cov[..., 0, 1] * away[..., 0] - cov[..., 0, 0] * away[..., 1]
      return jnp.stack([x, v], axis=-1) / determinant[..., None]

    return score

  def log_prob(self, u, sde, t):
    mean, cov = self.moments(sde, jnp.broadcast_to(t, u.shape[:1]))
    away = u - mean
    square = jnp.einsum("bdi,bdij,bdj->bd", away, jnp.linalg.inv(cov), away)
    return -0.5 * jnp.sum(square + jnp.linalg.slogdet(cov)[1] + 2 * jnp.log(2 * jnp.pi), axis=1)

  def position_log_prob(self, x, sde, t):
    mean, cov = (np.asarray(v[0]) for v in self.moments(sde, jnp.full(1, t)))
    mean, variance = mean[:, 0], cov[:, 0, 0]
    return -0.5 * np.sum((np.asarray(x) - mean) ** 2 / variance + np.log(2 * np.pi * variance), axis=1)

  def sample(self, key, count):
    noise = jax.random.normal(key, (count, len(self.mean)))
    return jnp.asarray(self.mean, noise.dtype)[None] + jnp.asarray(self.std, noise.dtype)[None] * noise


def phase_gaussian():
  return PhaseGaussian(np.array([1.0, -0.5, 0.2]), np.array([0.5, 1.0, 0.3]))


def step_maps(sampler, nodes, score, d, draws):
  """Every step u' = A u + b + N z over these nodes, of a sampler's own code: [steps, d, 2, 2], [.., 2], [.., 2 draws].

  The step is run for u = 0 and the units, then with a unit of every noise; a step draws `draws` times. To be called
  within jit.
  """
  rows = 3 + 2 * draws

  def noises():
    draw = itertools.count()

    def normal(keys, shape, dtype=jnp.float32):
      first = 3 + 2 * next(draw)
      return jnp.zeros(shape, dtype).at[first, :, 0].set(1).at[first + 1, :, 1].set(1)

    return mock.patch.object(jd.keys, "normal", normal)

  def step(node):
    u = jnp.zeros((rows, d, 2)).at[1, :, 0].set(1).at[2, :, 1].set(1)
    with noises():
      field, keys = Field(sampler.sde, score, {}), jd.example_keys(jax.random.key(0), 0, rows)
      return sampler.method.step(field, u, (), node, keys)[0]

  ends = jax.vmap(step)(nodes)
  change = jnp.moveaxis(ends[:, 1:] - ends[:, :1], 1, -1)
  return change[..., :2], ends[:, 0], change[..., 2:]


class Walk(NamedTuple):
  """The maps of the steps of a sampler, and the exact means [2, d, 2] and covariances [2, d, 2, 2] at its ends."""

  maps: tuple
  means: Any
  covariances: Any


def walks(samplers, data, draws):
  """The walks of samplers that differ in their grids alone; to be called within jit, which vmaps one step."""
  nodes = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(sampler.method.nodes for sampler in samplers))
  sde, found, start = samplers[0].sde, [], 0
  maps = step_maps(samplers[0], nodes, data.score(sde), len(data.mean), draws)
  for sampler in samplers:
    end = start + len(sampler.ts) - 1
    own = tuple(value[start:end] for value in maps)
    found.append(Walk(own, *data.moments(sde, sampler.ts[jnp.asarray([0, -1])])))
    start = end
  return found


def sampled_moments(walk):
  """Mean [d, 2] and covariance [d, 2, 2] of the last state from the exact p_t at the first time: no Monte Carlo."""
  mean, cov = walk.means[0], walk.covariances[0]
  for matrix, shift, noise in zip(*walk.maps, strict=True):
    mean = np.einsum("dij,dj->di", matrix, mean) + shift
    cov = matrix @ cov @ np.moveaxis(matrix, -1, -2) + noise @ np.moveaxis(noise, -1, -2)
  return mean, cov


def errors(walk):
  """The largest errors of mean and covariance at the last time, in units of the exact deviations."""
  walk = jax.tree.map(np.asarray, walk)
  mean, cov = sampled_moments(walk)
  std = np.sqrt(np.diagonal(walk.covariances[1], axis1=-2, axis2=-1))
  scale = std[..., :, None] * std[..., None, :]
  return np.array([np.max(np.abs(mean - walk.means[1]) / std), np.max(np.abs(cov - walk.covariances[1]) / scale)])
