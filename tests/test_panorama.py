"""Panoramas: the mean over windows, against least squares and the exact scores of independent pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

import jaxdiff as jd
from jaxdiff import editing

SDE = jd.VP()
CANVAS, WINDOW, STRIDE = (5, 11), (4, 4), (2, 3)
COUNT = 2 * 4  # windows: tops 0 and 1, lefts 0, 3, 6 and 7
MEAN, STD = 0.4, 0.3


def canvases(count, channels=2):
  """Canvases, and times."""
  x = np.random.default_rng(0).normal(size=(count, *CANVAS, channels)).astype(np.float32)
  return x, np.linspace(0.1, 1.0, count).astype(np.float32)


def score_of_pixels(x, t):
  """Independent pixels N(MEAN, STD^2)."""
  alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
  return (alpha * MEAN - x) / (alpha**2 * STD**2 + sigma**2)


def mixing(x, t, *, gain=None, shift=0.0):
  """A window's pixels depend on each other, and on where they are in it."""
  place = jnp.arange(x[0].size, dtype=x.dtype).reshape(1, *x.shape[1:])
  value = jnp.cumsum(x, axis=2) * t[:, None, None, None] + jnp.sin(place)
  return value if gain is None else value * gain[:, None, None, None] + shift


def windows(canvas):
  """All windows of one canvas, as slices."""
  return [canvas[top : top + 4, left : left + 4] for top in (0, 1) for left in (0, 3, 6, 7)]


def least_squares(x, of_window):
  """argmin_v sum |W v - s(W x)|^2 of one canvas, by the matrices of the windows."""
  pixels = np.arange(x.size).reshape(x.shape)
  matrix = np.concatenate([np.eye(x.size)[part.ravel()] for part in windows(pixels)])
  return np.linalg.lstsq(matrix, np.concatenate([of_window(part) for part in windows(x)], None), rcond=None)[0]


def test_it_solves_the_least_squares_of_all_windows(x64):
  x, t = (value.astype(float) for value in canvases(2))
  value = compiled(editing.panorama(mixing, CANVAS, WINDOW, STRIDE), x, t)
  place = np.arange(4 * 4 * 2.0).reshape(4, 4, 2)
  for k in range(2):
    of_window = lambda part, t=t[k]: (np.cumsum(part, axis=1) * t + np.sin(place)).ravel()
    np.testing.assert_allclose(value[k].ravel(), least_squares(x[k], of_window), rtol=1e-9, atol=1e-9)


def test_independent_pixels_have_their_exact_score_and_one_window_is_the_score_itself():
  column = editing.panorama(score_of_pixels, CANVAS, (5, 1), (1, 1))
  scores = score_of_pixels, editing.panorama(score_of_pixels, CANVAS, WINDOW, STRIDE), column
  one = mixing, editing.panorama(mixing, CANVAS, CANVAS, CANVAS)
  run = lambda x, t: [[score(x, t) for score in each] for each in (scores, one)]
  (whole, windowed, of_column), (alone, in_one) = compiled(run, *canvases(3))
  np.testing.assert_allclose(windowed, whole, rtol=2e-6)
  np.testing.assert_allclose(of_column, whole, rtol=2e-6)
  np.testing.assert_allclose(in_one, alone, rtol=1e-5)
  assert column.evaluations(None) == 11


def test_the_denoiser_and_the_variance_are_merged_alike():
  """Through the network that answers both; without a denoiser there is none, and Tweedie's formula takes its place."""
  apply = lambda params, x, t: jnp.concatenate([mixing(x, t), jnp.cos(mixing(x, t))], axis=-1)
  base = jd.score_fn(apply, {}, SDE, jd.predictions.data(), learned_variance=True)
  score = editing.panorama(base, CANVAS, WINDOW, STRIDE)
  merge = lambda score: editing.panorama(score, CANVAS, WINDOW, STRIDE)
  plain = merge(score_of_pixels)

  @jax.jit
  def run(x, t):
    alpha, sigma = (value[:, None, None, None] for value in SDE.marginal(t))
    merged = merge(mixing)(x, t)
    cosine = merge(lambda x, t: 0.5 * (jnp.cos(mixing(x, t)) + 1))(x, t)
    tweedie = (x + sigma**2 * score_of_pixels(x, t)) / alpha
    expected = merged, merged, cosine, (alpha * merged - x) / sigma**2, tweedie
    found = score.denoised(x, t), *score.denoised_and_v(x, t), score(x, t), jd.denoised(SDE, plain, x, t)
    return found, expected

  for found, expected in zip(*run(*canvases(2)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert score.sde is base.sde
  assert plain.denoised is None
  assert not hasattr(plain, "sde")
  with pytest.raises(TypeError, match="the score says nothing of the variance"):
    plain.denoised_and_v(*canvases(2))


def test_conditions_go_with_the_windows():
  """Numbers are told to every window of their canvas, images are cut like it."""
  told = lambda x, t, gain, image: mixing(x, t, gain=gain, shift=image)
  gain, image = np.array([2.0, -1.0], np.float32), canvases(2, 1)[0][::-1]
  merge = lambda score: editing.panorama(score, CANVAS, WINDOW, STRIDE)
  run = lambda x, t, gain, image: (merge(told)(x, t, gain=gain, image=image), merge(mixing)(x, t))
  value, plain = compiled(run, *canvases(2, 1), gain, image)
  np.testing.assert_allclose(value, gain[:, None, None, None] * plain + image, rtol=1e-4, atol=1e-4)


def test_samples_are_those_of_the_model_of_the_canvas():
  """Every call is counted, of a score of two evaluations, and all windows of a step are in one."""
  sizes = []

  class Guided:
    def __call__(self, x, t):
      jax.debug.callback(lambda _: sizes.append(len(x)), t[0])
      return score_of_pixels(x, t)

    def evaluations(self, times):
      return 2

  sampler = jd.samplers.dpm_solver_pp(SDE, jd.time_grid(SDE, 6))
  panorama = editing.panorama(Guided(), CANVAS, WINDOW, STRIDE)
  run = lambda key, x: (sampler(key, x, panorama), sampler(key, x, score_of_pixels).x)
  sample, whole = compiled(run, jax.random.key(0), canvases(3)[0])
  jax.effects_barrier()
  assert sizes == [3 * COUNT] * 6
  assert sample.nfe.tolist() == [6 * COUNT * 2] * 3
  np.testing.assert_allclose(sample.x, whole, rtol=1e-4, atol=1e-5)


def test_an_adaptive_sampler_takes_the_same_steps():
  """It asks for the score of one canvas at a time."""
  sampler, panorama = (
    jd.samplers.probability_flow(SDE, rtol=0.1, atol=0.1),
    editing.panorama(score_of_pixels, CANVAS, WINDOW, STRIDE),
  )
  run = lambda key, x: [sampler(key, x, score) for score in (panorama, score_of_pixels)]
  sample, whole = compiled(run, jax.random.key(0), canvases(2)[0])
  np.testing.assert_allclose(sample.x, whole.x, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(sample.nfe, COUNT * whole.nfe)


def test_it_passes_through_jit_and_examples_are_their_own():
  """A pytree of the parameters of its score, one program for all of them, of any order of the canvases."""
  traces = []
  apply = lambda params, x, t: params * mixing(x, t)

  make = lambda gain: editing.panorama(jd.score_fn(apply, gain, SDE, jd.predictions.score()), CANVAS, WINDOW, STRIDE)

  @jax.jit
  def run(score, x, t):
    traces.append(1)
    of = lambda score: jnp.sum(score(x, t))
    return score(x, t), jax.grad(of)(score)

  (x, t), order = canvases(3, 1), np.array([2, 0, 0])
  (one, slopes), (two, _) = (jax.device_get(run(make(np.float32(gain)), x, t)) for gain in (1, 2))
  np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
  np.testing.assert_allclose(run(make(np.float32(1)), x[order], t[order])[0], one[order], rtol=1e-6)
  assert len(traces) == 1
  (slope,) = [leaf for leaf in jax.tree.leaves(slopes) if np.any(leaf != 0)]
  np.testing.assert_allclose(slope, np.sum(one), rtol=1e-4)
  assert make(1.0).evaluations(np.ones(7)) == COUNT


@pytest.mark.parametrize(
  ("sizes", "error", "message"),
  [
    (((5, 11), (6, 4), (2, 2)), ValueError, r"window must fit into the canvas, \(5, 11\); got \(6, 4\)"),
    (((5, 11), (4, 4), (2, 5)), ValueError, r"stride must not exceed the window, \(4, 4\), .* gaps; got \(2, 5\)"),
    (((5, 11), (4, 4), (2, 0)), ValueError, "stride must be at least 1"),
    (((5, 11), (4, 4.0), (2, 2)), TypeError, "window must be an integer"),
    ((8, (4, 4), (2, 2)), TypeError, r"canvas must be a pair \(height, width\), got 8"),
    (((5, 11, 1), (4, 4), (2, 2)), TypeError, r"canvas must be a pair"),
  ],
)
def test_bad_sizes_are_refused(sizes, error, message):
  with pytest.raises(error, match=message):
    editing.panorama(score_of_pixels, *sizes)


def test_bad_canvases_and_conditions_are_refused():
  score = editing.panorama(lambda x, t, **cond: -x, CANVAS, WINDOW, STRIDE)
  for shape in ((2, 5, 11), (2, 11, 5, 1), (2, 5, 10, 1)):
    with pytest.raises(ValueError, match=r"x must be canvases \[b, 5, 11, c\], got shape"):
      score(np.zeros(shape, np.float32), 0.5)
  with pytest.raises(ValueError, match=r"cond\['small'\] has shape \(2, 4, 4, 1\) beside a canvas of 5x11 pixels"):
    score(np.zeros((2, 5, 11, 1), np.float32), 0.5, small=np.zeros((2, 4, 4, 1), np.float32))
  with pytest.raises(ValueError, match=r"score must return an array of the shape of x, \(16, 4, 4, 1\)"):
    editing.panorama(lambda x, t: x[..., 0], CANVAS, WINDOW, STRIDE)(np.zeros((2, 5, 11, 1), np.float32), 0.5)
  with pytest.raises(TypeError, match="score is a factory"):
    editing.panorama(jd.score_fn, CANVAS, WINDOW, STRIDE)
  with pytest.raises(TypeError, match="score must be a function"):
    editing.panorama(None, CANVAS, WINDOW, STRIDE)
