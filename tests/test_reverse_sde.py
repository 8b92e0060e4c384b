import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import NORMAL
from moments import errors, moments, walks
from oracles import gaussian
from switch import EACH_SDE, NAMES, Switch

import jaxdiff as jd

NFE = {"reverse_sde": 1, "reverse_diffusion": 1, "stochastic_heun": 2}
EACH_SAMPLER = pytest.mark.parametrize("make", NFE)
SUBVP = Switch(NAMES.index("subvp"))
KEY = jax.random.key(0)
TS = np.linspace(1.0, 0.1, 9, dtype=np.float32)


@functools.cache
def of_two_grids(make):
  """The walks over 400 steps and over four times as many."""

  def run(sde, eta):
    grids = [jd.time_grid(sde, n, t0=0.05 * sde.t1) for n in (400, 1600)]
    return walks([getattr(jd.samplers, make)(sde, ts, eta) for ts in grids], gaussian())

  return jax.jit(run)


def orders(make, sde, eta=1.0):
  """Observed weak orders of mean and variance between 400 steps and four times as many; inf where exact."""
  coarse, fine = (errors(walk, eta) for walk in of_two_grids(make)(sde, eta))
  return np.where(fine < 1e-10, np.inf, np.log(coarse / fine) / np.log(4))


@EACH_SDE
def test_euler_maruyama_has_weak_order_one(sde, x64):
  order = orders("reverse_sde", sde)
  assert np.all((order > 0.9) & (order < 1.2)), order


@EACH_SDE
def test_reverse_diffusion_has_weak_order_one(sde, x64):
  """Its mean is exact where f = 0: a step shrinks by 1 - G^2 / v_t = v_s / v_t."""
  order = orders("reverse_diffusion", sde)
  exact = NAMES[sde.index] in ("ve", "edm")
  assert np.isinf(order[0]) == exact
  assert np.all((order > 0.9) & ((order < 1.2) | [exact, False])), order


@EACH_SDE
def test_stochastic_heun_has_weak_order_two(sde, x64):
  order = orders("stochastic_heun", sde)
  assert np.all((order > 1.8) & (order < 2.4)), order


@pytest.mark.parametrize(("make", "order"), [("reverse_sde", 1), ("reverse_diffusion", 1), ("stochastic_heun", 2)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_every_amount_of_noise_has_the_same_marginals(make, order, eta, x64):
  """At eta = 0 these are the orders of Euler's and of Heun's method for the flow."""
  assert np.all(np.abs(orders(make, SUBVP, eta) - order) < 0.2)


@functools.cache
def sampled():
  """4000 samples in 12 steps, and the walk that they take."""

  def run(sde):
    data, sampler = gaussian(), jd.samplers.stochastic_heun(sde, jd.time_grid(sde, 12), eta=0.8)
    mean, variance = data.moments(sde, sampler.ts[:1])
    x_T = mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(1), (4000, 3))
    return sampler(KEY, x_T, data.score(sde)).x, walks([sampler], data)[0]

  return jax.jit(run)


@EACH_SDE
def test_moments_by_recursion_are_those_of_samples(sde):
  """The oracle of the orders against 4000 samples of the sampler as it is called, 4 standard errors."""
  x, walk = jax.device_get(sampled()(sde))
  mean, variance = moments(walk)
  assert np.all(np.abs(x.mean(axis=0) - mean) < 4 * np.sqrt(variance / 4000))
  np.testing.assert_allclose(x.var(axis=0), variance, rtol=4 * np.sqrt(2 / 4000))


@functools.cache
def all_nodes(steps):
  """Coefficients of reverse diffusion and stochastic Heun, the marginals, and g^2 at 2000 midpoints of each step."""

  def run(sde):
    ts = jd.time_grid(sde, steps, t0=0.01 * sde.t1)
    diffusion, heun = (
      make(sde, ts).method.nodes for make in (jd.samplers.reverse_diffusion, jd.samplers.stochastic_heun)
    )
    place = (jnp.arange(2000.0) + 0.5) / 2000
    inside = ts[1:, None] + place[None] * (ts[:-1] - ts[1:])[:, None]
    squared = jnp.mean(sde.diffusion(inside.reshape(-1)).reshape(inside.shape) ** 2, axis=1)
    unit = sde.drift(jnp.ones((len(ts), 1), ts.dtype), ts)[:, 0]
    return {
      "diffusion": diffusion,
      "heun": heun,
      "ts": ts,
      "marginal": sde.marginal(ts),
      "f": unit,
      "g": sde.diffusion(ts),
      "mean": squared,
    }

  return jax.jit(run)


@EACH_SDE
def test_coefficients_of_reverse_diffusion(sde, x64):
  """a and G of the step carry p_{0s} to p_{0t} of the data; the step is 2 - a and G^2 score (Appendix E)."""
  found = jax.device_get(all_nodes(20)(sde))
  (alpha, sigma), (t, keep, push, spread) = found["marginal"], found["diffusion"]
  a = 2 - keep
  np.testing.assert_array_equal(t, found["ts"][:-1])
  np.testing.assert_allclose(a * alpha[1:], alpha[:-1], rtol=1e-9)
  np.testing.assert_allclose(a**2 * sigma[1:] ** 2 + spread**2, sigma[:-1] ** 2, rtol=1e-9)
  np.testing.assert_allclose(push, spread**2, rtol=1e-9)


@EACH_SDE
def test_coefficients_of_stochastic_heun(sde, x64):
  """Both slopes by f and g at their ends; the noise by the integral of g^2, against 2000 midpoints."""
  found = jax.device_get(all_nodes(20)(sde))
  (*_, h, pull, push, pull_next, push_next, spread), f, g = found["heun"], found["f"], found["g"]
  for value, expected in zip(
    (pull, push, pull_next, push_next), (-f[:-1], g[:-1] ** 2, -f[1:], g[1:] ** 2), strict=True
  ):
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(spread**2, h * found["mean"], rtol=1e-5)


@functools.cache
def on_a_given_grid():
  make = jd.samplers.reverse_diffusion, jd.samplers.stochastic_heun
  return jax.jit(lambda sde, ts: [sampler(sde, ts).method.nodes[-1] for sampler in make])


@pytest.mark.parametrize("name", ["subvp", "ve"])
def test_coefficients_are_accurate_in_single_precision(name):
  """1000 steps: the noise against double precision. Rounding of sigma alone, of steps 1% long, is 1e-5."""
  sde = Switch(NAMES.index(name))
  ts = np.asarray(jax.jit(lambda sde: jd.time_grid(sde, 1000))(sde))
  single = on_a_given_grid()(sde, ts)
  with jax.enable_x64(True):
    double = jax.device_get(on_a_given_grid()(sde, ts.astype(np.float64)))
  for found, expected in zip(single, double, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@EACH_SAMPLER
def test_evaluations_path_denoising_examples_and_broken_ones(make):
  """Every call is counted, the last denoising is Tweedie's, an example beside a broken one is the same in any order."""
  sde, calls, exact = jd.VE(), [], gaussian().score(jd.VE())

  def score(x, t, broken):
    jax.debug.callback(lambda _: calls.append(1), t)
    return jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, exact(x, t))

  @jax.jit
  def run(ts, keys, x, broken):
    plain, clean = (
      getattr(jd.samplers, make)(sde, ts, denoise=denoise, path=path)(keys, x, s, cond)
      for denoise, path, s, cond in (
        (False, 4, lambda x, t, broken: exact(x, t), {"broken": broken}),
        (True, 0, score, {"broken": broken}),
      )
    )
    return plain, clean, plain.x + sde.marginal(ts[-1])[1] ** 2 * exact(plain.x, jnp.full(3, ts[-1]))

  keys, x_T = jd.example_keys(KEY, 0, 3), (50 * NORMAL[:3]).astype(np.float32)
  plain, clean, tweedie = jax.device_get(run(TS, keys, x_T, np.asarray([False, True, False])))
  jax.effects_barrier()
  assert clean.nfe.tolist() == [len(calls)] * 3 == [8 * NFE[make] + 1] * 3
  np.testing.assert_allclose(clean.x[[0, 2]], tweedie[[0, 2]], rtol=1e-4, atol=1e-6)
  assert clean.status.code.tolist() == [0, 2, 0]
  assert clean.status.accepted[1] in (3, 4, 5)
  assert plain.path.shape == (3, 3, 3)
  np.testing.assert_array_equal(plain.path[0], x_T)
  np.testing.assert_array_equal(plain.path[-1], plain.x)
  order = np.asarray([2, 0, 1])
  np.testing.assert_allclose(run(TS, keys[order], x_T[order], np.zeros(3, bool))[0].x, plain.x[order], rtol=1e-5)


@EACH_SAMPLER
def test_a_sampler_may_be_built_inside_jit_with_a_learned_process(make, x64):
  """Gradients reach the numbers of a process that is traced: against a central difference."""

  def loss(top, ts):
    sampler = getattr(jd.samplers, make)(jd.VP(0.1, top), ts)
    return jnp.sum(sampler(KEY, jnp.ones((2, 2)), lambda x, t: -2 * x).x ** 2)

  run, ts = jax.jit(jax.value_and_grad(loss)), np.linspace(1.0, 0.1, 5)
  difference = (run(10.001, ts)[0] - run(9.999, ts)[0]) / 0.002
  np.testing.assert_allclose(run(10.0, ts)[1], difference, rtol=1e-5)


@pytest.mark.parametrize("make", ["reverse_diffusion", "stochastic_heun"])
def test_bad_input_is_refused(make, untyped):
  factory, ts = getattr(jd.samplers, make), np.asarray([1.0, 0.5], np.float32)
  with pytest.raises(TypeError, match=r"did you forget to call it: VP\(\)"):
    factory(jd.VP, ts)
  with pytest.raises(ValueError, match="ts must decrease"):
    factory(jd.VP(), ts[::-1])
  with pytest.raises(ValueError, match="eta must be at least 0"):
    factory(jd.VP(), ts, eta=-1.0)
  with pytest.raises(TypeError, match="pass its continuous process, chain.sde"):
    factory(jd.ddpm.Chain([0.1, 0.2]), ts)


def test_no_score_where_no_noise_is_left():
  with pytest.raises(ValueError, match="stochastic_heun needs noise at its last time, but sigma is 0"):
    jd.samplers.stochastic_heun(jd.VP(), np.asarray([1.0, 0.0], np.float32))
  run = lambda ts: jd.samplers.reverse_diffusion(jd.VP(), ts)(KEY, jnp.ones((2, 2)), lambda x, t: -x).x
  assert np.all(np.isfinite(jax.jit(run)(np.asarray([1.0, 0.5, 0.0], np.float32))))
