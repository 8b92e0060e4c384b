"""The log-density of one FFJORD network by jaxdiff and by torchdiffeq: same weights, examples, probes and tolerances.

    .venv-parity/bin/python experiments/benchmarks/torchdiffeq_ffjord.py     # after make parity

A field of two hidden layers of tanh that depends on time, Dopri5 with error control at 1e-5, one probe, on the CPU.
Values must agree before times are compared. Both sides run in turns; a ratio is the median, with its quartiles.
"""

import argparse
import os

from overhead import in_turns

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchdiffeq

import jaxdiff as jd

TOLERANCE = 1e-5


def weights(dimension: int, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
  rng = np.random.default_rng(0)
  sizes = [(dimension + 1, width), (width, width), (width, dimension)]
  return [
    ((rng.normal(size=size) * 1.5 / np.sqrt(size[0])).astype(np.float32), np.zeros(size[1], np.float32))
    for size in sizes
  ]


def field(params: list[tuple[jax.Array, jax.Array]], x: jax.Array, t: jax.Array) -> jax.Array:
  h = jnp.concatenate([x, t[:, None]], axis=1)
  for w, b in params[:-1]:
    h = jnp.tanh(h @ w + b)
  w, b = params[-1]
  return h @ w + b


def in_torch(params: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, probe: np.ndarray) -> np.ndarray:
  layers = [(torch.from_numpy(w), torch.from_numpy(b)) for w, b in params]
  e = torch.from_numpy(probe)

  def velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = torch.cat([x, t.expand(len(x), 1)], dim=1)
    for w, b in layers[:-1]:
      h = torch.tanh(h @ w + b)
    w, b = layers[-1]
    return h @ w + b

  def slope(t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
      y = state[0].detach().requires_grad_(True)
      value = velocity(t, y)
      product = torch.autograd.grad(value, y, e)[0]
    return value.detach(), (product * e).sum(dim=1)

  start = torch.from_numpy(x), torch.zeros(len(x))
  with torch.no_grad():
    z, change = torchdiffeq.odeint(
      slope, start, torch.tensor([0.0, 1.0]), rtol=TOLERANCE, atol=TOLERANCE, method="dopri5"
    )
  z, change = z[-1], change[-1]
  return (change - 0.5 * (z**2).sum(dim=1) - 0.5 * z.shape[1] * np.log(2 * np.pi)).numpy()


def compare(dimension: int, width: int, batch: int, turns: int) -> None:
  """Print one problem's ratios."""
  params, hutchinson, key = weights(dimension, width), jd.divergence.hutchinson(), jax.random.key(0)
  x = np.random.default_rng(1).normal(size=(batch, dimension)).astype(np.float32)
  probe = np.array(hutchinson.draw(jd.example_keys(key, 0, batch), jnp.asarray(x))[:, 0])
  theirs = lambda: in_torch(params, x, probe)
  runs = {"torch": lambda: jnp.asarray(theirs())}
  for steps in ("shared", "per_example"):
    flow = jd.flow.cnf(divergence=hutchinson, solver="dopri5", rtol=TOLERANCE, atol=TOLERANCE, steps=steps)
    value = jax.jit(lambda params, x, flow=flow: flow.log_prob(key, x, lambda x, t: field(params, x, t)).value)
    runs[steps] = lambda value=value: value(params, x)
    off = float(np.max(np.abs(np.asarray(runs[steps]()) - theirs())))
    if not off < 1e-2:
      raise SystemExit(f"the values differ by {off}")
  times = {name: seconds[:, 0] for name, seconds in in_turns(runs, turns).items()}
  for steps in ("shared", "per_example"):
    low, middle, high = np.percentile(times["torch"] / times[steps], [25, 50, 75])
    print(
      f"{dimension}-D, width {width}, batch {batch}, {steps} steps: {middle:.1f} ({low:.1f}-{high:.1f}); jaxdiff "
      f"{1e3 * np.median(times[steps]):.1f} ms",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--turns", type=int, default=9)
  options = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  print(f"{len(os.sched_getaffinity(0))} cores, jax {jax.__version__}, torch {torch.__version__}", end="")
  print(f", torchdiffeq {torchdiffeq.__version__}; torchdiffeq / jaxdiff, median (quartiles) of {options.turns} turns")
  compare(2, 64, 512, options.turns)
  compare(64, 256, 64, options.turns)


if __name__ == "__main__":
  main()
