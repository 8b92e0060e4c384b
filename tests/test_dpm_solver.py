import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order
from oracles import SDES, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


@EACH_SDE
@pytest.mark.parametrize(("order", "least", "most"), [(1, 0.9, 1.2), (2, 1.9, 2.2), (3, 2.9, 3.3)])
def test_order_of_convergence(sde, order, least, most, x64):
  make = lambda sde, ts: jd.samplers.dpm_solver(sde, ts, order)
  assert least < flow_order(make, sde, [48, 96]) < most


@EACH_SDE
def test_first_order_is_ddim(sde, x64):
  """alpha_next D + sigma_next eps, step by step."""
  data, ts = gaussian(), jd.time_grid(sde, 6)
  x = exact_start(data, sde, 4, sde.t1)
  found = jd.samplers.dpm_solver(sde, ts, 1)(jax.random.key(0), x, data.score(sde)).x
  alpha, sigma = sde.marginal(ts)
  for i in range(6):
    eps = -sigma[i] * data.score(sde)(x, jnp.full(4, ts[i]))
    x = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
  np.testing.assert_allclose(found, x, rtol=1e-10, atol=1e-12)


def test_an_inexact_inverse_of_the_log_snr_does_no_harm(x64):
  """The time between may lie anywhere near the middle: the order stays."""

  class Skewed(jd.VP):
    def time_of_log_snr(self, log_snr):
      return jd.VP().time_of_log_snr(log_snr) * (1 + 0.02 * jnp.sin(3 * log_snr))

  ends = jd.VP().time_of_log_snr(jnp.linspace(-8.0, 4.0, 97))
  data, sde = gaussian(), Skewed()
  x = exact_start(data, sde, 4, ends[0])
  exact = data.flow(sde, x, ends[0], ends[-1])
  errors = []
  for ts in (ends[::4], ends[::2], ends):
    found = jd.samplers.dpm_solver(sde, ts, 2)(jax.random.key(0), x, data.score(sde)).x
    errors.append(float(jnp.max(jnp.abs(found - exact))))
  assert np.log2(errors[0] / errors[2]) / 2 > 1.8


def test_a_grid_to_zero_noise_is_for_order_one_alone():
  sde, ts = jd.EDM(), jnp.asarray([80.0, 1.0, 0.1, 0.0])
  score = gaussian().score(sde)
  x = jnp.ones((2, 3))
  nearly = jd.samplers.dpm_solver(sde, ts[:-1], 1, denoise=True)(jax.random.key(0), x, score).x
  np.testing.assert_allclose(jd.samplers.dpm_solver(sde, ts, 1)(jax.random.key(0), x, score).x, nearly, rtol=1e-5)
  with pytest.raises(ValueError, match="order=2 needs noise at its last time, but sigma is 0 at t = 0"):
    jd.samplers.dpm_solver(sde, ts, 2)


def test_order_is_checked(untyped):
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 4)
  with pytest.raises(ValueError, match="order must be at most 3, got 4"):
    jd.samplers.dpm_solver(sde, ts, 4)
  with pytest.raises(TypeError, match="order must be an integer, got 2.0"):
    jd.samplers.dpm_solver(sde, ts, 2.0)
