"""Where convolutions lose time on the CPU, by size and by derivative: XLA, torch (oneDNN) and the product of matrices.

    .venv-parity/bin/python experiments/benchmarks/convolutions.py          # after make parity

3x3 convolutions of stride 1 in float32 on 64 images of 32x32x64, 16x16x128 and 8x8x256, in turns in one process with
the same number of threads. "forward", "input" and "kernel" are the convolution and its gradients. The ways:

  xla               `lax.conv_general_dilated`, channels last, and what JAX makes of it
  xla, nchw         channels first
  shifted           nine products of matrices of the shifted image
  patches           one product with the nine shifted images beside each other
  jaxdiff           `jaxdiff.models.convolution`: the order that XLA is fast for, kernel gradients by bands of rows
  torch, torch last torch with channels first, and last
  product           the product of matrices of as many operations: what XLA reaches without gathering the patches

`--loop`: the same derivatives within a `fori_loop`, where XLA leaves the order of the axes as it is. `--step`: the
whole training step of a plain network of 1.2M parameters at 32x32x3, batch 64, by both; and in a loop of two steps.
`--flags`: the kernel gradient under XLA flags, each in a process of its own.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from overhead import in_turns

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.convolution import convolution

SIZES = ((32, 64), (16, 128), (8, 256))
FLAGS = (
  "",
  "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
  "--xla_cpu_use_onednn=true",
  "--xla_cpu_enable_fast_math=true",
  "--xla_cpu_multi_thread_eigen=false",
  "--xla_cpu_prefer_vector_width=512",
  "--xla_cpu_opt_preset=FAST_RUNTIME",
)
Ways = dict[str, Callable[[jax.Array, jax.Array], jax.Array]]


def plain(order: str, x: jax.Array, w: jax.Array) -> jax.Array:
  kernel = "HWIO" if order == "NHWC" else "OIHW"
  return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=(order, kernel, order))


def shifted_images(x: jax.Array) -> list[jax.Array]:
  _, h, w, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


def shifted(x: jax.Array, w: jax.Array) -> jax.Array:
  return sum(image @ kernel for image, kernel in zip(shifted_images(x), w.reshape(9, *w.shape[2:]), strict=True))


def patches(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.concatenate(shifted_images(x), axis=-1) @ w.reshape(-1, w.shape[3])


WAYS: Ways = {
  "xla": functools.partial(plain, "NHWC"),
  "xla, nchw": functools.partial(plain, "NCHW"),
  "shifted": shifted,
  "patches": patches,
  "jaxdiff": lambda x, w: convolution(x, w, (1, 1), "SAME"),
}


def derivatives(way: Callable[[jax.Array, jax.Array], jax.Array]) -> dict[str, Callable[..., jax.Array]]:
  """Functions of (x, w, g)."""
  return {
    "forward": lambda x, w, g: way(x, w),
    "input": lambda x, w, g: jax.vjp(lambda x: way(x, w), x)[1](g)[0],
    "kernel": lambda x, w, g: jax.vjp(lambda w: way(x, w), w)[1](g)[0],
  }


def arrays(batch: int, size: int, channels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, (batch, size, size, channels)) for key in keys[:2])
  return x, jax.random.normal(keys[2], (3, 3, channels, channels)) / 30, g


def torch_ways(x: jax.Array, w: jax.Array, g: jax.Array) -> dict[str, dict[str, Callable[[], Any]]]:
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  found: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "input": {}, "kernel": {}}
  for name, format in (("torch", torch.contiguous_format), ("torch last", torch.channels_last)):
    turn = lambda a, axes, format=format: torch.from_numpy(np.array(a)).permute(axes).contiguous(memory_format=format)
    x_, w_, g_ = turn(x, (0, 3, 1, 2)), turn(w, (3, 2, 0, 1)), turn(g, (0, 3, 1, 2))
    backward = functools.partial(
      torch.ops.aten.convolution_backward, g_, x_, w_, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    )
    found["forward"][name] = functools.partial(torch.nn.functional.conv2d, x_, w_, padding=1)
    found["input"][name] = functools.partial(backward, [True, False, False])
    found["kernel"][name] = functools.partial(backward, [False, True, False])
  return found


def table(batch: int, turns: int, sizes: tuple[tuple[int, int], ...]) -> None:
  """Print milliseconds (of CPU time) of every derivative at every size, every way."""
  for size, channels in sizes:
    x, w, g = arrays(batch, size, channels)
    columns = torch_ways(x, w, g)
    for name, way in WAYS.items():
      values = (
        (jnp.moveaxis(x, 3, 1), jnp.transpose(w, (3, 2, 0, 1)), jnp.moveaxis(g, 3, 1)) if "nchw" in name else (x, w, g)
      )
      for which, function in derivatives(way).items():
        columns[which][name] = functools.partial(jax.jit(function), *values)
    gathered, flat = jnp.concatenate(shifted_images(x), axis=-1).reshape(-1, 9 * channels), g.reshape(-1, channels)
    columns["forward"]["product"] = functools.partial(jax.jit(jnp.matmul), gathered, w.reshape(-1, channels))
    columns["kernel"]["product"] = functools.partial(jax.jit(lambda a, b: a.T @ b), gathered, flat)
    for which, calls in columns.items():
      times = in_turns(calls, turns)
      cells = [f"{name} {1e3 * np.median(t[:, 0]):.1f} ({1e3 * np.median(t[:, 1]):.1f})" for name, t in times.items()]
      print(f"{size}x{size}x{channels}, {which}: {'; '.join(cells)}", flush=True)


def loop(batch: int, turns: int, sizes: tuple[tuple[int, int], ...]) -> None:
  """Print how many times slower a derivative is within a loop."""
  for size, channels in sizes:
    values = arrays(batch, size, channels)
    for name in ("xla", "jaxdiff"):
      for which, function in derivatives(WAYS[name]).items():
        body = lambda i, a, function=function, values=values: jnp.sum(
          function(values[0] + 1e-9 * a, values[1], values[2] + 1e-9 * a)
        )
        calls = {
          "alone": functools.partial(jax.jit(lambda x, w, g, body=body: body(0, 0.0)), *values),
          "loop": functools.partial(jax.jit(lambda x, w, g, body=body: jax.lax.fori_loop(0, 3, body, 0.0)), *values),
        }
        times = in_turns(calls, turns)
        ratio = np.median(times["loop"] / times["alone"], axis=0) / 3
        print(
          f"{size}x{size}x{channels}, {which}, {name}: in a loop {ratio[0]:.2f} times, CPU {ratio[1]:.2f}", flush=True
        )


class Plain(nn.Module):
  """Nine residual convolutions of 128 channels."""

  conv: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), conv_general_dilated=self.conv)
    h = conv(128)(x)
    for _ in range(8):
      h = h + conv(128)(nn.silu(nn.GroupNorm(32)(h)))
    return conv(x.shape[-1])(nn.silu(h))


def step(batch: int, turns: int, size: int) -> None:
  """Print the time of a training step with both convolutions, alone and in a loop."""
  x, calls = jax.random.normal(jax.random.key(0), (batch, size, size, 3)), {}
  for name, conv in (("xla", jax.lax.conv_general_dilated), ("jaxdiff", convolution)):
    network = Plain(conv)
    params = jax.jit(network.init)(jax.random.key(1), x)
    loss = lambda params, x, network=network: jnp.mean((network.apply(params, x) - x) ** 2)
    update = lambda params, x, loss=loss: jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params, x))
    calls[name] = functools.partial(jax.jit(update), params, x)
    twice = lambda params, x, update=update: jax.lax.fori_loop(0, 2, lambda _, p: update(p, x), params)
    calls[f"{name}, two in a loop"] = functools.partial(jax.jit(twice), params, x)
  print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {batch} x {size}x{size}x3")
  for names in (["xla", "jaxdiff"], ["xla, two in a loop", "jaxdiff, two in a loop"]):
    times = in_turns({name: calls[name] for name in names}, turns)
    ratio = np.median(times[names[0]] / times[names[1]], axis=0)
    seconds = "; ".join(
      f"{name} {np.median(t[:, 0]):.3f} s (CPU {np.median(t[:, 1]):.3f})" for name, t in times.items()
    )
    print(f"{seconds}: {ratio[0]:.2f} times as fast, CPU {ratio[1]:.2f}", flush=True)


def one_kernel_gradient(batch: int, turns: int, sizes: tuple[tuple[int, int], ...]) -> None:
  for size, channels in sizes:
    values, cells = arrays(batch, size, channels), []
    for name in ("xla", "jaxdiff"):
      for which, function in derivatives(WAYS[name]).items():
        seconds = in_turns({"it": functools.partial(jax.jit(function), *values)}, turns)["it"]
        cells.append(f"{name} {which} {1e3 * np.median(seconds[:, 0]):.1f} ({1e3 * np.median(seconds[:, 1]):.1f})")
    print(f"  {size}x{size}x{channels}: {'; '.join(cells)}", flush=True)


def flags(arguments: list[str]) -> None:
  """Run this script once for each of the flags."""
  for flag in FLAGS:
    print(flag or "no flag", flush=True)
    environment = os.environ | {"XLA_FLAGS": flag}
    subprocess.run([sys.executable, __file__, "--one", *arguments], env=environment, check=False)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--tiny", action="store_true", help="small images, to try the script")
  for mode in ("loop", "step", "flags", "one"):
    parser.add_argument(f"--{mode}", action="store_true")
  options = parser.parse_args()
  sizes = ((8, 16), (4, 32)) if options.tiny else SIZES
  if options.flags:
    flags([f"--batch={options.batch}", f"--turns={options.turns}", *(["--tiny"] if options.tiny else [])])
  elif options.one:
    one_kernel_gradient(options.batch, options.turns, sizes)
  elif options.step:
    step(options.batch, options.turns, 8 if options.tiny else 32)
  else:
    print(f"{len(os.sched_getaffinity(0))} cores, jax {jax.__version__}, batch {options.batch}; ms wall (CPU)", end="")
    print(f", median of {options.turns} turns, load {os.getloadavg()[0]:.1f}")
    (loop if options.loop else table)(options.batch, options.turns, sizes)


if __name__ == "__main__":
  main()
