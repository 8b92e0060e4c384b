"""Explicit, implicit, sliced and denoising score matching: one minimizer, known constants, unbiased estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, SDES, Gaussian, gaussian
from test_losses import network_of

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


NAMES = list(objectives(TRUE_SCORE))


def per_example_gradients(loss, network_at, tilt, x0, u=None):
  """d loss_i / d tilt, [n, len(tilt)], each example with its own key."""
  keys = jd.example_keys(jax.random.key(0), 0, len(x0))
  u = jnp.linspace(0.0, 1.0, len(x0), endpoint=False) if u is None else u

  def one(tilt, key, x, u):
    return jnp.sum(loss(key[None], x[None], functools.partial(network_at, tilt), u=u[None])[0])

  return jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0)))(tilt, keys, x0, u)


def z(values):
  return np.asarray(values.mean(axis=0) / (values.std(axis=0) / np.sqrt(len(values))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sde", [None, jd.VP(), jd.VE(0.1, 5.0)], ids=["data", "vp", "ve"])
def test_the_minimizer_is_the_score(name, sde):
  """Gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  data = Gaussian(np.array([0.5, -0.5]), np.array([0.6, 1.0]))
  still = jd.EDM()  # whose marginal at t = 1e-6 is that of the data
  score = data.score(sde or still)
  time = (lambda t: t) if sde else (lambda t: jnp.full_like(t, 1e-6))
  options = {"sde": sde, "weight": weights.likelihood(), "time": times.importance(), "t0": 0.05} if sde else {}
  loss = objectives(lambda x, t: score(x, time(t)), **options)[name]
  network = lambda tilt, x, t: score(x, time(t)) * (1 + tilt[0]) + tilt[1] / jnp.sqrt(1 + x**2)
  x0 = data.sample(jax.random.key(1), 20_000)
  at, away = (per_example_gradients(loss, network, tilt, x0) for tilt in (jnp.zeros(2), jnp.full(2, 0.1)))
  if name == "explicit":
    np.testing.assert_allclose(at, 0, atol=1e-5)
  else:
    assert np.all(np.abs(z(at)) < 4)
  assert np.all(np.abs(z(away)) > 4)


def test_a_linear_score_fitted_by_implicit_score_matching_is_the_gaussian_of_the_data(x64):
  """Closed form: with empirical mean m and covariance C, the gradient vanishes exactly at s(x) = -C^-1 (x - m)."""
  x = DATA.sample(jax.random.key(0), 500)
  mean, precision = x.mean(axis=0), jnp.linalg.inv(jnp.cov(x.T, bias=True))
  loss = jd.losses.implicit()

  def total(params):
    network = lambda x, t: x @ params[0].T + params[1][None]
    return loss(jax.random.key(0), x, network)[0].mean()

  gradient = jax.grad(total)((-precision, precision @ mean))
  for leaf in gradient:
    np.testing.assert_allclose(leaf, 0, atol=1e-9)
  np.testing.assert_allclose(total((-precision, precision @ mean)), -0.5 * jnp.trace(precision), rtol=1e-10)


@pytest.mark.parametrize("t", [0.02, 0.4])
def test_explicit_and_implicit_differ_by_half_the_square_of_the_score(t):
  """explicit - implicit = E sigma^2 |score|^2 / 2, and denoising - explicit = E (d - sigma^2 |score|^2) / 2."""
  sde, n = jd.VP(), 100_000
  score = DATA.score(sde)
  wrong = lambda x, t: 0.7 * score(x, t) + 0.3 * jnp.tanh(x)
  x0, key = DATA.sample(jax.random.key(1), n), jax.random.key(0)
  options = {"sde": sde, "time": times.fixed(t)}
  value = {
    name: jax.jit(lambda key, x, loss=loss: loss(key, x, wrong)[0])(key, x0)
    for name, loss in objectives(score, **options).items()
  }
  value["denoising"] = jd.losses.denoising(sde, jd.predictions.score(), time=times.fixed(t))(key, x0, wrong)[0]
  sigma2 = sde.marginal(jnp.float32(t))[1] ** 2
  variance = DATA.moments(sde, jnp.full(1, t))[1][0]
  square = 0.5 * sigma2 * jnp.sum(1 / variance)

  def close(difference, expected):
    assert abs(difference.mean() - expected) < 4 * difference.std() / np.sqrt(n)
    assert difference.std() / np.sqrt(n) < 0.1 * abs(expected)

  close(value["explicit"] - value["implicit"], square)
  close(value["denoising"] - value["explicit"], 0.5 * 3 - square)


@pytest.mark.parametrize("noise_dimension", [3])
def test_sliced_is_unbiased_for_implicit_and_its_reduced_form_varies_less(noise_dimension):
  """z < 3 over 200 keys, on the same data, for a network with a Jacobian that is neither diagonal nor symmetric."""
  x = jax.random.normal(jax.random.key(0), (16, noise_dimension))
  mix = jax.random.normal(jax.random.key(1), (noise_dimension, noise_dimension))
  network = lambda x, t: jnp.tanh(x @ mix) - x
  exact = jd.losses.implicit()(jax.random.key(2), x, network)[0].mean()
  keys = jax.random.split(jax.random.key(3), 200)

  def over_keys(**options):
    loss = jd.losses.sliced(**options)
    return jax.jit(jax.vmap(lambda key: loss(key, x, network)[0].mean()))(keys)

  plain, reduced, more = over_keys(), over_keys(reduced=True), over_keys(probes=8)
  for values in (plain, reduced, more):
    assert abs(values.mean() - exact) < 3 * values.std() / np.sqrt(200)
    assert values.std() > 0
  assert reduced.var() < 0.7 * plain.var()
  np.testing.assert_allclose(plain.var() / more.var(), 8, rtol=0.5)  # a ratio of variances of 200: s.e. 1.1


@pytest.mark.parametrize("sde", [jd.VP(), jd.SubVP()], ids=["vp", "subvp"])
def test_denoising_gradients_are_those_of_explicit_score_matching(sde):
  """The difference of the gradients, example by example, has mean zero within 4 standard errors, far from the score."""
  score = DATA.score(sde)
  network = lambda tilt, x, t: tilt[0] * score(x, t) + tilt[1] * jnp.tanh(x) + tilt[2]
  x0, tilt = DATA.sample(jax.random.key(1), 30_000), jnp.asarray([0.5, 1.0, -0.4])
  options = {"time": times.importance(), "t0": 0.05}
  explicit = jd.losses.explicit(score, sde, **options)
  denoising = jd.losses.denoising(sde, jd.predictions.score(), **options)
  a, b = (per_example_gradients(loss, network, tilt, x0) for loss in (explicit, denoising))
  assert np.all(np.abs(z(a)) > 10)
  assert np.all(np.abs((a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / len(a))) < 4)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_all_predictions_of_one_score_have_one_loss(sde, name, x64):
  key, x0 = jax.random.key(0), DATA.sample(jax.random.key(1), 4)
  wrong = lambda x, t: 1.3 * DATA.score(sde)(x, t)

  def value(prediction):
    loss = objectives(DATA.score(sde), sde=sde, prediction=PREDICTIONS[prediction], weight=weights.likelihood())[name]
    network = network_of(wrong, sde, PREDICTIONS[prediction])
    if prediction == "edm":
      network = undo_preconditioning(network, sde, 0.7)
    return loss(key, x0, network)[0]

  first = value("score")
  for prediction in ("noise", "data", "velocity", "edm"):
    np.testing.assert_allclose(value(prediction), first, rtol=1e-6, atol=1e-6 * np.abs(first).max())


def undo_preconditioning(network, sde, s):
  def given(x_in, c_noise):
    t = sde.time_of_log_snr(-8 * c_noise)
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return network(x_in * jnp.sqrt(sigma**2 + s**2 * alpha**2), t)

  return given


def test_denoising_at_one_noise_level_is_the_formula(x64):
  """1/2 |sigma s(x + sigma eps) + eps|^2 at the level sigma of EDM, whose time is the level."""
  x0, key, sigma = DATA.sample(jax.random.key(0), 5), jax.random.key(1), 0.3
  loss = jd.losses.denoising(jd.EDM(), jd.predictions.score(), time=times.fixed(sigma))
  network = lambda x, t: jnp.tanh(x) * t[:, None]
  value, aux = loss(key, x0, network)
  np.testing.assert_array_equal(aux["t"], 0.3)
  noise_key = jnp.stack([jax.random.split(k)[0] for k in jd.example_keys(key, 0, 5)])
  eps = jnp.stack([jax.random.normal(k, (3,), jnp.float64) for k in noise_key])
  expected = 0.5 * jnp.sum((sigma * sigma * jnp.tanh(x0 + sigma * eps) + eps) ** 2, axis=1)
  np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_energies_are_trained_through_their_gradient(x64):
  """log p~ = -a |x|^2 / 2 - b sum x^4 / 4: s = -a x - b x^3, tr = -a d - 3 b |x|^2, and the gradient in (a, b)."""
  x = DATA.sample(jax.random.key(0), 6)

  def loss_of(params, loss):
    a, b = params
    network = jd.score_of(lambda x, t: -jnp.sum(a * x**2 / 2 + b * x**4 / 4, axis=1))
    return loss(jax.random.key(1), x, network)[0].sum()

  def expected(params):
    a, b = params
    return jnp.sum(0.5 * (a * x + b * x**3) ** 2 - a - 3 * b * x**2)

  params = (jnp.asarray(0.7), jnp.asarray(0.2))
  for loss in (jd.losses.implicit(), jd.losses.sliced(reduced=True)):  # a diagonal Hessian: Rademacher is exact
    value, gradient = jax.jit(jax.value_and_grad(lambda params, loss=loss: loss_of(params, loss)))(params)
    np.testing.assert_allclose(value, expected(params), rtol=1e-10)
    np.testing.assert_allclose(gradient, jax.grad(expected)(params), rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_conditions_go_with_their_examples(name):
  """A network that reads its condition: each example's loss is that of the example alone."""
  x0, cond = DATA.sample(jax.random.key(0), 4), {"shift": jnp.arange(4.0)}
  network = lambda x, t, shift: jnp.tanh(x) - shift[:, None] * x
  target = lambda x, t, shift: -x * (1 + shift[:, None])
  for options in ({}, {"sde": jd.VP(), "time": times.uniform(stratified=False)}):
    loss = objectives(target, **options)[name]
    whole, aux = loss(jax.random.key(1), x0, network, cond)
    alone, _ = loss(jd.example_keys(jax.random.key(1), 2, 1), x0[2:3], network, {"shift": cond["shift"][2:3]})
    np.testing.assert_allclose(whole[2:3], alone, rtol=1e-5)
    assert aux["t"].shape == (4,)


def test_the_network_is_called_with_the_time_given():
  seen = []
  network = lambda x, t: seen.append(np.asarray(t)) or x
  jd.losses.explicit(lambda x, t: x, t=0.25)(jax.random.key(0), jnp.ones((2, 3)), network)
  np.testing.assert_array_equal(seen[0], [0.25, 0.25])


def test_half_precision_networks_leave_the_loss_in_float32():
  x0, network = DATA.sample(jax.random.key(0), 4), lambda x, t: jnp.tanh(x.astype(jnp.bfloat16))
  for options in ({}, {"sde": jd.VP()}):
    for loss in objectives(TRUE_SCORE, **options).values():
      value, _ = loss(jax.random.key(1), x0, network)
      assert value.dtype == jnp.float32
      assert jnp.all(jnp.isfinite(value))


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_another_shape_or_type_are_refused_when_traced(name, untyped):
  x = jnp.ones((4, 3))
  for options in ({}, {"sde": jd.VP()}):
    run = lambda network, options=options: jax.eval_shape(
      lambda x: objectives(TRUE_SCORE, **options)[name](jax.random.key(0), x, network), x
    )
    with pytest.raises(ValueError, match="network must return an array of the shape of x"):
      run(lambda x, t: x[:, :2])
    with pytest.raises(TypeError, match="network must return a floating point array, got int32"):
      run(lambda x, t: jnp.ones(x.shape, jnp.int32))


def test_bad_input_is_named(untyped):
  with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
    jd.losses.sliced(probes=0)
  with pytest.raises(ValueError, match=r"prediction must be predictions.score\(\) without an sde"):
    jd.losses.implicit(prediction=jd.predictions.noise())
  wide = jnp.ones((1, 5000))
  with pytest.raises(ValueError, match="x0 has 5000 dimensions.*losses.sliced, or force=True"):
    jd.losses.implicit()(jax.random.key(0), wide, lambda x, t: -x)
  value = jax.eval_shape(lambda x: jd.losses.implicit(force=True)(jax.random.key(0), x, lambda x, t: -x)[0], wide)
  assert value.shape == (1,)
  with pytest.raises(ValueError, match=r"log_density must return one number per example, \(2,\); got shape \(2, 3\)"):
    jd.score_of(lambda x, t: x)(jnp.ones((2, 3)), jnp.zeros(2))
