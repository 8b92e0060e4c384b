"""Solves against closed forms, and their gradients against central differences of SciPy's solutions, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from jaxdiff import ode, status

ADAPTIVE = ["tsit5", "dopri5", "dopri8"]
ORDER = {"euler": 1, "heun": 2, "rk4": 4}
A = np.array([[-0.3, 1.1, 0.0], [-1.2, 0.1, 0.4], [0.2, -0.5, -0.6]])


def sine(t):
  """A solution of y' = 2 y / t + t^4 sin 2t - t^2 + 4 t^3."""
  known = -0.5 * t**4 * np.cos(2 * t) + 0.5 * t**3 * np.sin(2 * t) + 0.25 * t**2 * np.cos(2 * t) - t**3 + 2 * t**4
  return np.asarray(known + (np.pi - 0.25) * t**2)


def sine_slope(t, y):
  return 2 * y / t + t**4 * jnp.sin(2 * t) - t**2 + 4 * t**3


def problems(t, y):
  """A line at which a fifth power vanishes, the sine problem and a linear system, solved together."""
  line = 0.2 + (y["line"] - (0.2 * t + 3.0)) ** 5
  return {"line": line, "sine": sine_slope(t, y["sine"]), "linear": jnp.asarray(A) @ y["linear"]}


def exact(t):
  linear = scipy.linalg.expm(t * A) @ np.array([1.0, -0.5, 2.0])
  return {"line": np.asarray(0.2 * t + 3.0), "sine": sine(t), "linear": linear}


def solved(field, y0, start, end, solver, **options):
  start, end = jnp.asarray(start), jnp.asarray(end)
  return ode.solve(field, y0, start, end, jnp.asarray(1e-2), solver, **options)


def counted(field):
  """The field, and a list that grows with every evaluation."""
  calls = []

  def counting(t, y):
    jax.debug.callback(lambda _: calls.append(1), t)
    return field(t, y)

  return counting, calls


def both_ways(method, num_steps=None):
  """Solve the problems from t = 1 to 2 and back, where times are traced: the worst error and that of the sine."""
  field, calls = counted(problems)
  solver = ode.Solver(method, 1e-9, 1e-9, num_steps=num_steps)
  run = jax.jit(lambda y, start, end: solved(field, y, start, end, solver))
  worst, of_sine = 0.0, 0.0
  for start, end in ((1.0, 2.0), (2.0, 1.0)):
    calls.clear()
    y, nfe, flag = run(exact(start), start, end)
    jax.effects_barrier()
    assert int(flag.code) == status.SUCCESS
    assert int(nfe) == len(calls)
    assert num_steps is None or int(flag.accepted) == num_steps
    error = jax.tree.map(lambda y, exact: np.max(np.abs(y - exact) / (1 + np.abs(exact))), y, exact(end))
    worst, of_sine = max(worst, *error.values()), max(of_sine, error["sine"])
  return worst, of_sine


@pytest.mark.parametrize("method", ADAPTIVE)
def test_problems_with_closed_forms_both_ways(method, x64):
  """1e-7 at a tolerance of 1e-9. Every evaluation is counted, also where the first step is diffrax's choice."""
  assert both_ways(method)[0] < 1e-7


@pytest.mark.parametrize("method", ORDER)
def test_order_of_convergence_with_equal_steps(method, x64):
  """100 and 400 steps: the slope of the log error over that of the steps, 0.15 for the next term."""
  (_, few), (worst, many) = both_ways(method, 100), both_ways(method, 400)
  assert worst < {"euler": 2e-2, "heun": 2e-4, "rk4": 1e-7}[method]
  assert abs(np.log(few / many) / np.log(4) - ORDER[method]) < 0.15


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("num_steps", [7, None])
def test_every_evaluation_is_counted(method, num_steps):
  """Where times are known; both kinds of steps of the methods that begin with one evaluation."""
  field, calls = counted(lambda t, y: jnp.cos(t) * y)
  solver = ode.Solver(method, 1e-4, 1e-4, num_steps=num_steps)
  _, nfe, flag = jax.jit(lambda y: solved(field, y, 0.0, 1.5, solver))(np.ones(2, np.float32))
  jax.effects_barrier()
  assert int(nfe) == len(calls)
  assert num_steps is None or int(flag.accepted) == num_steps


POINT = np.array([[-0.3, 1.1], [-0.9, 0.2]]), np.array([0.4, -0.7]), np.array(0.1), np.array(1.3)


def loss_of(adjoint, num_steps=None, method="tsit5"):
  """A loss of (parameters, which the field captures; y0; t0; t1)."""
  solver = ode.Solver(method, 1e-8, 1e-8, 32 if num_steps is None else 4096, num_steps, adjoint)

  def loss(p, y, t0, t1):
    field = lambda t, y: {"a": jnp.tanh(p @ y["a"]) + jnp.sin(t) * p[0], "b": y["a"][0] * y["b"]}
    end, _, _ = ode.solve(field, {"a": y, "b": jnp.asarray(0.5)}, t0, t1, jnp.asarray(0.1), solver)
    return jnp.sum(end["a"] ** 2) - 0.7 * end["b"]

  return loss


@functools.cache
def gradient():
  """Of the same loss, by central differences of SciPy's solutions at a tolerance of 1e-12."""

  def loss(p, y, t0, t1):
    field = lambda t, y: [*(np.tanh(p @ y[:2]) + np.sin(t) * p[0]), y[0] * y[2]]
    solution = scipy.integrate.solve_ivp(field, (t0, t1), [*y, 0.5], "DOP853", rtol=1e-12, atol=1e-13)
    end = solution.y[:, -1]
    return np.sum(end[:2] ** 2) - 0.7 * end[2]

  def difference(i, index, h=1e-4):
    step = np.zeros(POINT[i].shape)
    step[index] = h
    shifted = lambda sign: [a + sign * step if k == i else a for k, a in enumerate(POINT)]
    return (loss(*shifted(1)) - loss(*shifted(-1))) / (2 * h)

  each = lambda i: [difference(i, index) for index in np.ndindex(POINT[i].shape)]
  return [np.reshape(each(i), POINT[i].shape) for i in range(len(POINT))]


@pytest.mark.parametrize(
  ("adjoint", "method", "num_steps"),
  [("checkpoint", "tsit5", None), ("continuous", "tsit5", None), ("direct", "tsit5", None), ("continuous", "rk4", 64)],
)
def test_gradients_are_those_of_central_differences(adjoint, method, num_steps, x64):
  """For captured parameters, y0, t0 and t1 (the continuous one by the endpoint rule), 1e-5 relative."""
  loss = loss_of(adjoint, num_steps, method)
  found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*POINT)
  for got, wanted in zip(found, gradient(), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_forward_mode_of_the_direct_adjoint(x64):
  loss = loss_of("direct", 64, "rk4")
  _, tangent = jax.jit(lambda *point: jax.jvp(loss, point, point))(*POINT)
  expected = sum(np.sum(g * v) for g, v in zip(gradient(), POINT, strict=True))
  np.testing.assert_allclose(tangent, expected, rtol=1e-5)


def test_states_along_the_way(x64):
  """At times between the steps and on them, where rk4 and tsit5 are interpolated to order 4: 1e-5."""
  at = np.array([1.25, 1.5, 2.0])
  for solver in (ode.Solver("tsit5", 1e-8, 1e-8), ode.Solver("rk4", num_steps=100)):
    run = jax.jit(lambda y, at, solver=solver: solved(sine_slope, y, 1.0, 2.0, solver, at=at)[0])
    np.testing.assert_allclose(run(sine(1.0), at), sine(at), rtol=1e-5)


def test_the_continuous_adjoint_takes_captured_values_under_vmap_and_eagerly(x64):
  """Per-example parameters, traced and concrete arrays, integers, keys, all captured; each the gradient of the steps.

  Eagerly for a Python number, which is differentiated outside `jit`.
  """
  concrete = jnp.asarray([0.3, -0.2])

  def loss(adjoint, p, y, key, index):
    noise = jax.random.normal(key, (2,))
    field = lambda t, y: jnp.tanh(p * y + noise + concrete) * jnp.cos(t) + jax.random.uniform(key) * concrete[index]
    return jnp.sum(solved(field, y, 0.0, 1.0, ode.Solver("rk4", num_steps=40, adjoint=adjoint))[0] ** 2)

  grad = lambda adjoint: jax.jit(jax.vmap(jax.grad(functools.partial(loss, adjoint), argnums=(0, 1))))
  key = jax.random.split(jax.random.key(0), 3)
  batch = np.array([0.5, -1.1, 0.8]), np.arange(6.0).reshape(3, 2) / 5, key, np.array([0, 1, 1])
  batched = grad("continuous")(*batch)
  for got, wanted in zip(batched, grad("checkpoint")(*batch), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
  number = jax.grad(lambda p: loss("continuous", p, jnp.asarray(batch[1][0]), key[0], 0))(0.5)
  np.testing.assert_allclose(number, np.asarray(batched[0])[0], rtol=1e-9)


def test_the_continuous_gradient_scales_with_the_loss():
  """By a factor that atol would drown, were it not for the scale; a power of two, so that nothing rounds."""
  solver = ode.Solver(rtol=1e-5, atol=1e-5, adjoint="continuous")
  loss = lambda p, scale: scale * jnp.sum(solved(lambda t, y: jnp.sin(p * y) + t, jnp.ones(3), 0.0, 2.0, solver)[0])
  run = jax.jit(jax.grad(loss))
  gradient = lambda scale: float(run(1.3, scale))
  assert gradient(2.0**-30) == 2.0**-30 * gradient(1.0) != 0
  assert gradient(0.0) == 0
  assert np.isnan(gradient(np.nan))


def test_a_backward_solve_that_fails_is_nan(x64):
  """The field is nearly constant, its derivative is not: the backward solve needs more steps than the forward one."""

  def run(max_steps):
    def loss(p):
      field = lambda t, y: 1.0 + 1e-6 * jnp.sin(40 * p * y)
      solver = ode.Solver(rtol=1e-7, atol=1e-7, max_steps=max_steps, adjoint="continuous")
      y, _, flag = solved(field, jnp.zeros(1), 0.0, 3.0, solver)
      return y[0], flag.accepted

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(1.0)

  (_, steps), gradient = run(500)
  assert np.isfinite(gradient)
  (value, _), gradient = run(int(steps) + 1)
  assert np.isfinite(value)
  assert np.isnan(gradient)


def test_memory_of_the_continuous_adjoint_does_not_grow_with_steps():
  """Compiled temporary memory of a gradient: 10 to 1000 equal steps of a state of 4 KiB."""

  def memory(adjoint, num_steps):
    solver = ode.Solver("euler", num_steps=num_steps, adjoint=adjoint)
    loss = lambda w, y: jnp.sum(solved(lambda t, y: jnp.tanh(w * y), y, 0.0, 1.0, solver)[0])
    vector = jax.ShapeDtypeStruct((1024,), np.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(vector, vector).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = memory("continuous", 10), memory("continuous", 1000)
  assert abs(many - few) < 1024
  assert memory("direct", 1000) > many + 10 * 4096


@pytest.mark.parametrize("adjoint", ["checkpoint", "continuous", "direct"])
def test_no_host_callback_where_times_are_known(adjoint):
  solver = ode.Solver(adjoint=adjoint, max_steps=16)
  loss = lambda y: jnp.sum(solved(lambda t, y: -y, y, 0.0, 1.0, solver)[0])
  assert "callback" not in str(jax.make_jaxpr(jax.grad(loss))(np.ones(2, np.float32)))


def test_equal_steps_take_traced_times_without_a_callback():
  solver = ode.Solver("heun", num_steps=5)
  loss = lambda end: solved(lambda t, y: -y, jnp.ones(()), 0.0, end, solver)[0]
  assert "callback" not in str(jax.make_jaxpr(jax.grad(loss))(1.0))


@pytest.mark.parametrize(("num_steps", "max_steps"), [(None, 64), (8, 2)])
def test_failures_have_their_codes(num_steps, max_steps):
  """Equal steps are not limited. The gradient of a solve that failed is NaN, not 0."""
  solver = ode.Solver(num_steps=num_steps, max_steps=max_steps)

  def end(rate, divisor):
    field = lambda t, y: rate * y / jnp.where(t > 0.5, divisor, 1.0)
    y, _, flag = solved(field, jnp.ones(2), 0.0, 1.0, solver)
    return jnp.sum(y), (y, flag.code)

  run = jax.jit(jax.value_and_grad(end, has_aux=True) if num_steps is None else lambda *args: (end(*args), 0.0))
  (_, (y, code)), gradient = run(-1.0, 1.0)
  assert code == status.SUCCESS
  assert np.all(np.isfinite(y))
  assert np.isfinite(gradient)
  cases = [(-1.0, 0.0, status.NON_FINITE)] + [(-1e3, 1.0, status.MAX_STEPS)] * (num_steps is None)
  for rate, divisor, expected in cases:
    (_, (y, code)), gradient = run(rate, divisor)
    assert code == expected
    assert np.all(np.isnan(y))
    assert num_steps is not None or np.isnan(gradient)


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
