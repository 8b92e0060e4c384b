"""Samples under the exact score of a mixture: only the sampler errs, so its samples must be those of the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Mixture, mixture

import jaxdiff as jd
from jaxdiff import samplers
from jaxdiff.schedules import SAMPLING_NOISE_TO_SIGNAL, start_time

pytestmark = pytest.mark.slow
N = 2000
SDE = jd.VP()


@functools.cache
def last_time():
  return float(start_time(SDE, None, SAMPLING_NOISE_TO_SIGNAL))


# By the number of steps; at 200 evaluations, those of weak order one in the plain form at 1000. DPM-Solver-1 is DDIM,
# and adaptive steps have a test of their own.
AT = {
  "reverse_sde": (1000, lambda sde, ts: samplers.reverse_sde(sde, ts)),
  "reverse_diffusion": (1000, lambda sde, ts: samplers.reverse_diffusion(sde, ts)),
  "ancestral_beta": (1000, lambda sde, ts: samplers.ancestral(sde, ts, "beta")),
  "ancestral": (1000, lambda sde, ts: samplers.ancestral(sde, ts)),
  "stochastic_heun": (100, lambda sde, ts: samplers.stochastic_heun(sde, ts)),
  "predictor_corrector": (
    500,
    lambda sde, ts: samplers.predictor_corrector(samplers.reverse_diffusion(sde, ts), samplers.langevin_corrector(0.1)),
  ),
  "ddim": (200, lambda sde, ts: samplers.ddim(sde, ts)),
  "dpm_solver_2": (100, lambda sde, ts: samplers.dpm_solver(sde, ts)),
  "dpm_solver_3": (66, lambda sde, ts: samplers.dpm_solver(sde, ts, order=3)),
  "dpm_solver_pp_2": (200, lambda sde, ts: samplers.dpm_solver_pp(sde, ts)),
  "dpm_solver_pp_3": (200, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, order=3)),
  "dpm_solver_pp_2_sde": (200, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, eta=1.0)),
  "dpm_solver_pp_3_sde": (200, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, order=3, eta=1.0)),
  "unipc_2": (200, lambda sde, ts: samplers.unipc(sde, ts)),
  "unipc_3": (200, lambda sde, ts: samplers.unipc(sde, ts, order=3)),
  "edm": (100, lambda sde, ts: samplers.edm(sde, ts)),
  "edm_churn": (100, lambda sde, ts: samplers.edm(sde, ts, churn=20.0)),
  "probability_flow": (None, lambda sde, ts: samplers.probability_flow(sde, 1e-4, 1e-4)),
}


@functools.cache
def modes(dimension):
  """Five modes of std 0.05 with coordinates from N(0, 1), or three of std 0.2 in the plane."""
  if dimension == 2:
    return mixture()
  means = np.random.default_rng(0).standard_normal((5, dimension)).astype(np.float32)
  return Mixture(np.asarray([0.1, 0.15, 0.2, 0.25, 0.3]), means, 0.05)


@functools.cache
def start(dimension, count):
  """x_T from the exact p_t1."""
  x_T, _ = jd.perturb(jax.random.key(1), modes(dimension).sample(jax.random.key(0), count), SDE.t1, SDE)
  return x_T


def draw(name, dimension, steps, count=N):
  data = modes(dimension)

  def run(sde, x):
    sampler = AT[name][1](sde, None if steps is None else jd.time_grid(sde, steps))
    return sampler(jax.random.key(2), x, data.score(sde))

  sample = jax.jit(run)(SDE, start(dimension, count))
  jd.raise_if_failed(sample)
  return np.asarray(sample.x, np.float64)


def worst(x, dimension):
  """The largest deviation of mean, covariance and weights of the modes from the exact ones, in standard errors."""
  data = modes(dimension)
  alpha, sigma = (float(v) for v in SDE.marginal(last_time()))
  means, spread = alpha * np.asarray(data.means, np.float64), (alpha * data.std) ** 2 + sigma**2
  mean = data.weights @ means
  covariance = (means - mean).T @ np.diag(data.weights) @ (means - mean) + spread * np.eye(dimension)
  centered = x - mean
  products = centered[:, :, None] * centered[:, None, :]
  near = np.argmin(np.sum((x[:, None] - means[None]) ** 2, -1), axis=1)
  within = np.sum((x - means[near]) ** 2, axis=1) / dimension / spread
  shares = np.bincount(near, minlength=len(means)) / N
  return {
    "mean": np.max(np.abs(x.mean(0) - mean) / np.sqrt(np.diag(covariance) / N)),
    "covariance": np.max(np.abs(products.mean(0) - covariance) / (products.std(0) / np.sqrt(N))),
    "weights": np.max(np.abs(shares - data.weights) / np.sqrt(data.weights * (1 - data.weights) / N)),
    "spread of the modes": abs(within.mean() - 1) / (np.sqrt(2 / dimension) / np.sqrt(N)),
  }


@pytest.mark.parametrize("name", AT)
def test_samples_of_a_mixture_in_the_plane(name):
  """Within 4 standard errors of 2000 samples, at the given steps."""
  for what, errors in worst(draw(name, 2, AT[name][0]), 2).items():
    assert errors < 4, what


@pytest.mark.parametrize("name", ["dpm_solver_pp_2_sde", "edm_churn"])
def test_samples_of_a_mixture_in_64_dimensions(name):
  """Those with noise; of the others see the gap below. 4 standard errors; 4.5 for the largest of 2080 covariances,
  above 4.2 in one of twenty exact draws."""
  deviations = worst(draw(name, 64, AT[name][0]), 64)
  del deviations["spread of the modes"]  # 128 000 squares: the bias of a hundred steps shows, see the gap below
  for what, errors in deviations.items():
    assert errors < (4.5 if what == "covariance" else 4), what


@pytest.mark.parametrize(
  ("name", "steps", "largest"),
  [
    ("unipc_3", 20, 0.5),
    ("dpm_solver_pp_2", 40, 0.5),
    ("unipc_2", 40, 0.5),
    ("edm", 40, 1.0),
    ("ddim", 160, 1.3),
  ],
)
def test_gap_of_the_negative_log_likelihood_in_nats(name, steps, largest):
  """Mean -log p of samples minus that of data, 64-D modes of std 0.05, default grid; the standard error is 0.13.

  DDIM leaves -1.0 (see experiments/samplers): with two standard errors, 1.3.
  """
  data = modes(64)
  value = lambda x: float(jnp.mean(-data.log_prob(jnp.asarray(x, jnp.float32), SDE, last_time())))
  fresh, _ = jd.perturb(jax.random.key(3), data.sample(jax.random.key(4), 4000), last_time(), SDE)
  assert abs(value(draw(name, 64, steps, 4000)) - value(fresh)) < largest
