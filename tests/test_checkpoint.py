"""Checkpoints: exact round trips, damage of every kind, other runs, other device counts, and kill -9."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import warnings
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel import make_mesh, replicate
from jaxdiff.training import (
  CheckpointError,
  Checkpoints,
  FingerprintError,
  abstract_state,
  init_state,
  load_fingerprint,
  load_params,
)
from jaxdiff.training.metrics import read_metrics

# Orbax leaves coroutines behind when it fails on a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FINGERPRINT = {"seed": 0, "data": {"name": "digits", "batch_size": 4}, "shape": (8, 8)}


class Layer(NamedTuple):
  weight: jax.Array
  bias: jax.Array


def make_iterator(seed=0):
  source = grain.MapDataset.source(np.arange(100)).seed(seed).shuffle().repeat(None)
  return iter(source.batch(4, drop_remainder=True).to_iter_dataset())


@functools.cache
def make_state(devices=1, step=0, width=1000):
  """An Adam state with awkward numbers: denormals, both zeros, odd shapes, bfloat16."""
  values = np.random.default_rng(step).normal(size=width) * np.where(np.arange(width) % 7 == 0, 1e-39, 1.0)
  bias, half = np.array([0.0, -0.0, 1 / 3], np.float32), np.full((3, 1), 1 / 3, jnp.bfloat16)
  params = {"layer": Layer(jnp.asarray(values, jnp.float32), jnp.asarray(bias)), "half": jnp.asarray(half)}
  state = init_state(params, optax.adam(1e-3), jax.random.key(123))
  state = state._replace(step=jnp.int32(step), ema_params=jax.tree.map(lambda p: p * 0.5, state.ema_params))
  return replicate(make_mesh(jax.local_devices()[:devices]), state)


def bits(tree):
  unwrap = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(unwrap(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def save_steps(directory, steps=(1, 2), devices=1, fingerprint=FINGERPRINT, **options):
  """Saves one checkpoint a step, each after one more batch; returns the iterator."""
  iterator = make_iterator()
  with Checkpoints(directory, fingerprint, **options) as checkpoints:
    for step in steps:
      next(iterator)
      checkpoints.save(make_state(devices, step), iterator.get_state())
  return iterator


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  save_steps(directory)
  return directory


@pytest.fixture
def saved(saved_once, tmp_path):
  return pathlib.Path(shutil.copytree(saved_once, tmp_path / "saved"))


def restore(directory, devices=1, fingerprint=FINGERPRINT, iterator=None):
  with Checkpoints(directory, fingerprint) as checkpoints:
    return checkpoints.restore_latest(abstract_state(make_state(devices)), iterator or make_iterator())


def array_files(directory, step):
  """The files of the step's array values, largest first."""
  files = [path for path in (directory / str(step) / "state").glob("ocdbt.process_*/d/*") if path.is_file()]
  return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def test_round_trip_is_exact_with_key_and_iterator(tmp_path):
  used = save_steps(tmp_path, steps=(1, 2, 3))
  iterator = make_iterator()
  state = restore(tmp_path, iterator=iterator)
  want = make_state(step=3)
  assert bits(state) == bits(want)
  assert jax.tree.structure(state) == jax.tree.structure(want)
  assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(want)]
  np.testing.assert_array_equal(jax.random.normal(state.key, (3,)), jax.random.normal(want.key, (3,)))
  for _ in range(30):
    np.testing.assert_array_equal(next(iterator), next(used))


def test_saving_is_not_disturbed_by_donation(tmp_path):
  update = jax.jit(lambda s: s._replace(params=jax.tree.map(lambda p: p + 1, s.params)), donate_argnums=0)
  state, iterator = make_state.__wrapped__(step=1, width=300_000), make_iterator()
  want = bits(state)
  with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
    checkpoints.save(state, iterator.get_state())
    for _ in range(5):
      state = update(state)
    next(iterator)
    checkpoints.wait()
    fresh = make_iterator()
    assert bits(checkpoints.restore_latest(abstract_state(state), fresh)) == want
  np.testing.assert_array_equal(next(fresh), next(make_iterator()))


@pytest.mark.usefixtures("eight_devices")
def test_restores_on_another_number_of_devices(saved, tmp_path):
  save_steps(tmp_path / "eight", steps=(2,), devices=8)
  for directory, restored_on in ((saved, 8), (tmp_path / "eight", 1), (tmp_path / "eight", 4)):
    state = restore(directory, devices=restored_on)
    assert bits(state) == bits(make_state(step=2))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {restored_on}


def test_nothing_there_is_none_and_only_the_newest_and_every_nth_are_kept(tmp_path):
  assert restore(tmp_path / "new") is None
  shutil.rmtree(tmp_path / "new")
  save_steps(tmp_path, steps=(2, 3, 4, 5, 6, 7), keep=2, keep_every=3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]
  assert int(restore(tmp_path).step) == 7


def truncate(directory, step):
  """Cuts every array file so short that no array in it survives (several arrays share one)."""
  for file in array_files(directory, step):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 10])


def flip(file, mask):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= mask
  file.write_bytes(data)


def flip_array_byte(directory, step):
  """In the middle of the compressed values: restores without an error in orbax."""
  flip(array_files(directory, step)[0], 0x10)


def flip_metadata_byte(directory, step):
  flip(directory / str(step) / "state" / "manifest.ocdbt", 0xFF)


def delete_array_file(directory, step):
  array_files(directory, step)[0].unlink()


def change_checksums(directory, step):
  file = directory / str(step) / "manifest" / "metadata"
  entries = json.loads(file.read_text())
  del entries["__crc32__"]
  for entry in entries.values():
    entry["checksum"] ^= 1
  file.write_text(json.dumps(entries))


def delete_item(name):
  return lambda directory, step: shutil.rmtree(directory / str(step) / name)


def cut_json(name):
  def cut(directory, step):
    file = next(path for path in (directory / str(step) / name).iterdir() if path.name != "commit_success.txt")
    file.write_text(file.read_text()[:5])

  return cut


def change_json(name, was, now):
  def change(directory, step):
    file = directory / str(step) / name / "metadata"
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, now))

  return change


DAMAGES = {
  "truncated array": truncate,
  "flipped array byte": flip_array_byte,
  "flipped metadata byte": flip_metadata_byte,
  "deleted array": delete_array_file,
  "changed checksums": change_checksums,
  **{f"deleted {name}": delete_item(name) for name in ("state", "data", "fingerprint", "manifest")},
  **{f"cut {name}": cut_json(name) for name in ("data", "fingerprint", "manifest")},
  "changed position": change_json("data", '"next_index": 2', '"next_index": 3'),
  "changed seed": change_json("fingerprint", '"seed": 0', '"seed": 1'),
}


def damaged(saved, damages):
  """The checkpoints of steps 2, 3, ..., each of them that of step 2 with another damage."""
  for step in range(3, 2 + len(damages)):
    shutil.copytree(saved / "2", saved / str(step))
  for step, damage in enumerate(damages, start=2):
    damage(saved, step)
  return range(2, 2 + len(damages))


def test_damaged_newer_ones_are_named_and_the_newest_whole_one_is_restored(saved):
  """Whatever the damage: one that was not seen would be restored in the place of that of step 1."""
  steps = damaged(saved, list(DAMAGES.values()))
  with Checkpoints(saved, FINGERPRINT) as checkpoints:
    iterator = make_iterator()
    with pytest.warns(UserWarning, match="using checkpoint 1") as warned:
      state = checkpoints.restore_latest(abstract_state(make_state()), iterator)
  messages = [str(warning.message) for warning in warned if "cannot be read" in str(warning.message)]
  for name, step, message in zip(DAMAGES, steps, reversed(messages), strict=True):
    assert re.match(rf"checkpoint {step} in .* cannot be read \((?s:.+)\); using checkpoint 1$", message), name
    assert (saved / f"{step}.corrupt").is_dir()
  assert bits(state) == bits(make_state(step=1))
  used = make_iterator()
  next(used)
  np.testing.assert_array_equal(next(iterator), next(used))


def test_a_run_that_fell_back_saves_the_damaged_step_again(saved):
  delete_item("manifest")(saved, 2)
  with Checkpoints(saved, FINGERPRINT) as checkpoints:
    iterator = make_iterator()
    with pytest.warns(UserWarning, match="checkpoint 2 .* using checkpoint 1"):
      checkpoints.restore_latest(abstract_state(make_state()), iterator)
    checkpoints.save(make_state(step=2), iterator.get_state())
    assert checkpoints.latest_step() == 2
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    assert bits(restore(saved)) == bits(make_state(step=2))


def test_all_damaged_raises_and_moves_nothing(saved):
  truncate(saved, 1)
  flip_metadata_byte(saved, 2)
  with pytest.raises(CheckpointError, match=r"(?s)none of the checkpoints.*checkpoint 2: .*checkpoint 1: "):
    restore(saved)
  assert (saved / "1").is_dir()
  assert (saved / "2").is_dir()
  with pytest.raises(CheckpointError, match=r"(?s)checkpoint 2: .*checkpoint 1: "):
    load_params(saved, abstract_state(make_state().params))


def test_another_run_is_refused_by_name_and_not_fallen_through(tmp_path):
  other = {**FINGERPRINT, "seed": 1, "data": {"name": "toys", "batch_size": 8}, "ema": 0.9}
  save_steps(tmp_path, steps=(1,), fingerprint=other)
  save_steps(tmp_path, steps=(2,))
  texts = [r"data\.batch_size was 4, now 8", r"data\.name was 'digits', now 'toys'", r"ema was 'absent', now 0\.9"]
  message = f"checkpoint 2 .*another run: {', '.join(texts)}, seed was 0, now 1; restore"
  with pytest.raises(FingerprintError, match=message):
    restore(tmp_path, fingerprint=other)


def test_another_model_is_refused_by_name(saved):
  other = abstract_state(make_state(width=999))
  with Checkpoints(saved, FINGERPRINT) as checkpoints, pytest.raises(FingerprintError, match=r"1000\], now \[999\]"):
    checkpoints.restore_latest(other, make_iterator())


def test_an_unfinished_save_is_ignored(saved):
  (saved / "2").rename(saved / "2.orbax-checkpoint-tmp")
  assert int(restore(saved).step) == 1


@pytest.mark.usefixtures("eight_devices")
def test_load_params_reads_average_or_last_iterate(tmp_path):
  save_steps(tmp_path, devices=8)
  state = make_state(step=2)
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_state().params))
  params, step = load_params(tmp_path, shapes)
  assert (step, bits(params)) == (2, bits(state.ema_params))
  assert jax.tree.structure(params) == jax.tree.structure(state.params)
  params, _ = load_params(tmp_path, shapes, ema=False)
  assert bits(params) == bits(state.params)
  everywhere = abstract_state(replicate(make_mesh(), state.params))
  params, _ = load_params(tmp_path, everywhere)
  assert len(params["half"].sharding.device_set) == jax.local_device_count()


def test_load_params_falls_back_and_changes_nothing(saved):
  steps = damaged(saved, [truncate, change_checksums, delete_item("manifest"), delete_item("state")])
  with pytest.warns(UserWarning, match="checkpoint 2 .* using checkpoint 1") as warned:
    params, step = load_params(saved, abstract_state(make_state().params))
  assert sum("cannot be read" in str(warning.message) for warning in warned) == len(steps)
  assert (step, bits(params)) == (1, bits(make_state(step=1).ema_params))
  assert all((saved / str(step)).is_dir() for step in steps)


def test_load_fingerprint_reads_what_was_saved(saved, tmp_path):
  assert load_fingerprint(saved) == {**FINGERPRINT, "shape": [8, 8]}
  (saved / "2" / "fingerprint" / "metadata").write_text("{")
  assert load_fingerprint(saved) == {**FINGERPRINT, "shape": [8, 8]}
  with pytest.raises(ValueError, match="holds no checkpoint"):
    load_fingerprint(tmp_path / "none")


def test_load_params_refuses_other_models_and_empty_directories(saved):
  with pytest.raises(ValueError, match=r"none' holds no checkpoint"):
    load_params(saved / "none", {})
  shapes = abstract_state(make_state().params)
  with pytest.raises(ValueError, match=r"another model: \['half'\] was \[3, 1\], now 'absent'"):
    load_params(saved, {"layer": shapes["layer"]})
  with pytest.raises(ValueError, match=r"another model: \['half'\] was \[3, 1\], now \[1000\]"):
    load_params(saved, {**shapes, "half": shapes["layer"].weight})


def test_wrong_arguments(tmp_path):
  for name in ("keep", "keep_every"):
    with pytest.raises(ValueError, match=f"{name}=0"):
      Checkpoints(tmp_path, {}, **{name: 0})
  with pytest.raises(TypeError):
    Checkpoints(tmp_path, {"rate": jnp.ones})


RUN = """
import os, signal, sys
import grain, jax, jax.numpy as jnp, numpy as np
from jaxdiff import parallel
from jaxdiff.training import Checkpoints, abstract_state, init_state, make_optimizer, make_train_step, train
from jaxdiff.training.metrics import MetricsWriter

workdir, kill_at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
source = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)

def objective(params, keys, batch):
  noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
  out = jnp.tanh((batch["x"] + batch["u"][:, None] * noise) @ params["in"]) @ params["out"]
  return jnp.mean((out - noise) ** 2, -1), {}

launcher = parallel.jit_launcher(parallel.make_mesh())
optimizer = make_optimizer(1e-2, 5, 24)
step = launcher.compile(make_train_step(objective, optimizer, 0.99, 8))
params = {"in": jnp.ones((3, 8)) / 3, "out": jnp.ones((8, 3)) / 8}
state = launcher.create(lambda: init_state(params, optimizer, jax.random.key(0)))
data = grain.MapDataset.source(source).seed(0).shuffle().repeat(None)
data = data.random_map(lambda x, rng: {"x": x + rng.normal(size=3).astype(np.float32)})
iterator = iter(data.batch(8, drop_remainder=True).to_iter_dataset())

def kill():
  os.kill(os.getpid(), signal.SIGKILL)

done = 0
def killing_step(*arguments):
  global done
  done += 1
  if where == "step" and done == kill_at:
    kill()
  return step(*arguments)

with Checkpoints(workdir + "/checkpoints", {"seed": 0}, keep=2) as checkpoints:
  if where == "save":
    save = checkpoints.save
    checkpoints.save = lambda state, iterator: (save(state, iterator), int(state.step) == kill_at and kill())
  state = checkpoints.restore_latest(abstract_state(state), iterator) or state
  print("start", int(state.step))
  with MetricsWriter(workdir, int(state.step)) as writer:
    state = train(state, killing_step, iterator, launcher=launcher, global_batch=8, total_steps=24, log_every=3,
                  writer=writer, checkpoints=checkpoints, checkpoint_every=6)
leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
np.savez(workdir + "/final.npz", *[np.asarray(x) for x in leaves])
"""


def run_script(workdir, kill_at=0, where="never"):
  workdir.mkdir(exist_ok=True)
  (workdir / "run.py").write_text(RUN)
  root = str(pathlib.Path(__file__).parents[1])
  environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
  command = [sys.executable, str(workdir / "run.py"), str(workdir), str(kill_at), where]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "whole"
  result = run_script(workdir)
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kill_at", "where", "possible_starts"),
  [(int(np.random.default_rng().integers(8, 24)), "step", (0, 6, 12, 18)), (12, "save", (6, 12))],
  ids=["random step", "while saving"],
)
def test_killed_and_continued_equals_uninterrupted(tmp_path, uninterrupted, kill_at, where, possible_starts):
  killed = run_script(tmp_path / "run", kill_at, where)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  continued = run_script(tmp_path / "run")
  assert continued.returncode == 0, continued.stderr
  start = int(continued.stdout.split()[1])
  # Saving is asynchronous: the checkpoint being written at the kill may be lost, not the one before.
  assert start in possible_starts
  assert start <= kill_at
  with np.load(uninterrupted / "final.npz") as want, np.load(tmp_path / "run" / "final.npz") as got:
    for name in want:
      np.testing.assert_array_equal(got[name], want[name], err_msg=f"killed at {kill_at}, continued from {start}")
  want, got = (read_metrics(path / "metrics.jsonl") for path in (uninterrupted, tmp_path / "run"))
  assert [record["step"] for record in got] == list(range(3, 25, 3))
  assert [record["loss"] for record in got] == [record["loss"] for record in want]
