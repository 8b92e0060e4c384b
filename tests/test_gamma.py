"""Learned and fixed -log-SNR: pinned ends, monotone, and the process they define."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import jaxdiff as jd
from jaxdiff.schedules import Gamma, monotone_network
from jaxdiff.training import make_optimizer


@functools.cache
def start(width=16):
  """A network at its start."""
  return jax.tree.map(np.asarray, monotone_network(width))


def wild():
  """A network far from it."""
  rng = np.random.default_rng(3)
  return jax.tree.map(lambda leaf: leaf + 2 * rng.normal(size=leaf.shape).astype(leaf.dtype), start())


INTERIORS = pytest.mark.parametrize("interior", [start, wild])


@INTERIORS
def test_a_learned_schedule_rises_between_its_ends(interior):
  t = np.linspace(0.0, 1.0, 1001, dtype=np.float32)
  run = jax.jit(lambda interior, t: (Gamma(-8.0, 3.0, interior)(t), Gamma(-8.0, 3.0, interior)(jnp.float32(0.3))))
  value, alone = jax.tree.map(np.asarray, run(interior(), t))
  assert value[0] == -8.0
  assert value[-1] == 3.0
  assert np.all(np.diff(value) > 0)
  np.testing.assert_allclose(alone, value[300], rtol=1e-5)


def test_it_starts_nearly_straight():
  t = np.linspace(0.0, 1.0, 101, dtype=np.float32)
  np.testing.assert_allclose(jax.jit(lambda network, t: network(t))(start(), t), t, atol=0.01)


def test_ends_hold_through_training_of_the_interior():
  """200 steps of Adam that pull the middle up: it moves, the ends stay to the last digit."""
  optimizer = optax.adam(0.05)

  def step(carry, _):
    interior, state = carry
    gradient = jax.grad(lambda i: (Gamma(-8.0, 3.0, i)(jnp.float32(0.5)) - 2.0) ** 2)(interior)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(interior, updates), state), None

  @jax.jit
  def run(interior):
    (interior, _), _ = jax.lax.scan(step, (interior, optimizer.init(interior)), None, length=200)
    return Gamma(-8.0, 3.0, interior)(jnp.asarray([0.0, 0.5, 1.0]))

  gamma = np.asarray(run(start(8)))
  np.testing.assert_array_equal(gamma[[0, 2]], [-8.0, 3.0])
  assert gamma[1] > 1.5


SQUARE = Partial(lambda t: t**2)


@pytest.mark.parametrize(
  "make",
  [Gamma, lambda: Gamma(-6.0, 4.0, wild()), lambda: Gamma(-6.0, 4.0, SQUARE), lambda: Partial(lambda t: 12 * t - 7)],
  ids=["straight", "learned", "square", "own"],
)
def test_the_process_solves_its_moment_equations(make, x64):
  """d alpha / dt = f alpha, d sigma^2 / dt = 2 f sigma^2 + g^2, at 20 times; alpha^2 + sigma^2 = 1."""
  t = np.linspace(0.01, 0.99, 20)

  @jax.jit
  def run(sde, t):
    drift = sde.drift(jnp.ones((20, 1)), t)[:, 0]
    log_snr = jd.log_snr(sde, t)
    rates = jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))
    return rates, drift, sde.diffusion(t), log_snr, sde.time_of_log_snr(log_snr), sde.gamma(t)

  result = jax.tree.map(np.asarray, run(jd.VariancePreserving(make()), t))
  ((alpha, sigma), (alpha_rate, sigma_rate)), drift, diffusion, log_snr, again, gamma = result
  np.testing.assert_allclose(alpha_rate, drift * alpha, rtol=1e-9)
  np.testing.assert_allclose(2 * sigma * sigma_rate, 2 * drift * sigma**2 + diffusion**2, rtol=1e-9)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
  np.testing.assert_allclose(log_snr, -gamma, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(again, t, rtol=1e-8)


def test_it_works_with_grids_and_likelihood():
  """N(0, I) data under a learned schedule: the log-density is that of the prior."""
  sde, score = jd.VariancePreserving(Gamma(-6.0, 4.0, wild())), lambda x, t: -x
  log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-4, 1e-4)
  x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
  run = jax.jit(lambda x: (log_prob(jax.random.key(0), x, score).value, sde.prior_log_prob(x)))
  value, expected = run(x)
  np.testing.assert_allclose(value, expected, rtol=1e-3)
  ts = jd.time_grid(sde, 20)
  np.testing.assert_allclose(np.diff(jax.jit(lambda ts: jd.log_snr(sde, ts))(ts)), 0.5, rtol=1e-3)


def test_the_schedule_is_trained_through_the_process():
  """Gradients reach the leaves of gamma, through jit, from the score that a network is."""
  gamma = Gamma(jnp.float32(-6.0), jnp.float32(4.0), monotone_network(4))

  def value(gamma):
    score = jd.score_fn(
      lambda p, x, t: p * x * t[:, None], jnp.float32(1.0), jd.VariancePreserving(gamma), jd.predictions.noise(True)
    )
    return jnp.sum(score(jnp.ones((2, 3)), 0.3))

  gradient = jax.jit(jax.grad(value))(gamma)
  assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))


def test_networks_see_the_noise_level_with_log_snr_time():
  """The same input at the same noise level, whatever the schedule and the prediction."""
  makers = (jd.predictions.noise, jd.predictions.data, jd.predictions.velocity, jd.predictions.score)

  @jax.jit
  def run(x):
    seen = []

    def network(params, x, t):
      seen.append(t[0])
      return x

    for sde in (jd.VP(), jd.CosineVP(), jd.VariancePreserving(Gamma(-6.0, 6.0, wild()))):
      t = sde.time_of_log_snr(jnp.float32(2.0))
      for prediction in makers:
        jd.score_fn(network, None, sde, prediction(log_snr_time=True))(x, t)
    return jnp.stack(seen)

  np.testing.assert_allclose(run(np.ones((1, 2), np.float32)), np.full(12, -2.0 / 8), rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["adam", "muon"])
@pytest.mark.standard_promotion
def test_schedules_are_trained_by_any_optimizer(algorithm):
  """Masks and placeholders of optimizers rebuild the pytree with leaves that are no numbers."""
  params = {"gamma": Gamma(jnp.float32(-6.0), jnp.float32(4.0), monotone_network(4)), "w": jnp.ones((3, 3))}
  optimizer = make_optimizer(1e-2, warmup_steps=0, total_steps=10, algorithm=algorithm, weight_decay=0.1)
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert jax.tree.map(lambda _: False, Gamma()).minimum is False


@pytest.mark.parametrize("interior", [Partial(lambda t: 1 - t), Partial(lambda t: t * t - t), Partial(lambda t: 2 * t)])
def test_interiors_that_do_not_rise_from_0_to_1_are_refused(interior):
  with pytest.raises(ValueError, match="interior must rise from 0 at t = 0 to 1 at t = 1, got"):
    Gamma(interior=interior)


def test_functions_that_jit_cannot_take_are_refused(untyped):
  for name, make in (("interior", lambda f: Gamma(interior=f)), ("gamma", jd.VariancePreserving)):
    with pytest.raises(TypeError, match=rf"{name} must be a pytree.*wrap it, jax.tree_util.Partial\(f\)"):
      make(lambda t: t)
    with pytest.raises(TypeError, match=rf"{name} is a factory: did you forget to call it: schedules.monotone_network"):
      make(monotone_network)


def test_bad_schedules_are_refused():
  with pytest.raises(ValueError, match="minimum must be below maximum, got gamma from 5.0 to -3.0"):
    Gamma(5.0, -3.0)
  with pytest.raises(ValueError, match="width must be at least 1.*got 0"):
    monotone_network(0)
  assert dataclasses.replace(Gamma(), minimum=-3.0).minimum == -3.0
