import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import likelihood, ode
from jaxdiff.divergence import bases
from jaxdiff.schedules import start_time

MATRIX = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
ROTATION = np.linalg.qr(np.random.default_rng(5).normal(size=(5, 5)))[0].astype(np.float32)
SYMMETRIC = (MATRIX + MATRIX.T) / 2


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def keys(seed, count):
  return jd.example_keys(jax.random.key(seed), 0, count)


def estimated(divergence, f):
  """A jitted function of (keys of the probes, x): the value of f, and the estimates of its trace."""
  return jax.jit(lambda key, x: divergence.estimate(f, x, divergence.draw(key, x), jnp.zeros(())))


def linear(x):
  return x @ MATRIX.T.astype(x.dtype)


def test_exact_trace_of_a_linear_map_and_of_a_curved_one():
  x, curved = normal(1, (3, 5)), lambda x: jnp.sin(x) * x[:, ::-1]

  @jax.jit
  def run(x):
    traces = [jd.divergence.exact().estimate(f, x, None, jnp.zeros(())) for f in (linear, curved)]
    return *traces, linear(x), jax.vmap(lambda x: jnp.trace(jax.jacfwd(lambda x: curved(x[None])[0])(x)))(x)

  (value, trace), (_, of_curved), mapped, expected = run(x)
  np.testing.assert_array_equal(value, mapped)
  np.testing.assert_allclose(trace, np.full((3, 1), np.trace(MATRIX)), rtol=1e-6)
  np.testing.assert_allclose(np.asarray(of_curved)[:, 0], expected, rtol=1e-5)


def test_exact_trace_in_chunks():
  """130 dimensions take three chunks of 64."""
  x = np.linspace(0.1, 1.0, 260, dtype=np.float32).reshape(2, 10, 13)
  _, trace = jax.jit(lambda x: jd.divergence.exact().estimate(lambda x: x**3, x, None, jnp.zeros(())))(x)
  np.testing.assert_allclose(np.asarray(trace)[:, 0], np.sum(3 * x**2, axis=(1, 2)), rtol=1e-5)


def off_diagonal(s):
  return 2 * (np.sum(s**2) - np.sum(np.diag(s) ** 2))


@pytest.mark.parametrize(
  ("noise", "basis", "variance"),
  [
    ("rademacher", None, off_diagonal(SYMMETRIC)),
    ("rademacher", ROTATION, off_diagonal(ROTATION.T @ SYMMETRIC @ ROTATION)),
    ("gaussian", None, 2 * np.sum(SYMMETRIC**2)),
    ("sphere", None, 2 * 5 / 7 * (np.sum(SYMMETRIC**2) - np.trace(SYMMETRIC) ** 2 / 5)),
  ],
  ids=["rademacher", "rotated", "gaussian", "sphere"],
)
def test_hutchinson_is_unbiased_with_the_known_variance(noise, basis, variance):
  """Only the symmetric part counts; mean within 4 standard errors, variance within 15% over 4000 keys."""
  probes, n = 3, 4000
  divergence = jd.divergence.hutchinson(probes, noise, basis)
  estimates = np.asarray(estimated(divergence, linear)(keys(2, n), np.zeros((n, 5), np.float32))[1])
  assert estimates.shape == (n, probes)
  means = estimates.mean(axis=1)
  assert abs(means.mean() - np.trace(MATRIX)) < 4 * np.sqrt(variance / probes / n)
  np.testing.assert_allclose(means.var() * probes, variance, rtol=0.15)
  claimed = np.asarray(jax.jit(divergence.standard_error)(estimates))
  np.testing.assert_allclose(np.mean(claimed**2), variance / probes, rtol=0.15)


def test_rademacher_probes_in_the_eigenbasis_are_exact():
  divergence = jd.divergence.hutchinson(2, basis=np.linalg.eigh(SYMMETRIC)[1])
  _, estimates = estimated(divergence, linear)(keys(0, 8), np.zeros((8, 5), np.float32))
  np.testing.assert_allclose(estimates, np.trace(MATRIX), atol=2e-5)


@pytest.mark.parametrize(
  ("shape", "basis"), [((4, 6, 3), bases.DCT), ((5, 4), bases.DCT), ((4, 6, 3), bases.COLOR_DCT)]
)
def test_dct_is_the_orthonormal_matrix_of_its_formula(shape, basis):
  """Per channel, or along the channels, too; in float32 to a few roundings, under jit and vmap."""
  cosines = lambda n: (
    np.sqrt(np.where(np.arange(n) == 0, 1, 2) / n)[:, None]
    * np.cos(np.pi * np.arange(n)[:, None] * (np.arange(n)[None] + 0.5) / n)
  )
  channels = cosines(3) if basis is bases.COLOR_DCT else np.eye(*(shape[2:] or (1,)))
  matrix = np.kron(np.kron(cosines(shape[0]), cosines(shape[1])), channels)  # rows are the basis vectors
  size = len(matrix)
  unit = np.eye(size, dtype=np.float32).reshape(2, size // 2, *shape)
  forth, back = jax.jit(lambda unit: (jax.vmap(basis.synthesize)(unit), jax.vmap(basis.analyze)(unit)))(unit)
  np.testing.assert_allclose(np.asarray(forth).reshape(size, size), matrix, atol=1e-6)
  np.testing.assert_allclose(np.asarray(back).reshape(size, size), matrix.T, atol=1e-6)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


def test_dct_probes_are_the_transform_of_signs():

  @jax.jit
  def run(key, x):
    v = jd.divergence.hutchinson(5, basis="dct").draw(key, x)
    assert v.shape == (3, 5, 4, 6, 2)
    return bases.DCT.analyze(v.reshape(15, 4, 6, 2))

  signs = np.asarray(run(keys(0, 3), np.zeros((3, 4, 6, 2), np.float32)))
  np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
  assert abs(signs.mean()) < 4 / np.sqrt(signs.size)


def points(covariance, mean):
  """Data with exactly this covariance."""
  variances, vectors = np.linalg.eigh(covariance)
  rays = np.sqrt(len(vectors) * variances)[:, None] * vectors.T
  return np.concatenate([mean + rays, mean - rays])


def test_control_variate_is_exact_on_gaussian_data(x64):
  """Rademacher and Gaussian probes agree to 50 tolerances of the solver (they are squared), far apart though bare; the
  value is that of the affine flow, in closed form."""
  sde, factor = jd.VP(), np.array([[1.0, 0.0, 0.0], [0.8, 0.4, 0.0], [0.3, -0.5, 0.2]])
  covariance, mean, t0 = factor @ factor.T, np.array([0.3, -1.0, 0.0]), start_time(sde, None, 1e-3)
  variances, basis = np.linalg.eigh(covariance)
  x = points(covariance, mean)
  control = jd.divergence.gaussian_control(x)
  signs, normal = (jd.divergence.hutchinson(2, noise, control=control) for noise in ("rademacher", "gaussian"))

  def score(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -(((x - alpha * mean[None]) @ basis) / (alpha**2 * variances[None] + sigma**2)) @ basis.T

  both = signs._replace(
    draw=lambda key, x: jnp.concatenate([signs.draw(key, x), normal.draw(key, x)], axis=1),
    standard_error=lambda estimates: jnp.max(estimates, axis=1) - jnp.min(estimates, axis=1),
  )
  solve = likelihood.log_prob(sde, both, 1e-6, 1e-6)

  @jax.jit
  def run(key, x):
    result = solve(key, x, score)
    ends = [jnp.sum(jnp.log(alpha**2 * variances + sigma**2)) for alpha, sigma in map(sde.marginal, (t0, sde.t1))]
    own = sde.prior_log_prob(result.latent) + 0.5 * (ends[1] - ends[0])
    return result, own, both.correction(both.draw(key, x), lambda l: 0.5 * jnp.log(1 / l))

  result, own, correction = jax.tree.map(np.asarray, run(keys(0, 3), x[:3]))
  assert np.max(result.standard_error) < 5e-5
  np.testing.assert_allclose(result.value, own, atol=5e-5)
  assert np.min(np.std(correction, axis=1)) > 0.1


def test_control_in_the_basis_of_the_probes_corrects_nothing():
  x = normal(0, (64, 4, 4, 1))
  control, growth = jd.divergence.gaussian_control(x, "dct"), lambda variance: jnp.log(variance)
  own, other = (jd.divergence.hutchinson(3, basis=basis, control=control) for basis in ("dct", None))
  run = jax.jit(lambda key, x: [each.correction(each.draw(key, x), growth) for each in (own, other)])
  nothing, something = run(keys(1, 64), x)
  np.testing.assert_allclose(nothing, 0, atol=1e-5)
  assert np.std(something) > 0.1


def test_control_by_the_dct_has_the_variances_of_the_coefficients():
  """Of 3000 examples in chunks, against the diagonal of Q^T C Q."""
  x = (normal(0, (3000, 16)) @ normal(1, (16, 16))).reshape(3000, 4, 4, 1)
  control = jd.divergence.gaussian_control(x, "dct")
  covariance = np.cov(np.asarray(x, np.float64).reshape(3000, 16).T, ddof=0)
  q = np.asarray(jax.jit(bases.DCT.synthesize)(np.eye(16, dtype=np.float32).reshape(16, 4, 4, 1))).reshape(16, 16)
  np.testing.assert_allclose(control.variances, np.diag(q @ covariance @ q.T), rtol=1e-5)


def test_principal_components_diagonalize_the_covariance():
  x = normal(0, (100, 5)) @ MATRIX + 3.0
  basis = np.asarray(jd.divergence.pca_basis(x))
  within = basis.T @ np.cov(np.asarray(x, np.float64).T, ddof=0) @ basis
  np.testing.assert_allclose(within, np.diag(jd.divergence.gaussian_control(x).variances), atol=1e-9)


def decaying(size, power, shift):
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
  low = rotation @ np.diag(1 / np.arange(1, size + 1.0) ** power) @ rotation.T
  return np.asarray(low + shift * np.eye(size), np.float32)


def test_hutchpp_is_unbiased_knows_its_error_and_beats_hutchinson_at_equal_products():
  """12 products on eigenvalues 1/i^2 + 7, of which 7 is known: an eighth of the spread or less."""
  matrix, n = decaying(40, 2, 7.0), 1000
  x, key = np.zeros((n, 40), np.float32), keys(0, n)

  def run(divergence):
    estimate = lambda key: divergence.estimate(lambda x: x @ matrix, x, divergence.draw(key, x), jnp.full((), 7.0))
    return np.asarray(jax.jit(lambda key: estimate(key)[1])(key))

  estimates, plain = run(jd.divergence.hutchpp(4, 4)), run(jd.divergence.hutchinson(12))
  assert estimates.shape == (n, 4)
  spread = np.std(estimates.mean(axis=1))
  assert abs(estimates.mean() - np.trace(matrix)) < 4 * spread / np.sqrt(n) + 1e-4
  assert spread < np.std(plain.mean(axis=1)) / 5
  claimed = np.asarray(jax.jit(jd.divergence.hutchpp(4, 4).standard_error)(estimates))
  np.testing.assert_allclose(np.sqrt(np.mean(claimed**2)), spread, rtol=0.1)


def test_hutchpp_sees_multiples_of_the_identity_without_noise():
  """Known or not: residual probes have one length."""
  divergence, x = jd.divergence.hutchpp(2, 3), np.zeros((4, 3, 2), np.float32)
  run = jax.jit(lambda key, known: divergence.estimate(lambda x: 5 * x, x, divergence.draw(key, x), known)[1])
  for known in (0.0, 5.0, -2.0):
    np.testing.assert_allclose(run(keys(0, 4), np.float32(known)), 30, rtol=1e-5)


@pytest.mark.parametrize("sketch", [2, 4, 6])
def test_hutchpp_is_exact_when_the_rank_is_below_the_sketch(sketch):
  """Rank 2, also where S is singular or has all of the dimensions; the gradient is finite and exact, too."""
  left, right = normal(0, (2, 6, 2))
  x, divergence = np.zeros((3, 6), np.float32), jd.divergence.hutchpp(sketch, 2)

  def trace(w, key):
    f = lambda x: 3 * x + w * ((x @ right) @ left.T)
    value = divergence.estimate(f, x, divergence.draw(key, x), jnp.full((), 3.0))[1]
    return jnp.mean(value), value

  expected = np.sum(left * right)
  (_, value), slope = jax.jit(jax.value_and_grad(trace, has_aux=True))(1.5, keys(1, 3))
  np.testing.assert_allclose(value, np.full((3, 2), 18 + 1.5 * expected), rtol=1e-5)
  np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_hutchpp_has_unbiased_gradients():
  """Of tr(w A + w^2 B) in w, over 2000 keys."""
  n, other = 2000, decaying(5, 1, 0.0)
  x, divergence = np.zeros((n, 5), np.float32), jd.divergence.hutchpp(1, 1)

  def f(w, key):
    field = lambda x: w * linear(x) + w**2 * (x @ other)
    return divergence.estimate(field, x, divergence.draw(key, x), jnp.zeros(()))[1][:, 0]

  slope = lambda w, key: jax.jvp(lambda w: f(w, key), (w,), (jnp.ones(()),))[1]
  slopes = np.asarray(jax.jit(slope)(np.float32(0.7), keys(3, n)))
  expected = np.trace(MATRIX) + 1.4 * np.trace(other)
  assert abs(slopes.mean() - expected) < 4 * slopes.std() / np.sqrt(n)
  assert slopes.std() > 0.1


def test_exact_trace_holds_64_tangents_at_a_time():
  """1024 dimensions: without chunks 16 times the memory."""
  weights = normal(0, (1024, 1024)) / 32
  x, batch = np.ones((4, 1024), np.float32), 4
  f = lambda x: jnp.tanh(x @ weights)
  chunked = lambda x: jd.divergence.exact().estimate(f, x, None, jnp.zeros(()))[1]
  compiled = jax.jit(chunked).lower(x).compile()
  held = compiled.memory_analysis().temp_size_in_bytes
  one_tangent = 4 * 1024 * batch
  assert held < 4 * 64 * one_tangent < 1024 * one_tangent
  slope = 1 - np.tanh(x @ weights) ** 2
  np.testing.assert_allclose(np.asarray(compiled(x))[:, 0], slope @ np.diag(weights), rtol=1e-3)


@pytest.mark.parametrize(
  "make",
  [jd.divergence.exact, lambda: jd.divergence.hutchinson(5), lambda: jd.divergence.hutchpp(2, 3)],
  ids=["exact", "hutchinson", "hutchpp"],
)
def test_one_network_call_an_evaluation_whatever_the_probes(make):
  calls, divergence, x = [], make(), np.ones((2, 6), np.float32)

  def network(x):
    jax.debug.callback(lambda _: calls.append(1), x)
    return jnp.sin(x)

  jax.block_until_ready(estimated(divergence, network)(keys(0, 2), x))
  jax.effects_barrier()
  assert len(calls) == 1


def test_standard_error_is_zero_for_the_exact_trace_and_unknown_for_one_probe():
  assert jd.divergence.exact().standard_error(jnp.ones((1, 1))) == 0
  assert jnp.isnan(jd.divergence.hutchinson(1).standard_error(jnp.ones((1, 1)))[0])


def test_bad_arguments_are_refused(untyped):
  make, x, key = jd.divergence.hutchinson, jnp.ones((2, 9)), jd.example_keys(jax.random.key(0), 0, 2)
  with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
    make(0)
  with pytest.raises(ValueError, match="noise must be one of 'rademacher', 'gaussian', 'sphere', got 'cauchy'"):
    make(1, "cauchy")
  with pytest.raises(ValueError, match="basis must be one of 'identity', 'dct', 'color_dct', got 'wavelet'"):
    make(basis="wavelet")
  for noise in ("gaussian", "sphere"):
    with pytest.raises(ValueError, match=f"noise='{noise}' is the same in every basis: leave basis out"):
      make(1, noise, "dct")
    make(1, noise, "identity")
  with pytest.raises(ValueError, match="basis must have orthonormal columns, its Gram matrix is off by .*qr"):
    make(basis=MATRIX)
  with pytest.raises(ValueError, match=r"basis must be a square matrix .*got shape \(5, 2\)"):
    make(basis=MATRIX[:, :2])
  with pytest.raises(TypeError, match="basis must be known.*outside jit"):
    jax.jit(lambda q: [make(basis=q), 0][1])(ROTATION)
  with pytest.raises(TypeError, match=r"control is a factory: .*gaussian_control\(\)"):
    make(control=jd.divergence.gaussian_control)
  with pytest.raises(ValueError, match=r"basis is 5 x 5, but an example \(9,\) has 9 numbers"):
    make(basis=ROTATION).draw(key, x)
  with pytest.raises(ValueError, match=r"'dct' needs examples \[h, w\] or \[h, w, c\], got \(9,\)"):
    make(basis="dct").draw(key, x)
  with pytest.raises(ValueError, match=r"'color_dct' needs examples \[h, w, c\], got \(3, 3\)"):
    make(basis="color_dct").draw(key, x.reshape(2, 3, 3))
  with pytest.raises(ValueError, match=r"sketch = 10 exceeds the 9 dimensions.*divergence.exact\(\)"):
    jd.divergence.hutchpp(10, 1).draw(key, x)
  with pytest.raises(ValueError, match="sketch must be at least 1, got 0"):
    jd.divergence.hutchpp(0, 1)


def test_bad_data_of_a_control_are_refused(untyped):
  control = jd.divergence.gaussian_control
  with pytest.raises(TypeError, match="x must be floating point, got uint8.*dequantize"):
    control(jnp.ones((4, 3), jnp.uint8))
  with pytest.raises(ValueError, match="x must have at least 2 examples for a covariance, got 1"):
    control(jnp.ones((1, 3)))
  with pytest.raises(ValueError, match="x must be finite"):
    control(jnp.asarray([[1.0, jnp.nan], [0.0, 1.0]]))
  with pytest.raises(ValueError, match="basis must be one of 'pca', 'dct', 'color_dct', got 'ica'"):
    control(jnp.ones((4, 3)), "ica")
  with pytest.raises(ValueError, match=r"control is of data of 5 numbers, an example \(9,\) has 9"):
    control(normal(0, (8, 5))).correction(jnp.ones((2, 1, 9)), jnp.log)


def test_a_residual_flow_tends_to_the_continuous_change_of_variables(x64):
  """One block x + h f(x) is one Euler step; sum log|det(I + h J)| tends to the integral of tr J, at first order."""
  f = lambda x: jnp.tanh(MATRIX.astype(x.dtype)[:3, :3] @ x)
  x0, trace = np.array([0.3, -0.5, 0.8]), jd.divergence.exact()

  @jax.jit
  def residual(blocks):
    def block(_, carry):
      x, log_det = carry
      jacobian = jnp.eye(3) + jax.jacfwd(f)(x) / blocks
      return x + f(x) / blocks, log_det + jnp.linalg.slogdet(jacobian)[1]

    return jax.lax.fori_loop(0, jnp.asarray(blocks, int), block, (x0, 0.0))

  @jax.jit
  def limit(x0):
    divergence = lambda x: trace.estimate(jax.vmap(f), x[None], None, jnp.zeros(()))[1][0, 0]
    field = lambda t, y: (f(y[0]), divergence(y[0]))
    ends = (jnp.asarray(t) for t in (0.0, 1.0, 0.1))
    return ode.solve(field, (x0, jnp.zeros(())), *ends, ode.Solver(rtol=1e-10, atol=1e-10))

  (x1, integral), _, status = limit(x0)
  assert status.code == 0
  each = (residual(float(blocks)) for blocks in (50, 100, 200, 400))
  errors = np.asarray([[np.linalg.norm(x - np.asarray(x1)), abs(d - float(integral))] for x, d in each])
  np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 1, atol=0.05)
  assert np.all(errors[-1] < 1e-2)
