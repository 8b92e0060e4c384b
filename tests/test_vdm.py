"""Variational diffusion: closed-form values, invariance to the schedule, and the gradient that lowers the variance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from oracles import Gaussian, compiled

import jaxdiff as jd
from jaxdiff.schedules import Gamma, monotone_network, of_gamma

DATA = Gaussian(np.array([0.5, -0.4, 0.1]), np.array([0.4, 0.9, 0.05]))
KEY = jax.random.key(0)
COUNT = 40_000
SQUARE = Partial(lambda t: 0.2 * t + 0.8 * t**2)


def draws(count, seed=1):
  return DATA.mean + DATA.std * np.random.default_rng(seed).normal(size=(count, 3))


def singles(count, seed=1):
  return draws(count, seed).astype(np.float32)


def noise_network(x, level, tilt=1.0):
  """The noise to expect in DATA, from the noise level log(sigma / alpha) / 4; a wrong one for another tilt."""
  alpha, sigma = (v[:, None] for v in of_gamma(8 * level))
  mean, variance = (jnp.asarray(v, x.dtype)[None] for v in (DATA.mean, DATA.std**2))
  return tilt * sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)


def expected_diffusion(interior, steps):
  """(2) from -6 to 4 with the exact network: the expected squared error of the noise is sum_j 1 - sigma^2 / v_j."""
  t = np.arange(steps + 1) / steps
  gamma = -6 + 10 * interior(t)
  sigma2 = 1 / (1 + np.exp(-gamma[1:, None]))
  error = np.sum(1 - sigma2 / ((1 - sigma2) * DATA.std**2 + sigma2), axis=1)
  return 0.5 * np.sum(np.expm1(np.diff(gamma)) * error)


@functools.partial(jax.jit, static_argnames=("options",))
def values(key, gamma, tilt, x, options=()):
  loss = jd.losses.vdm(gamma, stratified=False, **dict(options))
  return loss(key, x, lambda x, level: noise_network(x, level, tilt))


def diffusion_of(gamma, **options):
  aux = values(KEY, gamma, 1.0, draws(COUNT), tuple(options.items()))[1]
  return np.asarray(aux["diffusion"]) * 3 * np.log(2)


@pytest.mark.parametrize("steps", [1, 64])
def test_the_discrete_loss_is_its_closed_form(steps, x64):
  diffusion, expected = diffusion_of(Gamma(-6.0, 4.0, SQUARE), steps=steps), expected_diffusion(SQUARE, steps)
  assert abs(diffusion.mean() - expected) < 4 * diffusion.std() / np.sqrt(COUNT)
  assert diffusion.std() / np.sqrt(COUNT) < 0.05 * expected


def test_the_discrete_loss_falls_to_the_continuous(x64):
  """In closed form: every doubling of T lowers it, at first order; the estimate of continuous time is its limit."""
  exact = [expected_diffusion(lambda t: t, steps) for steps in (8, 16, 32, 64, 128, 256, 100_000)]
  assert np.all(np.diff(exact) < 0)
  gaps = np.asarray(exact[:-1]) - exact[-1]
  np.testing.assert_allclose(gaps[2:-1] / gaps[3:], 2, rtol=0.1)
  diffusion = diffusion_of(Gamma(-6.0, 4.0, SQUARE))
  assert abs(diffusion.mean() - exact[-1]) < 4 * diffusion.std() / np.sqrt(COUNT)


def test_continuous_time_does_not_care_for_the_interior():
  """The same mean for three schedules between the same ends, right network or wrong, within 4 standard errors."""
  weights = [(1.0, 0.0), (0.2, 0.8), (1.9, -0.9)]
  mixed = lambda w, t: w[0] * t + w[1] * t**2
  x = singles(COUNT)
  for tilt in (1.0, 0.7):
    each = [
      np.asarray(values(jax.random.key(k), Gamma(-6.0, 4.0, Partial(mixed, w)), tilt, x)[0])
      for k, w in enumerate(weights)
    ]
    for other in each[1:]:
      assert abs(other.mean() - each[0].mean()) < 4 * np.sqrt((other.var() + each[0].var()) / COUNT)
      assert not np.isclose(other.var(), each[0].var(), rtol=0.05)


def test_it_is_the_bound_of_its_process():
  """The same mean as `losses.bound` for VariancePreserving(gamma), term by term."""

  def run(key, other_key, interior, x):
    gamma = Gamma(-6.0, 4.0, interior)
    bound = jd.losses.bound(
      jd.VariancePreserving(gamma),
      jd.predictions.noise(log_snr_time=True),
      time=jd.losses.times.uniform(stratified=False),
      t0=0.0,
    )
    return values(key, gamma, 1.0, x)[1], bound(other_key, x, noise_network)[1]

  learned = jax.tree.map(lambda leaf: leaf + 0.5, monotone_network(8))
  aux, other = compiled(run, KEY, jax.random.key(5), learned, singles(COUNT))
  for name in aux:
    a, b = aux[name], other[name]
    assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / COUNT) + 1e-5


def test_integers_are_bounded_by_their_log_probability(x64):
  """Two levels with the exact network: -log p of each, in continuous time; a little more in 32 steps."""
  p, gamma, n = np.array([0.8, 0.2]), Gamma(-12.0, 6.0), 20_000
  centers = np.array([[[-0.5, 0.5]]])

  def network(x, level):
    alpha, sigma = (v[:, None, None] for v in of_gamma(8 * level))
    logits = np.log(p)[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (x - alpha[..., 0] * denoised) / sigma[..., 0]

  run = jax.jit(lambda key, x: [jd.losses.vdm(gamma, levels=2, steps=n)(key, x, network)[0] for n in (None, 32)])
  for k in range(2):
    continuous, discrete = jax.device_get(run(KEY, np.full((n, 1), k, np.uint8)))
    error = continuous.std() / np.sqrt(n)
    assert abs(continuous.mean() + np.log(p[k])) < 4 * error
    assert discrete.mean() > -np.log(p[k])


def objective(interior_mode, x, key):
  """Mean loss of (interior, ends, tilt of the network)."""

  def total(params):
    interior, ends, tilt = params
    loss = jd.losses.vdm(Gamma(*ends, interior), interior=interior_mode)
    network = lambda x, level: noise_network(x, level, tilt)
    u = np.random.default_rng(7).uniform(size=len(x))
    return loss(key, x, network, u=u)

  return total


def params_of(tilt=0.8):
  return monotone_network(4), (-6.0, 4.0), tilt


def test_the_interior_follows_the_variance_of_the_loss_and_all_else_the_bound(x64):
  """Against finite differences of the mean square on the same noise; ends and network as without the variance.

  The ends follow the bound: its finite differences.
  """
  x = draws(200)
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), params_of())

  @jax.jit
  def run(params):
    def total(mode, params):
      value, aux = objective(mode, x, KEY)(params)
      return value.mean(), jnp.mean((aux["diffusion"] * 3 * np.log(2)) ** 2)

    return [jax.value_and_grad(functools.partial(total, mode), has_aux=True)(params) for mode in ("variance", "bound")]

  (_, gradient), (_, plain) = jax.device_get(run(params))
  np.testing.assert_allclose(gradient[1], plain[1], rtol=1e-10)
  np.testing.assert_allclose(gradient[2], plain[2], rtol=1e-10)

  leaves, tree = jax.tree.flatten(params)
  found = jax.tree.leaves(gradient)
  interior = len(jax.tree.leaves(params[0]))
  for i, leaf in enumerate(leaves):
    for j in np.ndindex(leaf.shape):
      size = 1e-5 * (np.arange(leaf.size).reshape(leaf.shape) == np.ravel_multi_index(j, leaf.shape))
      up, down = (run(tree.unflatten([*leaves[:i], leaf + h * size, *leaves[i + 1 :]]))[0][0] for h in (1, -1))
      which = 1 if i < interior else 0
      np.testing.assert_allclose(found[i][j], (up[which] - down[which]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_the_mean_square_moves_as_the_variance_does():
  """E[L]^2 does not depend on the interior: its gradient is zero within 4 standard errors, that of E[L^2] is not."""
  u = np.random.default_rng(3).uniform(size=COUNT).astype(np.float32)

  def gradients(mode, interior, keys, x):
    def one(interior, key, x, u):
      loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), interior=mode)
      return jnp.sum(loss(key[None], x[None], noise_network, u=u[None])[0])

    return jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0))(interior, keys, x, u)

  run = lambda interior, key, x: [
    gradients(mode, interior, jd.example_keys(key, 0, COUNT), x) for mode in ("bound", "variance")
  ]
  bound, variance = compiled(run, params_of()[0], KEY, singles(COUNT))
  z = lambda g: np.abs(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(COUNT)))
  assert all(np.all(z(leaf) < 4.5) for leaf in jax.tree.leaves(bound))
  assert max(np.max(z(leaf)) for leaf in jax.tree.leaves(variance)) > 10


def test_the_variance_costs_no_network_evaluation():
  """The network is in the compiled program of value and gradient as often with it as without."""
  x, w = np.ones((4, 3), np.float32), np.ones((3, 3), np.float32)

  def products(mode):
    def total(params):
      interior, w = params
      loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), interior=mode)
      return loss(KEY, jnp.asarray(x), lambda x, t: jnp.tanh(x @ w) @ w)[0].mean()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(total))((monotone_network(2), w))
    return str(jaxpr).count("dot_general")

  assert products("variance") == products("bound") > 0


def test_training_the_interior_lowers_the_variance_and_keeps_the_ends():
  """200 steps: the variance of the estimate falls by a fifth at least, the ends are those it started with."""
  optimizer, interior, x = optax.adam(0.05), monotone_network(8), singles(512)
  of = lambda interior, key: jd.losses.vdm(Gamma(-8.0, 5.0, interior))(key, x, noise_network)[0]

  @jax.jit
  def train(interior, key):
    def step(carry, key):
      interior, state = carry
      gradient = jax.grad(lambda interior: of(interior, key).mean())(interior)
      with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(interior, updates), state), None

    (interior, _), _ = jax.lax.scan(step, (interior, optimizer.init(interior)), jax.random.split(key, 200))
    return interior, Gamma(-8.0, 5.0, interior)(jnp.asarray([0.0, 1.0]))

  trained, ends = train(interior, jax.random.key(2))
  before, after = (
    np.asarray(values(KEY, Gamma(-8.0, 5.0, each), 1.0, singles(COUNT))[0]) for each in (interior, trained)
  )
  assert after.var() < 0.8 * before.var()
  assert abs(after.mean() - before.mean()) < 4 * np.sqrt((after.var() + before.var()) / len(after))
  np.testing.assert_allclose(ends, [-8.0, 5.0], atol=1e-6)


def test_the_gradient_survives_transformations_inside_it():
  """With what a network may capture: parameters, integer labels, a random key."""
  x, labels, u = singles(4), np.arange(4), np.linspace(0.1, 0.9, 4, dtype=np.float32)

  def gradient(mode, wrap, tilt, dropout):
    def total(tilt):
      def network(x, t, label):
        keep = jax.random.bernoulli(dropout, 0.5, x.shape).astype(x.dtype)
        return tilt * keep * jnp.tanh(x) * label[:, None].astype(x.dtype)

      loss = jd.losses.vdm(Gamma(-6.0, 4.0, monotone_network(2)), interior=mode)
      return wrap(lambda x: loss(KEY, x, network, {"label": jnp.asarray(labels)}, u=u)[0].mean())(jnp.asarray(x))

    return jax.grad(total)(tilt)

  wraps = [jax.jit, jax.checkpoint, lambda f: lambda v: jax.lax.map(f, v[None])[0]]
  run = lambda *given: (gradient("bound", lambda f: f, *given), [gradient("variance", w, *given) for w in wraps])
  plain, wrapped = compiled(run, np.float32(0.7), jax.random.key(3))
  np.testing.assert_allclose(wrapped, plain, rtol=1e-5)


def test_conditions_half_precision_and_single_examples():
  x, label = np.arange(12, dtype=np.uint8).reshape(4, 3), np.arange(4)
  network = lambda x, t, label: (jnp.tanh(x) * label[:, None].astype(x.dtype)).astype(jnp.bfloat16)

  def run(interior, key, x, label):
    loss = jd.losses.vdm(Gamma(-6.0, 4.0, interior), levels=17, stratified=False)
    alone = loss(jd.example_keys(key, 2, 1), x[2:3], network, {"label": label[2:3]})
    return loss(key, x, network, {"label": label})[0], alone[0]

  whole, alone = compiled(run, monotone_network(4), KEY, x, label)
  assert whole.dtype == np.float32
  np.testing.assert_allclose(whole[2:3], alone, rtol=1e-5)


def test_bad_input_is_named():
  gamma, x = Gamma(), np.ones((4, 3), np.float32)
  with pytest.raises(ValueError, match="steps must be at least 1, or None.*got 0"):
    jd.losses.vdm(gamma, steps=0)
  with pytest.raises(ValueError, match="levels must be at least 2.*got 1"):
    jd.losses.vdm(gamma, levels=1)
  with pytest.raises(ValueError, match="interior must be 'variance' or 'bound', got 'both'"):
    jd.losses.vdm(gamma, interior="both")
  with pytest.raises(TypeError, match=r"gamma must be a schedules.Gamma.*losses.bound"):
    jd.losses.vdm(lambda t: t)
  with pytest.raises(ValueError, match="network must return an array of the shape of x"):
    jd.losses.vdm(gamma)(KEY, x, lambda x, t: x[:, :2])
  with pytest.raises(TypeError, match="network must return a floating point array, got int32"):
    jd.losses.vdm(gamma)(KEY, x, lambda x, t: jnp.ones(x.shape, jnp.int32))
  for loss in (jd.losses.vdm(gamma), jd.losses.ddpm_simple(jd.ddpm.Chain(jd.ddpm.linear_betas(50)))):
    with pytest.raises(
      ValueError, match=r"cond\['label'\] must have one entry per example, \[4, ...\]; got shape \(3,\)"
    ):
      loss(KEY, x, lambda x, t, label: x, {"label": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"u must .*one number per example, \[4\]; got shape \(3,\)"):
      loss(KEY, x, lambda x, t: x, u=np.ones(3, np.float32))
