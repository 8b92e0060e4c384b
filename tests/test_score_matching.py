"""Explicit, implicit, sliced and denoising score matching: one minimizer, known constants, unbiased estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, Gaussian, compiled, gaussian
from test_losses import network_of, undo_preconditioning

import jaxdiff as jd
from jaxdiff.losses import times, weights

DATA = gaussian()
TRUE_SCORE = lambda x, t: (jnp.asarray(DATA.mean, x.dtype)[None] - x) / jnp.asarray(DATA.std**2, x.dtype)[None]


def objectives(target, **options):
  return {
    "explicit": jd.losses.explicit(target, **options),
    "implicit": jd.losses.implicit(**options),
    "sliced": jd.losses.sliced(probes=2, **options),
    "sliced reduced": jd.losses.sliced(probes=2, reduced=True, **options),
  }


NAMES = ["explicit", "implicit", "sliced", "sliced reduced"]
KEY = jax.random.key(0)


def draws(count, data=DATA, seed=1):
  return data.mean + data.std * np.random.default_rng(seed).normal(size=(count, len(data.mean)))


def singles(count, data=DATA, seed=1):
  return draws(count, data, seed).astype(np.float32)


def per_example_gradients(losses, network_at, tilt, x0):
  """d loss_i / d tilt, [n, len(tilt)] of each loss, each example with its own key."""
  u = np.linspace(0.0, 1.0, len(x0), endpoint=False, dtype=np.float32)

  def one(loss, tilt, key, x, u):
    return jnp.sum(loss(key[None], x[None], functools.partial(network_at, tilt), u=u[None])[0])

  def run(tilt, key, x0, u):
    keys = jd.example_keys(key, 0, len(x0))
    each = lambda loss: jax.vmap(jax.grad(functools.partial(one, loss)), in_axes=(None, 0, 0, 0))(tilt, keys, x0, u)
    return {name: each(loss) for name, loss in losses.items()}

  run = jax.jit(run)
  return [jax.device_get(run(np.asarray(t, np.float32), KEY, x0, u)) for t in tilt]


def z(values):
  values = np.asarray(values, np.float64)
  return values.mean(axis=0) / (values.std(axis=0) / np.sqrt(len(values)))


@pytest.mark.parametrize("sde", [None, jd.VP()], ids=["data", "vp"])
def test_the_minimizer_is_the_score(sde):
  """Gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  data = Gaussian(np.array([0.5, -0.5]), np.array([0.6, 1.0]))
  still = jd.EDM()  # whose marginal at t = 1e-6 is that of the data
  score = data.score(sde or still)
  time = (lambda t: t) if sde else (lambda t: jnp.full_like(t, 1e-6))
  options = {"sde": sde, "weight": weights.likelihood(), "time": times.importance(), "t0": 0.05} if sde else {}
  losses = objectives(lambda x, t: score(x, time(t)), **options)
  network = lambda tilt, x, t: score(x, time(t)) * (1 + tilt[0]) + tilt[1] / jnp.sqrt(1 + x**2)
  at, away = per_example_gradients(losses, network, [(0.0, 0.0), (0.1, 0.1)], singles(20_000, data))
  np.testing.assert_allclose(at.pop("explicit"), 0, atol=1e-5)
  for name in at:
    assert np.all(np.abs(z(at[name])) < 4), name
  for name in away:
    assert np.all(np.abs(z(away[name])) > 4), name


def test_a_linear_score_fitted_by_implicit_score_matching_is_the_gaussian_of_the_data(x64):
  """Closed form: with empirical mean m and covariance C, the gradient vanishes exactly at s(x) = -C^-1 (x - m)."""
  x = draws(500)
  mean, precision = x.mean(axis=0), np.linalg.inv(np.cov(x.T, bias=True))

  def total(params):
    network = lambda x, t: x @ params[0].T + params[1][None]
    return jd.losses.implicit()(KEY, jnp.asarray(x), network)[0].mean()

  value, gradient = compiled(jax.value_and_grad(total), (-precision, precision @ mean))
  for leaf in gradient:
    np.testing.assert_allclose(leaf, 0, atol=1e-9)
  np.testing.assert_allclose(value, -0.5 * np.trace(precision), rtol=1e-10)


def test_explicit_and_implicit_differ_by_half_the_square_of_the_score():
  """explicit - implicit = E sigma^2 |score|^2 / 2, and denoising - explicit = E (d - sigma^2 |score|^2) / 2."""
  sde, n = jd.VP(), 100_000
  score = DATA.score(sde)
  wrong = lambda x, t: 0.7 * score(x, t) + 0.3 * jnp.tanh(x)

  @jax.jit
  def run(key, x, t):
    options = {"sde": sde, "time": times.fixed(t)}
    losses = {"explicit": jd.losses.explicit(score, **options), "implicit": jd.losses.implicit(**options)}
    losses["denoising"] = jd.losses.denoising(sde, jd.predictions.score(), time=times.fixed(t))
    return {name: loss(key, x, wrong)[0] for name, loss in losses.items()}

  def close(difference, expected):
    assert abs(difference.mean() - expected) < 4 * difference.std() / np.sqrt(n)
    assert difference.std() / np.sqrt(n) < 0.1 * abs(expected)

  for t in (0.02, 0.4):
    value = jax.device_get(run(KEY, singles(n), np.float32(t)))
    alpha2 = np.exp(-(0.1 * t + 0.5 * 19.9 * t**2))
    square = 0.5 * (1 - alpha2) * np.sum(1 / (alpha2 * DATA.std**2 + 1 - alpha2))
    close(value["explicit"] - value["implicit"], square)
    close(value["denoising"] - value["explicit"], 0.5 * 3 - square)


def test_sliced_is_unbiased_for_implicit_and_its_reduced_form_varies_less():
  """z < 3 over 200 keys, on the same data, for a network with a Jacobian that is neither diagonal nor symmetric."""
  rng = np.random.default_rng(0)
  x, mix = (rng.normal(size=(rows, 3)).astype(np.float32) for rows in (16, 3))
  network = lambda x, t: jnp.tanh(x @ mix) - x

  def run(key):
    mean = lambda loss: lambda key: loss(key, jnp.asarray(x), network)[0].mean()
    sliced = [jd.losses.sliced(**options) for options in ({}, {"reduced": True}, {"probes": 8})]
    keys = jax.random.split(key, 200)
    return mean(jd.losses.implicit())(key), [jax.vmap(mean(loss))(keys) for loss in sliced]

  exact, (plain, reduced, more) = compiled(run, jax.random.key(3))
  for values in (plain, reduced, more):
    assert abs(values.mean() - exact) < 3 * values.std() / np.sqrt(200)
    assert values.std() > 0
  assert reduced.var() < 0.7 * plain.var()
  np.testing.assert_allclose(plain.var() / more.var(), 8, rtol=0.5)  # a ratio of variances of 200: s.e. 1.1


def test_denoising_gradients_are_those_of_explicit_score_matching():
  """The difference of the gradients, example by example, has mean zero within 4 standard errors, far from the score."""
  sde = jd.SubVP()
  score = DATA.score(sde)
  network = lambda tilt, x, t: tilt[0] * score(x, t) + tilt[1] * jnp.tanh(x) + tilt[2]
  options = {"time": times.importance(), "t0": 0.05}
  losses = {
    "explicit": jd.losses.explicit(score, sde, **options),
    "denoising": jd.losses.denoising(sde, jd.predictions.score(), **options),
  }
  (found,) = per_example_gradients(losses, network, [(0.5, 1.0, -0.4)], singles(30_000))
  a, b = (found[name].astype(np.float64) for name in ("explicit", "denoising"))
  assert np.all(np.abs(z(a)) > 10)
  assert np.all(np.abs((a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / len(a))) < 4)


@pytest.mark.parametrize("name", NAMES)
def test_all_predictions_of_one_score_have_one_loss(name, x64):
  sde = jd.VP()
  wrong = lambda x, t: 1.3 * DATA.score(sde)(x, t)

  def value(prediction, key, x0):
    loss = objectives(DATA.score(sde), sde=sde, prediction=PREDICTIONS[prediction], weight=weights.likelihood())[name]
    network = network_of(wrong, sde, PREDICTIONS[prediction])
    return loss(key, x0, undo_preconditioning(network, sde, 0.7) if prediction == "edm" else network)[0]

  first, *others = compiled(lambda *given: [value(p, *given) for p in ("score", "velocity", "edm")], KEY, draws(4))
  for other in others:
    np.testing.assert_allclose(other, first, rtol=1e-6, atol=1e-6 * np.abs(first).max())


def test_denoising_at_one_noise_level_is_the_formula(x64):
  """1/2 |sigma s(x + sigma eps) + eps|^2 at the level sigma of EDM, whose time is the level."""
  x0, sigma = draws(5), 0.3
  loss = jd.losses.denoising(jd.EDM(), jd.predictions.score(), time=times.fixed(sigma))

  def run(key, x0):
    noise_key = jax.vmap(lambda key: jax.random.split(key)[0])(jd.example_keys(key, 0, 5))
    eps = jax.vmap(lambda key: jax.random.normal(key, (3,), jnp.float64))(noise_key)
    return loss(key, x0, lambda x, t: jnp.tanh(x) * t[:, None]), eps

  (value, aux), eps = compiled(run, jax.random.key(1), x0)
  np.testing.assert_array_equal(aux["t"], 0.3)
  expected = 0.5 * np.sum((sigma * sigma * np.tanh(x0 + sigma * eps) + eps) ** 2, axis=1)
  np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_energies_are_trained_through_their_gradient(x64):
  """log p~ = -a |x|^2 / 2 - b sum x^4 / 4: s = -a x - b x^3, tr = -a d - 3 b |x|^2, and the gradient in (a, b)."""
  x, (a, b) = draws(6), (0.7, 0.2)

  def loss_of(loss, params):
    network = jd.score_of(lambda x, t: -jnp.sum(params[0] * x**2 / 2 + params[1] * x**4 / 4, axis=1))
    return loss(jax.random.key(1), jnp.asarray(x), network)[0].sum()

  s = a * x + b * x**3
  expected = np.sum(0.5 * s**2 - a - 3 * b * x**2), (np.sum(s * x - 1), np.sum(s * x**3 - 3 * x**2))
  losses = [jd.losses.implicit(), jd.losses.sliced(reduced=True)]  # a diagonal Hessian: Rademacher is exact
  run = lambda params: [jax.value_and_grad(functools.partial(loss_of, loss))(params) for loss in losses]
  for value, gradient in compiled(run, (a, b)):
    np.testing.assert_allclose(value, expected[0], rtol=1e-10)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"sde": jd.VP(), "time": times.uniform(stratified=False)}], ids=["data", "vp"])
def test_conditions_go_with_their_examples(options):
  """A network that reads its condition: each example's loss is that of the example alone."""
  network = lambda x, t, shift: jnp.tanh(x) - shift[:, None] * x
  losses = objectives(lambda x, t, shift: -x * (1 + shift[:, None]), **options)

  def run(key, x0, shift):
    pair = lambda loss: (
      loss(key, x0, network, {"shift": shift}),
      loss(jd.example_keys(key, 2, 1), x0[2:3], network, {"shift": shift[2:3]})[0],
    )
    return [pair(loss) for loss in losses.values()]

  for (whole, aux), alone in compiled(run, jax.random.key(1), singles(4), np.arange(4, dtype=np.float32)):
    np.testing.assert_allclose(whole[2:3], alone, rtol=1e-5)
    assert aux["t"].shape == (4,)


def test_the_network_is_called_with_the_time_given():
  def run(key, x):
    seen = []
    jd.losses.explicit(lambda x, t: x, t=0.25)(key, x, lambda x, t: (seen.append(t), x)[1])
    return seen[0]

  np.testing.assert_array_equal(compiled(run, KEY, np.ones((2, 3), np.float32)), [0.25, 0.25])


@pytest.mark.parametrize("options", [{}, {"sde": jd.VP()}], ids=["data", "vp"])
def test_half_precision_networks_leave_the_loss_in_float32(options):
  network = lambda x, t: jnp.tanh(x.astype(jnp.bfloat16))
  losses = objectives(TRUE_SCORE, **options)
  for value in compiled(lambda key, x: [loss(key, x, network)[0] for loss in losses.values()], KEY, singles(4)):
    assert value.dtype == np.float32
    assert np.isfinite(value).all()


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_another_shape_or_type_are_refused_when_traced(name):
  x = np.ones((4, 3), np.float32)
  for options in ({}, {"sde": jd.VP()}):
    run = lambda network, options=options: jax.eval_shape(
      lambda x: objectives(TRUE_SCORE, **options)[name](KEY, x, network), x
    )
    with pytest.raises(ValueError, match="network must return an array of the shape of x"):
      run(lambda x, t: x[:, :2])
    with pytest.raises(TypeError, match="network must return a floating point array, got int32"):
      run(lambda x, t: jnp.ones(x.shape, jnp.int32))


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
    jd.losses.sliced(probes=0)
  with pytest.raises(ValueError, match=r"prediction must be predictions.score\(\) without an sde"):
    jd.losses.implicit(prediction=jd.predictions.noise())
  wide = np.ones((1, 5000), np.float32)
  with pytest.raises(ValueError, match="x0 has 5000 dimensions.*losses.sliced, or force=True"):
    jd.losses.implicit()(KEY, wide, lambda x, t: -x)
  value = jax.eval_shape(lambda x: jd.losses.implicit(force=True)(KEY, x, lambda x, t: -x)[0], wide)
  assert value.shape == (1,)
  with pytest.raises(ValueError, match=r"log_density must return one number per example, \(2,\); got shape \(2, 3\)"):
    jax.eval_shape(jd.score_of(lambda x, t: x), np.ones((2, 3), np.float32), np.zeros(2, np.float32))
