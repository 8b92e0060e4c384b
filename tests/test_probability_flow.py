import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, gaussian, mixture

import jaxdiff as jd

KEY = jax.random.key(0)


@pytest.mark.parametrize(
  ("solver", "order", "tolerances"),
  [("tsit5", 5, (1e-5, 1e-7, 1e-9)), ("dopri5", 5, (1e-5, 1e-7, 1e-9)), ("dopri8", 8, (1e-6, 1e-9, 1e-12))],
)
def test_order_of_the_solver(solver, order, tolerances, x64):
  """The error falls with the steps as steps^-order; 0.6 below it passes, since the steps are chosen by an estimate."""
  sde, data = jd.VP(), gaussian()
  x_T = 1.5 * jnp.ones((1, 3))
  exact = data.flow(sde, x_T, sde.t1, 1e-3)
  errors, steps = [], []
  for tolerance in tolerances:
    sampler = jd.samplers.probability_flow(sde, tolerance, tolerance, t0=1e-3, solver=solver)
    sample = jax.jit(lambda x, sampler=sampler: sampler(KEY, x, data.score(sde)))(x_T)
    errors.append(float(jnp.max(jnp.abs(sample.x - exact))))
    steps.append(int(sample.status.accepted[0]))
  assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] > order - 0.6


@pytest.mark.parametrize("solver", ["tsit5", "dopri5", "dopri8"])
def test_evaluations_are_counted_and_the_last_state_is_denoised(solver):
  sde, data, calls = jd.VP(), gaussian(), []

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return data.score(sde)(x, t)

  plain, clean = (
    jd.samplers.probability_flow(sde, 1e-3, 1e-3, t0=0.1, solver=solver, denoise=denoise) for denoise in (False, True)
  )
  sample = clean(KEY, jnp.ones((1, 3)), score)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]
  before = plain(KEY, jnp.ones((1, 3)), data.score(sde)).x
  np.testing.assert_allclose(sample.x, jd.denoised(sde, data.score(sde), before, 0.1), rtol=1e-5)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_encoding_is_the_inverse_of_sampling(sde, x64):
  """x -> z -> x on a mixture, within 10 tolerances times the stretch of the map."""
  score, tolerance = mixture().score(sde), 1e-7
  encode, decode = (
    jax.jit(lambda x, f=factory(sde, tolerance, tolerance): f(KEY, x, score))
    for factory in (jd.samplers.probability_flow_encode, jd.samplers.probability_flow)
  )
  x = mixture().sample(jax.random.key(1), 8)
  latent = encode(x)
  back = decode(latent.x)
  jd.raise_if_failed(latent), jd.raise_if_failed(back)
  np.testing.assert_allclose(back.x, x, atol=10 * tolerance * max(1.0, float(jnp.max(jnp.abs(latent.x))) / 0.2))
  assert float(jnp.std(latent.x)) > 0.5 * float(jnp.std(sde.prior_sample(KEY, (4000, 2))))


def test_interpolated_latents_lie_on_the_arc(x64):
  first, last = (jax.random.normal(jax.random.key(i), (5, 3, 2)) for i in (0, 1))
  flat = lambda z: z.reshape(*z.shape[:-2], -1)
  unit = lambda z: flat(z) / jnp.linalg.norm(flat(z), axis=-1, keepdims=True)
  fractions = jnp.asarray([0.0, 0.25, 0.5, 1.0])
  path = jd.samplers.interpolate(first, last, fractions)
  np.testing.assert_allclose(path[0], first, atol=1e-14)
  np.testing.assert_allclose(path[-1], last, atol=1e-14)
  arc = jd.samplers.interpolate(unit(first), unit(last), fractions)
  np.testing.assert_allclose(jnp.linalg.norm(arc, axis=-1), 1.0, rtol=1e-12)
  angle = jnp.arccos(jnp.sum(arc[0] * arc[-1], axis=-1))
  np.testing.assert_allclose(jnp.arccos(jnp.sum(arc[0] * arc[1], axis=-1)), 0.25 * angle, rtol=1e-9)


def test_interpolation_of_equal_and_of_zero_latents_is_finite():
  z = jnp.ones((2, 3)).at[1].set(0.0)
  path = jd.samplers.interpolate(z, z, jnp.asarray([0.3]))
  np.testing.assert_allclose(path[0], z, rtol=1e-6)


def test_latents_of_another_shape_are_refused(untyped):
  with pytest.raises(ValueError, match="first and last must have one shape"):
    jd.samplers.interpolate(jnp.ones((2, 3)), jnp.ones((3, 3)), jnp.ones(1))


def test_another_solver_is_refused(untyped):
  with pytest.raises(ValueError, match="solver must be one of 'tsit5', 'dopri5', 'dopri8', got 'euler'"):
    jd.samplers.probability_flow(jd.VP(), solver="euler")
