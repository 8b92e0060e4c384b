"""Where noise ends, schedules are traced or numbers are about to vanish: values and derivatives stay right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

import jaxdiff as jd
from jaxdiff import samplers

KEY, X = jax.random.key(0), np.asarray([[1.0, -0.5], [0.3, 2.0]], np.float32)
TO_DATA = np.asarray([1.0, 0.6, 0.3, 0.0])
TS = np.asarray([1.0, 0.7, 0.4, 0.2, 0.05], np.float32)
SCORE = lambda x, t: -x / (0.3 + t[:, None])

MAKE = {
  "ddim": samplers.ddim,
  "ancestral": lambda sde, ts: samplers.ancestral(sde, ts, "beta"),
  "dpm_solver_pp": samplers.dpm_solver_pp,
  "unipc": samplers.unipc,
  "edm": samplers.edm,
}


@pytest.mark.parametrize("kind", MAKE)
def test_gradient_of_a_process_whose_grid_ends_without_noise(kind, x64):
  """By reverse mode in beta_min, against central differences."""

  def total(beta_min):
    sample = MAKE[kind](jd.VP(beta_min=beta_min), jnp.asarray(TO_DATA))(KEY, X.astype(np.float64), SCORE)
    return jnp.sum(sample.x**2)

  run = jax.jit(jax.value_and_grad(total))
  expected = (run(0.101)[0] - run(0.099)[0]) / 0.002
  np.testing.assert_allclose(run(0.1)[1], expected, rtol=1e-4)


def test_heun_of_a_traced_process_ends_as_that_of_a_known_one():
  known = samplers.edm(jd.VP(), jnp.asarray(TO_DATA, np.float32))
  run = lambda sde: (samplers.edm(sde, jnp.asarray(TO_DATA, np.float32))(KEY, X, SCORE), known(KEY, X, SCORE))
  traced, known = compiled(run, jd.VP())
  np.testing.assert_allclose(traced.x, known.x, rtol=1e-4)
  assert (traced.status.code.tolist(), known.status.code.tolist()) == ([0, 0], [0, 0])
  assert (traced.nfe[0], known.nfe[0]) == (6, 5)


def test_derivative_in_the_amount_of_noise_exists_at_none(x64):
  total = lambda eta, ts: jnp.sum(samplers.dpm_solver_pp(jd.VP(), ts, eta=eta)(KEY, X.astype(np.float64), SCORE).x)
  run, ts = jax.jit(jax.value_and_grad(total)), TS.astype(np.float64)
  (value, slope), ahead = run(0.0, ts), run(1e-5, ts)[0]
  np.testing.assert_allclose(slope, (ahead - value) / 1e-5, rtol=1e-3)


def test_a_churn_lost_in_rounding_is_none():
  sde = jd.SubVP()
  run = jax.jit(lambda sde, churn: samplers.edm(sde, jd.time_grid(sde, 100), churn=churn)(KEY, X, SCORE))
  for churn in (1e-7, 1e-5, 1e-3):
    assert run(sde, churn).status.code.tolist() == [0, 0]


def test_a_corrector_needs_noise_where_the_chain_arrives():
  chain = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(10, 0.1, 1.0))
  corrector = samplers.langevin_corrector()
  with pytest.raises(
    ValueError, match="must not end at the data of its chain, where there is no score: end its ts at 1"
  ):
    samplers.predictor_corrector(samplers.ancestral(chain, range(10, -1, -5)), corrector)
  assert samplers.predictor_corrector(samplers.ancestral(chain, [10, 5, 1]), corrector).method.calls.shape == (4,)


def test_thresholding_keeps_a_learned_variance():
  sde = jd.VP()
  apply = lambda params, x, t: jnp.concatenate([3 * x, 0.5 * x], axis=-1)
  score = jd.score_fn(apply, None, sde, jd.predictions.data(), learned_variance=True)

  def run(x):
    bounded, chain = samplers.thresholded(sde, score), jd.ddpm.Chain(jd.ddpm.linear_betas(50))
    sample = samplers.ancestral(chain, range(50, -1, -10), "learned")(KEY, x, bounded)
    return bounded.denoised_and_v(x, 0.5), score.denoised_and_v(x, 0.5), sample.x

  (data, v), (_, plain), x = compiled(run, X)
  np.testing.assert_allclose(data, np.clip(3 * X, -1, 1), rtol=1e-6)
  np.testing.assert_array_equal(v, plain)
  assert np.max(np.abs(x)) <= 1


def test_gradient_between_equal_latents_is_finite():
  total = lambda z: jnp.sum(samplers.interpolate(z, X, jnp.asarray([0.3])) ** 2)
  assert np.all(np.isfinite(compiled(jax.grad(total), X)))


@pytest.mark.parametrize("make", [samplers.ddim, samplers.reverse_sde, samplers.unipc])
@pytest.mark.parametrize(
  ("score", "error", "message"),
  [
    (lambda x, t: x[:, :1], ValueError, r"score must return an array of the shape of x, \(2, 2\); got \(2, 1\)"),
    (lambda x, t: x[0], ValueError, r"shape of x, \(2, 2\); got \(2,\)"),
    (lambda x, t: (x, t), TypeError, "score must return a floating point array, got tuple"),
    (lambda x, t: jnp.zeros(x.shape, int), TypeError, "score must return a floating point array, got int32"),
  ],
)
def test_what_is_no_score_is_refused_not_broadcast(make, score, error, message, untyped):
  with pytest.raises(error, match=message):
    jax.eval_shape(lambda x: make(jd.VP(), TS)(KEY, x, score), X)


def test_a_grid_needs_scalar_marginals(untyped):
  with pytest.raises(TypeError, match=r"got Chain: for a chain pass chain.sde\(\)"):
    jd.time_grid(jd.ddpm.Chain([0.1, 0.2]), 10)


def test_a_path_is_not_sharded_along_its_steps(eight_devices):
  sampler = samplers.ddim(jd.VP(), TS, path=2)
  draw = jd.parallel.shard_examples(lambda _, x: sampler(KEY, x, SCORE).path, jd.parallel.make_mesh())
  with pytest.raises(ValueError, match=r"\[4, ...\] on each device; got shapes \[\(3, 4, 2\)\]: of a path, return"):
    jax.jit(draw)(0.0, jnp.ones((32, 2)))


def test_the_score_of_a_density_passes_through_jit():
  sampler = samplers.ddim(jd.VP(), TS)
  score = jd.score_of(lambda x, t: -0.5 * jnp.sum(x**2, axis=1))
  plain = jax.jit(lambda x: sampler(KEY, x, lambda x, t: -x))(X)
  np.testing.assert_allclose(jax.jit(sampler)(KEY, X, score).x, plain.x, rtol=1e-5)
  assert repr(sampler) == "ddim(VP, 4 steps)"
