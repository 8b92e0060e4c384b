"""Probabilities of integers sum to one, those of continuous data are normal; pictures; what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdiff.losses import decoders, observations

LEVELS = 5


def made():
  return {"discretized": observations.discretized(LEVELS), "categorical": observations.categorical(LEVELS)}


def output(observation, channels, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, 3, channels * observation.outputs))


@pytest.mark.parametrize("kind", ["discretized", "categorical"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_probabilities_of_all_data_sum_to_one(kind, scale):
  """Of two pixels of two channels: 5^4 images."""
  observation = made()[kind]
  images = jnp.stack(jnp.meshgrid(*[jnp.arange(LEVELS)] * 4), -1).reshape(-1, 2, 2)
  one = scale * jax.random.normal(jax.random.key(0), (1, 2, 2 * observation.outputs))
  p = jnp.exp(observation.log_prob(images, jnp.broadcast_to(one, (len(images), *one.shape[1:]))))
  assert len(images) == LEVELS**4
  np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-5)


def test_every_channel_has_the_outputs_beside_it():
  """The log-probability of two channels is the sum of those of each with its own outputs."""
  x = jnp.array([[[0, 4], [1, 2], [3, 3]]] * 2)
  for kind, observation in made().items():
    put = output(observation, 2)
    mean_and_log_std = [put[..., [0, 2]], put[..., [1, 3]]]
    parts = [put[..., :LEVELS], put[..., LEVELS:]] if kind == "categorical" else mean_and_log_std
    apart = sum(observation.log_prob(x[..., i : i + 1], part) for i, part in enumerate(parts))
    np.testing.assert_allclose(observation.log_prob(x, put), apart, rtol=1e-5)
    np.testing.assert_allclose(observation.image(put)[..., 1:], observation.image(parts[1]), rtol=1e-5)


def test_the_discretized_gaussian_takes_mean_and_log_std():
  x, mean, log_std = jnp.array([[2]]), 0.3, -0.7
  got = observations.discretized(LEVELS).log_prob(x, jnp.array([[mean, log_std]]))
  normal = scipy.stats.norm(mean, np.exp(log_std))
  np.testing.assert_allclose(jnp.exp(got), [normal.cdf(0.2) - normal.cdf(-0.2)], rtol=1e-5)


def test_pictures_are_means_in_the_data_range():
  x = jnp.array([[[0], [4]]])
  sure = 50.0 * jax.nn.one_hot(x[..., 0], LEVELS)
  places = decoders.level_values(LEVELS)[x]
  np.testing.assert_allclose(observations.categorical(LEVELS).image(sure), places, rtol=1e-5)
  np.testing.assert_allclose(observations.categorical(LEVELS).image(0 * sure), 0.0, atol=1e-6)
  put = jnp.array([[[0.5, 1.0], [7.0, 1.0]]])
  np.testing.assert_array_equal(observations.discretized(LEVELS).image(put), [[[0.5], [1.0]]])
  np.testing.assert_array_equal(observations.gaussian(0.1).image(put), put)


def test_the_encoder_sees_integers_at_their_places_and_floats_as_they_are():
  x = jnp.array([[0, 4]], jnp.uint8)
  for observation in made().values():
    np.testing.assert_allclose(observation.to_state(x), [[-0.8, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(observations.gaussian(1.0).to_state(jnp.array([[3.5]])), [[3.5]])


def test_continuous_data_are_normal():
  x, put = jnp.array([[0.3, -1.0]]), jnp.array([[0.1, 0.4]])
  expected = scipy.stats.norm.logpdf(x, put, 0.7).sum()
  np.testing.assert_allclose(observations.gaussian(0.7).log_prob(x, put), [expected], rtol=1e-6)


def test_integers_outside_the_levels_have_no_probability():
  for observation in made().values():
    put = jnp.zeros((3, observation.outputs))
    value = observation.log_prob(jnp.array([[-1], [LEVELS], [2]]), put)
    np.testing.assert_array_equal(jnp.isnan(value), [True, True, False])


@pytest.mark.usefixtures("untyped")
def test_wrong_use_is_refused():
  x = jnp.zeros((2, 3, 1), jnp.int32)
  for observation in made().values():
    due = rf"output_channels={observation.outputs}$"
    with pytest.raises(ValueError, match=due):
      observation.log_prob(x, jnp.zeros((2, 3, observation.outputs + 1)))
    with pytest.raises(TypeError, match="pass the raw integers, not scaled data"):
      observation.log_prob(jnp.zeros((2, 3, 1)), jnp.zeros((2, 3, observation.outputs)))
  with pytest.raises(TypeError, match="for integers 0..n-1 take observations.discretized"):
    observations.gaussian(1.0).log_prob(x, jnp.zeros((2, 3, 1)))
  with pytest.raises(ValueError, match="std must be positive, got 0"):
    observations.gaussian(0.0)
  for factory in (observations.discretized, observations.categorical):
    with pytest.raises(ValueError, match="levels must be at least 2"):
      factory(1)
