"""Nearest codes, straight-through gradients, perplexity, and samples of categorical codes and their probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from oracles import compiled

from jaxdiff import keys, quantization

PROBABILITIES = np.array([0.05, 0.4, 0.01, 0.24, 0.3])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 20_000


def test_the_nearest_code_is_that_of_the_smallest_distance():
  rng = np.random.default_rng(0)
  z, vectors = rng.normal(size=(6, 3, 5, 4)).astype(np.float32), rng.normal(size=(37, 4)).astype(np.float32)
  distances = np.linalg.norm(z.astype(np.float64)[..., None, :] - vectors, axis=-1)
  run = lambda z, *each: [quantization.nearest(z, vectors) for vectors in each]
  codes, of_twice = compiled(run, z, vectors, np.concatenate([vectors] * 2))
  np.testing.assert_array_equal(codes, distances.argmin(-1))
  assert codes.dtype == np.int32
  np.testing.assert_array_equal(of_twice, codes)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
  z, value, slope = (np.array(v, np.float32) for v in ([0.3, -2.0], [1.0, 5.0], [2.0, 3.0]))

  def run(z, value, slope):
    got, pull = jax.vjp(quantization.straight_through, z, value)
    return got, *pull(slope)

  got, for_z, for_value = compiled(run, z, value, slope)
  np.testing.assert_allclose(got, value, rtol=1e-6)
  np.testing.assert_array_equal(for_z, slope)
  np.testing.assert_array_equal(for_value, 0.0)


def test_perplexity_counts_the_codes_in_use():
  p, codes = np.array([0.5, 0.25, 0.125, 0.125], np.float32), np.array([[0, 3], [3, 3]], np.int32)
  counts = [8 * p, np.ones(7, np.int32), np.zeros(3, np.float32)]
  run = lambda codes, counts: (quantization.usage(codes, 5), [quantization.perplexity(c) for c in counts])
  usage, (some, all_, none) = compiled(run, codes, counts)
  np.testing.assert_array_equal(usage, [1, 0, 0, 3, 0])
  np.testing.assert_allclose(some, 2**1.75, rtol=1e-6)
  np.testing.assert_allclose(all_, 7, rtol=1e-6)
  assert np.isnan(none)


def frequencies_fit(codes, probabilities):
  """Chi-square of the counts, below its 0.9999 quantile: 1 in 10^4 seeds would fail, and this one is fixed."""
  counts = np.bincount(np.ravel(codes), minlength=len(probabilities))
  expected = counts.sum() * np.asarray(probabilities, np.float64)
  statistic = np.sum((counts - expected) ** 2 / expected)
  return statistic < scipy.stats.chi2.ppf(0.9999, len(probabilities) - 1)


@pytest.fixture(scope="module")
def logits():
  """Many examples of two positions, the second with the probabilities in reverse."""
  return np.broadcast_to(np.stack([LOGITS, LOGITS[::-1]]), (DRAWS, 2, 5))


def test_gumbel_max_frequencies_are_those_of_the_categorical(logits):
  codes, p = compiled(quantization.gumbel_max, jax.random.key(0), logits), PROBABILITIES
  assert codes.shape == (DRAWS, 2)
  assert frequencies_fit(codes[:, 0], p)
  assert frequencies_fit(codes[:, 1], p[::-1])
  # Positions and neighbours are independent: the joint frequencies are products.
  assert frequencies_fit(5 * codes[:, 0] + codes[:, 1], np.outer(p, p[::-1]).ravel())
  assert frequencies_fit(5 * codes[::2, 0] + codes[1::2, 0], np.outer(p, p).ravel())
  assert not frequencies_fit(codes[:, 0], scipy.special.softmax(1.1 * LOGITS))


SOFTMAX = jax.jit(quantization.gumbel_softmax)


def test_the_largest_entry_of_a_relaxed_sample_is_a_sample_at_any_temperature(logits):
  key = jax.random.key(1)
  codes = compiled(quantization.gumbel_max, key, logits)
  for temperature in (0.01, 1.0, 5.0):
    soft = np.asarray(SOFTMAX(key, logits, temperature))
    np.testing.assert_allclose(soft.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(soft.argmax(-1), codes)
  assert frequencies_fit(codes[:, 0], PROBABILITIES)


def test_relaxed_samples_tend_to_one_hot_and_to_uniform(logits):
  """The gap of the two largest perturbed logits has a bounded density at 0: the distance falls like the temperature."""
  sample = lambda temperature: np.asarray(SOFTMAX(jax.random.key(2), logits, temperature))
  away = [np.mean(1 - sample(t).max(-1)) for t in (0.1, 0.01, 0.001)]
  for coarse, fine in itertools.pairwise(away):
    assert 8 < coarse / fine < 12.5
  np.testing.assert_allclose(sample(1e4), 0.2, atol=1e-3)


def test_two_codes_relaxed_are_a_logistic_number():
  """With K = 2 the sample is sigmoid((difference of logits + logistic noise) / temperature), in closed form."""
  logits = np.broadcast_to(np.array([1.0, 0.3], np.float32), (DRAWS, 2))
  soft = np.asarray(SOFTMAX(jax.random.key(3), logits, 0.7)[:, 0], np.float64)
  noise = 0.7 * (np.log(soft) - np.log1p(-soft)) - 0.7
  # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.23 with probability 1e-4.
  assert np.sqrt(DRAWS) * scipy.stats.kstest(noise, "logistic").statistic < 2.23


def test_hard_samples_are_one_hot_with_the_gradient_of_relaxed_ones():
  logits, direction = np.stack([LOGITS, 2 * LOGITS]), np.arange(10, dtype=np.float32).reshape(2, 5)

  def run(key, logits):
    sample = lambda logits, hard: quantization.gumbel_softmax(key, logits, 0.5, hard)
    slopes = [jax.grad(lambda v, kind=kind: jnp.sum(sample(v, kind) * direction))(logits) for kind in (True, False)]
    return sample(logits, True), quantization.gumbel_max(key, logits), slopes

  sample, codes, (hard, soft) = compiled(run, jax.random.key(4), logits)
  np.testing.assert_allclose(sample, np.eye(5)[codes], atol=1e-6)
  np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)
  assert np.abs(soft).max() > 0.1


def test_samples_belong_to_their_example(logits):
  def run(key, some):
    part = quantization.gumbel_max(keys.per_example(key, 6)[2:4], some[2:4])
    return quantization.gumbel_max(key, some), part

  whole, part = compiled(run, jax.random.key(5), logits[:6])
  np.testing.assert_array_equal(part, whole[2:4])


def test_the_temperature_falls_to_its_end_and_stays():
  temperature = quantization.annealed(2.0, 0.5, steps=50)
  expected = np.maximum(0.5, 2.0 * np.exp(-np.log(4) / 50 * np.arange(120)))  # max(last, first exp(-r t))
  np.testing.assert_allclose(compiled(temperature, np.arange(120)), expected, rtol=1e-5)


def test_wrong_use_is_refused():
  for wrong in (
    lambda: quantization.nearest(np.zeros((3, 2), np.float32), np.zeros((1, 2), np.float32)),
    lambda: quantization.usage(np.zeros(3, np.int32), 1),
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
  np.testing.assert_array_equal(compiled(quantization.nearest, z, vectors), distances.argmin(axis=1))
