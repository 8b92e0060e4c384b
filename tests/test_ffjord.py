"""The flow's maximum likelihood: its value, its regularizers in closed form, its gradient, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import jaxdiff as jd

A = np.array([[-0.4, 0.9, 0.1], [-0.7, 0.3, 0.0], [0.2, 0.0, -0.1]])
X = np.random.default_rng(0).normal(size=(4, 3))
T1 = 0.8


def linear(x, t):
  return x @ jnp.asarray(A, x.dtype).T


@pytest.mark.parametrize("probes", [None, 3])
def test_value_and_regularizers_of_a_linear_field_in_closed_form(probes, x64):
  """-log p of x -> e^{tA} x, int |A e^{tA} x|^2 dt by quadrature of 400 midpoints (1e-6), |A|_F^2 t1, and |A v|^2 t1
  for given probes v. Regularizers cost no evaluations."""
  calls, divergence = [], probes and jd.divergence.hutchinson(probes)
  solver = {"rtol": 1e-8, "atol": 1e-8} if probes is None else {"solver": "rk4", "num_steps": 40}
  loss = jd.losses.ffjord(divergence=divergence, t1=T1, kinetic=0.5, jacobian=0.25, **solver)

  def field(x, t):
    jax.debug.callback(lambda _: calls.append(1), t[0])
    return linear(x, t)

  draw = divergence.draw if probes else lambda keys, x: jnp.sqrt(3.0) * jnp.eye(3)[None] * jnp.ones((4, 1, 1))
  run = jax.jit(lambda key, x: (loss(key, x, field), draw(key, x)))
  (value, aux), v = jax.tree.map(np.asarray, run(jd.example_keys(jax.random.key(0), 0, 4), X))
  jax.effects_barrier()
  flow = scipy.linalg.expm(T1 * A)
  traces = T1 * np.einsum("bki,ij,bkj->bk", v, A, v)
  base = -0.5 * np.sum((X @ flow.T) ** 2 + np.log(2 * np.pi), axis=1)
  np.testing.assert_allclose(aux["nats"], -base - traces.mean(axis=1), rtol=1e-6)
  middles = (np.arange(400.0) + 0.5) / 400 * T1
  speed = [np.sum((X @ (A @ scipy.linalg.expm(t * A)).T) ** 2, axis=1) for t in middles]
  np.testing.assert_allclose(aux["kinetic"], T1 * np.mean(speed, axis=0), rtol=1e-5)
  np.testing.assert_allclose(aux["jacobian"], T1 * np.mean(np.sum((v @ A.T) ** 2, axis=2), axis=1), rtol=1e-6)
  np.testing.assert_allclose(value, aux["nats"] + 0.5 * aux["kinetic"] + 0.25 * aux["jacobian"], rtol=1e-12)
  assert aux["nfe"].tolist() == 4 * [len(calls)]
  assert probes is None or len(calls) == 160


def test_gradient_to_the_parameters(x64):
  """Through both regularizers along a random direction of the parameters, against central differences: 1e-5."""
  rng = np.random.default_rng(1)
  params, direction = ({"w": rng.normal(size=(2, 3, 3)) * 0.5, "b": rng.normal(size=3)} for _ in range(2))
  loss = jd.losses.ffjord(rtol=1e-8, atol=1e-8, kinetic=0.3, jacobian=0.2)

  def total(h):
    p = jax.tree.map(lambda a, b: a + h * b, params, direction)
    field = lambda x, t: jnp.tanh(x @ p["w"][0] + p["b"][None] * t[:, None]) @ p["w"][1]
    return jnp.mean(loss(jax.random.key(0), jnp.asarray(X), field)[0])

  run, h = jax.jit(jax.value_and_grad(total)), 1e-4
  np.testing.assert_allclose(run(0.0)[1], (run(h)[0] - run(-h)[0]) / (2 * h), rtol=1e-5)


def test_training_finds_a_gaussian():
  """Data N((1, -1), diag(0.5, 0.8)^2), an affine field, the continuous adjoint: to the entropy of the sample's own
  fit, 1e-3 nats. Without weights nothing but the log-density is integrated."""
  x = np.random.default_rng(2).normal(size=(256, 2)) * [0.5, 0.8] + [1.0, -1.0]
  loss = jd.losses.ffjord(solver="rk4", num_steps=4, adjoint="continuous")
  field = lambda p, x, t: x * p["a"] + p["b"]

  @jax.jit
  def run(p, x):
    def mean(p):
      value, aux = loss(jax.random.key(0), x, functools.partial(field, p))
      return jnp.mean(value), aux

    (value, aux), gradient = jax.value_and_grad(mean, has_aux=True)(p)
    return value, aux, jax.tree.map(lambda a, g: a - 0.2 * g, p, gradient)

  p = {"a": np.zeros((1, 2), np.float32), "b": np.zeros((1, 2), np.float32)}
  for _ in range(150):
    value, aux, p = run(p, x.astype(np.float32))
  entropy = np.sum(np.log(np.std(x, axis=0))) + 1.0 + np.log(2 * np.pi)
  assert abs(value - entropy) < 1e-3
  assert set(aux) == {"nats", "nfe"}
  assert aux["nfe"].dtype == value.dtype


def test_failures_are_nan():
  loss = jd.losses.ffjord(max_steps=2)
  value, _ = jax.jit(lambda x: loss(jax.random.key(0), x, linear))(np.float32(X))
  assert np.all(np.isnan(value))


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
    jd.losses.ffjord(divergence=odd, jacobian=1.0)(jax.random.key(0), jnp.asarray(X), linear)
