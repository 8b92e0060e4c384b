"""What can happen to a training, and that it ends at the same bits all the same: the fault table of the README.

Every test runs the command line in processes of its own. Those of two processes use the loopback.
"""

import functools
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdiff import cli, factory, rundir
from jaxdiff.training import load_params
from jaxdiff.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY, KILLS = 120, 5, 20
TINY = [
  f"--config={ROOT / 'configs' / 'toy2d.py'}",
  "--config.network.width=128",
  "--config.network.depth=1",
  "--config.data.size=400",
  "--config.train.batch_size=64",
  f"--config.train.steps={STEPS}",
  "--config.train.log_every=1",
  f"--config.train.checkpoint_every={EVERY}",
  "--config.train.ema_lengths=(0.1,)",
  "--config.train.snapshot_every=40",
  "--config.optimizer.warmup_steps=5",
]
DONE, FAILED, MISTAKE, TERMINATED = 0, 1, 2, 143


def start(workdir, *arguments, devices=1, largest_file=None, command="train", config=TINY):
  """A command in a process of its own, with a limit on the bytes of a file."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  argv = [sys.executable, "-m", "jaxdiff.cli", command, f"--workdir={workdir}", *config, *arguments]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
  process = subprocess.Popen(argv, cwd=ROOT, env=environment, text=True, **quiet)
  if largest_file is not None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
  return process


def finish(*processes, timeout=240):
  """Their exit codes and what they said."""
  try:
    said = [process.communicate(timeout=timeout)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], said


def pair(workdir, *arguments, devices=2, second=(), **options):
  """Two processes of one training on the loopback; the second one is given `second` besides."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  joined = [f"--coordinator={address}", "--processes=2"]
  own = ("--process=0",), ("--process=1", *second)
  return [start(workdir, *joined, *more, *arguments, devices=devices, **options) for more in own]


def steps_of(workdir):
  path = workdir / "metrics.jsonl"
  return [record["step"] for record in read_metrics(path)] if path.exists() else []


def wait_for(condition, seconds=240):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it did not come to that"
    time.sleep(0.002)


def params_of(workdir):
  config = factory.read(workdir / "config.json")
  source = factory.make_source(config, "train")
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  return [load_params(workdir / "checkpoints", shapes, ema=ema) for ema in (False, True)]


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(params_of(a)), jax.tree.leaves(params_of(b)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("whole")
  codes, said = finish(start(workdir))
  assert codes == [DONE], said
  return workdir


def kill_at_random(workdir, rng, kills):
  """Kills a training so many times, each at some moment of its next few steps; how many of them hit a checkpoint that
  was being written.
  """
  in_a_write = 0
  for _ in range(kills):
    before, process = len(steps_of(workdir)), start(workdir, "--config.train.checkpoint_every=2")
    wait_for(lambda: len(steps_of(workdir)) != before or process.poll() is not None)
    target = len(steps_of(workdir)) + int(rng.integers(0, STEPS // kills))
    wait_for(lambda: len(steps_of(workdir)) >= target or process.poll() is not None)
    time.sleep(rng.uniform(0.0, 0.03))
    process.send_signal(signal.SIGKILL)
    (code,), said = finish(process)
    assert code == -signal.SIGKILL, said
    in_a_write += bool(list((workdir / "checkpoints").glob("*tmp*")))
  return in_a_write


@pytest.mark.slow
def test_killed_at_random_moments_ends_at_the_same_bits(whole, tmp_path):
  """`make test` has two kills, at a random step and while saving: `test_checkpoint.py`."""
  seed = int.from_bytes(os.urandom(4), "little")
  print("seed", seed)
  in_a_write = kill_at_random(tmp_path, np.random.default_rng(seed), KILLS)
  codes, said = finish(start(tmp_path))
  assert codes == [DONE], said
  assert_same(whole, tmp_path)
  assert steps_of(tmp_path) == list(range(1, STEPS + 1))
  print(f"{in_a_write} of {KILLS} kills hit a write")
  assert in_a_write


@pytest.mark.slow
def test_sigterm_saves_the_step_and_the_run_goes_on_to_the_same_bits(whole, tmp_path):
  process = start(tmp_path)
  wait_for(lambda: len(steps_of(tmp_path)) > 3)
  process.send_signal(signal.SIGTERM)
  (code,), (said,) = finish(process)
  assert code == TERMINATED
  assert f"stopped at step {steps_of(tmp_path)[-1]}, which is saved" in said
  codes, said = finish(start(tmp_path))
  assert codes == [DONE], said
  assert_same(whole, tmp_path)


def test_processes_ask_for_preemption_without_leaving_numbers_out(monkeypatch):
  """JAX says yes at one number alone: the greatest that a process has reached, plus one."""
  monkeypatch.setattr(rundir.parallel, "preempted", lambda count: count == 3)
  stop = rundir.StopSignal()
  assert [stop.agreed(step) for step in (4, 8, 12)] == [False, False, True]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_between_dispatches_of_several_steps(tmp_path):
  """And one process goes on from what they saved."""
  several = ["--config.train.steps=1000000", "--config.train.checkpoint_every=1000000", "--config.train.log_every=20"]
  several += ["--config.train.steps_per_dispatch=4", "--config.train.snapshot_every=1000000"]
  processes = pair(tmp_path, *several)
  wait_for(lambda: steps_of(tmp_path) or processes[0].poll() is not None)
  processes[1].send_signal(signal.SIGTERM)
  codes, said = finish(*processes, timeout=90)
  assert codes == [TERMINATED, TERMINATED], said
  stopped = steps_of(tmp_path)[-1]
  assert f"stopped at step {stopped}, which is saved" in said[0]
  process = start(tmp_path, *several)
  wait_for(lambda: steps_of(tmp_path)[-1] > stopped or process.poll() is not None)
  process.send_signal(signal.SIGKILL)
  (code,), (said,) = finish(process)
  assert code == -signal.SIGKILL, said
  assert f"continuing from step {stopped}" in said


@pytest.fixture(scope="module")
def died(tmp_path_factory):
  """By a launcher: two runs of two processes, of which the second lost one, and their flags."""

  @functools.cache
  def run(launcher):
    folder, flags = tmp_path_factory.mktemp(launcher), [f"--launcher={launcher}", f"--config.train.steps={STEPS // 2}"]
    codes, said = finish(*pair(folder / "whole", *flags))
    assert codes == [DONE, DONE], said
    processes = pair(folder / "killed", *flags)
    wait_for(lambda: len(steps_of(folder / "killed")) > 2 * EVERY)
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    codes, said = finish(*processes)
    assert codes[1] == -signal.SIGKILL, "the training ended before the kill"
    assert codes[0] not in (DONE, -signal.SIGKILL), said
    assert time.monotonic() - begin < 60
    return folder / "whole", folder / "killed", flags

  return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["jit", "pmap"])
def test_a_worker_that_dies_ends_the_other_and_both_go_on_to_the_same_bits(died, tmp_path, launcher):
  whole, killed, flags = died(launcher)
  shutil.copytree(killed, tmp_path / "run")
  codes, said = finish(*pair(tmp_path / "run", *flags))
  assert codes == [DONE, DONE], said
  assert_same(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "devices"), [("jit", 8), ("pmap", 1)])
def test_a_checkpoint_of_two_processes_goes_on_with_one(died, tmp_path, launcher, devices):
  """What two processes of two devices each saved gives the same next losses on 1 x 8 and 1 x 1 devices."""
  whole, killed, flags = died(launcher)
  shutil.copytree(killed, tmp_path / "run")
  codes, (said,) = finish(start(tmp_path / "run", *flags, devices=devices))
  assert codes == [DONE], said
  began = int(re.search(r"continuing from step (\d+)", said)[1])
  assert began >= EVERY
  losses, expected = ([r["loss"] for r in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "run", whole))
  assert len(losses) == len(expected) == STEPS // 2
  np.testing.assert_allclose(losses[: began + 5], expected[: began + 5], rtol=1e-6)


@pytest.mark.slow
def test_processes_with_other_configs_all_name_the_difference(tmp_path):
  codes, said = finish(*pair(tmp_path / "run", second=["--config.seed=5"]))
  assert codes == [MISTAKE, MISTAKE], said
  for text in said:
    assert "the processes were not started alike: config.seed was 0, is 5 on process 1" in text


def test_an_unreachable_coordinator_is_named(tmp_path, capsys):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  joined = [f"--coordinator={address}", "--processes=2", "--process=1", "--timeout=1"]
  with pytest.raises(SystemExit) as stop:
    cli.main(["train", f"--workdir={tmp_path / 'run'}", *TINY, *joined])
  assert stop.value.code == FAILED
  assert address in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_stops_with_a_message_and_the_last_checkpoint_goes_on(whole, tmp_path):
  run = shutil.copytree(whole, tmp_path / "run")
  _, *newer = sorted((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
  for path in newer:
    shutil.rmtree(path)
  seldom = ["--config.train.log_every=40"]  # the metrics fit
  (code,), (said,) = finish(start(run, *seldom, largest_file=100_000))
  assert code == FAILED, said
  assert "failed (the disk is full or a limit is reached: " in said, said
  assert "stays. Free space and start again to continue from there" in said
  assert "Traceback" not in said
  codes, said = finish(start(run, *seldom))
  assert codes == [DONE], said
  assert f"continuing from step {STEPS - 2 * EVERY}" in said[0]
  assert_same(whole, run)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_two_processes_draw_the_samples_of_one(whole, tmp_path):
  flags = ["--num=16", "--config.sample.batch_size=8", "--sampler=dpm_solver_pp", "--steps=4"]
  for name in ("one", "two"):
    shutil.copytree(whole, tmp_path / name)
  codes, said = finish(*pair(tmp_path / "two", *flags, command="sample", config=()))
  assert codes == [DONE] * 2, said
  cli.main(["sample", f"--workdir={tmp_path / 'one'}", *flags])
  one, two = (np.load(tmp_path / name / "samples.npz")["x"] for name in ("one", "two"))
  np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_launch_file_runs_two_processes(tmp_path):
  """experiments/gpu_node/two_processes.sh with fsdp; samples and validation need all processes, too."""
  scripts = pathlib.Path(sys.executable).parent
  environment = {**os.environ, "JAXDIFF": str(scripts / "jaxdiff"), "PYTHON": sys.executable}
  environment |= {"CONFIG": str(ROOT / "configs" / "toy2d.py"), "WORKDIR": str(tmp_path / "run"), "FSDP": "2"}
  command = [
    ROOT / "experiments" / "gpu_node" / "two_processes.sh",
    *TINY[1:],
    "--config.train.steps=20",
    "--config.sample.num=16",
  ]
  command += ["--config.train.validate_every=10", "--config.train.sample_every=10", "--config.sample.batch_size=8"]
  command += ["--config.sampler.type=ddim", "--config.sampler.grid.steps=4"]
  ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240)
  assert ended.returncode == DONE, ended
  assert sorted(set(steps_of(tmp_path / "run"))) == list(range(1, 21))
  assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == ["00000010.png", "00000020.png"]
