"""Critically-damped Langevin diffusion: its kernel against matrix exponentials, its score, its loss."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from phase import PhaseGaussian, kernel, matrices, phase_gaussian

import jaxdiff as jd
from jaxdiff.losses import times, weights
from jaxdiff.models import MLP, UNet

SDES = [jd.CLD(), jd.CLD(beta=2.0, mass=0.6, gamma=0.5), jd.CLD(beta=9.0, mass=1.7, gamma=1.3)]
EACH_SDE = pytest.mark.parametrize("sde", SDES, ids=lambda sde: f"M={sde.mass}")
TIMES = (1e-6, 1e-3, 0.05, 0.1249, 0.1251, 0.4, 1.0)


def covariance(root):
  root = np.asarray(root)
  return root @ np.swapaxes(root, -1, -2)


def exact_root(sde, t, gamma):
  """L of the covariance by its formulas in 60 digits, for numbers as floats have them."""
  with localcontext(prec=60):
    beta, mass, t, gamma = (Decimal(float(v)) for v in (sde.beta, sde.mass, t, gamma))
    tau = beta * t / mass.sqrt()
    z, decay = 2 * tau, (-2 * tau).exp()
    xx = 1 - decay * (1 + z + z * z / 2) + gamma * decay * tau**2
    xv = decay * z * z / 2 + gamma * decay * tau * (1 - tau)
    vv = 1 - decay * (1 - z + z * z / 2) + gamma * decay * (1 - tau) ** 2
    root = mass.sqrt()
    return [float(v) for v in (xx.sqrt(), root * xv / xx.sqrt(), root * (vv - xv * xv / xx).sqrt())]


@jax.jit
def kernels(sde, t):
  """(A, L) from 0 and from 0.3, and (m, L) given the position, at all times t."""
  return [jax.vmap(lambda t, s=s: sde.transition(s + t, s))(t) for s in (0.0, 0.3)], sde.given_position(t)


@EACH_SDE
def test_the_kernel_is_that_of_the_matrix_exponential(sde, x64):
  """1e-8 of the largest entry; from a time s > 0 too, and given x_0 with the velocity marginalized."""
  transitions, (means, roots) = jax.tree.map(np.asarray, kernels(sde, np.array(TIMES)))
  for k, t in enumerate(TIMES):
    phi, noise = kernel(sde, t)
    for matrix, root in transitions:
      np.testing.assert_allclose(matrix[k], phi, atol=1e-8)
      np.testing.assert_allclose(covariance(root[k]), noise, atol=1e-8 * np.abs(noise).max())
    np.testing.assert_allclose(means[k], phi[:, 0], atol=1e-8)
    marginal = noise + sde.gamma * sde.mass * np.outer(phi[:, 1], phi[:, 1])
    np.testing.assert_allclose(covariance(roots[k]), marginal, rtol=1e-8, atol=1e-8 * np.abs(noise).max() + 1e-16)


def test_the_kernel_solves_the_moment_equations_of_drift_and_diffusion(x64):
  """dm/dt = A m, dC/dt = A C + C A^T + Q with A and Q read off the process, integrated to 1e-10."""
  sde = SDES[1]
  drift, noise = matrices(sde)

  def slope(t, y):
    mean, cov = y[:2], y[2:].reshape(2, 2)
    return np.concatenate([drift @ mean, (drift @ cov + cov @ drift.T + noise).ravel()])

  start = np.array([1.0, 0.0, 0.0, 0.0, 0.0, sde.velocity_std**2])
  at = np.array([1e-3, 0.2, 1.0])
  path = scipy.integrate.solve_ivp(slope, (0.0, 1.0), start, "DOP853", at, rtol=1e-12, atol=1e-13).y.T
  mean, root = sde.given_position(jnp.asarray(at))
  np.testing.assert_allclose(mean, path[:, :2], atol=1e-8)
  np.testing.assert_allclose(covariance(root).reshape(-1, 4), path[:, 2:], atol=1e-8)


@EACH_SDE
def test_the_kernel_has_all_digits_of_single_precision(sde):
  """Every entry of L to 1e-6 of itself at t = 1e-6 and around the ends of the series, 2e-7 to 8e-7 of rounding."""
  ((_, conditional), _), (_, marginal) = jax.tree.map(np.asarray, kernels(sde, np.float32(TIMES)))
  for k, t in enumerate(np.float32(TIMES)):
    for gamma, root in ((0.0, conditional[k]), (sde.gamma, marginal[k])):
      found = np.asarray([root[0, 0], root[1, 0], root[1, 1]])
      np.testing.assert_allclose(found, exact_root(sde, t, np.float32(gamma)), rtol=1e-6)
      assert found[0] * found[2] > 0


def test_at_the_start_nothing_is_noised_but_the_velocity():
  sde = jd.CLD()
  gradient = jax.vmap(jax.grad(lambda t: jnp.sum(sde.given_position(t)[1])))
  run = jax.jit(lambda t: (sde.given_position(0.0)[1], sde.transition(0.0)[1], gradient(t)))
  marginal, conditional, slopes = run(np.float32([1e-6, 0.125, 1.0]))
  np.testing.assert_allclose(covariance(marginal), np.diag([0, sde.gamma * sde.mass]), rtol=1e-5)
  np.testing.assert_array_equal(covariance(conditional), 0)
  assert np.all(np.isfinite(slopes))


def test_critical_damping_and_the_prior(x64):
  """One eigenvalue, double; the prior is kept; its density is scipy's; its samples have its moments."""
  sde = SDES[1]
  drift, noise = matrices(sde)
  np.testing.assert_allclose(np.trace(drift) ** 2, 4 * np.linalg.det(drift), rtol=1e-12)
  prior = np.diag([1.0, sde.mass])
  np.testing.assert_allclose(drift @ prior + prior @ drift.T + noise, 0, atol=1e-12)
  z = np.random.default_rng(0).normal(size=(4, 3, 2))
  normal = scipy.stats.norm(scale=[1.0, sde.mass**0.5])
  np.testing.assert_allclose(sde.prior_log_prob(jnp.asarray(z)), normal.logpdf(z).sum(axis=(1, 2)), rtol=1e-12)
  u = sde.prior_sample(jax.random.key(0), (4000, 3, 2)).reshape(-1, 2)
  np.testing.assert_allclose(u.mean(axis=0), 0, atol=4 / np.sqrt(12_000))
  np.testing.assert_allclose(u.var(axis=0), np.diag(prior), rtol=4 * np.sqrt(2 / 12_000))


@EACH_SDE
def test_a_step_back_is_the_time_reversal_at_the_prior(sde, x64):
  """u_s | u_t has the matrix P A^T P^-1 and the covariance that keeps P, with A that of u_t | u_s."""
  t, s, prior = 0.45, 0.4, np.diag([1.0, sde.mass])
  unit, none = jnp.eye(2)[:, None], jnp.zeros((2, 1, 2))
  back = np.asarray(sde.step_back(unit, t, s, none))[:, 0].T
  noise = np.asarray(sde.step_back(none, t, s, unit))[:, 0].T
  forward = kernel(sde, t - s)[0]
  np.testing.assert_allclose(back, prior @ forward.T @ np.linalg.inv(prior), atol=1e-9)
  np.testing.assert_allclose(back @ prior @ back.T + noise @ noise.T, prior, atol=1e-9)


def test_perturbed_data_have_the_moments_of_the_kernel():
  """16 000 numbers, 4 standard errors; the same example in any batch; eps is what it says."""
  sde, x0, t = jd.CLD(gamma=0.5), np.broadcast_to(np.float32([1.0, -0.5]), (8000, 2)), 0.1
  run = jax.jit(lambda key: (jd.cld.perturb(key, x0, t, sde), sde.given_position(t)))
  keys = jd.example_keys(jax.random.key(0), 0, 8000)
  (u, noise), (mean, root) = jax.tree.map(np.asarray, run(keys))
  cov = root @ root.T
  away = (u - mean * x0[..., None]).reshape(-1, 2)
  assert np.all(np.abs(away.mean(axis=0)) < 4 * np.sqrt(np.diag(cov) / 16_000))
  error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 16_000)
  assert np.all(np.abs(np.cov(away.T) - cov) < 4 * error)
  np.testing.assert_allclose(away, noise.reshape(-1, 2) @ root.T, atol=1e-5)
  (moved, _), _ = run(keys[::-1])
  np.testing.assert_allclose(np.asarray(moved)[::-1], u, rtol=1e-6)


def test_times_are_those_of_the_noise_of_positions():
  """2e-3 of the weight of x_0 for samplers; grids decrease from t1 to t0, evenly in t or its root."""
  sde = jd.CLD()
  for kind, power in (("uniform", 1.0), ("quadratic", 0.5)):
    ts = np.asarray(jd.cld.time_grid(sde, 10, kind))
    np.testing.assert_allclose(np.diff(ts**power), np.diff(ts**power)[0], rtol=1e-3)
    mean, root = sde.given_position(ts[-1])
    np.testing.assert_allclose(root[0, 0] / mean[0], 2e-3, rtol=1e-5)
    assert ts[0] == sde.t1
  assert jd.cld.time_grid(sde, 3, t0=0.25)[-1] == 0.25


def linear_noise(data, sde):
  """The exact e of Gaussian data, as a network."""

  def network(u, t):
    return -data.score(sde)(u, t)[..., 1] * sde.given_position(t)[1][:, None, 1, 1]

  return network


@pytest.mark.parametrize("mixed", [False, True])
def test_the_score_of_velocities_and_the_denoiser_are_exact(mixed, x64):
  """A network that says what is missing to the exact noise; E[x_0 | u_t] by conditioning the joint Gaussian."""
  sde, data = SDES[1], phase_gaussian()
  exact, normal = (linear_noise(d, sde) for d in (data, PhaseGaussian(np.zeros(3), np.ones(3))))
  score = jd.cld.score_fn(lambda _, u, t: exact(u, t) - (normal(u, t) if mixed else 0), None, sde, mixed)
  t = np.array([1e-3, 0.1, 0.4, 1.0])

  @jax.jit
  def run(key):
    u, _ = jd.cld.perturb(key, data.sample(key, 4), jnp.asarray(t), sde)
    drifts = [jd.reverse(sde, s, 0.7)[0](u, jnp.asarray(t)) for s in (data.score(sde), score)]
    of_score = score(u, jnp.asarray(t)), score.denoised(u, jnp.asarray(t)), data.score(sde)(u, jnp.asarray(t))
    return u, of_score, data.moments(sde, jnp.asarray(t)), sde.given_position(jnp.asarray(t))[0], drifts

  u, (value, denoised, exact_score), (mean, cov), weight, (full, half) = jax.tree.map(
    np.asarray, run(jax.random.key(0))
  )
  np.testing.assert_allclose(value[..., 1], exact_score[..., 1], rtol=1e-7)
  np.testing.assert_array_equal(value[..., 0], 0)
  gain = np.linalg.solve(cov, (u - mean)[..., None])[..., 0]
  expected = data.mean + data.std**2 * np.sum(weight[:, None] * gain, axis=-1)
  np.testing.assert_allclose(denoised, expected, rtol=1e-6)
  np.testing.assert_allclose(half, full, rtol=1e-7)  # G G^T asks for no score of positions


@EACH_SDE
def test_mixed_without_a_network_is_exact_for_normal_data(sde):
  """In single precision, from t = 1e-6 on: to 1e-4 of the numbers that it is a difference of."""
  score = jd.cld.score_fn(lambda _, u, t: jnp.zeros_like(u[..., 0]), None, sde)
  x, t = np.random.default_rng(0).normal(size=(len(TIMES), 50)).astype(np.float32), np.float32(TIMES)

  @jax.jit
  def run(x, t):
    u, _ = jd.cld.perturb(jax.random.key(0), x, t, sde)
    return u, score(u, t)

  u, found = jax.tree.map(np.asarray, run(x, t))
  with jax.enable_x64(True):
    wide = jd.CLD(*(float(np.float32(v)) for v in (sde.beta, sde.mass, sde.gamma)))
    exact = jax.jit(PhaseGaussian(np.zeros(50), np.ones(50)).score(wide))(u.astype(float), t.astype(float))
  np.testing.assert_allclose(found[..., 1], exact[..., 1], rtol=1e-4, atol=1e-4)


def gradients(loss, network_at, tilts, x0):
  """d loss_i / d tilt, [n, len(tilt)], at each of the tilts; each example with its own key and time."""

  def one(tilt, key, x, u):
    return jnp.sum(loss(key[None], x[None], lambda u, t: network_at(tilt, u, t), u=u[None])[0])

  keys, u = (
    jd.example_keys(jax.random.key(0), 0, len(x0)),
    np.linspace(0.0, 1.0, len(x0), endpoint=False, dtype=np.float32),
  )
  run = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0)))
  return [np.asarray(run(tilt, keys, x0, u)) for tilt in tilts]


@pytest.mark.parametrize(
  ("mixed", "weight"), [(False, weights.noise()), (True, weights.velocity_likelihood())], ids=["noise", "likelihood"]
)
def test_the_minimizer_of_hybrid_score_matching_is_the_score(mixed, weight):
  """Gradients of scales of position and velocity and a shift: 0 within 4 standard errors there, not so 10% away."""
  sde, data = SDES[1], PhaseGaussian(np.array([0.5, -0.5]), np.array([0.6, 1.0]))
  exact, normal = (linear_noise(d, sde) for d in (data, PhaseGaussian(np.zeros(2), np.ones(2))))

  def network(tilt, u, t):
    value = exact(u, t) + tilt[0] * u[..., 1] + tilt[1] * u[..., 0] + tilt[2]
    return value - normal(u, t) if mixed else value

  loss = jd.losses.hybrid(sde, mixed, weight, t0=0.01)
  x0 = (data.mean + data.std * np.random.default_rng(1).normal(size=(10_000, 2))).astype(np.float32)
  at, away = gradients(loss, network, (np.zeros(3, np.float32), np.full(3, 0.1, np.float32)), x0)
  z = lambda values: np.abs(values.mean(axis=0) / (values.std(axis=0) / np.sqrt(len(values))))
  assert np.all(z(at) < 4), z(at)
  assert np.all(z(away) > 4), z(away)


def test_the_likelihood_weight_is_that_of_the_squared_diffusion_on_the_score():
  sde, t = SDES[1], jnp.asarray([0.01, 0.3, 1.0])
  expected = 2 * sde.friction * sde.beta / sde.given_position(t)[1][:, 1, 1] ** 2
  np.testing.assert_allclose(weights.velocity_likelihood()(sde, t), expected, rtol=1e-6)
  options = {"t0": 0.01, "time": times.fixed(0.3)}
  x0, network = jnp.ones((4, 2)), lambda u, t: 0 * u[..., 0]
  plain, weighted = (
    jd.losses.hybrid(sde, weight=w, **options)(jax.random.key(0), x0, network)
    for w in (weights.noise(), weights.velocity_likelihood())
  )
  np.testing.assert_allclose(weighted[0], plain[0] * expected[1], rtol=1e-5)
  np.testing.assert_allclose(plain[0], 0.5 * 2 * plain[1]["noise_error"], rtol=1e-6)
  np.testing.assert_allclose(plain[1]["t"], 0.3)


@pytest.mark.standard_promotion
def test_networks_see_positions_and_velocities_on_channels():
  """The output is the velocity's half, and depends on both; one trace for all parameters and numbers."""
  model, traces = MLP(8, 1), []
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 6)), jnp.zeros(2))
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), shapes)

  @jax.jit
  def value(params, beta, key, x0):
    traces.append(1)
    sde, apply = jd.CLD(beta=beta), jd.cld.on_channels(model.apply)
    u, _ = jd.cld.perturb(key, x0, 0.5, sde)
    loss, _ = jd.losses.hybrid(sde, t0=0.01)(key, x0, lambda u, t: apply(params, u, t))
    whole = model.apply(params, jnp.concatenate(jd.cld.split(u), axis=-1), jnp.full(2, 0.5))
    score = jd.cld.score_fn(apply, params, sde, mixed=False)(u, 0.5)
    return loss, score, -whole[:, 3:] / sde.given_position(0.5)[1][1, 1]

  for beta in (4.0, 3.0):
    loss, score, expected = value(
      params, jnp.float32(beta), jax.random.key(0), jax.random.normal(jax.random.key(0), (2, 3))
    )
    np.testing.assert_allclose(score[..., 1], expected, rtol=1e-4)
  assert loss.shape == (2,)
  assert len(traces) == 1
  assert jd.cld.on_channels(model.apply) == jd.cld.on_channels(model.apply)  # so that scores of it compile once


@pytest.mark.standard_promotion
def test_a_unet_of_twice_the_channels_is_such_a_network():
  net, u, t = UNet(channels=8, channel_multipliers=(1,), blocks=1), jnp.zeros((2, 4, 4, 3, 2)), jnp.zeros(2)
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((2, 4, 4, 6)), t)
  assert jax.eval_shape(jd.cld.on_channels(net.apply), params, u, t).shape == (2, 4, 4, 3)


def test_a_pytree_that_is_traced_once_and_has_gradients():
  traces = []

  @jax.jit
  def total(sde, u):
    traces.append(1)
    return jnp.sum(sde.drift(u, 0.5) ** 2 + sde.diffuse(0.5, u)) + jnp.sum(sde.given_position(0.2)[1])

  u = jnp.ones((2, 3, 2))
  values = [total(jd.CLD(beta), u) for beta in (3.0, 4.0)]
  assert values[0] != values[1]
  assert len(traces) == 1
  slope = jax.grad(lambda beta: total(jd.CLD(beta), u))(4.0)
  np.testing.assert_allclose(slope, (total(jd.CLD(4.01), u) - total(jd.CLD(3.99), u)) / 0.02, rtol=2e-2)


SDE = jd.CLD()


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: jd.CLD(mass=0.0), ValueError, "CLD needs positive, finite numbers beta, mass and gamma, got CLD"),
    (lambda: jd.CLD(gamma=-1.0), ValueError, "positive, finite"),
    (lambda: jd.CLD(beta=float("nan")), ValueError, "positive, finite"),
    (lambda: SDE.drift(jnp.ones((4, 3)), 0.5), ValueError, r"u must be \[b, \*d, 2\].*got \(4, 3\): data become a st"),
    (lambda: SDE.diffuse(0.5, jnp.ones((4, 2))), ValueError, r"on the last axis, got \(4, 2\)"),
    (lambda: SDE.prior_sample(jax.random.key(0), (4, 3)), ValueError, r"samples must be \[b, \*d, 2\].*got \(4, 3\)"),
    (lambda: SDE.prior_log_prob(jnp.ones((4, 3))), ValueError, r"u must be \[b, \*d, 2\]"),
    (
      lambda: jd.cld.perturb(jax.random.key(0), jnp.ones(4), 0.5, SDE),
      ValueError,
      r"x0 must be \[b, \*d\] with an axis of data",
    ),
    (
      lambda: jd.cld.perturb(jax.random.key(0), jnp.ones((4, 1), int), 0.5, SDE),
      TypeError,
      "x0 must be floating point",
    ),
    (lambda: jd.cld.time_grid(SDE, 0), ValueError, "steps must be at least 1"),
    (lambda: jd.cld.time_grid(SDE, 4, "log_snr"), ValueError, "kind must be one of 'uniform', 'quadratic'"),
    (lambda: jd.cld.time_grid(SDE, 4, t0=0.0), ValueError, r"t0 must lie in \(0, t1\) .*no score at 0"),
    (lambda: jd.cld.time_grid(jd.VP(), 4), TypeError, "sde must be a AugmentedSDE, got VP, which lacks given_position"),
    (lambda: jd.cld.time_grid(jd.CLD(beta=1e-4), 4), ValueError, "positions are not noised by a part 0.002 before t1"),
    (lambda: jd.cld.score_fn(lambda p, u, t: u, None, SDE)(jnp.ones((1, 3, 2)), 0.5), ValueError, "shape of x"),
    (lambda: jd.cld.on_channels(lambda p, x, t: x[..., :1])(0, jnp.ones((1, 3, 2)), 0), ValueError, r"\(1, 6\)"),
    (lambda: jd.losses.hybrid(jd.VP()), TypeError, "which lacks given_position, velocity_std"),
    (lambda: jd.losses.hybrid(jd.CLD), TypeError, r"did you forget to call it: CLD\(\)"),
    (
      lambda: jd.losses.hybrid(SDE, time=times.importance())(
        jax.random.key(0), jnp.ones((4, 2)), lambda u, t: u[..., 0]
      ),
      TypeError,
      "sde must be a ScalarSDE, got CLD, which lacks diffusion, marginal, time_of_log_snr: this needs scalar marginals",
    ),
    (lambda: jd.time_grid(SDE, 4), TypeError, "sde must be a process with scalar marginals, got CLD"),
    (lambda: jd.losses.denoising(SDE, jd.predictions.noise()), TypeError, "got CLD, which lacks diffusion, marginal"),
    (lambda: jd.samplers.ddim(SDE, jnp.array([1.0, 0.5])), TypeError, "got CLD.*scalar marginals.*reverse_sde"),
    (lambda: jd.samplers.probability_flow(SDE), TypeError, "got CLD.*flow.cnf"),
    (lambda: jd.likelihood.log_prob(SDE), TypeError, "got CLD.*scalar marginals"),
    (lambda: jd.samplers.reverse_sde(SDE, jnp.array([1.0, 0.5]), denoise=True), TypeError, "got CLD.*scalar marginals"),
  ],
)
def test_bad_input_is_refused(call, error, message, untyped):
  with pytest.raises(error, match=message):
    call()
