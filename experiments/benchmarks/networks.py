"""What the networks cost: against torch on the CPU, to lower and compile, and of the peak of a GPU.

    .venv-parity/bin/python experiments/benchmarks/networks.py torch        # after make parity; --tiny to try it
    python experiments/benchmarks/networks.py compile
    python experiments/benchmarks/networks.py accelerator --batch=64        # on a GPU

`torch`: forward pass and training step (squared error, SGD) of the DDPM network of CIFAR-10, 35.7M parameters, 16
images of 32x32x3, in float32, beside UNet2DModel of diffusers with the same weights, as loaded by `jaxdiff.weights`,
in both memory formats of torch. Values must agree before times are compared. All run in turns in one process with the
same number of threads; a ratio is the median over the turns, with its quartiles. --profile adds which operations the
step spends its time in.

`compile`: seconds to lower and to compile the training step of ADM for ImageNet 64x64 (lowered only, unless --all) and
of DiT-B/2, its blocks written out and as a loop.

`accelerator`: the training step of ADM-64 and DiT-B/2 in bfloat16 (Adam, float32 parameters): examples per second, and
its floating point operations by XLA's count before optimization over those of a large product of matrices in the same
type ("MFU", without what rematerialization repeats).
"""

import argparse
import collections
import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from overhead import in_turns

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.models import presets
from jaxdiff.models.conditioning import Label
from jaxdiff.models.dit import DiT, dit_b

CIFAR10 = {
  "sample_size": 32,
  "block_out_channels": (128, 256, 256, 256),
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
  "layers_per_block": 2,
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
  "attention_head_dim": None,
  "norm_eps": 1e-6,
  "norm_num_groups": 32,
}
TINY = CIFAR10 | {"sample_size": 8, "block_out_channels": (32, 64, 64, 64)}
RATE = 1e-4


def squared_error(network: nn.Module, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
  cond = {name: batch[name] for name in ("label",) if name in batch}
  output = network.apply(params, batch["x"], batch["t"], **cond)[..., : batch["x"].shape[-1]]
  return jnp.mean((output - batch["noise"]) ** 2)


def sgd_step(network: nn.Module) -> Callable[..., Any]:
  def step(params: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(functools.partial(squared_error, network))(params, batch)
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads), loss

  return step


def torch_calls(there: Any, format: Any, x: np.ndarray, steps: np.ndarray, noise: np.ndarray) -> tuple[Any, Any]:
  """Forward pass and training step of a torch network in a memory format."""
  import torch

  there = there.to(memory_format=format)
  images = lambda a: torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=format)
  x_, noise_, steps_ = images(x), images(noise), torch.from_numpy(steps)
  optimizer = torch.optim.SGD(there.parameters(), RATE)

  def forward() -> Any:
    with torch.no_grad():
      return there(x_, steps_).sample

  def step() -> Any:
    optimizer.zero_grad(set_to_none=True)
    loss = torch.mean((there(x_, steps_).sample - noise_) ** 2)
    loss.backward()
    optimizer.step()
    return loss.detach()

  return forward, step


def beside_torch(batch: int, turns: int, tiny: bool, profile: bool) -> None:
  """Compare with UNet2DModel of diffusers."""
  import diffusers
  import torch

  from jaxdiff import weights

  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  torch.manual_seed(0)
  config = TINY if tiny else CIFAR10
  there = diffusers.UNet2DModel(**config).eval()  # no dropout in training either
  with tempfile.TemporaryDirectory() as folder:
    there.save_pretrained(folder)
    here = weights.load(folder)
  rng, size = np.random.default_rng(0), config["sample_size"]
  x, noise = (rng.normal(size=(batch, size, size, 3)).astype(np.float32) for _ in range(2))
  steps = np.linspace(0, 999, batch).astype(np.int64)
  data = {"x": jnp.asarray(x), "t": jnp.asarray((steps + 1) / 1000, jnp.float32), "noise": jnp.asarray(noise)}
  forward, step = jax.jit(here.network.apply), jax.jit(sgd_step(here.network), donate_argnums=0)
  first = jax.tree.map(jnp.array, here.params)
  state = {"params": jax.tree.map(jnp.copy, first)}
  calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "step": {}}
  calls["forward"]["jaxdiff"] = lambda: forward(first, data["x"], data["t"])

  def update() -> jax.Array:
    state["params"], loss = step(state["params"], data)
    return loss

  calls["step"]["jaxdiff"] = update
  formats = {"torch, channels first": torch.contiguous_format, "torch, channels last": torch.channels_last}
  for name, format in formats.items():
    copy = diffusers.UNet2DModel(**config).eval()
    copy.load_state_dict(there.state_dict())
    calls["forward"][name], calls["step"][name] = torch_calls(copy, format, x, steps, noise)
    theirs = calls["forward"][name]().permute(0, 2, 3, 1).numpy()
    off = np.abs(theirs - np.asarray(calls["forward"]["jaxdiff"]()))
    if not off.max() < 1e-3:
      raise SystemExit(f"the values differ by {off.max()}")
  count = sum(leaf.size for leaf in jax.tree.leaves(first))
  print(f"{count:,} parameters, {batch} x {size}x{size}x3, {cores} cores; jax {jax.__version__}, torch", end=" ")
  print(f"{torch.__version__}, diffusers {diffusers.__version__}; load {os.getloadavg()[0]:.1f}; {turns} turns")
  for what, each in calls.items():
    compare(what, in_turns(each, turns))
  if profile:
    show_profile(jax.jit(sgd_step(here.network)), (first, data))


def compare(what: str, times: dict[str, np.ndarray]) -> None:
  """Print the time of torch over that of jaxdiff, in wall and in CPU time."""
  ours = times.pop("jaxdiff")
  print(f"{what:<8} jaxdiff {np.median(ours[:, 0]):36.3f} s (CPU {np.median(ours[:, 1]):.3f})")
  for name, theirs in times.items():
    ratios = np.percentile(theirs / ours, [25, 50, 75], axis=0)
    wall, cpu = (f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in ratios.T)
    seconds = f"{np.median(theirs[:, 0]):.3f} s (CPU {np.median(theirs[:, 1]):.3f})"
    print(f"{what:<8} {name:<22} {seconds:>22}   {name} / jaxdiff: {wall}, of CPU time {cpu}", flush=True)


def kind(line: str) -> str:
  """What an operation of a program does, from its line: convolutions apart by what they are for."""
  if " convolution(" in line:
    if max(map(int, re.search(r"size=(\d+)x(\d+)", line).groups())) > 3:
      return "convolution: filter gradient"
    return f"convolution: {'input gradient' if 'transpose(jvp' in line else 'forward'}"
  return "product of matrices" if " dot(" in line else ""


def kinds(text: str) -> dict[str, str]:
  """What each operation of a compiled program does, by its name; fusions do what is in them."""
  inside, found, computation = {}, {}, ""
  for line in text.splitlines():
    if started := re.match(r"%?(\S+) \(.*\{$", line):
      computation = started.group(1)
    elif named := re.match(r"\s+(?:ROOT )?%?(\S+) = \S+ ([\w-]+)\(", line):
      inside[computation] = inside.get(computation, "") or kind(line)
      called = re.search(r"calls=%?([\w.-]+)", line)
      of_call = inside.get(called.group(1), "") if called else ""
      found[named.group(1)] = kind(line) or of_call or f"{named.group(2)} of neither"
  return found


def show_profile(step: Any, arguments: tuple[Any, ...]) -> None:
  """Print in which kinds of operations a program spends its time."""
  compiled = step.lower(*arguments).compile()
  jax.block_until_ready(compiled(*arguments))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(compiled(*arguments))
    traces = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
  names, spent = kinds(compiled.as_text()), collections.Counter()
  for event in (event for trace in traces for plane in trace.planes for line in plane.lines for event in line.events):
    if event.name in names:
      spent[names[event.name]] += event.duration_ns / 1e9
  total = sum(spent.values())
  for kind, seconds in spent.most_common(10):
    print(f"  {kind:<40} {seconds:8.3f} s {100 * seconds / total:5.1f} %")


def training_cases(tiny: bool, dtype: Any) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
  """ADM-64 and DiT-B/2, or small ones of the same kinds, and the shape of their images."""
  if tiny:
    label = {"label": Label(10, dtype=dtype)}
    unet = presets.adm_imagenet64(10).clone(channels=32, blocks=1, head_channels=32, dtype=dtype, conditions=label)
    return {
      "ADM, tiny": (unet, (16, 16, 3)),
      "DiT, tiny": (DiT(width=32, depth=2, heads=2, dtype=dtype, conditions=label), (8, 8, 4)),
    }
  label = {"label": Label(1000, dtype=dtype)}
  return {
    "ADM-64": (presets.adm_imagenet64().clone(dtype=dtype, conditions=label), (64, 64, 3)),
    "DiT-B/2": (dit_b(2).clone(dtype=dtype, conditions=label), (32, 32, 4)),
  }


def abstract(network: nn.Module, shape: tuple[int, ...], batch: int) -> tuple[Any, dict[str, Any]]:
  """Parameters and a batch, as shapes."""
  image = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
  data = {
    "x": image,
    "t": jax.ShapeDtypeStruct((batch,), jnp.float32),
    "noise": image,
    "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
  }
  return jax.eval_shape(network.init, jax.random.key(0), image, data["t"], label=data["label"]), data


def compilation(batch: int, tiny: bool, everything: bool) -> None:
  """Print how long it takes to lower and compile the training steps."""
  jax.config.update("jax_enable_compilation_cache", False)
  (adm, adm_case), (dit, (network, shape)) = training_cases(tiny, jnp.float32).items()
  cases = {adm: (*adm_case, everything), dit: (network, shape, True)}
  cases[f"{dit}, a loop"] = network.clone(scan=True), shape, True
  print(f"batch {batch}, jax {jax.__version__}, {jax.default_backend()}, load {os.getloadavg()[0]:.1f}")
  for name, (network, shape, compiles) in cases.items():
    arguments = abstract(network, shape, batch)
    start = perf_counter()
    lowered = jax.jit(sgd_step(network)).lower(*arguments)
    middle = perf_counter()
    lines = lowered.as_text().count("\n")
    print(f"{name:<18} lowered in {middle - start:6.1f} s to {lines:,} lines", end="", flush=True)
    if compiles:
      start = perf_counter()
      lowered.compile()
      print(f", compiled in {perf_counter() - start:.1f} s", end="")
    print(flush=True)


def ceiling(size: int, turns: int) -> float:
  """Floating point operations per second of a product of bfloat16 matrices."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  many = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, y: (a @ y) * (1 / size), a))
  seconds = in_turns({"product": lambda: many(a)}, turns)["product"][:, 0]
  return 10 * 2 * size**3 / float(np.median(seconds))


def accelerator(batch: int, turns: int, tiny: bool) -> None:
  """Print examples per second, and operations per second over those of a product of matrices."""
  peak = ceiling(256 if tiny else 8192, turns)
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}; product of bfloat16 matrices {peak / 1e12:.1f} TFLOP/s")
  for name, (network, shape) in training_cases(tiny, jnp.bfloat16).items():
    _, described = abstract(network, shape, batch)
    draw = lambda key, leaf: (
      jax.random.normal(key, leaf.shape) if leaf.dtype == jnp.float32 else jnp.zeros(leaf.shape, leaf.dtype)
    )
    batch_of = {key: draw(jax.random.key(i), leaf) for i, (key, leaf) in enumerate(described.items())}
    params = jax.jit(network.init)(jax.random.key(0), batch_of["x"], batch_of["t"], label=batch_of["label"])
    optimizer = optax.adam(RATE)

    def step(carry: Any, data: Any, network: nn.Module = network, optimizer: Any = optimizer) -> tuple[Any, jax.Array]:
      params, state = carry
      loss, grads = jax.value_and_grad(functools.partial(squared_error, network))(params, data)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss

    carry = params, optimizer.init(params)
    lowered = jax.jit(step, donate_argnums=0).lower(carry, batch_of)
    operations, compiled, held = lowered.cost_analysis()["flops"], lowered.compile(), {"carry": carry}

    def update(compiled: Any = compiled, held: Any = held, data: Any = batch_of) -> jax.Array:
      held["carry"], loss = compiled(held["carry"], data)
      return loss

    seconds = float(np.median(in_turns({"step": update}, turns)["step"][:, 0]))
    rate = operations / seconds
    print(
      f"{name:<10} batch {batch}: {batch / seconds:10.1f} examples/s, {rate / 1e12:8.2f} TFLOP/s, "
      f"MFU {100 * rate / peak:.1f} % of the measured product",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=["torch", "compile", "accelerator"])
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
  parser.add_argument("--profile", action="store_true", help="torch: which operations the step spends its time in")
  parser.add_argument("--all", action="store_true", help="compile: ADM-64, too")
  options = parser.parse_args()
  if options.what == "torch":
    beside_torch(options.batch, options.turns, options.tiny, options.profile)
  elif options.what == "compile":
    compilation(options.batch, options.tiny, options.all)
  else:
    accelerator(options.batch, options.turns, options.tiny)


if __name__ == "__main__":
  main()
