"""Wrapped samplers of inverse problems: what they keep, what they count, and how far they are from the posterior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

import jaxdiff as jd
from jaxdiff import inverse

SDE = jd.VP()
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


def key():
  return jax.random.key(0)


@functools.cache
def grid(steps):
  return compiled(lambda: jd.time_grid(SDE, steps))


def toward(x, t, center=0.0):
  """The score of N(center, 0.2^2 I)."""
  alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
  return (alpha * center - x) / (0.04 * alpha**2 + sigma**2)


def coupled(x, t):
  """The score of values with variance 0.04, and 2 more in the mean of all."""
  alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return -(x - mean) / (0.04 * alpha**2 + sigma**2) - mean / ((2 * x[0].size + 0.04) * alpha**2 + sigma**2)


WRAPPERS = {
  "pigdm": {},
  "reconstruction": {"weight": 2.0},
  "dps": {"scale": 0.3},
  "projection": {},
  "repaint": {"resamplings": 2, "jump": 2},
}
EACH = pytest.mark.parametrize("method", WRAPPERS)


def problem(size=2, hidden=0.0):
  random = np.random.default_rng(1)
  y, x_T = random.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)[:, :size]
  known = np.stack([MASK, MASK.T])[:size]
  return {"measurement": np.where(known[..., None] == 1, y, np.float32(hidden)), "mask": known}, x_T


def measured(size=2):
  cond, x_T = problem(size)
  return {"measurement": cond["measurement"]}, x_T


def run(sampler, score, cond, x_T):
  """What the sampler returns, by one program."""
  return compiled(lambda key, x_T, cond: sampler(key, x_T, score, cond), key(), x_T, cond)


@EACH
def test_hidden_values_change_nothing_and_known_ones_are_kept(method):
  """Bit for bit, NaN included; under one trace; an example is itself in any batch."""
  sampler = inverse.inpainting(SDE, jd.samplers.ancestral(SDE, grid(6)), method=method, **WRAPPERS[method])
  traces = []

  @jax.jit
  def run(keys, x_T, cond):
    traces.append(1)
    return sampler(keys, x_T, coupled, cond)

  keys = jax.random.split(key(), 2)
  cond, x_T = problem()
  sample = jax.device_get(run(keys, x_T, cond))
  assert sample.status.code.tolist() == [0, 0]
  for hidden in (7.0, np.nan):
    np.testing.assert_array_equal(run(keys, x_T, problem(hidden=hidden)[0]).x, sample.x)
  known = np.broadcast_to(np.asarray(cond["mask"])[..., None] == 1, x_T.shape)
  np.testing.assert_array_equal(np.asarray(sample.x)[known], np.asarray(cond["measurement"])[known])
  other = run(keys, x_T, cond | {"measurement": cond["measurement"] + 1})
  assert np.all(np.asarray(other.x)[~known] > np.asarray(sample.x)[~known])
  turned = run(keys[::-1], x_T[::-1], {name: value[::-1] for name, value in cond.items()})
  np.testing.assert_allclose(turned.x[::-1], sample.x, atol=1e-5)
  assert len(traces) == 1


@EACH
def test_every_evaluation_is_counted(method):
  """A call with its gradient is one; the walks of repaint are steps + (resamplings - 1) jump floor(steps / jump)."""
  denoise = method in ("dps", "projection")
  sampler = inverse.inpainting(
    SDE, jd.samplers.ddim(SDE, grid(6), denoise=denoise), MASK, method=method, **WRAPPERS[method]
  )
  calls = []

  def counted(x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return toward(x, t)

  sample = run(sampler, counted, *measured(1))
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]
  wrapped = method in ("projection", "repaint")
  assert len(calls) == {"repaint": 12}.get(method, 6) + (denoise or wrapped)


@functools.cache
def to_level():
  """A grid that ends at sigma = 0.2 alpha."""
  return compiled(lambda: jd.time_grid(SDE, 6, t0=SDE.time_of_log_snr(jnp.asarray(-2 * np.log(0.2)))))


@EACH
def test_the_unknown_is_denoised_at_the_end(method):
  """Data in one point: what is hidden is there, not at the noise of the last time, 0.2."""
  ts = to_level()
  sampler = inverse.inpainting(
    SDE, jd.samplers.ancestral(SDE, ts, denoise=True), MASK, method=method, **WRAPPERS[method]
  )

  def point(x, t):
    alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
    return (0.5 * alpha - x) / sigma**2

  np.testing.assert_allclose(run(sampler, point, *measured(1)).x[0][MASK == 0], 0.5, atol=1e-5)


@pytest.mark.parametrize("method", ["projection", "pigdm"])
def test_every_operator_is_obeyed_at_the_end(method):
  """A x = y to rounding, and bit for bit for a crop, in color, size and sharpness."""
  kernel = np.array([[0.1, 0.2, 0.0], [0.3, 1.0, 0.1], [0.0, 0.05, 0.15]])
  base, options = jd.samplers.ancestral(SDE, grid(6)), WRAPPERS[method]
  crop = inverse.crop(1, 0, 2, 3, (4, 4))
  for operator, sampler in (
    (inverse.greyscale(), inverse.colorization(SDE, base, method=method, **options)),
    (inverse.downsample(2), inverse.super_resolution(SDE, base, 2, method=method, **options)),
    (inverse.blur(kernel), inverse.deblurring(SDE, base, kernel, method=method, **options)),
    (crop, inverse.restoration(SDE, base, crop, method=method, **options)),
  ):

    def obeyed(key, x, x_T, operator=operator, sampler=sampler):
      y = operator.apply(x)
      sample = sampler(key, x_T, toward, {"measurement": y})
      return sample, operator.apply(sample.x), y

    sample, found, y = compiled(obeyed, key(), 0.5 * problem()[0]["measurement"], problem()[1])
    np.testing.assert_allclose(found, y, atol=0 if operator is crop else 1e-5)
    assert sample.status.code.tolist() == [0, 0]


def test_one_walk_of_repaint_is_projection():
  base = jd.samplers.ancestral(SDE, grid(6), path=2)
  cond, x_T = problem()
  once = run(inverse.repaint(base, inverse.mask(), resamplings=1, jump=3), toward, cond, x_T)
  expected = run(inverse.projected(base, inverse.mask()), toward, cond, x_T)
  np.testing.assert_allclose(once.path, expected.path, atol=1e-6)
  assert len(expected.path) == 4
  np.testing.assert_array_equal(expected.path[-1], expected.x)
  assert once.nfe.tolist() == expected.nfe.tolist() == [7, 7]


def test_evaluations_of_repaint_are_those_of_the_times_it_visits():
  """A score of three evaluations in the noisier half of the grid: its steps there are walked three times too."""
  ts = grid(6)

  class Several:
    def __call__(self, x, t):
      return toward(x, t)

    def evaluations(self, times):
      return jnp.where(times >= ts[2], 3, 1)

  cond, x_T = problem()
  sampler = inverse.repaint(jd.samplers.ancestral(SDE, ts), inverse.mask(), resamplings=3, jump=4)
  # Down from 0 to 6, then twice from 2 to 6: indices 0 and 1 once, 2 to 5 three times, and the end.
  assert run(sampler, Several(), cond, x_T).nfe.tolist() == [3 * (2 + 3) + 3 * 3 + 1] * 2


@EACH
def test_a_shifted_sampler_is_told_its_conditions_and_counted(method):
  """Every step asks the score, and the classifier of the shift; the shift is told the label, the operator the mask."""
  asked = []

  def log_prob(x, t, label, **measured):
    jax.debug.callback(lambda label: asked.append(len(label)), label)
    return -jnp.sum((x - label[:, None, None, None]) ** 2, axis=(1, 2, 3))

  shift = jd.guidance.mean_shift(log_prob, scale=0.1)
  base = jd.samplers.ancestral(SDE, grid(6), shift=shift)
  cond, x_T = problem(1)
  restored = lambda base: inverse.inpainting(SDE, base, method=method, **WRAPPERS[method])
  told = cond | {"label": np.ones(1, np.float32)}
  shifted = run(restored(base), jd.guidance.without(coupled, "label"), told, x_T).nfe[0]
  jax.effects_barrier()
  plain = {"repaint": 13, "projection": 7}.get(method, 6)  # as counted above
  assert len(asked) == shifted - plain == (12 if method == "repaint" else 6)


def test_a_shift_of_varying_cost_is_counted_where_repaint_walks():
  class Shift:
    def __call__(self, mean, variance, t_next, **cond):
      return jnp.zeros_like(mean)

    def evaluations(self, times):
      return jnp.where(times > 0.5, 3, 0)

  ts, (cond, x_T) = grid(6), problem(1)
  plain, shifted = (
    run(inverse.repaint(jd.samplers.ancestral(SDE, ts, shift=shift), inverse.mask(), 2, 2), coupled, cond, x_T).nfe[0]
    for shift in (None, Shift())
  )
  ends = np.asarray(ts)[np.array([0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]) + 1]
  assert shifted - plain == 3 * np.sum(ends > 0.5) > 0


def test_samplers_that_end_at_the_data():
  """No score is called at the end, what is known is exact, and the state leaps back from the data themselves."""
  chain = jd.ddpm.Chain(jd.ddpm.linear_betas())
  cond, x_T = problem()
  known = np.broadcast_to(np.asarray(cond["mask"])[..., None] == 1, x_T.shape)
  for sampler, nfe in (
    (inverse.projected(jd.samplers.ddim(SDE, jnp.asarray([1.0, 0.5, 0.0])), inverse.mask()), 2),
    (inverse.repaint(jd.samplers.ancestral(chain, range(1000, -1, -200)), inverse.mask(), 2, 5), 10),
  ):
    sample = run(sampler, toward, cond, x_T)
    assert sample.nfe.tolist() == [nfe] * 2
    assert sample.status.code.tolist() == [0, 0]
    np.testing.assert_array_equal(np.asarray(sample.x)[known], np.asarray(cond["measurement"])[known])


def test_adaptive_solves_are_per_example():
  """Guided probability flow: masks and measurements of each example are its own, in any batch."""
  sampler = inverse.inpainting(SDE, jd.samplers.probability_flow(SDE, rtol=1e-2, atol=1e-2), noise_std=0.1)
  cond, x_T = problem()
  run = jax.jit(lambda x_T, cond: sampler(key(), x_T, toward, cond))
  sample = jax.device_get(run(x_T, cond))
  jd.raise_if_failed(sample)
  order = np.array([1, 1])
  other = run(x_T[order], {name: value[order] for name, value in cond.items()})
  np.testing.assert_allclose(other.x, sample.x[order], atol=1e-4)
  assert other.nfe.tolist() == sample.nfe[order].tolist()


class Branches:
  """Classifier-free guidance by hand: both branches in one call of twice the batch, as two evaluations."""

  sde = SDE

  def __call__(self, x, t, label):
    alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(t))
    return (alpha * self.denoised(x, t, label=label) - x) / sigma**2

  def denoised(self, x, t, label):
    alpha, sigma = (v[:, None, None, None] for v in SDE.marginal(jnp.concatenate([t, t])))
    center = jnp.concatenate([label, jnp.zeros_like(label)])[:, None, None, None]
    x = jnp.concatenate([x, x])
    told, untold = jnp.split((0.04 * alpha * x + sigma**2 * center) / (0.04 * alpha**2 + sigma**2), 2)
    return 2 * told - untold

  def evaluations(self, times):
    return 2


@EACH
def test_guidance_nests_with_measurements(method):
  """The guided score hears its label and neither measurement nor mask, and its evaluations are counted."""
  sampler = inverse.inpainting(SDE, jd.samplers.ddim(SDE, grid(6)), method=method, **WRAPPERS[method])
  cond, x_T = problem()
  sample = run(sampler, Branches(), cond | {"label": np.array([1.0, -1.0], np.float32)}, x_T)
  assert sample.nfe.tolist() == [2 * {"projection": 7, "repaint": 13}.get(method, 6)] * 2
  hidden = ~np.broadcast_to(np.asarray(cond["mask"])[..., None] == 1, x_T.shape)
  assert np.mean(np.asarray(sample.x[0])[hidden[0]]) > 1.5
  assert np.mean(np.asarray(sample.x[1])[hidden[1]]) < -1.5


def test_guided_scores_pass_through_jit_as_arguments():
  """Other masks, noise levels and parameters need no other program; its denoiser belongs to its score."""
  traces = []

  @jax.jit
  def both(score, x, t, cond):
    traces.append(1)
    return score(x, t, **cond), score.denoised(x, t, **cond)

  (cond, x), t = problem(), np.array([0.3, 0.7], np.float32)
  alpha, sigma = (v[:, None, None, None] for v in compiled(SDE.marginal, t))
  apply, prediction = lambda params, x, t: params * x, jd.predictions.noise()
  found = []
  for scale, mask, noise_std in ((0.5, MASK, 0.1), (0.7, MASK, 0.1), (0.7, MASK.T, 0.1), (0.7, MASK.T, 0.2)):
    score = inverse.pigdm(jd.score_fn(apply, scale, SDE, prediction), inverse.mask(mask), noise_std)
    value, denoised = both(score, x, t, {"measurement": cond["measurement"]})
    np.testing.assert_allclose((x + sigma**2 * value) / alpha, denoised, atol=1e-4)
    found.append(np.asarray(value))
  assert all(np.any(a != b) for a, b in zip(found[1:], found, strict=False))
  assert len(traces) == 1


@EACH
def test_learned_variances_and_half_precision(method):
  """A step of learned variance keeps its v; a bfloat16 network leaves the state float32; outer vmap traces."""
  sampler = inverse.inpainting(
    SDE, jd.samplers.ancestral(SDE, grid(6), variance="learned"), MASK, method=method, **WRAPPERS[method]
  )

  def double(params, x, t):
    return jnp.concatenate([0.5 * x, jnp.full_like(x, 2 * params - 1)], axis=-1).astype(jnp.bfloat16)

  cond, x_T = measured()

  def run(v, x_T):
    return sampler(key(), x_T, jd.score_fn(double, v, SDE, jd.predictions.noise(), learned_variance=True), cond).x

  both = jax.jit(run)
  small, large = (both(v, x_T) for v in (0.0, 1.0))
  assert small.dtype == jnp.float32
  hidden = np.broadcast_to(MASK[None, :, :, None] == 0, x_T.shape)
  assert np.all(np.asarray(small)[hidden] != np.asarray(large)[hidden])
  assert jax.eval_shape(jax.vmap(run, in_axes=(None, 0)), 0.5, np.stack([x_T] * 3)).shape == (3, 2, 4, 4, 3)


def test_dps_shares_the_call_of_the_step():
  """The step of a wrapped sampler is that of the sampler where scale is 0, for every way to ask for the score."""
  cond, x_T = problem()
  for base in (
    jd.samplers.ancestral(SDE, grid(6)),
    jd.samplers.reverse_sde(SDE, grid(6), denoise=True),
  ):
    found = run(inverse.dps(base, inverse.mask(), scale=0.0), toward, cond, x_T)
    expected = run(base, toward, {}, x_T)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-3)
    assert found.nfe.tolist() == expected.nfe.tolist()
