"""Continuous normalizing flows of linear fields, whose map and density are closed forms, and of a nonlinear one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxdiff as jd
from jaxdiff import likelihood

KEY = jax.random.key(0)
A = np.array([[-0.4, 0.9], [-0.7, 0.3]])
SHIFT = np.array([0.5, -0.2])
T1 = 0.8
X = np.random.default_rng(0).normal(size=(5, 2))
STEPS = pytest.mark.parametrize("steps", ["per_example", "shared"])


def linear(x, t):
  return x @ jnp.asarray(A, x.dtype).T + jnp.asarray(SHIFT, x.dtype)[None]


def curved(x, t, scale=None):
  """A nonlinear field of the plane that depends on time, of moderate divergence."""
  w = jnp.asarray([[1.1, -0.6], [0.8, 0.9]], x.dtype)
  y = jnp.tanh(x @ w + jnp.sin(t)[:, None].astype(x.dtype)) @ w.T
  return y if scale is None else scale[:, None] * y


def affine():
  """(M, m) of the flow x -> M x + m of `linear`, by the exponential of the 3 x 3 homogeneous matrix."""
  homogeneous = np.zeros((3, 3))
  homogeneous[:2, :2], homogeneous[:2, 2] = A, SHIFT
  power = jax.scipy.linalg.expm(jnp.asarray(T1 * homogeneous))
  return power[:2, :2], power[:2, 2]


@STEPS
def test_map_and_density_of_a_linear_field(steps, x64):
  """x -> M x + m, so that data are N(-M^-1 m, (M^T M)^-1): 1e-7 at tolerance 1e-9."""
  flow, x = jd.flow.cnf(t1=T1, rtol=1e-9, atol=1e-9, steps=steps), jnp.asarray(X)
  matrix, shift = affine()
  result = jax.jit(lambda x: flow.log_prob(KEY, x, linear))(x)
  jd.raise_if_failed(result)
  np.testing.assert_allclose(result.latent, x @ matrix.T + shift[None], atol=1e-7)
  mean, covariance = -jnp.linalg.solve(matrix, shift), jnp.linalg.inv(matrix.T @ matrix)
  density = scipy.stats.multivariate_normal(np.asarray(mean), np.asarray(covariance))
  np.testing.assert_allclose(result.value, density.logpdf(X), atol=1e-7)
  assert jnp.all(result.standard_error == 0)
  forward = jax.jit(lambda x: flow.forward(KEY, x, linear))(x)
  np.testing.assert_allclose(forward.x, result.latent, atol=1e-7)


@STEPS
@pytest.mark.parametrize(("solver", "num_steps"), [("dopri8", None), ("rk4", 40)])
def test_inverse_undoes_forward(steps, solver, num_steps, x64):
  flow = jd.flow.cnf(solver=solver, num_steps=num_steps, rtol=1e-9, atol=1e-9, steps=steps)
  z = jax.jit(lambda x: flow.forward(KEY, x, curved))(jnp.asarray(X))
  back = jax.jit(lambda z: flow.inverse(KEY, z, curved))(z.x)
  np.testing.assert_allclose(back.x, X, atol=1e-6)
  assert jnp.max(jnp.abs(z.x - X)) > 0.3
  assert num_steps is None or z.nfe.tolist() == [160] * 5


def test_density_of_a_curved_field_integrates_to_one():
  """On a grid of the plane, 0.12 apart, at tolerance 1e-4: 1e-3."""
  axis = jnp.linspace(-6.0, 6.0, 101)
  grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
  flow = jd.flow.cnf(rtol=1e-4, atol=1e-4, steps="shared")
  value = jax.jit(lambda x: flow.log_prob(KEY, x, curved).value)(grid)
  assert abs(jnp.sum(jnp.exp(value)) * (axis[1] - axis[0]) ** 2 - 1) < 1e-3


def test_samples_have_the_moments_of_a_linear_field():
  """10^4 samples: mean and covariance within five standard errors, 0.05 of the largest entry."""
  matrix, shift = affine()
  mean, covariance = -jnp.linalg.solve(matrix, shift), jnp.linalg.inv(matrix.T @ matrix)
  flow = jd.flow.cnf(t1=T1, steps="shared")
  sample = jax.jit(lambda key: flow.sample(key, (10_000, 2), linear))(KEY)
  scale = float(jnp.sqrt(jnp.max(covariance)))
  np.testing.assert_allclose(sample.x.mean(axis=0), mean, atol=0.05 * scale)
  np.testing.assert_allclose(np.cov(sample.x.T), covariance, atol=0.05 * scale**2 * 1.5)
  few = flow.sample(jd.example_keys(KEY, 2, 3), (3, 2), linear)
  np.testing.assert_allclose(few.x, sample.x[2:5], atol=1e-4)


def test_probes_are_unbiased_and_know_their_error(x64):
  """For a linear field one solve has the estimate t1 v.Av: known spread, 2 (|S|^2 - diag), S = (A + A^T) / 2."""
  n, probes = 4000, 2
  x = jnp.tile(jnp.asarray(X[:1]), (n, 1))
  run = lambda divergence, x: jax.jit(
    lambda x: jd.flow.cnf(divergence=divergence, t1=T1, solver="rk4", num_steps=8, steps="shared").log_prob(
      KEY, x, linear
    )
  )(x)
  exact, result = run(None, x[:1]).value[0], run(jd.divergence.hutchinson(probes), x)
  s = (A + A.T) / 2
  deviation = T1 * np.sqrt(2 * (np.sum(s**2) - np.sum(np.diag(s) ** 2)) / probes)
  assert abs(result.value.mean() - exact) < 4 * deviation / np.sqrt(n)
  np.testing.assert_allclose(result.value.std(), deviation, rtol=0.1)
  np.testing.assert_allclose(jnp.sqrt(jnp.mean(result.standard_error**2)), deviation, rtol=0.1)


def test_conditions_are_split_and_batch_mates_do_not_matter(x64):
  scale, x = jnp.linspace(0.2, 2.0, 5), jnp.asarray(X)
  flow = jd.flow.cnf(divergence=jd.divergence.hutchinson(2))
  keys = jd.example_keys(KEY, 0, 5)
  run = jax.jit(lambda key, x, scale: flow.log_prob(key, x, curved, {"scale": scale}))
  whole = run(keys, x, scale)
  alone = run(keys[3:4], x[3:4], scale[3:4])
  np.testing.assert_allclose(whole.value[3], alone.value[0], rtol=1e-9)
  assert whole.nfe[3] == alone.nfe[0]
  assert len(set(whole.nfe.tolist())) > 1
  by_hand = flow.log_prob(keys[3:4], x[3:4], lambda x, t: scale[3] * curved(x, t))
  np.testing.assert_allclose(by_hand.value, alone.value, rtol=1e-9)


@STEPS
def test_no_host_callback_and_every_evaluation_counted(steps):
  flow = jd.flow.cnf(steps=steps)
  x = jnp.asarray(X, jnp.float32)
  assert "callback" not in str(jax.make_jaxpr(lambda x: flow.log_prob(KEY, x, curved))(x))
  assert "callback" not in str(jax.make_jaxpr(lambda x: flow.inverse(KEY, x, curved))(x))
  calls = []

  def field(x, t):
    jax.debug.callback(lambda _: calls.append(1), t[0])
    return curved(x, t)

  result = flow.log_prob(KEY, x[:1], field)
  jax.effects_barrier()
  assert result.nfe.tolist() == [len(calls)]


@pytest.mark.parametrize(
  ("adjoint", "steps"), [("checkpoint", "shared"), ("continuous", "shared"), ("continuous", "per_example")]
)
def test_gradients_of_the_density(adjoint, steps, x64):
  """To parameters that the field captures, x and t1, along one direction each: 1e-5 of central differences."""
  x, direction = jnp.asarray(X[:2]), jnp.asarray(X[2:4])

  def value(w, h, t1):
    flow = jd.flow.cnf(t1=t1, rtol=1e-9, atol=1e-9, max_steps=64, adjoint=adjoint, steps=steps, solver="dopri8")
    return jnp.sum(flow.log_prob(KEY, x + h * direction, lambda x, t: w * curved(x, t)).value)

  run, h, point = jax.jit(value), 1e-5, (0.8, 0.0, 0.9)
  gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
  for i, got in enumerate(gradient):
    shifted = lambda sign: run(*(a + sign * h * (k == i) for k, a in enumerate(point)))
    np.testing.assert_allclose(got, (shifted(1) - shifted(-1)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("adjoint", ["continuous", "direct"])
def test_gradients_of_a_diffusion_model_s_density(adjoint, x64):
  """`likelihood.log_prob`, parameters captured by the score: 1e-5 of central differences. Checkpoint: its own test."""
  sde, x = jd.VP(), jnp.asarray([[0.3, -0.4]])
  fn = likelihood.log_prob(sde, rtol=1e-8, atol=1e-8, max_steps=256, t0=0.05, solver="dopri8", adjoint=adjoint)
  value = lambda w, x: fn(KEY, x, lambda x, t: -w * x + jnp.sin(w * x)).value[0]
  run, h = jax.jit(value), 1e-5
  dw, dx = jax.jit(jax.grad(value, argnums=(0, 1)))(0.7, x)
  e = jnp.asarray([[h, 0.0]])
  np.testing.assert_allclose(dw, (run(0.7 + h, x) - run(0.7 - h, x)) / (2 * h), rtol=1e-5)
  np.testing.assert_allclose(dx[0, 0], (run(0.7, x + e) - run(0.7, x - e)) / (2 * h), rtol=1e-5)


def test_a_failed_solve_is_reported():
  result = jd.flow.cnf(max_steps=2).log_prob(KEY, jnp.asarray(X, jnp.float32), curved)
  assert jnp.all(jnp.isnan(result.value))
  with pytest.raises(jd.SolveError, match="5 of 5 examples .*max_steps"):
    jd.raise_if_failed(result)


def test_wrong_use_is_refused(untyped):
  x = jnp.ones((2, 3))
  cases = [
    ({"t1": 0.0}, "t1 must be above t0, and t0 at least 0, got t0 = 0.0 and t1 = 0.0"),
    ({"t0": -0.1}, "t0 at least 0, got t0 = -0.1"),
    ({"steps": "both"}, "steps must be one of"),
    ({"adjoint": "none"}, "adjoint must be one of 'checkpoint', 'continuous', 'direct', got 'none'"),
    ({"solver": "heun"}, "solver 'heun' has no error control: give it num_steps"),
    ({"rtol": 0.0}, "rtol must be positive"),
  ]
  for options, message in cases:
    with pytest.raises(ValueError, match=message):
      jd.flow.cnf(**options)
  with pytest.raises(TypeError, match="base is a factory"):
    jd.flow.cnf(base=jd.flow.standard_normal)
  with pytest.raises(TypeError, match="divergence is a factory"):
    jd.flow.cnf(divergence=jd.divergence.exact)
  flow = jd.flow.cnf()
  with pytest.raises(ValueError, match="field must return an array of the shape of x"):
    flow.log_prob(KEY, x, lambda x, t: x[:, :1])
  with pytest.raises(ValueError, match="cond"):
    flow.forward(KEY, x, curved, {"scale": jnp.ones(3)})
  with pytest.raises(TypeError, match="x must be floating point"):
    flow.forward(KEY, jnp.ones((2, 3), int), linear)
  with pytest.raises(TypeError, match="typed key"):
    flow.inverse(None, x, curved)
