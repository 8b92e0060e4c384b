"""Nearest codes, straight-through gradients, perplexity, and samples of categorical codes and their probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdiff import keys, quantization

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.01, 0.24, 0.3]))
DRAWS = 20_000


def test_the_nearest_code_is_that_of_the_smallest_distance():
  rng = np.random.default_rng(0)
  z, vectors = rng.normal(size=(6, 3, 5, 4)).astype(np.float32), rng.normal(size=(37, 4)).astype(np.float32)
  distances = np.linalg.norm(z.astype(np.float64)[..., None, :] - vectors, axis=-1)
  codes = quantization.nearest(jnp.asarray(z), jnp.asarray(vectors))
  np.testing.assert_array_equal(codes, distances.argmin(-1))
  assert codes.dtype == jnp.int32
  twice = jnp.concatenate([jnp.asarray(vectors)] * 2)
  np.testing.assert_array_equal(quantization.nearest(jnp.asarray(z), twice), codes)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
  z, value = jnp.array([0.3, -2.0]), jnp.array([1.0, 5.0])
  got, pull = jax.vjp(quantization.straight_through, z, value)
  np.testing.assert_allclose(got, value, rtol=1e-6)
  for_z, for_value = pull(jnp.array([2.0, 3.0]))
  np.testing.assert_array_equal(for_z, [2.0, 3.0])
  np.testing.assert_array_equal(for_value, 0.0)


def test_perplexity_counts_the_codes_in_use():
  p = np.array([0.5, 0.25, 0.125, 0.125])
  np.testing.assert_allclose(quantization.perplexity(jnp.asarray(8 * p, jnp.float32)), 2**1.75, rtol=1e-6)
  codes = jnp.array([[0, 3], [3, 3]], jnp.int32)
  np.testing.assert_array_equal(quantization.usage(codes, 5), [1, 0, 0, 3, 0])
  np.testing.assert_allclose(quantization.perplexity(jnp.ones(7, jnp.int32)), 7, rtol=1e-6)
  assert jnp.isnan(quantization.perplexity(jnp.zeros(3)))


def frequencies_fit(codes, probabilities):
  """Chi-square of the counts, below its 0.9999 quantile: 1 in 10^4 seeds would fail, and this one is fixed."""
  counts = np.bincount(np.ravel(codes), minlength=len(probabilities))
  expected = counts.sum() * np.asarray(probabilities, np.float64)
  statistic = np.sum((counts - expected) ** 2 / expected)
  return statistic < scipy.stats.chi2.ppf(0.9999, len(probabilities) - 1)


@pytest.fixture(scope="module")
def logits():
  """Many examples of two positions, the second with the probabilities in reverse."""
  return jnp.broadcast_to(jnp.stack([LOGITS, LOGITS[::-1]]), (DRAWS, 2, 5))


def test_gumbel_max_frequencies_are_those_of_the_categorical(logits):
  codes = jax.jit(quantization.gumbel_max)(jax.random.key(0), logits)
  assert codes.shape == (DRAWS, 2)
  p = jax.nn.softmax(LOGITS)
  assert frequencies_fit(codes[:, 0], p)
  assert frequencies_fit(codes[:, 1], p[::-1])
  # Positions and neighbours are independent: the joint frequencies are products.
  assert frequencies_fit(5 * codes[:, 0] + codes[:, 1], np.outer(p, p[::-1]).ravel())
  assert frequencies_fit(5 * codes[::2, 0] + codes[1::2, 0], np.outer(p, p).ravel())
  assert not frequencies_fit(codes[:, 0], jax.nn.softmax(1.1 * LOGITS))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 5.0])
def test_the_largest_entry_of_a_relaxed_sample_is_a_sample_at_any_temperature(logits, temperature):
  key = jax.random.key(1)
  soft = jax.jit(quantization.gumbel_softmax)(key, logits, temperature)
  np.testing.assert_allclose(soft.sum(-1), 1.0, rtol=1e-5)
  np.testing.assert_array_equal(jnp.argmax(soft, -1), quantization.gumbel_max(key, logits))
  assert frequencies_fit(jnp.argmax(soft, -1)[:, 0], jax.nn.softmax(LOGITS))


def test_relaxed_samples_tend_to_one_hot_and_to_uniform(logits):
  """The gap of the two largest perturbed logits has a bounded density at 0: the distance falls like the temperature."""
  sample = jax.jit(quantization.gumbel_softmax)
  away = [float(jnp.mean(1 - sample(jax.random.key(2), logits, t).max(-1))) for t in (0.1, 0.01, 0.001)]
  for coarse, fine in itertools.pairwise(away):
    assert 8 < coarse / fine < 12.5
  np.testing.assert_allclose(sample(jax.random.key(2), logits, 1e4), 0.2, atol=1e-3)


def test_two_codes_relaxed_are_a_logistic_number():
  """With K = 2 the sample is sigmoid((difference of logits + logistic noise) / temperature), in closed form."""
  logits = jnp.broadcast_to(jnp.array([1.0, 0.3]), (DRAWS, 2))
  soft = np.asarray(quantization.gumbel_softmax(jax.random.key(3), logits, 0.7)[:, 0], np.float64)
  noise = 0.7 * (np.log(soft) - np.log1p(-soft)) - 0.7
  # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.23 with probability 1e-4.
  assert np.sqrt(DRAWS) * scipy.stats.kstest(noise, "logistic").statistic < 2.23


def test_hard_samples_are_one_hot_with_the_gradient_of_relaxed_ones():
  logits, direction = jnp.stack([LOGITS, 2 * LOGITS]), jnp.arange(10.0).reshape(2, 5)
  sample = lambda logits, hard: quantization.gumbel_softmax(jax.random.key(4), logits, 0.5, hard)
  one_hot = jax.nn.one_hot(quantization.gumbel_max(jax.random.key(4), logits), 5)
  np.testing.assert_allclose(sample(logits, True), one_hot, atol=1e-6)
  hard, soft = (jax.grad(lambda v: jnp.sum(sample(v, kind) * direction))(logits) for kind in (True, False))
  np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)
  assert jnp.abs(soft).max() > 0.1


def test_samples_belong_to_their_example(logits):
  key, some = jax.random.key(5), logits[:6]
  whole = quantization.gumbel_max(key, some)
  each = keys.per_example(key, 6)
  np.testing.assert_array_equal(quantization.gumbel_max(each[2:4], some[2:4]), whole[2:4])


def test_the_temperature_falls_to_its_end_and_stays():
  temperature = quantization.annealed(2.0, 0.5, steps=50)
  steps = jnp.arange(120)
  expected = np.maximum(0.5, 2.0 * np.exp(-np.log(4) / 50 * np.arange(120)))  # max(last, first exp(-r t))
  np.testing.assert_allclose(temperature(steps), expected, rtol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_wrong_use_is_refused():
  for wrong in (
    lambda: quantization.nearest(jnp.zeros((3, 2)), jnp.zeros((1, 2))),
    lambda: quantization.usage(jnp.zeros(3, jnp.int32), 1),
  ):
    with pytest.raises(ValueError, match="codes must be at least 2, the number of vectors of a codebook; got 1"):
      wrong()
  for wrong in ({"first": 0.0}, {"last": -1.0}):
    with pytest.raises(ValueError, match="must be a temperature > 0"):
      quantization.annealed(**wrong)
  with pytest.raises(ValueError, match="steps must be at least 1"):
    quantization.annealed(steps=0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_what_all_vectors_have_in_common_costs_no_digits(offset):
  rng = np.random.default_rng(0)
  z, vectors = rng.normal(size=(500, 8)) + offset, rng.normal(size=(16, 8)) + offset
  z, vectors = (value.astype(np.float32) for value in (z, vectors))
  distances = np.sum((z[:, None].astype(np.float64) - vectors.astype(np.float64)) ** 2, axis=-1)
  np.testing.assert_array_equal(quantization.nearest(jnp.asarray(z), jnp.asarray(vectors)), distances.argmin(axis=1))
