"""Disks that are full, and checkpoints of two processes."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel import make_mesh
from jaxdiff.training import Checkpoints, abstract_state, init_state
from jaxdiff.training.manifest import _checksums, manifest

STATE = """
import faulthandler, resource, sys, warnings
import jax, jax.numpy as jnp, optax
from jaxdiff.parallel import join
from jaxdiff.training import Checkpoints, SaveError, abstract_state, init_state

def init(step):
  params = {"w": jax.random.normal(jax.random.key(step), (64, 1000)), "b": jnp.arange(3.0) + step}
  state = init_state(params, optax.adam(1e-3), jax.random.key(0), ema_lengths=(0.1,))
  return state._replace(step=jnp.int32(step))
"""

# In each folder of the arguments FOLDER LIMIT WHEN, twice: a checkpoint, and one that the limit does not let through.
FULL = """
def attempt(folder, limit, when):
  try:
    with Checkpoints(folder, {"seed": 0}) as checkpoints:
      checkpoints.save(init(1), {"next_index": 1})
      checkpoints.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
      try:
        checkpoints.save(init(2), {"next_index": 2})
        if when == "wait":
          checkpoints.wait()
      except SaveError as error:
        print(error)
  except SaveError as error:
    print(error)
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

attempt(sys.argv[1], int(sys.argv[2]), sys.argv[3])
attempt(sys.argv[4], int(sys.argv[5]), sys.argv[6])
"""

# Both processes save two checkpoints, of which each holds half, or restore the newest.
PROCESS = """
what, folder, process, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
faulthandler.dump_traceback_later(80, exit=True)
jax.config.update("jax_num_cpu_devices", 2)
join(f"127.0.0.1:{port}", 2, process, timeout=60)  # one that fails ends the other
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("fsdp",), ()))
shardings = jax.tree.map(lambda x: split if x.shape == (64, 1000) else whole, jax.eval_shape(lambda: init(0)))
create = jax.jit(init, out_shardings=shardings, static_argnums=0)

class Position:
  def set_state(self, state):
    self.state = state

with Checkpoints(folder, {"seed": 0}) as checkpoints:
  if what == "save":
    for step in (1, 2):
      checkpoints.save(create(step), {"next_index": step})
  else:
    position = Position()
    with warnings.catch_warnings(record=True) as warned:
      warnings.simplefilter("always")
      state = checkpoints.restore_latest(abstract_state(create(0)), position)
    want = create(int(state.step))
    equal = jax.jit(lambda a, b: jnp.all(a == b))
    assert all(equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True))
    assert state.params["w"].sharding == split
    messages = [str(w.message) for w in warned if "cannot be read" in str(w.message)]
    print("restored", int(state.step), position.state["next_index"], messages)
"""


def environment():
  root = str(pathlib.Path(__file__).parents[1])
  return {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def init(step):
  """As in the scripts."""
  params = {"w": jax.random.normal(jax.random.key(step), (64, 1000)), "b": jnp.arange(3.0) + step}
  state = init_state(params, optax.adam(1e-3), jax.random.key(0), ema_lengths=(0.1,))
  return state._replace(step=jnp.int32(step))


class Position:
  state: dict

  def set_state(self, state):
    self.state = state


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(bool(jnp.all(x == y)) for x, y in pairs)


def test_full_disk_stops_with_one_message_and_keeps_the_last_good(tmp_path):
  """Where nothing fits, told by `wait`, and where the arrays do not, told on leaving the context."""
  folders = [tmp_path / "nothing", tmp_path / "arrays"]
  command = [sys.executable, "-c", STATE + FULL, str(folders[0]), "100", "wait", str(folders[1]), "50000", "leave"]
  result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
  assert result.returncode == 0, result.stderr
  for folder, message in zip(folders, result.stdout.splitlines(), strict=True):
    assert message == (
      f"writing to {folder} failed (the disk is full or a limit is reached: File too large); the last complete one is "
      "of step 1 and stays. Free space and start again to continue from there"
    )
    assert (folder / "2.orbax-checkpoint-tmp").exists()
    position = Position()
    with Checkpoints(folder, {"seed": 0}) as checkpoints:
      assert same(checkpoints.restore_latest(abstract_state(init(0)), position), init(1))
      assert position.state == {"next_index": 1}
      checkpoints.save(init(2), {"next_index": 2})
      assert checkpoints.latest_step() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def two_processes(*arguments):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  running = [
    subprocess.Popen(
      [sys.executable, "-c", STATE + PROCESS, *map(str, arguments), str(i), str(port)],
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    ended = [process.communicate(timeout=100) for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [0, 0], "\n".join(errors for _, errors in ended)
  return [[line for line in out.splitlines() if line.startswith("restored")] for out, _ in ended]


def damage(folder):
  """Cuts off what process 1 reads of the newest checkpoint."""
  for file in (folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
    file.write_bytes(file.read_bytes()[:1000])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two") / "checkpoints"
  two_processes("save", folder)
  return folder


@pytest.mark.slow
def test_two_processes_agree_on_what_they_restore(of_two, tmp_path):
  """Process 1 alone reads the damaged file; neither of the two waits for the other."""
  whole = shutil.copytree(of_two, tmp_path / "whole")
  assert two_processes("restore", whole) == [["restored 2 2 []"]] * 2
  folder = shutil.copytree(of_two, tmp_path / "damaged")
  damage(folder)
  (first,), (second,) = two_processes("restore", folder)
  assert (
    first == f"restored 1 1 ['checkpoint 2 in {folder} cannot be read (process 1 cannot read it); using checkpoint 1']"
  )
  assert second.startswith(f'restored 1 1 ["checkpoint 2 in {folder} cannot be read (Exception: Encountered error')
  assert (folder / "2.corrupt").is_dir()
  assert not (folder / "2").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("devices", [1, 8])
def test_one_process_restores_what_two_saved(of_two, devices):
  mesh, position = make_mesh(jax.local_devices()[:devices]), Position()
  split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))
  shardings = jax.tree.map(lambda x: split if x.shape == (64, 1000) else whole, jax.eval_shape(lambda: init(0)))
  with Checkpoints(of_two, {"seed": 0}) as checkpoints:
    state = checkpoints.restore_latest(abstract_state(jax.device_put(init(0), shardings)), position)
  assert same(state, init(2))
  assert position.state == {"next_index": 2}
  assert len(state.params["w"].sharding.device_set) == devices


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")])
def test_checksums_of_split_arrays_are_those_of_whole_ones_and_gather_nothing(spec):
  x = jax.random.normal(jax.random.key(0), (16, 24, 8))
  mesh = make_mesh()
  split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
  assert manifest({"x": split}) == manifest({"x": x})
  words = np.asarray(x).view(np.uint32).ravel()
  want = int(np.sum((2 * np.arange(words.size, dtype=np.uint64) + 1) * words) % 2**32)
  assert manifest({"x": split})["['x']"]["checksum"] == want
  program = _checksums.lower([split]).compile().as_text()
  assert "all-reduce" in program
  assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool", "int32"])
def test_checksum_is_the_documented_sum_and_sees_one_bit(dtype):
  values = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(jnp.dtype(dtype))
  raw = values.view(f"u{values.dtype.itemsize}").ravel()
  want = sum((2 * j + 1) * int(word) for j, word in enumerate(raw)) % 2**32
  checksum = lambda x: manifest({"x": jnp.asarray(x)})["['x']"]["checksum"]
  assert checksum(values) == want
  changed = values.copy()
  changed.view(np.uint8).ravel()[-1] ^= 1
  assert checksum(changed) != want
