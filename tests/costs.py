"""A pytest plugin that prints where the CPU time goes: `make test TEST_FLAGS=--costs=20`, one row per file.

CPU time is user + system of the process and of the children it waited for. Tracing, lowering and compiling are JAX's
own wall-clock durations; a nested `jit` is counted within its caller too, so the three columns are upper bounds.
"""

import collections
import os
import time

import jax
import pytest

EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}
COLUMNS = ["cpu", "trace", "lower", "compile", "programs", "tests"]
spent: collections.Counter = collections.Counter()  # in this process since it began
reported: collections.Counter = collections.Counter()  # the part of it that reports already hold
rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)  # by file, in the main process
slowest: collections.Counter = collections.Counter()  # CPU time by test


def _record(event: str, duration: float, **_) -> None:
  if event in EVENTS:
    spent[EVENTS[event]] += duration
    spent["programs"] += EVENTS[event] == "compile"


jax.monitoring.register_event_duration_secs_listener(_record)


def _cpu() -> float:
  children = os.times()
  return time.process_time() + children.children_user + children.children_system


def pytest_addoption(parser):
  parser.addoption("--costs", type=int, metavar="N", help="print the CPU time by file, and of the N dearest tests")


def pytest_collection_finish(session):
  spent["cpu"] = _cpu()
  reported.update(spent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Charge a test with what was spent since the report before: its phase, and the pauses around it."""
  report = yield
  spent["cpu"] = _cpu()
  cost = {name: spent[name] - reported[name] for name in spent} | {"tests": int(call.when == "call")}
  reported.update(cost)
  report.user_properties = [*report.user_properties, ("cost", cost)]
  return report


def pytest_runtest_logreport(report):
  for name, cost in report.user_properties:
    if name == "cost":
      rows[report.nodeid.split("::")[0]].update(cost)
      slowest[report.nodeid] += cost["cpu"]


def pytest_terminal_summary(terminalreporter, config):
  if config.getoption("--costs") is None:
    return
  write = terminalreporter.write_line
  write("")
  write("".join(f"{name:>10}" for name in COLUMNS) + "  file (seconds)")
  for file, row in sorted(
    [*rows.items(), ("all", sum(rows.values(), collections.Counter()))], key=lambda r: -r[1]["cpu"]
  ):
    write("".join(f"{row[name]:10.{0 if name in ('programs', 'tests') else 1}f}" for name in COLUMNS) + f"  {file}")
  for test, cpu in slowest.most_common(config.getoption("--costs")):
    write(f"{cpu:10.1f}  {test}")
