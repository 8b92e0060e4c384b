import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import affine_steps, errors, moments
from oracles import SDES, gaussian

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
EACH_SAMPLER = pytest.mark.parametrize("make", ["reverse_sde", "reverse_diffusion", "stochastic_heun"])
NFE = {"reverse_sde": 1, "reverse_diffusion": 1, "stochastic_heun": 2}


def orders(make, sde, steps, eta=1.0):
  """Observed weak orders of mean and variance between a number of steps and four times as many; inf where exact."""
  grids = [jd.time_grid(sde, n, t0=0.05 * sde.t1) for n in (steps, 4 * steps)]
  coarse, fine = (errors(getattr(jd.samplers, make)(sde, ts, eta), gaussian(), eta) for ts in grids)
  return np.where(fine < 1e-10, np.inf, np.log(coarse / fine) / np.log(4))


@EACH_SDE
def test_euler_maruyama_has_weak_order_one(sde, x64):
  order = orders("reverse_sde", sde, 400)
  assert np.all((order > 0.9) & (order < 1.2)), order


@EACH_SDE
def test_reverse_diffusion_has_weak_order_one(sde, x64):
  """Its mean is exact where f = 0: a step shrinks by 1 - G^2 / v_t = v_s / v_t."""
  order = orders("reverse_diffusion", sde, 400)
  exact = isinstance(sde, jd.VE | jd.EDM)
  assert np.isinf(order[0]) == exact
  assert np.all((order > 0.9) & ((order < 1.2) | [exact, False])), order


@EACH_SDE
def test_stochastic_heun_has_weak_order_two(sde, x64):
  order = orders("stochastic_heun", sde, 400)
  assert np.all((order > 1.8) & (order < 2.4)), order


@pytest.mark.parametrize(("make", "order"), [("reverse_sde", 1), ("reverse_diffusion", 1), ("stochastic_heun", 2)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_every_amount_of_noise_has_the_same_marginals(make, order, eta, x64):
  assert np.all(np.abs(orders(make, jd.SubVP(), 400, eta) - order) < 0.2)


@EACH_SDE
def test_moments_by_recursion_are_those_of_samples(sde):
  """The oracle of the orders against 4000 samples of the sampler as it is called, 4 standard errors."""
  data, n, key = gaussian(), 4000, jax.random.key(0)
  sampler = jd.samplers.stochastic_heun(sde, jd.time_grid(sde, 12), eta=0.8)
  mean, variance = data.moments(sde, sampler.ts[:1])
  x_T = mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(1), (n, 3))
  x = jax.jit(lambda x: sampler(key, x, data.score(sde)).x)(x_T)
  mean, variance = moments(sampler, data)
  assert np.all(np.abs(x.mean(axis=0) - mean) < 4 * np.sqrt(variance / n))
  np.testing.assert_allclose(x.var(axis=0), variance, rtol=4 * np.sqrt(2 / n))


@EACH_SDE
def test_reverse_diffusion_steps_by_the_exact_forward_process(sde, x64):
  """a and G of the step carry p_{0s} to p_{0t} of the data, and a step is twice the mean less the forward mean."""
  sampler = jd.samplers.reverse_diffusion(sde, jd.time_grid(sde, 20, t0=0.01 * sde.t1))
  slope, _, noise = affine_steps(sampler, lambda x, t: jnp.zeros_like(x), 1)
  alpha, sigma = sde.marginal(sampler.ts)
  a = 2 - slope[:, 0]
  np.testing.assert_allclose(a * alpha[1:], alpha[:-1], rtol=1e-9)
  np.testing.assert_allclose(a**2 * sigma[1:] ** 2 + noise[:, 0] ** 2, sigma[:-1] ** 2, rtol=1e-9)
  push = affine_steps(sampler, lambda x, t: jnp.ones_like(x), 1)[1]
  np.testing.assert_allclose(push, noise**2, rtol=1e-9)


@pytest.mark.parametrize("sde", [SDES["subvp"], SDES["ve"]], ids=["subvp", "ve"])
@pytest.mark.parametrize("make", ["reverse_diffusion", "stochastic_heun"])
def test_coefficients_are_accurate_in_single_precision(make, sde):
  """1000 steps: noise and slope against double precision. Rounding of sigma alone, of steps 1% long, is 1e-5."""
  ts = np.asarray(jd.time_grid(sde, 1000))
  build = lambda: affine_steps(getattr(jd.samplers, make)(sde, jnp.asarray(ts)), lambda x, t: -x, 1)
  single = build()
  with jax.enable_x64(True):
    ts = ts.astype(np.float64)
    double = build()
  np.testing.assert_allclose(single[2], double[2], rtol=1e-3)


def test_noise_of_stochastic_heun_is_the_integral_of_squared_diffusion(x64):
  """One long step with the score zero, against 20 000 midpoints; the noise is carried by the drift of the guess."""
  for sde in SDES.values():
    ts = jnp.asarray([0.6, 0.4]) * sde.t1
    h = ts[0] - ts[1]
    g = sde.diffusion(ts[1] + (jnp.arange(20_000.0) + 0.5) / 20_000 * h)
    noise = affine_steps(jd.samplers.stochastic_heun(sde, ts), lambda x, t: jnp.zeros_like(x), 1)[2][0, 0]
    carried = 1 - 0.5 * h * sde.drift(jnp.ones((1, 1)), ts[1])[0, 0]
    np.testing.assert_allclose((noise / carried) ** 2, h * jnp.mean(g**2), rtol=1e-6)


@EACH_SAMPLER
def test_evaluations_are_counted_and_the_last_denoising_is_tweedies(make):
  sde, calls = jd.VP(), []
  plain, denoised = (
    getattr(jd.samplers, make)(sde, jd.time_grid(sde, 6), denoise=denoise) for denoise in (False, True)
  )

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return gaussian().score(sde)(x, t)

  key, x_T = jax.random.key(0), jnp.ones((1, 3))
  x = plain(key, x_T, gaussian().score(sde)).x
  sample = denoised(key, x_T, score)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)] == [6 * NFE[make] + 1]
  alpha, sigma = sde.marginal(plain.ts[-1])
  np.testing.assert_allclose(
    sample.x, (x + sigma**2 * gaussian().score(sde)(x, plain.ts[-1:])) / alpha, rtol=1e-4, atol=1e-6
  )


@EACH_SAMPLER
def test_example_k_is_the_same_in_any_batch_and_path_and_nan_is_reported(make):
  sde, key = jd.VE(), jax.random.key(0)
  sampler = getattr(jd.samplers, make)(sde, jd.time_grid(sde, 8, "uniform"), path=4)
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, gaussian().score(sde)(x, t))
  cond = {"broken": jnp.asarray([False, True, False])}
  x_T = sde.prior_sample(key, (3, 3))
  whole = sampler(key, x_T, score, cond)
  alone = sampler(jd.example_keys(key, 2, 1), x_T[2:], score, {"broken": jnp.zeros(1, bool)})
  np.testing.assert_allclose(whole.x[2:], alone.x, rtol=1e-5)
  assert whole.path.shape == (3, 3, 3)
  np.testing.assert_array_equal(whole.path[-1], whole.x)
  assert whole.status.code.tolist() == [0, 2, 0]
  assert whole.status.accepted[1] in (3, 4, 5)


@EACH_SAMPLER
def test_a_sampler_may_be_built_inside_jit_with_a_learned_process(make):
  """Gradients reach the numbers of a process that is traced."""

  def loss(top):
    sde = jd.VP(0.1, top)
    return jnp.sum(getattr(jd.samplers, make)(sde, jnp.linspace(1.0, 0.1, 5))(key, x_T, lambda x, t: -2 * x).x ** 2)

  key, x_T = jax.random.key(0), jnp.ones((2, 2))
  value, slope = jax.jit(jax.value_and_grad(loss))(10.0)
  difference = (loss(10.05) - loss(9.95)) / 0.1
  np.testing.assert_allclose(slope, difference, rtol=2e-2)
  np.testing.assert_allclose(value, loss(10.0), rtol=1e-5)


@pytest.mark.parametrize("make", ["reverse_diffusion", "stochastic_heun"])
def test_bad_input_is_refused(make, untyped):
  factory, ts = getattr(jd.samplers, make), jnp.asarray([1.0, 0.5])
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
    jd.samplers.stochastic_heun(jd.VP(), jnp.asarray([1.0, 0.0]))
  sampler = jd.samplers.reverse_diffusion(jd.VP(), jnp.asarray([1.0, 0.5, 0.0]))
  assert jnp.all(jnp.isfinite(sampler(jax.random.key(0), jnp.ones((2, 2)), lambda x, t: -x).x))
