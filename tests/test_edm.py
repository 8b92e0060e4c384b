import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order, sampled_moments
from oracles import Gaussian, gaussian
from switch import EACH_SDE

import jaxdiff as jd

edm = jd.samplers.edm
SOLVERS = {order: functools.partial(edm, order=order) for order in (1, 2)}
KEY = jax.random.key(0)


@EACH_SDE
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(sde, order, x64):
  assert order - 0.1 < flow_order(SOLVERS[order], sde, [48, 96]) < order + 0.2


def test_heun_of_the_flow_in_sigma(x64):
  """Without churn it is the textbook's Heun for dx/dsigma = (x - D) / sigma; Karras levels."""
  sde, data = jd.EDM(), gaussian()

  def run(x):
    ts = jd.time_grid(sde, 8, "karras", t0=0.01)
    return edm(sde, ts)(KEY, x, data.score(sde)).x, ts

  x = 80 * np.array([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4]])
  found, ts = jax.device_get(jax.jit(run)(x))
  slope = lambda x, s: (x - data.mean[None]) * (s / (data.std**2 + s**2))[None]
  for s, s_next in itertools.pairwise(ts):
    first = slope(x, s)
    x = x + (s_next - s) * (first + slope(x + (s_next - s) * first, s_next)) / 2
  np.testing.assert_allclose(found, x, rtol=1e-9)


def test_first_order_is_ddim(x64):
  sde, data = jd.SubVP(), gaussian()

  def run(sde):
    ts, x = jd.time_grid(sde, 6), exact_start(data, sde, 4, 1.0)
    return [make(sde, ts)(KEY, x, data.score(sde)).x for make in (SOLVERS[1], jd.samplers.ddim)]

  np.testing.assert_allclose(*jax.jit(run)(sde), rtol=1e-9)


@functools.cache
def churned():
  """Moments at the end of 400 churned steps; the exact ones; and one step of which the noise is known, with it."""
  data, x = gaussian(), np.array([[0.2, -0.3, 0.9]])

  def run(sde):
    t0 = sde.time_of_log_snr(jnp.asarray(4.0))
    found = sampled_moments(edm(sde, jd.time_grid(sde, 400, t0=t0), churn=40.0), data)
    ts = sde.time_of_log_snr(jnp.asarray([-1.0, 0.5, 2.0]))
    z = jd.keys.normal(jd.keys.fold_in(jd.example_keys(KEY, 0, 1), 0), x.shape, x.dtype)
    state = edm(sde, ts, churn=0.3, noise_scale=1.1, path=1)(KEY, jnp.asarray(x), data.score(sde)).path[1]
    alpha, sigma = sde.marginal(ts)
    return {
      "moments": ([v[-1] for v in found], [v[0] for v in data.moments(sde, t0[None])]),
      "step": (state, z, alpha, sigma),
    }

  return jax.jit(run)


@EACH_SDE
def test_churn_keeps_the_marginals(sde, x64):
  """Variance after 400 churned steps: within 2%, where the noise alone, wrong by half, would leave 10% and more."""
  found, exact = churned()(sde)["moments"]
  np.testing.assert_allclose(found, exact, rtol=0.02)


@EACH_SDE
def test_a_churned_step_as_in_the_paper(sde, x64):
  """One step with its noise known, S_noise = 1.1, from s to (1 + gamma) s and by Heun to s'."""
  data, x = gaussian(), np.array([[0.2, -0.3, 0.9]])
  found, z, alpha, sigma = jax.device_get(churned()(sde)["step"])
  s, s_next = sigma[0] / alpha[0], sigma[1] / alpha[1]
  s_hat = 1.15 * s
  y = x / alpha[0] + np.sqrt(s_hat**2 - s**2) * 1.1 * z
  slope = lambda y, s: (y - data.mean[None]) * (s / (data.std**2 + s**2))[None]
  first = slope(y, s_hat)
  y = y + (s_next - s_hat) * (first + slope(y + (s_next - s_hat) * first, s_next)) / 2
  np.testing.assert_allclose(found, alpha[1] * y, rtol=1e-7)


def test_where_there_is_churn():
  """At most sqrt(2) - 1 a step, between S_tmin and S_tmax, and never above the largest level of the process."""
  ts = np.asarray([80.0, 60.0, 10.0, 1.0, 0.05, 0.01], np.float32)
  some = [{"churn": 1.0}, {"churn": 100.0}, {"churn": 1.0, "churn_min": 0.5, "churn_max": 20.0}]
  nodes = jax.jit(lambda sde, ts: [edm(sde, ts, **options).method.nodes for options in some])(
    jd.EDM(sigma_max=80.0), ts
  )
  raised = [node.s_hat / ts[:-1] for node in nodes]
  np.testing.assert_allclose(raised[0], [1, 1.2, 1.2, 1.2, 1.2], rtol=1e-6)
  np.testing.assert_allclose(raised[1], [1, 1, *[np.sqrt(2)] * 3], rtol=1e-6)
  np.testing.assert_allclose(raised[2], [1, 1, 1.2, 1.2, 1], rtol=1e-6)
  assert float(nodes[0].noise[0]) == 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_grid_to_zero_noise_ends_in_an_euler_step(order):
  """The denoiser's value, at one evaluation, all of them counted."""
  sde, calls, exact = jd.EDM(), [], gaussian().score(jd.EDM())
  ts, x = np.asarray([80.0, 10.0, 1.0, 0.1, 0.0], np.float32), np.ones((1, 3), np.float32)
  to_zero, before_zero, at_once = (edm(sde, grid, order=order) for grid in (ts, ts[:-1], ts[[0, -1]]))

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return exact(x, t)

  def run(x):
    before, alone = (sampler(KEY, x, exact).x for sampler in (before_zero, at_once))
    return to_zero(KEY, x, score), jd.denoised(sde, exact, before, 0.1), alone, jd.denoised(sde, exact, x, 80.0)

  sample, last, alone, first = jax.jit(run)(x)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)] == [4 if order == 1 else 7]
  np.testing.assert_allclose(sample.x, last, rtol=1e-5)
  np.testing.assert_allclose(alone, first, rtol=1e-5)
  with pytest.raises(ValueError, match="denoise=True needs noise at its last time"):
    edm(sde, ts, order=order, denoise=True)


def test_churn_of_a_point_has_its_variance(x64):
  """Data in one point: the flow and the churn both keep the variance sigma^2, exactly."""
  data = Gaussian(np.array([1.0]), np.zeros(1))

  def run(sde):
    sampler = edm(sde, jd.time_grid(sde, 6), churn=1.0)
    return sampled_moments(sampler, data)[1][-1], sde.marginal(sampler.ts[-1:])[1] ** 2

  np.testing.assert_allclose(*jax.jit(run)(jd.VP()), rtol=1e-8)


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
    edm(jd.VP(), np.asarray([1.0, 0.5], np.float32), **options)


def test_published_sum_of_euler():
  """sum |x| after 10 steps of diffusers' own test: Karras levels 80 .. 0.002, 0; a network c_noise -> x c / (c + 1)."""
  sde = jd.EDM(sigma_max=80.0)

  def network(params, x, t):
    t = t.reshape(-1, 1, 1, 1)
    return x * (t / (t + 1))

  def run(x):
    ts = jnp.concatenate([jd.time_grid(sde, 9, "karras", t0=0.002), jnp.zeros(1)])
    score = jd.score_fn(network, None, sde, jd.predictions.edm(0.5))
    x = jnp.transpose(x, (3, 0, 1, 2)) * jnp.sqrt(80.0**2 + 1)
    return jnp.sum(jnp.abs(edm(sde, ts, order=1)(KEY, x, score).x))

  x = np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768
  assert abs(float(jax.jit(run)(x)) - 34.1855) < 2e-3
