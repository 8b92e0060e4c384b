import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order
from oracles import SDES, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
unipc = jd.samplers.unipc


@EACH_SDE
@pytest.mark.parametrize(("order", "least", "most"), [(1, 1.9, 2.1), (2, 2.9, 3.2), (3, 3.4, 4.2)])
def test_order_of_convergence(sde, order, least, most, x64):
  """One above that of the predictor, by the corrector. Order 3 starts where the denoiser hardly bends: it shows 4."""
  assert least < flow_order(lambda sde, ts: unipc(sde, ts, order), sde, [64, 128]) < most


def test_order_on_unequal_steps(x64):
  assert flow_order(lambda sde, ts: unipc(sde, ts, 3), jd.VP(), [64, 128], "karras") > 2.8


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_by_the_papers_equations(order, x64):
  """UniP and UniC with D and B(h) = e^-h - 1 on four unequal steps, the corrector from the last corrected state."""
  sde, data, ts = jd.VP(), gaussian(), jnp.asarray([1.0, 0.7, 0.5, 0.2, 0.1])
  x = exact_start(data, sde, 2, 1.0)
  found = unipc(sde, ts, order)(jax.random.key(0), x, data.score(sde)).x
  alpha, sigma = sde.marginal(ts)
  lam = jnp.log(alpha / sigma)
  denoise = lambda x, i: jd.denoised(sde, data.score(sde), x, ts[i])
  values = [denoise(x, 0)]
  for i in range(4):
    h = lam[i + 1] - lam[i]
    B = jnp.exp(-h) - 1
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
      b1 = (1 + B / h) / -B
      b2 = (1 - 2 / h * (1 + B / h)) / -B
      rho = jnp.linalg.solve(jnp.stack([jnp.ones(2), jnp.stack([r, jnp.ones(())])]), jnp.stack([b1, b2]))
      x = linear - alpha[i + 1] * B * (rho[0] * slopes[0] + rho[1] * ahead)
    else:
      x = linear - alpha[i + 1] * B * 0.5 * ahead
  np.testing.assert_allclose(found, predicted, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_grid_to_zero_noise_ends_at_the_denoiser_of_the_corrected_state(order):
  """Finite, at one evaluation a step. The last state before it is the corrected one, so it is D of the prediction."""
  sde, ts = jd.EDM(), jnp.asarray([80.0, 10.0, 1.0, 0.1, 0.0])
  score, x = gaussian().score(sde), jnp.ones((2, 3))
  found = unipc(sde, ts, order)(jax.random.key(0), x, score)
  expected = unipc(sde, ts[:-1], order, denoise=True)(jax.random.key(0), x, score)
  np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)
  assert found.nfe[0] == expected.nfe[0] == 4


def test_lower_order_final_lowers_the_last_two_steps():
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 6)
  used = lambda sampler: (sampler.method.nodes[2] != 0).sum(axis=1).tolist()
  assert used(unipc(sde, ts, 3)) == [1, 2, 3, 3, 3, 3]
  assert used(unipc(sde, ts, 3, lower_order_final=True)) == [1, 2, 3, 3, 2, 1]
  assert (unipc(sde, ts, 3).method.nodes[3] != 0).sum(axis=1).tolist() == [0, 2, 3, 4, 4, 4]


def test_order_is_checked(untyped):
  with pytest.raises(ValueError, match="order must be at most the number of steps of ts: got order = 3 and 2 steps"):
    unipc(jd.VP(), jd.time_grid(jd.VP(), 2), 3)
  with pytest.raises(ValueError, match="order must be at most 3, got 4"):
    unipc(jd.VP(), jd.time_grid(jd.VP(), 9), 4)
