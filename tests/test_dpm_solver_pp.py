import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order, sampled_moments, slope, weak_order
from oracles import SDES, Gaussian, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
solver = jd.samplers.dpm_solver_pp


@EACH_SDE
def test_second_order(sde, x64):
  assert 1.9 < flow_order(lambda sde, ts: solver(sde, ts, 2), sde, [48, 96]) < 2.2


@EACH_SDE
def test_third_order(sde, x64):
  assert 2.8 < flow_order(lambda sde, ts: solver(sde, ts, 3), sde, [64, 128]) < 3.6


@EACH_SDE
def test_halved_curvature_has_order_two(sde, x64):
  """What parity costs: the weights of common implementations at order 3."""
  assert 1.9 < flow_order(lambda sde, ts: solver(sde, ts, 3, coefficients="diffusers"), sde, [64, 128]) < 2.4


@pytest.mark.parametrize(("coefficients", "least", "most"), [("exact", 2.8, 3.3), ("diffusers", 1.8, 2.3)])
def test_third_order_from_exact_starting_values(coefficients, least, most, x64):
  """On steps of unequal length, from the middle of the grid, the memory filled with exact values of the denoiser."""
  sde, data = jd.VP(), gaussian()
  errors, steps = [], [20, 40, 80]
  for n in steps:
    place = jnp.linspace(0.0, 1.0, n + 3)
    ts = sde.time_of_log_snr(-2.0 + 7 * place + 2 * jnp.sin(2 * place))
    x = exact_start(data, sde, 4, ts[2])
    denoised = []
    for t in (ts[1], ts[0]):
      there = data.flow(sde, x, ts[2], t)
      denoised.append(jd.denoised(sde, data.score(sde), there, t))
    whole = solver(sde, ts, 3, coefficients=coefficients)
    nodes = jax.tree.map(lambda leaf: leaf[2:], whole.method.nodes)
    method = whole.method._replace(nodes=nodes, memory=lambda x: tuple(denoised))
    sampler = dataclasses.replace(whole, ts=ts[2:], method=method)
    found = jax.jit(lambda x: sampler(jax.random.key(0), x, data.score(sde)).x)(x)
    errors.append(float(jnp.max(jnp.abs(found - data.flow(sde, x, ts[2], ts[-1])))))
  assert least < slope(errors, steps) < most


@pytest.mark.parametrize(("order", "eta", "least"), [(1, 1.0, 0.9), (2, 1.0, 1.9), (2, 0.5, 1.8), (3, 1.0, 1.9)])
@pytest.mark.parametrize("name", ["vp", "edm"])
def test_weak_order_with_noise(name, order, eta, least, x64):
  assert weak_order(lambda sde, ts: solver(sde, ts, order, eta), SDES[name], [64, 128]) > least


@EACH_SDE
@pytest.mark.parametrize(("order", "eta"), [(1, 0.3), (2, 1.0), (3, 1.0), (3, 0.0)])
def test_a_constant_denoiser_is_solved_exactly(sde, order, eta, x64):
  """Data in one point: mean alpha m and variance sigma^2 at any step, for any amount of noise."""
  data, ts = Gaussian(np.array([1.0, -2.0]), np.zeros(2)), jd.time_grid(sde, 5)
  mean, variance = sampled_moments(solver(sde, ts, order, eta), data)
  alpha, sigma = sde.marginal(ts[-1])
  np.testing.assert_allclose(mean, alpha * data.mean, rtol=1e-9)
  np.testing.assert_allclose(variance, jnp.full(2, sigma**2), rtol=1e-8)


@EACH_SDE
def test_first_order_is_ddim(sde, x64):
  data, ts = gaussian(), jd.time_grid(sde, 6)
  x = exact_start(data, sde, 4, sde.t1)
  one = solver(sde, ts, 1)(jax.random.key(0), x, data.score(sde)).x
  two = jd.samplers.dpm_solver(sde, ts, 1)(jax.random.key(0), x, data.score(sde)).x
  np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)


def test_noise_that_is_not_there_is_not_drawn():
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 4)
  text = lambda eta: str(
    jax.make_jaxpr(lambda k, x: solver(sde, ts, 2, eta)(k, x, lambda x, t: -x).x)(jax.random.key(0), jnp.ones((2, 3)))
  )
  assert "erf_inv" not in text(0.0)
  assert "erf_inv" in text(1.0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_grid_to_zero_noise_ends_at_the_denoiser(order, eta):
  """Finite, and exactly what one denoising after the rest of the grid gives; noise-free."""
  sde, ts = jd.EDM(), jnp.asarray([80.0, 10.0, 1.0, 0.1, 0.0])
  score, x = gaussian().score(sde), jnp.ones((2, 3))
  found = solver(sde, ts, order, eta)(jax.random.key(0), x, score)
  expected = solver(sde, ts[:-1], order, eta, denoise=True)(jax.random.key(0), x, score)
  np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)
  assert found.nfe[0] == expected.nfe[0] == 4


def test_lower_order_final_lowers_the_last_two_steps():
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 6)
  used = lambda sampler: (sampler.method.nodes[2] != 0).sum(axis=1).tolist()
  assert used(solver(sde, ts, 3)) == [1, 2, 3, 3, 3, 3]
  assert used(solver(sde, ts, 3, lower_order_final=True)) == [1, 2, 3, 3, 2, 1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"order": 3}, "order must be at most the number of steps of ts: got order = 3 and 2 steps"),
    ({"order": 4}, "order must be at most 3, got 4"),
    ({"order": 0}, "order must be at least 1, got 0"),
    ({"eta": 1.5}, r"eta must lie in \[0, 1\] .*, got 1.5"),
    ({"eta": -0.5}, r"eta must lie in \[0, 1\]"),
    ({"eta": float("nan")}, r"eta must lie in \[0, 1\]"),
    ({"coefficients": "paper"}, "coefficients must be 'exact' or 'diffusers', got 'paper'"),
  ],
)
def test_bad_options_are_refused(options, message, untyped):
  with pytest.raises(ValueError, match=message):
    solver(jd.VP(), jd.time_grid(jd.VP(), 2), **options)


@pytest.mark.parametrize(("prediction", "mean"), [("noise", 0.3301), ("velocity", 0.2251)])
def test_published_sums_of_2m(prediction, mean):
  """mean |x| after 10 steps of diffusers' own test, which ends at the first of 1000 levels; model x t / (t + 1)."""
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
  times = np.linspace(0, 999, 11).round()[:0:-1].astype(int) + 1
  ts = chain.time(jnp.asarray([*times, 1]))

  def network(params, x, t):
    t = (chain.index(t) - 1).astype(x.dtype).reshape(-1, 1, 1, 1)
    return x * (t / (t + 1))

  score = jd.score_fn(network, None, chain.sde(), getattr(jd.predictions, prediction)())
  x_T = jnp.transpose(jnp.arange(768.0).reshape(3, 8, 8, 4) / 768, (3, 0, 1, 2))
  x = solver(chain.sde(), ts)(jax.random.key(0), x_T, score).x
  assert abs(float(jnp.mean(jnp.abs(x))) - mean) < 1e-4
