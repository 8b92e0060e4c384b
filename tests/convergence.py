"""Measured orders: exact errors of samplers on Gaussian data, whose flow and moments are known under every process."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import gaussian

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import Field

LOG_SNR_END = 4.0


def slope(errors, steps):
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def exact_start(data, sde, n, t):
  """n states drawn from the exact p_t."""
  mean, variance = data.moments(sde, jnp.full(n, t))
  return mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(0), mean.shape, mean.dtype)


def flow_order(make, sde, steps, kind="log_snr"):
  """Order at which `make(sde, ts)` approaches the exact flow of anisotropic Gaussian data."""
  data, t0 = gaussian(), sde.time_of_log_snr(jnp.asarray(LOG_SNR_END))
  x_T = exact_start(data, sde, 4, sde.t1)
  exact = data.flow(sde, x_T, sde.t1, t0)
  errors = []
  for n in steps:
    sampler = make(sde, jd.time_grid(sde, n, kind, t0=t0))
    x = jax.jit(lambda x: sampler(jax.random.key(0), x, data.score(sde)).x)(x_T)
    errors.append(float(jnp.max(jnp.abs(x - exact))))
  return slope(errors, steps)


def sampled_moments(sampler, data):
  """Mean and variance `[d]` of the samples from an exact start, by recursion over the steps: no Monte Carlo.

  For Gaussian data a step is affine in the state, its memory and its noise, coordinate by coordinate. The maps are
  differences of steps that share their noise; the size of the noise is that of two steps that differ in it alone.
  """
  sde, method, dimension = sampler.sde, sampler.method, len(data.mean)
  field = Field(sde, data.score(sde), {})
  size = 1 + len(method.memory(jnp.zeros((1, dimension))))
  basis = jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size), jnp.zeros((1, size))])
  key = jnp.stack([jax.random.key(0)] * (size + 1) + [jax.random.key(1)])
  z = jd.keys.normal(key, (size + 2, dimension), basis.dtype)

  def step(moments, node):
    mean, covariance = moments
    parts = [jnp.broadcast_to(basis[:, j : j + 1], (size + 2, dimension)) for j in range(size)]
    x, memory = method.step(field, parts[0], tuple(parts[1:]), node, key)
    out = jnp.stack([x, *memory])
    change = jnp.moveaxis(out[:, 1:-1] - out[:, :1], -1, 0)
    noise = jnp.moveaxis((out[:, -1] - out[:, 0]) / (z[-1:] - z[:1]), -1, 0)
    offset = jnp.moveaxis(out[:, 0], -1, 0) - noise * z[0][:, None]
    mean = jnp.einsum("dij,dj->di", change, mean) + offset
    covariance = jnp.einsum("dij,djk,dlk->dil", change, covariance, change) + noise[:, :, None] * noise[:, None]
    return (mean, covariance), None

  mean, variance = (value[0] for value in data.moments(sde, sampler.ts[:1]))
  start = jnp.eye(1, size)[0][None]
  first = mean[:, None] * start, variance[:, None, None] * start[:, :, None] * start[:, None]
  (mean, covariance), _ = jax.lax.scan(step, first, method.nodes)
  return mean[:, 0], covariance[:, 0, 0]


def weak_order(make, sde, steps):
  """Order at which mean and variance of `make(sde, ts)` approach those of anisotropic Gaussian data."""
  data, t0 = gaussian(), sde.time_of_log_snr(jnp.asarray(LOG_SNR_END))
  exact = [value[0] for value in data.moments(sde, t0[None])]
  errors = []
  for n in steps:
    sampler = make(sde, jd.time_grid(sde, n, t0=t0))
    found = jax.jit(lambda: sampled_moments(sampler, data))()
    errors.append(max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(found, exact, strict=True)))
  return slope(errors, steps)
