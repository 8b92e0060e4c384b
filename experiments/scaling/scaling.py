"""Step time and memory of a device, for 1 to 1024 devices, from what the compiler counted (measurements.jsonl).

    python experiments/scaling/scaling.py

prints the tables of README.md and draws scaling.png. `measure.py` makes the measurements.

Every count of a step, c, is linear in the depth of the network, so c(depth) = c(1) + (depth - 1) (c(2) - c(1)).
Time: compute = FLOPs / (u peak), memory = bytes / bandwidth, network = sum over collectives of ring bytes / (u link),
with one utilization u. With perfect overlap a step takes the longest of the three, without any the longer of the first
two, and the third.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parent))
from collectives import Collective, ring_bytes

HERE = Path(__file__).parent
DEVICES = (1, 8, 64, 256, 1024)
DEPTH = {"unet": 3, "dit": 28}
NAMES = {"unet": "ADM-64", "dit": "DiT-XL/2"}
UTILIZATION, FSDP = 0.5, 8


class Hardware(NamedTuple):
  """Peaks of a device: FLOP/s in bfloat16, bytes/s of memory, bytes/s to send within a group of `node`, and beyond."""

  name: str
  flops: float
  memory: float
  near: float
  far: float
  node: int
  capacity: float


H100 = Hardware("H100 SXM", 989e12, 3.35e12, 450e9, 50e9, 8, 80e9)
V5P = Hardware("TPU v5p", 459e12, 2.765e12, 600e9, 600e9, 1024, 95 * 2**30)


class Step(NamedTuple):
  """What one step costs a device."""

  parameters: float
  flops: float
  bytes: float
  state: float
  temporary: float
  moved: tuple[Collective, ...]


def at_depth(shallow: float, deeper: float, depth: int) -> float:
  """What is linear in the depth, from its values at 1 and 2."""
  return shallow + (depth - 1) * (deeper - shallow)


def seconds(hardware: Hardware, collective: Collective) -> float:
  """How long a ring takes; across nodes the devices of a node share an array and each sends its part to its peers."""
  kind, size, group, neighbours = collective
  near, far, node = hardware.near * UTILIZATION, hardware.far * UTILIZATION, hardware.node
  if group <= node and neighbours:
    return ring_bytes(kind, size, group) / near
  if not neighbours:
    return ring_bytes(kind, size, group) / far
  return ring_bytes(kind, size, node) / near + ring_bytes(kind, size / node, group // node) / far


def times(hardware: Hardware, step: Step) -> dict[str, float]:
  """Seconds of a step: of its three parts, with perfect overlap, and with none of the network."""
  compute, memory = step.flops / (UTILIZATION * hardware.flops), step.bytes / hardware.memory
  network = sum(seconds(hardware, collective) for collective in step.moved)
  return {
    "compute": compute,
    "memory": memory,
    "network": network,
    "best": max(compute, memory, network),
    "worst": max(compute, memory) + network,
  }


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
  """The measurements for TPU, the last of each kind, by net, depth, rematerialization, devices and fsdp."""
  names = "net", "depth", "remat", "devices", "fsdp"
  records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return {tuple(r[name] for name in names): r for r in records if r["platform"] == "tpu" and r["width"] is None}


def in_theory(parameters: float, devices: int, fsdp: int) -> tuple[Collective, ...]:
  """Fully sharded data parallelism: weights in bfloat16 gathered for both passes, gradients scattered, then summed."""
  return (
    Collective("all-gather", 4 * parameters, fsdp, True),
    Collective("reduce-scatter", 2 * parameters, fsdp, True),
    Collective("all-reduce", 2 * parameters / fsdp, devices // fsdp, False),
  )


def step_of(found: dict[tuple[Any, ...], dict[str, Any]], net: str, remat: str, devices: int, fsdp: int) -> Step:
  """A step of the full net: of data parallelism from one device, of data x fsdp from as many devices or from 16."""
  pair = lambda *layout: [found[net, depth, remat, *layout] for depth in (1, 2)]
  count = lambda name, records: at_depth(*(record[name] for record in records), DEPTH[net])
  alone = pair(1, 1)
  parameters = count("parameters", alone)
  costs = {name: count(name, alone) for name in ("flops", "bytes", "arguments", "temporary")}
  if fsdp == 1:
    moved = (Collective("all-reduce", 2 * parameters, devices, True),)
    return Step(parameters, *costs.values(), moved)
  source = devices if (net, 2, remat, devices, fsdp) in found else 16
  if (net, 2, remat, source, fsdp) not in found:
    moved = in_theory(parameters, devices, fsdp)
    costs["arguments"] /= fsdp
    return Step(parameters, *costs.values(), moved)
  split = pair(source, fsdp)
  names = split[0]["collectives"].keys() | split[1]["collectives"].keys()
  moved = []
  for name in sorted(names):
    kind, place, group = name.split()
    size = at_depth(*(record["collectives"].get(name, 0) for record in split), DEPTH[net])
    # What is gathered over all devices are activations, which grow with the batch.
    if place == "strided":
      moved.append(Collective(kind, size, devices // fsdp, False))
    elif int(group) == source:
      grows = kind == "all-gather"
      moved.append(Collective(kind, size * (devices / source if grows else 1), devices, True))
    else:
      moved.append(Collective(kind, size, int(group), True))
  return Step(parameters, *(count(name, split) for name in costs), tuple(moved))


def layouts(devices: int) -> list[int]:
  """The sizes of "fsdp" to compare: 1, and `FSDP` where there are so many devices (and as measured on 16)."""
  return [1, FSDP] if devices >= FSDP else [1]


def table(found: dict[tuple[Any, ...], dict[str, Any]]) -> list[str]:
  """A line for every net, rematerialization, layout and number of devices."""
  lines = [
    "| net | remat | devices | data x fsdp | TFLOP | GB read and written | sent, MB | state, GiB | temporary, GiB "
    "| H100: step, ms | v5p: step, ms |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for net, remat, devices in ((n, r, d) for n in DEPTH for r in ("none", "full") for d in DEVICES):
    for fsdp in layouts(devices):
      step = step_of(found, net, remat, devices, fsdp)
      sent = sum(ring_bytes(c.kind, c.size, c.group) for c in step.moved)
      spans = []
      for hardware in (H100, V5P):
        t = times(hardware, step)
        spans.append(f"{1e3 * t['best']:.1f} - {1e3 * t['worst']:.1f}")
      lines.append(
        f"| {NAMES[net]} | {remat} | {devices} | {devices // fsdp} x {fsdp} | {step.flops / 1e12:.2f} "
        f"| {step.bytes / 1e9:.1f} | {sent / 1e6:.0f} | {step.state / 2**30:.2f} | {step.temporary / 2**30:.2f} "
        f"| {spans[0]} | {spans[1]} |"
      )
  return lines


def draw(found: dict[tuple[Any, ...], dict[str, Any]], path: Path) -> None:
  """Step time (from all overlap to none) and memory of a device against the number of devices, a column a net."""
  figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
  styles = {(H100, 1): ("C0", "-"), (H100, FSDP): ("C0", "--"), (V5P, 1): ("C1", "-"), (V5P, FSDP): ("C1", "--")}
  for column, net in zip(axes.T, DEPTH, strict=True):
    for (hardware, fsdp), (color, line) in styles.items():
      counts = [n for n in DEVICES if n >= fsdp]
      spans = [times(hardware, step_of(found, net, "none", n, fsdp)) for n in counts]
      low, high = ([1e3 * t[name] for t in spans] for name in ("best", "worst"))
      column[0].fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
      column[0].plot(counts, high, line, color=color, marker="o", markersize=3, label=f"{hardware.name}, fsdp={fsdp}")
    for remat, color in (("none", "C2"), ("full", "C3")):
      for fsdp, line in ((1, "-"), (FSDP, "--")):
        counts = [n for n in DEVICES if n >= fsdp]
        steps = [step_of(found, net, remat, n, fsdp) for n in counts]
        memory = [(step.state + step.temporary) / 2**30 for step in steps]
        column[1].plot(counts, memory, line, color=color, marker="o", markersize=3, label=f"remat={remat}, fsdp={fsdp}")
    parameters = step_of(found, net, "none", 1, 1).parameters
    column[0].set_title(f"{NAMES[net]}: {parameters / 1e6:.0f} M parameters, 8 examples a device", fontsize=10)
    column[1].set(xlabel="devices", xscale="log", xticks=DEVICES, xticklabels=DEVICES)
    column[1].minorticks_off()
    for axis in column:
      axis.set_ylim(bottom=0)
      axis.grid(alpha=0.3)
      axis.legend(fontsize=7)
  axes[0, 0].set_ylabel("step, ms (line: no overlap;\nshade: down to perfect overlap)")
  axes[1, 0].set_ylabel("memory of a device, GiB")
  figure.savefig(path, dpi=120)


def main() -> None:
  found = read(HERE / "measurements.jsonl")
  print("\n".join(table(found)))
  draw(found, HERE / "scaling.png")


if __name__ == "__main__":
  main()
