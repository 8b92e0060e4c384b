"""Sampling in phase space: Euler-Maruyama, symmetric splitting and the probability flow, on Gaussian data."""

import functools
import pathlib
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import compiled, mixture
from phase import errors, phase_gaussian, sampled_moments, walks

import jaxdiff as jd
from jaxdiff.models import MLP

KEY, DATA, T0 = jax.random.key(0), phase_gaussian(), 0.05
SDE = jd.CLD(gamma=0.25)
SAMPLERS = {
  "euler": (lambda ts, **options: jd.samplers.reverse_sde(SDE, ts, **options), 1),
  "sscs": (lambda ts, **options: jd.samplers.sscs(SDE, ts, **options), 2),
  "sscs2": (lambda ts, **options: jd.samplers.sscs(SDE, ts, order=2, **options), 2),
}
EACH = pytest.mark.parametrize("name", SAMPLERS)


def grid(steps, kind="quadratic", dtype=np.float64):
  """`cld.time_grid` to T0."""
  fraction = np.linspace(0, 1, steps + 1)
  ts = (1 + fraction * (np.sqrt(T0) - 1)) ** 2 if kind == "quadratic" else 1 + fraction * (T0 - 1)
  return np.append(ts[:-1], T0).astype(dtype)


GRIDS = [("quadratic", 100), ("quadratic", 200), ("quadratic", 800), ("uniform", 200), ("uniform", 800)]


@functools.cache
def found_errors(name):
  """Of mean and covariance over all these grids, whose steps are maps of one program."""
  make, draws = SAMPLERS[name]
  found = compiled(lambda grids: walks([make(ts) for ts in grids], DATA, draws), [grid(n, kind) for kind, n in GRIDS])
  return {key: errors(walk) for key, walk in zip(GRIDS, found, strict=True)}


@EACH
@pytest.mark.parametrize("kind", ["uniform", "quadratic"])
def test_weak_orders_of_mean_and_covariance(name, kind, x64):
  """Slopes over four times the steps, within 0.1: exact moments by recursion in double precision."""
  coarse, fine = (found_errors(name)[kind, steps] for steps in (200, 800))
  np.testing.assert_allclose(np.log(coarse / fine) / np.log(4), 2 if name == "sscs2" else 1, atol=0.1)


def test_splitting_is_more_accurate_at_as_many_evaluations(x64):
  """The covariance by more than 6 (0.060 and 0.0090 at 200), of the larger error by more than 4; the mean, carried by
  the score at the start of the step, is worse by less than 2. Order 2 at half the steps wins by more than 3 again."""
  euler, split = (found_errors(name)["quadratic", 200] for name in ("euler", "sscs"))
  assert split[1] < euler[1] / 6
  assert max(split) < max(euler) / 4
  assert split[0] < 2 * euler[0]
  assert max(found_errors("sscs2")["quadratic", 100]) < max(split) / 3


@EACH
def test_moments_by_recursion_are_those_of_samples(name):
  """2000 samples of the sampler as it is called, 4 standard errors; the status is well and nfe as promised."""
  make, draws = SAMPLERS[name]

  def run(ts):
    sampler = make(ts)
    mean, cov = (v[0] for v in DATA.moments(SDE, sampler.ts[:1]))
    noise = jax.random.normal(jax.random.key(1), (2000, 3, 2))
    u_T = mean[None] + jnp.einsum("dij,bdj->bdi", jnp.linalg.cholesky(cov), noise)
    return sampler(KEY, u_T, DATA.score(SDE)), walks([sampler], DATA, draws)[0]

  sample, walk = compiled(run, grid(12, dtype=np.float32))
  jd.raise_if_failed(sample)
  assert sample.nfe[0] == (24 if name == "sscs2" else 12)
  mean, cov = sampled_moments(walk)
  variance = np.diagonal(cov, axis1=-2, axis2=-1)
  assert np.all(np.abs(sample.x.mean(axis=0) - mean) < 4 * np.sqrt(variance / 2000))
  away = np.asarray(sample.x) - mean
  found = np.einsum("bdi,bdj->dij", away, away) / 2000
  assert np.all(np.abs(found - cov) < 4 * np.sqrt((variance[..., None] * variance[..., None, :] + cov**2) / 2000))


@pytest.mark.parametrize("order", [1, 2])
def test_splitting_is_exact_where_the_score_is_that_of_the_prior(order, x64):
  """Two steps only, at gamma = 1 and N(0, I) data: the recursion keeps the prior to 1e-12."""
  sde, data = jd.CLD(gamma=1.0), type(DATA)(np.zeros(2), np.ones(2))
  run = lambda ts: walks([jd.samplers.sscs(sde, ts, order)], data, 2)[0]
  assert np.all(errors(compiled(run, np.asarray([1.0, 0.4, 0.01]))) < 1e-12)


@dataclass(frozen=True)
class Mine:
  """A process of one's own: variance preserving, beta = 2 + 8 t, with its reversible steps at the prior."""

  t1 = 1.0

  def beta(self, t):
    return 2 + 8 * t

  def drift(self, x, t):
    return -0.5 * jd.sde.expand(jnp.asarray(self.beta(t)), x) * x

  def diffuse(self, t, v):
    return jnp.sqrt(self.beta(t)) * v

  def prior_sample(self, key, shape):
    return jd.keys.normal(jd.keys.per_example(key, shape[0]), shape)

  def prior_log_prob(self, z):
    return -0.5 * jnp.sum(z**2 + jnp.log(2 * jnp.pi), axis=1)

  def step_back(self, x, t, s, noise):
    kept = jnp.exp(-0.5 * (t - s) * self.beta(0.5 * (t + s)))
    return kept * x + jnp.sqrt(1 - kept**2) * noise


class Shrunk:
  """Data N(0, 0.5^2) under it, as pairs of independent coordinates."""

  mean = np.zeros(1)

  def moments(self, sde, t):
    variance = 1 - 0.75 * jnp.exp(-(2 * t + 4 * t**2))
    return jnp.zeros((len(t), 1, 2)), variance[:, None, None, None] * jnp.eye(2)[None, None]

  def score(self, sde):
    return lambda x, t: -x / self.moments(sde, t)[1][..., 0, 0, None]


@pytest.mark.parametrize("order", [1, 2])
def test_a_process_of_ones_own_with_a_rate_that_varies(order, x64):
  run = lambda grids: walks([jd.samplers.sscs(Mine(), ts, order) for ts in grids], Shrunk(), 2)
  coarse, fine = (errors(walk)[1] for walk in compiled(run, [np.linspace(1.0, 0.1, n + 1) for n in (40, 160)]))
  np.testing.assert_allclose(np.log(coarse / fine) / np.log(4), order, atol=0.15)


def test_no_sampler_knows_of_the_process():
  """They go by the methods of protocols: none names it, imports it or asks for its kind."""
  for path in pathlib.Path(jd.samplers.__file__).parent.glob("*.py"):
    text = path.read_text(encoding="utf-8")
    code = re.sub(r'"""(.|\n)*?"""', "", text)
    assert not re.search(r"cld|langevin_diffusion|velocit|position", code, re.IGNORECASE), path.name
    assert "isinstance(sde" not in code.replace("self.", ""), path.name


@EACH
def test_example_k_is_the_same_in_any_batch_and_path_and_nan_is_reported(name):
  score = lambda u, t, broken: jnp.where((t < 0.5)[:, None, None] & broken[:, None, None], jnp.nan, -2 * u)
  run = jax.jit(lambda ts, keys, u, broken: SAMPLERS[name][0](ts, path=4)(keys, u, score, {"broken": broken}))
  u_T = np.random.default_rng(0).standard_normal((3, 2, 2)).astype(np.float32)
  keys, order = jd.example_keys(KEY, 0, 3), np.asarray([2, 1, 0])
  whole = jax.device_get(run(grid(8, dtype=np.float32), keys, u_T, order == 1))
  other = run(grid(8, dtype=np.float32), keys[order], u_T[order], np.zeros(3, bool))
  np.testing.assert_allclose(whole.x[[0, 2]], np.asarray(other.x)[[2, 0]], rtol=1e-5)
  assert whole.path.shape == (3, 3, 2, 2)
  np.testing.assert_array_equal(whole.path[-1], whole.x)
  assert whole.status.code.tolist() == [0, 2, 0]


def test_the_flow_carries_the_prior_to_the_data(x64):
  """Affine for Gaussian data: it carries the exact moments at t1 to those at t0, and back; 1e-6 at tolerance 1e-8."""
  field = jd.reverse(SDE, DATA.score(SDE), 0.0)[0]
  base = jd.flow.Base(SDE.prior_sample, SDE.prior_log_prob)
  flow = jd.flow.cnf(base, t0=T0, t1=SDE.t1, rtol=1e-8, atol=1e-8, steps="shared")
  unit = np.zeros((3, 3, 2))
  unit[1, :, 0] = unit[2, :, 1] = 1

  def run(u):
    ends = flow.inverse(KEY, u, field).x
    return ends, flow.forward(KEY, ends, field).x, DATA.moments(SDE, jnp.asarray([SDE.t1, T0]))

  ends, back, ((first, mean), (start, cov)) = compiled(run, unit)
  matrix = np.moveaxis(ends[1:] - ends[:1], 0, -1)
  np.testing.assert_allclose(matrix @ start @ np.moveaxis(matrix, -1, -2), cov, atol=1e-6)
  np.testing.assert_allclose(np.einsum("dij,dj->di", matrix, first) + ends[0], mean, atol=1e-6)
  np.testing.assert_allclose(back, unit, atol=1e-6)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_network_trained_by_hybrid_score_matching_samples_a_mixture():
  """1500 steps of an MLP, 25 evaluations of splitting and the denoiser: weights of the components within 0.03 (a
  standard error of 4000 samples is 0.008), deviations 0.2 within 15% where Euler-Maruyama is off by more."""
  data, sde, model, optimizer = mixture(), jd.CLD(), MLP(64, 2), optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
  apply, loss = jd.cld.on_channels(model.apply), jd.losses.hybrid(sde)

  def step(carry, key):
    params, state = carry
    data_key, loss_key = jax.random.split(key)
    x = data.sample(data_key, 512)
    gradient = jax.grad(lambda p: loss(loss_key, x, lambda u, t: apply(p, u, t))[0].mean())(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), None

  params = jax.jit(model.init)(KEY, jnp.zeros((1, 4)), jnp.zeros(1))
  train = jax.jit(lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
  params, ts = train(params, jax.random.split(jax.random.key(1), 1500)), jd.cld.time_grid(sde, 25)

  def draw(make, params, ts):
    score = jd.cld.score_fn(apply, params, sde)
    u = make(sde, ts)(jax.random.key(3), sde.prior_sample(jax.random.key(2), (4000, 2, 2)), score)
    return score.denoised(u.x, ts[-1])

  def off(make):
    x = np.asarray(jax.jit(draw, static_argnums=0)(make, params, ts))
    nearest = np.linalg.norm(x[:, None] - data.means, axis=-1).argmin(axis=1)
    stds = np.stack([x[nearest == k].std(axis=0) for k in range(3)])
    return np.abs(np.bincount(nearest, minlength=3) / 4000 - data.weights).max(), np.abs(stds / data.std - 1)

  weights, stds = jax.tree.map(np.asarray, off(jd.samplers.sscs))
  assert weights < 0.03
  assert np.all(stds < 0.15)
  assert np.all(off(jd.samplers.reverse_sde)[1] > 0.15)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: jd.samplers.sscs(jd.VP(), np.array([1.0, 0.5], np.float32)), TypeError, "got VP, which lacks step_back"),
    (
      lambda: jd.samplers.sscs(jd.CLD, np.array([1.0, 0.5], np.float32)),
      TypeError,
      r"did you forget to call it: CLD\(\)",
    ),
    (
      lambda: jd.samplers.sscs(SDE, np.array([1.0, 0.5], np.float32), order=3),
      ValueError,
      "order must be one of 1, 2, got 3",
    ),
    (lambda: jd.samplers.sscs(SDE, np.array([0.5, 1.0], np.float32)), ValueError, "ts must decrease"),
    (
      lambda: jd.samplers.sscs(SDE, np.array([1.0, 0.5], np.float32))(
        KEY, np.ones((4, 3), np.float32), lambda u, t: -u
      ),
      ValueError,
      r"u must be \[b, \*d, 2\], with position and velocity on the last axis, got \(4, 3\)",
    ),
    (
      lambda: jd.samplers.sscs(SDE, np.array([1.0, 0.5], np.float32))(
        KEY, np.ones((4, 3, 2), np.float32), lambda u, t: -u[..., 0]
      ),
      ValueError,
      "score must return an array of the shape of x",
    ),
  ],
)
def test_bad_input_is_refused(call, error, message, untyped):
  with pytest.raises(error, match=message):
    call()
