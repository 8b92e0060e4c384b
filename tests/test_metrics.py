"""Metrics of samples against closed forms, brute force in NumPy, and cases whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.evaluation import distances, neighbours, report
from jaxdiff.evaluation.distances import Moments, frechet_distance, kernel_distance, merge, moments


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def exact(mean, covariance, n=10_000):
  """The moments of a set that has exactly this mean and covariance."""
  return Moments(n, np.asarray(mean, float), (n - 1) * np.asarray(covariance, float))


def rotation(seed, size):
  return np.linalg.qr(normal(seed, size, size))[0]


# Frechet distance


@pytest.mark.parametrize("flat", [False, True])
def test_frechet_of_commuting_covariances_is_that_of_their_spreads(flat):
  """|m_a - m_b|^2 + sum (sd_a - sd_b)^2, also where directions have no spread; any rotation of both leaves it."""
  means, spreads, q = normal(0, 2, 6), np.abs(normal(1, 2, 6)), rotation(2, 6)
  if flat:
    spreads[0, :3] = spreads[1, 2:5] = 0
  expected = np.sum((means[0] - means[1]) ** 2) + np.sum((spreads[0] - spreads[1]) ** 2)
  for basis in (np.eye(6), q):
    sides = [exact(basis @ m, basis @ np.diag(s**2) @ basis.T) for m, s in zip(means, spreads, strict=True)]
    # the root of an eigenvalue that is 0 but for rounding is good to 1e-8, its product with another spread too
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-10, abs=1e-7 if flat else 1e-10)
    assert frechet_distance(*sides) == pytest.approx(frechet_distance(*sides[::-1]), rel=1e-10)
    assert frechet_distance(sides[0], sides[0]) == pytest.approx(0, abs=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
  """In two dimensions tr (A B)^(1/2) = (tr A B + 2 (det A det B)^(1/2))^(1/2)."""
  a, b = (x @ x.T + 0.1 * np.eye(2) for x in normal(3, 2, 2, 2))
  cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
  expected = 1.25 + np.trace(a) + np.trace(b) - 2 * cross
  assert frechet_distance(exact([0, 0], a), exact([1, 0.5], b)) == pytest.approx(expected, rel=1e-10)


def test_moments_are_the_same_in_any_batches_and_order(monkeypatch):
  """Far from 0, where sums of squares would lose 10 digits; 1e-9 of the covariance is rounding at mean 1e5."""
  x = 1e5 + normal(4, 300, 5) @ normal(5, 5, 5)
  whole, covariance = moments(x), np.cov(x, rowvar=False)
  np.testing.assert_allclose(whole.covariance, covariance, rtol=1e-9)
  parts = [moments(part) for part in np.split(x, [1, 7, 120, 290])]
  left = merge(merge(merge(parts[3], parts[0]), parts[2]), merge(parts[4], parts[1]))
  monkeypatch.setattr(distances, "_ROWS", 17)
  for other in (left, moments(x), moments(x[::-1].astype(np.float64))):
    assert other.n == 300
    np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(other.covariance, covariance, rtol=1e-9)


def test_frechet_is_biased_by_the_number_of_examples_and_the_kernel_distance_is_not():
  """For equal distributions FD falls as 1 / n; the mean of KD over 60 pairs of sets is 0 within 4 standard errors."""
  frechet, kernel = {}, {}
  for n in (40, 400):
    pairs = [(normal([n, 2 * k], n, 4), normal([n, 2 * k + 1], n, 4)) for k in range(60)]
    frechet[n] = np.mean([frechet_distance(moments(x), moments(y)) for x, y in pairs])
    kernel[n] = [kernel_distance(x, y, blocks=1).mean for x, y in pairs]
    assert abs(np.mean(kernel[n])) < 4 * np.std(kernel[n]) / np.sqrt(60)
  assert frechet[40] / frechet[400] == pytest.approx(10, rel=0.25)


def test_too_few_examples_for_the_features_are_warned_of():
  few, many = (moments(normal(6, n, 8)) for n in (8, 100))
  for pair in ((few, many), (many, few)):
    with pytest.warns(UserWarning, match="8 examples for 8 features: their covariance is singular.*take more than 8"):
      frechet_distance(*pair)


# kernel distance


def brute_force_mmd(x, y):
  k = lambda a, b: (np.dot(a, b) / len(a) + 1) ** 3
  own = lambda z: np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
  return own(x) + own(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_is_the_unbiased_estimate(monkeypatch):
  x, y = normal(7, 21, 3), 0.5 + normal(8, 14, 3)
  expected = brute_force_mmd(x, y)
  assert kernel_distance(x, y, blocks=1).mean == pytest.approx(expected, rel=1e-12)
  monkeypatch.setattr(distances, "_ROWS", 4)
  assert kernel_distance(x, y, blocks=1).mean == pytest.approx(expected, rel=1e-12)
  halves = [brute_force_mmd(x[:11], y[:7]), brute_force_mmd(x[11:], y[7:])]
  estimate = kernel_distance(x, y, blocks=2)
  assert estimate.mean == pytest.approx(np.mean(halves), rel=1e-12)
  assert estimate.standard_error == pytest.approx(abs(halves[0] - halves[1]) / 2, rel=1e-12)
  assert np.isnan(kernel_distance(x, y, blocks=1).standard_error)


def test_kernel_distance_has_an_honest_standard_error_and_sees_a_shift():
  """Over 150 pairs of sets the spread is the root mean square of the errors; 20% is 3.5 deviations of 150 spreads."""
  estimates = [kernel_distance(normal([9, k], 100, 3), normal([10, k], 150, 3)) for k in range(150)]
  spread = np.std([e.mean for e in estimates])
  assert spread == pytest.approx(np.sqrt(np.mean([e.standard_error**2 for e in estimates])), rel=0.2)
  shifted = kernel_distance(normal(11, 200, 3), 0.5 + normal(12, 200, 3))
  assert shifted.mean > 4 * shifted.standard_error


# precision, recall, density, coverage, nearest neighbours


def brute_force_overlap(real, fake, k, wide_k):
  d = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
  radius = lambda a, k: np.sort(d(a, a), axis=1)[:, k]  # the first is the point itself
  cross = d(real, fake)
  precision = (cross <= radius(real, k)[:, None]).any(axis=0).mean()
  recall = (cross <= radius(fake, k)[None]).any(axis=1).mean()
  inside = cross <= radius(real, wide_k)[:, None]
  return precision, recall, inside.sum() / (wide_k * len(fake)), inside.any(axis=1).mean()


@pytest.mark.parametrize("entries", [2**24, 200])
@pytest.mark.parametrize("k", [(3, 5), (1, 2)])
def test_overlap_is_that_of_brute_force_in_any_blocks(monkeypatch, entries, k):
  monkeypatch.setattr(neighbours, "_ENTRIES", entries)
  real, fake = normal(13, 60, 4), 100.0 + 0.7 * normal(14, 45, 4) - 99.5
  assert tuple(neighbours.overlap(real, fake, *k)) == pytest.approx(brute_force_overlap(real, fake, *k), abs=1e-12)


def test_overlap_of_a_set_with_itself_and_with_one_far_away():
  """Also with duplicates, far from 0: their balls have the radius 0, which rounding must not empty."""
  x = 50 + normal(15, 40, 3)
  for real in (x, np.repeat(x, 8, axis=0)):
    same = neighbours.overlap(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
  assert neighbours.overlap(x, x + 1000) == (0, 0, 0, 0)


def test_a_dropped_mode_lowers_recall_and_coverage_and_not_precision():
  modes = np.repeat([[-20.0, 0.0], [20.0, 0.0]], 200, axis=0)
  real, both, one = modes + normal(16, 400, 2), modes + normal(17, 400, 2), modes[200:] + normal(18, 200, 2)
  full, dropped = neighbours.overlap(real, both), neighbours.overlap(real, one)
  assert min(full) > 0.9
  assert dropped.precision > 0.9
  assert dropped.recall == pytest.approx(0.5, abs=0.05)
  assert dropped.coverage == pytest.approx(0.5, abs=0.05)


def test_density_is_one_and_coverage_as_in_the_paper_for_equal_distributions():
  """E density = 1; E coverage = 1 - prod_{i<k} (n - 1 - i) / (2n - 1 - i). Means of 40 draws within 4 errors."""
  n, k = 100, 5
  drawn = np.array([neighbours.overlap(normal([19, i], n, 2), normal([20, i], n, 2)) for i in range(40)])
  expected = 1 - np.prod([(n - 1 - i) / (2 * n - 1 - i) for i in range(k)])
  error = drawn.std(axis=0) / np.sqrt(40)
  assert abs(drawn[:, 2].mean() - 1) < 4 * error[2]
  assert abs(drawn[:, 3].mean() - expected) < 4 * error[3]


@pytest.mark.parametrize("entries", [2**24, 150])
def test_nearest_finds_planted_copies_at_distance_zero(monkeypatch, entries):
  monkeypatch.setattr(neighbours, "_ENTRIES", entries)
  train, queries = 30 + normal(21, 70, 6), 30 + normal(22, 20, 6)
  queries[[4, 17]] = train[[33, 2]]
  near = neighbours.nearest(queries, train, k=3)
  every = np.linalg.norm(queries[:, None] - train[None], axis=-1)
  np.testing.assert_array_equal(near.rows, np.argsort(every, axis=1)[:, :3])
  np.testing.assert_allclose(near.distance, np.sort(every, axis=1)[:, :3], rtol=1e-12)
  assert near.rows[[4, 17], 0].tolist() == [33, 2]
  assert near.distance[[4, 17], 0].tolist() == [0.0, 0.0]


# known densities


def test_nll_gap_of_gaussians():
  """Samples of N(0, s^2) under N(0, 1): (s^2 - 1) / 2, within 4 standard errors, which are known too."""
  data, samples = normal(23, 20_000), 0.5 * normal(24, 10_000)
  gap = distances.nll_gap(jnp.asarray(-0.5 * samples**2), -0.5 * data**2)
  assert gap.standard_error == pytest.approx(np.sqrt(0.5 * (1 / 20_000 + 0.5**4 / 10_000)), rel=0.05)
  assert abs(gap.mean + 0.375) < 4 * gap.standard_error


def test_sliced_wasserstein_of_a_shift_is_its_length_in_each_direction():
  """For y = x + delta the mean of (theta . delta)^2, |delta|^2 / d: within 4 standard errors of 2000 directions."""
  x, delta, key = normal(25, 50, 3), np.array([3.0, -4.0, 12.0]), jax.random.key(0)
  distance = distances.sliced_wasserstein(key, x, x + delta, projections=2000)
  # the variance of (theta . delta)^2 on the sphere is 2 (d - 1) / (d^2 (d + 2)) |delta|^4
  error = 169 * np.sqrt(4 / (9 * 5) / 2000)
  assert abs(distance**2 - 169 / 3) < 4 * error
  assert distances.sliced_wasserstein(key, x, x) == 0
  assert distances.sliced_wasserstein(key, x, np.repeat(x, 3, axis=0)) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_unequal_sets_compares_quantile_functions():
  """Between 0, 1 and 0, 1/2, 1 the quantiles differ by 1/2 from u = 1/3 to 2/3."""
  x, y = np.array([[1.0], [0.0]]), np.array([[0.5], [0.0], [1.0]])
  expected = pytest.approx(np.sqrt(1 / 12), rel=1e-12)
  assert distances.sliced_wasserstein(jax.random.key(1), x, y, 4) == expected


# the report


def test_report_measures_held_out_data_as_if_they_were_samples():
  side = lambda seed, n: report.Side(normal(seed, n, 4), normal(seed + 100, n, 3))
  train, held_out, samples = side(30, 300), side(31, 40), side(32, 60)
  columns = report.columns(train, held_out, samples, "raw", 7, 3, 5)
  assert [(c.title, c.examples, c.paired) for c in columns] == [
    ("samples", 60, 60),
    ("held-out", 40, 40),
    ("samples", 40, 40),
  ]
  assert report.plain(columns[1:2]) == report.plain([report.measure("held-out", train, held_out, "raw", 7)])
  rows = columns[0].rows
  assert rows["FD-raw"].mean == frechet_distance(moments(train.features), moments(samples.features))
  assert rows["distance to nearest training example"].mean == np.median(neighbours.nearest(samples.x, train.x).distance)
  assert rows["sliced Wasserstein"].mean == distances.sliced_wasserstein(
    jax.random.key(7), train.features, samples.features
  )
  text = report.table("title", columns)
  assert text.splitlines()[1].split() == [
    "samples,",
    "n",
    "=",
    "60",
    "held-out,",
    "n",
    "=",
    "40",
    "samples,",
    "n",
    "=",
    "40",
  ]
  for name, row in rows.items():
    assert any(name in line and f"{row.mean:.4f}" in line for line in text.splitlines())
  assert len(report.columns(train, held_out, samples.first(40), "cnn", 7, 3, 5)) == 2
  assert report.plain(columns)[1]["results"]["recall"]["standard_error"] is None


# mistakes


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x: distances.moments(x.reshape(20, 2, 2)), r"features must be features \[n, f\], got shape \(20, 2, 2\)"),
    (lambda x: distances.moments(np.where(x > 2, np.nan, x)), r"features has \d+ of 20 examples .* not finite"),
    (lambda x: kernel_distance(x, x[:, :3]), "x and y must be of the same features, got 4 and 3"),
    (lambda x: kernel_distance(x, x[:5], blocks=3), "blocks must be from 1 to half of the 5 examples, got 3"),
    (lambda x: kernel_distance(x, x, blocks=0), "blocks must be from 1"),
    (lambda x: frechet_distance(moments(x), moments(x[:, :2])), "same features, got 4 and 2"),
    (lambda x: frechet_distance(moments(x), moments(x[:1])), "at least two examples a side, got 1"),
    (lambda x: neighbours.overlap(x, x[:5]), "k must be from 1 to 4, below the size of both sets; got 3, 5"),
    (lambda x: neighbours.overlap(x, x, 0, 5), "k must be from 1 to 19"),
    (lambda x: neighbours.nearest(x, x, 21), "k must be from 1 to the 20 references, got 21"),
    (lambda x: distances.nll_gap(x[:, 0] / 0, x[:, 0]), r"log_prob_of_samples must be finite .* 20 that are not"),
    (lambda x: distances.sliced_wasserstein(jax.random.key(0), x, x[:0]), r"y must be features \[n, f\]"),
  ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_mistakes_are_named(call, message, untyped):
  with pytest.raises(ValueError, match=message):
    call(np.abs(normal(26, 20, 4)) * 2)
