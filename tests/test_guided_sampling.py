"""Guided sampling: what it samples from, the mean shift, what it costs; and every sampler with guided scores.

For two Gaussians, p_0(x | y) = N(m, v) and p_0(x) = N(0, V), the guided score is linear in x. In the coordinates
x / alpha and l = (sigma / alpha)^2, the same for every process, with a(l) = gamma / (v + l) + (1 - gamma) / (V + l),

    flow          dx = (a x - gamma m / (v + l)) / 2 dl,      reverse SDE   dx = (a x - gamma m / (v + l)) dl + dw.

Solutions are x = phi^p (const - gamma m p int phi^-p / (v + l) dl), phi = (v + l)^gamma (V + l)^(1 - gamma), with
p = 1/2 for the flow and 1 for the SDE, whose noise adds the variance phi^2 int phi^-2 dl.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import slope
from moments import affine_steps
from oracles import SDES, Gaussian, compiled
from test_sampler_conformance import build

import jaxdiff as jd
from jaxdiff.parallel import make_mesh, shard_batch

FAMILIES = [
  *("reverse_sde", "predictor_corrector", "annealed_langevin", "ancestral", "dpm_solver_pp", "unipc", "edm"),
  *("adaptive_sde", "probability_flow"),
]
M, V_TOLD, V_ALL, GAMMA = 1.0, 0.25, 1.0, 2.0
TOLD, ALL = Gaussian(np.array([M]), np.array([V_TOLD**0.5])), Gaussian(np.array([0.0]), np.array([V_ALL**0.5]))


def key():
  return jax.random.key(0)


def grid(sde, steps, **options):
  return compiled(lambda: jd.time_grid(sde, steps, **options))


def exact_ends(first, last, power, gamma=GAMMA):
  """Mean and variance at l = last, of N(0, first) at l = first."""
  log_l = np.linspace(np.log(last), np.log(first), 100_001)
  l = np.exp(log_l)
  phi = (V_TOLD + l) ** gamma * (V_ALL + l) ** (1 - gamma)
  integral = lambda values: np.trapezoid(values * l, log_l)
  mean = phi[0] ** power * integral(gamma * M * power * phi**-power / (V_TOLD + l))
  variance = first * (phi[0] / phi[-1]) ** (2 * power)
  return mean, variance + (power == 1) * phi[0] ** 2 * integral(phi**-2.0)


def ends(sde, first, last):
  """Where l is at these times."""
  return [float((sigma / alpha) ** 2) for alpha, sigma in compiled(lambda: (sde.marginal(first), sde.marginal(last)))]


def both_scores(sde):
  """Label 0 is y, label 1 all data."""
  told, everything = TOLD.score(sde), ALL.score(sde)
  return lambda x, t, label: jnp.where((label == 0)[:, None], told(x, t), everything(x, t))


def guided_to_y(sde):
  """By classifier-free guidance, for samplers without conditions."""
  guided = jd.guidance.classifier_free(both_scores(sde), {"label": 1}, GAMMA)
  return lambda x, t: guided(x, t, label=jnp.zeros(len(x), int))


def log_posterior(sde):
  """log p(y | x_t), up to a constant."""
  return lambda x, t: TOLD.log_prob(x, sde, t) - ALL.log_prob(x, sde, t)


def sampled_moments(sampler, score):
  """Mean and variance of the samples from the prior N(0, sigma^2), by recursion over affine steps."""
  mean, variance = 0.0, float(sampler.sde.marginal(sampler.ts[0])[1]) ** 2
  for slope_, shift, noise in zip(*(np.asarray(v)[:, 0] for v in affine_steps(sampler, score, 1)), strict=True):
    mean, variance = slope_ * mean + shift, slope_**2 * variance + noise**2
  return np.array([mean, variance])


def test_the_tilted_density_is_not_what_guided_sampling_samples_from():
  """At gamma = 2, v = V / 4: the tilted variance and mean are 1/7, 8/7; the flow has 1/16, 1.38, the SDE 7/64, 5/4."""
  variance = 1 / (GAMMA / V_TOLD + (1 - GAMMA) / V_ALL)
  np.testing.assert_allclose([GAMMA * M / V_TOLD * variance, variance], [8 / 7, 1 / 7])
  np.testing.assert_allclose(exact_ends(1e10, 1e-10, 0.5), [1.380, V_TOLD**GAMMA * V_ALL ** (1 - GAMMA)], rtol=1e-3)
  np.testing.assert_allclose(exact_ends(1e10, 1e-10, 1.0), [5 / 4, 7 / 64], rtol=1e-3)
  np.testing.assert_allclose(exact_ends(1e10, 1e-10, 1.0, gamma=1.0), [M, V_TOLD], rtol=1e-3)


def test_guided_flows_end_where_the_closed_form_says(x64):
  """The flow is affine in x_T: two examples give mean and variance of the samples without Monte Carlo."""
  sde = SDES["vp"]
  score = jd.guidance.classifier_free(both_scores(sde), {"label": 1}, GAMMA)
  sampler = jd.samplers.probability_flow(sde, 1e-8, 1e-8)
  x_T, cond = np.array([[0.0], [1.0]]), {"label": np.zeros(2, int)}
  low, high = compiled(lambda keys, x_T, cond: sampler(keys, x_T, score, cond).x[:, 0], key(), x_T, cond)
  t0 = grid(sde, 1)[-1]
  (alpha, _), (scale, _) = compiled(lambda: (sde.marginal(jnp.asarray(sde.t1)), sde.marginal(t0)))
  mean, variance = exact_ends(*ends(sde, sde.t1, t0), 0.5)
  found = np.array([low / scale, ((high - low) * alpha / scale) ** 2 * ends(sde, sde.t1, t0)[0]])
  np.testing.assert_allclose(found, [mean, variance], rtol=1e-5)
  np.testing.assert_allclose(found, [1.380, 1 / 16], rtol=1e-2)


@pytest.mark.parametrize("kind", ["vp", "edm"])
def test_guided_reverse_sdes_end_where_the_closed_form_says(kind, x64):
  sde = SDES[kind]
  ts = grid(sde, 400)
  found = sampled_moments(jd.samplers.stochastic_heun(sde, ts), guided_to_y(sde))
  scale = float(sde.marginal(ts[-1])[0])
  np.testing.assert_allclose(found / [scale, scale**2], exact_ends(*ends(sde, ts[0], ts[-1]), 1.0), rtol=2e-3)


def test_the_mean_shift_converges_to_guidance_of_the_score(x64):
  """The difference of their moments halves with the steps; both come to those of the reverse SDE."""
  sde, counts, apart = SDES["vp"], (100, 400), []
  t0 = compiled(lambda: sde.time_of_log_snr(jnp.asarray(8.0)))
  for steps in counts:
    ts = grid(sde, steps, t0=t0)
    shift = jd.guidance.mean_shift(log_posterior(sde), GAMMA)
    shifted = sampled_moments(jd.samplers.ancestral(sde, ts, "beta", shift=shift), ALL.score(sde))
    led = sampled_moments(jd.samplers.ancestral(sde, ts, "beta"), guided_to_y(sde))
    apart.append(np.abs(shifted - led))
  np.testing.assert_allclose([slope(each, counts) for each in np.transpose(apart)], 1.0, atol=0.1)
  scale = float(sde.marginal(t0)[0])
  np.testing.assert_allclose(shifted / [scale, scale**2], exact_ends(*ends(sde, ts[0], t0), 1.0), rtol=3e-2)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "optimal", "learned"])
def test_the_shift_is_variance_times_gradient_at_the_mean_and_the_next_time(variance, x64):
  """One step: with the same noise the shifted sample is off by scale std^2 g(mean, t_next), told its conditions."""
  sde, t, s = SDES["vp"], 0.6, 0.4
  network = lambda params, x, t, y: jnp.concatenate([0.5 * x, y], axis=1)
  model = jd.score_fn(network, None, sde, jd.predictions.data(), learned_variance=True)
  log_prob = lambda x, t, y: jnp.sum(y * jnp.sin(x) * t[:, None], axis=1)
  x, cond = np.array([[0.3, -1.0], [2.0, 0.7]]), {"y": np.array([[0.1, 0.8], [-0.5, 0.3]])}
  options = {"data_variance": 0.5} if variance == "optimal" else {}
  make = functools.partial(jd.samplers.ancestral, sde, np.array([t, s]), variance, **options)
  shifts = None, jd.guidance.mean_shift(log_prob, 3.0)
  run = lambda key, x, cond: [make(shift=shift)(key, x, model, cond).x for shift in shifts]
  plain, shifted = compiled(run, key(), x, cond)
  (a_t, s_t), (a_s, s_s) = zip(*compiled(lambda: sde.marginal(jnp.asarray([t, s]))), strict=True)
  beta = s_t**2 - (a_t / a_s * s_s) ** 2
  tilde, share = beta * (s_s / s_t) ** 2, 0.5 * (cond["y"] + 1)
  std2 = {
    "beta": beta,
    "beta_tilde": tilde,
    "optimal": tilde + (a_s * beta / s_t**2) ** 2 * 0.5 * s_t**2 / (a_t**2 * 0.5 + s_t**2),
    "learned": beta**share * tilde ** (1 - share),
  }[variance]
  mean = a_t / a_s * (s_s / s_t) ** 2 * x + a_s * beta / s_t**2 * 0.5 * x
  np.testing.assert_allclose(shifted - plain, 3.0 * std2 * cond["y"] * np.cos(mean) * s, rtol=1e-9)


def test_no_shift_where_a_chain_ends_at_the_data():
  """There is no variance; a classifier that has no value without noise is not asked there."""
  chain = jd.ddpm.Chain(jd.ddpm.cosine_betas(10))
  log_prob = lambda x, t: jnp.sum(jnp.log(chain.sde().marginal(t)[1])) * jnp.sum(x, axis=1)
  make = functools.partial(jd.samplers.ancestral, chain, [4, 0])
  shifts = None, jd.guidance.mean_shift(log_prob, 2.0)
  run = lambda key, x: [make(shift=shift)(key, x, lambda x, t: -x) for shift in shifts]
  plain, shifted = compiled(run, key(), np.ones((2, 3), np.float32))
  np.testing.assert_array_equal(plain.x, shifted.x)
  assert shifted.nfe.tolist() == [2, 2]


class Rows:
  """Networks that note the size of the batch of every call."""

  def __init__(self):
    self.calls = []

  def score(self, x, t, **cond):
    jax.debug.callback(lambda x: self.calls.append(len(x)), x)
    return sum((value[:, None].astype(x.dtype) for value in cond.values()), -x)

  def log_prob(self, x, t, **cond):
    return -jnp.sum(self.score(x, t) ** 2, axis=1)


SDE = jd.VP()


@functools.cache
def times():
  """A grid, and a scale that is 1 but for the levels of its indices 2 and 3."""
  ts = grid(SDE, 6)
  level = np.exp(-0.5 * compiled(lambda: jd.log_snr(SDE, ts)))
  return ts, jd.guidance.interval(SDE, 2.0, 0.9 * float(level[3]), 1.1 * float(level[2]))


GUIDANCES = {
  "free": (lambda net: jd.guidance.classifier_free(net.score, {"label": 9}, 2.0), [6] * 6),
  "free_in_interval": (
    lambda net: jd.guidance.classifier_free(net.score, {"label": 9}, times()[1]),
    [3, 3, 6, 6, 3, 3],
  ),
  "classifier": (lambda net: jd.guidance.classifier(net.score, net.log_prob, 2.0), [3] * 12),
  "auto": (lambda net: jd.guidance.autoguidance(net.score, net.score, 2.0), [3] * 12),
  "auto_in_interval": (lambda net: jd.guidance.autoguidance(net.score, net.score, times()[1]), [3] * 8),
  "composed": (lambda net: jd.guidance.composed(net.score, {"label": 9}, [1.0, -1.0, 0.5]), [12] * 6),
}


@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_network_evaluation_is_made_once_and_counted(kind):
  """One call of all branches; outside its interval the null branch, or the weak network, is not computed."""
  make, calls = GUIDANCES[kind]
  network = Rows()
  label, guided, (ts, _) = np.ones((3, 3) if kind == "composed" else 3, np.int32), make(network), times()
  run = lambda key, x, label: jd.samplers.ddim(SDE, ts)(key, x, guided, {"label": label})
  sample = compiled(run, key(), np.ones((3, 2), np.float32), label)
  jax.effects_barrier()
  assert sorted(network.calls) == sorted(calls)
  assert sample.nfe.tolist() == [sum(calls) // 3] * 3


def test_adaptive_flows_count_the_most_that_a_call_takes():
  """The flow calls the network for one example; outside the interval it computes less than is counted."""
  network = Rows()
  guided = jd.guidance.classifier_free(network.score, {"label": 9}, jd.guidance.interval(SDE, 2.0, 0.1, 5.0))
  sampler = jd.samplers.probability_flow(SDE, 1e-2, 1e-2)
  run = lambda key, x, label: sampler(key, x, guided, {"label": label})
  sample = compiled(run, key(), np.ones((1, 2), np.float32), np.ones(1, int))
  jax.effects_barrier()
  assert sample.nfe.tolist() == [2 * len(network.calls)]
  assert set(network.calls) == {1, 2}


def test_a_shift_is_counted_once_a_step():
  network = Rows()
  shift = jd.guidance.mean_shift(network.log_prob, 1.0)
  predictor = jd.samplers.ancestral(SDE, times()[0], shift=shift)
  for sampler in (
    predictor,
    jd.samplers.ancestral(SDE, times()[0], shift=shift, denoise=True),
    jd.samplers.predictor_corrector(predictor, jd.samplers.langevin_corrector(steps=2)),
  ):
    network.calls.clear()
    run = lambda key, x, sampler=sampler: sampler(key, x, network.score)
    sample = compiled(run, key(), np.ones((1, 2), np.float32))
    jax.effects_barrier()
    assert sample.nfe.tolist() == [len(network.calls)]


def network(params, x, t, label):
  return jnp.tanh(params * x + label[:, None].astype(x.dtype) + t[:, None].astype(x.dtype))


def classifier(params, x, t):
  """Undecided where there is much noise."""
  return jnp.concatenate([x, x * params], axis=1) * jnp.exp(-9 * t[:, None]).astype(x.dtype)


def default(number):
  """In the type that JAX is set to."""
  return np.asarray(number, jax.dtypes.canonicalize_dtype(float))


def guided_every_way(process, gamma, apply=network):
  """Classifier-free in an interval, led by a classifier, and thresholded."""
  model = jd.score_fn(apply, default(0.5), process, jd.predictions.data())
  scale = jd.guidance.interval(process, gamma, 0.05, 2.0)
  free = jd.guidance.classifier_free(model, {"label": 3}, scale, rescale=0.5)
  log_prob = jd.guidance.log_probability(classifier, default(0.7))
  return jd.samplers.thresholded(process, jd.guidance.classifier(free, log_prob, gamma), limit=5.0)


def inputs(process):
  x_T = process.prior_sample(key(), (3, 2))
  return jd.example_keys(key(), 0, 3), np.asarray(x_T), {"label": np.array([0, 1, 2], np.int32)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_of_samplers_takes_guided_scores(kind):
  """One program for all scales, given as an argument; an example is itself beside any others."""
  sampler, process = build(kind, **({"max_steps": 2**15} if kind == "adaptive_sde" else {}))  # it is stiff
  keys, x_T, cond = inputs(process)
  traces = []

  @jax.jit
  def run(score, keys, x_T, cond):
    traces.append(1)
    return sampler(keys, x_T, score, cond)

  first, second = (run(guided_every_way(process, gamma), keys, x_T, cond) for gamma in (1.5, 2.5))
  jd.raise_if_failed(first)
  assert np.all(np.any(np.asarray(first.x) != np.asarray(second.x), axis=1))
  order = np.array([2, 2, 1])
  other = run(guided_every_way(process, 1.5), keys[order], x_T[order], {"label": cond["label"][order]})
  np.testing.assert_allclose(other.x, np.asarray(first.x)[order], rtol=1e-5, atol=1e-5)
  assert len(traces) == 1


def test_guided_samples_are_float32_under_vmap_with_gradients_in_the_scale():
  """Of a network in half precision."""
  sampler, process = build("ancestral")
  keys, x_T, cond = inputs(process)
  half = lambda *args, **cond: network(*args, **cond).astype(jnp.bfloat16)
  of_scale = lambda gamma: jnp.sum(sampler(keys, x_T, guided_every_way(process, gamma, half), cond).x)
  found = jax.eval_shape(jax.vmap(jax.value_and_grad(of_scale)), np.ones(4, np.float32))
  assert [(leaf.shape, leaf.dtype) for leaf in found] == [((4,), np.float32)] * 2


def test_gradients_and_maps_over_the_scale(x64):
  """Against a finite difference; a scale for every example by vmap."""
  sampler = jd.samplers.ddim(SDE, grid(SDE, 6))
  keys, x_T, cond = inputs(SDE)
  one = lambda key, x, label, gamma: sampler(
    key[None], x[None], guided_every_way(SDE, gamma), {"label": label[None]}
  ).x[0]

  @jax.jit
  def run(keys, x_T, label, gammas):
    each = lambda gammas: jax.vmap(one)(keys, x_T, label, gammas)
    whole = sampler(keys, x_T, guided_every_way(SDE, 2.0), {"label": label}).x
    return *jax.jvp(each, (gammas,), (jnp.ones(3),)), each(gammas + 1e-5), each(gammas - 1e-5), whole

  values, slopes, up, down, whole = jax.device_get(run(keys, x_T, cond["label"], np.array([1.2, 2.0, 3.0])))
  np.testing.assert_allclose(slopes, (up - down) / 2e-5, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(values[1], whole[1], rtol=1e-6)


@pytest.mark.usefixtures("eight_devices")
def test_branches_stay_on_the_device_of_their_example():
  """Over eight devices no states are exchanged, but for whether all are outside the interval."""
  mesh = make_mesh()
  x, label = shard_batch(mesh, (np.ones((16, 4), np.float32), np.arange(16) % 3))
  for scale in (2.0, times()[1]):
    guided = jd.guidance.classifier_free(
      jd.score_fn(network, np.float32(0.5), SDE, jd.predictions.data()), {"label": 3}, scale
    )
    program = jax.jit(lambda x, label: guided(x, 0.5, label=label)).lower(x, label).compile().as_text()
    assert not any(exchange in program for exchange in ("all-gather", "all-to-all", "collective-permute"))
