import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import exact_start, flow_order, sampled_moments, slope, weak_order
from oracles import Gaussian, gaussian
from switch import EACH_SDE, VP_AND_EDM

import jaxdiff as jd

solver = jd.samplers.dpm_solver_pp
TS = np.asarray([1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.05], np.float32)


@functools.cache
def made(order, eta=0.0, coefficients="exact"):
  """One object for one choice of options, so that its program serves all tests."""
  return functools.partial(solver, order=order, eta=eta, coefficients=coefficients)


@EACH_SDE
def test_second_order(sde, x64):
  assert 1.9 < flow_order(made(2), sde, [48, 96]) < 2.2


@EACH_SDE
def test_third_order(sde, x64):
  assert 2.8 < flow_order(made(3), sde, [64, 128]) < 3.6


@EACH_SDE
def test_halved_curvature_has_order_two(sde, x64):
  """What parity costs: the weights of common implementations at order 3."""
  assert 1.9 < flow_order(made(3, coefficients="diffusers"), sde, [64, 128]) < 2.4


@pytest.mark.parametrize(("coefficients", "least", "most"), [("exact", 2.8, 3.3), ("diffusers", 1.8, 2.3)])
def test_third_order_from_exact_starting_values(coefficients, least, most, x64):
  """On steps of unequal length, from the middle of the grid, the memory filled with exact values of the denoiser."""
  sde, data = jd.VP(), gaussian()

  @jax.jit
  def error(n):
    place = jnp.arange(83.0) / (n + 2)
    ts = sde.time_of_log_snr(-2.0 + 7 * place + 2 * jnp.sin(2 * place))
    x = exact_start(data, sde, 4, ts[2])
    denoised = []
    for t in (ts[1], ts[0]):
      there = data.flow(sde, x, ts[2], t)
      denoised.append(jd.denoised(sde, data.score(sde), there, t))
    whole = solver(sde, ts, 3, coefficients=coefficients, path=1)
    nodes = jax.tree.map(lambda leaf: leaf[2:], whole.method.nodes)
    method = whole.method._replace(nodes=nodes, memory=lambda x: tuple(denoised))
    sampler = dataclasses.replace(whole, ts=ts[2:], method=method)
    found = sampler(jax.random.key(0), x, data.score(sde)).path[n]
    return jnp.max(jnp.abs(found - data.flow(sde, x, ts[2], ts[n + 2])))

  assert least < slope([float(error(n)) for n in (20, 40, 80)], [20, 40, 80]) < most


OPTIONS = [(1, 0.0, "exact"), (1, 0.3, "exact"), (2, 1.0, "exact"), (3, 0.5, "exact"), (3, 0.0, "diffusers")]


@functools.cache
def all_nodes():
  """Nodes of all these options on five unequal steps, and the marginals at their ends."""

  def run(sde, log_snr):
    ts = sde.time_of_log_snr(log_snr)
    return [made(*options)(sde, ts).method.nodes for options in OPTIONS], sde.marginal(ts)

  return jax.jit(run)


@EACH_SDE
def test_coefficients_are_those_of_the_paper(sde, x64):
  """Algorithm 2 and its SDE, on the values of D in the order of the past, by J_k from their recursion."""
  lam = np.array([-3.0, -1.9, -0.8, 0.9, 2.0, 3.5])
  found, (alpha, sigma) = jax.device_get(all_nodes()(sde, 2 * lam))
  h, d = np.diff(lam), np.eye(3)
  for (order, eta, coefficients), (_, keep, weights, spread) in zip(OPTIONS, found, strict=True):
    np.testing.assert_allclose(keep, sigma[1:] / sigma[:-1] * np.exp(-(eta**2) * h), rtol=1e-9)
    np.testing.assert_allclose(spread, sigma[1:] * np.sqrt(-np.expm1(-2 * eta**2 * h)), rtol=1e-9)
    for i, row in enumerate(weights):
      H, step_order = (1 + eta**2) * h[i], min(order, i + 1)
      J0 = -np.expm1(-H)
      J1 = 1 - J0 / H
      J2 = (1 - 2 * J1 / H) / (2 if coefficients == "diffusers" else 1)
      r = h[i - 1] / h[i], h[i - 2] / h[i]
      expected = J0 * d[0]
      if step_order == 2:
        expected = expected + J0 / 2 * (d[0] - d[1]) / r[0]
      if step_order == 3:
        slopes = (d[0] - d[1]) / r[0], (d[1] - d[2]) / r[1]
        second = (slopes[0] - slopes[1]) / (r[0] + r[1])
        expected = expected + J1 * (slopes[0] + r[0] * second) + J2 * second
      np.testing.assert_allclose(row, alpha[i + 1] * expected[:order], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("order", "eta", "least"), [(1, 1.0, 0.9), (2, 1.0, 1.9), (2, 0.5, 1.8), (3, 1.0, 1.9)])
@VP_AND_EDM
def test_weak_order_with_noise(sde, order, eta, least, x64):
  assert weak_order(made(order, eta), sde, [64, 128]) > least


@functools.cache
def moments_of_a_point(order, eta):
  data = Gaussian(np.array([1.0, -2.0]), np.zeros(2))

  def run(sde):
    ts = jd.time_grid(sde, 5)
    return [v[-1] for v in sampled_moments(solver(sde, ts, order, eta), data)], sde.marginal(ts[-1])

  return jax.jit(run)


@EACH_SDE
@pytest.mark.parametrize(("order", "eta"), [(1, 0.3), (2, 1.0), (3, 1.0), (3, 0.0)])
def test_a_constant_denoiser_is_solved_exactly(sde, order, eta, x64):
  """Data in one point: mean alpha m and variance sigma^2 at any step, for any amount of noise."""
  (mean, variance), (alpha, sigma) = jax.device_get(moments_of_a_point(order, eta)(sde))
  np.testing.assert_allclose(mean, alpha * np.array([1.0, -2.0]), rtol=1e-9)
  np.testing.assert_allclose(variance, np.full(2, sigma**2), rtol=1e-8)


def test_noise_that_is_not_there_is_not_drawn():
  text = lambda eta: str(
    jax.make_jaxpr(lambda k, x: solver(jd.VP(), TS, 2, eta)(k, x, lambda x, t: -x).x)(jax.random.key(0), TS[:, None])
  )
  assert "erf_inv" not in text(0.0)
  assert "erf_inv" in text(1.0)


def test_a_grid_to_zero_noise_ends_at_the_denoiser():
  """Whatever order and noise: the last step keeps nothing of x and of the past, and adds no noise. One of them run."""
  sde, ts = jd.EDM(), np.asarray([80.0, 10.0, 1.0, 0.1, 0.0], np.float32)
  score, x, each = gaussian().score(sde), np.ones((2, 3), np.float32), [(k, e) for k in (1, 2, 3) for e in (0, 0.5, 1)]

  def run(sde, ts, x):
    nodes = [jax.tree.map(lambda leaf: leaf[-1], solver(sde, ts, *options).method.nodes) for options in each]
    sample = solver(sde, ts, 3, 0.5, path=1)(jax.random.key(0), x, score)
    return nodes, sample, jd.denoised(sde, score, sample.path[-2], ts[-2])

  nodes, sample, expected = jax.device_get(jax.jit(run)(sde, ts, x))
  for (order, _), (t, keep, weights, spread) in zip(each, nodes, strict=True):
    assert (t, keep, spread) == (ts[-2], 0, 0)
    np.testing.assert_allclose(weights, [1, 0, 0][:order], atol=1e-7)
  np.testing.assert_allclose(sample.x, expected, rtol=1e-6)
  assert sample.nfe.tolist() == [4, 4]


def test_lower_order_final_lowers_the_last_two_steps():
  used = lambda ts, final: (solver(jd.VP(), ts, 3, lower_order_final=final).method.nodes[2] != 0).sum(axis=1)
  plain, lowered = jax.jit(lambda ts: (used(ts, False), used(ts, True)))(TS)
  assert plain.tolist() == [1, 2, 3, 3, 3, 3]
  assert lowered.tolist() == [1, 2, 3, 3, 2, 1]


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
    solver(jd.VP(), TS[:3], **options)


@pytest.mark.parametrize(("prediction", "mean"), [("noise", 0.3301), ("velocity", 0.2251)])
def test_published_sums_of_2m(prediction, mean):
  """mean |x| after 10 steps of diffusers' own test, which ends at the first of 1000 levels; model x t / (t + 1)."""
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
  sde = chain.sde()
  times = np.linspace(0, 999, 11).round()[:0:-1].astype(int) + 1

  def run(x):
    score = jd.score_fn(network, None, sde, getattr(jd.predictions, prediction)())
    x_T = jnp.transpose(x, (3, 0, 1, 2))
    x = solver(sde, chain.time(jnp.asarray([*times, 1])))(jax.random.key(0), x_T, score).x
    return jnp.mean(jnp.abs(x))

  def network(params, x, t):
    t = (chain.index(t) - 1).astype(x.dtype).reshape(-1, 1, 1, 1)
    return x * (t / (t + 1))

  x = np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768
  assert abs(float(jax.jit(run)(x)) - mean) < 1e-4
