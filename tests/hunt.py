"""Hunts a rare hang: two processes that restore a damaged checkpoint, again and again, under a watchdog.

Two processes restore a copy of a checkpoint, as in `test_storage.py`, which one can read and the other cannot.
A pair that takes too long writes the stacks of all its threads, is killed and counted; its folder stays.

    python tests/hunt.py --runs=200 --parallel=3   # exits with 1 if a pair hung or failed, and names its folder
"""

import argparse
import concurrent.futures
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import test_storage


def pair(what, folder, checkpoints, seconds):
  """Runs two processes that write into `folder`; returns (what became of them, seconds)."""
  folder.mkdir(exist_ok=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  watched = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1)\n"
  code, begin, running = watched + test_storage.STATE + test_storage.PROCESS, time.monotonic(), []
  for k in (0, 1):
    with open(folder / f"process_{k}.log", "w") as log:
      command = [sys.executable, "-c", code, what, str(checkpoints), str(k), str(port)]
      running.append(subprocess.Popen(command, env=test_storage.environment(), stdout=log, stderr=log))
  try:
    for process in running:
      process.wait(max(begin + seconds - time.monotonic(), 0))
    return "failed" if any(process.returncode for process in running) else "clean", time.monotonic() - begin
  except subprocess.TimeoutExpired:
    [process.send_signal(signal.SIGUSR1) for process in running]
    time.sleep(3)  # to write the stacks
    return "hung", time.monotonic() - begin
  finally:
    for process in running:
      process.kill()


def restore(folder, damaged, seconds):
  checkpoints = shutil.copytree(damaged, folder / "checkpoints")
  result, took = pair("restore", folder, checkpoints, seconds)
  if not all("restored 1 1" in path.read_text() for path in folder.glob("*.log")):  # the one before the damage
    result = "failed" if result == "clean" else result
  if result != "clean":
    print(f"{folder}: {result} after {took:.0f} s", flush=True)
  else:
    shutil.rmtree(folder)
  return result, took


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=int, default=200)
  parser.add_argument("--parallel", type=int, default=3, help="pairs at a time")
  parser.add_argument("--seconds", type=float, default=60, help="after which a pair counts as hung")
  args = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="hunt_"))
  result, _ = pair("save", folder / "save", damaged := folder / "checkpoints", args.seconds)
  assert result == "clean", f"to save {result}, see {folder}"
  test_storage.damage(damaged)
  with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
    ended = list(pool.map(lambda run: restore(folder / str(run), damaged, args.seconds), range(args.runs)))
  clean = sum(result == "clean" for result, _ in ended)
  print(f"{clean} of {args.runs} runs were clean; the longest took {max(took for _, took in ended):.1f} s")
  shutil.rmtree(folder if clean == args.runs else damaged)
  sys.exit(clean != args.runs)


if __name__ == "__main__":
  main()
