"""What jaxdiff adds to the network and to the optimizer: time of sampling, likelihood and training over bare JAX.

    python experiments/benchmarks/overhead.py

Every ratio divides the time of a library call by that of the least work that does the same: n evaluations of the
network, n evaluations with one Jacobian-vector product, or value_and_grad with the optimizer's update. The evaluations
come as one jitted loop ("loop") and as n jitted calls, each waited for ("calls"); their inputs vary from one to the
next. All sides of a comparison are jitted and run in turns in one process, so that what else the machine does hits them
alike; a ratio is the median over the turns, with its quartiles. Wall time is what counts; on a machine that is not idle
read the CPU time of the process beside it.

The network is that of configs/digits.py, trained by the steps timed here, so that the adaptive solves have work to do.
"""

import argparse
import functools
import os
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import jaxdiff.cli  # noqa: F401  before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from jaxdiff import divergence, factory, likelihood, objectives, parallel, samplers, schedules, sde, training
from jaxdiff.data import pipeline
from jaxdiff.training.metrics import MetricsWriter

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"
TOLERANCE = 1e-3
Call = Callable[[], Any]


class Setting(NamedTuple):
  """What all comparisons share: the components of the config, the batch size and how often to repeat."""

  config: factory.Config
  source: Any
  network: Callable[..., jax.Array]
  process: sde.ScalarSDE
  batch: int
  turns: int


def in_turns(calls: dict[str, Call], turns: int) -> dict[str, np.ndarray]:
  """Wall and CPU seconds [turns, 2] of every call, in changing order; the first turn, which compiles, is left out."""
  times = {name: [] for name in calls}
  for turn in range(turns + 1):
    for name in sorted(calls, reverse=bool(turn % 2)):
      start = perf_counter(), process_time()
      jax.block_until_ready(calls[name]())
      times[name].append((perf_counter() - start[0], process_time() - start[1]))
  return {name: np.array(value[1:]) for name, value in times.items()}


def report(name: str, times: dict[str, np.ndarray], units: int, target: float | None) -> None:
  """Print how `times["jaxdiff"]` compares with each of the others, and what one of the n units of work takes."""
  for other in sorted(times.keys() - {"jaxdiff"}):
    ratios = np.percentile(times["jaxdiff"] / times[other], [25, 50, 75], axis=0)
    wall, cpu = (f"{middle:6.3f} ({low:.3f}-{high:.3f})" for low, middle, high in ratios.T)
    unit = 1e3 * np.median(times[other][:, 0]) / units
    goal = f"{target:.2f}" if target else "-"
    print(f"{name:<18} {other:<6} {units:>4} {unit:8.1f} ms   {wall:<22} {cpu:<22} {goal}", flush=True)


def bare_loss(setting: Setting, params: Any, key: jax.Array, data: jax.Array) -> jax.Array:
  """The loss of the config written down, all random numbers of the batch from one key.

  With V = sigma^2 + (s alpha)^2 the error of the noise is s alpha / sqrt(V) times that of the network's output (EDM
  preconditioning); times uniform in log-SNR make the likelihood weight a constant, half the range of the log-SNR.
  """
  dequantize_key, noise_key, time_key = jax.random.split(key, 3)
  process, levels, s = setting.process, setting.source.levels, setting.config["prediction"]["sigma_data"]
  x0 = -1 + 2 / levels * (data + jax.random.uniform(dequantize_key, data.shape))
  start = schedules.start_time(process, None, schedules.TRAINING_NOISE_TO_SIGNAL)
  first, last = sde.log_snr(process, start), sde.log_snr(process, process.t1)
  u = (jax.random.uniform(time_key) + jnp.arange(len(x0)) / len(x0)) % 1.0
  alpha, sigma = process.marginal(process.time_of_log_snr(first + u * (last - first)))
  level = 0.25 * jnp.log(sigma / alpha)
  alpha, sigma = (value[:, None, None, None] for value in (alpha, sigma))
  noise = jax.random.normal(noise_key, x0.shape)
  root = jnp.sqrt(sigma**2 + (s * alpha) ** 2)
  output = setting.network(params, (alpha * x0 + sigma * noise) / root, level)
  error = s * alpha / root * (output - (sigma * x0 / s - alpha * s * noise) / root)
  return 0.5 * (first - last) * jnp.sum(error**2) / len(x0)


def bare_step(setting: Setting, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
  """`step(carry, data) -> (carry, loss)`: gradient, update and moving average; no keys per example, no metrics."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry: tuple[Any, Any, Any, jax.Array], data: jax.Array) -> tuple[Any, jax.Array]:
    params, average, state, count = carry
    key = jax.random.fold_in(jax.random.key(1), count)
    loss, grads = jax.value_and_grad(functools.partial(bare_loss, setting))(params, key, data)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, optax.incremental_update(params, average, 0.002), state, count + 1), loss

  return step


def bare_carry(params: Any, optimizer: optax.GradientTransformation) -> Any:
  """What `bare_step` starts from."""
  return params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32)


def train(setting: Setting, steps: int = 30) -> Any:
  """Compare the train step, then the whole loop with its data, records and progress bar; returns trained parameters."""
  launcher, optimizer = parallel.jit_launcher(parallel.make_mesh()), factory.make_optimizer_of(setting.config)
  params = factory.init_params(setting.config, setting.source)
  carry = bare_carry(params, optimizer)
  state = launcher.create(lambda: training.init_state(params, optimizer, jax.random.key(1)))
  objective = objectives.make_objective(setting.config, setting.source)
  whole = launcher.compile(training.make_train_step(objective, optimizer, 0.998, setting.batch))
  bare = bare_step(setting, optimizer)
  iterator = pipeline.train_batches(setting.source, setting.batch, seed=0)
  index = launcher.put(np.arange(setting.batch, dtype=np.int32))
  batch = launcher.put(next(iterator))

  def whole_step() -> Any:
    nonlocal state
    state, metrics = whole(state, batch, index)
    return state, metrics

  def bare_steps(count: int) -> Any:
    nonlocal carry
    for _ in range(count):
      carry, loss = bare(carry, batch["x"])
      jax.block_until_ready(loss)
    return carry

  def loop(writer: MetricsWriter) -> Any:
    nonlocal state
    total, places = int(state.step) + steps, {"launcher": launcher, "global_batch": setting.batch}
    state = training.train(state, whole, iterator, **places, total_steps=total, log_every=10, writer=writer)
    return state

  times = in_turns({"jaxdiff": whole_step, "step": lambda: bare_steps(1)}, 8 * setting.turns)
  report("train step", times, 1, target=1.03)
  with tempfile.TemporaryDirectory() as workdir, MetricsWriter(workdir, 0) as writer:
    calls = {"jaxdiff": lambda: loop(writer), "step": lambda: bare_steps(steps)}
    report("train loop", in_turns(calls, setting.turns), steps, target=1.03)
  return state.params


def evaluations(network: Callable[..., jax.Array], params: Any, x: jax.Array, count: int) -> dict[str, Call]:
  """`count` evaluations of `network(params, x, t)` with varying x and t, as one jitted loop and as jitted calls."""

  def step(params: Any, x: jax.Array, level: jax.Array) -> jax.Array:
    return x + 1e-3 * network(params, x, jnp.full(len(x), level))

  levels = jnp.linspace(1.0, -1.0, count)
  call, loop = (
    jax.jit(step),
    jax.jit(lambda params, x: jax.lax.fori_loop(0, count, lambda i, x: step(params, x, levels[i]), x)),
  )

  separate = list(levels)

  def calls() -> jax.Array:
    state = x
    for level in separate:
      state = jax.block_until_ready(call(params, state, level))
    return state

  return {"loop": lambda: loop(params, x), "calls": calls}


def sample(setting: Setting, params: Any, steps: int) -> None:
  """Compare Euler-Maruyama at a fixed number of steps, and the probability flow at the evaluations of its slowest."""
  key, process, make_score = jax.random.key(2), setting.process, factory.make_score(setting.config)
  x = process.prior_sample(key, (setting.batch, *setting.source.shape))
  for name, sampler in {
    "reverse_sde": samplers.reverse_sde(process, schedules.time_grid(process, steps)),
    "probability_flow": samplers.probability_flow(process, rtol=TOLERANCE, atol=TOLERANCE),
  }.items():
    run = jax.jit(lambda params, x, sampler=sampler: sampler(key, x, make_score(params)))
    nfe = run(params, x).nfe
    calls = {"jaxdiff": lambda run=run: run(params, x), **evaluations(setting.network, params, x, int(nfe.max()))}
    report(name, in_turns(calls, setting.turns), int(nfe.max()), target=1.05)
    report_spread(nfe)


def evaluate(setting: Setting, params: Any) -> None:
  """Compare the likelihood with network evaluations that carry one Jacobian-vector product."""
  key, make_score = jax.random.key(3), factory.make_score(setting.config)
  data = jnp.asarray(setting.source.gather(np.arange(setting.batch))["x"])
  x = likelihood.dequantize(key, data, setting.source.levels)
  probe = jax.random.rademacher(key, x.shape, x.dtype)
  log_prob = likelihood.log_prob(setting.process, divergence.hutchinson(1), rtol=TOLERANCE, atol=TOLERANCE)
  run = jax.jit(lambda params, x: log_prob(key, x, make_score(params)))
  nfe = run(params, x).nfe

  def with_product(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    value, product = jax.jvp(lambda x: setting.network(params, x, t), (x,), (probe,))
    return value + jnp.sum(probe * product, axis=(1, 2, 3), keepdims=True)

  calls = {"jaxdiff": lambda: run(params, x), **evaluations(with_product, params, x, int(nfe.max()))}
  report("likelihood", in_turns(calls, setting.turns), int(nfe.max()), target=1.15)
  report_spread(nfe)


def report_spread(nfe: jax.Array) -> None:
  """Print what the batch loses by waiting for its slowest example."""
  low, mean, high = int(nfe.min()), float(nfe.mean()), int(nfe.max())
  if low < high:
    print(f"{'':18} evaluations {low}-{high}, mean {mean:.1f}: the slowest example costs a factor {high / mean:.2f}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument(
    "--turns", type=int, default=4, help="repetitions of the solves; the train step has 8 times these"
  )
  parser.add_argument("--steps", type=int, default=40, help="steps of the reverse SDE")
  options = parser.parse_args()

  config = factory.normalize(runpy.run_path(str(CONFIG))["get_config"]())
  source, process = factory.make_source(config, "train"), factory.make_process(config)
  network = factory.make_network(config).apply
  setting = Setting(config, source, network, process, options.batch, options.turns)
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  print(
    f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; jax ", end=""
  )
  print(f"{jax.__version__}, jaxlib {jaxlib.__version__}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}")
  print(
    f"digits U-Net, {sum(leaf.size for leaf in jax.tree.leaves(shapes)):,} parameters, batch {options.batch}; ", end=""
  )
  print(f"median (quartiles) of {options.turns} turns, of the train step {8 * options.turns}\n")
  print(f"{'':18} {'over':<6} {'n':>4} {'one takes':>11}   {'wall ratio':<22} {'CPU ratio':<22} target")
  params = train(setting)
  sample(setting, params, options.steps)
  evaluate(setting, params)
  print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
  main()
