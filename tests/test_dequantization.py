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

KEY = jax.random.key(0)
SCORE = lambda x, t: -x
LATTICE = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), axis=-1).reshape(-1, 2)
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
  module, x = Dequantizer(width=8, couplings=2), jnp.zeros((1, *shape))
  leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, KEY, x, x))
  keys = jax.random.split(KEY, len(leaves))
  filled = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return partial(module.apply, jax.tree.unflatten(tree, filled))


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0, 40.0])
def test_truncated_normal_is_that_of_scipy(tau, x64):
  """Density to 1e-10, and the distribution by Kolmogorov's test at 1e-4; alpha is not 1."""
  sde, half, count = jd.VP(), 0.25, 4000
  ratio = half / tau  # sigma / alpha
  t0 = sde.time_of_log_snr(jnp.asarray(-2 * np.log(ratio)))
  alpha, sigma = (float(v) for v in sde.marginal(t0))
  assert alpha < 0.9999 if tau < 40 else alpha < 1
  x = jnp.full((count, 1), 2, jnp.uint8)  # centre 1/4 of [-1, 1]
  z, log_ratio = deq.truncated_normal(sde, t0).draw(jax.random.split(KEY, count), x, 4, (-1.0, 1.0))
  exact = scipy.stats.truncnorm(-tau, tau, loc=alpha * 0.25, scale=sigma)
  np.testing.assert_allclose(log_ratio, exact.logpdf(np.asarray(z[:, 0])), rtol=1e-7, atol=1e-9)
  assert scipy.stats.kstest(np.asarray(z[:, 0]), exact.cdf).pvalue > 1e-4
  assert np.all(np.abs(z / alpha - 0.25) <= half * (1 + 1e-12))


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-23])
def test_truncated_normal_is_stable_in_float32(sigma, u, monkeypatch):
  """Cells of 1/128, noise from 1e-4 to 1e6 of them, at both ends of the uniform numbers: in the cell, log q exact."""
  monkeypatch.setattr(jd.keys, "uniform", lambda key, shape: jnp.full(shape, u, jnp.float32))
  x = jnp.asarray([[0, 100, 255]], jnp.uint8)
  draw = deq.truncated_normal(jd.EDM(sigma_max=1e5), sigma).draw
  z, log_ratio = draw(jax.random.split(KEY, 1), x, 256, (-1.0, 1.0))
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
  run = lambda importance: jax.jit(
    lambda key: likelihood.bits_per_dim(broad(t0), 3, (-1.0, 1.0), dequantization, 4000, importance)(
      key, LATTICE, SCORE
    )
  )(KEY)
  tight, loose = run(True), run(False)
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
  value = jax.jit(lambda x: fn(KEY, x, BROAD.score(sde)).value)(grid)
  assert abs(np.sum(np.exp(value) * np.outer(weight, weight).reshape(-1)) - cell_masses().sum()) < 1e-3


def test_more_weights_are_tighter_and_tend_to_the_probability():
  """4000 keys of one cell: the mean bound falls from K = 1 to 8 to 64, towards -log2 P, and stays above."""
  x = jnp.broadcast_to(jnp.asarray([0, 2]), (4000, 2))
  run = lambda draws: (
    jax.jit(lambda key: likelihood.bits_per_dim(broad(), 3, draws=draws, importance=True)(key, x, SCORE))(KEY).value
  )
  one, eight, many = (run(draws) for draws in (1, 8, 64))
  exact = -np.log2(cell_masses()[LATTICE.tolist().index([0, 2])]) / 2
  gap = [float(value.mean()) - exact for value in (one, eight, many)]
  assert gap[0] > 4 * gap[1] > 16 * gap[2] > 0
  assert gap[2] < 0.01


def test_draws_belong_to_their_example_and_their_number():
  """The first draws of K + 1 are those of K: from the means, and from the error of two; batch mates change nothing."""
  run = lambda draws, key=KEY, x=LATTICE: likelihood.bits_per_dim(broad(), 3, draws=draws)(key, x, SCORE)
  one, two, three = (run(draws) for draws in (1, 2, 3))
  first, second = one.value, 2 * two.value - one.value
  np.testing.assert_allclose(two.dequantization_error, jnp.abs(second - first) / 2, atol=2e-6)
  third = 3 * three.value - 2 * two.value
  spread = np.std(np.stack([first, second, third]), axis=0, ddof=1) / np.sqrt(3)
  np.testing.assert_allclose(three.dequantization_error, spread, atol=3e-6)
  assert jnp.all(jnp.isnan(one.dequantization_error))
  assert float(jnp.min(jnp.abs(second - first))) > 1e-4
  assert three.nfe.tolist() == three.status.accepted.tolist() == [3] * 9
  alone = run(3, jd.example_keys(KEY, 5, 1), LATTICE[5:6])
  np.testing.assert_allclose(alone.value[0], three.value[5], rtol=1e-6)


@pytest.mark.parametrize("importance", [False, True])
def test_error_bars_match_the_spread(importance):
  """2000 keys of one cell: the root mean square of the claimed errors, to 8% (15% for the delta method)."""
  x, draws, probes = jnp.broadcast_to(jnp.asarray([1, 2]), (2000, 2)), 32, 0.0 if importance else 0.7
  noisy = broad(noise=probes)
  result = jax.jit(lambda key: likelihood.bits_per_dim(noisy, 3, draws=draws, importance=importance)(key, x, SCORE))(
    KEY
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
    jax.eval_shape(lambda x: bits(KEY, x, SCORE), jnp.zeros((1, 65), jnp.uint8))
  jax.eval_shape(lambda x: bits(KEY, x, SCORE), jnp.zeros((1, 64), jnp.uint8))


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
    deq.variational(lambda eps, x: (eps, eps)).draw(jax.random.split(KEY, 1), jnp.zeros((1, 2), int), 3, (-1.0, 1.0))
  loss = jd.losses.bound(jd.VP())
  with pytest.raises(ValueError, match="losses noise their data themselves"):
    likelihood.dequantized(loss, deq.gaussian(jd.VP()), 3)
  with pytest.raises(TypeError, match="x must be integers 0..2, got float32"):
    likelihood.dequantized(loss, deq.uniform(), 3)(KEY, jnp.zeros((1, 2)), SCORE)
  each = likelihood.each_condition(log_prob)
  with pytest.raises(TypeError, match="conds must be a dict"):
    each(KEY, jnp.zeros((1, 2)), SCORE, jnp.zeros(3))
  for conds in ({}, {"a": jnp.zeros(2), "b": jnp.zeros(3)}, {"a": jnp.zeros(())}, {"a": jnp.zeros(0)}):
    with pytest.raises(ValueError, match="one number of conditions"):
      each(KEY, jnp.zeros((1, 2)), SCORE, conds)
  with pytest.raises(ValueError, match="vectors .* or images"):
    Dequantizer().init(KEY, jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)))


def class_score(x, t, mean):
  alpha, sigma = (v[:, None] for v in jd.VP().marginal(t))
  return (alpha * mean - x) / (0.25 * alpha**2 + sigma**2)


def test_classes_have_the_posterior_of_bayes():
  """Three Gaussian classes: log-odds to 0.05 (the prior at t1), and the class by argmax; bits by argmin."""
  means = jnp.asarray([[0.4, 0.4], [-0.4, 0.2], [0.0, -0.5]])
  x = jax.random.normal(KEY, (8, 2))
  log_prob = likelihood.log_prob(jd.VP(), rtol=1e-4, atol=1e-4, steps="shared")
  result = jax.jit(lambda x: likelihood.each_condition(log_prob)(KEY, x, class_score, {"mean": means}))(x)
  exact = -2 * jnp.sum((x[:, None] - means[None]) ** 2, axis=2)
  odds = lambda value: value - value[:, :1]
  np.testing.assert_allclose(odds(result.value), odds(exact), atol=0.05)
  np.testing.assert_array_equal(jnp.argmax(result.value, axis=1), jnp.argmax(exact, axis=1))
  assert len(np.unique(jnp.argmax(exact, axis=1))) == 3
  assert result.value.shape == result.standard_error.shape == (8, 3)
  assert result.nfe.shape == result.status.code.shape == (8,)


def test_conditions_share_their_noise():
  """A condition that is ignored changes nothing, with one probe and one draw of the dequantization."""
  log_prob = likelihood.log_prob(jd.VP(), jd.divergence.hutchinson(), rtol=1e-2, atol=1e-2, steps="shared")
  bits = likelihood.bits_per_dim(log_prob, 3)
  score = lambda x, t, label: -x + jnp.sin(2 * x[:, ::-1])
  each = jax.jit(lambda x: likelihood.each_condition(bits)(KEY, x, score, {"label": jnp.arange(3)}))(LATTICE)
  one = jax.jit(lambda x: bits(KEY, x, lambda x, t: score(x, t, 0)))(LATTICE)
  np.testing.assert_allclose(each.value, np.tile(np.asarray(one.value)[:, None], 3), rtol=1e-5)
  np.testing.assert_array_equal(each.nfe, 3 * one.nfe)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 1)])
def test_flow_knows_its_jacobian(shape):
  """log|det| against the Jacobian of automatic differentiation, for vectors and images; every coordinate is moved."""
  flow, x = some_flow(shape), jax.random.normal(KEY, (1, *shape))
  eps = jax.random.normal(jax.random.key(1), x.shape)
  u, log_det = jax.jit(flow)(eps, x)
  jacobian = jax.jit(jax.jacfwd(lambda eps: flow(eps.reshape(x.shape), x)[0].reshape(-1)))(eps.reshape(-1))
  np.testing.assert_allclose(log_det[0], np.linalg.slogdet(np.asarray(jacobian, np.float64))[1], rtol=1e-4)
  assert float(jnp.min(jnp.abs(u - jax.scipy.special.ndtr(eps)))) > 1e-4
  assert np.abs(jacobian - np.diag(np.diag(jacobian))).max() > 1e-3


def test_the_start_of_the_flow_is_uniform():
  """log q is that of `uniform`, for every draw; its places by Kolmogorov's test at 1e-4."""
  x = jnp.ones((1000, 4), jnp.uint8)
  module = Dequantizer(width=4, couplings=2)
  flow = partial(module.apply, jax.jit(module.init)(KEY, jnp.zeros((1, 4)), jnp.zeros((1, 4))))
  keys = jax.random.split(KEY, 1000)
  z, log_ratio = jax.jit(lambda keys: deq.variational(flow).draw(keys, x, 4, (0.0, 8.0)))(keys)
  np.testing.assert_allclose(log_ratio, deq.uniform().draw(keys, x, 4, (0.0, 8.0))[1], atol=1e-5)
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
  params = module.init(KEY, jnp.zeros((1, 2)), jnp.zeros((1, 2)))
  optimizer = optax.adam(2e-2)

  def step(carry, key):
    params, state = carry
    value, gradient = jax.value_and_grad(bound)(params, key)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  keys = jax.random.split(KEY, 200)
  (params, _), values = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, optimizer.init(params)))
  exact = -2 * np.log(scipy.stats.norm.cdf(7.5) - scipy.stats.norm.cdf(-2.5))
  assert values[0] > exact + 10
  assert exact - 0.1 < values[-20:].mean() < exact + 0.5


def test_a_loss_on_integers_is_the_loss_on_their_states_and_the_ratio():
  loss, x = jd.losses.bound(jd.VP(), jd.predictions.score()), LATTICE
  value, aux = likelihood.dequantized(loss, deq.uniform(), 3)(KEY, x, SCORE)
  z, _ = deq.uniform().draw(jd.keys.fold_in(jd.example_keys(KEY, 0, 9), 2**20), x, 3, (-1.0, 1.0))
  expected = loss(KEY, z, SCORE)[0] - 2 * np.log(2 / 3)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(aux["bits_per_dim"], expected / (2 * np.log(2)), rtol=1e-5)
  np.testing.assert_allclose(aux["dequantization"], -np.log2(2 / 3), rtol=1e-5)
