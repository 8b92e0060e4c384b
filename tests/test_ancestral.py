"""Ancestral steps: against the chains' own posteriors, the formulas of the papers, and exact moments of Gaussian data.

A step is x -> of_state x + of_data D + std z. For data N(0, c) the denoiser is linear in x, so moments follow from
these coefficients without Monte Carlo.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled
from switch import EACH_SDE

import jaxdiff as jd

LEAPS = (40, 37, 21, 20, 7, 2, 0)
TO_ONE = (40, 37, 21, 20, 7, 2, 1)
KEY = jax.random.key(0)
C = np.asarray([0.2, 1.7])
EXTRA = {"beta": {}, "beta_tilde": {}, "optimal": {"data_variance": C}}


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


def noises(steps, shape):
  """What z every step draws, [steps, b, *d]."""
  example = jd.example_keys(KEY, 0, shape[0])
  draw = lambda i: jd.keys.normal(jd.keys.fold_in(example, i), shape, jnp.result_type(float))
  return jax.vmap(draw)(jnp.arange(steps))


def coefficients(process, ts, variance="beta_tilde", **options):
  """(of_state, of_data, std), each [steps], of eq. (1)."""
  return jd.samplers.ancestral(process, ts, variance, **options).method.nodes[2:5]


def variances(nodes, alpha, sigma, c):
  """Of data N(0, c), from the exact one at the first time, by the steps."""
  found = [alpha[0] ** 2 * c + sigma[0] ** 2]
  for of_state, of_data, std, a, s in zip(*nodes, alpha[:-1], sigma[:-1], strict=True):
    slope = of_state + of_data * a * c / (a**2 * c + s**2)
    found.append(slope**2 * found[-1] + std**2)
  return np.asarray(found)


@functools.cache
def step_of_chain(make):
  """A step from t to the one before, and the posterior's mean and variance and the noise."""
  x = np.asarray([[1.3, -0.4]])

  def run(t):
    chain, x_t = make(), jnp.asarray(x)
    score = linear_score(chain.sde(), 0.3)
    data = jd.denoised(chain.sde(), score, x_t, chain.time(t))
    found = jd.samplers.ancestral(chain, jnp.stack([t, t - 1]))(KEY, x_t, score).x
    return found, *chain.posterior(data, x_t, t), noises(1, x.shape)[0]

  return jax.jit(run)


@pytest.mark.parametrize(("chain", "last"), [(ddpm_chain, 40), (ncsn_chain, 12)])
def test_a_step_is_the_posterior_of_the_chain(chain, last, x64):
  """Mean and variance of `Chain.posterior` at the same D, from every step to the one before."""
  for t in (1, 2, 5, last):
    found, mean, variance, z = jax.device_get(step_of_chain(chain)(t))
    np.testing.assert_allclose(found, mean + np.sqrt(variance) * z, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("make", "steps"), [(ddpm_chain, [40, 20, 3, 0]), (ncsn_chain, [12, 7, 1, 0])])
def test_the_score_is_called_at_the_times_of_the_steps(make, steps):
  seen = []

  def score(x, t):
    jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
    return -x

  def run(x):
    chain = make()
    return jd.samplers.ancestral(chain, steps)(KEY, x, score).nfe, chain.time(jnp.asarray(steps[:-1]))

  nfe, times = compiled(run, np.ones((1, 2), np.float32))
  jax.effects_barrier()
  np.testing.assert_array_equal(np.float32(seen), times)
  assert nfe.tolist() == [3] == [len(seen)]


@pytest.mark.parametrize(("make", "steps"), [(ddpm_chain, 40), (ncsn_chain, 12)])
def test_all_steps_are_the_default(make, steps):
  def run():
    samplers = [jd.samplers.ancestral(make(), *ts) for ts in ((), (range(steps, -1, -1),))]
    return [(sampler.ts, *sampler.method.nodes) for sampler in samplers]

  default, whole = compiled(run)
  for found, expected in zip(default, whole, strict=True):
    np.testing.assert_array_equal(found, expected)
  assert default[0].shape == (steps + 1,)
  assert np.all((default[0] >= 0) & (default[0] <= 1))


def merged(chain):
  """The chain of 6 betas 1 - prod(1 - beta), with the same marginals at the leaps."""
  keep = jnp.cumprod(jnp.concatenate([jnp.ones(1), 1 - chain.betas]))
  found = object.__new__(jd.ddpm.Chain)
  object.__setattr__(found, "betas", (1 - keep[np.asarray(LEAPS[:-1])] / keep[np.asarray(LEAPS[1:])])[::-1])
  return found


@functools.cache
def of_chain():
  """Coefficients on all steps of a chain, on leaps and of the chain of merged betas; its variances and marginals."""
  ones = np.arange(40, 0, -1)
  each = lambda chain, ts: {kind: coefficients(chain, ts, kind, **extra) for kind, extra in EXTRA.items()}

  def run():
    chain = ddpm_chain()
    optimal = {c: [coefficients(chain, ts, "optimal", data_variance=c) for ts in (ones, TO_ONE)] for c in (0.09, 2.5)}
    return {
      "all": each(chain, None),
      "leaps": each(chain, LEAPS),
      "to one": {"all": coefficients(chain, ones, "beta"), "leaps": coefficients(chain, TO_ONE, "beta")},
      "optimal": optimal,
      "merged": each(merged(chain), None),
      "variances": {kind: chain.variance(kind, ones) for kind in ("beta", "beta_tilde")}
      | {"optimal": chain.optimal_variance(ones, C)},
      "marginal": [chain.marginal(np.asarray(ts)) for ts in (ones, TO_ONE)],
    }

  return jax.jit(run)


@pytest.mark.parametrize("kind", EXTRA)
def test_leaps_are_steps_of_the_chain_with_the_merged_betas(kind, x64):
  """It has the same marginals, and by their formulas the same steps."""
  found = jax.device_get(of_chain()())
  np.testing.assert_allclose(found["leaps"][kind], found["merged"][kind], rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("kind", EXTRA)
def test_variances_of_neighbouring_steps_are_those_of_the_chain(kind, x64):
  found = jax.device_get(of_chain()())
  expected = np.array(found["variances"][kind])
  expected[-1] = 0.0
  np.testing.assert_allclose(found["all"][kind][2] ** 2, expected, rtol=1e-8, atol=1e-16)


@pytest.mark.parametrize("which", [0, 1], ids=["all", "leaps"])
def test_beta_keeps_normal_data_normal(which, x64):
  """N(0, I) is at rest under the chain: every reverse step with 'beta' maps variance 1 to 1, leaps too."""
  found = jax.device_get(of_chain()())
  nodes = found["to one"]["all" if which == 0 else "leaps"]
  np.testing.assert_allclose(variances(nodes, *found["marginal"][which], 1.0), 1.0, rtol=1e-10)


@pytest.mark.parametrize("c", [0.09, 2.5])
@pytest.mark.parametrize("which", [0, 1], ids=["all", "leaps"])
def test_optimal_variance_keeps_the_marginals_of_a_chain(which, c, x64):
  found = jax.device_get(of_chain()())
  alpha, sigma = found["marginal"][which]
  expected = alpha**2 * c + sigma**2
  np.testing.assert_allclose(variances(found["optimal"][c][which], alpha, sigma, c), expected, rtol=1e-9)


@pytest.mark.parametrize("steps", [tuple(range(12, -1, -1)), (12, 9, 4, 1), (5, 2, 0)])
def test_levels_of_ncsn_give_the_sampler_of_smld(steps, x64):
  """Song et al. 2021, Appendix F: x + (s_i^2 - s_j^2) score + sqrt(s_j^2 (s_i^2 - s_j^2) / s_i^2) z; noiseless to 0.

  With D = x + s_i^2 score.
  """
  of_state, of_data, std = compiled(lambda: coefficients(ncsn_chain(), steps))
  levels = np.append(0.0, 0.05 * 400 ** (np.arange(12) / 11))[np.asarray(steps)]
  before, after = levels[:-1], levels[1:]
  gain = before**2 - after**2
  np.testing.assert_allclose(of_state + of_data, 1.0, rtol=1e-12)
  np.testing.assert_allclose(of_data * before**2, gain, rtol=1e-9)
  np.testing.assert_allclose(std, np.sqrt(after**2 * gain / before**2), rtol=1e-9)


@functools.cache
def of_process():
  """Coefficients of every variance on six steps, of any process, and its marginals."""

  def run(sde):
    ts = jd.time_grid(sde, 6, "karras")
    found = {kind: coefficients(sde, ts, kind, **extra) for kind, extra in EXTRA.items()}
    found["optimal for 0.3"] = coefficients(sde, ts, "optimal", data_variance=0.3)
    return found, sde.marginal(ts)

  return jax.jit(run)


@EACH_SDE
def test_optimal_variance_keeps_the_marginals_of_every_process(sde, x64):
  nodes, (alpha, sigma) = jax.device_get(of_process()(sde))
  expected = alpha**2 * 0.3 + sigma**2
  np.testing.assert_allclose(variances(nodes["optimal for 0.3"], alpha, sigma, 0.3), expected, rtol=1e-8)


@EACH_SDE
def test_coefficients_of_every_process(sde, x64):
  """By products of Gaussians: the mean of Ho et al. eq. 7; the forward variance, Var(x_s | x_t, x_0), the mean of
  Var(x_s | x_t) over c."""
  found, (alpha, sigma) = jax.device_get(of_process()(sde))
  a = alpha[:-1] / alpha[1:]
  forward = sigma[:-1] ** 2 - (a * sigma[1:]) ** 2
  total = alpha[:, None] ** 2 * C + sigma[:, None] ** 2
  expected = {
    "beta": forward,
    "beta_tilde": 1 / (a**2 / forward + 1 / sigma[1:] ** 2),
    "optimal": (total[1:] - (a[:, None] * total[1:]) ** 2 / total[:-1]).mean(axis=1),
  }
  for kind, value in expected.items():
    of_state, of_data, std = found[kind]
    np.testing.assert_allclose(of_state, a * sigma[1:] ** 2 / sigma[:-1] ** 2, rtol=1e-8)
    np.testing.assert_allclose(of_data, alpha[1:] * forward / sigma[:-1] ** 2, rtol=1e-7)
    np.testing.assert_allclose(std**2, value, rtol=1e-7, err_msg=kind)


def test_a_process_may_end_without_noise(x64):
  """VP to t = 0: the last step returns D itself."""
  sde, score = jd.VP(), linear_score(jd.VP(), 0.2)

  def run(ts, x):
    draw = lambda kind, extra: jd.samplers.ancestral(sde, ts, kind, **extra)(KEY, x, score).x
    return [draw(kind, extra) for kind, extra in EXTRA.items()], jd.denoised(sde, score, x, 0.3)

  found, expected = compiled(run, np.asarray([0.3, 0.0]), np.asarray([[0.6]]))
  for x in found:
    np.testing.assert_allclose(x, expected, rtol=1e-12)


@functools.cache
def short_chain():
  return jd.ddpm.Chain(np.linspace(0.01, 0.3, 40, dtype=np.float32))


def test_path_denoise_examples_and_broken_ones():
  """Every second state; D of the last state; example 3 alone as in a batch of 5; the step at which one breaks."""

  @jax.jit
  def run(keys, x, broken):
    chain = ddpm_chain()
    exact = linear_score(chain.sde(), 0.5)
    score = lambda x, t, broken: jnp.where((t < 0.5)[:, None] & broken[:, None], jnp.nan, exact(x, t))
    ancestral = lambda **options: jd.samplers.ancestral(chain, range(40, 3, -3), **options)(keys, x, score, cond)
    cond = {"broken": broken}
    plain, clean = ancestral(path=2), ancestral(denoise=True)
    return plain, clean, jd.denoised(chain.sde(), exact, plain.x, chain.time(4))

  keys, x = jd.example_keys(KEY, 0, 5), np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
  plain, clean, expected = jax.device_get(run(keys, x, np.arange(5) == 1))
  sound = np.asarray([0, 2, 3, 4])
  assert plain.path.shape == (7, 5, 3)
  np.testing.assert_array_equal(plain.path[0], x)
  np.testing.assert_array_equal(plain.path[-1], plain.x)
  np.testing.assert_allclose(clean.x[sound], expected[sound], rtol=1e-5)
  assert clean.nfe[0] == plain.nfe[0] + 1
  assert plain.status.code.tolist() == [0, 2, 0, 0, 0]
  assert plain.status.accepted.tolist() == [12, 7, 12, 12, 12]
  order = np.asarray([3, 1, 0, 2, 4])
  turned = run(keys[order], x[order], np.zeros(5, bool))[0].x
  np.testing.assert_allclose(turned[np.asarray([0, 2, 3, 4])], plain.x[np.asarray([3, 0, 2, 4])], rtol=1e-5)


def test_a_chain_and_its_steps_may_be_traced(x64):
  """The sampler of betas that are an argument, and its gradient in them against a central difference."""

  def total(betas, steps):
    sampler = jd.samplers.ancestral(jd.ddpm.Chain(betas), steps, "beta")
    return jnp.sum(sampler(KEY, jnp.ones((2, 3)), lambda x, t: -1.3 * x).x ** 2)

  known, betas = compiled(lambda: (total(jd.ddpm.cosine_betas(40), LEAPS), jd.ddpm.cosine_betas(40)))
  run, step = jax.jit(jax.value_and_grad(total)), 1e-6 * betas
  value, gradient = run(betas, np.asarray(LEAPS))
  np.testing.assert_allclose(value, known, rtol=1e-10)
  numeric = (run(betas + step, np.asarray(LEAPS))[0] - run(betas - step, np.asarray(LEAPS))[0]) / 2
  np.testing.assert_allclose(np.vdot(gradient, step), numeric, rtol=1e-5)


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
    jd.samplers.ancestral(short_chain(), ts)


def test_bad_options_are_refused(untyped):
  chain, sde, ts = short_chain(), jd.VP(), np.asarray([1.0, 0.5], np.float32)
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
