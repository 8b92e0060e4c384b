"""Averages: recursions against sums, lengths against numerical integrals, reconstruction against direct tracking."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.training import Snapshots, ema, init_state, make_train_step, reconstruct
from jaxdiff.training.snapshots import stored

LENGTHS = (0.05, 0.1)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25, ema.MAX_LENGTH])
def test_recursion_is_the_weighted_sum(x64, length):
  # Integer parameters: the sum is exact up to the rounding of its weights.
  values = np.random.default_rng(0).integers(-50, 50, 300).astype(np.float64)
  update = jax.jit(lambda a, p, s: ema.power_update(a, p, s, length))
  average = jnp.float64(1e6)  # where the average starts is forgotten at once
  for step, value in enumerate(values):
    average = update(average, jnp.float64(value), jnp.int32(step))
    ends = (np.arange(step + 2) / (step + 1)) ** (ema.exponent(length) + 1)
    want = np.diff(ends) @ values[: step + 1]
    # β is computed in float32.
    np.testing.assert_allclose(average, want, atol=3e-5 * 50)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 97.0])
def test_length_is_the_standard_deviation_of_the_profile(gamma):
  tau = (np.arange(1_000_000) + 0.5) / 1_000_000
  profile = (gamma + 1) * tau**gamma
  mean = np.mean(profile * tau)
  assert np.mean(profile) == pytest.approx(1, rel=1e-6)
  assert ema.relative_width(gamma) == pytest.approx(np.sqrt(np.mean(profile * (tau - mean) ** 2)), rel=1e-6)
  assert ema.exponent(ema.relative_width(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-6)


def test_products_are_the_integrals():
  t, gamma = np.array([3.0, 5.0, 5.0, 8.0]), np.array([6.9, 17.0, 0.5, 3.0])
  tau = (np.arange(400_000) + 0.5) * 8 / 400_000
  profiles = np.where(
    tau <= t[:, None], (gamma[:, None] + 1) * tau ** gamma[:, None] / t[:, None] ** (gamma[:, None] + 1), 0
  )
  products = profiles @ profiles.T * 8 / 400_000
  scale = np.sqrt(np.diag(products))
  np.testing.assert_allclose(ema._products(t, gamma), products / scale / scale[:, None], rtol=1e-4)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3])
def test_lengths_out_of_range(length):
  with pytest.raises(ValueError, match=f"length={length}: relative widths"):
    ema.exponent(length)
  with pytest.raises(ValueError, match=f"length={length}"):
    make_train_step(lambda p, k, b: (p, {}), optax.sgd(0.1), 0.9, 4, ema_lengths=(0.1, length))


def test_combination_of_one_that_is_stored_is_that_one():
  there = [(step, length) for step in range(50, 1001, 50) for length in LENGTHS]
  for want in (15, 38, 39):
    weights, distance = ema.combination(there, *there[want])
    np.testing.assert_allclose(weights, np.eye(len(there))[want], atol=1e-8)
    assert distance < 1e-6


def test_combination_uses_nothing_from_later():
  weights, _ = ema.combination([(100, 0.1), (200, 0.1), (300, 0.1)], 250, 0.05)
  assert weights[2] == 0 != weights[1]
  with pytest.raises(ValueError, match="step=50: no average is stored up to this step; the first is of step 100"):
    ema.combination([(100, 0.1)], 50, 0.1)


def path(step):
  """A synthetic run: falls fast, then slowly, with noise."""
  rng = np.random.default_rng(step)
  return {"w": (5 / (1 + step / 30) + np.sin(step / 150) + 0.05 * rng.normal(size=(2, 3))).astype(np.float32)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Snapshots every 40 of 800 steps, and the directly tracked average of length 0.07."""
  directory = tmp_path_factory.mktemp("run") / "snapshots"
  lengths = (*LENGTHS, 0.07)
  state = init_state(jax.tree.map(jnp.asarray, path(0)), optax.sgd(0.0), jax.random.key(0), ema_lengths=LENGTHS)
  update = jax.jit(
    lambda averages, params, step: tuple(
      ema.power_update(a, params, step, length) for a, length in zip(averages, lengths, strict=True)
    )
  )
  averages, tracked = (state.params,) * 3, {}
  with Snapshots(directory, LENGTHS) as snapshots:
    for step in range(800):
      averages = update(averages, path(step + 1), jnp.int32(step))
      if (step + 1) % 40 == 0:
        snapshots.save(state._replace(step=jnp.int32(step + 1), averages=averages[:2]))
        tracked[step + 1] = averages
  return directory, tracked


def abstract():
  return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), path(0))


def test_reconstruction_of_a_stored_average_is_exact(run):
  directory, tracked = run
  for i, length in enumerate(LENGTHS):
    for step in (None, 400):
      params, at, distance = reconstruct(directory, abstract(), length, step)
      assert at == (step or 800)
      np.testing.assert_allclose(params["w"], tracked[at][i]["w"], rtol=1e-6)
      assert distance < 1e-6


def test_reconstruction_of_a_new_length_is_near_the_tracked_one(run):
  # Of 20 snapshots of two lengths: distance 0.0025, error 4e-5, where the stored lengths differ by 0.004.
  directory, tracked = run
  params, _, distance = reconstruct(directory, abstract(), 0.07)
  assert 1e-5 < distance < 5e-3
  error = np.abs(params["w"] - tracked[800][2]["w"]).max()
  others = min(np.abs(tracked[800][i]["w"] - tracked[800][2]["w"]).max() for i in range(2))
  assert error < 2e-4
  assert error < 0.05 * others


def test_damaged_snapshot_is_named_and_done_without(run, tmp_path):
  directory, tracked = shutil.copytree(run[0], tmp_path / "snapshots"), run[1]
  (directory / "400" / "profile" / "metadata").write_text("{")
  shutil.rmtree(directory / "800" / "average_1")
  with pytest.warns(UserWarning, match="cannot be read") as warned:
    params, at, distance = reconstruct(directory, abstract(), 0.1)
  assert [str(w.message).split(" in ")[0] for w in warned] == ["snapshot 400", "snapshot 800"]
  assert at == 760
  np.testing.assert_allclose(params["w"], tracked[760][1]["w"], rtol=1e-6)


def test_snapshots_are_kept_and_not_made_twice(run):
  directory = run[0]
  assert stored(directory) == [(step, LENGTHS) for step in range(40, 801, 40)]
  before = [path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()]
  state = init_state({"w": jnp.ones((2, 3))}, optax.sgd(0.0), jax.random.key(0), ema_lengths=LENGTHS)
  with Snapshots(directory, LENGTHS) as snapshots:
    snapshots.save(state._replace(step=jnp.int32(40)))
  assert [path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()] == before


def test_wrong_snapshots_are_named(run, tmp_path):
  with pytest.raises(ValueError, match="snapshots' holds no snapshot"):
    reconstruct(tmp_path / "snapshots", abstract(), 0.1)
  with pytest.raises(ValueError, match=r"another model: \['w'\] was \[2, 3\], now \[4\]"):
    reconstruct(run[0], {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}, 0.1)
  with pytest.raises(ValueError, match="lengths: is empty"):
    Snapshots(tmp_path, ())
  state = init_state({"w": jnp.ones(())}, optax.sgd(0.0), jax.random.key(0))
  with Snapshots(tmp_path, LENGTHS) as snapshots, pytest.raises(ValueError, match="0 averages for the lengths"):
    snapshots.save(state)


def test_train_step_keeps_several_lengths():
  optimizer = optax.sgd(0.3)
  objective = lambda params, keys, batch: ((params["w"] - batch["x"]) ** 2, {})
  step = jax.jit(make_train_step(objective, optimizer, 0.9, 4, ema_lengths=LENGTHS))
  state = init_state({"w": jnp.float32(2.0)}, optimizer, jax.random.key(0), ema_lengths=LENGTHS)
  values = []
  for i in range(6):
    state, _ = step(state, {"x": jnp.full(4, float(i))}, jnp.arange(4, dtype=jnp.int32))
    values.append(float(state.params["w"]))
  for average, length in zip(state.averages, LENGTHS, strict=True):
    want = np.diff((np.arange(7) / 6) ** (ema.exponent(length) + 1)) @ np.array(values)
    np.testing.assert_allclose(average["w"], want, rtol=1e-5)
  with pytest.raises(ValueError, match="has 0 averages"):
    step(init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0)), {"x": jnp.ones(4)}, jnp.arange(4))
