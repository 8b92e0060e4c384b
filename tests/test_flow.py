"""Continuous normalizing flows of linear fields, whose map and density are closed forms, and of a nonlinear one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import jaxdiff as jd

A = np.array([[-0.4, 0.9], [-0.7, 0.3]])
SHIFT = np.array([0.5, -0.2])
T1 = 0.8
X = np.random.default_rng(0).normal(size=(5, 2))
STEPS = pytest.mark.parametrize("steps", ["per_example", "shared"])
CURVED, LINEAR = np.linspace(0.2, 2.0, 5), np.zeros(5)


def keys(start=0):
  return jd.example_keys(jax.random.key(0), start, 5)


def linear(x, t):
  return x @ jnp.asarray(A, x.dtype).T + jnp.asarray(SHIFT, x.dtype)[None]


def curved(x, t):
  """A nonlinear field of the plane that depends on time, of moderate divergence."""
  w = jnp.asarray([[1.1, -0.6], [0.8, 0.9]], x.dtype)
  return jnp.tanh(x @ w + jnp.sin(t)[:, None].astype(x.dtype)) @ w.T


def either(x, t, scale):
  """The curved field of each example's own scale, and the linear one where that is 0."""
  return jnp.where(scale[:, None] == 0, linear(x, t), scale[:, None] * curved(x, t))


def affine():
  """(M, m) of the flow x -> M x + m of `linear`, by the exponential of the 3 x 3 homogeneous matrix."""
  homogeneous = np.zeros((3, 3))
  homogeneous[:2, :2], homogeneous[:2, 2] = A, SHIFT
  power = scipy.linalg.expm(T1 * homogeneous)
  return power[:2, :2], power[:2, 2]


@functools.cache
def flow(steps):
  """Jitted (log_prob, forward, inverse) of (keys, x, scale), and a list that grows with evaluations of log_prob."""
  calls, numbers = [], {"t1": T1, "rtol": 1e-9, "atol": 1e-9, "max_steps": 100, "steps": steps}
  solver = {"solver": "dopri8"} if steps == "per_example" else {"solver": "rk4", "num_steps": 40}

  def field(x, t, scale):
    if steps == "shared":  # the batch is evaluated at once
      jax.debug.callback(lambda _: calls.append(1), t[0])
    return either(x, t, scale)

  log_prob, carry = jd.flow.cnf(**numbers).log_prob, jd.flow.cnf(**numbers | solver)
  run = lambda f, field: jax.jit(lambda key, x, scale: f(key, x, field, {"scale": scale}))
  return run(log_prob, field), run(carry.forward, either), run(carry.inverse, either), calls


@STEPS
def test_map_and_density_of_a_linear_field(steps, x64):
  """x -> M x + m, so that data are N(-M^-1 m, (M^T M)^-1): 1e-7 at tolerance 1e-9. Every evaluation is counted."""
  log_prob, forward, _, calls = flow(steps)
  matrix, shift = affine()
  result = log_prob(keys(), X, LINEAR)
  jax.effects_barrier()
  jd.raise_if_failed(result)
  np.testing.assert_allclose(result.latent, X @ matrix.T + shift, atol=1e-7)
  density = scipy.stats.multivariate_normal(-np.linalg.solve(matrix, shift), np.linalg.inv(matrix.T @ matrix))
  np.testing.assert_allclose(result.value, density.logpdf(X), atol=1e-7)
  np.testing.assert_array_equal(result.standard_error, 0)
  np.testing.assert_allclose(forward(keys(), X, LINEAR).x, result.latent, atol=1e-7)
  assert steps == "per_example" or result.nfe.tolist() == 5 * [len(calls)]


@STEPS
def test_inverse_undoes_forward(steps, x64):
  """Order 8 under error control, and order 4 with equal steps."""
  _, forward, inverse, _ = flow(steps)
  z = forward(keys(), X, np.ones(5))
  back = inverse(keys(), z.x, np.ones(5))
  np.testing.assert_allclose(back.x, X, atol=1e-6)
  assert np.max(np.abs(z.x - X)) > 0.3
  assert steps == "per_example" or z.nfe.tolist() == back.nfe.tolist() == [160] * 5


def test_conditions_are_split_and_batch_mates_do_not_matter(x64):
  """Each example has its own scale and its own steps; another batch around it changes nothing."""
  log_prob, _, _, _ = flow("per_example")
  whole = log_prob(keys(), X, CURVED)
  order = np.array([3, 1, 0, 4, 2])
  scale = np.where(order == 3, CURVED[3], 1.0)
  moved = log_prob(keys()[order], X[order] + (order != 3)[:, None], scale)
  np.testing.assert_allclose(np.asarray(moved.value)[0], np.asarray(whole.value)[3], rtol=1e-9)
  assert moved.nfe.tolist()[0] == whole.nfe.tolist()[3]
  assert len(set(whole.nfe.tolist())) > 1


def test_a_failed_solve_is_reported(x64):
  """A hundred steps are too few for a field that is stiff; the others are not disturbed."""
  result = flow("per_example")[0](keys(), X, np.array([1.0, 1.0, -3e3, 1.0, 1.0]))
  assert np.isnan(result.value).tolist() == [False, False, True, False, False]
  with pytest.raises(jd.SolveError, match="1 of 5 examples .*max_steps"):
    jd.raise_if_failed(result)


def test_no_host_callback(x64):
  """A jitted function is traced once: this reads what the tests above ran."""
  log_prob, _, inverse, _ = flow("per_example")
  for run in (log_prob, inverse):
    assert "callback" not in str(jax.make_jaxpr(run)(keys(), X, CURVED))


def test_density_of_a_curved_field_integrates_to_one():
  """On a grid of the plane, 0.12 apart, at tolerance 1e-4: 1e-3."""
  axis = np.linspace(-6.0, 6.0, 101)
  grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
  flow = jd.flow.cnf(rtol=1e-4, atol=1e-4, steps="shared")
  value = jax.jit(lambda x: flow.log_prob(jax.random.key(0), x, curved).value)(grid)
  assert abs(np.sum(np.exp(value)) * (axis[1] - axis[0]) ** 2 - 1) < 1e-3


def test_samples_are_those_of_the_base_carried_back(x64):
  """z = M x + m, by order 4: 1e-6. Example k has the same sample in any batch."""
  matrix, shift = affine()
  flow = jd.flow.cnf(t1=T1, steps="shared", solver="rk4", num_steps=40)

  @jax.jit
  def run(key):
    return flow.sample(key, (5, 2), linear).x, jd.flow.standard_normal().sample(key, (5, 2))

  x, z = map(np.asarray, run(keys()))
  np.testing.assert_allclose(x @ matrix.T + shift, z, atol=1e-6)
  np.testing.assert_allclose(np.asarray(run(keys(2))[0])[:3], x[2:], rtol=1e-9)


def test_probes_are_drawn_once_a_solve_and_know_their_error(x64):
  """For a linear field one solve has the estimate t1 v.Av: 1e-6 of it, each example with probes of its own."""
  divergence, (matrix, shift) = jd.divergence.hutchinson(3), affine()
  flow = jd.flow.cnf(divergence=divergence, t1=T1)
  result, v = jax.jit(lambda key, x: (flow.log_prob(key, x, linear), divergence.draw(key, x)))(keys(), X)
  estimates = T1 * np.einsum("bki,ij,bkj->bk", v, A, v)
  z = X @ matrix.T + shift
  base = -0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1)
  np.testing.assert_allclose(result.value, base + estimates.mean(axis=1), atol=1e-4)
  np.testing.assert_allclose(result.standard_error, estimates.std(axis=1, ddof=1) / np.sqrt(3), atol=1e-6)
  assert len(np.unique(estimates.mean(axis=1))) > 1


def test_gradients_of_the_density(x64):
  """To parameters that the field captures, x and t1, by the continuous adjoint: 1e-5 of central differences."""
  x, direction = X[:2], X[2:4]

  def value(w, h, t1):
    flow = jd.flow.cnf(t1=t1, rtol=1e-9, atol=1e-9, adjoint="continuous", steps="shared", solver="dopri8")
    field = lambda x, t: w * curved(x, t)
    return jnp.sum(flow.log_prob(jax.random.key(0), x + h * direction, field).value)

  run, h, point = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2))), 1e-5, (0.8, 0.0, 0.9)
  for i, got in enumerate(run(*point)[1]):
    shifted = lambda sign: run(*(a + sign * h * (k == i) for k, a in enumerate(point)))[0]
    np.testing.assert_allclose(got, (shifted(1) - shifted(-1)) / (2 * h), rtol=1e-5)


def test_wrong_use_is_refused(untyped):
  key, x = jax.random.key(0), jnp.ones((2, 3))
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
    flow.log_prob(key, x, lambda x, t: x[:, :1])
  with pytest.raises(ValueError, match="cond"):
    flow.forward(key, x, curved, {"scale": jnp.ones(3)})
  with pytest.raises(TypeError, match="x must be floating point"):
    flow.forward(key, jnp.ones((2, 3), int), linear)
  with pytest.raises(TypeError, match="typed key"):
    flow.inverse(None, x, curved)
