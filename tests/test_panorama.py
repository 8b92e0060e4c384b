"""Panoramas: the mean over windows, against least squares and the exact scores of independent pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import editing

KEY = jax.random.key(0)
SDE = jd.VP()
CANVAS, WINDOW, STRIDE = (5, 11), (4, 4), (2, 3)
COUNT = 2 * 4  # windows: tops 0 and 1, lefts 0, 3, 6 and 7
MEAN, STD = 0.4, 0.3


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
  x, t = jax.random.normal(KEY, (2, *CANVAS, 2)), jnp.asarray([0.3, 0.8])
  value = editing.panorama(mixing, CANVAS, WINDOW, STRIDE)(x, t)
  for k in range(2):
    of_window = lambda part: np.asarray(mixing(jnp.asarray(part)[None], t[k : k + 1])[0]).ravel()
    np.testing.assert_allclose(value[k].ravel(), least_squares(np.asarray(x[k]), of_window), rtol=1e-9, atol=1e-9)


def test_independent_pixels_have_their_exact_score_and_one_window_is_the_score_itself():
  x, t = jax.random.normal(KEY, (3, *CANVAS, 2)), jnp.asarray([0.1, 0.5, 1.0])
  whole, of = score_of_pixels(x, t), jax.jit(lambda score, x, t: score(x, t), static_argnums=0)
  column = editing.panorama(score_of_pixels, CANVAS, (5, 1), (1, 1))
  np.testing.assert_allclose(of(editing.panorama(score_of_pixels, CANVAS, WINDOW, STRIDE), x, t), whole, rtol=2e-6)
  np.testing.assert_allclose(of(column, x, t), whole, rtol=2e-6)
  np.testing.assert_allclose(of(editing.panorama(mixing, CANVAS, CANVAS, CANVAS), x, t), mixing(x, t), rtol=1e-5)
  assert column.evaluations(None) == 11


def test_the_denoiser_and_the_variance_are_merged_alike():
  """Through the network that answers both; without a denoiser there is none, and Tweedie's formula takes its place."""
  apply = lambda params, x, t: jnp.concatenate([mixing(x, t), jnp.cos(mixing(x, t))], axis=-1)
  base = jd.score_fn(apply, {}, SDE, jd.predictions.data(), learned_variance=True)
  score = editing.panorama(base, CANVAS, WINDOW, STRIDE)
  x, t = jax.random.normal(KEY, (2, *CANVAS, 2)), jnp.asarray([0.3, 0.8])
  merged = editing.panorama(mixing, CANVAS, WINDOW, STRIDE)(x, t)
  np.testing.assert_allclose(score.denoised(x, t), merged, rtol=1e-5, atol=1e-5)
  data, v = score.denoised_and_v(x, t)
  np.testing.assert_allclose(data, merged, rtol=1e-5, atol=1e-5)
  cosine = editing.panorama(lambda x, t: 0.5 * (jnp.cos(mixing(x, t)) + 1), CANVAS, WINDOW, STRIDE)(x, t)
  np.testing.assert_allclose(v, cosine, rtol=1e-5, atol=1e-5)
  alpha, sigma = (value[:, None, None, None] for value in SDE.marginal(t))
  np.testing.assert_allclose(score(x, t), (alpha * merged - x) / sigma**2, rtol=1e-4, atol=1e-4)
  assert score.sde is base.sde
  plain = editing.panorama(score_of_pixels, CANVAS, WINDOW, STRIDE)
  assert plain.denoised is None
  assert not hasattr(plain, "sde")
  tweedie = (x + sigma**2 * score_of_pixels(x, t)) / alpha
  np.testing.assert_allclose(jd.denoised(SDE, plain, x, t), tweedie, rtol=1e-4, atol=1e-5)
  with pytest.raises(TypeError, match="the score says nothing of the variance"):
    plain.denoised_and_v(x, t)


def test_conditions_go_with_the_windows():
  """Numbers are told to every window of their canvas, images are cut like it."""
  x, t = jax.random.normal(KEY, (2, *CANVAS, 1)), jnp.asarray([0.3, 0.8])
  told = lambda x, t, gain, image: mixing(x, t, gain=gain, shift=image)
  gain, image = jnp.asarray([2.0, -1.0]), jax.random.normal(jax.random.key(1), (2, *CANVAS, 1))
  value = editing.panorama(told, CANVAS, WINDOW, STRIDE)(x, t, gain=gain, image=image)
  plain = editing.panorama(mixing, CANVAS, WINDOW, STRIDE)(x, t)
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
  x_T = SDE.prior_sample(KEY, (3, *CANVAS, 2))
  sample = sampler(KEY, x_T, editing.panorama(Guided(), CANVAS, WINDOW, STRIDE))
  jax.effects_barrier()
  assert sizes == [3 * COUNT] * 6
  assert sample.nfe.tolist() == [6 * COUNT * 2] * 3
  np.testing.assert_allclose(sample.x, sampler(KEY, x_T, score_of_pixels).x, rtol=1e-4, atol=1e-5)


def test_an_adaptive_sampler_takes_the_same_steps():
  """It asks for the score of one canvas at a time."""
  sampler = jax.jit(jd.samplers.probability_flow(SDE, rtol=0.1, atol=0.1), static_argnums=2)
  x_T = SDE.prior_sample(KEY, (2, *CANVAS, 2))
  sample, whole = (
    sampler(KEY, x_T, score) for score in (editing.panorama(score_of_pixels, CANVAS, WINDOW, STRIDE), score_of_pixels)
  )
  np.testing.assert_allclose(sample.x, whole.x, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(sample.nfe, COUNT * whole.nfe)


def test_it_passes_through_jit_and_examples_are_their_own():
  """A pytree of the parameters of its score, one program for all of them, of any order of the canvases."""
  traces = []
  apply = lambda params, x, t: params * mixing(x, t)

  @jax.jit
  def run(score, x, t):
    traces.append(1)
    return score(x, t)

  make = lambda gain: editing.panorama(jd.score_fn(apply, gain, SDE, jd.predictions.score()), CANVAS, WINDOW, STRIDE)
  x, t = jax.random.normal(KEY, (3, *CANVAS, 1)), jnp.asarray([0.1, 0.5, 1.0])
  one, two = run(make(jnp.float32(1.0)), x, t), run(make(jnp.float32(2.0)), x, t)
  np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
  order = jnp.asarray([2, 0, 0])
  np.testing.assert_allclose(run(make(jnp.float32(1.0)), x[order], t[order]), one[order], rtol=1e-6)
  assert len(traces) == 1
  slope = jax.grad(lambda gain: jnp.sum(make(gain)(x, t)))(1.0)
  np.testing.assert_allclose(slope, jnp.sum(one), rtol=1e-4)
  assert make(1.0).evaluations(jnp.ones(7)) == COUNT


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
def test_bad_sizes_are_refused(sizes, error, message, untyped):
  with pytest.raises(error, match=message):
    editing.panorama(score_of_pixels, *sizes)


def test_bad_canvases_and_conditions_are_refused(untyped):
  score = editing.panorama(lambda x, t, **cond: -x, CANVAS, WINDOW, STRIDE)
  for shape in ((2, 5, 11), (2, 11, 5, 1), (2, 5, 10, 1)):
    with pytest.raises(ValueError, match=r"x must be canvases \[b, 5, 11, c\], got shape"):
      score(jnp.zeros(shape), 0.5)
  with pytest.raises(ValueError, match=r"cond\['small'\] has shape \(2, 4, 4, 1\) beside a canvas of 5x11 pixels"):
    score(jnp.zeros((2, 5, 11, 1)), 0.5, small=jnp.zeros((2, 4, 4, 1)))
  with pytest.raises(ValueError, match=r"score must return an array of the shape of x, \(16, 4, 4, 1\)"):
    editing.panorama(lambda x, t: x[..., 0], CANVAS, WINDOW, STRIDE)(jnp.zeros((2, 5, 11, 1)), 0.5)
  with pytest.raises(TypeError, match="score is a factory"):
    editing.panorama(jd.score_fn, CANVAS, WINDOW, STRIDE)
  with pytest.raises(TypeError, match="score must be a function"):
    editing.panorama(None, CANVAS, WINDOW, STRIDE)
