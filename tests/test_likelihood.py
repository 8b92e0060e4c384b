import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, gaussian, mixture

import jaxdiff as jd
from jaxdiff import likelihood
from jaxdiff.schedules import start_time

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
DATA = pytest.mark.parametrize("make", [gaussian, mixture])


def exact_prior(data, sde):
  return lambda z: data.log_prob(z, sde, jnp.asarray(sde.t1, z.dtype))


@EACH_SDE
@DATA
def test_value_is_the_exact_density_in_float64(sde, make, x64):
  """With the exact score and the exact density at t1 as the prior: 1e-4 nats a dimension at tolerance 1e-6."""
  data = make()
  x = data.sample(jax.random.key(0), 16)
  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, prior_log_prob=exact_prior(data, sde))
  result = jax.jit(lambda x: fn(jax.random.key(0), x, data.score(sde)))(x)
  jd.raise_if_failed(result)
  exact = data.log_prob(x, sde, start_time(sde, None, 1e-3))
  assert jnp.max(jnp.abs(result.value - exact)) / x.shape[1] < 1e-4
  assert jnp.all(result.standard_error == 0)


@EACH_SDE
@DATA
def test_value_is_the_exact_density_in_float32(sde, make):
  """1e-3 nats a dimension at tolerance 1e-5."""
  data = make()
  x = data.sample(jax.random.key(0), 16)
  fn = likelihood.log_prob(sde, jd.divergence.exact(), prior_log_prob=exact_prior(data, sde))
  result = jax.jit(lambda x: fn(jax.random.key(0), x, data.score(sde)))(x)
  exact = data.log_prob(x, sde, start_time(sde, None, 1e-3))
  assert jnp.max(jnp.abs(result.value - exact)) / x.shape[1] < 1e-3


@pytest.mark.parametrize("steps", ["per_example", "shared"])
@pytest.mark.parametrize("variable", ["time", "log_snr"])
@pytest.mark.parametrize("name", ["vp", "edm"])
def test_64_dimensions_over_either_variable_with_either_steps(name, variable, steps, x64):
  """Five thin modes in 64-D, tolerance 1e-6: 1e-4 nats a dimension."""
  sde, data = SDES[name], narrow()
  x = data.sample(jax.random.key(0), 3)
  how = {"variable": variable, "steps": steps, "prior_log_prob": exact_prior(data, sde)}
  fn = likelihood.log_prob(sde, None, 1e-6, 1e-6, **how)
  result = jax.jit(lambda x: fn(jax.random.key(0), x, data.score(sde)))(x)
  jd.raise_if_failed(result)
  exact = data.log_prob(x, sde, start_time(sde, None, 1e-3))
  assert jnp.max(jnp.abs(result.value - exact)) / 64 < 1e-4
  assert (len(set(result.nfe.tolist())) == 1) or steps == "per_example"


def narrow():
  from oracles import Mixture

  means = np.random.default_rng(0).normal(size=(5, 64))
  return Mixture(np.full(5, 0.2), means, 0.05)


def test_shared_steps_keep_the_tolerance_of_the_hardest_example(x64):
  """An example amid 31 easy ones: a mean over the batch would hide its error, the largest does not."""
  data, sde = mixture(), jd.VP()
  easy = jnp.tile(jnp.asarray([[1.0, 1.0]]), (31, 1))
  x = jnp.concatenate([jnp.asarray([[-0.2, -0.1]]), easy])
  run = lambda x, **how: jax.jit(
    lambda x: likelihood.log_prob(sde, None, 1e-5, 1e-5, **how)(jax.random.key(0), x, data.score(sde))
  )(x)
  exact = run(x[:1]).value[0]
  assert abs(run(x, steps="shared").value[0] - exact) < 1e-4


def test_maximum_likelihood_through_the_solve():
  """Gradient steps on -log p of a Gaussian's score: the loss falls to the entropy of the Gaussian of the data."""
  sde, std = jd.VP(), 0.5
  x = 1.5 + std * jax.random.normal(jax.random.key(0), (64, 1))
  fn = likelihood.log_prob(sde, rtol=1e-3, atol=1e-3, steps="shared", t0=0.05)

  def score(params, x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    variance = (alpha * jnp.exp(params["log_std"])) ** 2 + sigma**2
    return (alpha * params["mean"] - x) / variance

  def loss(params):
    return -fn(jax.random.key(1), x, lambda x, t: score(params, x, t)).value.mean()

  step = jax.jit(lambda params: (loss(params), jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))))
  params, losses = {"log_std": jnp.zeros(()), "mean": jnp.zeros(())}, []
  for _ in range(40):
    value, params = step(params)
    losses.append(float(value))
  entropy = 0.5 * np.log(2 * np.pi * np.e * float(x.var()))
  assert losses[0] > entropy + 1
  np.testing.assert_allclose(losses[-1], entropy, atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tolerances_below_rounding_are_warned_of(dtype, x64):
  fn = likelihood.log_prob(jd.VP(), rtol=1e-8, atol=1e-8)
  x = jnp.zeros((1, 2), dtype)
  if dtype == "float64":
    jax.eval_shape(lambda x: fn(jax.random.key(0), x, lambda x, t: -x).value, x)
  else:
    with pytest.warns(UserWarning, match="rtol = 1e-08 and atol = 1e-08 are below what float32 delivers, .*float64"):
      jax.eval_shape(lambda x: fn(jax.random.key(0), x, lambda x, t: -x).value, x)


@EACH_SDE
def test_default_prior_gives_the_model_s_own_density(sde, x64):
  """For Gaussian data the flow is affine: log prior(flow(x)) + log|det| in closed form."""
  data = gaussian()
  x, t0 = data.sample(jax.random.key(0), 16), start_time(sde, None, 1e-3)
  result = jax.jit(
    lambda x: likelihood.log_prob(sde, jd.divergence.exact(), 1e-8, 1e-8)(jax.random.key(0), x, data.score(sde))
  )(x)
  z = data.flow(sde, x, t0, sde.t1)
  _, v0 = data.moments(sde, jnp.full(1, t0))
  _, v1 = data.moments(sde, jnp.full(1, sde.t1))
  np.testing.assert_allclose(result.latent, z, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(result.value, sde.prior_log_prob(z) + 0.5 * jnp.sum(jnp.log(v1 / v0)), atol=1e-5)


def test_density_integrates_to_one():
  """On a 2-D grid, a mixture with modes of standard deviation 0.2."""
  from oracles import Mixture

  data, sde = Mixture(np.array([0.4, 0.6]), np.array([[0.5, 0.0], [-0.5, 0.3]]), 0.2), jd.VP()
  axis = jnp.linspace(-2.0, 2.0, 50)
  grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4)
  value = jax.jit(lambda x: fn(jax.random.key(0), x, data.score(sde)).value)(grid)
  assert abs(jnp.sum(jnp.exp(value)) * (axis[1] - axis[0]) ** 2 - 1) < 1e-3


@EACH_SDE
def test_round_trip_through_the_latent(sde, x64):
  """x -> z -> x within 10 tolerances times the largest singular value of dx/dz."""
  data, tolerance = gaussian(), 1e-7
  x, t0 = data.sample(jax.random.key(0), 8), start_time(sde, None, 1e-3)
  z = likelihood.log_prob(sde, jd.divergence.exact(), tolerance, tolerance)(
    jax.random.key(0), x, data.score(sde)
  ).latent
  back = jd.samplers.probability_flow(sde, tolerance, tolerance, t0=t0)(jax.random.key(0), z, data.score(sde)).x
  _, v0 = data.moments(sde, jnp.full(1, t0))
  _, v1 = data.moments(sde, jnp.full(1, sde.t1))
  stretch = float(jnp.max(jnp.sqrt(v1 / v0)))
  assert jnp.max(jnp.abs(back - x)) < 10 * tolerance * max(stretch, 1.0)


def test_hutchinson_is_unbiased_and_knows_its_error(x64):
  """4000 keys of one example: mean within 4 standard errors of the exact value, claimed variance within 15%."""
  data, sde, n = mixture(), jd.VP(), 4000
  x = jnp.tile(jnp.asarray([[0.5, 0.4]]), (n, 1))
  run = lambda divergence: jax.jit(
    lambda x: likelihood.log_prob(sde, divergence, 1e-4, 1e-4)(jax.random.key(0), x, data.score(sde))
  )
  exact = run(jd.divergence.exact())(x[:1]).value[0]
  result = run(jd.divergence.hutchinson(probes=4))(x)
  deviation = result.value.std()
  assert abs(result.value.mean() - exact) < 4 * deviation / np.sqrt(n) + 2e-3
  np.testing.assert_allclose(jnp.sqrt(jnp.mean(result.standard_error**2)), deviation, rtol=0.15)
  assert jnp.all(jnp.isnan(run(jd.divergence.hutchinson(1))(x[:2]).standard_error))


def test_value_does_not_depend_on_batch_mates(x64):
  """A peer drew probes and steps for the whole batch. The second mate, amid the modes, takes more steps."""
  data, sde, key = mixture(), jd.VP(), jax.random.key(0)
  x = data.sample(key, 4).at[1].set(jnp.asarray([-0.2, -0.1]))
  fn = likelihood.log_prob(sde, jd.divergence.hutchinson(2))
  whole = fn(key, x, data.score(sde))
  for k in (0, 1, 3):
    alone = fn(jd.example_keys(key, k, 1), x[k : k + 1], data.score(sde))
    np.testing.assert_allclose(whole.value[k], alone.value[0], rtol=1e-9)
    assert whole.nfe[k] == alone.nfe[0]
  assert len(set(whole.nfe.tolist())) > 1


def test_every_network_evaluation_is_counted():
  calls, data, sde = [], gaussian(), jd.VP()

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return data.score(sde)(x, t)

  result = likelihood.log_prob(sde, rtol=1e-3, atol=1e-3)(jax.random.key(0), jnp.ones((1, 3)), score)
  jax.effects_barrier()
  assert result.nfe.tolist() == [len(calls)]


def test_no_host_callback_on_the_hot_path():
  fn = likelihood.log_prob(jd.VP())
  jaxpr = str(jax.make_jaxpr(lambda x: fn(jax.random.key(0), x, lambda x, t: -x))(jnp.ones((2, 3))))
  assert "callback" not in jaxpr


def test_gradients_reach_the_parameters_and_x(x64):
  """Against central differences, through the default (checkpointed) adjoint."""
  sde, x = jd.VP(), jnp.asarray([[0.3, -0.4]])
  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-9, 1e-9)
  value = lambda w, x: fn(jax.random.key(0), x, lambda x, t: -w * x + jnp.sin(w * x)).value[0]
  run = jax.jit(value)
  dw, dx = jax.jit(jax.grad(value, argnums=(0, 1)))(0.7, x)
  h = 1e-5
  np.testing.assert_allclose(dw, (run(0.7 + h, x) - run(0.7 - h, x)) / (2 * h), rtol=1e-5)
  e = jnp.asarray([[h, 0.0]])
  np.testing.assert_allclose(dx[0, 0], (run(0.7, x + e) - run(0.7, x - e)) / (2 * h), rtol=1e-5)


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


@pytest.mark.parametrize("levels", [8, 17, 256])
def test_uniform_data_score_log2_of_the_levels(levels, x64):
  """The exact score of data uniform on [-1, 1], noised: bits/dim = log2 L whatever the integers, within 0.01.

  The density at t0 drops at the walls, over a width of sigma(t0) = 1e-3, which integers of the middle do not see.
  """
  sde = jd.VP()

  def log_density(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    cdf = jax.scipy.stats.norm.logcdf
    left = -jnp.abs(x)
    high, low = cdf((left + alpha) / sigma), cdf((left - alpha) / sigma)
    return jnp.sum(high + jnp.log1p(-jnp.exp(low - high)) - jnp.log(2 * alpha), axis=1)

  score = lambda x, t: jax.grad(lambda y: jnp.sum(log_density(y, t)))(x)
  prior = lambda z: log_density(z, jnp.full(len(z), 1.0))
  log_prob = likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, prior_log_prob=prior)
  n = jnp.asarray(np.random.default_rng(0).integers(levels // 4, 3 * levels // 4, (8, 3)), jnp.uint8)
  result = jax.jit(lambda n: likelihood.bits_per_dim(log_prob, levels)(jax.random.key(1), n, score))(n)
  np.testing.assert_allclose(result.value, np.log2(levels), atol=0.01)


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 17.0)])
def test_units(data_range):
  """A density that is uniform on the range has log2 L bits, whatever the range."""
  low, high = data_range
  log_prob = jnp.full(2, -5 * np.log(high - low), jnp.float32)
  np.testing.assert_allclose(likelihood.nats_to_bits_per_dim(log_prob, 5, 17, data_range), np.log2(17), rtol=1e-6)


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 4.0)])
def test_dequantized_integers_fill_their_bins(data_range):
  n = jnp.tile(jnp.arange(4, dtype=jnp.uint8), (2000, 1))
  low, high = data_range
  x = likelihood.dequantize(jax.random.key(0), n, 4, data_range)
  unit = (np.asarray(x) - low) / (high - low) * 4
  np.testing.assert_array_equal(np.floor(unit), n)
  fraction = unit - np.floor(unit)
  assert abs(fraction.mean() - 0.5) < 4 / np.sqrt(12 * fraction.size)
  assert abs(fraction.var() - 1 / 12) < 0.003


def test_integers_outside_the_levels_are_reported():
  bits = likelihood.bits_per_dim(likelihood.log_prob(jd.VP(), rtol=1e-2, atol=1e-2), levels=4)
  result = bits(jax.random.key(0), jnp.asarray([[0, 3], [4, 1]], jnp.uint8), lambda x, t: -x)
  assert result.status.code.tolist() == [0, 3]
  assert jnp.isnan(result.value).tolist() == [False, True]
  with pytest.raises(jd.SolveError, match="1 of 2 examples .*outside 0..levels-1"):
    jd.raise_if_failed(result)


@pytest.mark.parametrize(("dtype", "levels"), [(jnp.uint8, 256), (jnp.uint16, 65536), (jnp.int8, 100), (jnp.int32, 7)])
def test_the_largest_level_of_every_type_is_inside(dtype, levels):
  """256 wraps to 0 as a uint8: x < 256 would hold for no image."""
  bits = likelihood.bits_per_dim(likelihood.log_prob(jd.VP(), rtol=0.1, atol=0.1), levels)
  x = jnp.asarray([[0, levels - 1]], dtype)
  assert bits(jax.random.key(0), x, lambda x, t: -x).status.code.tolist() == [0]


def test_condition_is_split_with_the_examples():
  """log p(x | center): each example under the Gaussian of its own center."""
  sde, centers = jd.VP(), jnp.asarray([[-1.0], [0.0], [2.0]])

  def score(x, t, center):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -(x - alpha * center) / (sigma**2 + 0.25 * alpha**2)

  fn = likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4)
  value = fn(jax.random.key(0), centers + 0.1, score, {"center": centers}).value
  np.testing.assert_allclose(value, -0.5 * 0.2**2 - np.log(0.5 * np.sqrt(2 * np.pi)), atol=0.02)


def test_bits_and_their_error_are_those_of_the_log_density():
  """Dequantization and probes have keys of their own; value and error convert by d log 2."""
  log_prob = likelihood.log_prob(jd.VP(), jd.divergence.hutchinson(4), rtol=1e-2, atol=1e-2)
  key, n, score = (
    jax.random.key(3),
    jnp.asarray([[0, 3, 1], [2, 2, 0]], jnp.uint8),
    lambda x, t: -x + jnp.sin(2 * x[:, ::-1]),
  )
  result = likelihood.bits_per_dim(log_prob, 4)(key, n, score)
  first, second = jd.keys.split(jd.keys.fold_in(jd.example_keys(key, 0, 2), 0))
  expected = log_prob(second, likelihood.dequantize(first, n, 4), score)
  np.testing.assert_allclose(result.value, -expected.value / (3 * np.log(2)) + 1, rtol=1e-5)
  np.testing.assert_allclose(result.standard_error, expected.standard_error / (3 * np.log(2)), rtol=1e-5)
  assert jnp.all(result.standard_error > 0)


@pytest.mark.parametrize("t0", [2.0, 0.0, -0.1])
@pytest.mark.parametrize("make", [jd.likelihood.log_prob, jd.samplers.probability_flow, None])
def test_a_bad_t0_is_refused_before_and_under_jit(t0, make):
  make = make or (lambda sde, t0: jd.losses.denoising(sde, jd.predictions.noise(), t0=t0))
  with pytest.raises(ValueError, match=r"t0 must lie in \[0, t1\)|no noise"):
    jax.jit(lambda: [make(jd.VP(), t0=t0), 0][1])()
  with pytest.raises(ValueError, match=r"t0 must lie in \[0, t1\)|no noise"):
    make(jd.VP(), t0=t0)


def test_solves_ask_for_the_highest_matmul_precision():
  fn, w = likelihood.log_prob(jd.VP()), jnp.eye(3)
  jaxpr = str(jax.make_jaxpr(lambda x: fn(jax.random.key(0), x, lambda x, t: -x @ w).value)(jnp.ones((2, 3))))
  assert "HIGHEST" in jaxpr
  assert "precision=None" not in jaxpr


def test_gradients_of_failed_solves_are_not_a_number():
  fn = likelihood.log_prob(jd.VP(), max_steps=2)
  value, gradient = jax.value_and_grad(lambda w: fn(jax.random.key(0), jnp.ones((1, 2)), lambda x, t: -w * x).value[0])(
    jnp.ones(())
  )
  assert jnp.isnan(value)
  assert jnp.isnan(gradient)


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


@pytest.mark.parametrize(
  ("sde", "make"),
  [
    (jd.VP(), jd.likelihood.dequantization.gaussian),
    (jd.VP(), jd.likelihood.dequantization.truncated_normal),
    (jd.VE(0.01, 5.0), jd.likelihood.dequantization.gaussian),
    (jd.VariancePreserving(jd.schedules.Gamma(-12.0, 6.0)), jd.likelihood.dequantization.gaussian),
  ],
)
def test_integers_under_the_noise_of_the_process_have_their_probability(sde, make):
  """Three levels with the exact score of their mixture: -log2 p of each, to 0.01 bits, without variance."""
  p, centers = jnp.asarray([0.6, 0.3, 0.1]), jnp.asarray([[[-2 / 3, 0.0, 2 / 3]]])

  def score(x, t):
    alpha, sigma = (v[:, None, None] for v in sde.marginal(t))
    logits = jnp.log(p)[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (alpha[..., 0] * denoised - x) / sigma[..., 0] ** 2

  exact_prior = lambda z: jax.nn.logsumexp(
    jnp.log(p)[None] + jax.scipy.stats.norm.logpdf(z, *(s for s in _ends(sde, centers[0]))), axis=1
  )
  log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-6, 1e-6, prior_log_prob=exact_prior)
  bits = jd.likelihood.bits_per_dim(log_prob, 3, dequantization=make(sde))
  x = jnp.asarray([[0], [1], [2], [0], [3]], jnp.uint8)
  result = jax.jit(lambda key, x: bits(key, x, score))(jax.random.key(0), x)
  np.testing.assert_allclose(result.value[:4], -jnp.log2(p[jnp.asarray([0, 1, 2, 0])]), atol=0.01)
  assert jnp.isnan(result.value[4])
  assert result.status.code[4] == 3


def _ends(sde, centers):
  alpha, sigma = sde.marginal(jnp.float32(sde.t1))
  return alpha * centers, sigma
