"""Solves against closed forms, and their gradients against central differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import ode, status

METHODS = ["tsit5", "dopri5", "dopri8", "euler", "heun", "rk4"]
ADJOINTS = ["checkpoint", "continuous", "direct"]
EACH_METHOD = pytest.mark.parametrize("method", METHODS)
EACH_ADJOINT = pytest.mark.parametrize("adjoint", ADJOINTS)
ORDER = {"euler": 1, "heun": 2, "rk4": 4}

A = np.array([[-0.3, 1.1, 0.0], [-1.2, 0.1, 0.4], [0.2, -0.5, -0.6]])



def constant(t):
  """y' = a + (y - (a t + b))^5, solved by the line y = a t + b."""
  return 0.2 * t + 3.0


def sine(t):
  """y' = 2 y / t + t^4 sin 2t - t^2 + 4 t^3."""
  return -0.5 * t**4 * jnp.cos(2 * t) + 0.5 * t**3 * jnp.sin(2 * t) + 0.25 * t**2 * jnp.cos(2 * t) - t**3 + 2 * t**4


def sine_slope(t, y):
  return 2 * y / t + t**4 * jnp.sin(2 * t) - t**2 + 4 * t**3


PROBLEMS = {
  "constant": (lambda t, y: 0.2 + (y - (0.2 * t + 3.0)) ** 5, constant),
  "sine": (sine_slope, lambda t: sine(t) + (np.pi - 0.25) * t**2),
  "linear": (lambda t, y: jnp.asarray(A) @ y, lambda t: jax.scipy.linalg.expm(t * A) @ jnp.array([1.0, -0.5, 2.0])),
}


def solved(field, y0, start, end, solver, **options):
  start, end = jnp.asarray(start), jnp.asarray(end)
  return ode.solve(field, y0, start, end, jnp.asarray(1e-2), solver, **options)


@EACH_METHOD
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_with_closed_forms_both_ways(problem, method, x64):
  """The lattice of t: 1 -> 2 and back. First order in 400 steps leaves 1e-1 of values up to 30, the others far less."""
  field, exact = PROBLEMS[problem]
  num_steps = None if method in METHODS[:3] else 400
  solver = ode.Solver(method, 1e-9, 1e-9, num_steps=num_steps)
  run = jax.jit(lambda y, start, end: solved(field, y, start, end, solver))
  for start, end in ((1.0, 2.0), (2.0, 1.0)):
    y, _, flag = run(exact(start), start, end)
    assert flag.code == status.SUCCESS
    tolerance = {"euler": 2e-2, "heun": 2e-4}.get(method, 1e-7)
    np.testing.assert_allclose(y, exact(end), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ORDER)
def test_order_of_convergence_with_equal_steps(method, x64):
  """Slope of log error over log steps, sine problem; 0.15 for the next term."""
  field, exact = PROBLEMS["sine"]
  counts = np.array([40, 80, 160])
  errors = [
    abs(jax.jit(lambda: solved(field, exact(1.0), 1.0, 2.0, ode.Solver(method, num_steps=int(n))))()[0] - exact(2.0))
    for n in counts
  ]
  slope = np.polyfit(np.log(counts), np.log(np.asarray(errors)), 1)[0]
  assert abs(slope + ORDER[method]) < 0.15


@EACH_METHOD
@pytest.mark.parametrize("num_steps", [None, 7])
@pytest.mark.parametrize("traced", [False, True])
def test_every_evaluation_is_counted(method, num_steps, traced):
  """Also where times are traced, and the first step is diffrax's choice."""
  if num_steps is None and method in ORDER:
    pytest.skip("has no error control")
  calls = []

  def field(t, y):
    jax.debug.callback(lambda _: calls.append(1), t)
    return jnp.cos(t) * y

  solver = ode.Solver(method, 1e-4, 1e-4, num_steps=num_steps)
  run = lambda end: solved(field, jnp.ones(2), 0.0, end, solver)
  _, nfe, flag = jax.jit(run)(1.5) if traced else run(1.5)
  jax.effects_barrier()
  assert nfe == len(calls)
  assert num_steps is None or flag.accepted == num_steps


def gradient_problem(adjoint, num_steps=None, tolerance=1e-10, method="tsit5"):
  """A loss of (parameters, which the field captures; y0; t0; t1)."""
  solver = ode.Solver(method, tolerance, tolerance, 64 if num_steps is None else 4096, num_steps, adjoint)

  def loss(p, y, t0, t1):
    field = lambda t, y: {"a": jnp.tanh(p @ y["a"]) + jnp.sin(t) * p[0], "b": y["a"][0] * y["b"]}
    end, _, _ = ode.solve(field, {"a": y, "b": jnp.asarray(0.5)}, t0, t1, jnp.asarray(0.1), solver)
    return jnp.sum(end["a"] ** 2) - 0.7 * end["b"]

  return loss


POINT = np.array([[-0.3, 1.1], [-0.9, 0.2]]), np.array([0.4, -0.7]), np.array(0.1), np.array(1.3)


def differences(f, point, h=1e-5):
  """Central differences of f in every entry of every argument."""
  for i, argument in enumerate(point):
    out = np.empty(np.shape(argument))
    for index in np.ndindex(out.shape):
      step = np.zeros(out.shape)
      step[index] = h
      shifted = lambda sign: [a + sign * step if k == i else a for k, a in enumerate(point)]
      out[index] = (f(*shifted(1)) - f(*shifted(-1))) / (2 * h)
    yield out


@pytest.mark.parametrize(
  ("adjoint", "method", "num_steps"),
  [(adjoint, "tsit5", None) for adjoint in ADJOINTS] + [(adjoint, "rk4", 64) for adjoint in ADJOINTS],
)
def test_gradients_are_those_of_central_differences(adjoint, method, num_steps, x64):
  """For captured parameters, y0, t0 and t1 (the continuous one by the endpoint rule), 1e-5 relative."""
  loss = gradient_problem(adjoint, num_steps, 1e-9, method)
  point = jax.tree.map(jnp.asarray, POINT)
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*point)
  for got, wanted in zip(gradient, differences(jax.jit(loss), POINT), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)
