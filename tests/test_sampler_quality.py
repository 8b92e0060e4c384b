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
N = 4000
SDE = jd.VP()
T0 = float(start_time(SDE, None, SAMPLING_NOISE_TO_SIGNAL))
grid = lambda steps: jd.time_grid(SDE, steps)

# By the number of steps; at 200 evaluations, those of weak order one in the plain form at 1000.
AT = {
  "reverse_sde": (1000, lambda ts: samplers.reverse_sde(SDE, ts)),
  "reverse_diffusion": (1000, lambda ts: samplers.reverse_diffusion(SDE, ts)),
  "ancestral_beta": (1000, lambda ts: samplers.ancestral(SDE, ts, "beta")),
  "ancestral": (1000, lambda ts: samplers.ancestral(SDE, ts)),
  "stochastic_heun": (100, lambda ts: samplers.stochastic_heun(SDE, ts)),
  "predictor_corrector": (
    500,
    lambda ts: samplers.predictor_corrector(samplers.reverse_diffusion(SDE, ts), samplers.langevin_corrector(0.1)),
  ),
  "ddim": (200, lambda ts: samplers.ddim(SDE, ts)),
  "dpm_solver_1": (200, lambda ts: samplers.dpm_solver(SDE, ts, order=1)),
  "dpm_solver_2": (100, lambda ts: samplers.dpm_solver(SDE, ts)),
  "dpm_solver_3": (66, lambda ts: samplers.dpm_solver(SDE, ts, order=3)),
  "dpm_solver_pp_2": (200, lambda ts: samplers.dpm_solver_pp(SDE, ts)),
  "dpm_solver_pp_3": (200, lambda ts: samplers.dpm_solver_pp(SDE, ts, order=3)),
  "dpm_solver_pp_2_sde": (200, lambda ts: samplers.dpm_solver_pp(SDE, ts, eta=1.0)),
  "dpm_solver_pp_3_sde": (200, lambda ts: samplers.dpm_solver_pp(SDE, ts, order=3, eta=1.0)),
  "unipc_2": (200, lambda ts: samplers.unipc(SDE, ts)),
  "unipc_3": (200, lambda ts: samplers.unipc(SDE, ts, order=3)),
  "edm": (100, lambda ts: samplers.edm(SDE, ts)),
  "edm_churn": (100, lambda ts: samplers.edm(SDE, ts, churn=20.0)),
  "adaptive_sde": (None, lambda ts: samplers.adaptive_sde(SDE, 1e-2, 1e-2)),
  "probability_flow": (None, lambda ts: samplers.probability_flow(SDE, 1e-4, 1e-4)),
}


@functools.cache
def modes(dimension):
  """Five modes of std 0.05 with coordinates from N(0, 1), or three of std 0.2 in the plane."""
  if dimension == 2:
    return mixture()
  means = np.random.default_rng(0).standard_normal((5, dimension)).astype(np.float32)
  return Mixture(np.asarray([0.1, 0.15, 0.2, 0.25, 0.3]), means, 0.05)


@functools.cache
def start(dimension):
  """x_T from the exact p_t1."""
  x_T, _ = jd.perturb(jax.random.key(1), modes(dimension).sample(jax.random.key(0), N), SDE.t1, SDE)
  return x_T


def draw(name, dimension, steps):
  ts = None if steps is None else grid(steps)
  sampler, data = AT[name][1](ts), modes(dimension)
  sample = jax.jit(lambda x: sampler(jax.random.key(2), x, data.score(SDE)))(start(dimension))
  jd.raise_if_failed(sample)
  return np.asarray(sample.x, np.float64)


def worst(x, dimension):
  """The largest deviation of mean, covariance and weights of the modes from the exact ones, in standard errors."""
  data = modes(dimension)
  alpha, sigma = (float(v) for v in SDE.marginal(T0))
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
  """Within 4 standard errors of 4000 samples, at the given steps and at twice as many."""
  steps = AT[name][0]
  for factor in (1, 2):
    for what, errors in worst(draw(name, 2, steps and factor * steps), 2).items():
      assert errors < 4, (what, factor)
    if steps is None:
      break


@pytest.mark.parametrize("name", [name for name in AT if name != "adaptive_sde"])
def test_samples_of_a_mixture_in_64_dimensions(name):
  """4 standard errors; 4.5 for the largest of 2080 covariances, above 4.2 in one of twenty exact draws."""
  deviations = worst(draw(name, 64, AT[name][0]), 64)
  del deviations["spread of the modes"]  # 256 000 squares: the bias of a hundred steps shows, see the gap below
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
  value = lambda x: float(jnp.mean(-data.log_prob(jnp.asarray(x, jnp.float32), SDE, T0)))
  fresh, _ = jd.perturb(jax.random.key(3), data.sample(jax.random.key(4), N), T0, SDE)
  assert abs(value(draw(name, 64, steps)) - value(fresh)) < largest
