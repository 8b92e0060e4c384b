import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import PREDICTIONS, SDES, compiled, gaussian

import jaxdiff as jd
from jaxdiff.losses import times, weights
from jaxdiff.schedules import start_time

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
DATA = gaussian()
WEIGHTS = {
  "noise": weights.noise(),
  "likelihood": weights.likelihood(),
  "edm": weights.edm(0.5),
  "min_snr": weights.min_snr(5.0),
}
TIMES = {"uniform": times.uniform(), "importance": times.importance(), "log_normal": times.log_normal()}


def network_of(score, sde, prediction):
  """A network whose output, read by `prediction`, is this score of (x, t)."""

  def network(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    zero = prediction.to_score(x, jnp.zeros_like(x), alpha, sigma)
    return (score(x, t) - zero) / (prediction.to_score(x, jnp.ones_like(x), alpha, sigma) - zero)

  return network


def undo_preconditioning(network, sde, s):
  """What EDM's preconditioning does is one to one: t from log(sigma / alpha) / 4, x from x / sqrt V."""

  def given(x_in, c_noise):
    t = sde.time_of_log_snr(-8 * c_noise)
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return network(x_in * jnp.sqrt(sigma**2 + s**2 * alpha**2), t)

  return given


def examples(count, seed=0):
  return DATA.mean + DATA.std * np.random.default_rng(seed).normal(size=(count, 3))


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_all_predictions_of_one_score_have_one_loss(name, x64):
  sde, weight = SDES[name], weights.likelihood()
  wrong = lambda x, t: 1.3 * DATA.score(sde)(x, t)

  def value(prediction, key, x0):
    network = network_of(wrong, sde, PREDICTIONS[prediction])
    network = undo_preconditioning(network, sde, 0.7) if prediction == "edm" else network
    return jd.losses.denoising(sde, PREDICTIONS[prediction], weight)(key, x0, network)[0]

  losses = compiled(lambda *given: [value(name, *given) for name in PREDICTIONS], jax.random.key(0), examples(16))
  for other in losses[1:]:
    np.testing.assert_allclose(other, losses[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["vp", "ve", "edm"])
def test_value_with_the_exact_score_is_the_closed_form(name, x64):
  """1/2 E_t g^2 sum_j (1 / sigma^2 - 1 / v_j), v_j the variance of x_t: factors, weight and correction all enter.

  By importance sampling; uniform times have the same mean within 4 standard errors, from a larger or equal variance.
  """
  sde, n = SDES[name], 20_000
  t0 = 0.02 * sde.t1

  def run(key, x):
    grid = jnp.flip(jd.time_grid(sde, 20_000, t0=t0))
    values = [
      jd.losses.denoising(sde, PREDICTIONS["score"], weights.likelihood(), time(stratified=False), t0=t0)(
        key, x, DATA.score(sde)
      )[0]
      for time in (times.importance, times.uniform)
    ]
    return values, grid, sde.diffusion(grid), sde.marginal(grid)[1], DATA.moments(sde, grid)[1]

  (values, uniform), grid, g, sigma, variance = compiled(run, jax.random.key(0), examples(n))
  integrand = g**2 * np.sum(1 / sigma[:, None] ** 2 - 1 / variance, axis=1)
  expected = 0.5 * np.trapezoid(integrand, grid) / (sde.t1 - t0)
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)
  assert values.std() / np.sqrt(n) < 0.03 * expected
  assert abs(values.mean() - uniform.mean()) < 4 * np.sqrt((values.var() + uniform.var()) / n)
  assert values.var() < 1.05 * uniform.var()


@EACH_SDE
def test_times_stay_inside_and_likelihood_weight_times_importance_correction_is_constant(sde):
  """Finite at the ends, too."""
  u, ends = np.linspace(0.0, 0.999, 50, dtype=np.float32), np.array([0.0, 1e-7, 0.5, 1 - 6e-8], np.float32)

  def run(u, ends):
    t0 = start_time(sde, None, 1e-3)
    t, correction = times.importance().place(sde, t0, u)
    span = (jd.log_snr(sde, t0) - jd.log_snr(sde, jnp.float32(sde.t1))) / (sde.t1 - t0)
    return weights.likelihood()(sde, t) * correction, span, t0, [time.place(sde, t0, ends) for time in TIMES.values()]

  product, span, t0, each = compiled(run, u, ends)
  np.testing.assert_allclose(product, span, rtol=1e-5)
  for t, correction in each:
    assert np.all((t >= t0) & (t <= np.float32(sde.t1)) & np.isfinite(correction))


@pytest.mark.parametrize(
  ("weight", "time"), [("likelihood", "importance"), ("edm", "log_normal"), ("min_snr", "uniform")]
)
def test_the_minimizer_is_the_score_whatever_the_weight(weight, time):
  """Per-example gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  sde, n = jd.VP(), 20_000
  loss = jd.losses.denoising(sde, PREDICTIONS["noise"], WEIGHTS[weight], TIMES[time])

  @jax.grad
  def gradient(tilt, x0, key, u):
    def network(x, t):
      sigma = sde.marginal(t)[1][:, None]
      return -sigma * DATA.score(sde)(x, t) * (1 + tilt[0]) + tilt[1] * sigma

    return jnp.sum(loss(key[None], x0[None], network, u=u[None])[0])

  x0, u = examples(n).astype(np.float32), np.linspace(0.0, 1.0, n, endpoint=False, dtype=np.float32)
  each = jax.vmap(gradient, in_axes=(None, 0, 0, 0))
  run = jax.jit(lambda tilt, key: each(tilt, x0, jd.example_keys(key, 0, n), u))
  z = lambda g: g.mean(axis=0) / (g.std(axis=0) / np.sqrt(n))
  at, away = (np.asarray(run(np.full(2, tilt, np.float32), jax.random.key(0)), np.float64) for tilt in (0.0, 0.1))
  assert np.all(np.abs(z(at)) < 4)
  assert np.all(np.abs(z(away)) > 4)


def test_weights_are_the_documented_ones(x64):
  """Of the squared error of the noise, as numbers of VP at three times: sigma^2 = 1 - alpha^2, g^2 = beta."""
  t = np.array([0.01, 0.3, 0.9])
  alpha2 = np.exp(-(0.1 * t + 0.5 * 19.9 * t**2))
  ratio2, beta = (1 - alpha2) / alpha2, 0.1 + 19.9 * t
  expected = {
    "noise": np.ones(3),
    "likelihood": beta / (1 - alpha2),
    "edm": (ratio2 + 0.25) / 0.25,
    "min_snr": ratio2 * np.minimum(1 / ratio2, 5.0),
  }
  found = compiled(lambda t: {name: weight(jd.VP(), t) for name, weight in WEIGHTS.items()}, t)
  for name, value in found.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-10)


def test_importance_times_have_density_proportional_to_the_weight(x64):
  """The distribution function at t is the integral of g^2 / sigma^2 up to t over the whole."""
  sde, u, grid = jd.SubVP(), np.linspace(0.05, 0.95, 10), np.geomspace(0.01, 1.0, 100_000)
  run = lambda u, grid: (
    times.importance().place(sde, jnp.asarray(0.01), u)[0],
    sde.diffusion(grid),
    sde.marginal(grid),
  )
  t, g, (_, sigma) = compiled(run, u, grid)
  rate = (g / sigma) ** 2
  cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (rate[1:] + rate[:-1]) * np.diff(grid))])
  np.testing.assert_allclose(np.interp(t, grid, cumulative / cumulative[-1]), 1 - u if t[0] > t[-1] else u, atol=1e-5)


def test_log_normal_times_have_the_published_moments_and_are_cut_off_at_the_ends(x64):
  """At sigma <= 0.3 the upper half of the published distribution is gone: quantiles of the truncated normal."""
  u, few = np.linspace(0.00005, 0.99995, 10_000), np.linspace(0.05, 0.95, 10)
  place = lambda sde, t0, u: times.log_normal(-1.2, 1.2).place(sde, jnp.asarray(t0), u)
  run = lambda u, few: (
    place(jd.EDM(), 1e-9, u),
    place(jd.EDM(), 0.2, u)[0],
    place(jd.EDM(sigma_max=0.3), 1e-9, few)[0],
  )
  (t, correction), late, early = compiled(run, u, few)
  np.testing.assert_allclose([np.log(t).mean(), np.log(t).std()], [-1.2, 1.2], atol=2e-3)
  assert np.all(correction == 1)
  assert late.min() >= 0.2
  assert len(np.unique(late)) == len(late)
  cdf = scipy.stats.norm.cdf
  np.testing.assert_allclose(cdf((np.log(early) + 1.2) / 1.2) / cdf((np.log(0.3) + 1.2) / 1.2), few, rtol=1e-6)


def test_log_normal_times_are_finite_for_the_largest_u():
  """The distribution function rounds to 1 in float32: infinite noise, if it were not cut off."""
  cases = [(-1.2, 0.5, 0.05), (-1.2, 1.0, 0.3), (-9.0, 0.5, 1e-5)]
  u = np.float32(1) - np.float32(2) ** -np.arange(20, 25, dtype=np.float32)
  run = lambda u: [times.log_normal(m, s).place(jd.VP(), jnp.float32(t0), u)[0] for m, s, t0 in cases]
  for t, (_, _, t0) in zip(compiled(run, u), cases, strict=True):
    assert np.all(np.isfinite(t) & (t >= np.float32(t0)) & (t <= 1))


def test_noise_error_is_the_mean_square_of_the_noise():
  """Of a network that outputs 0: the mean of eps^2 over the dimensions, and the loss half its sum."""
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"])
  value, aux = compiled(lambda key: loss(key, jnp.ones((2000, 5)), lambda x, t: jnp.zeros_like(x)), jax.random.key(0))
  assert abs(aux["noise_error"].mean() - 1) < 4 * np.sqrt(2 / 10_000)
  np.testing.assert_allclose(value, 2.5 * aux["noise_error"], rtol=1e-5)


def test_half_precision_data_do_not_overflow_the_sum():
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["score"])
  run = lambda key, x0: loss(key, x0, lambda x, t: jnp.zeros_like(x))[0]
  value = compiled(run, jax.random.key(0), np.ones((4, 3072), np.float16))
  assert value.dtype == np.float32
  np.testing.assert_allclose(value, 3072 / 2, rtol=0.1)


def test_stratified_times_put_one_in_each_cell():
  run = jax.jit(lambda offset: times.stratified(offset, jnp.arange(16), 16))
  for offset in (0.0, 0.31, 1 - 6e-8):
    u = np.asarray(run(np.float32(offset)))
    assert np.all((u >= 0) & (u < 1))
    np.testing.assert_array_equal(np.sort(np.floor(u * 16 - (offset % (1 / 16)) * 16 + 1e-3)), np.arange(16))


def test_stratification_lowers_the_variance():
  """Of the mean noise error of a constant network, which depends on t alone through the weight."""

  def means(key, time):
    loss = jd.losses.denoising(jd.VP(), PREDICTIONS["data"], weights.min_snr(), time, t0=0.1)
    return loss(key, jnp.ones((64, 4)), lambda x, t: jnp.zeros_like(x))[0].mean()

  kinds = [times.uniform(stratified=False), times.uniform(stratified=True)]
  run = jax.vmap(lambda key: [means(key, time) for time in kinds])
  a, b = compiled(lambda key: run(jax.random.split(key, 200)), jax.random.key(0))
  assert b.var() < 0.1 * a.var()
  assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / 200)


def test_values_belong_to_the_example_whose_condition_reaches_the_network():
  """In any batch; the gradient reaches the parameters."""
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"], time=times.uniform(stratified=False))

  def run(w, key, x0, label):
    value = lambda w, key, x, label: loss(key, x, lambda x, t, label: w * x * label[:, None], {"label": label})
    part = value(w, jd.example_keys(key, 4, 2), x0[4:], label[4:])[0]
    return value(w, key, x0, label), part, jax.jacobian(lambda w: value(w, key, x0, label)[0])(w)

  given = examples(6).astype(np.float32), np.arange(6, dtype=np.float32)
  (whole, aux), part, gradient = compiled(run, 0.5, jax.random.key(1), *given)
  np.testing.assert_allclose(whole[4:], part, rtol=1e-6)
  assert {name: value.shape for name, value in aux.items()} == {"t": (6,), "noise_error": (6,)}
  assert gradient[0] == 0
  assert np.all(gradient[1:] != 0)


def test_wrong_use_is_refused():
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"])
  run = lambda keys, x, network=lambda x, t: x: jax.eval_shape(lambda x: loss(keys(), x, network), x)
  one, many = (lambda: jax.random.key(0)), (lambda: jd.example_keys(jax.random.key(0), 0, 2))
  with pytest.raises(ValueError, match="one key per example, but stratified times need"):
    run(many, np.ones((2, 3), np.float32))
  with pytest.raises(ValueError, match="stratified times need a batch of at least 2"):
    run(one, np.ones((1, 3), np.float32))
  with pytest.raises(ValueError, match=r"shape of x, \(2, 3\); got \(2, 1\)"):
    run(one, np.ones((2, 3), np.float32), lambda x, t: x[:, :1])
  with pytest.raises(ValueError, match="gamma must be positive"):
    weights.min_snr(0.0)
  with pytest.raises(ValueError, match="std must be positive"):
    times.log_normal(std=0.0)


@pytest.mark.parametrize("name", ["vp", "subvp", "cosine"])
def test_jit_gives_what_eager_execution_gives_for_large_batches(name):
  """The CPU backend of jaxlib 0.10.2 to 0.12.0 miscompiles a large sum beside two different expm1."""
  x0, key = examples(20_000).astype(np.float32), jax.random.key(2)
  loss = jd.losses.denoising(SDES[name], PREDICTIONS["noise"], WEIGHTS["likelihood"])
  run = lambda key: loss(key, x0, lambda x, t: 0.1 * x)[0]
  np.testing.assert_allclose(jax.jit(run)(key), run(key), rtol=1e-3)
