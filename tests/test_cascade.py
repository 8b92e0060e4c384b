"""Cascades of Gaussian images of two sizes, whose marginals and conditionals are exact for every level of noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

import jaxdiff as jd
from jaxdiff import editing

SDE = jd.VP()
SMALL, LARGE = (1, 2, 1), (2, 4, 1)
PLACE = np.stack(np.meshgrid(np.arange(2), np.arange(4), indexing="ij"), -1).reshape(8, 2)
COVARIANCE = 0.6 * np.exp(-np.linalg.norm(PLACE[:, None] - PLACE[None], axis=-1) / 2)
MEAN = 0.5 * np.cos(np.arange(8.0))
POOL = np.zeros((2, 8))
for row, column in PLACE:
  POOL[column // 2, 4 * row + column] = 0.25
SMALL_COVARIANCE = POOL @ COVARIANCE @ POOL.T


def key():
  return jax.random.key(0)


@functools.cache
def base():
  return jd.samplers.dpm_solver_pp(SDE, jd.time_grid(SDE, 30))


def gain(s):
  """K of E[x | z_s] = m + K (z_s - c D m), and c."""
  c = jnp.sqrt(1 - s**2)
  noised = c**2 * SMALL_COVARIANCE + s**2 * jnp.eye(2)
  return c * jnp.linalg.solve(noised, jnp.asarray(POOL @ COVARIANCE)).T, c


def of_gaussian(x, t, mean, covariance):
  """The score at times that are all the same, of a Gaussian with a mean of each example."""
  alpha, sigma = SDE.marginal(t[0])
  spread = alpha**2 * covariance + sigma**2 * jnp.eye(len(covariance))
  away = (alpha * mean - x.reshape(len(x), -1)).astype(spread.dtype)
  return jnp.linalg.solve(spread, away.T).T.reshape(x.shape).astype(x.dtype)


def of_small(x, t):
  return of_gaussian(x, t, jnp.asarray(POOL @ MEAN)[None], jnp.asarray(SMALL_COVARIANCE))


def of_large(x, t, small, level=None):
  """p(x | z_s, s), s the same for all examples."""
  s = jnp.zeros(()) if level is None else level[0]
  k, c = gain(s)
  mean = MEAN[None] + (small.reshape(-1, 2) - c * (POOL @ MEAN)[None]) @ k.T
  return of_gaussian(x, t, mean, COVARIANCE - c * k @ (POOL @ COVARIANCE))


def close(values, expected, spread, count):
  """Within 4.5 standard errors, and 0.004 for the steps of the solver."""
  assert np.all(np.abs(values - expected) < 4.5 * spread / count**0.5 + 0.004), (values, expected)


def close_moments(x, mean, covariance):
  x, variance = np.asarray(x, np.float64).reshape(len(x), -1), np.diag(covariance)
  close(x.mean(0), mean, variance**0.5, len(x))
  close(np.cov(x.T), covariance, np.sqrt(np.outer(variance, variance) + covariance**2), len(x))


def stage(s):
  return editing.upsampler(SDE, base(), LARGE, "small", "level", s)


@pytest.mark.parametrize("s", [0.0, 0.7])
def test_a_cascade_of_exact_models_has_the_density_of_the_data(s, x64):
  """For every level of noise; and with the small image it has the covariance that the noise leaves."""
  count = 4000
  x_T = np.random.default_rng(0).normal(size=(count, *SMALL))

  def run(key, x_T):
    first = jax.vmap(jax.random.fold_in, (0, None))(jd.example_keys(key, 0, count), 0)  # as the cascade does
    return editing.cascade([base(), stage(s)])(key, x_T, (of_small, of_large)), base()(first, x_T, of_small).x, gain(s)

  sample, z, (k, c) = compiled(run, key(), x_T)
  z = z.reshape(count, 2)
  assert sample.nfe[0] == sample.status.accepted[0] == 60
  close_moments(z, POOL @ MEAN, SMALL_COVARIANCE)
  close_moments(sample.x, MEAN, COVARIANCE)
  cross = np.cov(np.concatenate([z, sample.x.reshape(count, 8)], 1).T)[:2, 2:]
  variances = np.outer(np.diag(SMALL_COVARIANCE), np.diag(COVARIANCE))
  exact = c * SMALL_COVARIANCE @ k.T
  close(cross, exact, np.sqrt(variances + exact**2), count)


@pytest.mark.parametrize("s", [0.0, 0.7])
def test_a_stage_samples_the_conditional_given_a_noised_image(s, x64):
  """Of one small image: x = m + K (c z - c D m + s eps) and what p(x | z_s, s) leaves."""
  count, z = 4000, np.array([1.5, -1.0])
  small = np.broadcast_to(z.reshape(1, *SMALL), (count, *SMALL))
  sample, (k, c) = compiled(lambda key, small: (stage(s)(key, small, of_large), gain(s)), key(), small)
  mean = MEAN + k @ (c * (z - POOL @ MEAN))
  close_moments(sample.x, mean, COVARIANCE - c * k @ (POOL @ COVARIANCE) + s**2 * k @ k.T)


def told(x, t, *, label, small=None, level=None):
  """Three scores of one function: what it is told leaves its mark."""
  shift = label[:, None, None, None].astype(x.dtype)
  if small is not None:
    shift = shift + jax.image.resize(small, x.shape, "nearest") + level[:, None, None, None]
  return shift - x


def test_examples_are_their_own_and_all_calls_are_counted():
  """Three stages under one program for all inputs and levels; in another order; a broken example is named."""
  traces, calls = [], []
  sampler = jd.samplers.reverse_sde(SDE, jd.time_grid(SDE, 3))
  larger = lambda shape, s: editing.upsampler(SDE, sampler, shape, "small", "level", s)
  chain = lambda s: editing.cascade([sampler, larger((2, 2, 1), s), larger((4, 4, 1), s)])

  @jax.jit
  def run(keys, x, label, s):
    traces.append(1)
    return chain(s)(keys, x, [told] * 3, {"label": label})

  keys, label = jax.random.split(key(), 3), np.array([0.0, np.nan, 1.0], np.float32)
  x_T = np.random.default_rng(0).normal(size=(3, 1, 1, 1)).astype(np.float32)
  sample = jax.device_get(run(keys, x_T, label, 0.3))
  assert sample.x.shape == (3, 4, 4, 1)
  assert sample.status.code.tolist() == [0, 2, 0]
  assert sample.nfe.tolist() == [9] * 3
  order = np.array([2, 0, 0])
  np.testing.assert_allclose(run(keys[order], x_T[order], label[order], 0.3).x, sample.x[order], rtol=1e-6)
  assert np.all(run(keys, x_T, label, 0.4).x[0] != sample.x[0])
  assert len(traces) == 1

  def counted(x, t, **cond):
    jax.debug.callback(lambda _: calls.append(x.shape[1]), t[0])
    return told(x, t, **cond)

  alone = jax.jit(lambda key, x, label: chain(0.3)(key, x, [counted] * 3, {"label": label}))
  last = alone(keys[2:], x_T[2:], label[2:])
  jax.effects_barrier()
  np.testing.assert_allclose(last.x[0], sample.x[2], rtol=1e-4, atol=1e-5)
  assert calls == [1] * 3 + [2] * 3 + [4] * 3
  assert last.nfe.tolist() == [9]


def test_a_cascade_of_one_stage_is_its_sampler():
  sampler, score = jd.samplers.reverse_sde(SDE, jd.time_grid(SDE, 3)), lambda x, t: -x

  def run(key, x_T):
    first = jax.vmap(jax.random.fold_in, (0, None))(jd.example_keys(key, 0, 2), 0)
    return editing.cascade([sampler])(key, x_T, [score]).x, sampler(first, x_T, score).x

  np.testing.assert_array_equal(*compiled(run, key(), np.ones((2, 3), np.float32)))


def test_bad_input_of_cascades_is_refused():
  score, encode = lambda x, t, **cond: -x, jd.samplers.ddim_encode(SDE, [1.0, 0.5])
  for s in (-0.1, 1.0, float("nan")):
    with pytest.raises(ValueError, match=r"augmentation must lie in \[0, 1\), the level of noise .* got"):
      stage(s)
  with pytest.raises(ValueError, match="augmentation=0.3 needs level, the name of the condition"):
    editing.upsampler(SDE, base(), LARGE, "small", augmentation=0.3)
  with pytest.raises(ValueError, match="sampler must walk from noise to the data"):
    editing.upsampler(SDE, encode, LARGE, "small")
  with pytest.raises(TypeError, match="sampler is a factory"):
    editing.upsampler(SDE, jd.samplers.ddim, LARGE, "small")
  with pytest.raises(TypeError, match=r"sde is a class: did you forget to call it: VP\(\)"):
    editing.upsampler(jd.VP, base(), LARGE, "small")
  small = x_T = np.zeros((2, *SMALL), np.float32)
  with pytest.raises(ValueError, match="cond has 'level', which this stage makes itself: leave it out"):
    stage(0.1)(key(), small, score, {"level": np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match="stages must hold at least one sampler"):
    editing.cascade([])
  with pytest.raises(TypeError, match=r"stages\[1\] must be a function"):
    editing.cascade([base(), None])
  run = editing.cascade([base(), stage(0.1)])
  with pytest.raises(TypeError, match="scores must be a list or tuple of one score a stage, got function"):
    run(key(), x_T, score)
  with pytest.raises(ValueError, match="scores must hold one score a stage, 2; got 1"):
    run(key(), x_T, [score])
  with pytest.raises(ValueError, match=r"cond\['label'\] must have one entry per example"):
    run(key(), x_T, [score, score], {"label": np.zeros(3)})


def seen_by(cond, most=0.6, keys=None, count=2000):
  """What a loss and its network are told."""

  def inner(key, x0, network, cond, u=None):
    return jnp.zeros(len(x0)), {"key": jax.random.key_data(key), "cond": cond, "other": jnp.ones(len(x0))}

  def run(keys, x0, cond):
    return jd.losses.noised_condition(inner, "small", "level", most)(keys, x0, told, cond)

  value, aux = compiled(run, key() if keys is None else keys, np.zeros((count, 2), np.float32), cond)
  assert value.shape == (count,)
  assert set(aux) == {"key", "cond", "other", "level"}
  np.testing.assert_array_equal(aux["level"], aux["cond"]["level"])
  return aux


def test_training_noises_an_image_by_the_level_that_it_tells():
  count, most = 2000, 0.6
  small = np.broadcast_to(np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(1, 2, 2, 2), (count, 2, 2, 2))
  seen = seen_by({"small": small, "label": np.arange(count), "level": np.full(count, 9.0, np.float32)}, most)
  np.testing.assert_array_equal(seen["cond"]["label"], np.arange(count))
  level = np.asarray(seen["cond"]["level"], np.float64)
  assert level.min() >= 0
  assert level.max() < most
  quantiles = np.sort(level) / most
  assert np.abs(quantiles - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5  # Kolmogorov, 0.1%
  s = level[:, None, None, None]
  noise = (np.asarray(seen["cond"]["small"]) - np.sqrt(1 - s**2) * small) / s
  assert abs(noise.mean()) < 4.5 / noise.size**0.5
  assert abs(noise.std() - 1) < 4.5 / (2 * noise.size) ** 0.5
  for half in (level < most / 2, level >= most / 2):
    assert abs(noise[half].std() - 1) < 4.5 / (2 * noise[half].size) ** 0.5
  of_key = lambda data: jax.vmap(jax.random.normal)(jd.example_keys(jax.random.wrap_key_data(data), 0, count))
  inner = compiled(of_key, seen["key"])
  for other in (level, inner):  # each from a key of its own
    assert abs(np.corrcoef(other, noise[:, 0, 0, 0])[0, 1]) < 4.5 / count**0.5


def test_the_noise_of_an_example_is_its_own():
  keys, small = jax.random.split(key(), 5), np.ones((5, 2, 2, 1), np.float32)
  whole = seen_by({"small": small}, keys=keys, count=5)["cond"]
  part = seen_by({"small": small[:2]}, keys=keys[3:], count=2)["cond"]
  for name in ("small", "level"):
    np.testing.assert_allclose(part[name], whole[name][3:], rtol=1e-6)


def test_two_images_are_noised_independently():
  """One loss around the other: each draws from a key of its own."""
  inner = lambda key, x0, network, cond, u=None: (jnp.zeros(len(x0)), {"noised": jnp.ravel(cond["far"])})
  loss = jd.losses.noised_condition(inner, "far", "other level", 0.6)

  def between(key, x0, network, cond, u=None):
    value, aux = loss(key, x0, network, cond, u)
    return value, aux | {"other": aux.pop("level")}

  nothing = np.zeros((500, 1), np.float32)
  cond, x0 = {"near": nothing, "far": nothing}, np.zeros((500, 2), np.float32)
  run = lambda key, x0, cond: jd.losses.noised_condition(between, "near", "level", 0.6)(key, x0, told, cond)[1]
  for keys in (key(), jax.random.split(key(), 500)):
    aux = compiled(run, keys, x0, cond)
    assert abs(np.corrcoef(aux["level"], aux["other"])[0, 1]) < 4.5 / 500**0.5


def test_bad_input_of_noised_conditions_is_refused():
  loss = jd.losses.denoising(SDE, jd.predictions.noise())
  for most in (0.0, 1.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match=r"most must lie in \(0, 1\), the largest level of noise"):
      jd.losses.noised_condition(loss, "small", "level", most)
  with pytest.raises(ValueError, match="must be the names of two conditions, got 'small' for both"):
    jd.losses.noised_condition(loss, "small", "small", 0.5)
  with pytest.raises(TypeError, match="loss is a factory"):
    jd.losses.noised_condition(jd.losses.denoising, "small", "level", 0.5)
  with pytest.raises(ValueError, match=r"cond lacks 'small', the image that is to be noised; it has \['big'\]"):
    seen_by({"big": np.zeros((2, 1), np.float32)}, count=2)
  with pytest.raises(TypeError, match=r"cond\['small'\] must be floating point, got int32"):
    seen_by({"small": np.zeros((2, 1), np.int32)}, count=2)
