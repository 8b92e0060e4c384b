"""Variational diffusion: closed-form values, invariance to the schedule, and the gradient that lowers the variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from oracles import Gaussian

import jaxdiff as jd
from jaxdiff.schedules import Gamma, monotone_network, of_gamma

DATA = Gaussian(np.array([0.5, -0.4, 0.1]), np.array([0.4, 0.9, 0.05]))
INTERIORS = {
  "straight": Partial(lambda t: t),
  "square": Partial(lambda t: 0.2 * t + 0.8 * t**2),
  "learned": jax.tree.map(lambda leaf: leaf + 0.5, monotone_network(8)),
}


def noise_network(x, level, tilt=1.0):
  """The noise to expect in DATA, from the noise level log(sigma / alpha) / 4; a wrong one for another tilt."""
  alpha, sigma = (v[:, None] for v in of_gamma(8 * level))
  mean, variance = (jnp.asarray(v, x.dtype)[None] for v in (DATA.mean, DATA.std**2))
  return tilt * sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)


def expected_diffusion(gamma, steps):
  """(2) with the exact network: the expected squared error of the noise is sum_j 1 - sigma^2 / v_j."""
  t = jnp.arange(1, steps + 1) / steps
  now, before = gamma(t), gamma(t - 1 / steps)
  alpha, sigma = of_gamma(now)
  variance = alpha[:, None] ** 2 * jnp.asarray(DATA.std**2)[None] + sigma[:, None] ** 2
  error = jnp.sum(1 - sigma[:, None] ** 2 / variance, axis=1)
  return 0.5 * jnp.sum(jnp.expm1(now - before) * error)


def values(gamma, n=40_000, seed=0, tilt=1.0, **options):
  loss = jd.losses.vdm(gamma, stratified=False, **options)
  run = jax.jit(lambda key, x: loss(key, x, functools.partial(noise_network, tilt=tilt)))
  return run(jax.random.key(seed), DATA.sample(jax.random.key(1), n))


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_the_discrete_loss_is_its_closed_form(steps, x64):
  gamma = Gamma(-6.0, 4.0, INTERIORS["square"])
  _, aux = values(gamma, steps=steps)
  diffusion = aux["diffusion"] * 3 * np.log(2)
  assert abs(diffusion.mean() - expected_diffusion(gamma, steps)) < 4 * diffusion.std() / np.sqrt(40_000)
  assert diffusion.std() / np.sqrt(40_000) < 0.05 * expected_diffusion(gamma, steps)


def test_the_discrete_loss_falls_to_the_continuous(x64):
  """In closed form: every doubling of T lowers it, at first order; the estimate of continuous time is its limit."""
  gamma = Gamma(-6.0, 4.0)
  exact = [float(expected_diffusion(gamma, steps)) for steps in (8, 16, 32, 64, 128, 256, 100_000)]
  assert np.all(np.diff(exact) < 0)
  gaps = np.asarray(exact[:-1]) - exact[-1]
  np.testing.assert_allclose(gaps[2:-1] / gaps[3:], 2, rtol=0.1)
  _, aux = values(gamma)
  diffusion = aux["diffusion"] * 3 * np.log(2)
  assert abs(diffusion.mean() - exact[-1]) < 4 * diffusion.std() / np.sqrt(40_000)


@pytest.mark.parametrize("tilt", [1.0, 0.7])
def test_continuous_time_does_not_care_for_the_interior(tilt):
  """The same mean for three schedules between the same ends, right network or wrong, within 4 standard errors."""
  each = [values(Gamma(-6.0, 4.0, interior), seed=k, tilt=tilt)[0] for k, interior in enumerate(INTERIORS.values())]
  for other in each[1:]:
    assert abs(other.mean() - each[0].mean()) < 4 * np.sqrt((other.var() + each[0].var()) / 40_000)
    assert not np.isclose(other.var(), each[0].var(), rtol=0.05)


def test_it_is_the_bound_of_its_process():
  """The same mean as `losses.bound` for VariancePreserving(gamma), term by term."""
  gamma = Gamma(-6.0, 4.0, INTERIORS["learned"])
  _, aux = values(gamma)
  bound = jd.losses.bound(
    jd.VariancePreserving(gamma),
    jd.predictions.noise(log_snr_time=True),
    time=jd.losses.times.uniform(stratified=False),
    t0=0.0,
  )
  x = DATA.sample(jax.random.key(1), 40_000)
  _, other = jax.jit(lambda key: bound(key, x, noise_network))(jax.random.key(5))
  for name in aux:
    a, b = aux[name], other[name]
    assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / len(x)) + 1e-5


def test_integers_are_bounded_by_their_log_probability(x64):
  """Two levels with the exact network: -log p of each, in continuous time; a little more in 32 steps."""
  p, gamma, n = jnp.asarray([0.8, 0.2]), Gamma(-12.0, 6.0), 20_000
  centers = jnp.asarray([[[-0.5, 0.5]]])

  def network(x, level):
    alpha, sigma = (v[:, None, None] for v in of_gamma(8 * level))
    logits = jnp.log(p)[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (x - alpha[..., 0] * denoised) / sigma[..., 0]

  for k in range(2):
    x = jnp.full((n, 1), k, jnp.uint8)
    run = lambda steps, x=x: jax.jit(lambda key: jd.losses.vdm(gamma, levels=2, steps=steps)(key, x, network)[0])
    continuous, discrete = run(None)(jax.random.key(0)), run(32)(jax.random.key(1))
    error = continuous.std() / np.sqrt(n)
    assert abs(continuous.mean() + jnp.log(p[k])) < 4 * error
    assert discrete.mean() > -jnp.log(p[k])


def objective(interior_mode, x, key):
  """Mean loss of (interior, ends, tilt of the network)."""

  def total(params):
    interior, ends, tilt = params
    loss = jd.losses.vdm(Gamma(*ends, interior), interior=interior_mode)
    network = lambda x, level: noise_network(x, level, tilt)
    u = jax.random.uniform(jax.random.key(7), (len(x),), x.dtype)
    return loss(key, x, network, u=u)

  return total


def params_of(tilt=0.8):
  return monotone_network(4), (jnp.asarray(-6.0), jnp.asarray(4.0)), jnp.asarray(tilt)


def test_the_interior_follows_the_variance_of_the_loss_and_all_else_the_bound(x64):
  """Against finite differences of the mean square on the same noise; ends and network as without the variance."""
  x, key = DATA.sample(jax.random.key(1), 200), jax.random.key(0)
  params = jax.tree.map(lambda v: v.astype(jnp.float64), params_of())
  run = jax.jit(objective("variance", x, key))
  gradient = jax.jit(jax.grad(lambda p: objective("variance", x, key)(p)[0].mean()))(params)
  plain = jax.jit(jax.grad(lambda p: objective("bound", x, key)(p)[0].mean()))(params)
  np.testing.assert_allclose(gradient[1], plain[1], rtol=1e-10)
  np.testing.assert_allclose(gradient[2], plain[2], rtol=1e-10)

  diffusion = lambda params: run(params)[1]["diffusion"] * 3 * np.log(2)
  leaves, tree = jax.tree.flatten(params[0])
  found = jax.tree.leaves(gradient[0])
  for i, leaf in enumerate(leaves):
    for j in np.ndindex(leaf.shape):
      moved = [[*leaves[:i], leaf.at[j].add(h), *leaves[i + 1 :]] for h in (1e-5, -1e-5)]
      squares = [jnp.mean(diffusion((jax.tree.unflatten(tree, m), *params[1:])) ** 2) for m in moved]
      np.testing.assert_allclose(found[i][j], (squares[0] - squares[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_the_mean_square_moves_as_the_variance_does():
  """E[L]^2 does not depend on the interior: its gradient is zero within 4 standard errors, that of E[L^2] is not."""
  n = 40_000
  x, keys = DATA.sample(jax.random.key(1), n), jd.example_keys(jax.random.key(0), 0, n)

  def gradients(mode):
    def one(interior, key, x, u):
      loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), interior=mode)
      return jnp.sum(loss(key[None], x[None], noise_network, u=u[None])[0])

    u = jax.random.uniform(jax.random.key(3), (n,))
    return jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0)))(params_of()[0], keys, x, u)

  z = lambda g: np.abs(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(n)))
  assert all(np.all(z(leaf) < 4.5) for leaf in jax.tree.leaves(gradients("bound")))
  assert max(np.max(z(leaf)) for leaf in jax.tree.leaves(gradients("variance"))) > 10


def test_the_variance_costs_no_network_evaluation():
  """The network is in the compiled program of value and gradient as often with it as without."""
  x, w = jnp.ones((4, 3)), jnp.ones((3, 3))

  def products(mode):
    def total(params):
      interior, w = params
      loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), interior=mode)
      return loss(jax.random.key(0), x, lambda x, t: jnp.tanh(x @ w) @ w)[0].mean()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(total))((monotone_network(2), w))
    return str(jaxpr).count("dot_general")

  assert products("variance") == products("bound") > 0


def test_training_the_interior_lowers_the_variance_and_keeps_the_ends():
  """200 steps: the variance of the estimate falls by a fifth at least, the ends are those it started with."""
  optimizer, interior = optax.adam(0.05), monotone_network(8)
  state, x = optimizer.init(interior), DATA.sample(jax.random.key(1), 512)
  of = lambda interior, key: jd.losses.vdm(Gamma(-8.0, 5.0, interior))(key, x, noise_network)[0]

  @jax.jit
  def step(interior, state, key):
    gradient = jax.grad(lambda interior: of(interior, key).mean())(interior)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(interior, updates), state

  before = values(Gamma(-8.0, 5.0, interior))[0]
  for key in jax.random.split(jax.random.key(2), 200):
    interior, state = step(interior, state, key)
  after = values(Gamma(-8.0, 5.0, interior))[0]
  assert after.var() < 0.8 * before.var()
  assert abs(after.mean() - before.mean()) < 4 * np.sqrt((after.var() + before.var()) / len(after))
  np.testing.assert_allclose(Gamma(-8.0, 5.0, interior)(jnp.asarray([0.0, 1.0])), [-8.0, 5.0], atol=1e-6)


def test_learned_ends_follow_the_bound(x64):
  """Their gradient, beside an interior that follows the variance, is the finite difference of the bound."""
  x, key = DATA.sample(jax.random.key(1), 5000), jax.random.key(0)
  params = jax.tree.map(lambda v: v.astype(jnp.float64), params_of(1.0))
  total = jax.jit(lambda p: objective("variance", x, key)(p)[0].mean())
  gradient = jax.jit(jax.grad(total))(params)[1]
  for i in range(2):
    moved = [tuple(end + h * (i == j) for j, end in enumerate(params[1])) for h in (1e-5, -1e-5)]
    plus, minus = (total((params[0], ends, params[2])) for ends in moved)
    np.testing.assert_allclose(gradient[i], (plus - minus) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: lambda v: jax.lax.map(f, v[None])[0]])
def test_the_gradient_survives_transformations_inside_it(wrap):
  """With what a network may capture: parameters, integer labels, a random key."""
  x, labels, u = DATA.sample(jax.random.key(1), 4), jnp.arange(4), jnp.linspace(0.1, 0.9, 4)

  def gradient(mode, wrap):
    def total(tilt, dropout):
      interior = monotone_network(2)

      def network(x, t, label):
        keep = jax.random.bernoulli(dropout, 0.5, x.shape).astype(x.dtype)
        return tilt * keep * jnp.tanh(x) * label[:, None].astype(x.dtype)

      loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), interior=mode)
      run = wrap(lambda x: loss(jax.random.key(0), x, network, {"label": labels}, u=u)[0].mean())
      return run(x)

    return jax.jit(jax.grad(total))(jnp.float32(0.7), jax.random.key(3))

  np.testing.assert_allclose(gradient("variance", wrap), gradient("bound", lambda f: f), rtol=1e-5)


def test_conditions_half_precision_and_single_examples():
  gamma = Gamma(-6.0, 4.0, monotone_network(4))
  loss = jd.losses.vdm(gamma, levels=17, stratified=False)
  x, cond = jnp.arange(12, dtype=jnp.uint8).reshape(4, 3), {"label": jnp.arange(4)}
  network = lambda x, t, label: (jnp.tanh(x) * label[:, None].astype(x.dtype)).astype(jnp.bfloat16)
  whole, _ = jax.jit(lambda key: loss(key, x, network, cond))(jax.random.key(0))
  alone, _ = loss(jd.example_keys(jax.random.key(0), 2, 1), x[2:3], network, {"label": jnp.arange(2, 3)})
  assert whole.dtype == jnp.float32
  np.testing.assert_allclose(whole[2:3], alone, rtol=1e-5)


def test_bad_input_is_named(untyped):
  gamma = Gamma()
  with pytest.raises(ValueError, match="steps must be at least 1, or None.*got 0"):
    jd.losses.vdm(gamma, steps=0)
  with pytest.raises(ValueError, match="levels must be at least 2.*got 1"):
    jd.losses.vdm(gamma, levels=1)
  with pytest.raises(ValueError, match="interior must be 'variance' or 'bound', got 'both'"):
    jd.losses.vdm(gamma, interior="both")
  with pytest.raises(TypeError, match=r"gamma must be a schedules.Gamma.*losses.bound"):
    jd.losses.vdm(lambda t: t)
  with pytest.raises(ValueError, match="network must return an array of the shape of x"):
    jd.losses.vdm(gamma)(jax.random.key(0), jnp.ones((4, 3)), lambda x, t: x[:, :2])
  with pytest.raises(TypeError, match="network must return a floating point array, got int32"):
    jd.losses.vdm(gamma)(jax.random.key(0), jnp.ones((4, 3)), lambda x, t: jnp.ones(x.shape, jnp.int32))
  for loss in (jd.losses.vdm(gamma), jd.losses.ddpm_simple(jd.ddpm.Chain(jd.ddpm.linear_betas(50)))):
    with pytest.raises(
      ValueError, match=r"cond\['label'\] must have one entry per example, \[4, ...\]; got shape \(3,\)"
    ):
      loss(jax.random.key(0), jnp.ones((4, 3)), lambda x, t, label: x, {"label": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"u must .*one number per example, \[4\]; got shape \(3,\)"):
      loss(jax.random.key(0), jnp.ones((4, 3)), lambda x, t: x, u=jnp.ones(3))
