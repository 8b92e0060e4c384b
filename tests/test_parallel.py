"""Layouts do not change results: train steps, samplers and adaptive loops on 1 and 8 (simulated) devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.parallel import (
  batch_sharding,
  make_mesh,
  pmap_examples,
  shard_batch,
  shard_examples,
)

BATCH = 16
pytestmark = pytest.mark.usefixtures("eight_devices")


def mesh_of(devices):
  assert jax.local_device_count() >= devices
  return make_mesh(jax.local_devices()[:devices])


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
