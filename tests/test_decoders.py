import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxdiff.losses import decoders


def lattice(levels, pixels):
  return jnp.asarray(list(itertools.product(range(levels), repeat=pixels)))


@pytest.mark.parametrize("log_std", [-12.0, -4.0, -1.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("mean", [(0.1, -0.4), (1.7, -30.0), (1 / 3, 1.0)])
def test_discretized_gaussian_sums_to_one(log_std, mean):
  """Over all 9 images of 2 pixels and 3 levels."""
  x = lattice(3, 2)
  mean = jnp.broadcast_to(jnp.asarray(mean), x.shape)
  total = jnp.exp(decoders.discretized_gaussian_log_prob(x, mean, jnp.float32(log_std), 3)).sum()
  np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("levels", [17, 256])
def test_discretized_gaussian_of_many_levels_sums_to_one(levels):
  x, scale = jnp.arange(levels)[:, None], jnp.linspace(-7.0, 2.0, 40)
  each = lambda log_std: decoders.discretized_gaussian_log_prob(x, jnp.full_like(x, 0.13, "float32"), log_std, levels)
  np.testing.assert_allclose(jnp.exp(jax.vmap(each)(scale)).sum(axis=1), 1, atol=1e-5)


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
    got = decoders.discretized_gaussian_log_prob(
      jnp.asarray(x)[:, None], jnp.full((len(x), 1), mean), jnp.log(jnp.float32(std)), levels
    )
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize("mean", [0.0, 0.11, -1.0, 5.0, -300.0, 1e5])
@pytest.mark.parametrize("log_std", [-20.0, -9.0, -5.3, -4.0, 0.0, 12.0])
def test_discretized_gaussian_has_finite_gradients_everywhere(levels, mean, log_std):
  x = jnp.arange(levels)[:, None]
  mean = jnp.full(x.shape, mean)
  log_prob = lambda mean, log_std: decoders.discretized_gaussian_log_prob(x, mean, log_std, levels)
  value, gradient = log_prob(mean, jnp.float32(log_std)), jax.jacrev(log_prob, (0, 1))(mean, jnp.float32(log_std))
  assert all(jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves((value, gradient)))


def test_discretized_gaussian_gradient_far_out_is_that_of_the_density():
  """d/dmean log P approaches (edge - mean) / std^2: 0 or a runaway there would stop or break the training."""
  x, mean, std = jnp.asarray([[10]]), jnp.asarray([[40.0]]), 1e-3
  gradient = jax.grad(lambda m: decoders.discretized_gaussian_log_prob(x, m, jnp.log(jnp.float32(std)), 256)[0])(mean)
  edge = -1 + 2 * 11 / 256
  np.testing.assert_allclose(gradient[0, 0], (edge - 40.0) / std**2, rtol=1e-4)


def test_nearest_level_sums_to_one_and_is_bayes_rule(x64):
  x, z = lattice(3, 2), jnp.broadcast_to(jnp.asarray([[0.3, -1.9]]), (9, 2))
  for sigma in (1e-3, 0.1, 3.0):
    p = jnp.exp(decoders.nearest_level_log_prob(x, z, jnp.asarray(0.8), jnp.asarray(sigma), 3))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    values = np.array([-2 / 3, 0, 2 / 3])
    exponent = -((np.array([0.3, -1.9])[:, None] - 0.8 * values) ** 2) / (2 * sigma**2)
    likelihood = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, np.prod(posterior[np.arange(2), np.asarray(x)], axis=1), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("sigma", [1e-5, 1e-2, 10.0])
def test_nearest_level_has_finite_gradients(sigma):
  x, z = jnp.arange(256)[:, None], jnp.full((256, 1), 3.7)
  gradient = jax.jacrev(lambda z, s: decoders.nearest_level_log_prob(x, z, jnp.float32(0.9), s, 256), (0, 1))(
    z, jnp.float32(sigma)
  )
  assert all(jnp.all(jnp.isfinite(v)) for v in gradient)


def test_one_coefficient_per_example_or_coordinate_or_for_all():
  x, mean = jnp.asarray([[0, 1], [2, 1]]), jnp.asarray([[0.1, 0.2], [0.3, 0.4]])
  per_example = jnp.asarray([0.5, 0.9])
  whole = jnp.broadcast_to(per_example[:, None], x.shape)
  for one in (
    lambda v: decoders.gaussian_log_prob(mean + 1, mean, v),
    lambda v: decoders.discretized_gaussian_log_prob(x, mean, v, 3),
    lambda v: decoders.nearest_level_log_prob(x, mean, v, v, 3),
  ):
    np.testing.assert_array_equal(one(per_example), one(whole))
    np.testing.assert_allclose(one(per_example)[0], one(jnp.float32(0.5))[0], rtol=1e-6)


def test_gaussian_is_the_normal_density():
  x = jnp.asarray([[0.3, -1.0]])
  expected = jax.scipy.stats.norm.logpdf(x, 0.1, 0.7).sum()
  got = decoders.gaussian_log_prob(x, jnp.full((1, 2), 0.1), jnp.float32(0.7))
  np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_integers_outside_the_levels_are_nan_not_the_last_level():
  x = jnp.asarray([[-1], [3], [2]])
  zero, one = jnp.zeros((3, 1)), jnp.float32(1.0)
  for value in (
    decoders.discretized_gaussian_log_prob(x, zero, one, 3),
    decoders.nearest_level_log_prob(x, zero, one, one, 3),
  ):
    np.testing.assert_array_equal(jnp.isnan(value), [True, True, False])
  whole = decoders.integer_values(jnp.arange(256, dtype=jnp.uint8)[:, None], 256)
  np.testing.assert_allclose(whole[:, 0], decoders.level_values(256))
  np.testing.assert_allclose(decoders.level_values(256)[jnp.asarray([0, 255])], [-1 + 1 / 256, 1 - 1 / 256])


def test_wrong_use_is_refused(untyped):
  x, zero = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1))
  with pytest.raises(TypeError, match="pass the raw integers, not scaled data"):
    decoders.discretized_gaussian_log_prob(zero, zero, jnp.float32(0.0), 3)
  with pytest.raises(ValueError, match="levels must be at least 2"):
    decoders.nearest_level_log_prob(x, zero, jnp.float32(1.0), jnp.float32(1.0), 1)
  with pytest.raises(ValueError, match="low < high"):
    decoders.level_values(3, (1.0, -1.0))
