import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import flow_order
from oracles import gaussian
from switch import EACH_SDE, VP

import jaxdiff as jd

unipc = jd.samplers.unipc
SOLVERS = {order: functools.partial(unipc, order=order) for order in (1, 2, 3)}


@EACH_SDE
@pytest.mark.parametrize(("order", "least", "most"), [(1, 1.9, 2.1), (2, 2.9, 3.2), (3, 3.4, 4.2)])
def test_order_of_convergence(sde, order, least, most, x64):
  """One above that of the predictor, by the corrector. Order 3 starts where the denoiser hardly bends: it shows 4."""
  assert least < flow_order(SOLVERS[order], sde, [64, 128]) < most


def stretched(fraction):
  return fraction - 0.1 * jnp.sin(2 * jnp.pi * fraction)


def test_order_on_unequal_steps(x64):
  assert flow_order(SOLVERS[3], VP, [64, 128], stretched) > 2.8


@functools.cache
def all_nodes():
  def run(sde, log_snr):
    ts = sde.time_of_log_snr(log_snr)
    return {order: make(sde, ts).method.nodes for order, make in SOLVERS.items()}, sde.marginal(ts)

  return jax.jit(run)


@EACH_SDE
def test_coefficients_are_those_of_the_paper(sde, x64):
  """Predictor and corrector integrate polynomials through their nodes: eq. 7 and 9, with B(h) in the weight of theta
  where one unknown is left. The corrector is what the next step adds to the prediction."""
  lam = np.array([-3.0, -1.9, -0.8, 0.9, 2.0, 3.5])
  found, (alpha, sigma) = jax.device_get(all_nodes()(sde, 2 * lam))
  h = np.diff(lam)
  J = [-np.expm1(-h)]
  for k in (1, 2, 3):
    J.append(1 - k * J[-1] / h)
  for most, (_, keep, predictor, correction) in found.items():
    np.testing.assert_allclose(keep, sigma[1:] / sigma[:-1], rtol=1e-12)
    np.testing.assert_array_equal(correction[0], 0)
    for i in range(5):
      order = min(most, i + 1)
      theta = np.array([0, -h[i - 1] / h[i], -(h[i - 1] + h[i - 2]) / h[i]])[:most]
      ahead = predictor[i] / alpha[i + 1]
      expected = [J[0][i], J[0][i] / 2 if order == 2 else J[1][i], J[2][i]][:order]
      np.testing.assert_allclose([np.sum(ahead * theta**k) for k in range(order)], expected, rtol=1e-8)
      np.testing.assert_array_equal(ahead[order:], 0)
      if i < 4:
        both = (correction[i + 1] + np.append(0, predictor[i])) / alpha[i + 1]
        expected = [J[0][i], J[0][i] / 2 if order == 1 else J[1][i], J[2][i], J[3][i]][: order + 1]
        total = [np.sum(both * np.append(1, theta) ** k) for k in range(order + 1)]
        np.testing.assert_allclose(total, expected, rtol=1e-8)


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_by_the_papers_equations(order, x64):
  """UniP and UniC with D and B(h) = e^-h - 1 on four unequal steps, the corrector from the last corrected state."""
  sde, data, ts = jd.VP(), gaussian(), np.asarray([1.0, 0.7, 0.5, 0.2, 0.1])
  x = np.array([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4]])
  run = lambda ts, x: (unipc(sde, ts, order)(jax.random.key(0), x, data.score(sde)).x, sde.marginal(ts))
  found, (alpha, sigma) = jax.device_get(jax.jit(run)(ts, x))
  lam = np.log(alpha / sigma)
  a, s, m, std = alpha[:, None], sigma[:, None], data.mean[None], data.std[None]
  denoise = lambda x, i: (x + s[i] ** 2 * (a[i] * m - x) / (a[i] ** 2 * std**2 + s[i] ** 2)) / a[i]
  values = [denoise(x, 0)]
  for i in range(4):
    h = lam[i + 1] - lam[i]
    B = np.exp(-h) - 1
    linear = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * B * values[i]
    slopes = []
    if order == 2 and i > 0:
      r = (lam[i - 1] - lam[i]) / h
      slopes = [(values[i - 1] - values[i]) / r]
    predicted = linear - alpha[i + 1] * B * sum(0.5 * slope for slope in slopes)
    if i == 3:
      break
    values.append(denoise(predicted, i + 1))
    ahead = values[i + 1] - values[i]
    if slopes:
      right = np.array([(1 + B / h) / -B, (1 - 2 / h * (1 + B / h)) / -B])
      rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), right)
      x = linear - alpha[i + 1] * B * (rho[0] * slopes[0] + rho[1] * ahead)
    else:
      x = linear - alpha[i + 1] * B * 0.5 * ahead
  np.testing.assert_allclose(found, predicted, rtol=1e-9)


def test_a_grid_to_zero_noise_ends_at_the_denoiser_of_the_corrected_state():
  """Finite, at one evaluation a step. The last state before it is the corrected one, so it is D of the prediction."""
  sde, ts = jd.EDM(), np.asarray([80.0, 10.0, 1.0, 0.1, 0.0], np.float32)
  score, key = gaussian().score(sde), jax.random.key(0)

  def run(x):
    pairs = []
    for make in SOLVERS.values():
      pairs.append((make(sde, ts)(key, x, score), make(sde, ts[:-1], denoise=True)(key, x, score)))
    return pairs

  for found, expected in jax.device_get(jax.jit(run)(np.ones((2, 3), np.float32))):
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)
    assert found.nfe[0] == expected.nfe[0] == 4


def test_lower_order_final_lowers_the_last_two_steps():
  ts = np.asarray([1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05], np.float32)

  def used(ts):
    plain, lowered = (unipc(jd.VP(), ts, 3, lower_order_final=final).method.nodes for final in (False, True))
    return [(weights != 0).sum(axis=1) for weights in (plain[2], lowered[2], plain[3])]

  plain, lowered, corrector = jax.jit(used)(ts)
  assert plain.tolist() == [1, 2, 3, 3, 3, 3]
  assert lowered.tolist() == [1, 2, 3, 3, 2, 1]
  assert corrector.tolist() == [0, 2, 3, 4, 4, 4]


def test_order_is_checked(untyped):
  ts = np.asarray([1.0, 0.7, 0.5, 0.2, 0.1], np.float32)
  with pytest.raises(ValueError, match="order must be at most the number of steps of ts: got order = 3 and 2 steps"):
    unipc(jd.VP(), ts[:3], 3)
  with pytest.raises(ValueError, match="order must be at most 3, got 4"):
    unipc(jd.VP(), ts, 4)
