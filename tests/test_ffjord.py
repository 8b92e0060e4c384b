"""The flow's maximum likelihood: its value, its regularizers in closed form, its gradient, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

KEY = jax.random.key(0)
A = np.array([[-0.4, 0.9, 0.1], [-0.7, 0.3, 0.0], [0.2, 0.0, -0.1]], np.float32)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def linear(x, t):
  return x @ jnp.asarray(A, x.dtype).T


def test_without_weights_it_is_the_negative_log_density():
  value, aux = jax.jit(lambda x: jd.losses.ffjord()(KEY, x, linear))(X)
  log_prob = jax.jit(lambda x: jd.flow.cnf(steps="shared").log_prob(KEY, x, linear))(X)
  np.testing.assert_array_equal(value, -log_prob.value)
  np.testing.assert_array_equal(value, aux["nats"])
  np.testing.assert_array_equal(aux["nfe"], log_prob.nfe)
  assert set(aux) == {"nats", "nfe"}
  assert aux["nfe"].dtype == value.dtype


@pytest.mark.parametrize("divergence", [None, jd.divergence.hutchinson(3)])
def test_regularizers_of_a_linear_field_in_closed_form(divergence, x64):
  """int |A e^{tA} x|^2 dt by quadrature of 400 midpoints (1e-6), |A|_F^2 t1, and |A v|^2 t1 for given probes v."""
  t1, x = 0.8, jnp.asarray(X, float)
  loss = jd.losses.ffjord(divergence=divergence, t1=t1, rtol=1e-8, atol=1e-8, kinetic=0.5, jacobian=0.25)
  value, aux = jax.jit(lambda x: loss(KEY, x, linear))(x)
  middles = (jnp.arange(400.0) + 0.5) / 400 * t1
  a = jnp.asarray(A, float)
  speed = jax.vmap(lambda t: jnp.sum((x @ (a @ jax.scipy.linalg.expm(t * a)).T) ** 2, axis=1))(middles)
  np.testing.assert_allclose(aux["kinetic"], t1 * speed.mean(axis=0), rtol=1e-5)
  square = jnp.full(len(x), jnp.sum(a**2))
  if divergence is not None:
    v = divergence.draw(jd.example_keys(KEY, 0, len(x)), x)
    square = jnp.mean(jnp.sum((v @ a.T) ** 2, axis=2), axis=1)
  np.testing.assert_allclose(aux["jacobian"], t1 * square, rtol=1e-6)
  np.testing.assert_allclose(value, aux["nats"] + 0.5 * aux["kinetic"] + 0.25 * aux["jacobian"], rtol=1e-12)


def test_regularizers_cost_no_evaluations():
  calls = []

  def field(x, t):
    jax.debug.callback(lambda _: calls.append(1), t[0])
    return linear(x, t)

  loss = jd.losses.ffjord(solver="rk4", num_steps=3, kinetic=1.0, jacobian=1.0)
  _, aux = jax.jit(lambda x: loss(KEY, x, field))(X)
  jax.effects_barrier()
  assert len(calls) == 12
  assert aux["nfe"].tolist() == [12.0] * 4


@pytest.mark.parametrize("adjoint", ["checkpoint", "continuous"])
def test_gradient_to_the_parameters(adjoint, x64):
  """Along a random direction of the parameters, against central differences: 1e-5."""
  rng = np.random.default_rng(1)
  params, direction = ({"w": rng.normal(size=(2, 3, 3)) * 0.5, "b": rng.normal(size=3)} for _ in range(2))
  loss = jd.losses.ffjord(rtol=1e-8, atol=1e-8, adjoint=adjoint, kinetic=0.3, jacobian=0.2)

  def total(h):
    p = jax.tree.map(lambda a, b: jnp.asarray(a) + h * b, params, direction)
    field = lambda x, t: jnp.tanh(x @ p["w"][0] + p["b"][None] * t[:, None]) @ p["w"][1]
    return jnp.mean(loss(KEY, jnp.asarray(X, float), field)[0])

  run, h = jax.jit(total), 1e-4
  np.testing.assert_allclose(jax.jit(jax.grad(total))(0.0), (run(h) - run(-h)) / (2 * h), rtol=1e-5)


def test_training_finds_a_gaussian():
  """Data N((1, -1), diag(0.5, 0.8)^2), an affine field: to the entropy of the sample's own fit, 1e-3 nats."""
  x = jnp.asarray(np.random.default_rng(2).normal(size=(256, 2)) * [0.5, 0.8] + [1.0, -1.0], jnp.float32)
  loss = jd.losses.ffjord(solver="rk4", num_steps=4, adjoint="continuous")
  field = lambda p, x, t: x * p["a"] + p["b"]
  mean = lambda p: jnp.mean(loss(KEY, x, functools.partial(field, p))[0])
  start = {"a": jnp.zeros((1, 2)), "b": jnp.zeros((1, 2))}

  def step(p, _):
    return jax.tree.map(lambda a, g: a - 0.2 * g, p, jax.grad(mean)(p)), None

  p = jax.jit(lambda p: jax.lax.scan(step, p, None, length=150)[0])(start)
  entropy = jnp.sum(jnp.log(jnp.std(x, axis=0))) + 1.0 + jnp.log(2 * jnp.pi)
  assert abs(mean(p) - entropy) < 1e-3


def test_failures_are_nan():
  value, _ = jd.losses.ffjord(max_steps=2)(KEY, jnp.asarray(X), linear)
  assert jnp.all(jnp.isnan(value))


def test_wrong_use_is_refused(untyped):
  for name in ("kinetic", "jacobian"):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
      jd.losses.ffjord(**{name: -1.0})
  with pytest.raises(ValueError, match="give it num_steps"):
    jd.losses.ffjord(solver="rk4")
  with pytest.raises(ValueError, match="steps must be one of"):
    jd.losses.ffjord(steps="each")
  odd = jd.divergence.hutchinson()._replace(draw=lambda key, x: {"v": x})
  with pytest.raises(ValueError, match="jacobian needs divergence.exact"):
    jd.losses.ffjord(divergence=odd, jacobian=1.0)(KEY, jnp.asarray(X), linear)
