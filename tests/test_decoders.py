"""Probabilities of integers: they sum to one, are integrals over cells and Bayes' rule, with gradients everywhere."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import compiled
from scipy import integrate

from jaxdiff.losses import decoders


def lattice(levels, pixels):
  return np.array(list(itertools.product(range(levels), repeat=pixels)))


@functools.partial(jax.jit, static_argnums=0)
def discretized(levels, x, mean, log_std):
  """(log-probabilities [b], their gradients by mean and log_std, which is [b])."""
  value = lambda mean, log_std: decoders.discretized_gaussian_log_prob(x, mean, log_std, levels)
  return value(mean, log_std), jax.grad(lambda *at: value(*at).sum(), (0, 1))(mean, log_std)


def discretized_at(levels, x, mean, log_std):
  mean = np.broadcast_to(np.float32(mean), x.shape)
  return jax.device_get(discretized(levels, x, mean, np.broadcast_to(np.float32(log_std), len(x))))


def test_discretized_gaussian_sums_to_one():
  """Over all 9 images of 2 pixels and 3 levels."""
  x = lattice(3, 2)
  for log_std in (-12.0, -4.0, -1.0, 0.0, 1.0, 4.0):
    for mean in ((0.1, -0.4), (1.7, -30.0), (1 / 3, 1.0)):
      np.testing.assert_allclose(np.exp(discretized_at(3, x, mean, log_std)[0]).sum(), 1, atol=1e-5)


@pytest.mark.parametrize("levels", [17, 256])
def test_discretized_gaussian_of_many_levels_sums_to_one(levels):
  x = np.arange(levels)[:, None]
  for log_std in np.linspace(-7.0, 2.0, 40):
    np.testing.assert_allclose(np.exp(discretized_at(levels, x, 0.13, log_std)[0]).sum(), 1, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_discretized_gaussian_is_the_integral_over_the_cell(levels):
  """Quadrature in float64 of the density over the cell, open at the ends; far out, of the density over its largest."""
  x = np.unique(np.linspace(0, levels - 1, 7).astype(int))
  edges = np.linspace(-1, 1, levels + 1)
  for mean, std in [(0.0, 0.2), (0.3, 0.01), (-0.9, 1.0), (0.5, 30.0), (1.5, 0.05), (-1.0, 0.003)]:
    expected = []
    for k in x:
      low, high = (-np.inf if k == 0 else edges[k]), (np.inf if k == levels - 1 else edges[k + 1])
      peak = np.clip(mean, low, high)
      reach = min(30 * std, 40 * std**2 / max(abs(peak - mean), 1e-9))
      low, high = max(low, peak - reach), min(high, peak + reach)
      density = lambda y: np.exp(-0.5 * ((y - mean) ** 2 - (peak - mean) ** 2) / std**2)
      mass = integrate.quad(density, low, high, epsabs=0, epsrel=1e-10, limit=200)[0]
      expected.append(np.log(mass / std / np.sqrt(2 * np.pi)) - 0.5 * ((peak - mean) / std) ** 2)
    np.testing.assert_allclose(discretized_at(levels, x[:, None], mean, np.log(std))[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("levels", [2, 256])
def test_discretized_gaussian_has_finite_values_and_gradients_everywhere(levels):
  grid = [np.arange(levels), [0.0, 0.11, -1.0, 5.0, -300.0, 1e5], [-20.0, -9.0, -5.3, -4.0, 0.0, 12.0]]
  x, mean, log_std = (values.ravel() for values in np.meshgrid(*grid))
  for number in jax.tree.leaves(discretized_at(levels, x[:, None], mean[:, None], log_std)):
    assert np.isfinite(number).all()


def test_discretized_gaussian_gradient_far_out_is_that_of_the_density():
  """d/dmean log P approaches (edge - mean) / std^2: 0 or a runaway there would stop or break the training."""
  std, edge = 1e-3, -1 + 2 * 11 / 256
  gradient = discretized_at(256, np.array([[10]]), 40.0, np.log(std))[1][0]
  np.testing.assert_allclose(gradient[0, 0], (edge - 40.0) / std**2, rtol=1e-4)


def test_nearest_level_sums_to_one_and_is_bayes_rule(x64):
  x, z = lattice(3, 2), np.broadcast_to([[0.3, -1.9]], (9, 2))
  run = jax.jit(lambda sigma: decoders.nearest_level_log_prob(x, z, jnp.asarray(0.8), sigma, 3))
  for sigma in (1e-3, 0.1, 3.0):
    p = np.exp(run(sigma))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    values = np.array([-2 / 3, 0, 2 / 3])
    exponent = -((np.array([0.3, -1.9])[:, None] - 0.8 * values) ** 2) / (2 * sigma**2)
    likelihood = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, np.prod(posterior[np.arange(2), x], axis=1), rtol=1e-9, atol=1e-300)


def test_nearest_level_has_finite_gradients():
  x, z = np.arange(256)[:, None], np.full((256, 1), 3.7, np.float32)
  value = lambda z, s: decoders.nearest_level_log_prob(x, z, jnp.float32(0.9), s, 256)
  run = jax.jit(jax.jacfwd(value, 1)), jax.jit(jax.grad(lambda z, s: value(z, s).sum()))
  for sigma in (1e-5, 1e-2, 10.0):
    for gradient in run:
      assert np.isfinite(gradient(z, np.float32(sigma))).all()


def test_one_coefficient_per_example_or_coordinate_or_for_all():
  x, mean = np.array([[0, 1], [2, 1]]), np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)

  def each(v):
    return [
      decoders.gaussian_log_prob(mean + 1, mean, v),
      decoders.discretized_gaussian_log_prob(x, mean, v, 3),
      decoders.nearest_level_log_prob(x, mean, v, v, 3),
    ]

  per_example = np.array([0.5, 0.9], np.float32)
  whole = np.repeat(per_example[:, None], 2, axis=1)
  run = lambda *values: [each(v) for v in values]
  for one, full, number in zip(*compiled(run, per_example, whole, np.float32(0.5)), strict=True):
    np.testing.assert_array_equal(one, full)
    np.testing.assert_allclose(one[0], number[0], rtol=1e-6)


def test_gaussian_is_the_normal_density():
  x = np.array([[0.3, -1.0]], np.float32)
  got = compiled(decoders.gaussian_log_prob, x, np.full((1, 2), 0.1, np.float32), np.float32(0.7))
  np.testing.assert_allclose(got, [scipy.stats.norm.logpdf(x, 0.1, 0.7).sum()], rtol=1e-6)


def test_integers_outside_the_levels_are_nan_not_the_last_level():
  x, zero, one = np.array([[-1], [3], [2]]), np.zeros((3, 1), np.float32), np.float32(1.0)

  def run(x):
    return [
      decoders.discretized_gaussian_log_prob(x, zero, one, 3),
      decoders.nearest_level_log_prob(x, zero, one, one, 3),
    ]

  for value in compiled(run, x):
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])
  bytes_ = np.arange(256, dtype=np.uint8)[:, None]
  whole, values = compiled(lambda x: (decoders.integer_values(x, 256), decoders.level_values(256)), bytes_)
  np.testing.assert_allclose(whole[:, 0], values)
  np.testing.assert_allclose(values[[0, 255]], [-1 + 1 / 256, 1 - 1 / 256])


def test_wrong_use_is_refused():
  x, zero, one = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.float32(1.0)
  with pytest.raises(TypeError, match="pass the raw integers, not scaled data"):
    jax.eval_shape(lambda x: decoders.discretized_gaussian_log_prob(x, zero, one, 3), zero)
  with pytest.raises(ValueError, match="levels must be at least 2"):
    jax.eval_shape(lambda x: decoders.nearest_level_log_prob(x, zero, one, one, 1), x)
  with pytest.raises(ValueError, match="low < high"):
    decoders.level_values(3, (1.0, -1.0))
