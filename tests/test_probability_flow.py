import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled, gaussian, mixture
from switch import EACH_SDE

import jaxdiff as jd
from jaxdiff import ode

KEY = jax.random.key(0)
TOLERANCES = {"tsit5": (1e-5, 1e-7, 1e-9), "dopri5": (1e-5, 1e-7, 1e-9), "dopri8": (1e-6, 1e-9, 1e-12)}


@functools.cache
def solves(solver):
  """Denoised samples from one state at three tolerances, how often the score was called, and the exact answer."""
  sde, data, calls, x_T = jd.VP(), gaussian(), [], np.full((1, 3), 1.5)

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return data.score(sde)(x, t)

  def run(x, tolerance):
    with mock.patch.object(ode.Solver, "__post_init__", return_value=None):  # which wants numbers that are known
      sampler = jd.samplers.probability_flow(sde, tolerance, tolerance, t0=0.1, solver=solver, denoise=True)
    exact = jd.denoised(sde, data.score(sde), data.flow(sde, x, sde.t1, 0.1), 0.1)
    return sampler(KEY, x, score), exact

  found, run = [], jax.jit(run)
  for tolerance in TOLERANCES[solver]:
    calls.clear()
    sample, exact = jax.device_get(run(x_T, tolerance))
    jax.effects_barrier()
    found.append((sample, len(calls), exact))
  return found


@pytest.mark.parametrize(("solver", "order"), [("tsit5", 5), ("dopri5", 5), ("dopri8", 8)])
def test_order_of_the_solver(solver, order, x64):
  """The error falls with the steps as steps^-order; 0.6 below it passes, since the steps are chosen by an estimate."""
  errors = [np.max(np.abs(sample.x - exact)) for sample, _, exact in solves(solver)]
  steps = [int(sample.status.accepted[0]) for sample, _, _ in solves(solver)]
  assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] > order - 0.6


@pytest.mark.parametrize("solver", TOLERANCES)
def test_evaluations_are_counted_and_the_last_state_is_denoised(solver, x64):
  """The exact denoiser of the exact flow; one more evaluation for it."""
  for sample, calls, exact in solves(solver):
    assert sample.nfe.tolist() == [calls]
    np.testing.assert_allclose(sample.x, exact, rtol=1e-4)


@functools.cache
def there_and_back():
  score, tolerance = mixture().score, 1e-7

  def run(sde, x):
    latent = jd.samplers.probability_flow_encode(sde, tolerance, tolerance)(KEY, x, score(sde))
    back = jd.samplers.probability_flow(sde, tolerance, tolerance)(KEY, latent.x, score(sde))
    return latent, back, sde.marginal(sde.t1)[1]

  return jax.jit(run)


@EACH_SDE
def test_encoding_is_the_inverse_of_sampling(sde, x64):
  """x -> z -> x on a mixture, within 10 tolerances times the stretch of the map; the latents fill the prior."""
  x = mixture().means[np.arange(8) % 3] + 0.2 * np.random.default_rng(0).standard_normal((8, 2))
  latent, back, prior_std = jax.device_get(there_and_back()(sde, x))
  jd.raise_if_failed(latent)
  jd.raise_if_failed(back)
  np.testing.assert_allclose(back.x, x, atol=10 * 1e-7 * max(1.0, np.max(np.abs(latent.x)) / 0.2))
  assert np.std(latent.x) > 0.5 * prior_std


def test_interpolated_latents_lie_on_the_arc(x64):
  first, last = np.random.default_rng(0).standard_normal((2, 5, 3, 2))
  flat = lambda z: z.reshape(*z.shape[:-2], -1)
  unit = lambda z: flat(z) / np.linalg.norm(flat(z), axis=-1, keepdims=True)
  run = jax.jit(lambda first, last: jd.samplers.interpolate(first, last, jnp.asarray([0.0, 0.25, 0.5, 1.0])))
  path = np.asarray(run(first, last))
  np.testing.assert_allclose(path[0], first, atol=1e-14)
  np.testing.assert_allclose(path[-1], last, atol=1e-14)
  arc = np.asarray(run(unit(first), unit(last)))
  np.testing.assert_allclose(np.linalg.norm(arc, axis=-1), 1.0, rtol=1e-12)
  angle = np.arccos(np.sum(arc[0] * arc[-1], axis=-1))
  np.testing.assert_allclose(np.arccos(np.sum(arc[0] * arc[1], axis=-1)), 0.25 * angle, rtol=1e-9)


def test_interpolation_of_equal_and_of_zero_latents_is_finite():
  z = np.asarray([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], np.float32)
  path = compiled(lambda z: jd.samplers.interpolate(z, z, jnp.asarray([0.3])), z)
  np.testing.assert_allclose(path[0], z, rtol=1e-6)


def test_latents_of_another_shape_are_refused(untyped):
  with pytest.raises(ValueError, match="first and last must have one shape"):
    jd.samplers.interpolate(np.ones((2, 3)), np.ones((3, 3)), np.ones(1))


def test_another_solver_is_refused(untyped):
  with pytest.raises(ValueError, match="solver must be one of 'tsit5', 'dopri5', 'dopri8', got 'euler'"):
    jd.samplers.probability_flow(jd.VP(), solver="euler")
