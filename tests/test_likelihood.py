import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Mixture, gaussian, mixture

import jaxdiff as jd
from jaxdiff import likelihood
from jaxdiff.schedules import start_time

EACH_SDE = pytest.mark.parametrize("name", SDES)
T0 = 0.05


def exact_prior(data, sde):
  return lambda z: data.log_prob(z, sde, jnp.asarray(sde.t1, z.dtype))


def numbers(tree):
  """What a jitted function returned, for NumPy."""
  return jax.tree.map(np.asarray, tree)


@functools.cache
def gaussian_solve(name):
  """Points of Gaussian data, their log-density with the default prior, and what the affine flow says in closed form."""
  sde, data = SDES[name], gaussian()
  x, t0 = data.mean + data.std * np.random.default_rng(0).normal(size=(16, 3)), start_time(sde, None, 1e-3)
  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-8, 1e-8)

  @jax.jit
  def run(x):
    result, z = fn(jax.random.key(0), x, data.score(sde)), data.flow(sde, x, t0, sde.t1)
    (_, v0), (_, v1) = (data.moments(sde, jnp.full(1, t)) for t in (t0, sde.t1))
    missing = exact_prior(data, sde)(result.latent) - sde.prior_log_prob(result.latent)
    own = sde.prior_log_prob(z) + 0.5 * jnp.sum(jnp.log(v1 / v0))
    return {"result": result, "z": z, "own": own, "missing": missing, "exact": data.log_prob(x, sde, t0)} | {
      "stretch": jnp.max(jnp.sqrt(v1 / v0))
    }

  return x, numbers(run(x))


@EACH_SDE
def test_default_prior_gives_the_model_s_own_density(name, x64):
  """For Gaussian data the flow is affine: log prior(flow(x)) + log|det| in closed form."""
  _, found = gaussian_solve(name)
  np.testing.assert_allclose(found["result"].latent, found["z"], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found["result"].value, found["own"], atol=1e-5)


@EACH_SDE
def test_value_is_the_exact_density_of_gaussian_data(name, x64):
  """With the exact score, and the exact density at t1 for the prior: 1e-5 nats at tolerance 1e-8."""
  _, found = gaussian_solve(name)
  jd.raise_if_failed(found["result"])
  np.testing.assert_allclose(found["result"].value + found["missing"], found["exact"], atol=1e-5)
  assert np.all(found["result"].standard_error == 0)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_round_trip_through_the_latent(name, x64):
  """x -> z -> x within 10 tolerances times the largest singular value of dx/dz."""
  (x, found), sde, tolerance = gaussian_solve(name), SDES[name], 1e-8
  sampler = jd.samplers.probability_flow(sde, tolerance, tolerance, t0=start_time(sde, None, 1e-3))
  back = jax.jit(lambda z: sampler(jax.random.key(0), z, gaussian().score(sde)).x)(found["result"].latent)
  assert np.max(np.abs(back - x)) < 10 * tolerance * max(found["stretch"], 1.0)


@pytest.mark.parametrize(
  ("name", "variable", "steps"),
  [
    ("vp", "log_snr", "per_example"),
    ("vp", "time", "shared"),
    ("edm", "time", "per_example"),
    ("edm", "log_snr", "shared"),
  ],
)
def test_64_dimensions_over_either_variable_with_either_steps(name, variable, steps, x64):
  """Five thin modes in 64-D, the exact prior as an option, tolerance 1e-6: 1e-4 nats a dimension."""
  rng = np.random.default_rng(0)
  sde, data = SDES[name], Mixture(np.full(5, 0.2), rng.normal(size=(5, 64)), 0.05)
  x, t0 = data.means[[0, 3, 4]] + data.std * rng.normal(size=(3, 64)), start_time(sde, None, 1e-3)
  how = {"variable": variable, "steps": steps, "prior_log_prob": exact_prior(data, sde)}
  fn = likelihood.log_prob(sde, None, 1e-6, 1e-6, **how)
  run = jax.jit(lambda x: (fn(jax.random.key(0), x, data.score(sde)), data.log_prob(x, sde, t0)))
  result, exact = numbers(run(x))
  jd.raise_if_failed(result)
  assert np.max(np.abs(result.value - exact)) / 64 < 1e-4
  assert len(set(result.nfe.tolist())) == 1 or steps == "per_example"


def test_single_precision_at_the_default_tolerance():
  """1e-3 nats a dimension from the density of a mixture, whose sum over a grid is 1 to 1e-3."""
  data, sde = Mixture(np.array([0.4, 0.6]), np.array([[0.5, 0.0], [-0.5, 0.3]]), 0.2), jd.VP()
  axis = np.linspace(-2.0, 2.0, 50)
  grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
  fn, t0 = likelihood.log_prob(sde), start_time(sde, None, 1e-3)

  @jax.jit
  def run(x):
    result = fn(jax.random.key(0), x, data.score(sde))
    missing = exact_prior(data, sde)(result.latent) - sde.prior_log_prob(result.latent)
    return result.value, missing, data.log_prob(x, sde, t0)

  value, missing, exact = numbers(run(grid))
  likely = exact > -5
  assert likely.sum() > 400
  assert np.max(np.abs(value + missing - exact)[likely]) / 2 < 1e-3
  assert abs(np.sum(np.exp(value)) * (axis[1] - axis[0]) ** 2 - 1) < 1e-3


@functools.cache
def with_probes():
  """Gaussians of one full covariance around centers of their own, with four probes each: a jitted function of
  (keys, x, center) and its oracle, in which only the probes are the library's."""
  sde, factor = jd.VP(), np.array([[1.0, 0.0, 0.0], [0.8, 0.4, 0.0], [0.3, -0.5, 0.2]])
  variances, basis = np.linalg.eigh(factor @ factor.T)
  divergence, t0 = jd.divergence.hutchinson(4), start_time(sde, None, 1e-3)
  fn = likelihood.log_prob(sde, divergence, 1e-6, 1e-6)

  def score(x, t, center):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -(((x - alpha * center) @ basis) / (alpha**2 * variances[None] + sigma**2)) @ basis.T

  @jax.jit
  def run(keys, x, center):
    return fn(keys, x, score, {"center": center}), divergence.draw(keys, x)

  def oracle(probes, x, center):
    (alpha0, alpha1), (sigma0, sigma1) = (np.asarray(v) for v in sde.marginal(jnp.stack([t0, jnp.asarray(sde.t1)])))
    growth = 0.5 * np.log((alpha1**2 * variances + sigma1**2) / (alpha0**2 * variances + sigma0**2))
    latent = alpha1 * center + (x - alpha0 * center) @ (basis * np.exp(growth)) @ basis.T
    estimates = np.sum((probes @ basis) ** 2 * growth, axis=2)
    prior = -0.5 * np.sum(latent**2 + np.log(2 * np.pi), axis=1)
    return latent, prior + estimates.mean(axis=1), estimates.std(axis=1, ddof=1) / 2

  return run, oracle


X = np.random.default_rng(1).normal(size=(4, 3)) * [[1.0], [1.0], [1.0], [20.0]]
CENTER = np.array([[-1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [2.0, 1.0, -1.0], [0.3, 0.3, 0.3]])


def test_probes_are_drawn_once_a_solve_and_know_their_error(x64):
  """A linear field's estimate is v^T M v, M in closed form: 1e-5 of it. Each example has its own condition."""
  run, oracle = with_probes()
  result, probes = numbers(run(jd.example_keys(jax.random.key(0), 0, 4), X, CENTER))
  latent, value, error = oracle(probes, X, CENTER)
  np.testing.assert_allclose(result.latent, latent, atol=1e-4)
  np.testing.assert_allclose(result.value, value, rtol=1e-5)
  np.testing.assert_allclose(result.standard_error, error, atol=1e-4)
  assert np.all(error > 0.1)
  assert len(np.unique(probes, axis=0)) == 4


def test_value_does_not_depend_on_batch_mates(x64):
  """A peer drew probes and steps for the whole batch. The last example, far out, takes other steps."""
  keys, (run, _) = jd.example_keys(jax.random.key(0), 0, 4), with_probes()
  whole, _ = numbers(run(keys, X, CENTER))
  order = np.array([2, 3, 0, 1])
  mates = np.array([0.0, 0.0, 1.0, 1.0])[:, None]
  moved, _ = numbers(run(keys[order], X[order] + mates, CENTER[order]))
  for place in (0, 1):
    np.testing.assert_allclose(moved.value[place], whole.value[order[place]], rtol=1e-9)
    assert moved.nfe[place] == whole.nfe[order[place]]
  assert len(set(whole.nfe.tolist())) > 1


def test_shared_steps_keep_the_tolerance_of_the_hardest_example(x64):
  """An example amid 511 easy ones: a mean over the batch would hide its error, the largest does not. Every evaluation
  is counted. 4e-4 nats at a tolerance of 1e-5."""
  data, sde, calls = mixture(), jd.VP(), []
  x = np.array([[-0.2, -0.1]] + 511 * [[1.0, 1.0]])
  how = {"steps": "shared", "prior_log_prob": exact_prior(data, sde)}
  fn, t0 = likelihood.log_prob(sde, None, 1e-5, 1e-5, **how), start_time(sde, None, 1e-3)

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return data.score(sde)(x, t)

  result, exact = numbers(jax.jit(lambda x: (fn(jax.random.key(0), x, score), data.log_prob(x, sde, t0)))(x))
  jax.effects_barrier()
  assert abs(result.value[0] - exact[0]) < 4e-4
  assert result.nfe.tolist() == 512 * [len(calls)]


@functools.cache
def trained(adjoint):
  """-log p of a Gaussian's score in its parameters and x, and the gradient, with 64 steps at most."""
  sde, steps = jd.VP(), "shared" if adjoint == "checkpoint" else "per_example"
  fn = likelihood.log_prob(sde, None, 1e-6, 1e-6, T0, max_steps=64, steps=steps, adjoint=adjoint)

  def loss(params, x):
    def score(x, t):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      variance = (alpha * jnp.exp(params["log_std"])) ** 2 + sigma**2
      return params["factor"] * (alpha * params["mean"] - x) / variance

    return -jnp.mean(fn(jax.random.key(0), x, score).value)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def closed_form(log_std, mean, x):
  """What `trained` says of a factor of 1: the flow is affine."""

  def moments(t):
    alpha = np.exp(-0.5 * (0.1 * t + 0.5 * 19.9 * t**2))
    return alpha * mean, (alpha * np.exp(log_std)) ** 2 + 1 - alpha**2

  (m0, v0), (m1, v1) = moments(T0), moments(1.0)
  z = m1 + np.sqrt(v1 / v0) * (x - m0)
  return -np.mean(np.sum(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) + 0.5 * np.log(v1 / v0), axis=1))


POINTS = 1.5 + 0.5 * np.random.default_rng(0).normal(size=(16, 1))
START = {"log_std": 0.0, "mean": 0.0, "factor": 1.0}


@pytest.mark.parametrize("adjoint", ["checkpoint", "continuous", "direct"])
def test_gradients_reach_the_parameters_and_x(adjoint, x64):
  """Against the closed form at a tolerance of 1e-6: 1e-4."""
  value, (found, dx) = numbers(trained(adjoint)(START | {"log_std": -0.5, "mean": 0.3}, POINTS))
  np.testing.assert_allclose(value, closed_form(-0.5, 0.3, POINTS), rtol=1e-5)
  h, unit = 1e-5, np.eye(16)[5][:, None]
  slope = lambda f: (f(h) - f(-h)) / (2 * h)
  np.testing.assert_allclose(found["log_std"], slope(lambda h: closed_form(h - 0.5, 0.3, POINTS)), rtol=1e-4)
  np.testing.assert_allclose(found["mean"], slope(lambda h: closed_form(-0.5, h + 0.3, POINTS)), rtol=1e-4)
  np.testing.assert_allclose(dx[5], slope(lambda h: closed_form(-0.5, 0.3, POINTS + h * unit)), rtol=1e-4)


@pytest.mark.parametrize("adjoint", ["checkpoint", "continuous", "direct"])
def test_gradients_of_failed_solves_are_not_a_number(adjoint, x64):
  """64 steps are too few for a score a thousand times too large."""
  value, gradient = trained(adjoint)(START | {"factor": 1e4}, POINTS)
  assert np.isnan(value)
  assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))


def test_maximum_likelihood_through_the_solve(x64):
  """Gradient steps on -log p of a Gaussian's score: the loss falls to the entropy of the Gaussian of the data."""
  params, losses = dict(START), []
  for _ in range(40):
    value, (gradient, _) = trained("checkpoint")(params, POINTS)
    params |= {name: float(params[name] - 0.1 * gradient[name]) for name in ("log_std", "mean")}
    losses.append(float(value))
  entropy = 0.5 * np.log(2 * np.pi * np.e * float(POINTS.var()))
  assert losses[0] > entropy + 1
  np.testing.assert_allclose(losses[-1], entropy, atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tolerances_below_rounding_are_warned_of(dtype, x64):
  fn = likelihood.log_prob(jd.VP(), rtol=1e-8, atol=1e-8, max_steps=1)
  run = lambda: jax.eval_shape(
    lambda x: fn(jax.random.key(0), x, lambda x, t: -x).value, jax.ShapeDtypeStruct((1, 2), dtype)
  )
  if dtype == "float64":
    run()
  else:
    with pytest.warns(UserWarning, match="rtol = 1e-08 and atol = 1e-08 are below what float32 delivers, .*float64"):
      run()


def test_no_host_callback_on_the_hot_path_and_the_highest_matmul_precision():
  fn, w = likelihood.log_prob(jd.VP()), np.eye(3, dtype=np.float32)
  x = jax.ShapeDtypeStruct((2, 3), np.float32)
  jaxpr = str(jax.make_jaxpr(lambda x: fn(jax.random.key(0), x, lambda x, t: -x @ w).value)(x))
  assert "callback" not in jaxpr
  assert "HIGHEST" in jaxpr
  assert "precision=None" not in jaxpr


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["checkpoint", "continuous"])
def test_gradients_reach_a_learned_schedule(adjoint, x64):
  """It starts above the noise at which data stand, so t0 = 0 whatever gamma(0): the derivative in closed form."""
  data, x, times = gaussian(), jnp.asarray([[0.3, -0.4, 0.2]]), (jnp.zeros(1), jnp.ones(1))
  process = lambda minimum: jd.VariancePreserving(jd.schedules.Gamma(minimum, 6.0))

  def value(minimum):
    sde = process(minimum)
    fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, adjoint=adjoint)
    return fn(jax.random.key(0), x, data.score(sde)).value[0]

  def exact(minimum):
    (_, v0), (_, v1) = (data.moments(process(minimum), t) for t in times)
    z = data.flow(process(minimum), x, *times)
    return process(minimum).prior_log_prob(z)[0] + 0.5 * jnp.sum(jnp.log(v1 / v0))

  np.testing.assert_allclose(jax.jit(jax.grad(value))(-5.0), jax.grad(exact)(-5.0), rtol=1e-3)


def test_uniform_data_score_log2_of_the_levels(x64):
  """The exact score of data uniform on [-1, 1], noised: bits/dim = log2 L whatever the integers, within 0.01.

  The density at t0 drops at the walls, over a width of sigma(t0) = 1e-3, which integers of the middle do not see.
  """
  sde, levels = jd.VP(), 17

  def log_density(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    cdf = jax.scipy.stats.norm.logcdf
    left = -jnp.abs(x)
    high, low = cdf((left + alpha) / sigma), cdf((left - alpha) / sigma)
    return jnp.sum(high + jnp.log1p(-jnp.exp(low - high)) - jnp.log(2 * alpha), axis=1)

  score = lambda x, t: jax.grad(lambda y: jnp.sum(log_density(y, t)))(x)
  prior = lambda z: log_density(z, jnp.full(len(z), 1.0))
  log_prob = likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, prior_log_prob=prior)
  n = np.random.default_rng(0).integers(levels // 4, 3 * levels // 4, (8, 3)).astype(np.uint8)
  result = jax.jit(lambda n: likelihood.bits_per_dim(log_prob, levels)(jax.random.key(1), n, score))(n)
  np.testing.assert_allclose(result.value, np.log2(levels), atol=0.01)


@pytest.mark.parametrize(
  ("process", "make"),
  [
    (jd.VP, jd.likelihood.dequantization.truncated_normal),
    (lambda: jd.VariancePreserving(jd.schedules.Gamma(-12.0, 6.0)), jd.likelihood.dequantization.gaussian),
  ],
)
def test_integers_under_the_noise_of_the_process_have_their_probability(process, make):
  """Three levels with the exact score of their mixture: -log2 p of each, to 0.01 bits, without variance. The learned
  schedule begins above the noise at which data stand."""
  sde, p, centers = process(), np.float32([0.6, 0.3, 0.1]), np.float32([[[-2 / 3, 0.0, 2 / 3]]])

  def score(x, t):
    alpha, sigma = (v[:, None, None] for v in sde.marginal(t))
    logits = np.log(p)[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (alpha[..., 0] * denoised - x) / sigma[..., 0] ** 2

  def exact_prior(z):
    alpha, sigma = sde.marginal(jnp.float32(sde.t1))
    return jax.nn.logsumexp(np.log(p)[None] + jax.scipy.stats.norm.logpdf(z, alpha * centers[0], sigma), axis=1)

  log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, prior_log_prob=exact_prior)
  bits = jd.likelihood.bits_per_dim(log_prob, 3, dequantization=make(sde))
  x = np.array([[0], [1], [2], [0], [3]], np.uint8)
  result = numbers(jax.jit(lambda key, x: bits(key, x, score))(jax.random.key(0), x))
  np.testing.assert_allclose(result.value[:4], -np.log2(p[[0, 1, 2, 0]]), atol=0.01)
  assert np.isnan(result.value[4])
  assert result.status.code[4] == 3


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 17.0)])
def test_units(data_range):
  """A density that is uniform on the range has log2 L bits, whatever the range."""
  low, high = data_range
  log_prob = np.full(2, -5 * np.log(high - low), np.float32)
  np.testing.assert_allclose(likelihood.nats_to_bits_per_dim(log_prob, 5, 17, data_range), np.log2(17), rtol=1e-6)


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 4.0)])
def test_dequantized_integers_fill_their_bins(data_range):
  n = np.tile(np.arange(4, dtype=np.uint8), (2000, 1))
  low, high = data_range
  x = jax.jit(lambda n: likelihood.dequantize(jax.random.key(0), n, 4, data_range))(n)
  unit = (np.asarray(x) - low) / (high - low) * 4
  np.testing.assert_array_equal(np.floor(unit), n)
  fraction = unit - np.floor(unit)
  assert abs(fraction.mean() - 0.5) < 4 / np.sqrt(12 * fraction.size)
  assert abs(fraction.var() - 1 / 12) < 0.003


@pytest.mark.parametrize("t0", [2.0, 0.0, -0.1])
@pytest.mark.parametrize("make", [jd.likelihood.log_prob, jd.samplers.probability_flow, None])
def test_a_bad_t0_is_refused_before_and_under_jit(t0, make):
  make = make or (lambda sde, t0: jd.losses.denoising(sde, jd.predictions.noise(), t0=t0))
  with pytest.raises(ValueError, match=r"t0 must lie in \[0, t1\)|no noise"):
    jax.jit(lambda: [make(jd.VP(), t0=t0), 0][1])()
  with pytest.raises(ValueError, match=r"t0 must lie in \[0, t1\)|no noise"):
    make(jd.VP(), t0=t0)


def test_a_process_whose_log_snr_is_infinite_needs_time():
  sde = jd.VP(0.1, 400.0)  # alpha(1) = exp(-100) is 0 in float32
  with pytest.raises(ValueError, match=r"needs finite log-SNRs, got .*-inf at t1 of VP.*take variable='time'"):
    likelihood.log_prob(sde)
  assert likelihood.log_prob(sde, variable="time").t0 > 0


def test_wrong_shapes_are_refused_before_the_solve(untyped):
  """What a batch of one would broadcast is seen on the whole batch."""
  fn, key, x = likelihood.log_prob(jd.VP()), jax.random.key(0), jnp.ones((3, 2))
  with pytest.raises(ValueError, match=r"x0 must be \[b, \*d\] with an axis of data.*one example is x0\[None\]"):
    fn(key, x[0], lambda x, t: -x)
  with pytest.raises(ValueError, match=r"score must return an array of the shape of x, \(3, 2\); got \(3,\)"):
    fn(key, x, lambda x, t: x[:, 0])
  with pytest.raises((TypeError, ValueError), match="broadcast|shapes"):
    fn(key, x, lambda x, t: -x * t)
  with pytest.raises(TypeError, match="score must be a function .*, got dict"):
    fn(key, x, {"w": 1.0})
  with pytest.raises(TypeError, match="x0 must be an array of numbers, got keys: the key is the first argument"):
    fn(x, key[None], lambda x, t: -x)
  with pytest.raises(ValueError, match="solver must be one of 'tsit5', 'dopri5', 'dopri8', got 'rk4'"):
    likelihood.log_prob(jd.VP(), solver="rk4")
  with pytest.raises(TypeError, match="log_prob must be a log-density, got CNF: pass its log_prob"):
    likelihood.bits_per_dim(jd.flow.cnf(), 4)


def test_wrong_use_is_refused(untyped):
  fn, score = likelihood.log_prob(jd.VP()), lambda x, t: -x
  with pytest.raises(TypeError, match="x must be integers 0..255, got float32.*pass the raw integers"):
    likelihood.bits_per_dim(fn, 256)(jax.random.key(0), jnp.ones((2, 3)), score)
  with pytest.raises(TypeError, match="x0 must be floating point, got uint8.*bits_per_dim"):
    fn(jax.random.key(0), jnp.ones((2, 3), jnp.uint8), score)
  with pytest.raises(TypeError, match=r"levels must be an integer.*got 256\.0"):
    likelihood.bits_per_dim(likelihood.log_prob(jd.VP()), levels=256.0)
  with pytest.raises(ValueError, match="levels must be at least 2.*got 1"):
    likelihood.bits_per_dim(fn, 1)
  with pytest.raises(ValueError, match="data_range must be"):
    likelihood.bits_per_dim(fn, 4, (1.0, -1.0))
  with pytest.raises(ValueError, match="atol must be positive"):
    likelihood.log_prob(jd.VP(), atol=-1.0)
