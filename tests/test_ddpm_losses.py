"""The objectives of DDPM: the bound against closed forms of Gaussian data, part by part, and the hybrid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Gaussian, compiled
from test_ddpm import moments

import jaxdiff as jd
from jaxdiff.losses import decoders

KEY = jax.random.key(0)
SHORT = np.linspace(0.02, 0.6, 8)


def chain_of(betas=SHORT):
  return jd.ddpm.Chain(betas)


def draws(count, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), seed=0):
  return np.asarray(mean) + np.asarray(std) * np.random.default_rng(seed).normal(size=(count, len(mean)))


def exact_network(data, chain):
  """The noise to expect at (x, t) for Gaussian data."""
  sde = chain.sde()
  return lambda x, t: -sde.marginal(t)[1][:, None] * data.score(sde)(x, t)


def log_density(data, x):
  return -0.5 * np.sum(((x - data.mean) / data.std) ** 2 + np.log(2 * np.pi * data.std**2), axis=1)


# ----- the bound


@pytest.mark.parametrize("betas", [[0.7], SHORT], ids=len)
def test_bound_of_standard_normal_data_is_exact_at_any_length(betas, x64):
  """Averaged over x_0 it is the entropy: 4 standard errors; the reverse chain is the forward chain's own."""
  data, n = Gaussian(np.zeros(3), np.ones(3)), 4000

  def run(chain, key, x0):
    kinds = [{"variance": "beta"}, {"variance": "optimal", "data_variance": 1.0}]
    bounds = [jd.losses.ddpm_elbo(chain, every_step=True, **kind) for kind in kinds]
    return [bound(key, x0, exact_network(data, chain)) for bound in bounds]

  x0 = draws(n)
  for bound, aux in compiled(run, chain_of(betas), KEY, x0):
    gap = bound + log_density(data, x0)
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)
    assert gap.std() / np.sqrt(n) < 0.05
    np.testing.assert_allclose(aux["bits_per_dim"], bound / 3 / np.log(2), rtol=1e-12)
    np.testing.assert_allclose(aux["prior"] + aux["kl"] + aux["reconstruction"], aux["bits_per_dim"], rtol=1e-12)


def closed_form_gap(data, betas, variance, exact_decoder=False):
  """E bound - entropy with the exact score and the exact p_T: every expectation of the bound done by hand."""
  s2 = np.asarray(data.std) ** 2
  bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
  total = 0.5 * np.sum(np.log((bar[-1] * s2 + 1 - bar[-1]) / (1 - bar[-1])))
  for t in range(1, len(betas) + 1):
    beta, tilde = betas[t - 1], betas[t - 1] * (1 - bar[t - 1]) / (1 - bar[t])
    left = (np.sqrt(bar[t - 1]) * beta / (1 - bar[t])) ** 2 * s2 * (1 - bar[t]) / (bar[t] * s2 + 1 - bar[t])
    step = {"beta": beta, "beta_tilde": tilde, "optimal": tilde + left.mean()}[variance]
    if t > 1:
      total += 0.5 * np.sum(np.log(step / tilde) + (tilde + left) / step - 1)
    else:
      step = betas[1] * (1 - bar[1]) / (1 - bar[2]) if variance == "beta_tilde" else step
      step = left if exact_decoder else step
      total += 0.5 * np.sum(np.log(2 * np.pi * step) + left / step)
  return total - 0.5 * np.sum(np.log(2 * np.pi * np.e * s2))


def vp_betas(steps):
  middle = (np.arange(steps) + 0.5) / steps
  return -np.expm1(-(0.1 + middle * 9.9) / steps)


def exact_decoder(chain, mean, variance):
  """p(x_0 | x_1) of Gaussian data."""
  alpha, sigma = chain.marginal(1)
  total = alpha**2 * variance + sigma**2

  def decoder(x0, x_1):
    posterior = mean[None] + (alpha * variance / total)[None] * (x_1 - alpha * mean[None])
    return decoders.gaussian_log_prob(x0, posterior, jnp.sqrt(variance * sigma**2 / total)[None])

  return decoder


@functools.partial(jax.jit, static_argnums=0)
def bounds_of(names, chain, key, x0, mean, variance):
  """Of Gaussian data with the exact score and the exact p_T: of each variance, and of beta with the exact decoder."""
  alpha, sigma = chain.marginal(chain.steps)
  sde, prior = chain.sde(), (alpha * mean[None], alpha**2 * variance[None] + sigma**2)

  def network(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return sigma * (x - alpha * mean[None]) / (alpha**2 * variance[None] + sigma**2)

  options = {
    "beta": {},
    "beta_tilde": {"variance": "beta_tilde"},
    "optimal": {"variance": "optimal", "data_variance": variance},
    "decoder": {"reconstruction": exact_decoder(chain, mean, variance)},
  }
  make = functools.partial(jd.losses.ddpm_elbo, chain, prior=prior, every_step=True)
  return {name: make(**options[name])(key, x0, network)[0] for name in names}


def gaps_are_closed_forms(names, data, betas, n):
  """Within 4 standard errors; the gaps that are expected."""
  x0, expected = draws(n, data.mean, data.std), {}
  found = jax.device_get(bounds_of(names, chain_of(betas), KEY, x0, data.mean, data.std**2))
  for name, bound in found.items():
    gap, decoder = bound + log_density(data, x0), name == "decoder"
    expected[name] = closed_form_gap(data, betas, "beta" if decoder else name, decoder)
    error = gap.std() / np.sqrt(n)
    assert abs(gap.mean() - expected[name]) < 4 * error, name
    assert error < max(0.2 * expected[name], 0.01)
  return expected


@pytest.mark.parametrize("std", [[0.8, 0.1], [0.3, 0.3]], ids=["anisotropic", "isotropic"])
def test_bounds_of_gaussian_data_are_their_closed_forms(std, x64):
  """The gaps are known and least for the optimal variance, with which the bound of isotropic data is exact."""
  data = Gaussian(np.array([0.5, -0.3]), np.array(std))
  expected = gaps_are_closed_forms(("beta", "beta_tilde", "optimal"), data, vp_betas(16), 20_000)
  assert -1e-12 < expected["optimal"] == min(expected.values())
  assert (expected["optimal"] < 1e-12) == (std[0] == std[1])


def test_gap_of_the_bound_falls_like_one_over_the_steps(x64):
  """For N(m, 0.1^2), variance beta and the exact p(x_0 | x_1)."""
  data = Gaussian(np.array([0.5]), np.array([0.1]))
  first = gaps_are_closed_forms(("decoder",), data, vp_betas(128), 4000)["decoder"]
  later = closed_form_gap(data, vp_betas(512), "beta", exact_decoder=True)
  assert -1.1 < np.log(later / first) / np.log(4) < -0.9


def test_point_data_are_exact_with_beta_tilde(x64):
  """All data at one point c: eps is known, every KL is 0, and the prior KL is that to the exact p_T."""
  c = np.array([[0.7, -0.2]])

  def run(chain, key, x0):
    sde, (alpha, sigma) = chain.sde(), chain.marginal(chain.steps)

    def network(x, t):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      return (x - alpha * c) / sigma

    loss = jd.losses.ddpm_elbo(chain, variance="beta_tilde", prior=(alpha * c, sigma**2), every_step=True)
    return loss(key, x0, network)

  bound, aux = compiled(run, chain_of(), KEY, np.broadcast_to(c, (50, 2)))
  np.testing.assert_allclose(aux["kl"], 0, atol=1e-12)
  np.testing.assert_allclose(aux["prior"], 0, atol=1e-12)
  sigma = moments(SHORT)[1]
  np.testing.assert_allclose(bound, np.log(2 * np.pi * SHORT[1] * (sigma[1] / sigma[2]) ** 2), rtol=1e-10)


def test_one_random_step_is_an_unbiased_estimate_of_all(x64):
  """z-test of one x_0 over keys, of integers and a learned variance."""
  n = 8000
  network = lambda x, t: jnp.concatenate([0.8 * x + 0.1 * t[:, None], jnp.sin(3 * x)], axis=-1)

  def values(chain, key, every_step, count):
    make = functools.partial(jd.losses.ddpm_elbo, chain, variance="learned", levels=9, stratified=False)
    return make(every_step=every_step)(key, jnp.broadcast_to(jnp.asarray([[6, 1]]), (count, 2)), network)

  run = lambda chain, one, other: (values(chain, one, False, n), values(chain, other, True, n // 4))
  (one, one_aux), (every, every_aux) = compiled(run, chain_of(), KEY, jax.random.key(1))
  for a, b in [(one, every)] + [(one_aux[name], every_aux[name]) for name in ("kl", "reconstruction")]:
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 4 * error
    assert error < 0.1 * abs(b.mean()) + 0.02
  np.testing.assert_allclose(one_aux["prior"][0], every_aux["prior"][0], rtol=1e-12)


def test_bound_on_integers_is_a_bound_on_their_probability(x64):
  """Data uniform on the 9 images of 2 pixels and 3 levels: at least log 9 in the mean, and near it for many steps.

  Such data are points, so beta~ is the variance to take.
  """
  images = np.stack(np.meshgrid(np.arange(3), np.arange(3)), axis=-1).reshape(9, 2)
  points = np.array([-2 / 3, 0, 2 / 3])[images]

  def run(chain, key, x):
    sde = chain.sde()

    def network(x, t):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      weight = jax.nn.softmax(
        -0.5 * jnp.sum(((x[:, None] - alpha[..., None] * points[None]) / sigma[..., None]) ** 2, -1)
      )
      return (x - alpha * (weight @ points)) / sigma

    return jd.losses.ddpm_elbo(chain, variance="beta_tilde", levels=3, every_step=True)(key, x, network)[0]

  bound = compiled(run, chain_of(jd.ddpm.cosine_betas(200)), KEY, np.tile(images, (30, 1)))
  error = bound.std() / np.sqrt(len(bound))
  assert np.log(9) - 4 * error < bound.mean() < np.log(9) + 0.15


def evaluations(jaxpr):
  """How often the program takes an arctan2, which stands for the network; those in a scan as often as it runs."""
  total = 0
  for equation in jaxpr.eqns:
    inner = [v.jaxpr if hasattr(v, "jaxpr") else v for v in equation.params.values()]
    inside = sum(evaluations(v) for v in inner if hasattr(v, "eqns"))
    total += inside * equation.params.get("length", 1) + (equation.primitive.name == "atan2")
  return total


@pytest.mark.parametrize(("options", "expected"), [({"every_step": True}, 8), ({}, 1)])
def test_bound_uses_every_step_as_often_as_it_says(options, expected):
  loss = jd.losses.ddpm_elbo(chain_of(), **options)
  run = lambda key, x: loss(key, x, lambda x, t: jnp.arctan2(x, 1 + x))
  assert evaluations(jax.make_jaxpr(run)(KEY, np.zeros((2, 2), np.float32)).jaxpr) == expected


def test_bound_has_a_gradient_for_the_betas(x64):
  """Of all steps or one, against central differences with the same noise: a learned schedule is a trained chain."""
  x0 = draws(16)

  @jax.jit
  @jax.value_and_grad
  def bound(betas, weight):
    chain = jd.ddpm.Chain(betas)
    make = functools.partial(jd.losses.ddpm_elbo, chain, variance="optimal", data_variance=0.3)
    values = [make(every_step=every)(KEY, x0, lambda x, t: 0.8 * x)[0].mean() for every in (True, False)]
    return weight[0] * values[0] + weight[1] * values[1]

  for weight in np.eye(2):
    gradient = bound(SHORT, weight)[1]
    for i in (0, 3, 7):
      up, down = (bound(SHORT + size * np.eye(8)[i], weight)[0] for size in (1e-6, -1e-6))
      np.testing.assert_allclose(gradient[i], (up - down) / 2e-6, rtol=1e-5)


# ----- the hybrid


def learned_network(params):
  return lambda x, t: jnp.concatenate([params["mean"] * x, params["v"] * jnp.cos(x)], axis=-1)


PARAMS = {"mean": 0.7, "v": -0.4}


def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(x64):
  x, weight = np.tile(np.arange(8)[:, None], (4, 2)), 0.01

  def run(chain, params):
    x0 = decoders.integer_values(jnp.asarray(x), 9)
    gradient = lambda loss: jax.grad(lambda p: loss(KEY, jnp.asarray(x), learned_network(p))[0].sum())(params)
    simple = jax.grad(lambda m: jd.losses.ddpm_simple(chain)(KEY, x0, lambda x, t: m * x)[0].sum())(params["mean"])
    hybrid = gradient(jd.losses.ddpm_hybrid(chain, levels=9, weight=weight))
    return hybrid, simple, gradient(jd.losses.ddpm_elbo(chain, variance="learned", levels=9))

  hybrid, simple, bound = compiled(run, chain_of(), PARAMS)
  np.testing.assert_allclose(hybrid["mean"], simple, rtol=1e-10)
  np.testing.assert_allclose(hybrid["v"], weight * bound["v"], rtol=1e-10)
  assert bound["mean"] != 0
  assert hybrid["v"] != 0


def test_hybrid_is_the_sum_of_its_parts_in_one_evaluation(x64):
  network, calls = learned_network(PARAMS), []

  def counted(x, t):
    calls.append(1)
    return network(x, t)

  def run(chain, x0):
    return (
      jd.losses.ddpm_hybrid(chain, weight=0.02)(KEY, x0, counted),
      jd.losses.ddpm_elbo(chain, variance="learned")(KEY, x0, network),
      jd.losses.ddpm_simple(chain)(KEY, x0, lambda x, t: 0.7 * x),
    )

  (hybrid, aux), (bound, bound_aux), (simple, simple_aux) = compiled(run, chain_of(), draws(8))
  assert len(calls) == 1
  np.testing.assert_allclose(hybrid, simple + 0.02 * bound, rtol=1e-10)
  for name, value in {**bound_aux, **simple_aux}.items():
    np.testing.assert_allclose(aux[name], value, rtol=1e-12)


def test_learned_variance_reaches_the_optimal_one(x64):
  """Gradient descent on v alone, with the exact mean: s^2 at the last step becomes `optimal_variance`."""
  data, betas = Gaussian(np.zeros(1), np.full(1, 0.6)), np.array([0.3, 0.5])
  alpha, sigma = moments(betas)
  tilde = betas[1] * (sigma[1] / sigma[2]) ** 2
  left = 0.36 * sigma[2] ** 2 / (alpha[2] ** 2 * 0.36 + sigma[2] ** 2)
  optimal = tilde + (alpha[1] * betas[1] / sigma[2] ** 2) ** 2 * left
  best = np.log(optimal / tilde) / np.log(betas[1] / tilde)

  @jax.jit
  def slopes(v, chain, x0):
    exact, loss = exact_network(data, chain), jd.losses.ddpm_elbo(chain, variance="learned")

    def each(v):
      network = lambda x, t: jnp.concatenate([exact(x, t), jnp.full_like(x, 2 * v - 1)], axis=-1)
      return loss(jax.random.key(1), x0, network, u=jnp.full(len(x0), 0.75))[0]

    return jax.jacfwd(each)(v)

  x0 = draws(20_000, data.mean, data.std)
  at, below, above = (np.asarray(slopes(best + move, chain_of(betas), x0)) for move in (0.0, -0.1, 0.1))
  z = lambda g: g.mean() / (g.std() / np.sqrt(len(g)))
  assert abs(z(at)) < 4
  assert z(below) < -4
  assert z(above) > 4


# ----- all of them

LOSSES = {
  "simple": (lambda chain: jd.losses.ddpm_simple(chain), 1, None),
  "elbo": (lambda chain: jd.losses.ddpm_elbo(chain, levels=17), 1, 17),
  "optimal": (lambda chain: jd.losses.ddpm_elbo(chain, variance="optimal", data_variance=0.2), 1, None),
  "learned": (lambda chain: jd.losses.ddpm_elbo(chain, variance="learned"), 2, None),
  "every_step": (lambda chain: jd.losses.ddpm_elbo(chain, variance="beta_tilde", levels=17, every_step=True), 1, 17),
  "hybrid": (lambda chain: jd.losses.ddpm_hybrid(chain, levels=17), 2, 17),
}


def examples(levels, count=8):
  return np.arange(count)[:, None] * np.ones((1, 3), int) if levels else draws(count).astype(np.float32)


def in_half(name, scale, chain):
  make, parts, levels = LOSSES[name]
  network = lambda x, t: jnp.tile(scale.astype(jnp.bfloat16) * x.astype(jnp.bfloat16), (1, parts))
  return make(chain)(KEY, jnp.asarray(examples(levels)), network)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_networks_leave_the_rest_single(name):
  value, aux = jax.eval_shape(functools.partial(in_half, name), jnp.float32(0.9), chain_of())
  assert value.dtype == jnp.float32
  assert {v.dtype for v in aux.values()} == {jnp.dtype("float32")}
  assert value.shape == (8,)


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 0.02, 1000), [0.7]], ids=len)
def test_values_and_gradients_are_finite(betas):
  """With a chain that is traced, of the published 1000 steps or one; the other losses have no parts of their own."""
  total = lambda scale, chain: sum(
    in_half(name, scale, chain)[0].mean() for name in ("optimal", "every_step", "hybrid")
  )
  for number in compiled(jax.value_and_grad(total), jnp.float32(0.9), chain_of(betas)):
    assert np.isfinite(number)


def test_values_belong_to_the_example_and_conditions_reach_the_network():
  u, label = np.linspace(0.0, 0.95, 6, dtype=np.float32), np.linspace(0.0, 0.5, 6, dtype=np.float32)
  x = {"floats": examples(None, 6), "integers": examples(17, 6)}

  def losses(key, x, label, u):
    values = []
    for name in ("simple", "learned", "every_step", "hybrid"):
      make, parts, levels = LOSSES[name]
      network = lambda x, t, label, parts=parts: jnp.tile(label[:, None] * x, (1, parts))
      loss, x0 = make(chain_of()), x["integers" if levels else "floats"]
      values.append(loss(key, x0, network, {"label": label}, None if name == "every_step" else u)[0])
    return jnp.stack(values)

  def singly(key, *given):
    one = lambda *given: losses(*jax.tree.map(lambda v: v[None], given))[:, 0]
    return jax.vmap(one, out_axes=1)(jd.example_keys(key, 0, 6), *given)

  whole = jax.jit(losses)
  together = np.asarray(whole(KEY, x, label, u))
  np.testing.assert_allclose(together, compiled(singly, KEY, x, label, u), rtol=1e-5)
  assert np.all(np.asarray(whole(KEY, x, label + np.float32(0.1), u)) != together)


def test_wrong_use_is_refused():
  chain, x, integers = chain_of(), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32)
  run = lambda loss, x, **options: jax.eval_shape(lambda x: loss(KEY, x, lambda x, t: x, **options), x)
  for make, options, message in (
    (jd.losses.ddpm_simple, {"first": 3}, "first must be 1 or 2"),
    (jd.losses.ddpm_elbo, {"variance": "gamma"}, "variance must be 'beta'"),
    (jd.losses.ddpm_elbo, {"variance": "optimal"}, "needs data_variance"),
    (jd.losses.ddpm_elbo, {"data_variance": 1.0}, "and no other, needs data_variance"),
    (jd.losses.ddpm_hybrid, {"weight": 0.0}, "weight must be positive"),
  ):
    with pytest.raises(ValueError, match=message):
      make(chain, **options)
  with pytest.raises(ValueError, match="first must be 1 or 2 and a step of the chain, which has 1"):
    jd.losses.ddpm_simple(chain_of([0.7]), first=2)
  with pytest.raises(ValueError, match=r"2 times the channels of x, \(2, 6\); got \(2, 3\)"):
    run(jd.losses.ddpm_hybrid(chain), x)
  with pytest.raises(ValueError, match="every_step=True sums all"):
    run(jd.losses.ddpm_elbo(chain, every_step=True), x, u=np.zeros(2))
  for loss in (jd.losses.ddpm_simple(chain), jd.losses.ddpm_elbo(chain)):
    with pytest.raises(TypeError, match="x0 must be floating point, got int32"):
      run(loss, integers)
  with pytest.raises(TypeError, match="pass the raw integers"):
    run(jd.losses.ddpm_elbo(chain, levels=17), x)
