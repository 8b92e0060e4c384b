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


@pytest.mark.parametrize(
  ("method", "num_steps"), [(method, 7) for method in METHODS] + [(m, None) for m in METHODS if m not in ORDER]
)
@pytest.mark.parametrize("traced", [False, True])
def test_every_evaluation_is_counted(method, num_steps, traced):
  """Also where times are traced, and the first step is diffrax's choice."""
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


def test_states_along_the_way(x64):
  """At times between the steps and on them, where rk4 and tsit5 are interpolated to order 4: 1e-5."""
  at, exact = jnp.array([1.25, 1.5, 2.0]), PROBLEMS["sine"][1]
  for solver in (ode.Solver("tsit5", 1e-8, 1e-8), ode.Solver("rk4", num_steps=100)):
    ys, _, _ = jax.jit(lambda y: solved(PROBLEMS["sine"][0], y, 1.0, 2.0, solver, at=at))(exact(1.0))
    np.testing.assert_allclose(ys, exact(at), rtol=1e-5)


def test_the_continuous_adjoint_takes_captured_values_under_vmap_and_eagerly(x64):
  """Per-example parameters, traced and concrete arrays, integers, keys, all captured; each the same gradient."""
  solver = ode.Solver("rk4", num_steps=40, adjoint="continuous")
  concrete = jnp.array([0.3, -0.2])

  def loss(p, y, key, index, make=solver):
    noise = jax.random.normal(key, (2,))
    field = lambda t, y: jnp.tanh(p * y + noise + concrete) * jnp.cos(t) + jax.random.uniform(key) * concrete[index]
    return jnp.sum(solved(field, y, 0.0, 1.0, make)[0] ** 2)

  p, y, key = jnp.array([0.5, -1.1, 0.8]), jnp.arange(6.0).reshape(3, 2) / 5, jax.random.split(jax.random.key(0), 3)
  grad = lambda make: lambda *args: jax.grad(lambda *args: loss(*args, make), argnums=(0, 1))(*args)
  index = jnp.array([0, 1, 1])
  batched = jax.jit(jax.vmap(grad(solver)))(p, y, key, index)
  direct = jax.jit(jax.vmap(grad(ode.Solver("rk4", num_steps=40))))(p, y, key, index)
  for got, wanted in zip(batched, direct, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
  eager = grad(solver)(p[0], y[0], key[0], index[0])
  np.testing.assert_allclose(eager[0], batched[0][0], rtol=1e-9)
  number = jax.grad(lambda p: loss(p, y[0], key[0], index[0]))(0.5)
  np.testing.assert_allclose(number, batched[0][0], rtol=1e-9)


def test_the_continuous_gradient_scales_with_the_loss():
  """By a factor that atol would drown, were it not for the scale; a power of two, so that nothing rounds."""
  solver = ode.Solver(rtol=1e-5, atol=1e-5, adjoint="continuous")
  loss = lambda p, scale: scale * jnp.sum(solved(lambda t, y: jnp.sin(p * y) + t, jnp.ones(3), 0.0, 2.0, solver)[0])
  gradient = jax.jit(jax.grad(loss))
  assert gradient(1.3, 2.0**-30) == 2.0**-30 * gradient(1.3, 1.0)
  assert gradient(1.3, 0.0) == 0
  assert jnp.isnan(gradient(1.3, jnp.nan))


def test_a_backward_solve_that_fails_is_nan(x64):
  """The field is nearly constant, its derivative is not: the backward solve needs more steps than the forward one."""
  field = lambda p: lambda t, y: 1.0 + 1e-6 * jnp.sin(40 * p * y)
  end = lambda p, most, adjoint: solved(
    field(p), jnp.zeros(1), 0.0, 3.0, ode.Solver(rtol=1e-7, atol=1e-7, max_steps=most, adjoint=adjoint)
  )
  run = lambda most: jax.jit(jax.value_and_grad(lambda p: end(p, most, "continuous")[0][0]))(1.0)
  steps = int(jax.jit(lambda p: end(p, 500, "continuous"))(1.0)[2].accepted)
  value, gradient = run(steps + 1)
  assert jnp.isfinite(value)
  assert jnp.isnan(gradient)
  assert jnp.isfinite(run(500)[1])


def test_forward_mode_of_the_direct_adjoint(x64):
  loss = gradient_problem("direct", 16, method="rk4")
  point = tuple(map(jnp.asarray, POINT))
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*point)
  _, tangent = jax.jit(lambda *point: jax.jvp(loss, point, point))(*point)
  np.testing.assert_allclose(tangent, sum(jnp.sum(g * v) for g, v in zip(gradient, point, strict=True)), rtol=1e-10)


def test_memory_of_the_continuous_adjoint_does_not_grow_with_steps():
  """Compiled temporary memory of a gradient: 10 to 1000 equal steps of a state of 4 KiB."""

  def memory(adjoint, num_steps):
    solver = ode.Solver("euler", num_steps=num_steps, adjoint=adjoint)
    loss = lambda w, y: jnp.sum(solved(lambda t, y: jnp.tanh(w * y), y, 0.0, 1.0, solver)[0])
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(jnp.ones(1024), jnp.ones(1024)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = memory("continuous", 10), memory("continuous", 1000)
  assert abs(many - few) < 1024
  few, many = memory("direct", 10), memory("direct", 1000)
  assert many > few + 10 * 4096


@EACH_ADJOINT
@pytest.mark.parametrize("num_steps", [None, 5])
def test_no_host_callback_where_times_are_known(adjoint, num_steps):
  solver = ode.Solver(num_steps=num_steps, adjoint=adjoint, max_steps=16)
  start, end, first = (jnp.asarray(time) for time in (0.0, 1.0, 0.1))
  loss = lambda y: jnp.sum(ode.solve(lambda t, y: -y, y, start, end, first, solver)[0])
  assert "callback" not in str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(2)))


def test_equal_steps_take_traced_times_without_a_callback():
  solver = ode.Solver("heun", num_steps=5)
  jaxpr = jax.make_jaxpr(lambda end: solved(lambda t, y: -y, jnp.ones(2), 0.0, end, solver)[0])(1.0)
  assert "callback" not in str(jaxpr)


@pytest.mark.parametrize("num_steps", [None, 8])
def test_failures_have_their_codes(num_steps):
  run = lambda field, **options: jax.jit(lambda: solved(field, jnp.ones(2), 0.0, 1.0, ode.Solver(**options)))()
  y, _, flag = run(lambda t, y: y / jnp.where(t > 0.5, 0.0, 1.0), num_steps=num_steps, max_steps=4096)
  assert flag.code == status.NON_FINITE
  assert jnp.all(jnp.isnan(y))
  _, _, flag = run(lambda t, y: -y, max_steps=2, num_steps=num_steps)
  assert flag.code == (status.MAX_STEPS if num_steps is None else status.SUCCESS)


def test_wrong_options_are_refused(untyped):
  cases = [
    ({"method": "rk45"}, ValueError, "solver must be one of tsit5, .*, rk4, got 'rk45'"),
    ({"rtol": 0.0}, ValueError, "rtol must be positive, got 0.0"),
    ({"atol": -1.0}, ValueError, "atol must be positive, got -1.0"),
    ({"atol": float("nan")}, ValueError, "atol must be positive, got nan"),
    ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
    ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
    ({"num_steps": 2.5}, TypeError, "num_steps must be an integer, got 2.5"),
    ({"method": "euler"}, ValueError, "solver 'euler' has no error control: give it num_steps, or use one of tsit5"),
    ({"adjoint": "backsolve"}, ValueError, "adjoint must be one of 'checkpoint', 'continuous', 'direct', got 'back"),
  ]
  for options, error, message in cases:
    with pytest.raises(error, match=message):
      ode.Solver(**options)
  with pytest.raises(ValueError, match="at needs adjoint='checkpoint' or 'direct'"):
    solved(lambda t, y: -y, jnp.ones(2), 0.0, 1.0, ode.Solver(adjoint="continuous"), at=jnp.ones(1))
