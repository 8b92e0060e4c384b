"""Several processes as one program: they find each other, tell each other what they know, and stop together.

Every process runs the same program; process 0 also runs JAX's coordination service, at the address that all are given.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

_HEARTBEAT_S = 30  # of silence, after which a process counts as dead and the others end
_SHUTDOWN_S = 30  # how long a process that ends waits for the others
_REPLY_S = 5


def join(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
  """Makes this process one of several; to be called before anything else of JAX.

  What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and else from what JAX
  itself finds out on TPU pods, under Slurm, Open MPI and on GKE. Where there is nothing of all that, the process stays
  alone. CPU devices of several processes communicate by gloo.

  SIGTERM is then a notice for `preempted` and ends nothing, unless `jax_enable_preemption_service` is switched off
  first or a Python handler is installed afterwards. A process that dies ends the others within a minute.

  Args:
    coordinator: "host:port" of process 0.
    processes: how many there are.
    process: the number of this one, 0 to processes - 1.
    timeout: for how many seconds the processes wait for each other.

  Raises:
    ValueError: an argument is missing or out of range, two processes have the same number or another count, process 0
      cannot listen at the address, or process 0 says that others did not come.
    TimeoutError: process 0 cannot be reached, or (in process 0) others did not come; names the address, or the others.

  Example:
    ```python
    join("10.0.0.1:1234", processes=2, process=int(os.environ["RANK"]))
    ```
  """
  if jax.distributed.is_initialized():
    return
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes = _number("processes", processes, "JAX_NUM_PROCESSES")
  process = _number("process", process, "JAX_PROCESS_ID")
  if coordinator is not None:
    host, port = _address(coordinator)
    if processes is not None and process is not None:
      if not 0 <= process < processes:
        raise ValueError(f"process={process}: must be one of 0 to {processes - 1}, for processes={processes}")
      meet = _gather if process == 0 else _report
      meet(host, port, processes, process, time.monotonic() + timeout)
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=_HEARTBEAT_S,
      shutdown_timeout_seconds=_SHUTDOWN_S,
    )
  except ValueError as error:
    if (coordinator, processes, process) == (None, None, None):
      return
    raise ValueError(
      f"coordinator={coordinator!r}, processes={processes}, process={process}: {error} Give all three, or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; only a cluster fills in the others"
    ) from error


def gather_json(value: Any) -> list[Any]:
  """The values of all processes, in their order; every process has to call it, and gets the same.

  Args:
    value: what JSON can hold.

  Returns:
    One value a process, as JSON gives it back (tuples as lists).

  Example:
    >>> gather_json({"seed": 0})
    [{'seed': 0}]
  """
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  if jax.process_count() == 1:
    return [json.loads(data.tobytes())]
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
  return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def to_host(tree: PyTree) -> PyTree:
  """Host copies, whole on every process: of arrays over several processes, which all of them have to call this for, and
  of a process's own arrays, which concern no other.

  Example:
    >>> to_host({"x": jax.numpy.ones(2)})
    {'x': array([1., 1.], dtype=float32)}
  """
  if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def preempted(count: int) -> bool:
  """Whether to stop now, since a process was sent SIGTERM: all processes answer the same at the same count.

  The answer is True at one count only, which no process has reached when the notice has gone round, about two seconds
  after the signal. So every process has to ask with 1, 2, 3, ... and leave none out, also where it does several steps
  between two questions. A process alone always answers False.

  Args:
    count: number of this question.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(count)


def _number(name: str, value: int | None, variable: str) -> int | None:
  if value is not None or variable not in os.environ:
    return value
  try:
    return int(os.environ[variable])
  except ValueError:
    raise ValueError(f"{name}: {variable}={os.environ[variable]!r} is not a whole number") from None


def _address(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"coordinator={coordinator!r}: must be host:port, such as 10.0.0.1:1234")
  return host.strip("[]"), int(port)


# JAX's client aborts the process when the others do not come. So they first meet without it: process 0 listens at the
# coordinator's address, the others say "process processes" and are let go when all are there.


def _gather(host: str, port: int, processes: int, process: int, deadline: float) -> None:
  try:
    server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
  except OSError as error:
    raise ValueError(
      f"coordinator='{host}:{port}': process 0 cannot listen there: {error}; take a free port"
    ) from error
  there: dict[int, socket.socket] = {}
  try:
    with server:
      while len(there) < processes - 1:
        server.settimeout(max(deadline - time.monotonic(), 1e-3))
        connection = server.accept()[0]
        if (number := _read_report(connection, processes, there)) is not None:
          there[number] = connection
    _reply(there, "")
  except TimeoutError:
    missing = sorted(set(range(1, processes)) - there.keys())
    message = f"the processes {missing} of {processes} did not come in time; start them"
    _reply(there, message)
    raise TimeoutError(f"coordinator='{host}:{port}': {message}") from None
  except ValueError as error:
    _reply(there, str(error))
    raise


def _read_report(connection: socket.socket, processes: int, there: dict[int, socket.socket]) -> int | None:
  """The number of the process at the other end, None if it is none of ours."""
  connection.settimeout(_REPLY_S)
  try:
    words = connection.recv(64).decode("ascii").split()
    number, count = int(words[0]), int(words[1])
  except (OSError, ValueError, IndexError):
    connection.close()
    return None
  wrong = None
  if count != processes:
    wrong = f"process {number} was started as one of {count} processes, process 0 as one of {processes}"
  elif number in there or not 0 < number < processes:
    wrong = f"two processes were started with process={number}"
  if wrong:
    _reply({number: connection}, wrong)
    raise ValueError(wrong)
  return number


def _reply(there: dict[int, socket.socket], message: str) -> None:
  for connection in there.values():
    with connection, contextlib.suppress(OSError):
      connection.sendall(f"{message}\n".encode())


def _report(host: str, port: int, processes: int, process: int, deadline: float) -> None:
  start, last = time.monotonic(), "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall(f"{process} {processes}\n".encode())
        connection.settimeout(max(deadline - time.monotonic(), 0) + _REPLY_S)
        reply = connection.makefile("r").readline()
    except OSError as error:
      last = str(error)
    else:
      if reply == "\n":
        return
      if reply:
        raise ValueError(f"coordinator='{host}:{port}': {reply.strip()}")
    time.sleep(0.1)
  waited = time.monotonic() - start
  raise TimeoutError(
    f"coordinator='{host}:{port}': process 0 was not reached in {waited:.0f} s ({last}); start it, or give its address"
  )
