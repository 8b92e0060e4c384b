"""What a train step costs and what that makes of the hardware: FLOPs, their share of the peak, memory.

FLOPs are those of XLA's cost analysis of the lowered program, before it is split over the devices; activations that
are computed anew count, so for the model's share of the peak count a step without rematerialization. The peak is the
dense bfloat16 rate that the makers state.
"""

from collections.abc import Callable
from typing import Any

import jax

_PEAK_TERAFLOPS = {  # by the beginning of device_kind, the first that fits
  "NVIDIA V100": 125.0,
  "Tesla V100": 125.0,
  "NVIDIA A100": 312.0,
  "NVIDIA H100 PCIe": 756.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5e": 197.0,
  "TPU v5p": 459.0,
  "TPU v5": 459.0,
  "TPU v6": 918.0,
}


def step_flops(train_step: Callable[..., Any], *arguments: Any) -> float | None:
  """FLOPs of one call of a pure function of (abstract) arrays; None where the compiler does not say.

  A loop's body counts once, whatever its trip count.

  Example:
    >>> import jax.numpy as jnp
    >>> step_flops(lambda a, b: a @ b, jnp.ones((4, 8)), jnp.ones((8, 16)))
    1024.0
  """
  analysis: Any = jax.jit(train_step).lower(*arguments).cost_analysis()
  return None if not analysis or not analysis.get("flops") else float(analysis["flops"])


def rates(flops: float | None) -> Callable[[float], dict[str, float]]:
  """From steps per second to "teraflops_per_second" of all devices together, "model_flops_utilization" where the peak
  of the device is known, and "device_memory_gib", the most that this process's first device has held, where it says so.
  """
  device = jax.local_devices()[0]
  peak = next((rate for kind, rate in _PEAK_TERAFLOPS.items() if device.device_kind.startswith(kind)), None)

  def values(steps_per_second: float) -> dict[str, float]:
    record = {}
    if flops is not None:
      record["teraflops_per_second"] = flops * steps_per_second / 1e12
    if flops is not None and peak is not None:
      record["model_flops_utilization"] = record["teraflops_per_second"] / (peak * jax.device_count())
    if (statistics := device.memory_stats()) is not None and "peak_bytes_in_use" in statistics:
      record["device_memory_gib"] = statistics["peak_bytes_in_use"] / 2**30
    return record

  return values
