"""Wrapped samplers of inverse problems: what they keep, what they count, and how far they are from the posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import inverse

KEY = jax.random.key(0)
SDE = jd.VP()
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


def grid(steps, **options):
  return jd.time_grid(SDE, steps, **options)


def toward(x, t, center=0.0):
  """The score of N(center, 0.2^2 I)."""
  alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
  return (alpha * center - x) / (0.04 * alpha**2 + sigma**2)


WRAPPERS = {
  "pigdm": {},
  "reconstruction": {"weight": 2.0},
  "dps": {"scale": 0.3},
  "projection": {},
  "repaint": {"resamplings": 2, "jump": 2},
}
EACH = pytest.mark.parametrize("method", WRAPPERS)


def problem(size=2, hidden=0.0):
  y = jax.random.normal(jax.random.key(1), (size, 4, 4, 3))
  known = jnp.asarray(np.stack([MASK, MASK.T] * size)[:size])
  y = jnp.where(known[..., None] == 1, y, jnp.full((), hidden))
  return {"measurement": y, "mask": known}, jax.random.normal(jax.random.key(2), (size, 4, 4, 3))


@EACH
def test_hidden_values_change_nothing_and_known_ones_are_kept(method):
  """Bit for bit, NaN included; under one trace; an example is itself in any batch."""
  sampler = inverse.inpainting(SDE, jd.samplers.ancestral(SDE, grid(6)), method=method, **WRAPPERS[method])
  traces = []

  @jax.jit
  def run(keys, x_T, cond):
    traces.append(1)
    return sampler(keys, x_T, toward, cond)

  keys = jd.example_keys(KEY, 0, 2)
  cond, x_T = problem()
  sample = run(keys, x_T, cond)
  assert sample.status.code.tolist() == [0, 0]
  for hidden in (7.0, np.nan):
    np.testing.assert_array_equal(run(keys, x_T, problem(hidden=hidden)[0]).x, sample.x)
  known = np.broadcast_to(np.asarray(cond["mask"])[..., None] == 1, x_T.shape)
  np.testing.assert_array_equal(np.asarray(sample.x)[known], np.asarray(cond["measurement"])[known])
  assert np.all(np.asarray(sample.x)[~known] != 0)
  turned = run(keys[::-1], x_T[::-1], {name: value[::-1] for name, value in cond.items()})
  np.testing.assert_allclose(turned.x[::-1], sample.x, atol=1e-5)
  assert len(traces) == 1


@EACH
@pytest.mark.parametrize("denoise", [False, True])
def test_every_evaluation_is_counted(method, denoise):
  """A call with its gradient is one; the walks of repaint are steps + (resamplings - 1) jump floor(steps / jump)."""
  sampler = inverse.inpainting(
    SDE, jd.samplers.ddim(SDE, grid(6), denoise=denoise), MASK, method=method, **WRAPPERS[method]
  )
  calls = []

  def counted(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return toward(x, t)

  cond, x_T = problem(1)
  sample = sampler(KEY, x_T, counted, {"measurement": cond["measurement"]})
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]
  wrapped = method in ("projection", "repaint")
  assert len(calls) == {"repaint": 12}.get(method, 6) + (denoise or wrapped)


@EACH
def test_the_unknown_is_denoised_at_the_end(method):
  """Data in one point: what is hidden is there, not at the noise of the last time, 0.2."""
  ts = jd.time_grid(SDE, 20, t0=SDE.time_of_log_snr(-2 * np.log(0.2)))
  sampler = inverse.inpainting(
    SDE, jd.samplers.ancestral(SDE, ts, denoise=True), MASK, method=method, **WRAPPERS[method]
  )

  def point(x, t):
    alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
    return (0.5 * alpha - x) / sigma**2

  cond, x_T = problem(1)
  x = sampler(KEY, x_T, point, {"measurement": cond["measurement"]}).x
  np.testing.assert_allclose(np.asarray(x)[0][MASK == 0], 0.5, atol=1e-5)
