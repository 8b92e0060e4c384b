import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, SDES, gaussian

import jaxdiff as jd
from jaxdiff.predictions import noise_factor

EACH = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def states(sde, n=40):
  """Clean data, noise, their mixture and its (alpha, sigma) at n times from the data to the prior."""
  t = np.asarray(jd.time_grid(sde, n - 1))
  x0, noise = np.random.default_rng(0).normal(size=(2, n, 3)).astype(t.dtype)
  alpha, sigma = (np.asarray(v)[:, None] for v in jax.jit(lambda sde, t: sde.marginal(t))(sde, t))
  return x0, noise, alpha * x0 + sigma * noise, t, alpha, sigma


@functools.cache
def read(name):
  """A jitted function: the target, and (score, denoised) of it and of any other output."""
  prediction = PREDICTIONS[name]

  @jax.jit
  def run(x0, noise, x, alpha, sigma):
    target = prediction.target(x0, noise, alpha, sigma)
    both = lambda output: (
      prediction.to_score(x, output, alpha, sigma),
      prediction.to_denoised(x, output, alpha, sigma),
    )
    return both(target), both(noise)

  return run


@pytest.mark.parametrize("name", PREDICTIONS)
@EACH_SDE
def test_perfect_output_gives_back_data_and_noise_and_any_output_obeys_tweedie(name, sde, x64):
  x0, noise, x, _, alpha, sigma = states(sde)
  (score, denoised), (other_score, other) = jax.tree.map(np.asarray, read(name)(x0, noise, x, alpha, sigma))
  np.testing.assert_allclose(denoised, x0, atol=1e-7)
  np.testing.assert_allclose(score, -noise / sigma, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(alpha * other, x + sigma**2 * other_score, rtol=1e-9, atol=1e-7)


@EACH_SDE
@pytest.mark.parametrize("name", ["noise", "velocity", "score", "edm"])
def test_float32_score_loses_no_digits(name, sde):
  """Predicting the data is left out: its score is (alpha D - x) / sigma^2, a difference, by nature."""
  prediction = PREDICTIONS[name]
  _, output, x, t, alpha, sigma = states(sde)
  run = jax.jit(prediction.to_score)
  single = run(x, output, alpha, sigma)
  assert single.dtype == jnp.float32
  with jax.enable_x64(True):
    double = np.asarray(run(*(np.asarray(v, np.float64) for v in (x, output, alpha, sigma))))
  single = np.asarray(single, np.float64)
  scale = np.abs(double).max(axis=1, keepdims=True)
  assert np.max(np.abs(single - double) / scale) < 1e-6


def test_edm_is_the_published_preconditioning(x64):
  """Karras et al. 2022, Table 1, for alpha = 1: D = c_skip x + c_out F(c_in x, log(sigma) / 4)."""
  s, sigma = 0.5, jnp.asarray([[0.002], [0.4], [80.0]])
  x, output = jax.random.normal(jax.random.key(0), (2, 3, 4))
  root = jnp.sqrt(sigma**2 + s**2)
  edm, one = jd.predictions.edm(s), jnp.ones_like(sigma)
  np.testing.assert_allclose(
    edm.to_denoised(x, output, one, sigma), s**2 / root**2 * x + sigma * s / root * output, rtol=1e-10
  )
  x_in, t_in = edm.precondition(x, sigma[:, 0], one[:, 0], sigma[:, 0])
  np.testing.assert_allclose(x_in, x / root, rtol=1e-12)
  np.testing.assert_allclose(t_in, jnp.log(sigma[:, 0]) / 4, rtol=1e-12)


@EACH_SDE
def test_edm_input_and_target_have_unit_variance(sde, x64):
  """On data of standard deviation sigma_data, at every time; 4 standard errors of 20 000 draws."""
  n, edm = 20_000, jd.predictions.edm(0.5)
  x0, noise = np.random.default_rng(0).normal(size=(2, n, 1)) * np.array([0.5, 1.0])[:, None, None]

  @jax.jit
  def run(sde, t):
    alpha, sigma = sde.marginal(t)
    x_in, _ = edm.precondition(alpha * x0 + sigma * noise, t, alpha, sigma)
    return x_in, edm.target(x0, noise, alpha, sigma)

  for t in np.asarray(jd.time_grid(sde, 4)):
    for value in run(sde, t):
      assert abs(np.std(value) - 1) < 4 / np.sqrt(2 * n)


def test_velocity_is_edm_of_unit_data_with_the_sign_turned():
  x0, noise, _, _, alpha, sigma = states(jd.VP())
  velocity, edm = jd.predictions.velocity(), jd.predictions.edm(1.0)
  np.testing.assert_allclose(
    velocity.target(x0, noise, alpha, sigma), -edm.target(x0, noise, alpha, sigma), rtol=1e-5, atol=1e-6
  )


def test_noise_factors_are_the_documented_ones(x64):
  alpha, sigma = jd.VE().marginal(jnp.asarray([0.1, 0.5, 0.9]))
  r, root = jnp.sqrt(alpha**2 + sigma**2), jnp.sqrt(0.49 * alpha**2 + sigma**2)
  documented = {
    "noise": jnp.ones(3),
    "data": alpha / sigma,
    "velocity": alpha / r,
    "score": sigma,
    "edm": 0.7 * alpha / root,
  }
  for name, factor in documented.items():
    np.testing.assert_allclose(noise_factor(PREDICTIONS[name], alpha, sigma), factor, rtol=1e-10)


@EACH
@EACH_SDE
def test_score_fn_reads_score_and_denoiser(prediction, sde):
  """A network that outputs the prediction of the exact score of Gaussian data."""
  data, (_, _, x, t, alpha, sigma) = gaussian(), states(sde)
  exact = data.score(sde)

  @jax.jit
  def run(x, t):
    def apply(params, x_in, t_in):
      zero = prediction.to_score(x, jnp.zeros_like(x), alpha, sigma)
      slope = prediction.to_score(x, jnp.ones_like(x), alpha, sigma) - zero
      return params * (exact(x, t) - zero) / slope

    score = jd.score_fn(apply, jnp.float32(1.0), sde, prediction)
    return score(x, t), exact(x, t), jd.denoised(sde, exact, x, t), jd.denoised(sde, score, x, t)

  found, expected, plain, direct = jax.tree.map(np.asarray, run(x, t))
  scale = np.max(np.abs(expected), axis=1, keepdims=True)
  np.testing.assert_allclose(found / scale, expected / scale, atol=2e-3 if prediction is PREDICTIONS["data"] else 1e-5)
  limit = 0.02 if isinstance(sde, jd.SubVP | jd.VP | jd.CosineVP) else 1e-3
  np.testing.assert_allclose(direct[1:], plain[1:], atol=limit)


def test_score_is_a_pytree_of_its_parameters():
  traces = []

  @jax.jit
  def run(score, x):
    traces.append(1)
    return score(x, 0.5)

  apply = lambda params, x, t: params * x
  make = lambda p: jd.score_fn(apply, jnp.float32(p), jd.VP(), jd.predictions.edm(0.5))
  x = jnp.ones((2, 3))
  assert run(make(1.0), x)[0, 0] != run(make(2.0), x)[0, 0]
  assert len(traces) == 1


def test_half_precision_network_is_cast_back_at_the_boundary():
  apply = lambda params, x, t: (params * x).astype(jnp.bfloat16)
  for prediction in PREDICTIONS.values():
    score = jd.score_fn(apply, jnp.float32(0.5), jd.VP(), prediction)
    assert score(jnp.ones((2, 3)), 0.5).dtype == jnp.float32


def test_network_sees_one_time_per_example():
  seen = []

  def apply(params, x, t):
    seen.append(t)
    return x

  jd.score_fn(apply, None, jd.VP(), jd.predictions.noise())(jnp.ones((2, 3)), 0.25)
  np.testing.assert_array_equal(seen[0], [0.25, 0.25])


@pytest.mark.parametrize(
  ("network", "error", "message"),
  [
    (lambda params, x, t: x[:, :2], ValueError, r"shape of x, \(4, 3\); got \(4, 2\)"),
    (lambda params, x, t: jnp.ones_like(x, jnp.int32), TypeError, "floating point array, got int32"),
    (lambda params, x, t: (x, None), TypeError, "floating point array, got <class 'tuple'>"),
  ],
)
def test_wrong_networks_are_refused_at_trace_time(network, error, message):
  score = jd.score_fn(network, None, jd.VP(), jd.predictions.noise())
  with pytest.raises(error, match=message):
    jax.eval_shape(lambda x: score(x, 0.5), jnp.ones((4, 3)))


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_edm_refuses_a_spread_that_is_not_positive(sigma_data):
  with pytest.raises(ValueError, match="sigma_data must be positive"):
    jd.predictions.edm(sigma_data)
