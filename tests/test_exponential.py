"""The arithmetic of the exponential integrators, and what all of them and the EDM sampler owe every caller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian
from switch import Switch

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
  for k, J in enumerate(jax.jit(lambda H: exponential.moments(H, 4))(H)):
    exact = H * np.sum(0.5 * weight * np.exp(-H[:, None] * (1 - theta)) * theta**k, axis=1)
    np.testing.assert_allclose(J, exact, rtol=2e-13)


def test_moments_keep_their_digits_in_float32():
  H = np.geomspace(1e-5, 30, 40)
  run = jax.jit(lambda H: exponential.moments(H, 4))
  with jax.enable_x64(True):
    exact = jax.device_get(run(H))
  np.testing.assert_allclose(run(H.astype(np.float32)), exact, rtol=2e-6)


def test_weights_integrate_the_polynomial_through_their_nodes(x64):
  """Four values of a cubic at unequal nodes, against its own integral."""
  nodes = [np.array([v]) for v in (0.0, -0.7, -2.1, 1.0)]
  cubic = lambda theta: 0.3 - 2 * theta + theta**2 + 0.7 * theta**3

  @jax.jit
  def run(nodes, H):
    J = exponential.moments(H, 4)
    return J, exponential.interpolation_weights(nodes, J)

  J, weights = jax.device_get(run(nodes, np.array([1.3])))
  total = sum(w * cubic(node) for w, node in zip(weights, nodes, strict=True))
  np.testing.assert_allclose(total, 0.3 * J[0] - 2 * J[1] + J[2] + 0.7 * J[3], rtol=1e-12)


X = np.array([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4], [0.0, 1.0, 0.5]])
TS = np.asarray([1.0, 0.8, 0.55, 0.3, 0.15, 0.08, 0.03], np.float32)
KEY = jax.random.key(0)


def of_four(which):
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas(200))
  return Switch(which, (jd.VP(), jd.SubVP(), chain.sde(), jd.EDM(sigma_max=1e4)))


@functools.cache
def grid_of_four():
  def run(which):
    ts = jd.time_grid(of_four(which), 6, t0=0.02)
    return ts, *of_four(which).marginal(ts)

  return jax.jit(run)


@functools.cache
def end_of_four(name):
  make = (lambda sde, ts: S.edm(sde, ts)) if name == "heun" else MAKERS[name]
  return jax.jit(lambda which, ts, x: make(of_four(which), ts)(KEY, x, gaussian().score(of_four(which))).x)


@pytest.mark.parametrize("name", ["dpm_solver_3", "3m", "unipc", "heun", "euler"])
@pytest.mark.parametrize("process", [0, 1, 2], ids=["vp", "subvp", "chain"])
def test_processes_agree_under_the_change_of_variables(name, process, x64):
  """x / alpha of any process is the state of EDM at the level sigma / alpha; only the churn has another range."""
  ts, alpha, sigma = jax.device_get(grid_of_four()(process))
  here = end_of_four(name)(process, ts, X) / alpha[-1]
  np.testing.assert_allclose(here, end_of_four(name)(3, sigma / alpha, X / alpha[0]), rtol=1e-8)


@EACH
def test_evaluations_path_denoising_batches_and_broken_examples(name):
  """Every call is counted; every second state; the denoiser of the last; an example beside a broken one is the same
  alone (to rounding), and the broken one is named."""
  sde, calls, exact = jd.VP(), [], gaussian().score(jd.VP())
  x_T = X.astype(np.float32)

  def score(x, t, broken):
    jax.debug.callback(lambda _: calls.append(1), t)
    return jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, exact(x, t))

  @jax.jit
  def run(keys, x, broken):
    whole = MAKERS[name](sde, TS, denoise=True, path=2)(keys, x, score, {"broken": broken})
    plain = MAKERS[name](sde, TS)(keys, x, exact)
    return whole, plain.x, jd.denoised(sde, exact, plain.x, TS[-1])

  keys = jd.example_keys(KEY, 0, 3)
  whole, plain, last = jax.device_get(run(keys, x_T, np.array([False, True, False])))
  jax.effects_barrier()
  assert whole.nfe.tolist() == [len(calls)] * 3 == [6 * PER_STEP.get(name, 1) + 1] * 3
  assert whole.path.shape == (4, 3, 3)
  np.testing.assert_array_equal(whole.path[0], x_T)
  np.testing.assert_array_equal(whole.path[-1], whole.x)
  assert whole.status.code.tolist() == [0, 2, 0]
  assert np.isnan(whole.x[:, 0]).tolist() == [False, True, False]
  sound = np.array([0, 2])
  np.testing.assert_allclose(whole.x[sound], last[sound], atol=1e-5)
  turned = np.array([2, 0, 1])
  np.testing.assert_allclose(run(keys[turned], x_T[turned], np.zeros(3, bool))[1], plain[turned], atol=1e-5)


@pytest.mark.parametrize("name", ["dpm_solver_3", "2m_sde", "unipc", "heun"])
def test_gradient_in_a_learned_schedule(name, x64):
  """Of a sampler that is made inside jit, against a central difference; other orders go through parts of this code."""
  x_T = np.ones((2, 3))

  def total(minimum, ts):
    sde = jd.VariancePreserving(jd.schedules.Gamma(minimum, 6.0))
    return jnp.sum(MAKERS[name](sde, ts)(KEY, jnp.asarray(x_T), lambda x, t: -x / (0.3 + t[:, None])).x)

  run, grid = jax.jit(jax.value_and_grad(total)), np.linspace(1.0, 0.0, 4)
  ahead, behind = (run(-8.0 + step, grid)[0] for step in (1e-4, -1e-4))
  np.testing.assert_allclose(run(-8.0, grid)[1], (ahead - behind) / 2e-4, rtol=1e-5)
  assert ahead != behind


@EACH
def test_bad_input_is_named(name, untyped):
  make, ts = MAKERS[name], np.asarray([1.0, 0.5, 0.2, 0.1], np.float32)
  with pytest.raises(ValueError, match="ts must decrease"):
    make(jd.VP(), ts[::-1])
  with pytest.raises(TypeError, match="pass its continuous process, chain.sde()"):
    make(jd.ddpm.Chain([0.1, 0.2]), ts)
  with pytest.raises(ValueError, match="path must divide the number of steps, 3; got 2"):
    make(jd.VP(), ts, path=2)
