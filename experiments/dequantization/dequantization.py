"""Bits per dimension of held-out digits under four dequantizations, and what importance weights add.

    python experiments/dequantization/dequantization.py RUN [STEPS] [EXAMPLES] [WEIGHTED]

RUN is a trained run on digits (experiments/digits). The flow of variational dequantization is trained for STEPS steps
with the network fixed. Probes and examples are common to all rows of the first table, draws and examples to all of the
second.
"""

import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jaxdiff.cli  # before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdiff as jd
from jaxdiff import factory, rundir
from jaxdiff.likelihood import dequantization as deq
from jaxdiff.models import Dequantizer

BATCH, TRAIN_BATCH, TOLERANCE, DRAWS, PROBES, WEIGHTS = 32, 64, 1e-3, 4, 2, 16


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def train_flow(module: Dequantizer, loss: Any, network: Any, x: jax.Array, levels: int, steps: int) -> Any:
  """Parameters of the flow that lower the bound on -log P(x), with the network fixed."""

  def bits(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
    flow = partial(module.apply, params)
    return jd.likelihood.dequantized(loss, deq.variational(flow), levels)(key, x, network)[1]["bits_per_dim"].mean()

  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
  params = module.init(jax.random.key(1), jnp.zeros((1, *x.shape[1:])), jnp.zeros((1, *x.shape[1:])))

  @jax.jit
  def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
    pick, noise = jax.random.split(key)
    value, gradient = jax.value_and_grad(bits)(params, noise, jax.random.choice(pick, x, (TRAIN_BATCH,), replace=False))
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  state, values = optimizer.init(params), []
  for i, key in enumerate(jax.random.split(jax.random.key(2), steps)):
    params, state, value = step(params, state, key)
    values.append(float(value))
    if (i + 1) % 50 == 0:
      say(f"flow, step {i + 1}/{steps}: bound {np.mean(values[-50:]):.3f} bits/dim")
  return params


def in_batches(bits: Any, score: Any, key: jax.Array, x: jax.Array) -> Any:
  """Values, errors and evaluations of all examples, a batch at a time."""
  run = jax.jit(lambda key, x: bits(key, x, score))
  parts = []
  for start in range(0, len(x), BATCH):
    batch = x[start : start + BATCH]
    parts.append(run(jd.example_keys(key, start, len(batch)), batch))
    jd.raise_if_failed(parts[-1])
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def plus_minus(values: np.ndarray) -> str:
  return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main() -> None:
  workdir, steps, examples, weighted = Path(sys.argv[1]), *map(int, [*sys.argv[2:], 400, 96, 8][:3])
  config = factory.read(workdir / "config.json")
  source, params, _ = rundir.load(workdir, config)
  held_out, sde = factory.make_source(config, "test"), factory.make_process(config)
  score, levels = factory.make_score(config)(params), source.levels
  assert levels is not None
  x, key = jnp.asarray(held_out.gather(np.arange(examples))["x"]), jax.random.key(3)

  module, start = Dequantizer(width=16), perf_counter()
  loss = jd.losses.bound(sde, factory.make_prediction(config))
  network = partial(factory.make_apply(config), factory.network_params(config, params))
  train = jnp.asarray(source.gather(np.arange(len(source)))["x"])
  flow = train_flow(module, loss, network, train, levels, steps)
  say(f"flow: {perf_counter() - start:.0f} s")

  solver = partial(jd.likelihood.log_prob, sde, rtol=TOLERANCE, atol=TOLERANCE)
  at = lambda tau: sde.time_of_log_snr(jnp.asarray(2 * np.log(tau * levels)))  # half a cell is 1 / levels
  rows = {
    "uniform": (deq.uniform(), None),
    f"variational ({steps} steps)": (deq.variational(partial(module.apply, flow)), None),
    "truncated normal, tau = 59 (the default t0)": (deq.truncated_normal(sde), None),
    "noise of the process, the same t0": (deq.gaussian(sde), None),
    "truncated normal, tau = 3": (deq.truncated_normal(sde, at(3)), at(3)),
    "noise of the process, the same t0 (3)": (deq.gaussian(sde, at(3)), at(3)),
    "truncated normal, tau = 1": (deq.truncated_normal(sde, at(1)), at(1)),
    "noise of the process, the same t0 (1)": (deq.gaussian(sde, at(1)), at(1)),
  }
  print("| dequantization | bits/dim | minus uniform | error over draws | error over probes | evaluations a draw |")
  print("| --- | --- | --- | --- | --- | --- |")
  reference = None
  for name, (dequantization, t0) in rows.items():
    start = perf_counter()
    density = solver(jd.divergence.hutchinson(PROBES), t0=t0)
    bits = jd.likelihood.bits_per_dim(density, levels, dequantization=dequantization, draws=DRAWS)
    result = in_batches(bits, score, key, x)
    reference = result.value if reference is None else reference
    errors = " | ".join(f"{e.mean():.3f}" for e in (result.dequantization_error, result.standard_error))
    difference = plus_minus(result.value - reference) if name != "uniform" else ""
    spent = result.nfe.mean() / DRAWS
    print(f"| {name} | {plus_minus(result.value)} | {difference} | {errors} | {spent:.0f} |", flush=True)
    say(f"{name}: {perf_counter() - start:.0f} s")

  # One draw at a time: all K share them.
  bits = jd.likelihood.bits_per_dim(solver(jd.divergence.exact()), levels)
  draws = []
  for k in range(WEIGHTS):
    start = perf_counter()
    draws.append(in_batches(bits, score, jax.random.fold_in(key, k), x[:weighted]).value)
    say(f"exact draw {k}: {perf_counter() - start:.0f} s")
  unit = x[0].size * np.log(2)
  log_weights = -unit * np.asarray(draws, np.float64)
  print("\n| K | mean of the bounds | bound of the mean weight | minus K = 1 |\n| --- | --- | --- | --- |")
  bound = lambda k: -(np.logaddexp.reduce(log_weights[:k], axis=0) - np.log(k)) / unit
  for k in (1, 4, WEIGHTS):
    gain = plus_minus(bound(k) - bound(1)) if k > 1 else ""
    print(f"| {k} | {-log_weights[:k].mean() / unit:.4f} | {plus_minus(bound(k))} | {gain} |", flush=True)


if __name__ == "__main__":
  main()
