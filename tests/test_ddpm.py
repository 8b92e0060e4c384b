"""The discrete chain of DDPM and its process and simple loss against NumPy in float64: composed steps, Bayes' rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, compiled, gaussian

import jaxdiff as jd
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time

BETAS = {  # chains of one length share their programs
  "linear": lambda: jd.ddpm.linear_betas(),
  "cosine": lambda: jd.ddpm.cosine_betas(1000),
  "short": lambda: jd.ddpm.linear_betas(8, 0.02, 0.6),
  "one": lambda: [0.7],
}
EACH = pytest.mark.parametrize("name", BETAS)
TIMES = np.linspace(0.0213, 0.9871, 20)
SHARES = np.array([0.0, 0.3, 1.0])


def moments(betas):
  """alpha_t and sigma_t for t = 0..T."""
  squared = np.concatenate([[1.0], np.cumprod(1 - np.asarray(betas, np.float64))])
  return np.sqrt(squared), np.sqrt(1 - squared)


@jax.jit
def quantities(chain, x0, x_t):
  """Every number of a chain, at all of its steps."""
  t, sde = jnp.arange(1, chain.steps + 1), chain.sde()
  noised, noise = chain.perturb(jax.random.key(1), x0, t)
  times = jnp.asarray(TIMES)
  (alpha, sigma), slopes = jax.jvp(sde.marginal, (times,), (jnp.ones_like(times),))
  shares = jnp.asarray(SHARES)[:, None] + jnp.zeros((1, chain.steps))
  return {
    "beta": chain.variance("beta", t),
    "beta_tilde": chain.variance("beta_tilde", t),
    "marginal": chain.marginal(jnp.arange(chain.steps + 1)),
    "posterior": chain.posterior(x0, x_t, t),
    "noised": (noised, noise),
    "reverse_mean": (chain.reverse_mean(noised, noise, t), chain.posterior(x0, noised, t)[0]),
    "optimal": [chain.optimal_variance(t, v) for v in (0.0, jnp.asarray(SHARES), 1.0)],
    "learned": jax.vmap(lambda v: jnp.exp(chain.interpolated_log_variance(v, t)))(shares),
    "process": (alpha, sigma, *slopes),
    "coefficients": (sde.drift(jnp.ones((len(TIMES), 1)), times)[:, 0], sde.diffusion(times)),
    "inverse": sde.time_of_log_snr(2 * (jnp.log(alpha) - jnp.log(sigma))),
  }


@functools.cache
def states(steps):
  return np.random.default_rng(0).normal(size=(2, steps, 2))


@functools.cache
def double(name):
  """(betas, quantities) in float64."""
  with jax.enable_x64(True):
    chain = jd.ddpm.Chain(BETAS[name]())
    return np.asarray(chain.betas), jax.device_get(quantities(chain, *states(chain.steps)))


@EACH
def test_marginal_is_the_product_of_the_steps(name):
  """Composed step by step: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps."""
  betas, found = double(name)
  alpha, variance = [1.0], [0.0]
  for beta in betas:
    alpha.append(np.sqrt(1 - beta) * alpha[-1])
    variance.append((1 - beta) * variance[-1] + beta)
  np.testing.assert_allclose(found["marginal"], (alpha, np.sqrt(variance)), rtol=1e-10)
  x0, (noised, noise) = states(len(betas))[0], found["noised"]
  expected = np.asarray(alpha[1:])[:, None] * x0 + np.sqrt(variance[1:])[:, None] * noise
  np.testing.assert_allclose(noised, expected, rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 100])
def test_a_few_steps_of_vp_meet_it_at_every_node(steps, x64):
  t = np.arange(steps + 1) / steps
  for low, high in ((0.1, 20.0), (0.5, 3.0)):
    betas = jd.ddpm.vp_betas(steps, low, high)
    alpha = np.exp(-0.5 * (low * t + 0.5 * t**2 * (high - low)))
    np.testing.assert_allclose(moments(betas)[0], alpha, rtol=1e-10)
  np.testing.assert_array_equal(jd.ddpm.vp_betas(steps), jd.ddpm.vp_betas(steps, 0.1, 20.0))


def test_one_step_of_vp_keeps_its_digits_in_float32():
  """1 - beta = exp(-10.05) has 24 + log2(exp(-10.05)) = 9 bits; half of an error is that of alpha."""
  ends = compiled(
    lambda chains: [c.marginal(c.steps) for c in chains], [jd.ddpm.Chain(jd.ddpm.vp_betas(n)) for n in (1, 8)]
  )
  for (alpha, sigma), rtol in zip(ends, (1e-3, 1e-4), strict=True):
    np.testing.assert_allclose(alpha, np.exp(-0.5 * 10.05), rtol=rtol)
    np.testing.assert_allclose(sigma, 1.0, rtol=1e-4)


def test_wrong_steps_of_vp_are_refused():
  with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
    jd.ddpm.vp_betas(0)
  with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5"):
    jd.ddpm.vp_betas(2.5)
  with pytest.raises(ValueError, match=r"0 <= beta_min <= beta_max, got 5\.0 and 1\.0"):
    jd.ddpm.vp_betas(4, 5.0, 1.0)


def test_draws_of_the_posterior_have_its_moments(x64):
  x0, x_t, t = np.array([[0.3, -1.0], [2.0, 0.5], [1.0, 1.0]]), np.ones((3, 2)), np.array([1, 2, 4])

  def draw(chain, key, x0, x_t):
    z = jax.vmap(lambda key: jax.random.normal(key, (2,)))(jd.example_keys(key, 0, 3))
    return chain.posterior(x0, x_t, t), chain.sample_posterior(key, x0, x_t, t), z

  chain = jd.ddpm.Chain(jd.ddpm.vp_betas(4))
  (mean, variance), drawn, z = compiled(draw, chain, jax.random.key(0), x0, x_t)
  np.testing.assert_allclose(drawn, mean + np.sqrt(variance)[:, None] * z, rtol=1e-12)
  np.testing.assert_allclose(drawn[0], x0[0], rtol=1e-12)
  assert np.abs(drawn - mean)[1:].min() > 1e-3


@EACH
def test_float32_has_all_its_digits(name):
  """The process is the chain at its steps, and their times lead back to them."""
  chain = jd.ddpm.Chain(BETAS[name]())
  found = single(chain)
  alpha, sigma = moments(chain.betas)
  tilde = np.asarray(chain.betas) * (sigma[:-1] / sigma[1:]) ** 2
  assert {value.dtype for value in jax.tree.leaves(found["all"])} == {np.dtype("float32")}
  expected = {"marginal": (alpha, sigma), "beta": chain.betas, "beta_tilde": tilde}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found["all"], expected)
  np.testing.assert_allclose(found["process"], found["all"]["marginal"], rtol=2e-5)
  np.testing.assert_array_equal(found["index"], np.arange(chain.steps + 1))
  assert found["time"][-1] == chain.sde().t1


@jax.jit
def single(chain):
  nodes = jnp.arange(chain.steps + 1)
  variance = {kind: chain.variance(kind, nodes[1:]) for kind in ("beta", "beta_tilde")}
  return {
    "all": {"marginal": chain.marginal(nodes)} | variance,
    "process": chain.sde().marginal(chain.time(nodes)),
    "time": chain.time(nodes),
    "index": chain.index(chain.time(nodes)),
  }


def test_schedules_are_the_published_ones(x64):
  """alpha-bar of the linear chain ends at 4e-5; that of the cosine is f(t) / f(0) until the clip."""
  linear, cosine = jd.ddpm.linear_betas(), jd.ddpm.cosine_betas(1000)
  np.testing.assert_allclose(linear, np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
  np.testing.assert_allclose(moments(linear)[0][-1] ** 2, 4.0358e-5, rtol=1e-4)
  f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
  t = np.array([1, 10, 500, 990])
  np.testing.assert_allclose(moments(cosine)[0][t] ** 2, f(t) / f(0), rtol=1e-9)
  assert cosine[-1] == 0.999


@EACH
def test_posterior_is_bayes_rule(name):
  """Conditioning of the joint Gaussian of (x_{t-1}, x_t) given x_0, by the matrix formula."""
  betas, found = double(name)
  x0, x_t = states(len(betas))
  alpha, sigma = moments(betas)
  keep, v_before = (1 - betas)[:, None], sigma[:-1, None] ** 2
  v = keep * v_before + betas[:, None]
  gain = np.sqrt(keep) * v_before / v
  mean = alpha[:-1, None] * x0 + gain * (x_t - np.sqrt(keep) * alpha[:-1, None] * x0)
  got_mean, got_variance = found["posterior"]
  np.testing.assert_allclose(got_mean, mean, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(got_variance, (v_before - gain**2 * v)[:, 0], rtol=1e-7, atol=1e-15)
  np.testing.assert_allclose(found["beta_tilde"], got_variance, rtol=1e-12)
  np.testing.assert_array_equal(found["beta"], betas)
  # The mean that the true noise leads to.
  np.testing.assert_allclose(*found["reverse_mean"], rtol=1e-7, atol=1e-9)


@EACH
def test_optimal_variance_lies_between_the_two_and_meets_them(name):
  found = double(name)[1]
  point, middle, normal = found["optimal"]
  np.testing.assert_allclose(normal, found["beta"], rtol=1e-9)
  np.testing.assert_allclose(point, found["beta_tilde"], rtol=1e-12)
  assert np.all((middle > point) & (middle < normal))


def test_optimal_variance_minimizes_the_expected_divergence(x64):
  """E KL(q(x_{t-1} | x_t, x_0) || N(exact mean, s^2)), by Monte Carlo in NumPy, over a grid of variances."""
  data, n, rng = gaussian(), 20_000, np.random.default_rng(0)
  betas, found = double("short")
  chain, steps = jd.ddpm.Chain(betas), np.array([2, 5, 8])
  optimal = compiled(lambda chain: chain.optimal_variance(steps, data.std**2), chain)
  alpha, sigma = moments(betas)
  for t, best in zip(steps, optimal, strict=True):
    x0 = data.mean + data.std * rng.normal(size=(n, 3))
    x_t = alpha[t] * x0 + sigma[t] * rng.normal(size=(n, 3))
    gain = alpha[t] * data.std**2 / (alpha[t] ** 2 * data.std**2 + sigma[t] ** 2)
    known = data.mean + gain * (x_t - alpha[t] * data.mean)
    of_data = alpha[t - 1] * betas[t - 1] / sigma[t] ** 2
    tilde, squared = found["beta_tilde"][t - 1], of_data**2 * np.mean((known - x0) ** 2)
    np.testing.assert_allclose(tilde + squared, best, rtol=0.01)
    divergence = lambda s2: 0.5 * (np.log(s2 / tilde) + (tilde + squared) / s2 - 1)
    assert np.all(divergence(best * np.array([0.8, 0.9, 1.1, 1.25])) > divergence(best))


@EACH
def test_learned_variance_runs_from_beta_tilde_to_beta(name):
  betas, found = double(name)
  tilde = found["beta_tilde"].copy()
  tilde[0] = tilde[1] if len(betas) > 1 else betas[0]
  for share, value in zip(SHARES, found["learned"], strict=True):
    np.testing.assert_allclose(value, betas**share * tilde ** (1 - share), rtol=1e-10)


def test_chain_is_a_pytree_validated_only_when_made(x64):
  """A gradient with respect to the chain is a chain, whose numbers are no betas."""
  chain = jd.ddpm.Chain(double("short")[0])
  made = lambda betas: jd.ddpm.Chain(betas).marginal(5)[1]
  gradient, value = compiled(lambda c: (jax.grad(lambda c: c.marginal(5)[1])(c), made(c.betas)), chain)
  bumped = lambda h: moments(np.asarray(chain.betas) + h * np.eye(8)[2])[1][5]
  np.testing.assert_allclose(gradient.betas[2], (bumped(1e-6) - bumped(-1e-6)) / 2e-6, rtol=1e-6)
  np.testing.assert_allclose(value, bumped(0.0))
  assert jax.tree.leaves(jax.tree.map(lambda v: -np.asarray(v), chain))[0][0] < 0


# ----- its continuous process


@EACH
def test_process_solves_its_moment_equations(name):
  """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, off the kinks."""
  found = double(name)[1]
  (alpha, sigma, d_alpha, d_sigma), (f, g) = found["process"], found["coefficients"]
  np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-9)
  np.testing.assert_allclose(2 * sigma * d_sigma, 2 * f * sigma**2 + g**2, rtol=1e-9)
  np.testing.assert_allclose(found["inverse"], TIMES, rtol=1e-8)
  # Between its nodes, by the piecewise linear log alpha^2.
  nodes = 2 * np.log(found["marginal"][0])
  np.testing.assert_allclose(2 * np.log(alpha), np.interp(TIMES, np.linspace(0, 1, len(nodes)), nodes), rtol=1e-9)


def test_process_tends_to_vp_with_first_order(x64):
  """beta_i = beta((i - 1/2) / T) / T: the error of log alpha^2 is half the sum of beta_i^2, so it falls like 1 / T."""
  t, steps = np.linspace(0.05, 1.0, 20), (100, 400)
  chains = [jd.ddpm.Chain((0.1 + (np.arange(n) + 0.5) / n * 19.9) / n) for n in steps]
  alphas = compiled(lambda chains, t: [chain.sde().marginal(t)[0] for chain in chains], chains, t)
  errors = [np.abs(np.log(alpha) + 0.5 * (0.1 * t + 0.5 * 19.9 * t**2)).max() for alpha in alphas]
  np.testing.assert_allclose(np.diff(np.log(errors)) / np.log(4), -1, atol=0.1)


def test_process_works_with_samplers_and_likelihoods():
  """N(0, I), whose probability flow stands still: its density, and the cosine by which each step of DDIM shrinks it."""
  sde = jd.ddpm.Chain(BETAS["short"]()).sde()
  assert isinstance(sde, jd.ScalarSDE)

  def run(sde, key):
    z, ts = sde.prior_sample(key, (2, 2)), jd.time_grid(sde, 4)
    sampler, log_prob = jd.samplers.ddim(sde, ts), jd.likelihood.log_prob(sde, jd.divergence.exact())
    return z, sde.marginal(ts), sampler(key, z, lambda x, t: -x).x, log_prob(key, z, lambda x, t: -x)

  z, (alpha, sigma), x, density = compiled(run, sde, jax.random.key(0))
  np.testing.assert_allclose(x, z * np.prod(alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]), rtol=1e-5)
  np.testing.assert_allclose(density.latent, z, atol=1e-5)
  np.testing.assert_allclose(density.value, -0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1), atol=1e-4)


# ----- the simple loss


def test_simple_is_denoising_at_the_times_of_the_steps(x64):
  """So its minimizer is the score, as that of denoising is for every weight and time."""
  x0, u = np.random.default_rng(0).normal(size=(16, 3)), (np.arange(16.0) + 0.5) / 16

  def run(chain, key, x0, u):
    sde = chain.sde()
    t0 = start_time(sde, None, TRAINING_NOISE_TO_SIGNAL)
    at = ((1 + jnp.arange(16) // 2) / 8 - t0) / (1 - t0)
    values = lambda loss, u: loss(key, x0, lambda x, t: 0.3 * x, u=u)
    each = [PREDICTIONS[name] for name in ("noise", "velocity", "edm")]
    return [(values(jd.losses.ddpm_simple(chain, p), u), values(jd.losses.denoising(sde, p), at)) for p in each]

  for (value, aux), (expected, other) in compiled(run, jd.ddpm.Chain(BETAS["short"]()), jax.random.key(0), x0, u):
    np.testing.assert_allclose(aux["t"], np.repeat(np.arange(1.0, 9.0), 2) / 8)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(aux["noise_error"], other["noise_error"], rtol=1e-9)


@pytest.mark.parametrize("first", [1, 2])
def test_steps_are_uniform_from_the_first(first):
  """Every step once for u = (i + 1/2) / count, up to the largest u below 1 in float32."""
  chain = jd.ddpm.Chain(BETAS["linear"]())
  count = chain.steps - first + 1
  u = np.concatenate([(np.arange(float(count)) + 0.5) / count, [0.0, 1 - 6e-8, 1.0]]).astype(np.float32)
  loss = jd.losses.ddpm_simple(chain, first=first)
  run = lambda key, u: chain.index(loss(key, jnp.zeros((len(u), 1)), lambda x, t: x, u=u)[1]["t"])
  steps = compiled(run, jax.random.key(0), u)
  np.testing.assert_array_equal(steps[:count], np.arange(first, chain.steps + 1))
  np.testing.assert_array_equal(steps[count:], [first, chain.steps, chain.steps])


# ----- what is refused


def test_wrong_chains_are_refused():
  with pytest.raises(ValueError, match=r"pass betas\[::-1\]"):
    jd.ddpm.Chain(np.linspace(0.02, 1e-4, 1000))
  for betas in ([0.1, 1.0], [0.0, 0.1], [np.nan, 0.1]):
    with pytest.raises(ValueError, match="between 0 and 1"):
      jd.ddpm.Chain(betas)
  for betas in (np.full((2, 2), 0.1), [], 0.1):
    with pytest.raises(ValueError, match=r"shape \[T\]"):
      jd.ddpm.Chain(betas)
  for make in (jd.ddpm.linear_betas, jd.ddpm.cosine_betas):
    with pytest.raises(ValueError, match="steps must be at least 1"):
      make(0)


def test_wrong_steps_are_refused_or_give_nan():
  chain = jd.ddpm.Chain(BETAS["short"]())
  with pytest.raises(ValueError, match=r"must lie in 0..8, got 9"):
    jax.eval_shape(lambda chain: chain.marginal(9), chain)
  with pytest.raises(TypeError, match="the step must be an integer"):
    jax.eval_shape(chain.marginal, np.array([0.5], np.float32))
  with pytest.raises(ValueError, match=r"a reverse step must start at 1..8: 0 is the data"):
    jax.eval_shape(lambda chain: chain.variance("beta", 0), chain)
  with pytest.raises(ValueError, match="kind must be 'beta' or 'beta_tilde', got 'gamma'"):
    chain.variance("gamma", 1)
  with pytest.raises(ValueError, match="must not be negative"):
    jd.ddpm.remaining_variance(np.ones(1, np.float32), np.ones(1, np.float32), -0.5)

  def outside(chain, t):
    values = [chain.marginal(t)[0], chain.variance("beta", t), chain.time(t) * chain.optimal_variance(t, 0.5)]
    return [*values, chain.interpolated_log_variance(jnp.full(3, 0.5), t)]

  for value in compiled(outside, chain, np.array([-1, 9, 3])):
    np.testing.assert_array_equal(np.isnan(value), [True, True, False])
  at_zero = compiled(lambda chain: chain.interpolated_log_variance(jnp.float32(0.5), jnp.int32(0)), chain)
  assert np.isnan(at_zero)
