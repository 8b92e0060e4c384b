import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, SDES, gaussian

import jaxdiff as jd
from jaxdiff.losses import times, weights
from jaxdiff.schedules import start_time

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
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


@EACH_SDE
@pytest.mark.parametrize("name", ["noise", "likelihood"])
def test_all_predictions_of_one_score_have_one_loss(sde, name, x64):
  """noise, data, velocity and score; EDM's network sees rescaled inputs and is compared below."""
  data, key = gaussian(), jax.random.key(0)
  x0 = data.sample(jax.random.key(1), 16)
  wrong = lambda x, t: 1.3 * data.score(sde)(x, t)
  losses = [
    jd.losses.denoising(sde, PREDICTIONS[p], WEIGHTS[name])(key, x0, network_of(wrong, sde, PREDICTIONS[p]))[0]
    for p in ("noise", "data", "velocity", "score")
  ]
  for other in losses[1:]:
    np.testing.assert_allclose(other, losses[0], rtol=1e-6)


@EACH_SDE
def test_edm_prediction_has_the_same_loss(sde, x64):
  """The network undoes the preconditioning, which is one to one: t from log(sigma / alpha) / 4, x from x / sqrt V."""
  data, key, s = gaussian(), jax.random.key(0), 0.7
  x0 = data.sample(jax.random.key(1), 16)
  wrong = lambda x, t: 1.3 * data.score(sde)(x, t)

  def network(x_in, c_noise):
    t = sde.time_of_log_snr(-8 * c_noise)
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    x = x_in * jnp.sqrt(sigma**2 + s**2 * alpha**2)
    return network_of(wrong, sde, PREDICTIONS["edm"])(x, t)

  loss = jd.losses.denoising(sde, PREDICTIONS["edm"])(key, x0, network)[0]
  other = jd.losses.denoising(sde, PREDICTIONS["noise"])(key, x0, network_of(wrong, sde, PREDICTIONS["noise"]))[0]
  np.testing.assert_allclose(loss, other, rtol=1e-6)


@EACH_SDE
def test_value_with_the_exact_score_is_the_closed_form(sde, x64):
  """1/2 E_t g^2 sum_j (1 / sigma^2 - 1 / v_j), v_j the variance of x_t: factors, weight and correction all enter."""
  data, n = gaussian(), 20_000
  t0 = start_time(sde, None, 1e-3)
  grid = jnp.flip(jd.time_grid(sde, 20_000, t0=t0))
  _, variance = data.moments(sde, grid)
  integrand = sde.diffusion(grid) ** 2 * jnp.sum(1 / sde.marginal(grid)[1][:, None] ** 2 - 1 / variance, axis=1)
  expected = 0.5 * jnp.trapezoid(integrand, grid) / (sde.t1 - t0)

  loss = jd.losses.denoising(sde, PREDICTIONS["score"], weights.likelihood(), times.importance(stratified=False))
  values, _ = jax.jit(lambda key, x: loss(key, x, data.score(sde)))(
    jax.random.key(0), data.sample(jax.random.key(1), n)
  )
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(n)
  assert values.std() / np.sqrt(n) < 0.03 * expected


@EACH_SDE
def test_importance_sampling_estimates_the_uniform_expectation(sde, x64):
  """The same mean within 4 standard errors, from a smaller or equal variance."""
  data, n = gaussian(), 20_000
  x0, wrong = data.sample(jax.random.key(1), n), lambda x, t: 0.8 * data.score(sde)(x, t)

  def values(time):
    loss = jd.losses.denoising(sde, PREDICTIONS["score"], weights.likelihood(), time, t0=0.05 * sde.t1)
    return jax.jit(lambda key: loss(key, x0, wrong)[0])(jax.random.key(2))

  a, b = values(times.uniform(stratified=False)), values(times.importance(stratified=False))
  assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / n)
  assert b.var() < 1.05 * a.var()


@EACH_SDE
def test_likelihood_weight_times_importance_correction_is_constant(sde):
  t0 = start_time(sde, None, 1e-3)
  t, correction = times.importance().place(sde, t0, jnp.linspace(0.0, 0.999, 50))
  product = weights.likelihood()(sde, t) * correction
  span = (jd.log_snr(sde, t0) - jd.log_snr(sde, jnp.float32(sde.t1))) / (sde.t1 - t0)
  np.testing.assert_allclose(product, span, rtol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES.keys())
def test_the_minimizer_is_the_score_whatever_the_weight(weight, time):
  """Per-example gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  sde, data, n = jd.VP(), gaussian(), 20_000
  loss = jd.losses.denoising(sde, PREDICTIONS["noise"], weight, time)
  x0 = data.sample(jax.random.key(1), n)
  u = jnp.linspace(0.0, 1.0, n, endpoint=False)

  @jax.jit
  @jax.grad
  def gradient(tilt, x0, key, u):
    def network(x, t):
      sigma = sde.marginal(t)[1][:, None]
      return -sigma * data.score(sde)(x, t) * (1 + tilt[0]) + tilt[1] * sigma

    return jnp.sum(loss(key, x0, network, u=u)[0])

  each = jax.vmap(lambda tilt, x, key, u: gradient(tilt, x[None], key[None], u[None]), in_axes=(None, 0, 0, 0))
  run = jax.jit(lambda tilt: each(tilt, x0, jd.example_keys(jax.random.key(0), 0, n), u))
  z = lambda g: np.asarray(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(n)))
  assert np.all(np.abs(z(run(jnp.zeros(2)))) < 4)
  assert np.all(np.abs(z(run(jnp.full(2, 0.1)))) > 4)


def test_weights_are_the_documented_ones(x64):
  sde, t = jd.VP(), jnp.asarray([0.01, 0.3, 0.9])
  alpha, sigma = sde.marginal(t)
  ratio, snr = sigma / alpha, (alpha / sigma) ** 2
  per_denoised = ratio**2
  np.testing.assert_allclose(weights.noise()(sde, t), sigma**2 / sigma**2)
  np.testing.assert_allclose(weights.likelihood()(sde, t), sde.diffusion(t) ** 2 / sigma**2, rtol=1e-10)
  np.testing.assert_allclose(
    weights.edm(0.4)(sde, t), per_denoised * (ratio**2 + 0.16) / (ratio * 0.4) ** 2, rtol=1e-10
  )
  np.testing.assert_allclose(weights.min_snr(5.0)(sde, t), per_denoised * jnp.minimum(snr, 5.0), rtol=1e-10)


def test_importance_times_have_density_proportional_to_the_weight(x64):
  """The distribution function at t is the integral of g^2 / sigma^2 up to t over the whole."""
  sde, t0 = jd.SubVP(), jnp.asarray(0.01)
  u = jnp.linspace(0.05, 0.95, 10)
  t, _ = times.importance().place(sde, t0, u)
  grid = jnp.geomspace(0.01, 1.0, 100_000)
  rate = (sde.diffusion(grid) / sde.marginal(grid)[1]) ** 2
  cumulative = jnp.concatenate([jnp.zeros(1), jnp.cumsum(0.5 * (rate[1:] + rate[:-1]) * jnp.diff(grid))])
  np.testing.assert_allclose(jnp.interp(t, grid, cumulative / cumulative[-1]), 1 - u if t[0] > t[-1] else u, atol=1e-5)


def test_log_normal_times_have_the_published_moments(x64):
  u = jnp.linspace(0.00005, 0.99995, 10_000)
  t, correction = times.log_normal(-1.2, 1.2).place(jd.EDM(), jnp.asarray(1e-9), u)
  np.testing.assert_allclose([jnp.log(t).mean(), jnp.log(t).std()], [-1.2, 1.2], atol=2e-3)
  assert jnp.all(correction == 1)
  t, _ = times.log_normal(-1.2, 1.2).place(jd.EDM(), jnp.asarray(0.2), u)
  assert t.min() >= 0.2
  assert len(jnp.unique(t)) == len(t)


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES.keys())
@EACH_SDE
def test_times_stay_inside_and_are_finite_at_the_ends(time, sde):
  t0 = start_time(sde, None, 1e-3)
  t, correction = time.place(sde, t0, jnp.asarray([0.0, 1e-7, 0.5, 1 - 6e-8]))
  assert jnp.all((t >= t0) & (t <= sde.t1) & jnp.isfinite(correction))


def test_log_normal_times_are_cut_off_where_the_process_ends(x64):
  """At sigma <= 0.3 the upper half of the published distribution is gone: quantiles of the truncated normal."""
  u = jnp.linspace(0.05, 0.95, 10)
  t, _ = times.log_normal(-1.2, 1.2).place(jd.EDM(sigma_max=0.3), jnp.asarray(1e-9), u)
  cdf = jax.scipy.stats.norm.cdf
  np.testing.assert_allclose(cdf((jnp.log(t) + 1.2) / 1.2) / cdf((np.log(0.3) + 1.2) / 1.2), u, rtol=1e-6)


@pytest.mark.parametrize(("mean", "std", "t0"), [(-1.2, 0.5, 0.05), (-1.2, 1.0, 0.3), (-9.0, 0.5, 1e-5)])
def test_log_normal_times_are_finite_for_the_largest_u(mean, std, t0):
  """The distribution function rounds to 1 in float32: infinite noise, if it were not cut off."""
  t, _ = times.log_normal(mean, std).place(jd.VP(), jnp.float32(t0), jnp.float32(1) - 2.0 ** -jnp.arange(20.0, 25.0))
  assert jnp.all(jnp.isfinite(t) & (t >= t0) & (t <= 1))


def test_noise_error_is_the_mean_square_of_the_noise():
  """Of a network that outputs 0: the mean of eps^2 over the dimensions, and the loss half its sum."""
  x0 = jnp.ones((2000, 5))
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"])
  value, aux = loss(jax.random.key(0), x0, lambda x, t: jnp.zeros_like(x))
  assert abs(aux["noise_error"].mean() - 1) < 4 * np.sqrt(2 / 10_000)
  np.testing.assert_allclose(value, 2.5 * aux["noise_error"], rtol=1e-5)


def test_half_precision_data_do_not_overflow_the_sum():
  x0 = jnp.ones((4, 3072), jnp.float16)
  value, _ = jd.losses.denoising(jd.VP(), PREDICTIONS["score"])(jax.random.key(0), x0, lambda x, t: jnp.zeros_like(x))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, 3072 / 2, rtol=0.1)


def test_stratified_times_put_one_in_each_cell():
  for offset in (0.0, 0.31, 1 - 6e-8):
    u = times.stratified(jnp.float32(offset), jnp.arange(16), 16)
    assert jnp.all((u >= 0) & (u < 1))
    np.testing.assert_array_equal(
      np.sort(np.floor(np.asarray(u) * 16 - (offset % (1 / 16)) * 16 + 1e-3)), np.arange(16)
    )


def test_stratification_lowers_the_variance():
  """Of the mean noise error of a constant network, which depends on t alone through the weight."""
  sde, x0 = jd.VP(), jnp.zeros((64, 4))
  network = lambda x, t: jnp.zeros_like(x)

  def means(time):
    loss = jd.losses.denoising(sde, PREDICTIONS["data"], weights.min_snr(), time, t0=0.1)
    return jax.jit(jax.vmap(lambda key: loss(key, x0 + 1.0, network)[0].mean()))(
      jax.random.split(jax.random.key(0), 200)
    )

  a, b = means(times.uniform(stratified=False)), means(times.uniform(stratified=True))
  assert b.var() < 0.1 * a.var()
  assert abs(a.mean() - b.mean()) < 4 * np.sqrt((a.var() + b.var()) / 200)


def test_values_belong_to_the_example():
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"], time=times.uniform(stratified=False))
  x0 = gaussian().sample(jax.random.key(0), 6)
  key, network = jax.random.key(1), lambda x, t: 0.1 * x
  whole, aux = loss(key, x0, network)
  part, _ = loss(jd.example_keys(key, 4, 2), x0[4:], network)
  np.testing.assert_allclose(whole[4:], part, rtol=1e-6)
  assert {name: value.shape for name, value in aux.items()} == {"t": (6,), "noise_error": (6,)}


def test_condition_reaches_the_network_and_the_gradient_the_parameters():
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"])
  x0, cond = jnp.ones((4, 2)), {"label": jnp.arange(4.0)}

  def mean(w):
    return loss(jax.random.key(0), x0, lambda x, t, label: w * x * label[:, None], cond)[0]

  gradient = jax.jacobian(mean)(0.5)
  assert gradient[0] == 0
  assert jnp.all(gradient[1:] != 0)


def test_wrong_use_is_refused(untyped):
  loss = jd.losses.denoising(jd.VP(), PREDICTIONS["noise"])
  network = lambda x, t: x
  with pytest.raises(ValueError, match="one key per example, but stratified times need"):
    loss(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 3)), network)
  with pytest.raises(ValueError, match="stratified times need a batch of at least 2"):
    loss(jax.random.key(0), jnp.ones((1, 3)), network)
  with pytest.raises(ValueError, match=r"shape of x, \(2, 3\); got \(2, 1\)"):
    loss(jax.random.key(0), jnp.ones((2, 3)), lambda x, t: x[:, :1])
  with pytest.raises(ValueError, match="gamma must be positive"):
    weights.min_snr(0.0)
  with pytest.raises(ValueError, match="std must be positive"):
    times.log_normal(std=0.0)


@EACH_SDE
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_jit_gives_what_eager_execution_gives_for_large_batches(sde, weight):
  """The CPU backend of jaxlib 0.10.2 to 0.12.0 miscompiles a large sum beside two different expm1."""
  data = gaussian()
  x0 = data.sample(jax.random.key(1), 20_000)
  loss = jd.losses.denoising(sde, PREDICTIONS["noise"], weight)
  run = lambda key: loss(key, x0, lambda x, t: 0.1 * x)[0]
  np.testing.assert_allclose(jax.jit(run)(jax.random.key(2)), run(jax.random.key(2)), rtol=1e-3)
