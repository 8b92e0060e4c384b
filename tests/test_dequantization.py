"""Integers to bits/dim. Closed-form densities stand in for the solve wherever the solve is not what is tested."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from oracles import Mixture

import jaxdiff as jd
from jaxdiff import likelihood
from jaxdiff.likelihood import dequantization as deq
from jaxdiff.models import Dequantizer
from jaxdiff.schedules import start_time

SCORE = lambda x, t: -x
LATTICE = np.stack(np.meshgrid(np.arange(3), np.arange(3)), axis=-1).reshape(-1, 2)
EDGES = np.linspace(-1, 1, 4)
BROAD = Mixture(np.array([0.4, 0.6]), np.array([[0.3, -0.2], [-0.5, 0.4]]), 0.3)
NOISY = 0.05  # a t0 of VP at which sigma / alpha = 0.2, most of a cell of the lattice


def closed_form(log_density, t0=None, noise=0.0):
  """A `LogDensity` that knows its values, up to `noise` times a standard normal of the probes."""

  def evaluate(key, x, score, cond):
    error = jnp.full(len(x), noise, x.dtype)
    counts = jnp.ones(len(x), jnp.int32)
    value = log_density(x) + error * jd.keys.normal(key, (len(x),))
    return jd.typing.LogProb(value, x, counts, jd.typing.Status(0 * counts, counts, 0 * counts), error)

  return likelihood.LogDensity(jd.VP(), start_time(jd.VP(), t0, 1e-3), jd.divergence.exact(), evaluate)


def broad(t0=None, noise=0.0):
  sde = jd.VP()
  start = start_time(sde, t0, 1e-3)
  return closed_form(lambda x: BROAD.log_prob(x, sde, start), t0, noise)


def cell_masses(t0=None, scaled=False):
  """Of the nine cells (those of alpha times the lattice), under the density at t0."""
  alpha, sigma = (float(v) for v in jd.VP().marginal(start_time(jd.VP(), t0, 1e-3)))
  std = np.sqrt((alpha * BROAD.std) ** 2 + sigma**2)
  edges = (alpha if scaled else 1.0) * EDGES
  share = np.diff(scipy.stats.norm.cdf((edges[:, None, None] - alpha * BROAD.means) / std), axis=0)
  return np.einsum("k,ik,jk->ij", BROAD.weights, share[..., 0], share[..., 1]).T.reshape(-1)


def some_flow(shape):
  """A flow with small parameters, none of them 0 as at the start."""
  module, x = Dequantizer(width=8, couplings=2), jax.ShapeDtypeStruct((1, *shape), np.float32)
  shapes, rng = jax.eval_shape(module.init, jax.random.key(0), x, x), np.random.default_rng(0)
  return partial(module.apply, jax.tree.map(lambda leaf: np.float32(0.2 * rng.normal(size=leaf.shape)), shapes))


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0, 40.0])
def test_truncated_normal_is_that_of_scipy(tau, x64):
  """Density to 1e-10, and the distribution by Kolmogorov's test at 1e-4; alpha is not 1."""
  sde, half, count = jd.VP(), 0.25, 4000
  ratio = half / tau  # sigma / alpha
  t0 = sde.time_of_log_snr(jnp.asarray(-2 * np.log(ratio)))
  alpha, sigma = (float(v) for v in sde.marginal(t0))
  assert alpha < 0.9999 if tau < 40 else alpha < 1
  x = np.full((count, 1), 2, np.uint8)  # centre 1/4 of [-1, 1]
  draw = jax.jit(lambda key, x: deq.truncated_normal(sde, t0).draw(key, x, 4, (-1.0, 1.0)))
  z, log_ratio = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), count), x))
  exact = scipy.stats.truncnorm(-tau, tau, loc=alpha * 0.25, scale=sigma)
  np.testing.assert_allclose(log_ratio, exact.logpdf(np.asarray(z[:, 0])), rtol=1e-7, atol=1e-9)
  assert scipy.stats.kstest(np.asarray(z[:, 0]), exact.cdf).pvalue > 1e-4
  assert np.all(np.abs(z / alpha - 0.25) <= half * (1 + 1e-12))


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-23])
def test_truncated_normal_is_stable_in_float32(sigma, u, monkeypatch):
  """Cells of 1/128, noise from 1e-4 to 1e6 of them, at both ends of the uniform numbers: in the cell, log q exact."""
  monkeypatch.setattr(jd.keys, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
  x = np.array([[0, 100, 255]], np.uint8)
  draw = deq.truncated_normal(jd.EDM(sigma_max=1e5), sigma).draw
  run = jax.jit(lambda key, x: draw(key, x, 256, (-1.0, 1.0)))
  z, log_ratio = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), 1), x))
  centre, half = np.asarray([[-255, -55, 255]]) / 256, 1 / 256
  away = np.asarray(z, np.float64) - centre
  assert np.all(np.abs(away) <= half + 2e-7)  # an ulp of z
  quantile = scipy.stats.truncnorm.ppf(u + 2.0**-24, -half / sigma, half / sigma)
  np.testing.assert_allclose(away[0] / sigma, quantile, atol=2e-7 / sigma + 1e-5, rtol=1e-4)
  log_q = scipy.stats.truncnorm.logpdf(quantile, -half / sigma, half / sigma) - np.log(sigma)
  np.testing.assert_allclose(log_ratio[0], 3 * log_q, rtol=5e-4)


@pytest.mark.parametrize(
  ("t0", "make"),
  [
    (None, deq.uniform),
    (NOISY, lambda: deq.truncated_normal(jd.VP(), NOISY)),
    (NOISY, lambda: deq.gaussian(jd.VP(), NOISY)),
    (None, lambda: deq.variational(some_flow((2,)))),
  ],
  ids=["uniform", "truncated_normal", "gaussian", "variational"],
)
def test_many_weights_give_the_probability_of_every_cell(t0, make, request):
  """E w = P(n): the mass of the cell, within 5 standard errors; their sum is the mass of the box, or 1.

  The gaussian's cells overlap: there the sum alone is known. The mean of the bounds is below, cell by cell.
  """
  dequantization = make()
  bits = lambda importance: likelihood.bits_per_dim(broad(t0), 3, (-1.0, 1.0), dequantization, 4000, importance)
  run = jax.jit(lambda key: [bits(importance)(key, LATTICE, SCORE) for importance in (True, False)])
  tight, loose = jax.tree.map(np.asarray, run(jax.random.key(0)))
  mass = np.exp(-2 * np.log(2) * np.asarray(tight.value, np.float64))
  error = 2 * np.log(2) * np.asarray(tight.dequantization_error) * mass
  if "gaussian" in request.node.name:
    total = 1.0
  else:
    exact = cell_masses(t0, scaled=t0 is not None)
    assert np.all(np.abs(mass - exact) < 5 * error + 1e-5)
    total = exact.sum()
  assert abs(mass.sum() - total) < 5 * np.sqrt(np.sum(error**2)) + 1e-4
  assert error.sum() < 0.05
  assert np.all(loose.value > tight.value)
  assert np.sum(np.exp(-2 * np.log(2) * np.asarray(loose.value))) < total <= 1 + 1e-6


def test_quadrature_of_the_solved_density_over_the_lattice_is_the_mass_of_the_box():
  """Exact trace, exact score, 9 cells of 6 x 6 Gauss-Legendre nodes: 1e-3."""
  sde = jd.VP()
  nodes, weights = np.polynomial.legendre.leggauss(6)
  axis = ((EDGES[:-1] + EDGES[1:])[:, None] / 2 + nodes / 3).reshape(-1)
  grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), jnp.float32)
  weight = np.tile(weights / 3, 3)
  prior = lambda z: BROAD.log_prob(z, sde, jnp.asarray(sde.t1, z.dtype))
  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4, prior_log_prob=prior, steps="shared")
  value = jax.jit(lambda x: fn(jax.random.key(0), x, BROAD.score(sde)).value)(grid)
  assert abs(np.sum(np.exp(value) * np.outer(weight, weight).reshape(-1)) - cell_masses().sum()) < 1e-3


def test_more_weights_are_tighter_and_tend_to_the_probability():
  """4000 keys of one cell: the mean bound falls from K = 1 to 8 to 64, towards -log2 P, and stays above."""
  x = np.broadcast_to([0, 2], (4000, 2))
  bits = lambda draws: likelihood.bits_per_dim(broad(), 3, draws=draws, importance=True)
  run = jax.jit(lambda key: [bits(draws)(key, x, SCORE).value for draws in (1, 8, 64)])
  one, eight, many = map(np.asarray, run(jax.random.key(0)))
  exact = -np.log2(cell_masses()[LATTICE.tolist().index([0, 2])]) / 2
  gap = [float(value.mean()) - exact for value in (one, eight, many)]
  assert gap[0] > 4 * gap[1] > 16 * gap[2] > 0
  assert gap[2] < 0.01


def test_draws_belong_to_their_example_and_their_number():
  """The first draws of K + 1 are those of K: from the means, and from the error of two; batch mates change nothing."""
  bits = lambda draws: likelihood.bits_per_dim(broad(), 3, draws=draws)
  run = jax.jit(lambda key, x: [bits(draws)(key, x, SCORE) for draws in (1, 2, 3)])
  one, two, three = jax.tree.map(np.asarray, run(jax.random.key(0), LATTICE))
  first, second = one.value, 2 * two.value - one.value
  np.testing.assert_allclose(two.dequantization_error, np.abs(second - first) / 2, atol=2e-6)
  third = 3 * three.value - 2 * two.value
  spread = np.std(np.stack([first, second, third]), axis=0, ddof=1) / np.sqrt(3)
  np.testing.assert_allclose(three.dequantization_error, spread, atol=3e-6)
  assert np.all(np.isnan(one.dequantization_error))
  assert np.min(np.abs(second - first)) > 1e-4
  assert three.nfe.tolist() == three.status.accepted.tolist() == [3] * 9
  order = np.array([5, 0, 1, 2, 3, 4, 6, 7, 8])
  *_, moved = run(jd.example_keys(jax.random.key(0), 0, 9)[order], LATTICE[order])
  np.testing.assert_allclose(moved.value, three.value[order], rtol=1e-6)


def test_integers_outside_the_levels_are_reported():
  bits = likelihood.bits_per_dim(broad(), levels=4)
  result = jax.jit(lambda x: bits(jax.random.key(0), x, SCORE))(np.array([[0, 3], [4, 1]], np.uint8))
  assert result.status.code.tolist() == [0, 3]
  assert np.isnan(result.value).tolist() == [False, True]
  with pytest.raises(jd.SolveError, match="1 of 2 examples .*outside 0..levels-1"):
    jd.raise_if_failed(result)


@pytest.mark.parametrize(("dtype", "levels"), [(np.uint8, 256), (np.uint16, 65536), (np.int8, 100), (np.int32, 7)])
def test_the_largest_level_of_every_type_is_inside(dtype, levels):
  """256 wraps to 0 as a uint8: x < 256 would hold for no image."""
  bits = likelihood.bits_per_dim(broad(), levels)
  code = jax.jit(lambda x: bits(jax.random.key(0), x, SCORE).status.code)(np.array([[0, levels - 1]], dtype))
  assert code.tolist() == [0]


def test_bits_and_their_error_are_those_of_the_log_density():
  """Dequantization and probes have keys of their own; value and error convert by d log 2."""
  log_prob, n = broad(noise=0.3), np.array([[0, 3], [2, 1]], np.uint8)

  @jax.jit
  def run(key, n):
    first, second = jd.keys.split(jd.keys.fold_in(jd.example_keys(key, 0, 2), 0))
    expected = log_prob(second, likelihood.dequantize(first, n, 4), SCORE)
    return likelihood.bits_per_dim(log_prob, 4)(key, n, SCORE), expected

  result, expected = jax.tree.map(np.asarray, run(jax.random.key(3), n))
  np.testing.assert_allclose(result.value, -expected.value / (2 * np.log(2)) + 1, rtol=1e-5)
  np.testing.assert_allclose(result.standard_error, 0.3 / (2 * np.log(2)), rtol=1e-5)


@pytest.mark.parametrize("importance", [False, True])
def test_error_bars_match_the_spread(importance):
  """2000 keys of one cell: the root mean square of the claimed errors, to 8% (15% for the delta method)."""
  x, draws, probes = np.broadcast_to([1, 2], (2000, 2)), 32, 0.0 if importance else 0.7
  noisy = broad(noise=probes)
  result = jax.jit(lambda key: likelihood.bits_per_dim(noisy, 3, draws=draws, importance=importance)(key, x, SCORE))(
    jax.random.key(0)
  )
  claimed = np.sqrt(np.mean(np.square(result.dequantization_error)))
  np.testing.assert_allclose(claimed, np.std(result.value), rtol=0.15 if importance else 0.08)
  np.testing.assert_allclose(result.standard_error, probes / np.sqrt(draws) / (2 * np.log(2)), rtol=1e-5)


def test_importance_weights_of_estimated_traces_are_refused():
  match = "importance=True needs the exact trace.*divergence.exact"
  with pytest.raises(ValueError, match=match):
    likelihood.bits_per_dim(likelihood.log_prob(jd.VP(), jd.divergence.hutchinson(16)), 3, importance=True)
  bits = likelihood.bits_per_dim(likelihood.log_prob(jd.VP()), 3, importance=True)
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda x: bits(jax.random.key(0), x, SCORE), jnp.zeros((1, 65), jnp.uint8))
  jax.eval_shape(lambda x: bits(jax.random.key(0), x, SCORE), jnp.zeros((1, 64), jnp.uint8))


@pytest.mark.parametrize("make", [deq.truncated_normal, deq.gaussian])
def test_noise_of_another_process_or_time_is_refused(make):
  """What matters is alpha and sigma at t0; those of a traced process cannot be compared."""
  sde = jd.VP()
  for log_prob in (likelihood.log_prob(sde, t0=0.02), likelihood.log_prob(jd.EDM(), t0=0.02)):
    with pytest.raises(ValueError, match=r"dequantization must be made with.*log_prob has .*t0 = 0.02"):
      likelihood.bits_per_dim(log_prob, 3, dequantization=make(sde))
  likelihood.bits_per_dim(likelihood.log_prob(sde), 3, dequantization=make(sde))

  @jax.jit
  def traced(beta_max):
    sde = jd.VP(0.1, beta_max)
    likelihood.bits_per_dim(likelihood.log_prob(sde), 3, dequantization=make(sde))
    return beta_max

  traced(20.0)


def test_wrong_use_is_refused(untyped):
  log_prob = likelihood.log_prob(jd.VP())
  with pytest.raises(TypeError, match="dequantization is a factory: did you forget to call it"):
    likelihood.bits_per_dim(log_prob, 3, dequantization=deq.uniform)
  with pytest.raises(ValueError, match="draws must be at least 1"):
    likelihood.bits_per_dim(log_prob, 3, draws=0)
  with pytest.raises(ValueError, match=r"flow must return u \(1, 2\) and log\|det\| \(1,\)"):
    deq.variational(lambda eps, x: (eps, eps)).draw(
      jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 2), int), 3, (-1.0, 1.0)
    )
  loss = jd.losses.bound(jd.VP())
  with pytest.raises(ValueError, match="losses noise their data themselves"):
    likelihood.dequantized(loss, deq.gaussian(jd.VP()), 3)
  with pytest.raises(TypeError, match="x must be integers 0..2, got float32"):
    likelihood.dequantized(loss, deq.uniform(), 3)(jax.random.key(0), jnp.zeros((1, 2)), SCORE)
  each = likelihood.each_condition(log_prob)
  with pytest.raises(TypeError, match="conds must be a dict"):
    each(jax.random.key(0), jnp.zeros((1, 2)), SCORE, jnp.zeros(3))
  for conds in ({}, {"a": jnp.zeros(2), "b": jnp.zeros(3)}, {"a": jnp.zeros(())}, {"a": jnp.zeros(0)}):
    with pytest.raises(ValueError, match="one number of conditions"):
      each(jax.random.key(0), jnp.zeros((1, 2)), SCORE, conds)
  with pytest.raises(ValueError, match="vectors .* or images"):
    Dequantizer().init(jax.random.key(0), jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)))


def class_score(x, t, mean):
  alpha, sigma = (v[:, None] for v in jd.VP().marginal(t))
  return (alpha * mean - x) / (0.25 * alpha**2 + sigma**2)


def test_classes_have_the_posterior_of_bayes():
  """Three Gaussian classes: log-odds to 0.05 (the prior at t1), and the class by argmax; bits by argmin."""
  means = np.float32([[0.4, 0.4], [-0.4, 0.2], [0.0, -0.5]])
  x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
  log_prob = likelihood.log_prob(jd.VP(), rtol=1e-4, atol=1e-4, steps="shared")
  result = jax.jit(lambda x: likelihood.each_condition(log_prob)(jax.random.key(0), x, class_score, {"mean": means}))(x)
  exact = -2 * np.sum((x[:, None] - means[None]) ** 2, axis=2)
  odds = lambda value: np.asarray(value) - np.asarray(value)[:, :1]
  np.testing.assert_allclose(odds(result.value), odds(exact), atol=0.05)
  np.testing.assert_array_equal(np.argmax(result.value, axis=1), np.argmax(exact, axis=1))
  assert len(np.unique(np.argmax(exact, axis=1))) == 3
  assert result.value.shape == result.standard_error.shape == (8, 3)
  assert result.nfe.shape == result.status.code.shape == (8,)


def test_conditions_share_their_noise():
  """A condition that is ignored changes nothing, with noise of the probes and one draw of the dequantization."""
  bits = likelihood.bits_per_dim(broad(noise=0.5), 3)
  each = likelihood.each_condition(bits)
  run = jax.jit(lambda key, x: (each(key, x, SCORE, {"label": jnp.arange(3)}), bits(key, x, SCORE)))
  conditional, one = jax.tree.map(np.asarray, run(jax.random.key(0), LATTICE))
  np.testing.assert_allclose(conditional.value, np.tile(one.value[:, None], 3), rtol=1e-5)
  np.testing.assert_array_equal(conditional.nfe, 3 * one.nfe)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 1)])
def test_flow_knows_its_jacobian(shape):
  """log|det| against the Jacobian of automatic differentiation, for vectors and images; every coordinate is moved."""
  flow, (x, eps) = some_flow(shape), np.random.default_rng(1).normal(size=(2, 1, *shape)).astype(np.float32)
  flat = lambda eps: flow(eps.reshape(x.shape), x)[0].reshape(-1)
  run = jax.jit(lambda eps: (flow(eps, x), jax.jacfwd(flat)(eps.reshape(-1))))
  (u, log_det), jacobian = jax.tree.map(np.asarray, run(eps))
  np.testing.assert_allclose(log_det[0], np.linalg.slogdet(np.asarray(jacobian, np.float64))[1], rtol=1e-4)
  assert np.min(np.abs(u - scipy.stats.norm.cdf(eps))) > 1e-4
  assert np.abs(jacobian - np.diag(np.diag(jacobian))).max() > 1e-3


def test_the_start_of_the_flow_is_uniform():
  """log q is that of `uniform`, for every draw; its places by Kolmogorov's test at 1e-4."""
  x = np.ones((1000, 4), np.uint8)
  module = Dequantizer(width=4, couplings=2)
  flow = partial(module.apply, jax.jit(module.init)(jax.random.key(0), *2 * [np.zeros((1, 4), np.float32)]))
  keys = jax.random.split(jax.random.key(0), 1000)
  draw = jax.jit(lambda keys: [each.draw(keys, x, 4, (0.0, 8.0)) for each in (deq.variational(flow), deq.uniform())])
  (z, log_ratio), (_, expected) = draw(keys)
  np.testing.assert_allclose(log_ratio, expected, atol=1e-5)
  assert scipy.stats.kstest(np.asarray(z).reshape(-1), "uniform", (2.0, 2.0)).pvalue > 1e-4


@pytest.mark.standard_promotion
def test_training_the_flow_lowers_the_bound_towards_the_probability():
  """A density of std 0.1 in a quarter of a cell of width 1: uniform is 10 nats off, the flow 0.5 after 200 steps."""
  centre = jnp.asarray([[0.25, -0.25]])
  log_density = lambda x: jnp.sum(jax.scipy.stats.norm.logpdf(x, centre, 0.1), axis=1)
  x = jnp.broadcast_to(jnp.asarray([[1, 0]], jnp.uint8), (64, 2))
  module = Dequantizer(width=8, couplings=2)
  made = lambda key, z, network, cond, u: (-log_density(z), {})
  bound = lambda params, key: jnp.mean(
    likelihood.dequantized(made, deq.variational(partial(module.apply, params)), 2)(key, x, SCORE)[0]
  )
  params = jax.jit(module.init)(jax.random.key(0), *2 * [np.zeros((1, 2), np.float32)])
  optimizer = optax.adam(2e-2)

  def step(carry, key):
    params, state = carry
    value, gradient = jax.value_and_grad(bound)(params, key)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  keys = jax.random.split(jax.random.key(0), 200)
  (params, _), values = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, optimizer.init(params)))
  exact = -2 * np.log(scipy.stats.norm.cdf(7.5) - scipy.stats.norm.cdf(-2.5))
  assert values[0] > exact + 10
  assert exact - 0.1 < values[-20:].mean() < exact + 0.5


def test_a_loss_on_integers_is_the_loss_on_their_states_and_the_ratio():
  loss, x = jd.losses.bound(jd.VP(), jd.predictions.score()), LATTICE

  @jax.jit
  def run(key):
    z, _ = deq.uniform().draw(jd.keys.fold_in(jd.example_keys(key, 0, 9), 2**20), x, 3, (-1.0, 1.0))
    return likelihood.dequantized(loss, deq.uniform(), 3)(key, x, SCORE), loss(key, z, SCORE)[0] - 2 * np.log(2 / 3)

  (value, aux), expected = jax.tree.map(np.asarray, run(jax.random.key(0)))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(aux["bits_per_dim"], expected / (2 * np.log(2)), rtol=1e-5)
  np.testing.assert_allclose(aux["dequantization"], -np.log2(2 / 3), rtol=1e-5)
