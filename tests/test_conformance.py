"""Every process with every prediction through loss, samplers and likelihood; so with every kind of network."""

import functools
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from oracles import PREDICTIONS, SDES

import jaxdiff as jd
from jaxdiff import training

pytestmark = pytest.mark.standard_promotion
WEIGHTS = {
  name: jax.random.normal(jax.random.key(i), shape) * 0.3
  for i, (name, shape) in enumerate({"w1": (3, 16), "b1": (16,), "w2": (16, 2), "b2": (2,)}.items())
}


def plain(params, x, t):
  h = jnp.concatenate([x, t[:, None]], axis=-1)
  return jnp.tanh(h @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


class Linen(linen.Module):
  @linen.compact
  def __call__(self, x, t):
    h = jnp.concatenate([x, t[:, None]], axis=-1)
    return linen.Dense(2, name="outer")(jnp.tanh(linen.Dense(16, name="inner")(h)))


class Nnx(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.a, self.b = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)

  def __call__(self, x, t):
    return self.b(jnp.tanh(self.a(jnp.concatenate([x, t[:, None]], axis=-1))))


class Equinox(eqx.Module):
  w1: jax.Array
  b1: jax.Array
  w2: jax.Array
  b2: jax.Array

  def __call__(self, x, t):
    return plain(vars(self), x, t)


def haiku_network():
  """The same in Haiku, where that is installed."""
  if importlib.util.find_spec("haiku") is None:
    return {}
  import haiku as hk

  def net(x, t):
    h = jnp.concatenate([x, t[:, None]], axis=-1)
    return hk.Linear(2, name="outer")(jnp.tanh(hk.Linear(16, name="inner")(h)))

  parts = {name: {"w": WEIGHTS[f"w{i}"], "b": WEIGHTS[f"b{i}"]} for i, name in ((1, "inner"), (2, "outer"))}
  return {"haiku": (hk.without_apply_rng(hk.transform(net)).apply, parts)}


def networks():
  """(apply, params) of the same function, four ways."""
  w = WEIGHTS
  dense = lambda i: {"kernel": w[f"w{i}"], "bias": w[f"b{i}"]}
  module = Nnx()
  module.a.kernel[...], module.a.bias[...] = w["w1"], w["b1"]
  module.b.kernel[...], module.b.bias[...] = w["w2"], w["b2"]
  graph, state = nnx.split(module)
  return haiku_network() | {
    "plain": (plain, w),
    "linen": (Linen().apply, {"params": {"inner": dense(1), "outer": dense(2)}}),
    "nnx": (lambda params, x, t: nnx.merge(graph, params)(x, t), state),
    "equinox": (lambda params, x, t: params(x, t), Equinox(**w)),
  }


def everything(sde, prediction, apply, t0=None, solves=True):
  """One function of (params, key, x) through the loss and both samplers and the log-density, or without the solves."""
  loss = jd.losses.denoising(sde, prediction, t0=t0)
  step = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 8, t0=t0))
  flow = jd.samplers.probability_flow(sde, 1e-2, 1e-2, t0=t0)
  log_prob = jd.likelihood.log_prob(sde, rtol=1e-2, atol=1e-2, t0=t0)

  def run(params, key, x):
    score = jd.score_fn(apply, params, sde, prediction)
    network = lambda x, t: apply(params, x, t)
    x_T = sde.prior_sample(key, x.shape).astype(x.dtype)
    result = {"loss": loss(key, x, network)[0], "reverse_sde": step(key, x_T, score).x}
    if solves:
      result |= {"probability_flow": flow(key, x_T, score).x, "log_prob": log_prob(key, x, score).value}
    return result

  return run


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_every_process_and_prediction_is_finite_and_traced_once(sde, prediction):
  """The solves see a score only: they run with every process once, and with every prediction once."""
  traces = []

  def apply(params, x, t):
    traces.append(1)
    return plain(params, x, t)

  solves = sde is SDES["vp"] or prediction is PREDICTIONS["edm"]
  run = jax.jit(everything(sde, prediction, apply, t0=0.02 * sde.t1, solves=solves))
  x = jax.random.normal(jax.random.key(0), (4, 2))
  first = run(WEIGHTS, jax.random.key(1), x)
  count = len(traces)
  second = run(jax.tree.map(lambda w: 1.1 * w, WEIGHTS), jax.random.key(2), x)
  assert len(traces) == count
  for name in first:
    assert jnp.all(jnp.isfinite(first[name])), name
    assert jnp.all(first[name] != second[name]), name


KINDS = ["linen", "nnx", "equinox", *haiku_network()]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_gives_the_same_numbers(name):
  sde, prediction, x = jd.VP(), jd.predictions.edm(0.5), jax.random.normal(jax.random.key(0), (4, 2))
  results = []
  for kind in ("plain", name):
    apply, params = networks()[kind]
    run = jax.jit(everything(sde, prediction, apply))
    gradient = jax.jit(jax.grad(lambda p, run=run: jnp.sum(run(p, jax.random.key(1), x)["loss"])))(params)
    results.append((run(params, jax.random.key(1), x), sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))))
  (expected, norm), (values, other_norm) = results
  for key in expected:
    np.testing.assert_allclose(values[key], expected[key], rtol=1e-4, atol=1e-4, err_msg=key)
  np.testing.assert_allclose(other_norm, norm, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_trainer_takes_every_kind_of_network(name):
  """Three steps of momentum with averages leave the parameters that they leave of plain functions."""
  loss, x = jd.losses.denoising(jd.VP(), jd.predictions.noise()), jax.random.normal(jax.random.key(0), (8, 2))
  moved = []
  for kind in ("plain", name):
    apply, params = networks()[kind]
    objective = lambda params, key, batch, apply=apply: loss(
      key, batch["x"], functools.partial(apply, params), u=batch["u"]
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = jax.jit(training.make_train_step(objective, optimizer, 0.9, 8))
    state = training.init_state(params, optimizer, jax.random.key(1))
    for _ in range(3):
      state, metrics = step(state, {"x": x}, jnp.arange(8))
    assert not metrics["skipped"]
    for tree in (state.params, state.ema_params):
      moved.append(sorted((leaf.shape, leaf.sum().item(), (leaf**2).sum().item()) for leaf in jax.tree.leaves(tree)))
  for expected, value in zip(moved[:2], moved[2:], strict=True):
    assert [shape for shape, *_ in value] == [shape for shape, *_ in expected]
    np.testing.assert_allclose([rest for _, *rest in value], [rest for _, *rest in expected], rtol=1e-4, atol=1e-5)


def test_vmap_over_processes_and_grad_through_everything():
  """The process is a pytree too: four VPs at once, and the derivative of a log-density by beta_max."""
  processes = jax.vmap(lambda b: jd.VP(beta_max=b))(jnp.linspace(5.0, 20.0, 4))
  x = jnp.ones((2, 2))

  def value(sde):
    log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-3, 1e-3, t0=0.01)
    return log_prob(jax.random.key(0), x, lambda x, t: -1.5 * x).value.sum()

  values = jax.jit(jax.vmap(value))(processes)
  one = jax.jit(value)(jd.VP(beta_max=20.0))
  np.testing.assert_allclose(values[-1], one, rtol=1e-4)
  assert jnp.isfinite(jax.jit(jax.grad(value))(jd.VP(beta_max=20.0)).beta_max)


def test_a_user_s_own_process_works_everywhere():
  """No inheritance: a plain class with the methods of the protocol."""

  class Mine:
    t1 = 1.0

    def drift(self, x, t):
      return jd.VP().drift(x, t)

    def diffuse(self, t, v):
      return jd.VP().diffuse(t, v)

    def diffusion(self, t):
      return jd.VP().diffusion(t)

    def marginal(self, t):
      return jd.VP().marginal(t)

    def time_of_log_snr(self, log_snr):
      return jd.VP().time_of_log_snr(log_snr)

    def prior_sample(self, key, shape):
      return jd.VP().prior_sample(key, shape)

    def prior_log_prob(self, z):
      return jd.VP().prior_log_prob(z)

  jax.tree_util.register_static(Mine)
  x = jax.random.normal(jax.random.key(0), (4, 2))
  mine, theirs = (
    everything(sde, jd.predictions.noise(), plain, t0=0.05)(WEIGHTS, jax.random.key(1), x) for sde in (Mine(), jd.VP())
  )
  for name in mine:
    np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, err_msg=name)


def test_half_precision_network_leaves_schedules_and_state_alone():
  half = lambda params, x, t: plain(
    jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), *(v.astype(jnp.bfloat16) for v in (x, t))
  )
  x = jax.random.normal(jax.random.key(0), (4, 2))
  run = lambda apply: everything(jd.VP(), jd.predictions.edm(0.5), apply, t0=0.02)(WEIGHTS, jax.random.key(1), x)
  low, high = run(half), run(plain)
  for name in low:
    assert low[name].dtype == jnp.float32
    median = np.median(np.abs(low[name] - high[name])) / np.std(high[name])
    assert median < 0.1, name


def test_prior_drawn_by_pmap_and_jit_are_the_same_images():
  """The example of the design: keys one per example, eight devices."""
  sde = jd.VP()
  sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 10))

  def draw(params, keys):
    k_prior, k_path = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    score = jd.score_fn(plain, params, sde, jd.predictions.noise())
    return sampler(k_path, sde.prior_sample(k_prior, (len(keys), 2)), score).x

  keys = jd.example_keys(jax.random.key(0), 0, 16)
  together = jax.jit(draw)(WEIGHTS, keys)
  apart = jax.pmap(draw, in_axes=(None, 0))(WEIGHTS, keys.reshape(8, 2))
  np.testing.assert_allclose(apart.reshape(16, 2), together, rtol=1e-4, atol=1e-5)
