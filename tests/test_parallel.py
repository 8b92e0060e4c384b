"""Layouts do not change results: train steps, samplers and adaptive loops on 1 and 8 (simulated) devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel import (
  batch_sharding,
  jit_train_step,
  make_mesh,
  pmap_examples,
  replicate,
  shard_batch,
  shard_examples,
)
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

BATCH = 16


def mesh_of(devices):
  assert jax.local_device_count() >= devices
  return make_mesh(jax.local_devices()[:devices])


def denoise(params, keys, batch):
  """A small noise-prediction loss whose value depends on the parameters, the keys and the uniforms."""
  noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
  t = batch["u"][:, None]
  hidden = jnp.tanh(((1 - t) * batch["x"] + t * noise) @ params["in"])
  losses = jnp.mean((hidden @ params["out"] - noise) ** 2, -1)
  return losses, {"u": batch["u"], "noise": noise[:, 0]}


def params():
  k_in, k_out = jax.random.split(jax.random.key(1))
  return {"in": jax.random.normal(k_in, (3, 5)), "out": jax.random.normal(k_out, (5, 3))}


def data():
  return {"x": np.random.default_rng(0).normal(size=(BATCH, 3)).astype(np.float32)}


def run_jit(devices, optimizer, steps):
  mesh = mesh_of(devices)
  step = jit_train_step(make_train_step(denoise, optimizer, 0.9, BATCH), mesh)
  state = replicate(mesh, init_state(params(), optimizer, jax.random.key(0)))
  batch, index = shard_batch(mesh, data()), shard_batch(mesh, np.arange(BATCH, dtype=np.int32))
  for _ in range(steps):
    state, metrics = step(state, batch, index)
  return jax.device_get(state._replace(key=jax.random.key_data(state.key))), jax.device_get(metrics)


def run_pmap(devices, optimizer, steps):
  step = make_train_step(denoise, optimizer, 0.9, BATCH)
  step = jax.pmap(functools.partial(step, axis_name="i"), axis_name="i", in_axes=(None, 0, 0), out_axes=None)
  state = init_state(params(), optimizer, jax.random.key(0))
  split = lambda v: v.reshape(devices, BATCH // devices, *v.shape[1:])
  for _ in range(steps):
    state, metrics = step(state, jax.tree.map(split, data()), split(np.arange(BATCH, dtype=np.int32)))
  return jax.device_get(state._replace(key=jax.random.key_data(state.key))), jax.device_get(metrics)


def global_distance(a, b):
  """|a - b| / |b| over all leaves."""
  a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("run", [run_jit, run_pmap])
def test_eight_devices_equal_one(run):
  # Rounding: sums of 16 float32 terms in another order, 5 SGD steps; 1e-5 of the norm is 80 float32 ulps.
  one, one_metrics = run_jit(1, optax.sgd(0.1), 5)
  many, many_metrics = run(8, optax.sgd(0.1), 5)
  assert global_distance(many.params, one.params) < 1e-5
  assert global_distance(many.ema_params, one.ema_params) < 1e-5
  assert global_distance(one.params, params()) > 1e-2
  for name in one_metrics:
    np.testing.assert_allclose(many_metrics[name], one_metrics[name], rtol=1e-5)


@pytest.mark.parametrize("run", [run_jit, run_pmap])
def test_gradient_does_not_depend_on_devices(run):
  # SGD with rate 1: the update is minus the gradient.
  one, many = run_jit(1, optax.sgd(1.0), 1)[0].params, run(8, optax.sgd(1.0), 1)[0].params
  gradient = jax.tree.map(lambda p, q: np.asarray(q) - p, one, params())
  difference = jax.tree.map(np.subtract, many, one)
  assert global_distance(jax.tree.map(np.add, gradient, difference), gradient) < 1e-5


def test_keys_and_uniforms_are_bitwise_equal_on_any_layout():
  from jaxdiff.training.step import noise_keys, stratified_uniforms

  @jax.jit
  def randomness(index):
    key, step = jax.random.key(3), jnp.int32(7)
    return jax.random.key_data(noise_keys(key, step, index)), stratified_uniforms(key, step, index, BATCH)

  index = np.arange(BATCH, dtype=np.int32)
  expected = jax.device_get(randomness(index))
  for devices in (1, 2, 8):
    for got, want in zip(randomness(shard_batch(mesh_of(devices), index)), expected, strict=True):
      np.testing.assert_array_equal(got, want)


def test_train_step_compiles_once():
  mesh, optimizer, traces, compilations = mesh_of(8), optax.adam(1e-3), [], []
  listener = lambda name, seconds, **_: compilations.append(1) if name.endswith("/backend_compile_duration") else None

  def objective(params, keys, batch):
    traces.append(1)
    return denoise(params, keys, batch)

  step = jit_train_step(make_train_step(objective, optimizer, 0.9, BATCH), mesh)
  state = replicate(mesh, init_state(params(), optimizer, jax.random.key(0)))
  index = shard_batch(mesh, np.arange(BATCH, dtype=np.int32))
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for _ in range(4):
      state, _ = step(state, shard_batch(mesh, data()), index)
      assert (len(traces), len(compilations)) == (1, 1)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_state_is_donated():
  mesh, optimizer = mesh_of(8), optax.sgd(0.1)
  step = jit_train_step(make_train_step(denoise, optimizer, 0.9, BATCH), mesh)
  state = replicate(mesh, init_state(params(), optimizer, jax.random.key(0)))
  step(state, shard_batch(mesh, data()), shard_batch(mesh, np.arange(BATCH, dtype=np.int32)))
  assert state.params["in"].is_deleted()


def collatz(params, keys, x, cond):
  """Every example loops until it reaches 1: different numbers of steps, as in an adaptive solve."""

  def steps(key, start, extra):
    count = jax.lax.while_loop(
      lambda c: c[0] > 1, lambda c: (jnp.where(c[0] % 2, 3 * c[0] + 1, c[0] // 2), c[1] + 1), (start, 0)
    )
    return {"steps": count[1] + extra, "noise": params * jax.random.normal(key)}

  return jax.vmap(steps)(keys, x, cond["extra"])


def test_shard_examples_equals_the_unsharded_function():
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(BATCH))
  x, cond = np.arange(1, BATCH + 1, dtype=np.int32), {"extra": np.arange(BATCH, dtype=np.int32)}
  want = jax.jit(collatz)(2.0, keys, x, cond)
  assert len(set(want["steps"].tolist())) > 4
  for devices in (1, 8):
    mesh = mesh_of(devices)
    got = jax.jit(shard_examples(collatz, mesh))(2.0, *shard_batch(mesh, (keys, x, cond)))
    np.testing.assert_array_equal(got["steps"], want["steps"])
    np.testing.assert_array_equal(got["noise"], want["noise"])
    assert got["steps"].sharding.is_equivalent_to(batch_sharding(mesh), 1)


def test_shard_examples_needs_no_communication():
  mesh = mesh_of(8)
  keys = jax.random.split(jax.random.key(5), BATCH)
  arguments = (2.0, keys, jnp.arange(BATCH), {"extra": jnp.arange(BATCH)})
  text = jax.jit(shard_examples(collatz, mesh)).lower(*arguments).compile().as_text()
  assert "while" in text
  assert not any(name in text for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("layout", ["shard 2x4", "pmap"])
def test_examples_are_split_over_both_axes(layout):
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(BATCH))
  x, cond = np.arange(1, BATCH + 1, dtype=np.int32), {"extra": np.arange(BATCH, dtype=np.int32)}
  want = jax.jit(collatz)(2.0, keys, x, cond)
  mesh = make_mesh(jax.local_devices(), fsdp=4)
  run = jax.jit(shard_examples(collatz, mesh)) if layout == "shard 2x4" else pmap_examples(collatz)
  got = run(2.0, *shard_batch(mesh, (keys, x, cond)))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert {shard.data.shape for shard in got["steps"].addressable_shards} == {(BATCH // 8,)}


def test_shard_examples_accepts_no_conditions():
  mesh = mesh_of(8)
  double = shard_examples(lambda params, x, cond: params * x, mesh)
  np.testing.assert_array_equal(double(2.0, jnp.arange(8.0), {}), 2 * np.arange(8.0))


@pytest.mark.parametrize(("size", "nearest"), [(12, 16), (3, 8), (25, 24), (0, 8)])
def test_indivisible_batch_is_refused(size, nearest):
  mesh = mesh_of(8)
  message = f"{size} examples cannot be split over 8 devices; the nearest valid batch size is {nearest}"
  with pytest.raises(ValueError, match=message):
    shard_batch(mesh, {"x": np.zeros((size, 2))})
  with pytest.raises(ValueError, match=message):
    shard_examples(lambda params, x: x, mesh)(1.0, jnp.zeros((size, 2)))


def test_unequal_leading_sizes_are_refused():
  with pytest.raises(ValueError, match=r"same leading.*'x'.*\(8, 2\).*'y'.*\(16,\)"):
    shard_batch(mesh_of(8), {"x": np.zeros((8, 2)), "y": np.zeros(16)})
  with pytest.raises(ValueError, match="same leading"):
    shard_batch(mesh_of(8), {"x": np.zeros(())})
