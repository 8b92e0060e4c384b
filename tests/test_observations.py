"""Probabilities of integers sum to one, those of continuous data are normal; pictures; what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import compiled

from jaxdiff.losses import observations

LEVELS = 5


def made():
  return {"discretized": observations.discretized(LEVELS), "categorical": observations.categorical(LEVELS)}


def output(observation, channels, seed=0):
  shape = (2, 3, channels * observation.outputs)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["discretized", "categorical"])
def test_probabilities_of_all_data_sum_to_one(kind):
  """Of two pixels of two channels: 5^4 images."""
  observation = made()[kind]
  images = np.stack(np.meshgrid(*[np.arange(LEVELS)] * 4), -1).reshape(-1, 2, 2)
  assert len(images) == LEVELS**4
  one = output(observation, 2)[:1, :2]
  run = jax.jit(lambda one: observation.log_prob(images, jnp.broadcast_to(one, (len(images), *one.shape[1:]))))
  for scale in (1, 5):
    np.testing.assert_allclose(np.exp(run(scale * one)).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind", ["discretized", "categorical"])
def test_every_channel_has_the_outputs_beside_it(kind):
  """The log-probability of two channels is the sum of those of each with its own outputs."""
  x, observation = np.array([[[0, 4], [1, 2], [3, 3]]] * 2), made()[kind]
  put = output(observation, 2)
  mean_and_log_std = [put[..., [0, 2]], put[..., [1, 3]]]
  parts = [put[..., :LEVELS], put[..., LEVELS:]] if kind == "categorical" else mean_and_log_std

  def run(put, parts):
    apart = sum(observation.log_prob(x[..., i : i + 1], part) for i, part in enumerate(parts))
    return observation.log_prob(x, put), apart, observation.image(put), observation.image(parts[1])

  together, apart, image, second = compiled(run, put, parts)
  np.testing.assert_allclose(together, apart, rtol=1e-5)
  np.testing.assert_allclose(image[..., 1:], second, rtol=1e-5)


def test_the_discretized_gaussian_takes_mean_and_log_std():
  put = np.array([[0.3, -0.7]], np.float32)
  got = compiled(lambda put: observations.discretized(LEVELS).log_prob(jnp.array([[2]]), put), put)
  normal = scipy.stats.norm(0.3, np.exp(-0.7))
  np.testing.assert_allclose(np.exp(got), [normal.cdf(0.2) - normal.cdf(-0.2)], rtol=1e-5)


def test_pictures_are_means_in_the_data_range():
  x = np.array([[[0], [4]]])
  sure, put = 50.0 * np.eye(LEVELS, dtype=np.float32)[x[..., 0]], np.array([[[0.5, 1.0], [7.0, 1.0]]], np.float32)
  categorical = observations.categorical(LEVELS)
  certain, even, clipped = compiled(
    lambda sure, put: (
      categorical.image(sure),
      categorical.image(0 * sure),
      observations.discretized(LEVELS).image(put),
    ),
    sure,
    put,
  )
  np.testing.assert_allclose(certain, [[[-0.8], [0.8]]], rtol=1e-5)
  np.testing.assert_allclose(even, 0.0, atol=1e-6)
  np.testing.assert_array_equal(clipped, [[[0.5], [1.0]]])


def test_integers_go_to_their_places_and_floats_as_they_are():
  x = np.array([[0, 4]], np.uint8)
  for places in compiled(lambda x: [observation.to_state(x) for observation in made().values()], x):
    np.testing.assert_allclose(places, [[-0.8, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(observations.gaussian(1.0).to_state(np.array([[3.5]], np.float32)), [[3.5]])


def test_continuous_data_are_normal():
  x, put = np.array([[0.3, -1.0]], np.float32), np.array([[0.1, 0.4]], np.float32)
  expected = scipy.stats.norm.logpdf(x, put, 0.7).sum()
  np.testing.assert_allclose(compiled(observations.gaussian(0.7).log_prob, x, put), [expected], rtol=1e-6)


def test_integers_outside_the_levels_have_no_probability():
  x = np.array([[-1], [LEVELS], [2]])
  run = lambda x: [each.log_prob(x, jnp.zeros((3, each.outputs))) for each in made().values()]
  for value in compiled(run, x):
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])


def test_wrong_use_is_refused():
  x, full = np.zeros((2, 3, 1), np.int32), lambda *shape: np.zeros(shape, np.float32)
  for observation in made().values():
    due = rf"output_channels={observation.outputs}$"
    with pytest.raises(ValueError, match=due):
      observation.log_prob(x, full(2, 3, observation.outputs + 1))
    with pytest.raises(TypeError, match="pass the raw integers, not scaled data"):
      observation.log_prob(full(2, 3, 1), full(2, 3, observation.outputs))
  with pytest.raises(TypeError, match="for integers 0..n-1 take observations.discretized"):
    observations.gaussian(1.0).log_prob(x, full(2, 3, 1))
  with pytest.raises(ValueError, match="std must be positive, got 0"):
    observations.gaussian(0.0)
  for factory in (observations.discretized, observations.categorical):
    with pytest.raises(ValueError, match="levels must be at least 2"):
      factory(1)
