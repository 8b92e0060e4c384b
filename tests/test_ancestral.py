"""Ancestral steps: against the chains' own posteriors, the formulas of the papers, and exact moments of Gaussian data.

For a score linear in x every step is x -> A x + std z with known z, so A and std can be read off two runs of the
sampler that share their noise: moments then follow without Monte Carlo.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PREDICTIONS, SDES

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
LEAPS = (40, 37, 21, 20, 7, 2, 0)


def ddpm_chain():
  return jd.ddpm.Chain(jd.ddpm.cosine_betas(40))


def ncsn_chain():
  return jd.ncsn.Chain(jd.ncsn.geometric_sigmas(12, 0.05, 20.0))


def linear_score(sde, c):
  """The score of data N(0, c)."""

  def score(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -x / (alpha**2 * c + sigma**2)

  return score


@functools.partial(jax.jit, static_argnums=(1, 2))
def noises(key, steps, shape):
  """What z every step draws, [steps, b, *d]."""
  example = jd.example_keys(key, 0, shape[0])
  draw = lambda i: jd.keys.normal(jd.keys.fold_in(example, i), shape, jnp.result_type(float))
  return jax.vmap(draw)(jnp.arange(steps))


def draw(sampler, key, x, score):
  return jax.jit(lambda key, x: sampler(key, x, score))(key, x)


def affine(sampler, score):
  """A and std `[steps]` of the steps x -> A x + std z of a sampler that keeps every state, x of one coordinate."""
  key = jax.random.key(3)
  same = jnp.stack([jd.example_keys(key, 0, 1)[0]] * 2)
  path = np.asarray(jax.jit(lambda x: sampler(same, x, score).path)(jnp.asarray([[0.0], [1.0]]))[..., 0])
  steps = len(path) - 1
  total = path[:, 1] - path[:, 0]
  maps = total[1:] / total[:-1]
  z = np.asarray(noises(key, steps, (1, 1)))[:, 0, 0]
  return maps, (path[1:, 0] - maps * path[:-1, 0]) / z


def variances(maps, stds, start):
  found = [start]
  for a, std in zip(maps, stds, strict=True):
    found.append(a**2 * found[-1] + std**2)
  return np.asarray(found)


@pytest.mark.parametrize("chain", [ddpm_chain, ncsn_chain])
def test_a_step_is_the_posterior_of_the_chain(chain, x64):
  """Mean and variance of `Chain.posterior` at the same D, from every step to the one before."""
  chain, key = chain(), jax.random.key(0)
  sde, x = chain.sde(), jnp.asarray([[1.3, -0.4]])
  score = linear_score(sde, 0.3)
  for t in (1, 2, 5, chain.steps):
    sampler = jd.samplers.ancestral(chain, (t, t - 1))
    data = jd.denoised(sde, score, x, chain.time(t))
    mean, variance = chain.posterior(data, x, t)
    (z,) = noises(key, 1, x.shape)
    np.testing.assert_allclose(draw(sampler, key, x, score).x, mean + jnp.sqrt(variance) * z, rtol=1e-9, atol=1e-11)


def test_the_score_is_called_at_the_times_of_the_steps():
  for chain, steps in ((ddpm_chain(), [40, 20, 3, 0]), (ncsn_chain(), [12, 7, 1, 0])):
    seen = []

    def score(x, t, seen=seen):
      jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
      return -x

    sample = jd.samplers.ancestral(chain, steps)(jax.random.key(0), jnp.ones((1, 2)), score)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.float32(seen), chain.time(jnp.asarray(steps[:-1])))
    assert sample.nfe.tolist() == [3] == [len(seen)]


def test_all_steps_are_the_default():
  for chain in (ddpm_chain(), ncsn_chain()):
    x, key, score = jnp.ones((2, 3)), jax.random.key(0), linear_score(chain.sde(), 0.5)
    sampler = jd.samplers.ancestral(chain)
    sample = draw(sampler, key, x, score)
    assert sample.nfe[0] == chain.steps
    assert sampler.ts.shape == (chain.steps + 1,)
    assert jnp.all((sampler.ts >= 0) & (sampler.ts <= 1))
    np.testing.assert_array_equal(
      sample.x, draw(jd.samplers.ancestral(chain, range(chain.steps, -1, -1)), key, x, score).x
    )


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "optimal"])
def test_leaps_are_steps_of_the_chain_with_the_merged_betas(variance, x64):
  """A chain of 6 betas 1 - prod(1 - beta) has the same marginals, and by their formulas the same samples."""
  chain, key, x = ddpm_chain(), jax.random.key(1), jnp.asarray([[0.7, -1.1, 2.0]])
  keep = np.cumprod(np.concatenate([[1.0], 1 - np.asarray(chain.betas)]))
  merged = object.__new__(jd.ddpm.Chain)
  object.__setattr__(merged, "betas", jnp.asarray((1 - keep[list(LEAPS[:-1])] / keep[list(LEAPS[1:])])[::-1].copy()))
  extra = {"data_variance": jnp.asarray([0.2, 1.7])} if variance == "optimal" else {}
  leaps = draw(jd.samplers.ancestral(chain, LEAPS, variance, **extra), key, x, linear_score(chain.sde(), 0.4))
  whole = draw(jd.samplers.ancestral(merged, None, variance, **extra), key, x, linear_score(merged.sde(), 0.4))
  np.testing.assert_allclose(leaps.x, whole.x, rtol=1e-9)


@pytest.mark.parametrize("kind", ["beta", "beta_tilde", "optimal"])
def test_variances_of_neighbouring_steps_are_those_of_the_chain(kind, x64):
  chain, c = ddpm_chain(), jnp.asarray([0.2, 1.7])
  extra = {"data_variance": c} if kind == "optimal" else {}
  sampler = jd.samplers.ancestral(chain, None, kind, path=1, **extra)
  _, stds = affine(sampler, linear_score(chain.sde(), 0.4))
  t = jnp.arange(chain.steps, 0, -1)
  expected = np.array(chain.optimal_variance(t, c) if kind == "optimal" else chain.variance(kind, t))
  expected[-1] = 0.0
  np.testing.assert_allclose(stds**2, expected, rtol=1e-8, atol=1e-16)


@pytest.mark.parametrize("steps", [None, (12, 9, 4, 1), (5, 2, 0)])
def test_levels_of_ncsn_give_the_sampler_of_smld(steps, x64):
  """Song et al. 2021, Appendix F: x + (s_i^2 - s_j^2) score + sqrt(s_j^2 (s_i^2 - s_j^2) / s_i^2) z; noiseless to 0."""
  chain, key, x = ncsn_chain(), jax.random.key(2), jnp.asarray([[9.0, -4.0], [0.1, 3.0]])
  score = linear_score(chain.sde(), 1.4)
  found = draw(jd.samplers.ancestral(chain, steps), key, x, score).x
  levels = list(range(12, -1, -1)) if steps is None else steps
  sigma = np.concatenate([[0.0], np.asarray(chain.sigmas)])
  for i, j, z in zip(levels[:-1], levels[1:], noises(key, len(levels) - 1, x.shape), strict=True):
    gain = sigma[i] ** 2 - sigma[j] ** 2
    score_i = -np.asarray(x) / (1.4 + sigma[i] ** 2)
    x = np.asarray(x) + gain * score_i + np.sqrt(sigma[j] ** 2 * gain / sigma[i] ** 2) * np.asarray(z)
  np.testing.assert_allclose(found, x, rtol=1e-9)


@pytest.mark.parametrize("steps", [None, LEAPS[:-1]])
def test_beta_keeps_normal_data_normal(steps, x64):
  """N(0, I) is at rest under the chain: every reverse step with 'beta' maps variance 1 to 1, leaps too."""
  chain = ddpm_chain()
  maps, stds = affine(jd.samplers.ancestral(chain, steps, "beta", path=1), linear_score(chain.sde(), 1.0))
  found = variances(maps, stds, 1.0)
  np.testing.assert_allclose(found if steps else found[:-1], 1.0, rtol=1e-10)


@pytest.mark.parametrize("c", [0.09, 2.5])
@pytest.mark.parametrize("steps", [range(40, 0, -1), LEAPS[:-1]])
def test_optimal_variance_keeps_the_marginals_of_a_chain(steps, c, x64):
  chain = ddpm_chain()
  sampler = jd.samplers.ancestral(chain, steps, "optimal", data_variance=c, path=1)
  alpha, sigma = (np.asarray(v) for v in chain.marginal(jnp.asarray(steps)))
  expected = alpha**2 * c + sigma**2
  found = variances(*affine(sampler, linear_score(chain.sde(), c)), expected[0])
  np.testing.assert_allclose(found, expected, rtol=1e-9)


@EACH_SDE
def test_optimal_variance_keeps_the_marginals_of_every_process(sde, x64):
  c, ts = 0.3, jd.time_grid(sde, 6)
  alpha, sigma = (np.asarray(v) for v in sde.marginal(ts))
  expected = alpha**2 * c + sigma**2
  sampler = jd.samplers.ancestral(sde, ts, "optimal", data_variance=c, path=1)
  found = variances(*affine(sampler, linear_score(sde, c)), expected[0])
  np.testing.assert_allclose(found, expected, rtol=1e-8)


@EACH_SDE
def test_variances_of_every_process(sde, x64):
  """By products of Gaussians: the forward variance, Var(x_s | x_t, x_0), the mean of Var(x_s | x_t) over c."""
  ts, c = jd.time_grid(sde, 6, "karras"), np.asarray([0.1, 4.0])
  alpha, sigma = (np.asarray(v) for v in sde.marginal(ts))
  a = alpha[:-1] / alpha[1:]
  forward = sigma[:-1] ** 2 - (a * sigma[1:]) ** 2
  total = alpha[:, None] ** 2 * c + sigma[:, None] ** 2
  expected = {
    "beta": forward,
    "beta_tilde": 1 / (a**2 / forward + 1 / sigma[1:] ** 2),
    "optimal": (total[1:] - (a[:, None] * total[1:]) ** 2 / total[:-1]).mean(axis=1),
  }
  for kind, value in expected.items():
    extra = {"data_variance": jnp.asarray(c)} if kind == "optimal" else {}
    _, stds = affine(jd.samplers.ancestral(sde, ts, kind, path=1, **extra), linear_score(sde, 0.4))
    np.testing.assert_allclose(stds**2, value, rtol=1e-7, err_msg=kind)


def test_a_process_may_end_without_noise(x64):
  """VP to t = 0: the last step returns D itself."""
  sde, x, key = jd.VP(), jnp.asarray([[0.6]]), jax.random.key(0)
  score = linear_score(sde, 0.2)
  for variance, extra in (("beta", {}), ("beta_tilde", {}), ("optimal", {"data_variance": 0.2})):
    found = draw(jd.samplers.ancestral(sde, jnp.asarray([0.3, 0.0]), variance, **extra), key, x, score)
    np.testing.assert_allclose(found.x, jd.denoised(sde, score, x, 0.3), rtol=1e-12)


def two_parts(v):
  return lambda params, x, t: jnp.concatenate([jnp.tanh(params * x), jnp.full_like(x, 2 * v - 1)], axis=-1)


@pytest.mark.parametrize("steps", [None, LEAPS, LEAPS[:-1]])
def test_learned_variance_runs_from_beta_tilde_to_beta(steps, x64):
  """v = 0 and v = 1 give those samplers sample for sample; v = 1/2 of the logarithms lies at the geometric mean."""
  chain, key, x = ddpm_chain(), jax.random.key(5), jnp.asarray([[0.5, -1.0]])
  sde, noise = chain.sde(), jd.predictions.noise()
  one = jd.score_fn(lambda params, x, t: jnp.tanh(params * x), 0.7, sde, noise)
  learned = lambda v: jd.score_fn(two_parts(v), 0.7, sde, noise, learned_variance=True)
  for v, variance in ((0.0, "beta_tilde"), (1.0, "beta")):
    found = draw(jd.samplers.ancestral(chain, steps, "learned"), key, x, learned(v))
    expected = draw(jd.samplers.ancestral(chain, steps, variance), key, x, one)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-10)
    assert found.nfe.tolist() == expected.nfe.tolist()


def test_learned_variance_is_that_of_the_chain(x64):
  """Nichol & Dhariwal eq. 15 as `Chain.interpolated_log_variance` has it, for v outside [0, 1] as well."""
  chain, key, x = ddpm_chain(), jax.random.key(5), jnp.asarray([[0.5, -1.0]])
  sde = chain.sde()
  for v in (0.3, 1.4):
    score = jd.score_fn(two_parts(v), 0.7, sde, jd.predictions.noise(), learned_variance=True)
    for t in (2, 40):
      found = draw(jd.samplers.ancestral(chain, (t, t - 1), "learned"), key, x, score).x
      mean, _ = chain.posterior(score.denoised(x, chain.time(t)), x, t)
      std = jnp.exp(0.5 * chain.interpolated_log_variance(jnp.asarray(v), t))
      np.testing.assert_allclose(found, mean + std * noises(key, 1, x.shape)[0], rtol=1e-10)


def test_learned_variance_costs_one_evaluation():
  chain, calls = ddpm_chain(), []

  def apply(params, x, t):
    jax.debug.callback(lambda _: calls.append(1), t)
    return two_parts(0.4)(params, x, t)

  score = jd.score_fn(apply, jnp.float32(0.7), chain.sde(), jd.predictions.noise(), learned_variance=True)
  sample = jd.samplers.ancestral(chain, LEAPS, "learned")(jax.random.key(0), jnp.ones((1, 2)), score)
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)] == [6]


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_score_reads_the_first_half_of_the_network(prediction):
  sde, x, t = jd.VP(), jnp.asarray([[0.5, -1.0], [1.0, 2.0]]), jnp.asarray([0.2, 0.8])
  half = lambda params, x, t, scale: jnp.tanh(params * x) * scale[:, None]
  whole = lambda params, x, t, scale: jnp.concatenate([half(params, x, t, scale), jnp.cos(x)], axis=-1)
  scale = jnp.asarray([1.0, 3.0])
  plain = jd.score_fn(half, jnp.float32(0.7), sde, prediction)
  learned = jd.score_fn(whole, jnp.float32(0.7), sde, prediction, learned_variance=True)
  np.testing.assert_array_equal(learned(x, t, scale=scale), plain(x, t, scale=scale))
  np.testing.assert_array_equal(learned.denoised(x, t, scale=scale), plain.denoised(x, t, scale=scale))
  data, v = jax.jit(lambda score, x: score.denoised_and_v(x, t, scale=scale))(learned, x)
  np.testing.assert_allclose(data, plain.denoised(x, t, scale=scale), rtol=1e-5)
  seen = prediction.precondition(x, t, *sde.marginal(t))[0]
  np.testing.assert_allclose(v, 0.5 * (jnp.cos(seen) + 1), rtol=1e-5)
  with pytest.raises(ValueError, match="network must return 2 times the channels of x"):
    jd.score_fn(half, jnp.float32(0.7), sde, prediction, learned_variance=True)(x, t, scale=scale)


def test_a_score_without_a_variance_is_refused(untyped):
  chain = ddpm_chain()
  plain = jd.score_fn(lambda params, x, t: params * x, jnp.float32(1.0), chain.sde(), jd.predictions.noise())
  for score in (lambda x, t: -x, plain):
    with pytest.raises(TypeError, match=r"score_fn\(\.\.\., learned_variance=True\)"):
      jd.samplers.ancestral(chain, None, "learned")(jax.random.key(0), jnp.ones((1, 2)), score)


def test_path_denoise_and_examples():
  """Every second state; D of the last state; example 3 alone as in a batch of 5."""
  chain, key = ddpm_chain(), jax.random.key(0)
  score = linear_score(chain.sde(), 0.5)
  x = jax.random.normal(key, (5, 3))
  steps = range(40, 0, -3)
  plain = draw(jd.samplers.ancestral(chain, range(40, 3, -3), path=2), key, x, score)
  assert plain.path.shape == (7, 5, 3)
  np.testing.assert_array_equal(plain.path[0], x)
  np.testing.assert_array_equal(plain.path[-1], plain.x)
  last = draw(jd.samplers.ancestral(chain, steps), key, x, score)
  denoised = draw(jd.samplers.ancestral(chain, steps, denoise=True), key, x, score)
  np.testing.assert_allclose(denoised.x, jd.denoised(chain.sde(), score, last.x, chain.time(1)), rtol=1e-5)
  assert denoised.nfe[0] == last.nfe[0] + 1
  alone = draw(jd.samplers.ancestral(chain, steps), jd.example_keys(key, 3, 1), x[3:4], score)
  np.testing.assert_allclose(alone.x, last.x[3:4], rtol=1e-5)


def test_nan_is_reported_with_its_step():
  chain = ddpm_chain()
  score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, -x)
  cond = {"broken": jnp.asarray([False, True])}
  sample = jd.samplers.ancestral(chain)(jax.random.key(0), jnp.ones((2, 1)), score, cond)
  assert sample.status.code.tolist() == [0, 2]
  assert sample.status.accepted.tolist() == [40, 21]


def test_built_inside_jit_and_with_a_traced_chain():
  """The sampler of betas that are an argument, and its gradient in them against a central difference."""
  x, key = jnp.ones((2, 3)), jax.random.key(0)

  def run(betas, steps=LEAPS):
    chain = jd.ddpm.Chain(betas)
    return draw(jd.samplers.ancestral(chain, steps, "beta"), key, x, lambda x, t: -1.3 * x).x

  betas = jd.ddpm.cosine_betas(40)
  expected = jax.jit(lambda: run(betas))()
  np.testing.assert_allclose(jax.jit(run)(betas), expected, rtol=1e-4)
  np.testing.assert_allclose(jax.jit(run)(betas, jnp.asarray(LEAPS)), expected, rtol=1e-4)
  with jax.enable_x64(True):
    key, x, betas = jax.random.key(0), jnp.ones((2, 3)), jd.ddpm.cosine_betas(40)
    total = jax.jit(lambda betas: jnp.sum(run(betas) ** 2))
    step = 1e-6 * betas
    numeric = (total(betas + step) - total(betas - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(total)(betas), 1e-6 * betas), numeric, rtol=1e-5)


@pytest.mark.parametrize(
  ("ts", "error", "message"),
  [
    ([0, 10], ValueError, "ts must decrease from the prior's step"),
    ([10, 10, 0], ValueError, "ts must decrease"),
    ([41, 0], ValueError, r"ts must lie in 0\.\.40, the steps of the chain; got 41 to 0"),
    ([10, -1], ValueError, r"ts must lie in 0\.\.40"),
    ([10], ValueError, "decreasing steps of the chain, got shape"),
    ([1.0, 0.5], TypeError, "ts of a chain must be integer steps, got float"),
  ],
)
def test_bad_steps_are_refused(ts, error, message, untyped):
  with pytest.raises(error, match=message):
    jd.samplers.ancestral(ddpm_chain(), ts)


def test_bad_options_are_refused(untyped):
  chain, sde = ddpm_chain(), jd.VP()
  ts = jd.time_grid(sde, 4)
  for arguments, error, message in (
    ({"process": sde}, ValueError, "ts must be given for a process"),
    ({"process": sde, "ts": [0.5, 2.0]}, ValueError, "ts must decrease"),
    ({"process": jd.VP, "ts": ts}, TypeError, r"did you forget to call it: VP\(\)"),
    ({"process": jd.ddpm.Chain}, TypeError, r"did you forget to call it: Chain\(\)"),
    ({"process": 3.0, "ts": ts}, TypeError, "process must be a ScalarSDE, got float"),
    ({"process": chain, "variance": "learnt"}, ValueError, "variance must be 'beta', .* got 'learnt'"),
    ({"process": chain, "variance": "optimal"}, ValueError, "needs data_variance"),
    ({"process": chain, "data_variance": 1.0}, ValueError, "and no other, needs data_variance"),
    ({"process": chain, "variance": "optimal", "data_variance": -1.0}, ValueError, "must not be negative"),
    ({"process": chain, "denoise": True}, ValueError, "step 0 is the data: end ts at 1"),
    ({"process": ncsn_chain(), "denoise": True}, ValueError, "step 0 is the data: end ts at 1"),
    ({"process": sde, "ts": [0.5, 0.0], "denoise": True}, ValueError, "denoise=True needs noise"),
    ({"process": chain, "path": 3}, ValueError, "path must divide the number of steps, 40"),
  ):
    with pytest.raises(error, match=message):
      jd.samplers.ancestral(**arguments)
