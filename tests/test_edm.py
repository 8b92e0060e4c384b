import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order, sampled_moments
from oracles import SDES, Gaussian, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
edm = jd.samplers.edm


@EACH_SDE
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(sde, order, x64):
  found = flow_order(lambda sde, ts: edm(sde, ts, order=order), sde, [48, 96])
  assert order - 0.1 < found < order + 0.2


def test_heun_of_the_flow_in_sigma(x64):
  """Without churn it is the textbook's Heun for dx/dsigma = (x - D) / sigma."""
  sde, data = jd.EDM(), gaussian()
  ts = jd.time_grid(sde, 8, "karras", t0=0.01)
  x = exact_start(data, sde, 3, 80.0)
  found = edm(sde, ts)(jax.random.key(0), x, data.score(sde)).x
  slope = lambda x, s: (x - jd.denoised(sde, data.score(sde), x, s)) / s
  for s, s_next in itertools.pairwise(ts):
    first = slope(x, s)
    x = x + (s_next - s) * (first + slope(x + (s_next - s) * first, s_next)) / 2
  np.testing.assert_allclose(found, x, rtol=1e-9)


def test_first_order_is_ddim(x64):
  sde, data = jd.SubVP(), gaussian()
  ts, x = jd.time_grid(sde, 6), exact_start(data, sde, 4, 1.0)
  one = edm(sde, ts, order=1)(jax.random.key(0), x, data.score(sde)).x
  two = jd.samplers.dpm_solver(sde, ts, 1)(jax.random.key(0), x, data.score(sde)).x
  np.testing.assert_allclose(one, two, rtol=1e-9)


@EACH_SDE
def test_churn_keeps_the_marginals(sde, x64):
  """Variance after 400 churned steps: within 2%, where the noise alone, wrong by half, would leave 10% and more."""
  data, t0 = gaussian(), sde.time_of_log_snr(jnp.asarray(4.0))
  sampler = edm(sde, jd.time_grid(sde, 400, t0=t0), churn=40.0)
  found = jax.jit(lambda: sampled_moments(sampler, data))()
  for value, exact in zip(found, data.moments(sde, t0[None]), strict=True):
    np.testing.assert_allclose(value, exact[0], rtol=0.02)


@EACH_SDE
def test_a_churned_step_as_in_the_paper(sde, x64):
  """One step with its noise known, S_noise = 1.1, from s to (1 + gamma) s and by Heun to s'."""
  data, key, x = gaussian(), jax.random.key(3), jnp.asarray([[0.2, -0.3, 0.9]])
  ts = sde.time_of_log_snr(jnp.asarray([-1.0, 0.5, 2.0]))
  alpha, sigma = sde.marginal(ts)
  s, s_next = sigma[0] / alpha[0], sigma[1] / alpha[1]
  z = jd.keys.normal(jd.keys.fold_in(jd.example_keys(key, 0, 1), 0), x.shape, x.dtype)
  s_hat = 1.15 * s
  y = x / alpha[0] + jnp.sqrt(s_hat**2 - s**2) * 1.1 * z

  def slope(y, s):
    t = sde.time_of_log_snr(-2 * jnp.log(s))
    return (y - jd.denoised(sde, data.score(sde), sde.marginal(t)[0] * y, t)) / s

  first = slope(y, s_hat)
  y = y + (s_next - s_hat) * (first + slope(y + (s_next - s_hat) * first, s_next)) / 2
  found = edm(sde, ts, churn=0.3, noise_scale=1.1, path=1)(key, x, data.score(sde)).path[1]
  np.testing.assert_allclose(found, alpha[1] * y, rtol=1e-7)


def test_where_there_is_churn():
  """At most sqrt(2) - 1 a step, between S_tmin and S_tmax, and never above the largest level of the process."""
  sde = jd.EDM(sigma_max=80.0)
  ts = jnp.asarray([80.0, 60.0, 10.0, 1.0, 0.05, 0.01])
  raised = lambda **options: (edm(sde, ts, **options).method.nodes.s_hat / ts[:-1]).tolist()
  np.testing.assert_allclose(raised(churn=1.0), [1, 1.2, 1.2, 1.2, 1.2], rtol=1e-6)
  np.testing.assert_allclose(raised(churn=100.0), [1, 1, *[np.sqrt(2)] * 3], rtol=1e-6)
  np.testing.assert_allclose(raised(churn=1.0, churn_min=0.5, churn_max=20.0), [1, 1, 1.2, 1.2, 1], rtol=1e-6)
  assert float(edm(sde, ts, churn=1.0).method.nodes.noise[0]) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_grid_to_zero_noise_ends_in_an_euler_step(order):
  """The denoiser's value, at one evaluation, all of them counted."""
  sde, calls = jd.EDM(), []
  ts = jnp.asarray([80.0, 10.0, 1.0, 0.1, 0.0])

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return gaussian().score(sde)(x, t)

  found = edm(sde, ts, order=order)(jax.random.key(0), jnp.ones((1, 3)), score)
  jax.effects_barrier()
  assert found.nfe.tolist() == [len(calls)] == [4 if order == 1 else 7]
  before = edm(sde, ts[:-1], order=order)(jax.random.key(0), jnp.ones((1, 3)), score).x
  np.testing.assert_allclose(found.x, jd.denoised(sde, gaussian().score(sde), before, 0.1), rtol=1e-5)
  alone = edm(sde, jnp.asarray([80.0, 0.0]), order=order)(jax.random.key(0), jnp.ones((1, 3)), score)
  np.testing.assert_allclose(alone.x, jd.denoised(sde, gaussian().score(sde), jnp.ones((1, 3)), 80.0), rtol=1e-5)
  with pytest.raises(ValueError, match="denoise=True needs noise at its last time"):
    edm(sde, ts, order=order, denoise=True)


def test_churn_of_a_point_has_its_variance(x64):
  """Data in one point: the flow and the churn both keep the variance sigma^2, exactly."""
  sde, data = jd.VP(), Gaussian(np.array([1.0]), np.zeros(1))
  sampler = edm(sde, jd.time_grid(sde, 6), churn=1.0)
  _, variance = sampled_moments(sampler, data)
  np.testing.assert_allclose(variance, sde.marginal(sampler.ts[-1:])[1] ** 2, rtol=1e-8)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"order": 3}, "order must be at most 2, got 3"),
    ({"churn": -1.0}, "churn must be at least 0, got -1"),
    ({"noise_scale": float("nan")}, "noise_scale must be at least 0, got nan"),
  ],
)
def test_bad_options_are_refused(options, message, untyped):
  with pytest.raises(ValueError, match=message):
    edm(jd.VP(), jd.time_grid(jd.VP(), 4), **options)


def test_published_sum_of_euler():
  """sum |x| after 10 steps of diffusers' own test: Karras levels 80 .. 0.002, 0; a network c_noise -> x c / (c + 1)."""
  sde = jd.EDM(sigma_max=80.0)
  ts = jnp.concatenate([jd.time_grid(sde, 9, "karras", t0=0.002), jnp.zeros(1)])

  def network(params, x, t):
    t = t.reshape(-1, 1, 1, 1)
    return x * (t / (t + 1))

  score = jd.score_fn(network, None, sde, jd.predictions.edm(0.5))
  x = jnp.transpose(jnp.arange(768.0).reshape(3, 8, 8, 4) / 768, (3, 0, 1, 2))
  x = edm(sde, ts, order=1)(jax.random.key(0), x * jnp.sqrt(80.0**2 + 1), score).x
  assert abs(float(jnp.sum(jnp.abs(x))) - 34.1855) < 2e-3
