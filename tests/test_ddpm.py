import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, Gaussian, gaussian

import jaxdiff as jd
from jaxdiff.losses import decoders
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time

CHAINS = {
  "linear": jd.ddpm.Chain(jd.ddpm.linear_betas()),
  "cosine": jd.ddpm.Chain(jd.ddpm.cosine_betas(50)),
  "short": jd.ddpm.Chain(jd.ddpm.linear_betas(8, 0.02, 0.6)),
  "one": jd.ddpm.Chain([0.7]),
}
EACH = pytest.mark.parametrize("name", CHAINS)


def doubled(name):
  """The chain in float64: the betas made again, not the float32 ones widened."""
  return {
    "linear": lambda: jd.ddpm.Chain(jd.ddpm.linear_betas()),
    "cosine": lambda: jd.ddpm.Chain(jd.ddpm.cosine_betas(50)),
    "short": lambda: jd.ddpm.Chain(jd.ddpm.linear_betas(8, 0.02, 0.6)),
    "one": lambda: jd.ddpm.Chain([0.7]),
  }[name]()


def exact_network(data, chain):
  """The noise to expect at (x, t) for Gaussian data."""
  sde = chain.sde()
  return lambda x, t: -sde.marginal(t)[1][:, None] * data.score(sde)(x, t)


def terminal(data, chain):
  """Mean and variance of x_T, each [1, d]."""
  return data.moments(chain.sde(), jnp.ones(1, chain.betas.dtype))


def entropy(data):
  return 0.5 * float(np.sum(np.log(2 * np.pi * np.e * data.std**2)))


# ----- the chain


@EACH
def test_marginal_is_the_product_of_the_steps(name, x64):
  """Composed step by step: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps."""
  chain, alpha, variance = doubled(name), 1.0, 0.0
  assert chain.marginal(0) == (1, 0)
  for t, beta in enumerate(np.asarray(chain.betas), start=1):
    alpha, variance = np.sqrt(1 - beta) * alpha, (1 - beta) * variance + beta
    if t in (1, 2, 5, chain.steps):
      np.testing.assert_allclose(chain.marginal(t), (alpha, np.sqrt(variance)), rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 100])
def test_a_few_steps_of_vp_meet_it_at_every_node(steps, x64):
  t = jnp.arange(steps + 1)
  for betas in ({}, {"beta_min": 0.5, "beta_max": 3.0}):
    chain = jd.ddpm.Chain(jd.ddpm.vp_betas(steps, **betas))
    assert chain.steps == steps
    for found, expected in zip(chain.marginal(t), jd.VP(**betas).marginal(t / steps), strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_one_step_of_vp_keeps_its_digits_in_float32():
  """1 - beta = exp(-10.05) has 24 + log2(exp(-10.05)) = 9 bits; half of an error is that of alpha."""
  for steps in (1, 2, 4, 8):
    alpha, sigma = jd.ddpm.Chain(jd.ddpm.vp_betas(steps)).marginal(steps)
    np.testing.assert_allclose(alpha, np.exp(-0.5 * 10.05), rtol=1e-3 if steps == 1 else 1e-4)
    np.testing.assert_allclose(sigma, 1.0, rtol=1e-4)


@pytest.mark.usefixtures("untyped")
def test_wrong_steps_of_vp_are_refused():
  with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
    jd.ddpm.vp_betas(0)
  with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5"):
    jd.ddpm.vp_betas(2.5)
  with pytest.raises(ValueError, match=r"0 <= beta_min <= beta_max, got 5\.0 and 1\.0"):
    jd.ddpm.vp_betas(4, 5.0, 1.0)


def test_draws_of_the_posterior_have_its_moments(x64):
  chain, key = jd.ddpm.Chain(jd.ddpm.vp_betas(4)), jax.random.key(0)
  x0, x_t, t = jnp.asarray([[0.3, -1.0], [2.0, 0.5], [1.0, 1.0]]), jnp.ones((3, 2)), jnp.asarray([1, 2, 4])
  mean, variance = chain.posterior(x0, x_t, t)
  drawn = chain.sample_posterior(key, x0, x_t, t)
  z = jax.vmap(lambda key: jax.random.normal(key, (2,)))(jd.example_keys(key, 0, 3))
  np.testing.assert_allclose(drawn, mean + jnp.sqrt(variance)[:, None] * z, rtol=1e-12)
  np.testing.assert_allclose(drawn[0], x0[0], rtol=1e-12)
  assert jnp.abs(drawn - mean)[1:].min() > 1e-3


@EACH
def test_float32_has_all_its_digits(name):
  chain = CHAINS[name]
  t = jnp.unique(jnp.asarray([1, 2, chain.steps // 2, chain.steps]).clip(1))
  quantities = lambda chain: (*chain.marginal(t), chain.variance("beta", t), chain.variance("beta_tilde", t))
  single = quantities(chain)
  with jax.enable_x64(True):
    double = quantities(jd.ddpm.Chain(np.asarray(chain.betas, np.float64)))
  for low, high in zip(single, double, strict=True):
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=1e-5)


def test_schedules_are_the_published_ones(x64):
  """alpha-bar of the linear chain ends at 4e-5; that of the cosine is f(t) / f(0) until the clip."""
  np.testing.assert_allclose(jd.ddpm.Chain(jd.ddpm.linear_betas()).marginal(1000)[0] ** 2, 4.0358e-5, rtol=1e-4)
  chain = jd.ddpm.Chain(jd.ddpm.cosine_betas(1000))
  f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
  t = np.array([1, 10, 500, 990])
  np.testing.assert_allclose(chain.marginal(jnp.asarray(t))[0] ** 2, f(t) / f(0), rtol=1e-9)
  assert chain.betas[-1] == 0.999


@EACH
def test_posterior_is_bayes_rule(name, x64):
  """Conditioning of the joint Gaussian of (x_{t-1}, x_t) given x_0, by the matrix formula."""
  chain = doubled(name)
  x0, x_t = jnp.asarray([[1.3, -0.2]]), jnp.asarray([[0.4, 2.0]])
  for t in {1, 2, chain.steps // 2 + 1, chain.steps} & set(range(1, chain.steps + 1)):
    betas = np.asarray(chain.betas)[:t]
    before, keep, beta = np.prod(1 - betas[:-1]), 1 - betas[-1], betas[-1]
    v_before = 1 - before
    v = keep * v_before + beta
    gain = np.sqrt(keep) * v_before / v
    mean = np.sqrt(before) * x0 + gain * (x_t - np.sqrt(keep * before) * x0)
    got_mean, got_variance = chain.posterior(x0, x_t, t)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-9)
    np.testing.assert_allclose(got_variance, v_before - gain**2 * v, rtol=1e-7, atol=1e-16)
    np.testing.assert_allclose(chain.posterior(x0, x_t, jnp.asarray([t]))[0], got_mean, rtol=1e-12)


@EACH
def test_reverse_mean_of_the_true_noise_is_the_posterior_mean(name, x64):
  chain = doubled(name)
  x0 = jax.random.normal(jax.random.key(0), (chain.steps, 3))
  t = jnp.arange(1, chain.steps + 1)
  x_t, noise = chain.perturb(jax.random.key(1), x0, t)
  np.testing.assert_allclose(chain.reverse_mean(x_t, noise, t), chain.posterior(x0, x_t, t)[0], rtol=1e-7, atol=1e-9)


@EACH
def test_optimal_variance_lies_between_the_two_and_meets_them(name, x64):
  chain = doubled(name)
  t = jnp.arange(1, chain.steps + 1)
  low, high = chain.variance("beta_tilde", t), chain.variance("beta", t)
  np.testing.assert_allclose(chain.optimal_variance(t, 1.0), high, rtol=1e-9)
  np.testing.assert_allclose(chain.optimal_variance(t, 0.0), low, rtol=1e-12)
  middle = chain.optimal_variance(t, jnp.asarray([0.0, 0.3, 1.0]))
  assert jnp.all((middle > low) & (middle < high))


def test_optimal_variance_minimizes_the_expected_divergence(x64):
  """E KL(q(x_{t-1} | x_t, x_0) || N(exact mean, s^2)), by Monte Carlo, over a grid of variances."""
  data, chain, n = gaussian(), doubled("short"), 20_000
  x0 = data.sample(jax.random.key(0), n)
  for t in (2, 5, 8):
    steps = jnp.full(n, t)
    x_t, _ = chain.perturb(jax.random.key(1), x0, steps)
    noise = exact_network(data, chain)(x_t, chain.time(steps))
    mean, tilde = chain.posterior(x0, x_t, t)
    squared = jnp.mean((chain.reverse_mean(x_t, noise, t) - mean) ** 2)
    best = chain.optimal_variance(t, data.std**2)
    np.testing.assert_allclose(tilde + squared, best, rtol=0.01)
    divergence = lambda s2: 0.5 * (jnp.log(s2 / tilde) + (tilde + squared) / s2 - 1)
    assert jnp.all(divergence(best * jnp.asarray([0.8, 0.9, 1.1, 1.25])) > divergence(best))


@EACH
def test_learned_variance_runs_from_beta_tilde_to_beta(name, x64):
  chain = doubled(name)
  t = jnp.arange(1, chain.steps + 1)
  at = lambda v: jnp.exp(chain.interpolated_log_variance(jnp.full((chain.steps, 2), v), t))[:, 0]
  tilde = np.array(chain.variance("beta_tilde", t))
  tilde[0] = tilde[1] if chain.steps > 1 else chain.betas[0]
  np.testing.assert_allclose(at(0.0), tilde, rtol=1e-10)
  np.testing.assert_allclose(at(1.0), chain.betas, rtol=1e-10)
  np.testing.assert_allclose(at(0.3), chain.betas**0.3 * tilde**0.7, rtol=1e-10)


@EACH
def test_time_and_index_are_inverse(name):
  chain = CHAINS[name]
  t = jnp.arange(chain.steps + 1)
  np.testing.assert_array_equal(chain.index(chain.time(t)), t)
  assert chain.time(chain.steps) == chain.sde().t1


def test_chain_is_a_pytree_validated_only_when_made(x64):
  """A gradient with respect to the chain is a chain, whose numbers are no betas."""
  chain = doubled("short")
  gradient = jax.grad(lambda chain: chain.marginal(5)[1])(chain)
  bumped = lambda h: jd.ddpm.Chain(chain.betas.at[2].add(h)).marginal(5)[1]
  np.testing.assert_allclose(gradient.betas[2], (bumped(1e-6) - bumped(-1e-6)) / 2e-6, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(lambda b: jd.ddpm.Chain(b).marginal(3))(chain.betas), chain.marginal(3))
  assert jax.tree.leaves(jax.tree.map(lambda v: -v, chain))[0][0] < 0


# ----- its continuous process


@EACH
def test_process_is_the_chain_at_its_steps(name):
  chain, t = CHAINS[name], jnp.arange(CHAINS[name].steps + 1)
  np.testing.assert_allclose(chain.sde().marginal(chain.time(t)), chain.marginal(t), rtol=2e-5)


@EACH
def test_process_solves_its_moment_equations(name, x64):
  """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, off the kinks."""
  sde = doubled(name).sde()
  for t in np.linspace(0.0213, 0.9871, 20):
    t = jnp.asarray(t)
    f = sde.drift(jnp.ones((1, 1)), t)[0, 0]
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(sde.marginal, (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(d_alpha, f * alpha, rtol=1e-9)
    np.testing.assert_allclose(2 * sigma * d_sigma, 2 * f * sigma**2 + sde.diffusion(t) ** 2, rtol=1e-9)
    np.testing.assert_allclose(sde.time_of_log_snr(jd.log_snr(sde, t)), t, rtol=1e-8)


def test_process_tends_to_vp_with_first_order(x64):
  """beta_i = beta((i - 1/2) / T) / T: the error of log alpha^2 is half the sum of beta_i^2, so it falls like 1 / T."""
  vp, t = jd.VP(), jnp.linspace(0.05, 1.0, 20)

  def error(steps):
    middle = (np.arange(steps) + 0.5) / steps
    sde = jd.ddpm.Chain((0.1 + middle * 19.9) / steps).sde()
    return float(jnp.max(jnp.abs(jnp.log(sde.marginal(t)[0] / vp.marginal(t)[0]))))

  errors = np.array([error(steps) for steps in (100, 400, 1600)])
  np.testing.assert_allclose(np.diff(np.log(errors)) / np.log(4), -1, atol=0.1)


def test_process_works_with_samplers_and_likelihoods():
  """Exact for N(0, I): the samples, and the density, whose probability flow stands still."""
  sde = CHAINS["short"].sde()
  assert isinstance(sde, jd.ScalarSDE)
  z = sde.prior_sample(jax.random.key(0), (4, 2))
  sampler, log_prob = jd.samplers.probability_flow(sde), jd.likelihood.log_prob(sde, jd.divergence.exact())
  flow = jax.jit(lambda key, z: sampler(key, z, lambda x, t: -x))(jax.random.key(1), z)
  np.testing.assert_allclose(flow.x, z, atol=1e-5)
  density = jax.jit(lambda key, z: log_prob(key, z, lambda x, t: -x))(jax.random.key(2), z)
  np.testing.assert_allclose(density.value, jax.scipy.stats.norm.logpdf(z).sum(axis=1), atol=1e-4)


# ----- the simple loss


@pytest.mark.parametrize("prediction", ["noise", "data", "velocity", "score", "edm"])
def test_simple_is_denoising_at_the_times_of_the_steps(prediction, x64):
  chain, data, key = doubled("short"), gaussian(), jax.random.key(0)
  sde, x0 = chain.sde(), data.sample(jax.random.key(1), 16)
  u = (jnp.arange(16.0) + 0.5) / 16
  value, aux = jd.losses.ddpm_simple(chain, PREDICTIONS[prediction])(key, x0, lambda x, t: 0.3 * x, u=u)
  t0 = start_time(sde, None, TRAINING_NOISE_TO_SIGNAL)
  at = (aux["t"] - t0) / (1 - t0)
  expected, other = jd.losses.denoising(sde, PREDICTIONS[prediction])(key, x0, lambda x, t: 0.3 * x, u=at)
  np.testing.assert_allclose(aux["t"], jnp.repeat(jnp.arange(1.0, 9.0), 2) / 8)
  np.testing.assert_allclose(value, expected, rtol=1e-9)
  np.testing.assert_allclose(aux["noise_error"], other["noise_error"], rtol=1e-9)


@pytest.mark.parametrize("first", [1, 2])
def test_steps_are_uniform_from_the_first(first):
  """Every step once for u = (i + 1/2) / count, up to the largest u below 1 in float32."""
  chain = CHAINS["linear"]
  count = chain.steps - first + 1
  loss = jd.losses.ddpm_simple(chain, first=first)
  steps = lambda u: chain.index(loss(jax.random.key(0), jnp.zeros((len(u), 1)), lambda x, t: x, u=u)[1]["t"])
  np.testing.assert_array_equal(steps((jnp.arange(float(count)) + 0.5) / count), np.arange(first, chain.steps + 1))
  np.testing.assert_array_equal(steps(jnp.asarray([0.0, 1 - 6e-8], jnp.float32)), [first, chain.steps])


def test_minimizer_of_simple_is_the_score():
  """Per-example gradients of a scale and a shift: zero within 4 standard errors at the score, not so 10% away."""
  data, chain, n = gaussian(), CHAINS["cosine"], 20_000
  loss, exact = jd.losses.ddpm_simple(chain), exact_network(data, chain)
  x0, u = data.sample(jax.random.key(1), n), jnp.linspace(0.0, 1.0, n, endpoint=False)

  @jax.grad
  def gradient(tilt, x0, key, u):
    network = lambda x, t: exact(x, t) * (1 + tilt[0]) + tilt[1]
    return jnp.sum(loss(key[None], x0[None], network, u=u[None])[0])

  run = jax.jit(
    lambda tilt: jax.vmap(gradient, in_axes=(None, 0, 0, 0))(tilt, x0, jd.example_keys(jax.random.key(0), 0, n), u)
  )
  z = lambda g: np.asarray(g.mean(axis=0) / (g.std(axis=0) / np.sqrt(n)))
  assert np.all(np.abs(z(run(jnp.zeros(2)))) < 4)
  assert np.all(np.abs(z(run(jnp.full(2, 0.1)))) > 4)


# ----- the bound


def standard(dimension=3):
  return Gaussian(np.zeros(dimension), np.ones(dimension))


@pytest.mark.parametrize("betas", [[0.7], [0.1, 0.5], np.linspace(0.02, 0.6, 8)], ids=len)
@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_bound_of_standard_normal_data_is_exact_at_any_length(betas, variance, x64):
  """Averaged over x_0 it is the entropy: 4 standard errors; the reverse chain is the forward chain's own."""
  chain, data, n = jd.ddpm.Chain(betas), standard(), 4000
  data_variance = 1.0 if variance == "optimal" else None
  loss = jd.losses.ddpm_elbo(chain, variance=variance, data_variance=data_variance, every_step=True)
  x0 = data.sample(jax.random.key(0), n)
  bound, aux = jax.jit(lambda key: loss(key, x0, exact_network(data, chain)))(jax.random.key(1))
  gap = bound + data.log_prob(x0, jd.VP(), 0.0)
  assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)
  assert gap.std() / np.sqrt(n) < 0.05
  np.testing.assert_allclose(aux["bits_per_dim"], bound / 3 / np.log(2), rtol=1e-12)
  np.testing.assert_allclose(aux["prior"] + aux["kl"] + aux["reconstruction"], aux["bits_per_dim"], rtol=1e-12)


def closed_form_gap(data, chain, variance, exact_decoder=False):
  """E bound - entropy with the exact score and the exact p_T: every expectation of the bound done by hand."""
  s2 = np.asarray(data.std) ** 2
  betas = np.asarray(chain.betas)
  bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
  total = 0.5 * np.sum(np.log((bar[-1] * s2 + 1 - bar[-1]) / (1 - bar[-1])))
  for t in range(1, chain.steps + 1):
    beta, tilde = betas[t - 1], betas[t - 1] * (1 - bar[t - 1]) / (1 - bar[t])
    left = (np.sqrt(bar[t - 1]) * beta / (1 - bar[t])) ** 2 * s2 * (1 - bar[t]) / (bar[t] * s2 + 1 - bar[t])
    step = {"beta": beta, "beta_tilde": tilde, "optimal": tilde + left.mean()}[variance]
    if t > 1:
      total += 0.5 * np.sum(np.log(step / tilde) + (tilde + left) / step - 1)
    else:
      step = betas[1] * (1 - bar[1]) / (1 - bar[2]) if variance == "beta_tilde" else step
      step = left if exact_decoder else step
      total += 0.5 * np.sum(np.log(2 * np.pi * step) + left / step)
  return total - entropy(data)


def vp_chain(steps):
  middle = (np.arange(steps) + 0.5) / steps
  return jd.ddpm.Chain(-np.expm1(-(0.1 + middle * 9.9) / steps))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "optimal"])
def test_bound_of_gaussian_data_is_its_closed_form(variance, x64):
  """With the exact score and the exact p_T the gap is known; it is positive, and least for the optimal variance."""
  data, chain, n = Gaussian(np.array([0.5, -0.3]), np.array([0.8, 0.1])), vp_chain(16), 20_000
  data_variance = data.std**2 if variance == "optimal" else None
  loss = jd.losses.ddpm_elbo(
    chain, variance=variance, data_variance=data_variance, prior=terminal(data, chain), every_step=True
  )
  x0 = data.sample(jax.random.key(0), n)
  bound, _ = jax.jit(lambda key: loss(key, x0, exact_network(data, chain)))(jax.random.key(1))
  gap = bound + data.log_prob(x0, jd.VP(), 0.0)
  expected = closed_form_gap(data, chain, variance)
  assert abs(gap.mean() - expected) < 4 * gap.std() / np.sqrt(n)
  assert gap.std() / np.sqrt(n) < max(0.2 * expected, 0.01)
  assert 0 < closed_form_gap(data, chain, "optimal") <= expected


def exact_decoder(data, chain):
  """p(x_0 | x_1) of Gaussian data."""
  alpha, sigma = chain.marginal(1)
  mean, s2 = jnp.asarray(data.mean)[None], jnp.asarray(data.std**2)[None]
  total = alpha**2 * s2 + sigma**2

  def decoder(x0, x_1):
    posterior = mean + alpha * s2 / total * (x_1 - alpha * mean)
    return decoders.gaussian_log_prob(x0, posterior, jnp.sqrt(s2 * sigma**2 / total))

  return decoder


def test_gap_of_the_bound_falls_like_one_over_the_steps(x64):
  """For N(m, 0.1^2) and variance beta, with the exact p(x_0 | x_1) as decoder; each gap is its closed form."""
  data, steps = Gaussian(np.array([0.5]), np.array([0.1])), (32, 128, 512)

  def gap(chain, n):
    x0 = data.sample(jax.random.key(0), n)
    loss = jd.losses.ddpm_elbo(
      chain, prior=terminal(data, chain), reconstruction=exact_decoder(data, chain), every_step=True
    )
    bound, _ = jax.jit(lambda key: loss(key, x0, exact_network(data, chain)))(jax.random.key(1))
    value = bound + data.log_prob(x0, jd.VP(), 0.0)
    return value.mean(), value.std() / np.sqrt(n)

  gaps, errors = np.array([gap(vp_chain(t), 20_000) for t in steps]).T
  expected = np.array([closed_form_gap(data, vp_chain(t), "beta", exact_decoder=True) for t in steps])
  assert np.all(np.abs(gaps - expected) < 4 * errors)
  assert np.all(gaps > 4 * errors)
  slopes = np.diff(np.log(expected)) / np.log(4)
  assert -1.1 < slopes[1] < -0.9


def test_bound_of_any_isotropic_gaussian_is_exact_with_the_optimal_variance(x64):
  """N(m, s^2 I) at 5 steps: the reverse kernels are Gaussian with that one variance; 4 standard errors."""
  data, chain, n = Gaussian(np.array([0.5, -2.0]), np.array([0.3, 0.3])), vp_chain(5), 20_000
  loss = jd.losses.ddpm_elbo(
    chain, variance="optimal", data_variance=0.09, prior=terminal(data, chain), every_step=True
  )
  x0 = data.sample(jax.random.key(0), n)
  bound, _ = jax.jit(lambda key: loss(key, x0, exact_network(data, chain)))(jax.random.key(1))
  gap = bound + data.log_prob(x0, jd.VP(), 0.0)
  assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)
  assert gap.std() / np.sqrt(n) < 0.01


def test_point_data_are_exact_with_beta_tilde(x64):
  """All data at one point c: eps is known, every KL is 0, and the prior KL is that to the exact p_T."""
  chain, c = doubled("short"), jnp.asarray([[0.7, -0.2]])
  sde = chain.sde()

  def network(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return (x - alpha * c) / sigma

  alpha, sigma = chain.marginal(chain.steps)
  loss = jd.losses.ddpm_elbo(chain, variance="beta_tilde", prior=(alpha * c, sigma**2), every_step=True)
  x0 = jnp.broadcast_to(c, (50, 2))
  bound, aux = loss(jax.random.key(0), x0, network)
  np.testing.assert_allclose(aux["kl"], 0, atol=1e-12)
  np.testing.assert_allclose(aux["prior"], 0, atol=1e-12)
  expected = jnp.log(2 * jnp.pi * chain.variance("beta_tilde", 2))
  np.testing.assert_allclose(bound, expected, rtol=1e-10)


@pytest.mark.parametrize("levels", [None, 9])
@pytest.mark.parametrize("variance", ["beta", "learned"])
def test_one_random_step_is_an_unbiased_estimate_of_all(variance, levels, x64):
  """z-test of one x_0 over keys."""
  chain, n = doubled("short"), 8000
  x0 = jnp.asarray([[0.4, -0.6]]) if levels is None else jnp.asarray([[6, 1]])

  def network(x, t):
    half = 0.8 * x + 0.1 * t[:, None]
    return half if variance == "beta" else jnp.concatenate([half, jnp.sin(3 * x)], axis=-1)

  def values(every_step, count):
    loss = jd.losses.ddpm_elbo(chain, variance=variance, levels=levels, every_step=every_step, stratified=False)
    x = jnp.broadcast_to(x0, (count, 2))
    return jax.jit(lambda key: loss(key, x, network))(jax.random.key(count))

  (one, one_aux), (every, every_aux) = values(False, n), values(True, n // 4)
  for a, b in [(one, every)] + [(one_aux[name], every_aux[name]) for name in ("kl", "reconstruction")]:
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 4 * error
    assert error < 0.1 * abs(b.mean()) + 0.02
  np.testing.assert_allclose(one_aux["prior"][0], every_aux["prior"][0], rtol=1e-12)


def test_bound_on_integers_is_a_bound_on_their_probability(x64):
  """Data uniform on the 9 images of 2 pixels and 3 levels: at least log 9 in the mean, and near it for many steps.

  Such data are points, so beta~ is the variance to take.
  """
  images = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), axis=-1).reshape(9, 2)
  points = decoders.integer_values(images, 3)
  chain = jd.ddpm.Chain(jd.ddpm.cosine_betas(200))
  sde = chain.sde()

  def network(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    weight = jax.nn.softmax(
      -0.5 * jnp.sum(((x[:, None] - alpha[..., None] * points[None]) / sigma[..., None]) ** 2, -1)
    )
    return (x - alpha * (weight @ points)) / sigma

  loss = jd.losses.ddpm_elbo(chain, variance="beta_tilde", levels=3, every_step=True)
  bound, _ = jax.jit(lambda key: loss(key, jnp.tile(images, (30, 1)), network))(jax.random.key(0))
  error = bound.std() / np.sqrt(len(bound))
  assert np.log(9) - 4 * error < bound.mean() < np.log(9) + 0.15


def test_bound_uses_every_step_as_often_as_it_says():
  calls = []

  def network(x, t):
    jax.debug.callback(lambda: calls.append(1))
    return x

  chain, x0 = CHAINS["short"], jnp.zeros((2, 2))
  for every_step, expected in ((True, 8), (False, 1)):
    calls.clear()
    jax.block_until_ready(jd.losses.ddpm_elbo(chain, every_step=every_step)(jax.random.key(0), x0, network))
    jax.effects_barrier()
    assert len(calls) == expected


@pytest.mark.parametrize("every_step", [True, False])
def test_bound_has_a_gradient_for_the_betas(every_step, x64):
  """Against central differences with the same noise: a learned schedule is a chain that is trained."""
  x0, betas = gaussian().sample(jax.random.key(0), 16), doubled("short").betas

  @jax.jit
  def bound(betas):
    loss = jd.losses.ddpm_elbo(jd.ddpm.Chain(betas), variance="optimal", data_variance=0.3, every_step=every_step)
    return loss(jax.random.key(1), x0, lambda x, t: 0.8 * x)[0].mean()

  gradient = jax.grad(bound)(betas)
  for i in (0, 3, 7):
    difference = (bound(betas.at[i].add(1e-6)) - bound(betas.at[i].add(-1e-6))) / 2e-6
    np.testing.assert_allclose(gradient[i], difference, rtol=1e-5)


# ----- the hybrid


def learned_network(params):
  def network(x, t):
    return jnp.concatenate([params["mean"] * x, params["v"] * jnp.cos(x)], axis=-1)

  return network


@pytest.mark.parametrize("levels", [None, 9])
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(levels, x64):
  chain, key, weight = doubled("short"), jax.random.key(0), 0.01
  x = jnp.tile(jnp.arange(8)[:, None], (4, 2)) if levels else gaussian().sample(jax.random.key(1), 32)
  x0 = decoders.integer_values(x, levels) if levels else x
  params = {"mean": jnp.asarray(0.7), "v": jnp.asarray(-0.4)}
  gradient = lambda loss, x: jax.grad(lambda p: loss(key, x, learned_network(p))[0].sum())(params)
  hybrid = gradient(jd.losses.ddpm_hybrid(chain, levels=levels, weight=weight), x)
  bound = gradient(jd.losses.ddpm_elbo(chain, variance="learned", levels=levels), x)
  simple = jax.grad(lambda m: jd.losses.ddpm_simple(chain)(key, x0, lambda x, t: m * x)[0].sum())(params["mean"])
  np.testing.assert_allclose(hybrid["mean"], simple, rtol=1e-10)
  np.testing.assert_allclose(hybrid["v"], weight * bound["v"], rtol=1e-10)
  assert bound["mean"] != 0
  assert hybrid["v"] != 0


def test_hybrid_is_the_sum_of_its_parts_in_one_evaluation(x64):
  chain, key, x0, calls = doubled("short"), jax.random.key(0), gaussian().sample(jax.random.key(1), 8), []
  network = learned_network({"mean": 0.7, "v": -0.4})

  def counted(x, t):
    calls.append(1)
    return network(x, t)

  hybrid, aux = jd.losses.ddpm_hybrid(chain, weight=0.02)(key, x0, counted)
  assert len(calls) == 1
  bound, bound_aux = jd.losses.ddpm_elbo(chain, variance="learned")(key, x0, network)
  simple, simple_aux = jd.losses.ddpm_simple(chain)(key, x0, lambda x, t: 0.7 * x)
  np.testing.assert_allclose(hybrid, simple + 0.02 * bound, rtol=1e-10)
  for name, value in {**bound_aux, **simple_aux}.items():
    np.testing.assert_allclose(aux[name], value, rtol=1e-12)


def test_learned_variance_reaches_the_optimal_one(x64):
  """Gradient descent on v alone, with the exact mean: s^2 at the last step becomes `optimal_variance`."""
  data, chain = Gaussian(np.zeros(1), np.full(1, 0.6)), jd.ddpm.Chain([0.3, 0.5])
  exact, x0 = exact_network(data, chain), data.sample(jax.random.key(0), 20_000)
  best = (jnp.log(chain.optimal_variance(2, 0.36)) - jnp.log(chain.variance("beta_tilde", 2))) / (
    jnp.log(chain.variance("beta", 2)) - jnp.log(chain.variance("beta_tilde", 2))
  )

  def each(v):
    network = lambda x, t: jnp.concatenate([exact(x, t), jnp.full_like(x, 2 * v - 1)], axis=-1)
    loss = jd.losses.ddpm_elbo(chain, variance="learned")
    return loss(jax.random.key(1), x0, network, u=jnp.full(len(x0), 0.75))[0]

  z = lambda v: (lambda g: g.mean() / (g.std() / np.sqrt(len(g))))(jax.jacfwd(each)(v))
  assert abs(z(best)) < 4
  assert z(best - 0.1) < -4
  assert z(best + 0.1) > 4


# ----- all of them

LOSSES = {
  "simple": (lambda chain: jd.losses.ddpm_simple(chain), 1, None),
  "elbo": (lambda chain: jd.losses.ddpm_elbo(chain, levels=17), 1, 17),
  "optimal": (lambda chain: jd.losses.ddpm_elbo(chain, variance="optimal", data_variance=0.2), 1, None),
  "learned": (lambda chain: jd.losses.ddpm_elbo(chain, variance="learned"), 2, None),
  "every_step": (lambda chain: jd.losses.ddpm_elbo(chain, variance="beta_tilde", levels=17, every_step=True), 1, 17),
  "hybrid": (lambda chain: jd.losses.ddpm_hybrid(chain, levels=17), 2, 17),
}


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_networks_leave_the_rest_single(name):
  """Under jit, with a chain that is traced, for the published 1000 steps or one; values and gradients are finite."""
  make, parts, levels = LOSSES[name]
  x = jnp.arange(8)[:, None] * jnp.ones((1, 3), int) if levels else gaussian().sample(jax.random.key(0), 8)

  def mean(scale, chain):
    network = lambda x, t: jnp.tile(scale.astype(jnp.bfloat16) * x.astype(jnp.bfloat16), (1, parts))
    value, aux = make(chain)(jax.random.key(1), x, network)
    assert value.dtype == jnp.float32
    assert {v.dtype for v in aux.values()} == {jnp.dtype("float32")}
    assert value.shape == (8,)
    return value.mean()

  for chain in (CHAINS["linear"], CHAINS["one"]):
    value, gradient = jax.jit(jax.value_and_grad(mean))(jnp.float32(0.9), chain)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_values_belong_to_the_example_and_conditions_reach_the_network(name):
  make, parts, levels = LOSSES[name]
  x = jnp.arange(6)[:, None] * jnp.ones((1, 3), int) if levels else gaussian().sample(jax.random.key(0), 6)
  u = None if name == "every_step" else jnp.linspace(0.0, 0.95, 6)
  cond = {"label": jnp.linspace(0.0, 0.5, 6)}
  network = lambda x, t, label: jnp.tile(label[:, None] * x, (1, parts))
  loss = jax.jit(lambda key, x, cond, u: make(CHAINS["short"])(key, x, network, cond, u)[0])
  whole = loss(jax.random.key(1), x, cond, u)
  tail = loss(
    jd.example_keys(jax.random.key(1), 4, 2), x[4:], {"label": cond["label"][4:]}, None if u is None else u[4:]
  )
  np.testing.assert_allclose(whole[4:], tail, rtol=1e-5)
  one = lambda key, x, label, u: loss(key[None], x[None], {"label": label[None]}, None if u is None else u[None])[0]
  singly = jax.vmap(one, in_axes=(0, 0, 0, None if u is None else 0))
  np.testing.assert_allclose(whole, singly(jd.example_keys(jax.random.key(1), 0, 6), x, cond["label"], u), rtol=1e-5)
  changed = loss(jax.random.key(1), x, {"label": cond["label"] + 0.1}, u)
  assert jnp.all(changed != whole)


def test_wrong_chains_are_refused(untyped):
  with pytest.raises(ValueError, match=r"pass betas\[::-1\]"):
    jd.ddpm.Chain(jd.ddpm.linear_betas()[::-1])
  for betas in ([0.1, 1.0], [0.0, 0.1], [np.nan, 0.1]):
    with pytest.raises(ValueError, match="between 0 and 1"):
      jd.ddpm.Chain(betas)
  for betas in (np.full((2, 2), 0.1), [], 0.1):
    with pytest.raises(ValueError, match=r"shape \[T\]"):
      jd.ddpm.Chain(betas)
  for make in (jd.ddpm.linear_betas, jd.ddpm.cosine_betas):
    with pytest.raises(ValueError, match="steps must be at least 1"):
      make(0)
  chain = CHAINS["short"]
  with pytest.raises(ValueError, match=r"must lie in 0..8, got 9"):
    chain.marginal(9)
  with pytest.raises(TypeError, match="the step must be an integer"):
    chain.marginal(jnp.asarray([0.5]))
  for method in (
    lambda t: chain.marginal(t)[0],
    lambda t: chain.variance("beta", t),
    lambda t: chain.time(t) * chain.optimal_variance(t, 0.5),
  ):
    np.testing.assert_array_equal(jnp.isnan(method(jnp.asarray([-1, 9, 3]))), [True, True, False])
  with pytest.raises(ValueError, match=r"a reverse step must start at 1..8: 0 is the data"):
    chain.variance("beta", 0)
  assert jnp.isnan(chain.interpolated_log_variance(jnp.float32(0.5), jnp.int32(0)))
  with pytest.raises(ValueError, match="kind must be 'beta' or 'beta_tilde', got 'gamma'"):
    chain.variance("gamma", 1)
  with pytest.raises(ValueError, match="must not be negative"):
    chain.optimal_variance(1, -0.5)


def test_wrong_use_of_the_losses_is_refused(untyped):
  chain, key, x, integers = CHAINS["short"], jax.random.key(0), jnp.zeros((2, 3)), jnp.zeros((2, 3), int)
  same = lambda x, t: x
  with pytest.raises(ValueError, match="first must be 1 or 2"):
    jd.losses.ddpm_simple(chain, first=3)
  with pytest.raises(ValueError, match="first must be 1 or 2 and a step of the chain, which has 1"):
    jd.losses.ddpm_simple(CHAINS["one"], first=2)
  with pytest.raises(ValueError, match="variance must be 'beta'"):
    jd.losses.ddpm_elbo(chain, variance="gamma")
  with pytest.raises(ValueError, match="needs data_variance"):
    jd.losses.ddpm_elbo(chain, variance="optimal")
  with pytest.raises(ValueError, match="and no other, needs data_variance"):
    jd.losses.ddpm_elbo(chain, data_variance=1.0)
  with pytest.raises(ValueError, match="weight must be positive"):
    jd.losses.ddpm_hybrid(chain, weight=0.0)
  with pytest.raises(ValueError, match=r"2 times the channels of x, \(2, 6\); got \(2, 3\)"):
    jd.losses.ddpm_hybrid(chain)(key, x, same)
  with pytest.raises(ValueError, match="every_step=True sums all"):
    jd.losses.ddpm_elbo(chain, every_step=True)(key, x, same, u=jnp.zeros(2))
  for loss in (jd.losses.ddpm_simple(chain), jd.losses.ddpm_elbo(chain)):
    with pytest.raises(TypeError, match="x0 must be floating point, got int32"):
      loss(key, integers, same)
  with pytest.raises(TypeError, match="pass the raw integers"):
    jd.losses.ddpm_elbo(chain, levels=17)(key, x, same)
