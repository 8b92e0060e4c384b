"""What a likelihood costs: over the classic method on the host, and over its network evaluations alone.

    python experiments/benchmarks/likelihood.py --digits=runs/digits --patches=runs/patches

The classic method is that of score_sde: scipy's RK45 over the whole batch as one vector on the host, rtol = atol =
1e-5, the drift and one vector-Jacobian product jitted. Both methods get the same examples, network and probes; the
error of each is against a solve at a hundredth of the tolerance, and jaxdiff runs at the loosest tolerance whose error
is no larger. "evaluations" is one jitted loop of as many bare evaluations, each with one Jacobian-vector product. All
sides run in turns in one process; a ratio is the median over the turns, with its quartiles.

The patches' network is convolutional and is run at 32x32x3 here.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overhead import evaluations, in_turns

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jaxdiff as jd
from jaxdiff import factory, rundir
from jaxdiff.schedules import start_time

TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
CLASSIC = 1e-5
KEY = jax.random.key(0)


class Problem:
  """A score with parameters, a process, examples, and probes that both methods share."""

  def __init__(self, name: str, score: Callable[[Any], Any], params: Any, sde: Any, x: jax.Array):
    self.name, self.score, self.params, self.sde, self.x = name, score, params, sde, x
    hutchinson = jd.divergence.hutchinson()
    self.probe = hutchinson.draw(jd.example_keys(KEY, 0, len(x)), x)[:, 0]


def mixture(batch: int) -> Problem:
  """64-D, five modes, as narrow as images are in most directions; the exact score."""
  means = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
  deviation, sde = 0.05, jd.VP()

  def score(params: Any) -> Any:
    def log_density(x: jax.Array, t: jax.Array) -> jax.Array:
      alpha, sigma = (value[:, None] for value in sde.marginal(t))
      variance = (alpha * deviation) ** 2 + sigma**2
      away = x[:, None] - alpha[..., None] * params[None]
      return jax.nn.logsumexp(-0.5 * jnp.sum(away**2, axis=-1) / variance, axis=1)

    return lambda x, t: jax.grad(lambda x: jnp.sum(log_density(x, t)))(x)

  noise = jax.random.normal(KEY, (batch, 64))
  return Problem("64-D mixture", score, means, sde, means[jnp.arange(batch) % 5] + deviation * noise)


def trained(name: str, workdir: Path, batch: int, tiles: int = 1) -> Problem:
  """A trained run; its images may be tiled to `tiles` times their height and width."""
  config = factory.read(workdir / "config.json")
  _, params, _ = rundir.load(workdir, config)
  held_out, sde = factory.make_source(config, "test"), factory.make_process(config)
  images = held_out.gather(np.arange(batch * tiles**2))["x"]
  h, w, c = held_out.shape
  images = images.reshape(batch, tiles, tiles, h, w, c).swapaxes(2, 3).reshape(batch, tiles * h, tiles * w, c)
  x = jd.likelihood.dequantize(KEY, jnp.asarray(images), held_out.levels)
  return Problem(name, factory.make_score(config), params, sde, x)


def classic(problem: Problem, tolerance: float) -> Callable[[], tuple[np.ndarray, int]]:
  """-> (log p [b], evaluations of the whole batch), by scipy on the host."""
  x, sde, probe, shape = problem.x, problem.sde, problem.probe, problem.x.shape
  start, end = float(start_time(sde, None, 1e-3)), float(sde.t1)

  @jax.jit
  def slope(params: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    drift, _ = jd.reverse(sde, problem.score(params), eta=0.0)
    value, pullback = jax.vjp(lambda x: drift(x, t), x)
    return value, jnp.sum(probe * pullback(probe)[0], axis=tuple(range(1, x.ndim)))

  def field(t: float, state: np.ndarray) -> np.ndarray:
    x = jnp.asarray(state[: problem.x.size].reshape(shape), jnp.float32)
    parts = jax.device_get(slope(problem.params, x, jnp.float32(t)))
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)

  def run() -> tuple[np.ndarray, int]:
    y0 = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(len(x))])
    solution = solve_ivp(field, (start, end), y0, method="RK45", rtol=tolerance, atol=tolerance)
    z, change = solution.y[: x.size, -1].reshape(shape), solution.y[x.size :, -1]
    return np.asarray(sde.prior_log_prob(jnp.asarray(z, jnp.float32))) + change, solution.nfev

  return run


def ours(problem: Problem, tolerance: float, **how: Any) -> Callable[[], Any]:
  log_prob = jd.likelihood.log_prob(problem.sde, jd.divergence.hutchinson(), tolerance, tolerance, **how)
  run = jax.jit(lambda params, x: log_prob(KEY, x, problem.score(params)))
  return lambda: jax.block_until_ready(run(problem.params, problem.x))


def with_product(problem: Problem) -> Callable[..., jax.Array]:
  """One evaluation of the network with a Jacobian-vector product."""

  def evaluate(params: Any, x: jax.Array, level: jax.Array) -> jax.Array:
    score, t = problem.score(params), 0.5 * problem.sde.t1 * (1.001 + level)
    value, product = jax.jvp(lambda x: score(x, t), (x,), (problem.probe,))
    axes = tuple(range(1, x.ndim))
    return 1e-3 * jnp.tanh(value + jnp.sum(problem.probe * product, axis=axes, keepdims=True))

  return evaluate


def rms(value: Any, exact: Any) -> float:
  return float(np.sqrt(np.mean((np.asarray(value) - np.asarray(exact)) ** 2)))


def quartiles(ratio: np.ndarray) -> str:
  low, middle, high = np.percentile(ratio, [25, 50, 75])
  return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def compare(problem: Problem, turns: int) -> None:
  """Print one problem's table."""
  exact = ours(problem, 1e-2 * CLASSIC)().value
  host = classic(problem, CLASSIC)
  value, evaluated = host()
  target = rms(value, exact)
  print(f"\n{problem.name}, batch {len(problem.x)} of {problem.x.shape[1:]}")
  print(f"  classic: {evaluated} evaluations of the batch, rms error {target:.1e} nats")
  for how in ({}, {"variable": "time"}, {"steps": "shared"}):
    for tolerance in TOLERANCES:
      run = ours(problem, tolerance, **how)
      result = run()
      if (error := rms(result.value, exact)) <= target:
        break
    count = int(result.nfe.max())
    bare = evaluations(with_product(problem), problem.params, problem.x, count)["loop"]
    times = in_turns({"jaxdiff": run, "classic": host, "bare": bare}, turns)
    wall = {name: value[:, 0] for name, value in times.items()}
    label = ", ".join(map(str, how.values())) or "as it is"
    print(
      f"  {label:<10} tolerance {tolerance:.0e}, error {error:.1e}, "
      f"evaluations {result.nfe.mean():.0f} (largest {count}): "
      f"classic / jaxdiff {quartiles(wall['classic'] / wall['jaxdiff'])}, "
      f"jaxdiff / evaluations {quartiles(wall['jaxdiff'] / wall['bare'])}",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--digits", type=Path, help="a run of configs/digits.py")
  parser.add_argument("--patches", type=Path, help="a run on 16x16x3 photo patches")
  parser.add_argument("--turns", type=int, default=3)
  options = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}; ", end="")
  print(f"median (quartiles) of {options.turns} turns, load {os.getloadavg()[0]:.1f}")
  compare(mixture(64), 5 * options.turns)
  if options.digits:
    compare(trained("digits U-Net", options.digits, 64), options.turns)
  if options.patches:
    compare(trained("patches U-Net", options.patches, 8, tiles=2), options.turns)


if __name__ == "__main__":
  main()
