"""Processes given by two functions of time, against those whose moments are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

BETA_MIN, BETA_MAX = 0.1, 20.0
COMPLEMENT = float(np.arctan(np.exp(-5.0)))  # of the cosine process that ends at log-SNR -10
THETA = np.pi / 2 - COMPLEMENT
RATIO = 5000.0


def beta(t):
  return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def integral(t):
  return t * (BETA_MIN + 0.5 * t * (BETA_MAX - BETA_MIN))


def tangent(t):
  """tan(THETA t), with all its digits in float32 at both ends."""
  return jnp.where(t < 0.5, jnp.tan(THETA * t), 1 / jnp.tan(COMPLEMENT + THETA * (1 - t)))


VP = jd.LinearSDE(lambda t: -0.5 * beta(t), lambda t: jnp.sqrt(beta(t)))
CASES = {
  "vp": (VP, lambda t: (np.exp(-0.5 * integral(t)), np.sqrt(-np.expm1(-integral(t))))),
  "subvp": (
    jd.LinearSDE(lambda t: -0.5 * beta(t), lambda t: jnp.sqrt(-beta(t) * jnp.expm1(-2 * integral(t)))),
    lambda t: (np.exp(-0.5 * integral(t)), -np.expm1(-integral(t))),
  ),
  "ve": (
    jd.LinearSDE(jnp.zeros_like, lambda t: 0.01 * RATIO**t * float(np.sqrt(2 * np.log(RATIO)))),
    lambda t: (np.ones_like(t), 0.01 * np.sqrt(np.expm1(2 * t * np.log(RATIO)))),
  ),
  "edm": (jd.LinearSDE(jnp.zeros_like, lambda t: jnp.sqrt(2 * t), t1=80), lambda t: (np.ones_like(t), t)),
  "cosine": (
    jd.LinearSDE(lambda t: -THETA * tangent(t), lambda t: jnp.sqrt(2 * THETA * tangent(t))),
    lambda t: (np.sin(COMPLEMENT + THETA * (1 - t)), np.sin(THETA * t)),
  ),
  "alpha to e^-80": (
    jd.LinearSDE(lambda t: -160 * t, lambda t: jnp.sqrt(320 * t)),
    lambda t: (np.exp(-80 * t**2), np.sqrt(-np.expm1(-160 * t**2))),
  ),
}
EACH = pytest.mark.parametrize(("sde", "moments"), CASES.values(), ids=CASES.keys())


def times(sde):
  """Numbers that float32 has."""
  return (np.concatenate([[1e-5, 1e-3], np.linspace(0.02, 1, 28)]) * sde.t1).astype(np.float32).astype(np.float64)


@EACH
def test_moments_are_those_of_the_closed_form_in_float64(sde, moments, x64):
  made_here = jd.LinearSDE(sde.drift_coefficient, sde.diffusion_coefficient, sde.t1)
  for value, expected in zip(made_here.marginal(jnp.asarray(times(sde))), moments(times(sde)), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@EACH
def test_moments_are_those_of_the_closed_form_in_float32(sde, moments):
  for value, expected in zip(sde.marginal(jnp.asarray(times(sde))), moments(times(sde)), strict=True):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@EACH
def test_a_process_made_in_float32_serves_float64(sde, moments, x64):
  for value, expected in zip(sde.marginal(jnp.asarray(times(sde))), moments(times(sde)), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@EACH
def test_moments_solve_their_equations(sde, moments, x64):
  t = jnp.asarray(times(sde)[2:])
  f, g = sde.drift_coefficient(t), sde.diffusion(t)
  (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(2 * sigma * d_sigma, 2 * f * sigma**2 + g**2, rtol=1e-8, atol=1e-8 * np.max(g**2))


@EACH
def test_time_of_log_snr_inverts_log_snr(sde, moments):
  t = times(sde)
  alpha, sigma = moments(t)
  log_snr = 2 * (np.log(alpha) - np.log(sigma))
  np.testing.assert_allclose(sde.time_of_log_snr(jnp.asarray(log_snr)), t, rtol=2e-6)
  with jax.enable_x64(True):
    np.testing.assert_allclose(sde.time_of_log_snr(jd.log_snr(sde, jnp.asarray(t))), t, rtol=1e-10)
  assert sde.time_of_log_snr(jnp.inf) == 0
  assert sde.time_of_log_snr(-1e4) == sde.t1


@EACH
def test_ends_of_time(sde, moments):
  assert [float(v) for v in sde.marginal(0.0)] == [1, 0]
  assert jd.log_snr(sde, 0.0) == jnp.inf
  ts = jd.time_grid(sde, 20)
  assert jnp.all(ts[1:] < ts[:-1])
  z = sde.prior_sample(jax.random.key(0), (2000, 3))
  _, scale = moments(np.float64(sde.t1))
  np.testing.assert_allclose(np.std(z), scale, rtol=0.05)
  normal = -0.5 * np.sum((np.asarray(z, np.float64) / scale) ** 2, axis=1) - 3 * np.log(scale * np.sqrt(2 * np.pi))
  np.testing.assert_allclose(sde.prior_log_prob(z), normal, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(shape, dtype):
  t = jnp.full(shape, 0.3, dtype)
  for value in (*VP.marginal(t), VP.diffusion(t)):
    assert value.shape == shape
    assert value.dtype == jnp.float32
  assert VP.time_of_log_snr(t).shape == shape
  x = jnp.ones((4, 2), dtype)
  assert VP.drift(x, 0.3).dtype == VP.diffuse(0.3, x).dtype == dtype


def test_loss_is_that_of_the_closed_form():
  x0 = jax.random.normal(jax.random.key(0), (16, 3))
  network = lambda x, t: x * t[:, None]
  for time in (jd.losses.times.uniform(), jd.losses.times.importance()):
    linear, closed = (
      jd.losses.denoising(sde, jd.predictions.noise(), jd.losses.weights.likelihood(), time)(
        jax.random.key(1), x0, network
      )
      for sde in (VP, jd.VP(BETA_MIN, BETA_MAX))
    )
    np.testing.assert_allclose(linear[1]["t"], closed[1]["t"], rtol=1e-5)
    np.testing.assert_allclose(linear[0], closed[0], rtol=1e-4)


def test_samples_and_densities_are_those_of_the_closed_form():
  x = jax.random.normal(jax.random.key(0), (4, 2))
  apply = lambda w, x, t: w * x

  @jax.jit
  def run(sde, key, w):
    score = jd.score_fn(apply, w, sde, jd.predictions.score())
    x_T = sde.prior_sample(key, x.shape)
    ts = jd.time_grid(sde, 10, t0=0.01)
    return {
      "ts": ts,
      "reverse_sde": jd.samplers.reverse_sde(sde, ts)(key, x_T, score).x,
      "flow": jd.samplers.probability_flow(sde, 1e-4, 1e-4, t0=0.01)(key, x_T, score).x,
      "log_prob": jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4, t0=0.01)(key, x, score).value,
    }

  linear, closed = (run(sde, jax.random.key(1), -0.9) for sde in (VP, jd.VP(BETA_MIN, BETA_MAX)))
  for name in linear:
    # N(0, sigma(1)^2) for the one, N(0, 1) for the other: sigma(1)^2 = 1 - 4e-5.
    np.testing.assert_allclose(linear[name], closed[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_is_a_pytree_compared_by_its_functions_and_made_within_jit():
  traces = []

  @jax.jit
  def sigma(sde, t):
    traces.append(1)
    return sde.marginal(t)[1]

  same = jd.LinearSDE(VP.drift_coefficient, VP.diffusion_coefficient)
  assert same == VP
  assert hash(same) == hash(VP)
  assert sigma(VP, 0.3) == sigma(same, 0.3)
  assert len(traces) == 1
  assert jax.tree.structure(jax.tree.map(lambda _: None, VP)) != jax.tree.structure(VP)
  inside = jax.jit(lambda t: jd.LinearSDE(VP.drift_coefficient, VP.diffusion_coefficient).marginal(t)[1])
  np.testing.assert_allclose(inside(0.3), sigma(VP, 0.3), rtol=1e-6)


def test_long_batches_are_what_each_time_gives():
  """Large sums are where XLA's CPU backend has been wrong."""
  t = jnp.linspace(0.01, 1.0, 20_000)
  np.testing.assert_allclose(jax.jit(VP.marginal)(t)[1], jd.VP().marginal(t)[1], rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (
      {"drift_coefficient": lambda t: -0.5},
      ValueError,
      r"drift_coefficient\(t\) must have the shape of t, .*full_like",
    ),
    ({"diffusion_coefficient": lambda t: t[..., :1]}, ValueError, r"diffusion_coefficient\(t\) must have the shape"),
    ({"drift_coefficient": lambda t: jnp.log(t - 0.5)}, ValueError, r"drift_coefficient\(t\) must be finite .* nan at"),
    ({"diffusion_coefficient": jnp.zeros_like}, ValueError, r"diffusion_coefficient\(t\) must be positive somewhere"),
    ({"diffusion_coefficient": lambda t: -t}, ValueError, r"diffusion_coefficient\(t\) must not be negative, got -"),
    ({"drift_coefficient": lambda t: -2e3 * t}, ValueError, "moments leave the numbers"),
    ({"drift_coefficient": lambda t: 0.1 / t}, ValueError, r"must be smooth .* differ by a part"),
    ({"drift_coefficient": 1.0}, TypeError, "drift_coefficient must be a function of time, got 1.0"),
    ({"t1": 0.0}, ValueError, "t1 must be positive and finite"),
    ({"t1": float("inf")}, ValueError, "t1 must be positive and finite"),
    ({"t1": jnp.ones(())}, TypeError, "t1 must be a Python number"),
  ],
)
def test_wrong_use_is_refused(arguments, error, message, untyped):
  defaults = {"drift_coefficient": lambda t: -t, "diffusion_coefficient": jnp.ones_like}
  with pytest.raises(error, match=message):
    jd.LinearSDE(**defaults | arguments)


def test_functions_of_traced_values_are_refused(untyped):
  with pytest.raises(TypeError, match="depends on a traced value: make the LinearSDE outside of jit"):
    jax.jit(lambda rate: jd.LinearSDE(lambda t: -rate * t, jnp.ones_like).marginal(0.5))(1.0)
