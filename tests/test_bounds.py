"""The variational bound: tight for the exact score, term by term against closed forms, for every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Gaussian

import jaxdiff as jd
from jaxdiff.losses import bounds, times

ALL = SDES | {
  "learned": jd.VariancePreserving(jd.schedules.Gamma(-9.0, 6.0, jd.schedules.monotone_network(4))),
  "linear": jd.LinearSDE(lambda t: -5 * t, lambda t: jnp.sqrt(10 * t + 0.5)),
  "ddpm": jd.ddpm.Chain(jd.ddpm.cosine_betas(12)).sde(),
  "ncsn": jd.ncsn.Chain(jd.ncsn.geometric_sigmas(5, 0.01, 20.0)).sde(),
}
EACH_SDE = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
DATA = Gaussian(np.array([0.5, -0.4]), np.array([0.4, 0.9]))
PROBABILITIES = np.array([0.6, 0.3, 0.1])


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
  return -0.5 * jnp.sum(((x - data.mean[None]) / data.std[None]) ** 2 + np.log(2 * np.pi * data.std[None] ** 2), axis=1)


@pytest.mark.parametrize(
  ("sde", "where"), [(sde, "data") for sde in ALL.values()] + [(jd.VP(), "one point"), (jd.VE(), "one point")]
)
def test_the_bound_of_the_exact_score_is_the_exact_log_density(sde, where, x64):
  """With the exact decoder and p_T: on the mean over data and at one point, within 4 standard errors; above it for a
  wrong score."""
  n, t0 = 100_000, 0.02 * sde.t1
  x = DATA.sample(jax.random.key(0), n) if where == "data" else jnp.broadcast_to(jnp.asarray([0.9, 0.7]), (n, 2))
  prior = lambda z: DATA.log_prob(z, sde, sde.t1)
  loss = jd.losses.bound(
    sde,
    jd.predictions.score(),
    time=times.importance(stratified=False),
    t0=t0,
    decoder=exact_decoder(DATA, sde, t0),
    prior_log_prob=prior,
  )
  run = jax.jit(lambda key, x, factor: loss(key, x, lambda x, t: factor * DATA.score(sde)(x, t))[0])
  gap = run(jax.random.key(1), x, 1.0) + log_prob(DATA, x)
  error = gap.std() / np.sqrt(n)
  assert error < 0.06
  assert abs(gap.mean()) < 4 * error
  worse = run(jax.random.key(1), x, 1.3) + log_prob(DATA, x)
  assert worse.mean() > 4 * worse.std() / np.sqrt(n)


@EACH_SDE
def test_the_bound_of_integers_is_their_log_probability(sde):
  """Three levels of unequal probability with the exact score of their mixture: -log p of each, within 4 s.e."""
  centers, p, n = jnp.asarray([[[-2 / 3, 0.0, 2 / 3]]]), jnp.asarray(PROBABILITIES, jnp.float32), 20_000

  def score(x, t):
    alpha, sigma = (v[:, None, None] for v in sde.marginal(t))
    logits = jnp.log(p)[None, None] - 0.5 * ((x[..., None] - alpha * centers) / sigma) ** 2
    denoised = jnp.sum(jax.nn.softmax(logits, axis=-1) * centers, axis=-1)
    return (alpha[..., 0] * denoised - x) / sigma[..., 0] ** 2

  loss = jd.losses.bound(sde, jd.predictions.score(), levels=3)
  run = jax.jit(lambda key, x: loss(key, x, score))
  for k in range(3):
    value, aux = run(jax.random.key(k), jnp.full((n, 1), k, jnp.uint8))
    expected = -np.log(PROBABILITIES[k])
    assert abs(value.mean() - expected) < 4 * value.std() / np.sqrt(n) + 1e-3
    np.testing.assert_allclose(aux["bits_per_dim"].mean(), value.mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(
      aux["diffusion"] + aux["prior"] + aux["reconstruction"], aux["bits_per_dim"], rtol=1e-4, atol=1e-4
    )
    assert aux["reconstruction"].mean() < 1e-3


@EACH_SDE
def test_what_the_noise_decodes_is_enough_for_smooth_data(sde):
  """The default decoder costs under 0.02 nats a dimension at the default t0 (VE: at its floor)."""
  n = 100_000
  loss = jd.losses.bound(sde, jd.predictions.score(), prior_log_prob=lambda z: DATA.log_prob(z, sde, sde.t1))
  x = DATA.sample(jax.random.key(0), n)
  value = jax.jit(lambda key, x: loss(key, x, DATA.score(sde))[0])(jax.random.key(1), x)
  gap = value + log_prob(DATA, x)
  assert -4 * gap.std() / np.sqrt(n) < gap.mean() < 2 * 0.02 + 4 * gap.std() / np.sqrt(n)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_prior_cost_is_the_closed_form_without_variance(scale, x64):
  """KL(N(alpha x, sigma^2) || N(m, diag(s^2))), the same for every key."""
  x0 = jax.random.normal(jax.random.key(0), (3, 4))
  alpha, sigma = jnp.asarray(0.3), jnp.asarray(0.8) * scale
  m, s = jnp.asarray([0.1, -0.2, 0.0, 0.4]), scale * jnp.asarray([1.0, 0.7, 1.3, 2.0])
  prior = lambda z: jnp.sum(jax.scipy.stats.norm.logpdf(z, m[None], s[None]), axis=1)
  expected = 0.5 * jnp.sum(
    (sigma**2 + (alpha * x0 - m[None]) ** 2) / s[None] ** 2 - 1 + jnp.log(s[None] ** 2 / sigma**2), axis=1
  )
  for seed in range(3):
    keys = jd.example_keys(jax.random.key(seed), 0, 3)
    np.testing.assert_allclose(bounds.prior_cost(keys, x0, alpha, sigma, prior), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_prior_of_half_precision_data_is_computed_in_full(dtype):
  """3072 dimensions: against the same data in float32, to 1e-6 bits a dimension."""
  x = jnp.linspace(-1, 1, 3072)[None].astype(dtype)
  costs = lambda x: jd.losses.bound(jd.VP(), time=times.uniform(False))(jax.random.key(0), x, lambda x, t: x)[1]
  np.testing.assert_allclose(costs(x)["prior"], costs(x.astype(jnp.float32))["prior"], atol=1e-6)


def test_a_plateau_of_the_schedule_is_no_nan():
  """gamma' underflows near t = 0: no time is drawn there, or one of no weight."""
  sde = jd.VariancePreserving(jd.schedules.Gamma(-6.0, 5.0, jax.tree_util.Partial(lambda t: t**8)))
  x, u = jnp.zeros((4, 2)), jnp.asarray([0.0, 1e-9, 1e-8, 1e-3])
  assert jnp.all(jnp.isfinite(jd.losses.bound(sde)(jax.random.key(0), x, lambda x, t: x, u=u)[0]))


def test_averaging_keeps_the_mean_and_lowers_the_spread():
  sde, x = jd.VP(), DATA.sample(jax.random.key(0), 200)
  loss = jd.losses.bound(sde, jd.predictions.score())
  network = lambda x, t: 0.8 * DATA.score(sde)(x, t)
  run = lambda draws: jax.jit(lambda key: jd.losses.averaged(loss, draws)(key, x, network))(jax.random.key(1))
  (one, alone), (many, aux) = run(1), run(64)
  assert jnp.all(jnp.isnan(alone["standard_error"]))
  difference = one - many
  assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(200)
  again, _ = jax.jit(lambda key: jd.losses.averaged(loss, 64)(key, x, network))(jax.random.key(2))
  spread = (many - again).std() / np.sqrt(2)
  assert spread < 1.2 * aux["standard_error"].mean()
  assert aux["standard_error"].mean() < 0.3 * one.std()
  np.testing.assert_allclose(aux["bits_per_dim"], many / (2 * np.log(2)), rtol=1e-4)


def test_examples_keep_their_bound_in_any_batch():
  loss = jd.losses.averaged(jd.losses.bound(jd.VP(), jd.predictions.score()), 3)
  x, network = DATA.sample(jax.random.key(0), 5), lambda x, t, c: -x * c[:, None]
  cond = {"c": jnp.linspace(0.5, 1.0, 5)}
  whole, _ = loss(jax.random.key(1), x, network, cond)
  alone, _ = loss(jd.example_keys(jax.random.key(1), 3, 2), x[3:], network, {"c": cond["c"][3:]})
  np.testing.assert_allclose(whole[3:], alone, rtol=1e-5)


def test_the_conditional_bound_classifies_as_bayes_rule_does():
  """Two Gaussians, the exact conditional score: the smaller bound, on common noise, is the likelier class."""
  sde = jd.VP()
  means = jnp.asarray([[0.8, 0.0], [-0.8, 0.4]])
  classes = [Gaussian(np.asarray(m), np.array([0.7, 0.7])) for m in means]

  def network(x, t, label):
    each = jnp.stack([c.score(sde)(x, t) for c in classes])
    return jnp.take_along_axis(each, label[None, :, None], axis=0)[0]

  x = jnp.concatenate([c.sample(jax.random.key(k), 200) for k, c in enumerate(classes)])
  loss = jd.losses.averaged(jd.losses.bound(sde, jd.predictions.score()), 32)

  @jax.jit
  def bound_of(label):
    return loss(jax.random.key(0), x, network, {"label": jnp.full(len(x), label)})[0]

  estimated = jnp.argmin(jax.lax.map(bound_of, jnp.arange(2)), axis=0)
  log_odds = log_prob(classes[0], x) - log_prob(classes[1], x)
  sure = jnp.abs(log_odds) > 1
  assert sure.sum() > 200
  assert jnp.mean((estimated == jnp.where(log_odds < 0, 1, 0))[sure]) > 0.97


def test_bad_input_is_named(untyped):
  loss = jd.losses.bound(jd.VP())
  with pytest.raises(ValueError, match="levels must be at least 2.*got 1"):
    jd.losses.bound(jd.VP(), levels=1)
  with pytest.raises(TypeError, match="x must be floating point without levels, got uint8.*give levels=n"):
    loss(jax.random.key(0), jnp.zeros((2, 3), jnp.uint8), lambda x, t: x)
  with pytest.raises(TypeError, match="x must be integers"):
    jd.losses.bound(jd.VP(), levels=4)(jax.random.key(0), jnp.zeros((2, 3)), lambda x, t: x)
  with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
    jd.losses.averaged(loss, 0)
  with pytest.raises(ValueError, match="stratified times need a batch of at least 2"):
    loss(jax.random.key(0), jnp.zeros((1, 3)), lambda x, t: x)
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
    summed(jax.random.key(0), jnp.zeros((2, 3)), lambda x, t: x)
  with pytest.raises(ValueError, match=r"the fixed time must lie in \(0, t1\] = \(0, 1.0\], got 2.0"):
    jd.losses.denoising(jd.VP(), jd.predictions.noise(), time=times.fixed(2.0))(
      jax.random.key(0), jnp.zeros((2, 3)), lambda x, t: x
    )
  with pytest.raises(TypeError, match="chain must be a Chain, got VP, which lacks"):
    jd.losses.ddpm_simple(jd.VP())
  with pytest.raises(TypeError, match="x0 must be floating point, got uint8"):
    jd.losses.implicit()(jax.random.key(0), jnp.zeros((2, 3), jnp.uint8), lambda x, t: x)
