"""Every process with every prediction through loss and sampler; every kind of network through everything.

The file that runs with its annotations executed (`pytest --types`): every public kind of function is entered in it.
"""

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
X = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)


def weights():
  rng = np.random.default_rng(1)
  shapes = {"w1": (3, 16), "b1": (16,), "w2": (16, 2), "b2": (2,)}
  return {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


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

  w = weights()
  parts = {name: {"w": w[f"w{i}"], "b": w[f"b{i}"]} for i, name in ((1, "inner"), (2, "outer"))}
  return {"haiku": (hk.without_apply_rng(hk.transform(net)).apply, parts)}


@functools.cache
def networks():
  """(apply, params) of the same function, four ways."""
  w = weights()
  dense = lambda i: {"kernel": w[f"w{i}"], "bias": w[f"b{i}"]}
  module = nnx.eval_shape(Nnx)
  for layer, i in ((module.a, 1), (module.b, 2)):
    layer.kernel.set_value(jnp.asarray(w[f"w{i}"]))
    layer.bias.set_value(jnp.asarray(w[f"b{i}"]))
  graph, state = nnx.split(module)
  return haiku_network() | {
    "plain": (plain, w),
    "linen": (Linen().apply, {"params": {"inner": dense(1), "outer": dense(2)}}),
    "nnx": (lambda params, x, t: nnx.merge(graph, params)(x, t), state),
    "equinox": (lambda params, x, t: params(x, t), Equinox(**w)),
  }


def loss_and_samples(sde, prediction, apply, t0):
  """One function of (params, key, x) through the loss and a sampler, from a draw of the prior."""
  loss = jd.losses.denoising(sde, prediction, t0=t0)
  step = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 8, t0=t0))

  def run(params, key, x):
    score = jd.score_fn(apply, params, sde, prediction)
    x_T = sde.prior_sample(key, x.shape).astype(x.dtype)
    return {"loss": loss(key, x, functools.partial(apply, params))[0], "reverse_sde": step(key, x_T, score).x}

  return run


@pytest.mark.parametrize("name", SDES)
def test_every_process_and_prediction_is_finite_and_traced_once(name):
  """One program for all predictions. The solves see a score only: they are not multiplied."""
  sde, traces = SDES[name], []

  def apply(params, x, t):
    traces.append(1)
    return plain(params, x, t)

  each = {name: loss_and_samples(sde, prediction, apply, 0.02 * sde.t1) for name, prediction in PREDICTIONS.items()}
  run = jax.jit(lambda params, key, x: {name: f(params, key, x) for name, f in each.items()})
  first = run(weights(), jax.random.key(1), X)
  count = len(traces)
  second = run(jax.tree.map(lambda w: np.float32(1.1) * w, weights()), jax.random.key(2), X)
  assert len(traces) == count
  for prediction, values in first.items():
    for key, value in values.items():
      assert np.all(np.isfinite(value)), (prediction, key)
      assert np.all(np.asarray(value) != np.asarray(second[prediction][key])), (prediction, key)


@functools.cache
def everything(sde, apply):
  """A jitted function of (params, key, x): loss and its gradient, a sampler, log-density."""
  prediction = jd.predictions.edm(0.5)
  short = loss_and_samples(sde, prediction, apply, 0.05)
  log_prob = jd.likelihood.log_prob(sde, rtol=1e-2, atol=1e-2, t0=0.05)

  @jax.jit
  def run(params, key, x):
    def loss(params):
      result = short(params, key, x)
      return jnp.sum(result["loss"]), result

    gradient, result = jax.grad(loss, has_aux=True)(params)
    score = jd.score_fn(apply, params, sde, prediction)
    norm = jnp.stack([jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(gradient)]).sum()
    return result | {"log_prob": log_prob(key, x, score).value, "gradient": norm}

  return run


def results(kind="plain", sde=jd.VP()):
  apply, params = networks()[kind]
  return everything(sde, apply)(params, jax.random.key(1), X)


KINDS = ["linen", "nnx", "equinox", *haiku_network()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_gives_the_same_numbers(kind):
  values = results(kind)
  for name, expected in results().items():
    np.testing.assert_allclose(values[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


@functools.cache
def trained(kind):
  """Three steps of momentum with averages: shapes, sums and squares of the parameters, and of their averages."""
  apply, params = networks()[kind]
  loss, optimizer = jd.losses.denoising(jd.VP(), jd.predictions.noise()), optax.sgd(0.1, momentum=0.9)
  objective = lambda params, key, batch: loss(key, batch["x"], functools.partial(apply, params), u=batch["u"])
  train_step = training.make_train_step(objective, optimizer, 0.9, 4)

  @jax.jit
  def run(params, x):
    state = training.init_state(params, optimizer, jax.random.key(1))
    state, metrics = jax.lax.scan(lambda state, _: train_step(state, {"x": x}, jnp.arange(4)), state, length=3)
    return state.params, state.ema_params, metrics["skipped"]

  *moved, skipped = jax.tree.map(np.asarray, run(params, X))
  assert not np.any(skipped)
  return [sorted((leaf.shape, leaf.sum(), (leaf**2).sum()) for leaf in jax.tree.leaves(tree)) for tree in moved]


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_takes_every_kind_of_network(kind):
  """The parameters that are left are those of plain functions."""
  for expected, value in zip(trained("plain"), trained(kind), strict=True):
    assert [shape for shape, *_ in value] == [shape for shape, *_ in expected]
    np.testing.assert_allclose([rest for _, *rest in value], [rest for _, *rest in expected], rtol=1e-4, atol=1e-5)
    assert not np.allclose(sum(square for *_, square in value), sum((w**2).sum() for w in weights().values()))


def test_vmap_over_processes_and_grad_through_everything(x64):
  """The process is a pytree too: two VPs at once, and the derivatives of a log-density by beta_max, in closed form."""
  t0, top = 0.01, np.array([5.0, 20.0])
  x = np.array([[1.0, 1.0], [0.5, -1.0]])

  def value(sde):
    log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), 1e-7, 1e-7, t0=t0)
    return log_prob(jax.random.key(0), jnp.asarray(x), lambda x, t: -1.5 * x).value.sum()

  processes = jd.VP(jnp.full(2, 0.1), jnp.asarray(top))
  values, slopes = jax.jit(jax.vmap(jax.value_and_grad(value)))(processes)

  def exact(top):
    b = 0.1 * (1 - t0) + 0.5 * (top - 0.1) * (1 - t0**2)  # x' = beta x / 4
    return np.sum(-0.5 * (x**2) * np.exp(0.5 * b) - 0.5 * np.log(2 * np.pi) + 0.25 * b)

  np.testing.assert_allclose(values, [exact(v) for v in top], rtol=1e-5)
  h = 1e-5
  np.testing.assert_allclose(slopes.beta_max, [(exact(v + h) - exact(v - h)) / (2 * h) for v in top], rtol=1e-4)


class Mine:
  """A user's process without inheritance: a plain class with the methods of the protocol."""

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


def test_a_user_s_own_process_works_everywhere():
  mine = results(sde=Mine())
  for name, expected in results().items():
    np.testing.assert_allclose(mine[name], expected, rtol=1e-5, err_msg=name)
  flow = jd.samplers.probability_flow(Mine(), max_steps=2)
  end = jax.eval_shape(lambda x: flow(jax.random.key(0), x, lambda x, t: -x).x, jax.ShapeDtypeStruct(X.shape, X.dtype))
  assert end.shape == X.shape


def half(params, x, t):
  low = jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.bfloat16), params)
  return plain(low, *(v.astype(jnp.bfloat16) for v in (x, t)))


def test_half_precision_network_leaves_schedules_and_state_alone():
  low, high = everything(jd.VP(), half)(weights(), jax.random.key(1), X), results()
  assert len(low) == 4
  for name, value in low.items():
    assert value.dtype == jnp.float32
    if value.ndim:
      median = np.median(np.abs(np.asarray(value) - high[name])) / np.std(high[name])
      assert median < 0.1, name


@pytest.mark.usefixtures("eight_devices")
def test_prior_drawn_by_pmap_and_jit_are_the_same_images():
  """The example of the design: keys one per example, eight devices."""
  sde = jd.VP()
  sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 8))

  def draw(params, keys):
    k_prior, k_path = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    score = jd.score_fn(plain, params, sde, jd.predictions.noise())
    return sampler(k_path, sde.prior_sample(k_prior, (len(keys), 2)), score).x

  keys = jd.example_keys(jax.random.key(0), 0, 16)
  together = jax.jit(draw)(weights(), keys)
  apart = np.asarray(jax.pmap(draw, in_axes=(None, 0))(weights(), keys.reshape(8, 2)))
  np.testing.assert_allclose(apart.reshape(16, 2), together, rtol=1e-4, atol=1e-5)


def entries():
  """(what is called, the shape of its result), one of every public kind of function that is not entered above."""
  sde, ts, key = jd.VP(), jnp.asarray([1.0, 0.5, 0.1]), jax.random.key(0)
  score, chain = lambda x, t, **cond: -x, jd.ddpm.Chain(jd.ddpm.linear_betas())
  cld, flow = jd.CLD(), jd.flow.cnf(solver="rk4", num_steps=2)
  cld_score = jd.cld.score_fn(lambda _, u, t: u[..., 0], None, cld)
  sampled = lambda sampler: lambda x: sampler(key, x, score).x
  lost = lambda loss: lambda x: loss(key, x, score)[0]
  guided = lambda score: lambda x: score(x, 0.5, label=jnp.zeros(4, jnp.int32))
  log_prob = jd.likelihood.log_prob(sde, jd.divergence.hutchpp(1, 2), max_steps=1)
  autoencoder = jd.typing.Autoencoder(lambda x: (x, x), lambda z: z)
  samplers = {
    "ddim": jd.samplers.ddim(sde, ts),
    "dpm_solver": jd.samplers.dpm_solver(sde, ts),
    "dpm_solver_pp": jd.samplers.dpm_solver_pp(sde, ts),
    "unipc": jd.samplers.unipc(sde, ts),
    "edm": jd.samplers.edm(sde, ts),
    "ancestral": jd.samplers.ancestral(chain),
    "probability_flow": jd.samplers.probability_flow(sde, max_steps=2),
    "adaptive_sde": jd.samplers.adaptive_sde(sde, max_steps=2),
    "langevin": jd.samplers.langevin(0.1, 2),
  }
  losses = {
    "ddpm_simple": jd.losses.ddpm_simple(chain),
    "ddpm_elbo": jd.losses.ddpm_elbo(chain),
    "explicit": jd.losses.explicit(score),
    "implicit": jd.losses.implicit(),
    "sliced": jd.losses.sliced(),
    "bound": jd.losses.bound(sde),
    "ffjord": jd.losses.ffjord(solver="rk4", num_steps=2),
    "hybrid": lambda key, x, _: jd.losses.hybrid(cld)(key, x, lambda u, t: u[..., 0]),
  }
  return (
    {name: (sampled(sampler), (4, 2)) for name, sampler in samplers.items()}
    | {name: (lost(loss), (4,)) for name, loss in losses.items()}
    | {
      "classifier": (guided(jd.guidance.classifier(score, lambda x, t, label: -jnp.sum(x**2, axis=1), 1.0)), (4, 2)),
      "autoguidance": (guided(jd.guidance.autoguidance(score, score, 2.0)), (4, 2)),
      "bits_per_dim": (lambda x: jd.likelihood.bits_per_dim(log_prob, 4)(key, jnp.int32(x), score).value, (4,)),
      "inverse of a flow": (lambda x: flow.inverse(key, x, score).x, (4, 2)),
      "log_prob of a flow": (lambda x: flow.log_prob(key, x, score).value, (4,)),
      "perturb": (lambda x: jd.perturb(key, x, 0.5, sde)[0], (4, 2)),
      "cld.perturb": (lambda x: jd.cld.perturb(key, x, 0.5, cld)[0], (4, 2, 2)),
      "cld.score_fn": (lambda x: cld_score(jnp.stack([x, x], axis=2), 0.5), (4, 2, 2)),
      "latents": (lambda x: jd.latents.entropy(jd.latents.posterior(autoencoder, x)), (4,)),
      "reverse": (lambda x: jd.reverse(sde, score, 1.0)[0](x, 0.5), (4, 2)),
    }
  )


def test_every_public_kind_of_function_returns_its_shape():
  for name, (call, shape) in entries().items():
    result = jax.eval_shape(call, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert (result.shape, result.dtype) == (shape, jnp.float32), name
