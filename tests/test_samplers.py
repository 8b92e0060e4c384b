"""The probability flow, solved with adaptive steps, and the grids of all others; promises of all: conformance."""

import functools

import jax
import numpy as np
import pytest
from convergence import exact_start
from oracles import gaussian, mixture
from switch import EACH_SDE, VP_AND_EDM

import jaxdiff as jd

KEY = jax.random.key(0)


@functools.cache
def solved():
  """A solve of Gaussian data with its path, and the exact flow at its nodes."""
  data = gaussian()

  def run(sde):
    x_T = exact_start(data, sde, 4, sde.t1)
    sample = jd.samplers.probability_flow(sde, 1e-8, 1e-8, path=True)(KEY, x_T, data.score(sde))
    return sample, jax.vmap(lambda t: data.flow(sde, x_T, sde.t1, t))(jd.time_grid(sde, 32))

  return jax.jit(run)


@EACH_SDE
def test_probability_flow_is_the_exact_flow(sde, x64):
  """At its end, the time at which sigma / alpha = 2e-3, within 1e-6; between the steps by interpolation."""
  sample, exact = jax.device_get(solved()(sde))
  jd.raise_if_failed(sample)
  np.testing.assert_allclose(sample.x, exact[-1], atol=1e-6)
  assert sample.path.shape == (33, 4, 3)
  np.testing.assert_allclose(sample.path, exact, atol=1e-4)
  np.testing.assert_array_equal(sample.path[-1], sample.x)


@functools.cache
def of_a_mixture():
  data = mixture()

  def run(sde):
    x_T, _ = jd.perturb(jax.random.key(1), data.sample(KEY, 3000), sde.t1, sde)
    return jd.samplers.probability_flow(sde, 1e-4, 1e-4)(KEY, x_T, data.score(sde)).x

  return jax.jit(run)


@VP_AND_EDM
def test_probability_flow_of_a_mixture_has_its_modes(sde):
  """Weights of the three modes of 3000 samples within 4 standard errors, from the exact p_t1 by noising data."""
  data, x = mixture(), np.asarray(of_a_mixture()(sde))
  nearest = np.argmin(np.linalg.norm(x[:, None] - data.means[None], axis=-1), axis=1)
  fractions = np.bincount(nearest, minlength=3) / 3000
  assert np.all(np.abs(fractions - data.weights) < 4 * np.sqrt(data.weights * (1 - data.weights) / 3000) + 0.01)


def test_running_out_of_steps_is_reported():
  sampler = jd.samplers.probability_flow(jd.VP(), max_steps=3)
  run = jax.jit(lambda x: sampler(KEY, x, gaussian().score(jd.VP())))
  sample = jax.device_get(run(np.ones((2, 3), np.float32)))
  assert np.all(np.isnan(sample.x))
  with pytest.raises(jd.SolveError, match="2 of 2 examples .* reached max_steps .* raise max_steps"):
    jd.raise_if_failed(sample)


@pytest.mark.parametrize(
  ("ts", "message"),
  [
    ([0.1, 0.5], "ts must decrease"),
    ([0.5], r"ts must be \[steps \+ 1\] decreasing times"),
    ([1.5, 0.5], r"ts must lie in \[0, t1\] = \[0, 1.0\]"),
    ([0.5, -0.5], r"ts must lie in \[0, t1\]"),
    ([0.5, float("nan")], "ts must decrease"),
  ],
)
def test_bad_grids_are_refused(ts, message):
  with pytest.raises(ValueError, match=message):
    jd.samplers.reverse_sde(jd.VP(), np.asarray(ts, np.float32))


def test_bad_tolerances_are_refused():
  with pytest.raises(ValueError, match="rtol must be positive, got 0"):
    jd.samplers.probability_flow(jd.VP(), rtol=0.0)
  with pytest.raises(ValueError, match="max_steps must be at least 1"):
    jd.samplers.probability_flow(jd.VP(), max_steps=0)


def test_a_score_of_another_shape_is_refused(untyped):
  with pytest.raises(ValueError, match=r"shape of x, .*; got"):
    jax.eval_shape(
      lambda x: jd.samplers.probability_flow(jd.VP())(KEY, x, lambda x, t: x[:, :1]), np.ones((4, 2), np.float32)
    )
