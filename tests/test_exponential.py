"""The arithmetic of the exponential integrators, and what all of them and the EDM sampler owe every caller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian

import jaxdiff as jd
from jaxdiff.samplers import exponential

S = jd.samplers
MAKERS = {
  "dpm_solver_1": lambda sde, ts, **kw: S.dpm_solver(sde, ts, 1, **kw),
  "dpm_solver_3": lambda sde, ts, **kw: S.dpm_solver(sde, ts, 3, **kw),
  "2m_sde": lambda sde, ts, **kw: S.dpm_solver_pp(sde, ts, 2, 1.0, **kw),
  "3m": lambda sde, ts, **kw: S.dpm_solver_pp(sde, ts, 3, **kw),
  "unipc": lambda sde, ts, **kw: S.unipc(sde, ts, 3, **kw),
  "heun": lambda sde, ts, **kw: S.edm(sde, ts, churn=3.0, **kw),
  "euler": lambda sde, ts, **kw: S.edm(sde, ts, order=1, **kw),
}
PER_STEP = {"dpm_solver_3": 3, "heun": 2}
EACH = pytest.mark.parametrize("name", MAKERS)


@pytest.mark.parametrize("sign", [1, -1])
def test_moments_are_the_integrals(sign, x64):
  """H int_0^1 exp(-H (1 - theta)) theta^k by Gauss-Legendre of 60 nodes, from steps of 1e-6 to 20, to 1e-13."""
  H = sign * np.concatenate([np.geomspace(1e-6, 0.999, 12), [1.0, 1.001], np.geomspace(1.1, 20, 12)])
  place, weight = np.polynomial.legendre.leggauss(60)
  theta = 0.5 * (place + 1)
  for k, J in enumerate(exponential.moments(jnp.asarray(H), 4)):
    exact = H * np.sum(0.5 * weight * np.exp(-H[:, None] * (1 - theta)) * theta**k, axis=1)
    np.testing.assert_allclose(J, exact, rtol=2e-13)


def test_moments_keep_their_digits_in_float32():
  H = np.geomspace(1e-5, 30, 40)
  with jax.enable_x64(True):
    exact = exponential.moments(jnp.asarray(H), 4)
  for J, J_exact in zip(exponential.moments(jnp.asarray(H, jnp.float32), 4), exact, strict=True):
    np.testing.assert_allclose(J, np.asarray(J_exact), rtol=2e-6)


def test_weights_integrate_the_polynomial_through_their_nodes(x64):
  """Four values of a cubic at unequal nodes, against its own integral."""
  nodes = [jnp.asarray([v]) for v in (0.0, -0.7, -2.1, 1.0)]
  J = exponential.moments(jnp.asarray([1.3]), 4)
  cubic = lambda theta: 0.3 - 2 * theta + theta**2 + 0.7 * theta**3
  weights = exponential.interpolation_weights(nodes, J)
  total = sum(w * cubic(node) for w, node in zip(weights, nodes, strict=True))
  np.testing.assert_allclose(total, 0.3 * J[0] - 2 * J[1] + J[2] + 0.7 * J[3], rtol=1e-12)


@pytest.mark.parametrize("name", ["dpm_solver_3", "3m", "unipc", "heun", "euler"])
@pytest.mark.parametrize("process", ["vp", "subvp", "chain"])
def test_processes_agree_under_the_change_of_variables(name, process, x64):
  """x / alpha of any process is the state of EDM at the level sigma / alpha; only the churn has another range."""
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas(200))
  sde = {"vp": jd.VP(), "subvp": jd.SubVP(), "chain": chain.sde()}[process]
  make, _data, score = MAKERS[name], gaussian(), gaussian().score
  if name == "heun":
    make = lambda sde, ts: S.edm(sde, ts)
  ts = jd.time_grid(sde, 6, t0=0.02)
  alpha, sigma = sde.marginal(ts)
  x_T = jnp.asarray([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4]])
  here = make(sde, ts)(jax.random.key(0), x_T, score(sde)).x / alpha[-1]
  edm = jd.EDM(sigma_max=float(sigma[0] / alpha[0]))
  there = make(edm, sigma / alpha)(jax.random.key(0), x_T / alpha[0], score(edm)).x
  np.testing.assert_allclose(here, there, rtol=1e-8)


@EACH
def test_every_network_evaluation_is_counted(name):
  sde, calls = jd.VP(), []

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return -x

  sample = MAKERS[name](sde, jd.time_grid(sde, 5), denoise=True)(jax.random.key(0), jnp.ones((1, 3)), score)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)] == [5 * PER_STEP.get(name, 1) + 1]


@EACH
def test_path_denoising_and_batches(name):
  """Every second state; the denoiser of the last; example 2 the same alone (to rounding)."""
  sde, score, key = jd.VP(), gaussian().score(jd.VP()), jax.random.key(0)
  ts, x_T = jd.time_grid(sde, 6), jnp.asarray([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4], [0.0, 1.0, 0.5]])
  plain = MAKERS[name](sde, ts)(key, x_T, score)
  whole = MAKERS[name](sde, ts, denoise=True, path=2)(key, x_T, score)
  assert whole.path.shape == (4, 3, 3)
  np.testing.assert_array_equal(whole.path[0], x_T)
  np.testing.assert_array_equal(whole.path[-1], whole.x)
  np.testing.assert_allclose(whole.x, jd.denoised(sde, score, plain.x, ts[-1]), atol=1e-5)
  alone = MAKERS[name](sde, ts)(jd.example_keys(key, 2, 1), x_T[2:], score)
  np.testing.assert_allclose(alone.x, plain.x[2:], atol=1e-5)


@EACH
def test_nan_is_reported(name):
  sde = jd.VP()
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  cond = {"broken": jnp.asarray([False, True, False])}
  sample = MAKERS[name](sde, jd.time_grid(sde, 5))(jax.random.key(0), jnp.ones((3, 1)), score, cond)
  assert sample.status.code.tolist() == [0, 2, 0]
  assert jnp.isnan(sample.x[:, 0]).tolist() == [False, True, False]


@EACH
def test_built_inside_jit_and_of_a_learned_schedule(name):
  """The same samples; the gradient with respect to the schedule is finite and not zero."""
  key, x_T = jax.random.key(0), jnp.ones((2, 3))

  def total(minimum, steps):
    sde = jd.VariancePreserving(jd.schedules.Gamma(minimum, 6.0))
    ts = jnp.linspace(1.0, 0.0, steps + 1)
    return jnp.sum(MAKERS[name](sde, ts)(key, x_T, lambda x, t: -x / (0.3 + t[:, None])).x)

  outside = total(-8.0, 4)
  inside, gradient = jax.jit(jax.value_and_grad(total), static_argnums=1)(-8.0, 4)
  np.testing.assert_allclose(inside, outside, rtol=1e-4)
  assert np.isfinite(gradient)
  assert gradient != 0


@EACH
def test_bad_input_is_named(name, untyped):
  make, ts = MAKERS[name], jnp.asarray([1.0, 0.5, 0.2, 0.1])
  with pytest.raises(ValueError, match="ts must decrease"):
    make(jd.VP(), ts[::-1])
  with pytest.raises(TypeError, match="pass its continuous process, chain.sde()"):
    make(jd.ddpm.Chain(jd.ddpm.linear_betas()), ts)
  with pytest.raises(ValueError, match="path must divide the number of steps, 3; got 2"):
    make(jd.VP(), ts, path=2)
