"""The variational bound: tight for the exact score, term by term against closed forms, for processes of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Gaussian, compiled

import jaxdiff as jd
from jaxdiff.losses import bounds, times

DATA = Gaussian(np.array([0.5, -0.4]), np.array([0.4, 0.9]))
PROBABILITIES = np.array([0.6, 0.3, 0.1])
KEY = jax.random.key(0)
INTERIOR = jax.tree_util.Partial(lambda t: 0.3 * t + 0.7 * t**2)


@functools.cache
def process(name):
  made = {
    "learned": lambda: jd.VariancePreserving(jd.schedules.Gamma(-9.0, 6.0, INTERIOR)),
    "ddpm": lambda: jd.ddpm.Chain(jd.ddpm.cosine_betas(12)).sde(),
    "ncsn": lambda: jd.ncsn.Chain(jd.ncsn.geometric_sigmas(5, 0.01, 20.0)).sde(),
  }
  return SDES[name] if name in SDES else made[name]()


def draws(count, seed=0, data=DATA):
  return data.mean + data.std * np.random.default_rng(seed).normal(size=(count, 2))


def exact_decoder(data, sde, t0):
  """log p(x_0 | x_t0) of Gaussian data, by Bayes' rule."""

  def decoder(x, z):
    alpha, sigma = (v[:, None] for v in sde.marginal(jnp.broadcast_to(t0, x.shape[:1])))
    mean, variance = (jnp.asarray(v, x.dtype)[None] for v in (data.mean, data.std**2))
    posterior = 1 / (1 / variance + alpha**2 / sigma**2)
    center = posterior * (mean / variance + alpha * z / sigma**2)
    return -0.5 * jnp.sum((x - center) ** 2 / posterior + jnp.log(2 * jnp.pi * posterior), axis=1)

  return decoder


def log_prob(data, x):
  return -0.5 * np.sum(((x - data.mean) / data.std) ** 2 + np.log(2 * np.pi * data.std**2), axis=1)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "learned", "ddpm"])
def test_the_bound_of_the_exact_score_is_the_exact_log_density(name, x64):
  """With the exact decoder and p_T: on the mean over data and at one point, within 4 standard errors; above it for a
  wrong score."""
  sde, n = process(name), 100_000
  t0 = 0.02 * sde.t1
  loss = jd.losses.bound(
    sde,
    jd.predictions.score(),
    time=times.importance(stratified=False),
    t0=t0,
    decoder=exact_decoder(DATA, sde, t0),
    prior_log_prob=lambda z: DATA.log_prob(z, sde, sde.t1),
  )
  run = jax.jit(lambda key, x, factor: loss(key, x, lambda x, t: factor * DATA.score(sde)(x, t))[0])
  for x in (draws(n), np.broadcast_to([0.9, 0.7], (n, 2)))[: 2 if name in ("vp", "ve") else 1]:
    gap, worse = (np.asarray(run(jax.random.key(1), x, factor)) + log_prob(DATA, x) for factor in (1.0, 1.3))
    error = gap.std() / np.sqrt(n)
    assert error < 0.06
    assert abs(gap.mean()) < 4 * error
    assert worse.mean() > 4 * worse.std() / np.sqrt(n)


@pytest.mark.parametrize("name", ["cosine", "edm", "ncsn"])
def test_the_bound_of_integers_is_their_log_probability(name):
  """Three levels of unequal probability with the exact score of their mixture: -log p of each, within 4 s.e."""
  sde, n = process(name), 20_000
  centers, p = np.array([[[-2 / 3, 0.0, 2 / 3]]], np.float32), np.log(PROBABILITIES).astype(np.float32)

  def score(x, t):
    alpha, sigma = (v[:, None, None] for v in sde.marginal(t))
    logits = p[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (alpha[..., 0] * denoised - x) / sigma[..., 0] ** 2

  run = jax.jit(lambda key, x: jd.losses.bound(sde, jd.predictions.score(), levels=3)(key, x, score))
  for k in range(3):
    value, aux = jax.device_get(run(jax.random.key(k), np.full((n, 1), k, np.uint8)))
    expected = -np.log(PROBABILITIES[k])
    assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(n) + 1e-3
    np.testing.assert_allclose(aux["bits_per_dim"].mean(), value.mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(
      aux["diffusion"] + aux["prior"] + aux["reconstruction"], aux["bits_per_dim"], rtol=1e-4, atol=1e-4
    )
    assert aux["reconstruction"].mean() < 1e-3


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_what_the_noise_decodes_is_enough_for_smooth_data(name):
  """The default decoder costs under 0.02 nats a dimension at the default t0 (VE: at its floor)."""
  sde, n = process(name), 100_000
  loss = jd.losses.bound(sde, jd.predictions.score(), prior_log_prob=lambda z: DATA.log_prob(z, sde, sde.t1))
  x = draws(n).astype(np.float32)
  gap = compiled(lambda key, x: loss(key, x, DATA.score(sde))[0], jax.random.key(1), x) + log_prob(DATA, x)
  assert -4 * gap.std() / np.sqrt(n) < gap.mean() < 2 * 0.02 + 4 * gap.std() / np.sqrt(n)


def test_the_prior_cost_is_the_closed_form_without_variance(x64):
  """KL(N(alpha x, sigma^2) || N(m, diag(s^2))), the same for every key."""
  x0 = np.random.default_rng(0).normal(size=(3, 4))

  @jax.jit
  def cost(key, sigma, m, s):
    prior = lambda z: jnp.sum(jax.scipy.stats.norm.logpdf(z, m[None], s[None]), axis=1)
    return bounds.prior_cost(jd.example_keys(key, 0, 3), x0, jnp.asarray(0.3), sigma, prior)

  for scale in (1.0, 50.0):
    m, s, sigma = np.array([0.1, -0.2, 0.0, 0.4]), scale * np.array([1.0, 0.7, 1.3, 2.0]), 0.8 * scale
    expected = 0.5 * np.sum((sigma**2 + (0.3 * x0 - m) ** 2) / s**2 - 1 + np.log(s**2 / sigma**2), axis=1)
    for seed in range(3):
      np.testing.assert_allclose(cost(jax.random.key(seed), sigma, m, s), expected, rtol=1e-10)


def test_the_prior_of_half_precision_data_is_computed_in_full():
  """3072 dimensions: against the same data in float32, to 1e-6 bits a dimension."""
  loss = jd.losses.bound(jd.VP(), time=times.uniform(False))
  cost = jax.jit(lambda key, x: loss(key, x, lambda x, t: x)[1]["prior"])
  for dtype in (jnp.float16, jnp.bfloat16):
    x = np.linspace(-1, 1, 3072)[None].astype(dtype)
    np.testing.assert_allclose(cost(KEY, x), cost(KEY, x.astype(np.float32)), atol=1e-6)


def test_a_plateau_of_the_schedule_is_no_nan():
  """gamma' underflows near t = 0: no time is drawn there, or one of no weight."""
  sde = jd.VariancePreserving(jd.schedules.Gamma(-6.0, 5.0, jax.tree_util.Partial(lambda t: t**8)))
  x, u = np.zeros((4, 2), np.float32), np.array([0.0, 1e-9, 1e-8, 1e-3], np.float32)
  assert np.isfinite(compiled(lambda u: jd.losses.bound(sde)(KEY, x, lambda x, t: x, u=u)[0], u)).all()


def test_averaging_keeps_the_mean_and_lowers_the_spread():
  sde, x = jd.VP(), draws(200).astype(np.float32)
  loss = jd.losses.bound(sde, jd.predictions.score())
  run = functools.partial(jax.jit, static_argnums=0)(
    lambda count, key: jd.losses.averaged(loss, count)(key, x, lambda x, t: 0.8 * DATA.score(sde)(x, t))
  )
  (one, alone), (many, aux) = (jax.device_get(run(count, jax.random.key(1))) for count in (1, 64))
  assert np.all(np.isnan(alone["standard_error"]))
  difference = one - many
  assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(200)
  spread = (many - np.asarray(run(64, jax.random.key(2))[0])).std() / np.sqrt(2)
  assert spread < 1.2 * aux["standard_error"].mean()
  assert aux["standard_error"].mean() < 0.3 * one.std()
  np.testing.assert_allclose(aux["bits_per_dim"], many / (2 * np.log(2)), rtol=1e-4)


def test_examples_keep_their_bound_in_any_batch():
  loss = jd.losses.averaged(jd.losses.bound(jd.VP(), jd.predictions.score()), 3)
  x, c = draws(5).astype(np.float32), np.linspace(0.5, 1.0, 5, dtype=np.float32)
  value = lambda key, x, c: loss(key, x, lambda x, t, c: -x * c[:, None], {"c": c})[0]
  run = lambda key, x, c: (value(key, x, c), value(jd.example_keys(key, 3, 2), x[3:], c[3:]))
  whole, alone = compiled(run, jax.random.key(1), x, c)
  np.testing.assert_allclose(whole[3:], alone, rtol=1e-5)


def test_the_conditional_bound_classifies_as_bayes_rule_does():
  """Two Gaussians, the exact conditional score: the smaller bound, on common noise, is the likelier class."""
  sde, classes = jd.VP(), [Gaussian(np.array(mean), np.array([0.7, 0.7])) for mean in ([0.8, 0.0], [-0.8, 0.4])]
  x = np.concatenate([draws(200, k, data) for k, data in enumerate(classes)]).astype(np.float32)

  def network(x, t, label):
    each = jnp.stack([c.score(sde)(x, t) for c in classes])
    return jnp.take_along_axis(each, label[None, :, None], axis=0)[0]

  loss = jd.losses.averaged(jd.losses.bound(sde, jd.predictions.score()), 64)
  run = jax.jit(lambda label: loss(KEY, x, network, {"label": jnp.full(len(x), label)})[0])
  estimated = np.argmin([run(k) for k in range(2)], axis=0)
  log_odds = log_prob(classes[0], x) - log_prob(classes[1], x)
  sure = np.abs(log_odds) > 1
  assert sure.sum() > 200
  assert np.mean((estimated == np.where(log_odds < 0, 1, 0))[sure]) > 0.97


def test_bad_input_is_named():
  loss = jd.losses.bound(jd.VP())
  refused = lambda loss, x: jax.eval_shape(lambda x: loss(KEY, x, lambda x, t: x), x)
  with pytest.raises(ValueError, match="levels must be at least 2.*got 1"):
    jd.losses.bound(jd.VP(), levels=1)
  with pytest.raises(TypeError, match="x must be floating point without levels, got uint8.*give levels=n"):
    refused(loss, np.zeros((2, 3), np.uint8))
  with pytest.raises(TypeError, match="x must be integers"):
    refused(jd.losses.bound(jd.VP(), levels=4), np.zeros((2, 3), np.float32))
  with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
    jd.losses.averaged(loss, 0)
  with pytest.raises(ValueError, match="stratified times need a batch of at least 2"):
    refused(loss, np.zeros((1, 3), np.float32))
  for time in (times.log_normal(), times.fixed(0.5)):
    with pytest.raises(ValueError, match=r"time must be times.importance\(\) or uniform\(\).* no bound"):
      jd.losses.bound(jd.VP(), time=time)
  with pytest.raises(TypeError, match="levels must be an integer.*got 256.0"):
    jd.losses.bound(jd.VP(), levels=256.0)
  with pytest.raises(TypeError, match="draws must be an integer, got 2.5"):
    jd.losses.averaged(loss, 2.5)
  with pytest.raises(TypeError, match=r"loss is a factory: did you forget to call it: losses.bound\(\)"):
    jd.losses.averaged(jd.losses.bound, 4)
  with pytest.raises(TypeError, match=r"sde is a class: did you forget to call it: VP\(\)"):
    jd.losses.bound(jd.VP)
  summed = jd.losses.bound(jd.VP(), prior_log_prob=lambda z: jnp.sum(z))
  with pytest.raises(
    ValueError, match=r"what prior_log_prob returns must be one number per example, \[2\]; got shape \(\)"
  ):
    jax.eval_shape(lambda x: summed(KEY, x, lambda x, t: x), np.zeros((2, 3), np.float32))
  late = jd.losses.denoising(jd.VP(), jd.predictions.noise(), time=times.fixed(2.0))
  with pytest.raises(ValueError, match=r"the fixed time must lie in \(0, t1\] = \(0, 1.0\], got 2.0"):
    jax.eval_shape(lambda x: late(KEY, x, lambda x, t: x), np.zeros((2, 3), np.float32))
  with pytest.raises(TypeError, match="chain must be a Chain, got VP, which lacks"):
    jd.losses.ddpm_simple(jd.VP())
  with pytest.raises(TypeError, match="x0 must be floating point, got uint8"):
    refused(jd.losses.implicit(), np.zeros((2, 3), np.uint8))
