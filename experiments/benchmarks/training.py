"""What a training loses to its checkpoints and to waiting for its data.

    python experiments/benchmarks/training.py --data=data/fashion_mnist [--steps=100]

Trains the digits U-Net on Fashion-MNIST (28x28, prepared by `jaxdiff data fashion_mnist`) in turns with and without one
asynchronous checkpoint in the middle of `--steps` steps, and reads from the records of the loop what share of the time
it waited for the iterator. The cost of a checkpoint is the difference of the medians; the share that is printed is that
of one every 1000 steps.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jaxdiff.cli  # noqa: F401  before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import numpy as np
from overhead import CONFIG

from jaxdiff import arguments, factory, objectives, parallel, training
from jaxdiff.data import pipeline
from jaxdiff.training.metrics import MetricsWriter, read_metrics


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True)
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--turns", type=int, default=4)
  parser.add_argument("--batch", type=int, default=32)
  options = parser.parse_args()

  config = arguments.load(CONFIG) | {"data": {"type": "array_record", "path": options.data}}
  source, optimizer = factory.make_source(config, "train"), factory.make_optimizer_of(config)
  launcher = parallel.jit_launcher(parallel.make_mesh())
  objective = objectives.make_objective(config, source)
  step = launcher.compile(training.make_train_step(objective, optimizer, 0.998, options.batch))
  state = launcher.create(
    lambda: training.init_state(factory.init_params(config, source), optimizer, jax.random.key(0))
  )
  iterator = pipeline.train_batches(source, options.batch, seed=0)
  places = {"launcher": launcher, "global_batch": options.batch}
  seconds, blocked = {True: [], False: []}, []
  with tempfile.TemporaryDirectory() as folder, MetricsWriter(folder, 0) as writer:
    with training.Checkpoints(Path(folder) / "checkpoints", {}) as checkpoints:

      def save(at: int, state: training.TrainState) -> None:
        begin = time.perf_counter()
        checkpoints.save(state, iterator.get_state())
        blocked.append(time.perf_counter() - begin)

      for turn in range(options.turns + 1):
        for saving in (bool(turn % 2), not turn % 2):
          total = int(state.step) + options.steps
          middle = total - options.steps // 2
          hook = lambda at, state, middle=middle: save(at, state) if at == middle else None
          begin = time.perf_counter()
          state = training.train(
            state,
            step,
            iterator,
            **places,
            total_steps=total,
            log_every=20,
            writer=writer,
            hooks=[hook] if saving else [],
          )
          jax.block_until_ready(state)
          seconds[saving].append(time.perf_counter() - begin)
          checkpoints.wait()
    waits = [record["input_wait"] for record in read_metrics(Path(folder) / "metrics.jsonl")]
  plain, saved = (np.median(seconds[saving][1:]) for saving in (False, True))
  step_ms = 1e3 * plain / options.steps
  cost = saved - plain
  print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; jax {jax.__version__}")
  print(f"{source.name}, {source.shape}, batch {options.batch}: {step_ms:.1f} ms a step")
  print(f"checkpoint: {1e3 * cost:.0f} ms of wall time, {1e3 * np.median(blocked):.0f} ms of it in save()")
  print(f"  every 1000 steps: {100 * cost / (plain / options.steps * 1000):.3f} % (target 1 %)")
  print(f"input wait: mean {100 * np.mean(waits):.3f} %, largest {100 * np.max(waits):.3f} % (target 1 %)")


if __name__ == "__main__":
  main()
