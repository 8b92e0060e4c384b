import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import ode

MATRIX = jax.random.normal(jax.random.key(0), (5, 5))


def linear(x):
  return x @ MATRIX.T


def test_exact_trace_of_a_linear_map_and_of_a_curved_one():
  x = jax.random.normal(jax.random.key(1), (3, 5))
  value, trace = jd.divergence.exact().estimate(linear, x, None, jnp.zeros(()))
  np.testing.assert_array_equal(value, linear(x))
  np.testing.assert_allclose(trace, jnp.full((3, 1), jnp.trace(MATRIX)), rtol=1e-6)
  curved = lambda x: jnp.sin(x) * x[:, ::-1]
  _, trace = jd.divergence.exact().estimate(curved, x, None, jnp.zeros(()))
  expected = [jnp.trace(jax.jacfwd(lambda x: curved(x[None])[0])(x)) for x in x]
  np.testing.assert_allclose(trace[:, 0], expected, rtol=1e-5)


def test_exact_trace_in_chunks():
  """130 dimensions take three chunks of 64."""
  x = jnp.linspace(0.1, 1.0, 260).reshape(2, 10, 13)
  _, trace = jd.divergence.exact().estimate(lambda x: x**3, x, None, jnp.zeros(()))
  np.testing.assert_allclose(trace[:, 0], jnp.sum(3 * x**2, axis=(1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
  ("noise", "variance"),
  [
    ("rademacher", lambda s: 2 * (jnp.sum(s**2) - jnp.sum(jnp.diag(s) ** 2))),
    ("gaussian", lambda s: 2 * jnp.sum(s**2)),
  ],
)
@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinson_is_unbiased_with_the_known_variance(noise, variance, probes):
  """Only the symmetric part counts; mean within 4 standard errors, variance within 15% over 4000 keys."""
  divergence = jd.divergence.hutchinson(probes, noise)
  x, n = jnp.zeros((4000, 5)), 4000
  probes_of = lambda key: divergence.draw(key, x)
  run = jax.jit(lambda key: divergence.estimate(linear, x, probes_of(key), jnp.zeros(()))[1])
  estimates = run(jd.example_keys(jax.random.key(2), 0, n))
  assert estimates.shape == (n, probes)
  expected = variance((MATRIX + MATRIX.T) / 2)
  means = estimates.mean(axis=1)
  assert abs(means.mean() - jnp.trace(MATRIX)) < 4 * np.sqrt(expected / probes / n)
  np.testing.assert_allclose(means.var() * probes, expected, rtol=0.15)
  if probes > 1:
    claimed = divergence.standard_error(estimates)
    np.testing.assert_allclose(jnp.mean(claimed**2), expected / probes, rtol=0.15)


def test_standard_error_is_zero_for_the_exact_trace_and_unknown_for_one_probe():
  assert jd.divergence.exact().standard_error(jnp.ones((1, 1))) == 0
  assert jnp.isnan(jd.divergence.hutchinson(1).standard_error(jnp.ones((1, 1)))[0])


def test_bad_arguments_are_refused(untyped):
  with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
    jd.divergence.hutchinson(0)
  with pytest.raises(ValueError, match="noise must be 'rademacher' or 'gaussian', got 'cauchy'"):
    jd.divergence.hutchinson(1, "cauchy")


def test_a_residual_flow_tends_to_the_continuous_change_of_variables(x64):
  """One block x + h f(x) is one Euler step; sum log|det(I + h J)| tends to the integral of tr J, at first order."""
  f = lambda x: jnp.tanh(MATRIX.astype(x.dtype)[:3, :3] @ x)
  x0, trace = jnp.asarray([0.3, -0.5, 0.8]), jd.divergence.exact()

  def residual(blocks):
    def block(carry, _):
      x, log_det = carry
      jacobian = jnp.eye(3) + jax.jacfwd(f)(x) / blocks
      return (x + f(x) / blocks, log_det + jnp.linalg.slogdet(jacobian)[1]), None

    return jax.lax.scan(block, (x0, jnp.zeros(())), length=blocks)[0]

  divergence = lambda x: trace.estimate(jax.vmap(f), x[None], None, jnp.zeros(()))[1][0, 0]
  field = lambda t, y: (f(y[0]), divergence(y[0]))
  zero, one = jnp.zeros(()), jnp.ones(())
  (x1, integral), _, status = ode.solve(field, (x0, zero), zero, one, one / 10, ode.Solver(rtol=1e-10, atol=1e-10))
  assert status.code == 0
  counts = [50, 100, 200, 400]
  errors = np.asarray([[np.linalg.norm(x - x1), abs(d - integral)] for x, d in map(residual, counts)])
  np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 1, atol=0.05)
  assert np.all(errors[-1] < 1e-2)
