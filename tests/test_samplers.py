import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, gaussian, mixture

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def slope(errors, steps):
  return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def exact_start(data, sde, n, key):
  """x_T drawn from the exact p_t1."""
  mean, variance = data.moments(sde, jnp.full(n, sde.t1))
  return mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype)


@EACH_SDE
def test_euler_steps_of_the_flow_have_order_one(sde, x64):
  data = gaussian()
  x_T, t0 = exact_start(data, sde, 8, jax.random.key(0)), 0.05 * sde.t1
  exact = data.flow(sde, x_T, sde.t1, t0)
  errors, steps = [], [200, 400, 800, 1600]
  for n in steps:
    sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, n, t0=t0), eta=0.0)
    errors.append(
      float(jnp.max(jnp.abs(jax.jit(lambda x: sampler(jax.random.key(0), x, data.score(sde)).x)(x_T) - exact)))
    )
  assert 0.9 < slope(errors, steps) < 1.2


@EACH_SDE
def test_samples_of_the_reverse_sde_have_the_moments_of_the_data(sde):
  """Mean and variance of 8000 samples against the data's, 5 standard errors plus 3% for the 500 steps."""
  data, n = gaussian(), 8000
  sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 500))
  x_T = exact_start(data, sde, n, jax.random.key(0))
  x = jax.jit(lambda key, x: sampler(key, x, data.score(sde)).x)(jax.random.key(1), x_T)
  mean, variance = data.moments(sde, jnp.full(1, jd.schedules.start_time(sde, None, 2e-3)))
  assert np.all(np.abs(x.mean(axis=0) - mean[0]) < 5 * np.sqrt(variance[0] / n) + 0.03 * np.sqrt(variance[0]))
  np.testing.assert_allclose(x.var(axis=0), variance[0], rtol=5 * np.sqrt(2 / n) + 0.03)


@EACH_SDE
def test_noise_of_a_step_has_the_right_size(sde):
  """One step from a fixed point with score zero: variance h g^2, 20 000 draws."""
  n, ts = 20_000, jnp.asarray([0.6, 0.5]) * sde.t1
  x = jd.samplers.reverse_sde(sde, ts, eta=0.7)(jax.random.key(0), jnp.zeros((n, 1)), lambda x, t: jnp.zeros_like(x)).x
  expected = 0.7**2 * (ts[0] - ts[1]) * sde.diffusion(ts[0]) ** 2
  assert abs(x.var() / expected - 1) < 4 * np.sqrt(2 / n)


@EACH_SDE
def test_probability_flow_is_the_exact_flow(sde, x64):
  data = gaussian()
  x_T = exact_start(data, sde, 16, jax.random.key(0))
  sample = jax.jit(lambda x: jd.samplers.probability_flow(sde, 1e-8, 1e-8)(jax.random.key(0), x, data.score(sde)))(x_T)
  jd.raise_if_failed(sample)
  t0 = jd.schedules.start_time(sde, None, 2e-3)
  np.testing.assert_allclose(sample.x, data.flow(sde, x_T, sde.t1, t0), atol=1e-6)


@EACH_SDE
def test_probability_flow_of_a_mixture_has_its_modes(sde):
  """Weights of the three modes of 3000 samples within 4 standard errors, from the exact p_t1 by noising data."""
  data, n = mixture(), 3000
  x_T, _ = jd.perturb(jax.random.key(1), data.sample(jax.random.key(0), n), sde.t1, sde)
  sampler = jd.samplers.probability_flow(sde, 1e-4, 1e-4)
  x = jax.jit(lambda x: sampler(jax.random.key(0), x, data.score(sde)).x)(x_T)
  nearest = np.argmin(np.linalg.norm(np.asarray(x)[:, None] - data.means[None], axis=-1), axis=1)
  fractions = np.bincount(nearest, minlength=3) / n
  assert np.all(np.abs(fractions - data.weights) < 4 * np.sqrt(data.weights * (1 - data.weights) / n) + 0.01)


@pytest.mark.parametrize("make", ["reverse_sde", "probability_flow"])
def test_every_network_evaluation_is_counted(make):
  sde, calls = jd.VP(), []
  samplers = {
    "reverse_sde": jd.samplers.reverse_sde(sde, jd.time_grid(sde, 7)),
    "probability_flow": jd.samplers.probability_flow(sde, 1e-4, 1e-4),
  }

  def score(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return gaussian().score(sde)(x, t)

  sample = samplers[make](jax.random.key(0), jnp.ones((1, 3)), score)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]
  assert sample.status.accepted[0] > 0


@pytest.mark.parametrize("make", ["reverse_sde", "probability_flow"])
def test_example_k_is_the_same_in_any_batch(make):
  """An adaptive solve of one example alone and in a batch of 5 differs by rounding only."""
  sde, data, key = jd.VP(), gaussian(), jax.random.key(0)
  samplers = {
    "reverse_sde": jd.samplers.reverse_sde(sde, jd.time_grid(sde, 50)),
    "probability_flow": jd.samplers.probability_flow(sde),
  }
  x_T = sde.prior_sample(key, (5, 3)) * jnp.asarray([[1.0], [1.0], [30.0], [1.0], [1.0]])
  whole = samplers[make](key, x_T, data.score(sde))
  alone = samplers[make](jd.example_keys(key, 3, 1), x_T[3:4], data.score(sde))
  np.testing.assert_allclose(whole.x[3:4], alone.x, atol=2e-5)
  assert whole.nfe[3] == alone.nfe[0]


@pytest.mark.parametrize("make", ["reverse_sde", "probability_flow"])
def test_nan_is_reported_not_returned_in_silence(make):
  """The network breaks below t = 0.5 for one example of three."""
  sde = jd.VP()
  samplers = {
    "reverse_sde": jd.samplers.reverse_sde(sde, jd.time_grid(sde, 10, "uniform")),
    "probability_flow": jd.samplers.probability_flow(sde),
  }
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  cond = {"broken": jnp.asarray([False, True, False])}
  sample = jax.jit(lambda x: samplers[make](jax.random.key(0), x, score, cond))(jnp.ones((3, 1)))
  assert sample.status.code.tolist() == [0, 2, 0]
  assert jnp.isnan(sample.x[:, 0]).tolist() == [False, True, False]
  assert sample.nfe[1] < 1000
  with pytest.raises(jd.SolveError, match=r"1 of 3 examples \(index 1; the first after \d+ steps\): .*not finite"):
    jd.raise_if_failed(sample)


def test_running_out_of_steps_is_reported():
  sample = jd.samplers.probability_flow(jd.VP(), max_steps=3)(
    jax.random.key(0), jnp.ones((2, 3)), gaussian().score(jd.VP())
  )
  assert jnp.all(jnp.isnan(sample.x))
  with pytest.raises(jd.SolveError, match="2 of 2 examples .* reached max_steps .* raise max_steps"):
    jd.raise_if_failed(sample)


def test_path_runs_from_the_prior_to_the_sample():
  sde, x_T = jd.VP(), jnp.ones((4, 2))
  sample = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 12), path=True)(jax.random.key(0), x_T, lambda x, t: -x)
  assert sample.path.shape == (13, 4, 2)
  np.testing.assert_array_equal(sample.path[0], x_T)
  np.testing.assert_array_equal(sample.path[-1], sample.x)
  assert jd.samplers.reverse_sde(sde, jd.time_grid(sde, 12))(jax.random.key(0), x_T, lambda x, t: -x).path is None


def test_path_of_the_flow_is_the_exact_flow_at_every_node(x64):
  sde, data, x_T = jd.VP(), gaussian(), jnp.ones((4, 3))
  sample = jd.samplers.probability_flow(sde, 1e-7, 1e-7, path=True)(jax.random.key(0), x_T, data.score(sde))
  nodes = jd.time_grid(sde, 32)
  assert sample.path.shape == (33, 4, 3)
  for t, state in zip(nodes, sample.path, strict=True):
    np.testing.assert_allclose(state, data.flow(sde, x_T, sde.t1, t), atol=1e-4)
  np.testing.assert_array_equal(sample.path[-1], sample.x)


@pytest.mark.parametrize("make", ["reverse_sde", "probability_flow"])
def test_condition_is_split_with_the_examples(make):
  sde = jd.VP()
  samplers = {
    "reverse_sde": jd.samplers.reverse_sde(sde, jd.time_grid(sde, 200)),
    "probability_flow": jd.samplers.probability_flow(sde, 1e-4, 1e-4),
  }

  def score(x, t, center):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -(x - alpha * center) / (sigma**2 + 0.01 * alpha**2)

  center = jnp.asarray([[-3.0], [0.0], [3.0]])
  sample = samplers[make](jax.random.key(0), sde.prior_sample(jax.random.key(1), (3, 1)), score, {"center": center})
  assert jnp.all(jnp.abs(sample.x - center) < 0.5)


@pytest.mark.parametrize(
  ("ts", "message"),
  [
    ([0.1, 0.5], "ts must decrease"),
    ([0.5], r"ts must be \[steps \+ 1\] decreasing times"),
    ([1.5, 0.5], r"ts must lie in \[0, t1\] = \[0, 1.0\]"),
    ([0.5, -0.5], r"ts must lie in \[0, t1\]"),
    ([0.5, float("nan")], "ts must decrease"),
  ],
)
def test_bad_grids_are_refused(ts, message):
  with pytest.raises(ValueError, match=message):
    jd.samplers.reverse_sde(jd.VP(), jnp.asarray(ts))


def test_bad_tolerances_are_refused():
  with pytest.raises(ValueError, match="rtol must be positive, got 0"):
    jd.samplers.probability_flow(jd.VP(), rtol=0.0)
  with pytest.raises(ValueError, match="max_steps must be at least 1"):
    jd.samplers.probability_flow(jd.VP(), max_steps=0)


def test_a_sampler_may_be_built_inside_jit():
  sde, ts = jd.VP(), jd.time_grid(jd.VP(), 5)
  run = lambda key, ts: jd.samplers.reverse_sde(sde, ts)(key, jnp.ones((2, 3)), lambda x, t: -x).x
  inside = jax.jit(lambda key: run(key, ts))(jax.random.key(0))
  np.testing.assert_allclose(inside, jax.jit(run)(jax.random.key(0), ts), rtol=1e-5)


@pytest.mark.parametrize("make", ["reverse_sde", "probability_flow"])
def test_a_score_of_another_shape_is_refused(make, untyped):
  sde = jd.VP()
  samplers = {"reverse_sde": jd.samplers.reverse_sde(sde, jd.time_grid(sde, 5))}
  samplers["probability_flow"] = jd.samplers.probability_flow(sde)
  with pytest.raises(ValueError, match=r"shape of x, .*; got"):
    samplers[make](jax.random.key(0), jnp.ones((4, 2)), lambda x, t: x[:, :1])


def test_nan_at_the_start_is_not_called_a_lack_of_steps():
  x = jnp.ones((2, 1)).at[1].set(jnp.nan)
  assert jd.samplers.probability_flow(jd.VP())(jax.random.key(0), x, lambda x, t: -x).status.code.tolist() == [0, 2]
