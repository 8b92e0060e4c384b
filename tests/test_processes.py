"""Two processes of two devices each, on the loopback, do what one process of four does; and how processes find each
other, stop together and end when one dies.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jaxdiff.parallel import gather_json, join

ROOT = str(pathlib.Path(__file__).parents[1])
START = """
import json, os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
from jaxdiff import parallel
parallel.join(timeout=60)
"""
WORK = (
  START
  + """
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

BATCH, STEPS = 16, 4
rows = np.arange(BATCH, dtype=np.int32).reshape(jax.process_count(), -1)[jax.process_index()]
x = np.random.default_rng(0).normal(size=(STEPS, BATCH, 64)).astype(np.float32)
optimizer = optax.adam(1e-2)
results = {}

def objective(params, keys, batch):
  noise = jax.vmap(lambda key: jax.random.normal(key, (64,)))(keys)
  return jnp.mean((jnp.tanh((batch["x"] + noise) @ params["in"]) @ params["out"] - noise) ** 2, -1), {}

def init():
  k_in, k_out = jax.random.split(jax.random.key(1))
  params = {"in": jax.random.normal(k_in, (64, 64)) / 8, "out": jax.random.normal(k_out, (64, 64)) / 8}
  return init_state(params, optimizer, jax.random.key(0))

def numbers(state):
  whole = jax.jit(lambda params: params, out_shardings=jax.sharding.NamedSharding(
    jax.tree.leaves(state)[0].sharding.mesh, jax.sharding.PartitionSpec()))
  return [np.asarray(leaf.addressable_data(0)).tolist() for leaf in jax.tree.leaves(whole(state.params))]

step = make_train_step(objective, optimizer, 0.9, BATCH)
launchers = {
  "data": parallel.jit_launcher(parallel.make_mesh(jax.devices())),
  "fsdp": parallel.jit_launcher(parallel.make_mesh(jax.devices(), fsdp=2)),
  "pmap": parallel.pmap_launcher(),
}
for name, launcher in launchers.items():
  step_fn, index = launcher.compile(step), launcher.put(rows)
  state = launcher.create(init)
  for k in range(STEPS):
    batch = launcher.put({"x": x[k, rows]})
    with jax.transfer_guard("disallow"):
      state, metrics = step_fn(state, batch, index)
  where = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  assert jax.tree.map(where, state) == jax.tree.map(where, launcher.abstract(init)), name
  assert len(state.params["in"].sharding.device_set) == 4
  results[name] = numbers(state)
  results[name + " loss"] = float(metrics["loss"])
  several = launcher.compile(step, steps=STEPS)
  state, metrics = several(launcher.create(init), launcher.put({"x": x[:, rows]}, steps=STEPS), index)
  results[name + " several"] = numbers(state)
  if name == "pmap" and jax.process_count() > 1:  # what a checkpoint of all processes takes
    import orbax.checkpoint as ocp
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(sys.argv[2], state)
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(sys.argv[2], launcher.abstract(init))
    assert numbers(restored) == numbers(state)
    step_fn(restored, batch, index)

def draw(params, keys, x):
  return params * x + jax.vmap(jax.random.normal)(keys)

mesh = parallel.make_mesh(jax.devices(), fsdp=2)
keys = jax.jit(lambda: jax.random.split(jax.random.key(0), BATCH), out_shardings=parallel.batch_sharding(mesh))()
points = jax.jit(lambda: jnp.arange(BATCH, dtype=jnp.float32), out_shardings=parallel.batch_sharding(mesh))()
mapped = {"shard": jax.jit(parallel.shard_examples(draw, mesh)), "pmap": parallel.pmap_examples(draw, jax.devices())}
for name, fn in mapped.items():
  out = fn(jnp.float32(2.0), keys, points)
  assert out.shape == (BATCH,) and len(out.sharding.device_set) == 4
  mine = {shard.index[0].start: np.asarray(shard.data).tolist() for shard in out.addressable_shards}
  everything = {int(start): part for one in parallel.gather_json(mine) for start, part in one.items()}
  results["examples " + name] = [everything[start] for start in sorted(everything)]

results["gathered"] = parallel.gather_json({"process": jax.process_index(), "text": "ü" * (1 + jax.process_index())})
if jax.process_count() > 1:
  try:
    launchers["data"].put(np.zeros(7))
  except ValueError as error:
    results["error"] = str(error)
  for number in range(10_000):
    state, _ = step_fn(state, batch, index)
    jax.block_until_ready(state)
    time.sleep(0.01 * (1 + jax.process_index()))
    if number == 5 and jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    if parallel.preempted(number):
      break
  results["stopped"] = number
with open(sys.argv[1], "w") as file:
  json.dump(results, file)
"""
)


def free_port():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def start(code, *arguments, processes=1, process=0, port=0):
  joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
  environment = {
    **os.environ,
    "PYTHONPATH": ROOT,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(4 // processes),
    **({**joined, "JAX_PROCESS_ID": str(process)} if processes > 1 else {}),
  }
  command = [sys.executable, "-c", code, *map(str, arguments)]
  return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(running, timeout=240):
  try:
    return [process.communicate(timeout=timeout) for process in running]
  finally:
    for process in running:
      process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """Of process 0 and 1 of two, and of one alone."""
  port, folder = free_port(), tmp_path_factory.mktemp("state")
  files = [folder / f"{name}.json" for name in ("first", "second", "alone")]
  running = [start(WORK, files[k], folder / "checkpoint", processes=2, process=k, port=port) for k in (0, 1)]
  running.append(start(WORK, files[2]))
  outputs = finish(running)
  assert [process.returncode for process in running] == [0, 0, 0], outputs
  return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "fsdp", "pmap"])
def test_two_processes_give_the_parameters_of_one(results, layout):
  expected = np.array(results[2]["data"])
  for process in results:
    # Adam divides a gradient near zero by itself: of 8192 parameters some keep more of its rounding.
    for name in (layout, f"{layout} several"):
      assert np.linalg.norm(np.array(process[name]) - expected) < 1e-6 * np.linalg.norm(expected)
    assert process[f"{layout} loss"] == pytest.approx(results[2]["data loss"], rel=1e-6)
  assert results[0][layout] == results[1][layout]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["examples shard", "examples pmap"])
def test_examples_over_all_processes_are_bitwise_equal(results, name):
  expected = results[2]["examples shard"]
  assert np.size(expected) == 16
  assert [process[name] for process in results] == [expected] * 3


@pytest.mark.slow
def test_every_process_gets_the_values_of_all(results):
  expected = [{"process": 0, "text": "ü"}, {"process": 1, "text": "üü"}]
  assert [process["gathered"] for process in results] == [expected, expected, expected[:1]]


def test_a_process_alone_gets_its_own_value():
  assert gather_json((1, None)) == [[1, None]]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(results):
  assert results[0]["stopped"] == results[1]["stopped"] > 5


@pytest.mark.slow
def test_a_wrong_batch_is_named_by_its_global_size(results):
  assert "14 examples cannot be split over 4 devices; the nearest valid batch size is 16" in results[0]["error"]


DIES = (
  START
  + """
from jax.experimental import multihost_utils
for step in range(10_000):
  multihost_utils.process_allgather(np.float32(step))
  if step == 20 and jax.process_index() == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other(victim):
  port, begin = free_port(), time.monotonic()
  running = [start(DIES, victim, processes=2, process=k, port=port) for k in (0, 1)]
  finish(running, timeout=100)
  assert running[victim].returncode == -signal.SIGKILL
  assert running[1 - victim].returncode not in (0, -signal.SIGKILL)
  assert time.monotonic() - begin < 75


@pytest.fixture
def initialized(monkeypatch):
  """The arguments of `jax.distributed.initialize`, which is not called."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append(args))
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  return calls


def joining(*arguments):
  """Runs `join` in a thread, and returns what waits for it and gives its error."""
  errors = []

  def target():
    try:
      join(*arguments)
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=target)
  thread.start()

  def wait():
    thread.join(30)
    assert not thread.is_alive()
    return errors[0] if errors else None

  return wait


def test_processes_meet_before_they_join(initialized):
  address = f"127.0.0.1:{free_port()}"
  late = [joining(address, 3, process, 20) for process in (2, 1)]
  with socket.create_server(("127.0.0.1", 0)):
    time.sleep(0.3)
  assert not initialized
  join(address, 3, 0, 20)
  assert [wait() for wait in late] == [None, None]
  assert sorted(initialized) == [(address, 3, process) for process in range(3)]


def test_strangers_at_the_address_are_ignored(initialized):
  port = free_port()
  first = joining(f"127.0.0.1:{port}", 2, 0, 20)
  time.sleep(0.2)
  with socket.create_connection(("127.0.0.1", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
  join(f"127.0.0.1:{port}", 2, 1, 20)
  assert first() is None
  assert len(initialized) == 2


def test_variables_of_the_environment_are_taken(initialized, monkeypatch):
  address = f"127.0.0.1:{free_port()}"
  values = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
  for name, value in values.items():
    monkeypatch.setenv(name, value)
  join()
  assert initialized == [(address, 1, 0)]
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(ValueError, match="processes: JAX_NUM_PROCESSES='two' is not a whole number"):
    join()


def test_unreachable_coordinator_is_named(initialized):
  address = f"127.0.0.1:{free_port()}"
  with pytest.raises(TimeoutError, match=f"coordinator='{address}': process 0 was not reached in 1 s .*refused"):
    join(address, 2, 1, timeout=1)
  assert not initialized


def test_missing_processes_are_named_to_those_that_came(initialized):
  address = f"127.0.0.1:{free_port()}"
  first, second = joining(address, 3, 0, 2), joining(address, 3, 1, 9)
  for error in (first(), second()):
    assert f"coordinator='{address}': the processes [2] of 3 did not come in time" in str(error)
  assert not initialized


def test_processes_that_disagree_are_named(initialized):
  address = f"127.0.0.1:{free_port()}"
  first, second = joining(address, 2, 0, 9), joining(address, 3, 1, 9)
  for error in (first(), second()):
    assert "process 1 was started as one of 3 processes, process 0 as one of 2" in str(error)
  address = f"127.0.0.1:{free_port()}"
  waits = [joining(address, 3, process, 9) for process in (0, 1, 1)]
  errors = [str(wait()) for wait in waits]
  assert "two processes were started with process=1" in errors[0]
  assert any("two processes were started with process=1" in error for error in errors[1:])
  assert not initialized


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("localhost", 2, 0), "coordinator='localhost': must be host:port"),
    (("localhost:x", 2, 0), "coordinator='localhost:x': must be host:port"),
    (("localhost:1234", 2, 2), "process=2: must be one of 0 to 1, for processes=2"),
  ],
)
def test_wrong_arguments_are_refused(initialized, arguments, message):
  with pytest.raises(ValueError, match=message):
    join(*arguments)


def test_missing_arguments_are_named(monkeypatch, initialized):
  def refuse(*args, **kwargs):
    raise ValueError("Number of processes must be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  with pytest.raises(ValueError, match=r"coordinator='a:1', processes=None.* must be defined. Give all three"):
    join("a:1")
  join()  # nothing known: alone


def test_a_port_that_is_taken_is_named(initialized):
  with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(
      ValueError, match=f"coordinator='{address}': process 0 cannot listen there: .*; take a free port"
    ):
      join(address, 2, 0)
