"""Measured orders: exact errors of samplers on Gaussian data, whose flow and moments are known under every process.

Each `make` is a function (sde, ts) -> sampler that is made once, at the top of a module: its program serves all grids
and, of a `switch.Switch`, all processes. A grid of fewer steps goes on beyond the end, to as many as the finest has.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracles import gaussian

import jaxdiff as jd
from jaxdiff.samplers.fixed_grid import Field

LOG_SNR_END = 4.0
NORMAL = np.random.default_rng(0).standard_normal((4, 3))


def slope(errors, steps):
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def exact_start(data, sde, n, t):
  """n states of the exact p_t, up to 4."""
  mean, variance = data.moments(sde, jnp.full(n, t))
  return mean + jnp.sqrt(variance) * jnp.asarray(NORMAL[:n, : mean.shape[1]], mean.dtype)


def even(fraction):
  return fraction


def long_grid(sde, most, n, spacing):
  """`most + 1` times, those of `n` steps from t1 to the log-SNR of 4 at first, spaced in it by `spacing`."""
  start = jd.log_snr(sde, jnp.asarray(sde.t1, float))
  place = spacing(jnp.arange(most + 1.0) / n)
  return sde.time_of_log_snr(start + (LOG_SNR_END - start) * place).at[0].set(sde.t1)


@functools.cache
def _flow_error(make, most, spacing):
  data = gaussian()

  @jax.jit
  def error(sde, n):
    ts = long_grid(sde, most, n, spacing)
    x_T = exact_start(data, sde, 4, sde.t1)
    x = make(sde, ts, path=1)(jax.random.key(0), x_T, data.score(sde)).path[n]
    return jnp.max(jnp.abs(x - data.flow(sde, x_T, sde.t1, ts[n])))

  return error


def flow_order(make, sde, steps, spacing=even):
  """Order at which `make(sde, ts)` approaches the exact flow of anisotropic Gaussian data."""
  return slope([float(_flow_error(make, max(steps), spacing)(sde, n)) for n in steps], steps)


def sampled_moments(sampler, data):
  """Mean and variance `[steps + 1, d]` of the states from an exact start, by recursion over the steps: no Monte Carlo.

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
    return (mean, covariance), (mean[:, 0], covariance[:, 0, 0])

  mean, variance = (value[0] for value in data.moments(sde, sampler.ts[:1]))
  start = jnp.eye(1, size)[0][None]
  first = mean[:, None] * start, variance[:, None, None] * start[:, :, None] * start[:, None]
  _, (means, variances) = jax.lax.scan(step, first, method.nodes)
  return jnp.concatenate([mean[None], means]), jnp.concatenate([variance[None], variances])


@functools.cache
def _moment_error(make, most):
  data = gaussian()

  @jax.jit
  def error(sde, n):
    ts = long_grid(sde, most, n, even)
    exact = data.moments(sde, ts[n][None])
    found = sampled_moments(make(sde, ts), data)
    return jnp.max(jnp.stack([jnp.abs(a[n] - b[0]) for a, b in zip(found, exact, strict=True)]))

  return error


def weak_order(make, sde, steps):
  """Order at which mean and variance of `make(sde, ts)` approach those of anisotropic Gaussian data."""
  return slope([float(_moment_error(make, max(steps))(sde, n)) for n in steps], steps)
