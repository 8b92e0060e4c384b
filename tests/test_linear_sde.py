"""Processes given by two functions of time, against those whose moments are known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled
from switch import Switch

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


FUNCTIONS = {
  "vp": (lambda t: -0.5 * beta(t), lambda t: jnp.sqrt(beta(t))),
  "subvp": (lambda t: -0.5 * beta(t), lambda t: jnp.sqrt(-beta(t) * jnp.expm1(-2 * integral(t)))),
  "ve": (jnp.zeros_like, lambda t: 0.01 * RATIO**t * float(np.sqrt(2 * np.log(RATIO)))),
  "edm": (jnp.zeros_like, lambda t: jnp.sqrt(2 * t)),
  "cosine": (lambda t: -THETA * tangent(t), lambda t: jnp.sqrt(2 * THETA * tangent(t))),
  "alpha to e^-80": (lambda t: -160 * t, lambda t: jnp.sqrt(320 * t)),
}
MOMENTS = {
  "vp": lambda t: (np.exp(-0.5 * integral(t)), np.sqrt(-np.expm1(-integral(t)))),
  "subvp": lambda t: (np.exp(-0.5 * integral(t)), -np.expm1(-integral(t))),
  "ve": lambda t: (np.ones_like(t), 0.01 * np.sqrt(np.expm1(2 * t * np.log(RATIO)))),
  "edm": lambda t: (np.ones_like(t), t),
  "cosine": lambda t: (np.sin(COMPLEMENT + THETA * (1 - t)), np.sin(THETA * t)),
  "alpha to e^-80": lambda t: (np.exp(-80 * t**2), np.sqrt(-np.expm1(-160 * t**2))),
}
LAST = {"edm": 80}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@functools.cache
def single(name):
  """The process, made in float32 at its first use."""
  with jax.enable_x64(False):
    return jd.LinearSDE(*FUNCTIONS[name], LAST.get(name, 1.0))


def times(sde):
  """Numbers that float32 has."""
  return (np.concatenate([[1e-5, 1e-3], np.linspace(0.02, 1, 28)]) * sde.t1).astype(np.float32).astype(np.float64)


@functools.cache
def in_float64(name):
  """What a process made in float64 says, and the moments of the one made in float32."""
  old = single(name)
  sde, t = jd.LinearSDE(*FUNCTIONS[name], LAST.get(name, 1.0)), times(old)

  def run(t):
    slopes = jax.jvp(old.marginal, (t,), (jnp.ones_like(t),))
    coefficients = old.drift_coefficient(t), old.diffusion(t)
    return {
      "here": sde.marginal(t),
      "old": slopes,
      "coefficients": coefficients,
      "back": old.time_of_log_snr(jd.log_snr(old, t)),
    }

  return compiled(run, t)


@functools.cache
def in_float32(name):
  sde = single(name)

  def run(t, log_snr):
    z = sde.prior_sample(jax.random.key(0), (2000, 3))
    return {
      "moments": sde.marginal(t),
      "time": sde.time_of_log_snr(log_snr),
      "ends": [*sde.marginal(jnp.zeros(())), jd.log_snr(sde, jnp.zeros(()))],
      "grid": jd.time_grid(sde, 20),
      "prior": (z, sde.prior_log_prob(z)),
    }

  (alpha, sigma), ends = MOMENTS[name](times(sde)), np.asarray([np.inf, -1e4])
  log_snr = np.append(2 * (np.log(alpha) - np.log(sigma)), ends)
  return compiled(run, times(sde).astype(np.float32), log_snr.astype(np.float32))


@EACH
def test_moments_are_those_of_the_closed_form_in_float64(name, x64):
  for value, expected in zip(in_float64(name)["here"], MOMENTS[name](times(single(name))), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@EACH
def test_moments_are_those_of_the_closed_form_in_float32(name):
  for value, expected in zip(in_float32(name)["moments"], MOMENTS[name](times(single(name))), strict=True):
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@EACH
def test_a_process_made_in_float32_serves_float64(name, x64):
  for value, expected in zip(in_float64(name)["old"][0], MOMENTS[name](times(single(name))), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@EACH
def test_moments_solve_their_equations(name, x64):
  (alpha, sigma), (d_alpha, d_sigma) = ([v[2:] for v in values] for values in in_float64(name)["old"])
  f, g = (v[2:] for v in in_float64(name)["coefficients"])
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(2 * sigma * d_sigma, 2 * f * sigma**2 + g**2, rtol=1e-8, atol=1e-8 * np.max(g**2))


@EACH
def test_time_of_log_snr_inverts_log_snr(name):
  found, t = in_float32(name)["time"], times(single(name))
  np.testing.assert_allclose(found[:-2], t, rtol=2e-6)
  assert found[-2:].tolist() == [0, single(name).t1]
  with jax.enable_x64(True):
    np.testing.assert_allclose(in_float64(name)["back"], t, rtol=1e-10)


@EACH
def test_ends_of_time(name):
  found, (_, scale) = in_float32(name), MOMENTS[name](np.float64(single(name).t1))
  assert [float(v) for v in found["ends"]] == [1, 0, np.inf]
  assert np.all(found["grid"][1:] < found["grid"][:-1])
  z, log_prob = found["prior"]
  np.testing.assert_allclose(np.std(z), scale, rtol=0.05)
  normal = -0.5 * np.sum((np.asarray(z, np.float64) / scale) ** 2, axis=1) - 3 * np.log(scale * np.sqrt(2 * np.pi))
  np.testing.assert_allclose(log_prob, normal, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(shape, dtype):
  sde, t, x = single("vp"), jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((4, 2), dtype)
  for value in jax.eval_shape(lambda t: (*sde.marginal(t), sde.diffusion(t), sde.time_of_log_snr(t)), t):
    assert value.shape == shape
    assert value.dtype == jnp.float32
  assert {v.dtype for v in jax.eval_shape(lambda x: (sde.drift(x, 0.3), sde.diffuse(0.3, x)), x)} == {jnp.dtype(dtype)}


def linear_or_closed(which):
  return Switch(which, (single("vp"), jd.VP(BETA_MIN, BETA_MAX)))


def test_loss_is_that_of_the_closed_form():
  x0 = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
  network, weight = lambda x, t: x * t[:, None], jd.losses.weights.likelihood()

  def run(which, x0):
    sde, found = linear_or_closed(which), []
    for time in (jd.losses.times.uniform(), jd.losses.times.importance()):
      loss, aux = jd.losses.denoising(sde, jd.predictions.noise(), weight, time)(jax.random.key(1), x0, network)
      found.append((loss, aux["t"]))
    return found

  run = jax.jit(run)
  for linear, closed in zip(run(0, x0), run(1, x0), strict=True):
    np.testing.assert_allclose(linear[1], closed[1], rtol=1e-5)
    np.testing.assert_allclose(linear[0], closed[0], rtol=1e-4)


def test_samples_and_densities_are_those_of_the_closed_form():
  x, key = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32), jax.random.key(1)

  @jax.jit
  def run(which, x):
    sde, score = linear_or_closed(which), lambda x, t: -0.9 * x
    x_T = sde.prior_sample(key, x.shape)
    ts = jd.time_grid(sde, 10, t0=0.01)
    return {
      "ts": ts,
      "reverse_sde": jd.samplers.reverse_sde(sde, ts)(key, x_T, score).x,
      "log_prob": jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4, t0=0.01)(key, x, score).value,
    }

  linear, closed = run(0, x), run(1, x)
  for name in linear:
    # N(0, sigma(1)^2) for the one, N(0, 1) for the other: sigma(1)^2 = 1 - 4e-5.
    np.testing.assert_allclose(linear[name], closed[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_is_a_pytree_compared_by_its_functions_and_made_within_jit():
  vp = single("vp")
  traces = []

  @jax.jit
  def sigma(sde, t):
    traces.append(1)
    return sde.marginal(t)[1]

  same = jd.LinearSDE(vp.drift_coefficient, vp.diffusion_coefficient)
  assert same == vp
  assert hash(same) == hash(vp)
  assert sigma(vp, 0.3) == sigma(same, 0.3)
  assert len(traces) == 1
  assert jax.tree.structure(jax.tree.map(lambda _: None, vp)) != jax.tree.structure(vp)
  inside = jax.jit(lambda t: jd.LinearSDE(vp.drift_coefficient, vp.diffusion_coefficient).marginal(t)[1])
  np.testing.assert_allclose(inside(0.3), sigma(vp, 0.3), rtol=1e-6)


def test_long_batches_are_what_each_time_gives():
  """Large sums are where XLA's CPU backend has been wrong."""
  t = np.linspace(0.01, 1.0, 20_000, dtype=np.float32)
  expected = np.sqrt(-np.expm1(-integral(t.astype(np.float64))))
  np.testing.assert_allclose(jax.jit(single("vp").marginal)(t)[1], expected, rtol=1e-6)


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
