"""SDEdit, inversion and interpolation against the exact flows and posteriors of Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Gaussian, compiled

import jaxdiff as jd
from jaxdiff import editing

SDE = jd.VP()
DATA = Gaussian(np.array([1.0, -0.5, 0.2]), np.full(3, 0.5))
LABELLED = DATA, Gaussian(np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.7, 1.0]))
IMAGE = np.array([-1.0, 2.0, 0.6])


def key():
  return jax.random.key(0)


@functools.cache
def grid(steps):
  return compiled(lambda: jd.time_grid(SDE, steps))


def drawn(seed, count, data=DATA):
  """Examples of the data, by NumPy."""
  return (data.mean + data.std * np.random.default_rng(seed).normal(size=(count, 3))).astype(np.float32)


def towards(x, t, center):
  """A score with a condition."""
  return (center - x) / (0.1 + t[:, None] ** 2)


def expected(ts, repeats, stochastic):
  """Mean and standard deviation of SDEdit's result from one image, by the exact posterior or flow of the data.

  Noising, mean a x and deviation s; then x_0 | x_t of the reverse process (gain v_0 a / v, what is left of v_0 beside
  it) or the probability flow, which scales the distance from the mean by sqrt(v_0 / v).
  """
  alpha, sigma = (float(value) for value in SDE.marginal(ts[0]))
  v0, v = DATA.std**2, alpha**2 * DATA.std**2 + sigma**2
  gain = v0 * alpha / v if stochastic else np.sqrt(v0 / v)
  left = v0 * sigma**2 / v if stochastic else 0.0
  mean, variance = IMAGE, np.zeros(3)
  for _ in range(repeats):
    mean = DATA.mean + gain * alpha * (mean - DATA.mean)
    variance = gain**2 * (alpha**2 * variance + sigma**2) + left
  return mean, np.sqrt(variance)


@pytest.mark.parametrize(("repeats", "stochastic"), [(1, True), (3, True), (1, False), (2, False)])
def test_sdedit_has_the_distribution_of_the_exact_posterior(repeats, stochastic):
  """Within 4.5 standard errors: ancestral steps of the optimal variance are exact, and the flow's are to 0.1%."""
  ts = editing.lower_part(grid(40), 0.55)

  def edit(key, x):  # the sampler is made within the program too
    sampler = jd.samplers.dpm_solver_pp(SDE, ts)
    if stochastic:
      sampler = jd.samplers.ancestral(SDE, ts, variance="optimal", data_variance=DATA.std[0] ** 2)
    return editing.sdedit(sampler, repeats)(key, x, DATA.score(SDE))

  count = 4000
  sample = compiled(edit, key(), np.broadcast_to(IMAGE.astype(np.float32), (count, 3)))
  mean, std = expected(ts, repeats, stochastic)
  assert sample.nfe[0] == sample.status.accepted[0] == repeats * (len(ts) - 1)
  np.testing.assert_allclose(np.mean(sample.x, axis=0), mean, atol=4.5 * std.max() / count**0.5 + 0.001)
  np.testing.assert_allclose(np.std(sample.x, axis=0), std, rtol=4.5 / (2 * count) ** 0.5 + 0.001)


def test_the_least_strength_returns_the_image_nearly_and_one_takes_all_steps():
  ts = grid(50)
  assert len(editing.lower_part(ts, 1e-6)) == 2
  np.testing.assert_array_equal(editing.lower_part(ts, 1.0), ts)
  np.testing.assert_array_equal(editing.lower_part(ts, 0.6), ts[20:])
  assert list(editing.lower_part([3, 2, 1, 0], 0.67)) == [2, 1, 0]
  x = drawn(0, 64)
  edit = lambda key, x, ts: editing.sdedit(jd.samplers.ddim(SDE, ts))(key, x, DATA.score(SDE)).x
  near, whole = compiled(lambda *args: [edit(*args, part) for part in (editing.lower_part(ts, 0.01), ts)], key(), x)
  assert 0 < np.max(np.abs(near - x)) < 0.02
  assert abs(np.corrcoef(whole[:, 1], x[:, 1])[0, 1]) < 4.5 / 64**0.5


@pytest.mark.parametrize("repeats", [1, 3])
def test_sdedit_of_an_example_is_its_own(repeats):
  """In another order, by one program; a broken example is named; the path is that of the last repetition."""
  ts, traces = editing.lower_part(grid(8), 0.5), []
  edit = lambda *args: editing.sdedit(jd.samplers.reverse_sde(SDE, ts, path=2), repeats)(*args)

  @jax.jit
  def run(keys, x, center):
    traces.append(1)
    return edit(keys, x, towards, {"center": center})

  keys, x = jax.random.split(key(), 4), drawn(0, 4)
  center = np.zeros((4, 3), np.float32)
  center[1] = np.nan
  sample = jax.device_get(run(keys, x, center))
  order = np.array([2, 3, 0, 0])
  other = run(keys[order], x[order], center[order])
  np.testing.assert_allclose(other.x, sample.x[order], rtol=1e-6)
  assert len(traces) == 1
  assert sample.status.code.tolist() == [0, 2, 0, 0]
  np.testing.assert_array_equal(sample.path[-1][::2], sample.x[::2])
  assert sample.path.shape == (3, 4, 3)
  one_key = compiled(lambda key, x: edit(key, x, towards, {"center": jnp.zeros((4, 3))}).x, key(), x)
  of_keys = run(jd.example_keys(key(), 0, 4), x, np.zeros((4, 3), np.float32)).x
  np.testing.assert_allclose(one_key, of_keys, rtol=1e-5)


def test_sdedit_counts_the_calls_of_any_score():
  """A score of several evaluations, and a sampler of two a step."""
  calls = []

  class Twice:
    def __call__(self, x, t, **cond):
      jax.debug.callback(lambda _: calls.extend([1, 1]), t[0])
      return -x

    def evaluations(self, times):
      return 2

  ts = grid(4)[2:]
  edit = lambda key, x: editing.sdedit(jd.samplers.stochastic_heun(SDE, ts), 3)(key, x, Twice())
  sample = compiled(edit, key(), np.ones((1, 2), np.float32))
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)] == [24]


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: editing.lower_part([1.0, 0.0], 0.0), ValueError, r"strength must lie in \(0, 1\], .* got 0.0"),
    (lambda: editing.lower_part([1.0, 0.0], 1.1), ValueError, "strength must lie in"),
    (lambda: editing.lower_part([1.0, 0.0], float("nan")), ValueError, "strength must lie in"),
    (lambda: editing.lower_part([1.0], 0.5), ValueError, "ts must hold at least two times, .* got 1"),
    (lambda: editing.sdedit(jd.samplers.ddim), TypeError, "sampler is a factory"),
    (lambda: editing.sdedit(jd.samplers.probability_flow(SDE)), TypeError, "on a grid of times, .* got function"),
    (lambda: editing.sdedit(3), TypeError, r"must be a function \(key, x, score, cond\) -> Sample, got int"),
    (
      lambda: editing.sdedit(jd.samplers.ddim_encode(SDE, [1.0, 0.5])),
      ValueError,
      "sampler must walk from noise to the data, but its times rise",
    ),
    (
      lambda: editing.sdedit(jd.samplers.ddim(SDE, [1.0, 0.5]), 0),
      ValueError,
      "repeats must be at least 1, how many times",
    ),
    (lambda: editing.sdedit(jd.samplers.ddim(SDE, [1.0, 0.5]), 1.5), TypeError, "repeats must be an integer"),
  ],
)
def test_bad_input_of_sdedit_is_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()


def of_label(x, t, label):
  """The score of Gaussians, one of each label."""
  first, second = (data.score(SDE)(x, t) for data in LABELLED)
  return jnp.where(label[:, None] == 0, first, second)


def pair(steps, path=0):
  ts = grid(steps)
  return jd.samplers.ddim_encode(SDE, ts), jd.samplers.ddim(SDE, ts, path=path), float(ts[-1])


def exchanged(x, old, new, t0, t1=1.0):
  """From the one Gaussian to the other by the exact flows: it keeps every standardized coordinate."""
  return LABELLED[new].flow(SDE, LABELLED[old].flow(SDE, x, t0, t1), t1, t0)


def test_exchange_converges_to_the_exact_flow_at_the_order_of_ddim(x64):
  """By the same label it returns to the image, by the other it becomes one of its Gaussian."""
  x, errors, t0 = drawn(0, 16).astype(float), [], pair(4)[2]
  exact = compiled(lambda x: [exchanged(x, 0, new, t0) for new in (0, 1)], x)
  for steps in (100, 400):
    grid(steps)  # known outside the program
    edit = jax.jit(lambda x, old, new, n=steps: editing.exchange(*pair(n)[:2])(key(), x, of_label, old, new))
    label = lambda new: {"label": np.full(16, new)}
    samples = [jax.device_get(edit(x, label(0), label(new))) for new in (0, 1)]
    assert samples[0].nfe.tolist() == samples[0].status.accepted.tolist() == [2 * steps] * 16
    errors.append([np.max(np.abs(sample.x - flow)) for sample, flow in zip(samples, exact, strict=True)])
  errors = np.asarray(errors)
  assert np.all(errors[1] < 0.03)
  order = np.log(errors[0] / errors[1]) / np.log(4)
  assert np.all((order > 0.95) & (order < 1.1)), order


def test_exchange_gives_the_distribution_of_the_other_label():
  encode, decode = jd.samplers.probability_flow_encode(SDE), jd.samplers.probability_flow(SDE)
  count, t0 = 512, pair(4)[2]
  label = np.arange(count) % 2
  x = np.where(label[:, None] == 0, drawn(0, count), drawn(1, count, LABELLED[1]))
  edit = lambda key, x, old, new: editing.exchange(encode, decode)(key, x, of_label, {"label": old}, {"label": new})
  exact = lambda x: [exchanged(x, old, 1 - old, t0) for old in (0, 1)]
  run = lambda key, x, old, new: (edit(key, x, old, new), exact(x))
  sample, flows = compiled(run, key(), x, label, 1 - label)
  for old, data in ((1, LABELLED[0]), (0, LABELLED[1])):
    made = sample.x[label == old].astype(np.float64)
    np.testing.assert_allclose(made, flows[old][label == old], atol=0.01)
    np.testing.assert_allclose(made.mean(0), data.mean, atol=4.5 * data.std.max() / (count / 2) ** 0.5)
    np.testing.assert_allclose(made.std(0), data.std, rtol=4.5 / count**0.5)
  jd.raise_if_failed(sample)


def test_interpolated_images_are_those_of_the_exact_flow():
  """The ends return, in between is the flow of the arc; every image is its own, of a program for all inputs."""
  t0, traces = float(grid(1600)[-1]), []
  fractions = np.linspace(0.0, 1.0, 5, dtype=np.float32)

  @jax.jit
  def run(keys, first, last, label):
    traces.append(1)
    return editing.interpolation(*pair(1600)[:2])(keys, first, last, fractions, of_label, {"label": label})

  @jax.jit
  def exact(first, last):
    latents = [jnp.stack([data.flow(SDE, x, t0, 1.0)[i] for i, data in enumerate(LABELLED)]) for x in (first, last)]
    arcs = jd.samplers.interpolate(*latents, fractions)
    return [data.flow(SDE, arcs[:, i], 1.0, t0) for i, data in enumerate(LABELLED)]

  keys, first, last = jd.example_keys(key(), 0, 2), drawn(0, 2), drawn(1, 2)
  sample = jax.device_get(run(keys, first, last, np.array([0, 1])))
  x = sample.x.reshape(5, 2, 3)
  np.testing.assert_allclose(x[0], first, atol=0.012)
  np.testing.assert_allclose(x[-1], last, atol=0.012)
  for i, flow in enumerate(exact(first, last)):
    np.testing.assert_allclose(x[:, i], flow, atol=0.02)
  assert sample.nfe.tolist() == [4800] * 10
  swapped = jax.device_get(run(keys[::-1], first[::-1], last[::-1], np.array([1, 0])))
  np.testing.assert_allclose(swapped.x.reshape(5, 2, 3)[:, ::-1], x, rtol=1e-5, atol=1e-6)
  assert len(traces) == 1


def test_a_broken_encoding_is_named_and_the_path_is_that_of_decoding():
  encode, decode, _ = pair(4, path=2)
  short, score = jd.samplers.probability_flow_encode(SDE, max_steps=1), lambda x, t: -x
  x, ones = np.ones((3, 3), np.float32), np.ones((3, 3), np.float32)
  x[1] = np.nan

  def run(key, x, fractions):
    between = editing.interpolation(encode, decode)(key, x, ones, fractions, score)
    return editing.exchange(encode, decode)(key, x, score, {}, {}), between

  sample, between = compiled(run, key(), x, np.array([0.2, 0.7], np.float32))
  assert sample.status.code.tolist() == [0, 2, 0]
  assert sample.path.shape == (3, 3, 3)
  assert between.status.code.tolist() == [0, 2, 0] * 2
  cut_off = compiled(lambda key, x: editing.exchange(short, decode)(key, x, score, {}, {}), key(), ones)
  assert cut_off.status.code.tolist() == [1, 1, 1]


def test_bad_input_of_exchange_and_interpolation_is_refused():
  encode, decode, _ = pair(4)
  x, score, other = np.ones((2, 3), np.float32), lambda x, t: -x, jd.samplers.ddim(SDE, grid(4)[1:])
  for make in (editing.exchange, editing.interpolation):
    with pytest.raises(ValueError, match=r"encode must walk from the data to noise, but its times fall from 1.0"):
      make(decode, decode)
    with pytest.raises(ValueError, match="decode must walk from noise to the data, but its times rise"):
      make(encode, encode)
    with pytest.raises(ValueError, match=r"decode must start where encode ends, at t = 1.0; it starts at t = 0\."):
      make(encode, other)
    with pytest.raises(TypeError, match=r"encode is a factory: did you forget to call it: samplers.ddim_encode\(\)"):
      make(jd.samplers.ddim_encode, decode)
    with pytest.raises(TypeError, match=r"decode must be a function \(key, x, score, cond\) -> Sample, got NoneType"):
      make(encode, None)
  edit, between = editing.exchange(encode, decode), editing.interpolation(encode, decode)
  with pytest.raises(ValueError, match="new_cond lacks 'label': pass all conditions"):
    edit(key(), x, score, {"label": jnp.zeros(2)}, {"other": jnp.zeros(2)})
  with pytest.raises(ValueError, match=r"cond\['label'\] must have one entry per example, \[2, ...\]"):
    edit(key(), x, score, {}, {"label": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"first and last must have one shape, got \(2, 3\) and \(1, 3\)"):
    between(key(), x, x[:1], np.zeros(1), score)
  with pytest.raises(ValueError, match=r"fractions must be a vector \[n\], got shape \(\)"):
    between(key(), x, x, 0.5, score)


CHAINS = {
  "ddpm": lambda: jd.ddpm.Chain(jd.ddpm.linear_betas()),
  "ncsn": lambda: jd.ncsn.Chain(jd.ncsn.geometric_sigmas(20)),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_sdedit_walks_the_lower_part_of_a_chain_to_its_data(kind):
  """From a level that hides the image the samples are the data's: of one point, exactly that point."""
  chain, center = CHAINS[kind](), np.array([[0.5, -0.2]], np.float32)

  def of_point(x, t):
    alpha, sigma = (value[:, None] for value in chain.sde().marginal(t))
    return (alpha * center - x) / sigma**2

  steps = editing.lower_part(np.linspace(chain.steps, 0, 11).astype(int), 0.8)
  edit = editing.sdedit(jd.samplers.ancestral(chain, steps))
  sample = compiled(lambda key, x: edit(key, x, of_point), key(), np.ones((3, 2), np.float32))
  np.testing.assert_allclose(sample.x, np.broadcast_to(center, (3, 2)), atol=1e-5)
  assert sample.nfe.tolist() == [8] * 3


def test_sdedit_needs_the_marginals_of_the_process():
  class Bare:
    t1 = 1.0
    drift = diffuse = prior_sample = prior_log_prob = lambda self, *_: None

  sampler = jd.samplers.reverse_sde(Bare(), [1.0, 0.5])
  with pytest.raises(TypeError, match=r"sampler.sde must be a ScalarSDE, got Bare, which lacks diffusion, marginal"):
    editing.sdedit(sampler)
