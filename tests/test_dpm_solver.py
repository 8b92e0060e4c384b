import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order
from oracles import gaussian
from switch import EACH_SDE

import jaxdiff as jd

SOLVERS = {order: functools.partial(jd.samplers.dpm_solver, order=order) for order in (1, 2, 3)}


@EACH_SDE
@pytest.mark.parametrize(("order", "least", "most"), [(1, 0.9, 1.2), (2, 1.9, 2.2), (3, 2.9, 3.3)])
def test_order_of_convergence(sde, order, least, most, x64):
  assert least < flow_order(SOLVERS[order], sde, [48, 96]) < most


@functools.cache
def by_paper():
  """Nodes of every order on four unequal steps, and the marginals that the paper's formulas take."""

  def run(sde, log_snr):
    ts = sde.time_of_log_snr(log_snr)
    between = [sde.marginal(sde.time_of_log_snr(log_snr[:-1] + r * jnp.diff(log_snr))) for r in (1 / 3, 1 / 2, 2 / 3)]
    nodes = {order: make(sde, ts).method.nodes for order, make in SOLVERS.items()}
    return nodes, sde.marginal(ts), between

  return jax.jit(run)


@EACH_SDE
def test_coefficients_are_those_of_the_paper(sde, x64):
  """Eq. 3.7 and Algorithms 1 and 2: what x, the first eps and the change of eps are multiplied by in every stage."""
  lam = np.array([-3.0, -1.7, -0.8, 0.9, 3.0])
  nodes, (alpha, sigma), between = jax.device_get(by_paper()(sde, 2 * lam))
  h, (a_t, a), s = np.diff(lam), (alpha[:-1], alpha[1:]), sigma[1:]
  third, half, two_thirds = between
  np.testing.assert_allclose(nodes[1][0][2:4], [a / a_t, s * np.expm1(h)], rtol=1e-9)
  begin, middle = nodes[2]
  np.testing.assert_allclose(begin[2:4], [half[0] / a_t, half[1] * np.expm1(h / 2)], rtol=1e-9)
  np.testing.assert_allclose(middle[1:], [half[1], a / a_t, s * np.expm1(h), s * np.expm1(h)], rtol=1e-9)
  begin, first, second = nodes[3]
  np.testing.assert_allclose(begin[2:4], [third[0] / a_t, third[1] * np.expm1(h / 3)], rtol=1e-9)
  h2 = 2 * h / 3
  bend = two_thirds[1] * 2 * (np.expm1(h2) / h2 - 1)
  np.testing.assert_allclose(first[1:4], [third[1], two_thirds[0] / a_t, two_thirds[1] * np.expm1(h2)], rtol=1e-9)
  np.testing.assert_allclose(first[4], bend, rtol=1e-8)
  np.testing.assert_allclose(second[1:4], [two_thirds[1], a / a_t, s * np.expm1(h)], rtol=1e-9)
  np.testing.assert_allclose(second[4], s * (np.expm1(h) / h - 1) * 1.5, rtol=1e-8)


@EACH_SDE
def test_first_order_is_ddim(sde, x64):
  """alpha_next D + sigma_next eps, the sampler itself of `ddim` without noise."""
  np.testing.assert_allclose(*jax.device_get(first_steps()(sde)), rtol=1e-10, atol=1e-12)


@functools.cache
def first_steps():
  data = gaussian()

  def run(sde):
    ts, x = jd.time_grid(sde, 6), exact_start(data, sde, 4, sde.t1)
    return [make(sde, ts)(jax.random.key(0), x, data.score(sde)).x for make in (SOLVERS[1], jd.samplers.ddim)]

  return jax.jit(run)


class Skewed(jd.VP):
  def time_of_log_snr(self, log_snr):
    return jd.VP().time_of_log_snr(log_snr) * (1 + 0.02 * jnp.sin(3 * log_snr))


def test_an_inexact_inverse_of_the_log_snr_does_no_harm(x64):
  """The time between may lie anywhere near the middle: the order stays."""
  data, sde = gaussian(), Skewed()

  @jax.jit
  def error(log_snr, n):
    ends = jd.VP().time_of_log_snr(log_snr)
    x = exact_start(data, sde, 4, ends[0])
    path = jd.samplers.dpm_solver(sde, ends, 2, path=1)(jax.random.key(0), x, data.score(sde)).path
    return jnp.max(jnp.abs(path[n] - data.flow(sde, x, ends[0], ends[n])))

  errors = [error(-8.0 + np.arange(97) * 12 / n, n) for n in (24, 48, 96)]
  assert np.log2(errors[0] / errors[2]) / 2 > 1.8


def test_a_grid_to_zero_noise_is_for_order_one_alone():
  """Its last step returns the denoiser."""
  sde, ts = jd.EDM(), np.asarray([80.0, 1.0, 0.1, 0.0], np.float32)
  score, x, key = gaussian().score(sde), np.ones((2, 3), np.float32), jax.random.key(0)

  def run(x):
    path = jd.samplers.dpm_solver(sde, ts, 1, path=1)(key, x, score).path
    return path[-1], jd.denoised(sde, score, path[-2], ts[-2])

  np.testing.assert_allclose(*jax.jit(run)(x), rtol=1e-5)
  with pytest.raises(ValueError, match="order=2 needs noise at its last time, but sigma is 0 at t = 0"):
    jd.samplers.dpm_solver(sde, ts, 2)


def test_order_is_checked(untyped):
  with pytest.raises(ValueError, match="order must be at most 3, got 4"):
    jd.samplers.dpm_solver(jd.VP(), np.asarray([1.0, 0.5], np.float32), 4)
  with pytest.raises(TypeError, match="order must be an integer, got 2.0"):
    jd.samplers.dpm_solver(jd.VP(), np.asarray([1.0, 0.5], np.float32), 2.0)
