"""Microbatches, steps that are skipped, and networks that compute in bfloat16."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel import jit_launcher, make_mesh, replicate
from jaxdiff.training import init_state, make_train_step

BATCH, WIDTH = 24, 5
INDEX = np.arange(BATCH, dtype=np.int32)
X = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype(np.float32)


def noisy(params, keys, batch):
  """Uses everything that an example has: its key, time, data and place."""
  noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
  out = jnp.tanh((batch["x"] + batch["u"][:, None] * noise) @ params["in"]) @ params["out"]
  loss = jnp.mean((out - noise) ** 2, -1)
  return loss, {"u": batch["u"], "first": batch["x"][:, 0]}


def start(optimizer, **options):
  params = {"in": np.full((WIDTH, 8), 1 / 3), "out": np.linspace(-1, 1, 8 * WIDTH).reshape(8, WIDTH)}
  params = jax.tree.map(lambda p: p.astype(np.float32), params)
  return init_state(params, optimizer, jax.random.key(0), **options)


@pytest.mark.parametrize(("microbatches", "looped"), [(3, False), (3, True), (24, True)])
def test_microbatches_change_nothing_but_rounding(monkeypatch, microbatches, looped):
  if looped:  # as on accelerators
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  optimizer, results = optax.sgd(0.1), {}
  for m in (1, microbatches):
    step = jax.jit(make_train_step(noisy, optimizer, 0.9, BATCH, microbatches=m))
    results[m] = step(start(optimizer), {"x": X}, INDEX)
  assert bool(re.search(r"unroll=1\b", str(jax.make_jaxpr(step)(start(optimizer), {"x": X}, INDEX)))) == looped
  (state, metrics), (other, other_metrics) = results[1], results[microbatches]
  assert metrics.keys() == other_metrics.keys()
  for name in metrics:
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.params, other.params)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("launch", ["jit", "shard_map", "pmap"])
def test_microbatches_on_four_devices(monkeypatch, launch):
  """Each device takes part of its own rows: nothing is moved, and the sums are those of one device."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  optimizer, mesh = optax.sgd(0.1), make_mesh(jax.local_devices()[:4])
  state, metrics = jax.jit(make_train_step(noisy, optimizer, 0.9, BATCH))(start(optimizer), {"x": X}, INDEX)
  step = make_train_step(noisy, optimizer, 0.9, BATCH, microbatches=3)
  if launch == "jit":
    whole = jit_launcher(mesh).compile(step)
    program = whole.lower(replicate(mesh, start(optimizer)), {"x": X}, INDEX).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))
    other, other_metrics = whole(replicate(mesh, start(optimizer)), {"x": X}, INDEX)
  elif launch == "shard_map":
    split, none = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
      lambda s, b, i: step(s, b, i, axis_name="data"),
      mesh=mesh,
      in_specs=(none, split, split),
      out_specs=(none, none),
    )
    other, other_metrics = jax.jit(mapped)(start(optimizer), {"x": X}, INDEX)
  else:
    mapped = jax.pmap(
      lambda s, b, i: step(s, b, i, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0, 0),
      out_axes=None,
      devices=jax.local_devices()[:4],
    )
    other, other_metrics = mapped(start(optimizer), {"x": X.reshape(4, 6, WIDTH)}, INDEX.reshape(4, 6))
  for name in metrics:
    np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.params, other.params)


def test_microbatches_must_divide(eight_devices):
  optimizer = optax.sgd(0.1)
  for wrong in (0, 5):
    with pytest.raises(ValueError, match=f"microbatches={wrong}: must be a divisor of global_batch=24"):
      make_train_step(noisy, optimizer, 0.9, BATCH, microbatches=wrong)
  step = make_train_step(noisy, optimizer, 0.9, BATCH, microbatches=4)
  mapped = jax.pmap(lambda x, i: step(start(optimizer), {"x": x}, i, axis_name="d")[1], axis_name="d")
  with pytest.raises(ValueError, match="microbatches=4: must divide the 3 examples of each of the 8 mapped devices"):
    mapped(X.reshape(8, 3, WIDTH), INDEX.reshape(8, 3))


def bad_loss(params, keys, batch):
  loss, aux = noisy(params, keys, batch)
  return jnp.where(batch["bad"] == 1, jnp.nan, loss), aux


def bad_gradient(params, keys, batch):
  """The loss is finite; its gradient is 0 / 0 where bad is 1."""
  loss, aux = noisy(params, keys, batch)
  return loss + jnp.sqrt((1 - batch["bad"]) * (1 + params["in"][0, 0] ** 2)) * 0.1, aux


@pytest.mark.parametrize("objective", [bad_loss, bad_gradient])
def test_steps_that_are_not_finite_are_skipped_and_counted(objective):
  optimizer = optax.adam(0.1)
  step = jax.jit(make_train_step(objective, optimizer, 0.9, BATCH, ema_lengths=(0.1,)))
  state, counts = start(optimizer, ema_lengths=(0.1,)), []
  with jax.numpy_dtype_promotion("standard"):
    for i, bad in enumerate([0, 1, 1, 0, 1]):
      marks = np.zeros(BATCH, np.float32)
      marks[7] = bad
      before, (state, metrics) = state, step(state, {"x": X, "bad": marks}, INDEX)
      parts = lambda s: jax.tree.leaves((s.params, s.ema_params, s.opt_state, s.averages))
      same = [np.array_equal(a, b) for a, b in zip(parts(before), parts(state), strict=True)]
      assert all(same) if bad else not any(same)
      assert all(np.isfinite(leaf).all() for leaf in parts(state))
      assert np.isfinite(metrics["loss"]) == (not bad or objective is bad_gradient)
      assert np.isfinite(metrics["grad_norm"]) == (not bad or objective is bad_loss)
      assert metrics["skipped"] == bad
      assert int(state.step) == i + 1
      counts.append((int(state.skipped), int(state.skipped_in_a_row), float(metrics["skipped_in_a_row"])))
  assert counts == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (2, 0, 0), (3, 1, 1)]


@pytest.mark.standard_promotion
def test_bfloat16_network_trains_float32_parameters():
  """Values as small as 1e-30 pass backward through bfloat16, which has the exponents of float32: no loss scaling."""

  class Net(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x):
      return nn.Dense(WIDTH, dtype=self.dtype)(nn.relu(nn.Dense(16, dtype=self.dtype)(x)))

  def objective(dtype, scale):
    def loss(params, keys, batch):
      noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
      out = Net(dtype).apply(params, batch["x"] + noise).astype(jnp.float32)
      return scale * jnp.mean((out - noise) ** 2, -1), {}

    return loss

  optimizer = optax.chain(optax.identity(), optax.trace(0.0))  # keeps the gradient as its state
  params = Net(jnp.float32).init(jax.random.key(0), jnp.asarray(X))
  state, grads = init_state(params, optimizer, jax.random.key(1)), {}
  for dtype, scale in ((jnp.float32, 1.0), (jnp.bfloat16, 1.0), (jnp.bfloat16, 1e-30)):
    step = make_train_step(objective(dtype, scale), optimizer, 0.9, BATCH, microbatches=2)
    after, metrics = jax.jit(step)(state, {"x": X}, INDEX)
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    leaves = jax.tree.leaves((after.params, after.ema_params, after.opt_state))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    grads[dtype, scale] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after.opt_state)]) / scale
  exact = grads[jnp.float32, 1.0]
  error = lambda other: np.linalg.norm(other - exact) / np.linalg.norm(exact)
  assert 1e-5 < error(grads[jnp.bfloat16, 1.0]) < 3e-2
  assert error(grads[jnp.bfloat16, 1e-30]) < 3e-2


@pytest.mark.standard_promotion
def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
  """In bfloat16 256 + 1 = 256."""
  slopes = [16.0, *[1.0] * 20]
  params = [jnp.zeros((), jnp.bfloat16) for _ in slopes]
  objective = lambda params, keys, batch: (sum(map(jnp.multiply, slopes, params)) + 0 * batch["x"], {})
  optimizer = optax.sgd(0.1)
  step = jax.jit(make_train_step(objective, optimizer, 0.9, 2))
  _, metrics = step(init_state(params, optimizer, jax.random.key(0)), {"x": jnp.zeros(2)}, jnp.arange(2))
  assert metrics["grad_norm"].dtype == jnp.float32
  np.testing.assert_allclose(metrics["grad_norm"], 276**0.5, rtol=1e-6)
