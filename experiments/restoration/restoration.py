"""Held-out images restored by networks that were not trained to: pictures, and errors against the truth.

    python experiments/restoration/restoration.py fashion --model=DIR
    python experiments/restoration/restoration.py emoji --model=DIR

An image x is seen as y = A x + noise: a part of it is hidden, or 2x2 or 4x4 pixels are one, or it is blurred, or grey.
Two methods draw samples of p(x | y) with a network of p(x) alone, a conditional one with its null condition, and are
compared with what one would do without a network. Writes NAME.png and prints a table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jaxdiff.cli  # before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxdiff as jd
from jaxdiff import factory, inverse, keys, models, rundir
from jaxdiff.evaluation import features
from jaxdiff.evaluation.pictures import tile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COUNT, COLUMNS = 24, 8
BLUR, NOISE = 1.5, 0.05  # pixels; of values in [-1, 1]
STEPS = {"PiGDM": 40, "DPS": 80, "RePaint": 40}
OPTIONS = {"PiGDM": {}, "DPS": {"scale": 1.0}, "RePaint": {"resamplings": 5, "jump": 10}}

ORDER = ("truth", "seen", "no network", "PiGDM", "again", "DPS", "RePaint")


class Task(NamedTuple):
  """What is seen of an image.

  Attributes:
    title: of the pictures.
    operator: A.
    simple: from a measurement to an image, without a network.
    other: the method beside PiGDM.
    noise_std: of the measurement.
    hidden: where the error is measured, [h, w, 1]: 1 there; None everywhere.
  """

  title: str
  operator: Any
  simple: Callable[[jax.Array], jax.Array]
  other: str
  noise_std: float = 0.0
  hidden: jax.Array | None = None


def tasks(name: str, shape: tuple[int, ...]) -> list[Task]:
  """The tasks of a data set of images of this shape."""
  enlarge = lambda y: jax.image.resize(y, (len(y), *shape), "linear")
  larger = lambda factor: Task(f"{factor}x{factor} pixels in one", inverse.downsample(factor), enlarge, "DPS")

  def inpaint(title: str, known: jax.Array) -> Task:
    mean = lambda y: jnp.sum(known * y, axis=(1, 2), keepdims=True) / jnp.sum(known)
    return Task(title, inverse.mask(known), lambda y: jnp.where(known == 1, y, mean(y)), "RePaint", hidden=1 - known)

  if name == "emoji":
    grey = Task("grey", inverse.greyscale(), lambda y: jnp.broadcast_to(y, (len(y), *shape)), "DPS")
    return [inpaint("middle hidden", jnp.ones((32, 32, 1)).at[8:24, 8:24].set(0)), larger(2), grey]
  bell = jnp.exp(-(jnp.arange(-4, 5) ** 2) / (2 * BLUR**2))
  kernel = jnp.outer(bell, bell) / jnp.sum(bell) ** 2
  blurred = Task("blurred, with noise", inverse.blur(kernel), lambda y: y, "DPS", noise_std=NOISE)
  return [inpaint("lower half hidden", jnp.ones((28, 28, 1)).at[14:].set(0)), larger(2), larger(4), blurred]


def load(model: Path, data: str | None) -> tuple[Any, Any, np.ndarray]:
  """The process, the score of p(x), and held-out images in [-1, 1], one of each emoji."""
  config = factory.read(model / "config.json")
  if data:
    config["data"]["path"] = data
  params = rundir.load(model, config)[1]
  conditions, apply = factory.make_network(config).conditions, factory.make_apply(config)
  sde = factory.make_process(config)
  unconditional = lambda params, x, t: apply(params, x, t, **models.conditioning.nothing(conditions, x))
  source = factory.make_source(config, "test")
  captions = Path(config["data"]["path"]) / "test.jsonl"
  rows = np.arange(COUNT)
  if captions.exists():
    names = [json.loads(line)["name"] for line in captions.read_text(encoding="utf-8").splitlines()]
    rows = np.sort(np.unique(names, return_index=True)[1])[:COUNT]
  x = np.asarray(features.to_values(source.gather(rows)["x"], source.levels))
  return sde, jd.score_fn(unconditional, params, sde, factory.make_prediction(config)), x


def restore(task: Task, sde: Any, score: Any, x: np.ndarray, method: str, seed: int = 0) -> tuple[np.ndarray, int]:
  """A sample for each measurement by ancestral steps, and the network evaluations of one."""
  sampler = jd.samplers.ancestral(sde, jd.time_grid(sde, STEPS[method]))
  sampler = inverse.restoration(sde, sampler, task.operator, task.noise_std, method.lower(), **OPTIONS[method])

  @jax.jit
  def run(score: Any, y: jax.Array) -> Any:
    prior_key, path_key = keys.split(jd.example_keys(jax.random.key(seed), 0, len(y)))
    return sampler(path_key, sde.prior_sample(prior_key, x.shape), score, {"measurement": y})

  sample = run(score, measured(task, x))
  return np.asarray(sample.x), int(sample.nfe[0])


def measured(task: Task, x: np.ndarray) -> jax.Array:
  """The measurement of each image; its noise is that of the image, whatever others are beside it."""
  y = task.operator.apply(jnp.asarray(x))
  return y + task.noise_std * keys.normal(jd.example_keys(jax.random.key(99), 0, len(y)), y.shape)


def report(task: Task, x: np.ndarray, found: np.ndarray, method: str, evaluations: int) -> None:
  """Prints a line of the table."""
  where = np.broadcast_to(1.0 if task.hidden is None else task.hidden, x.shape)
  error = (where * (found - x) ** 2).sum((1, 2, 3)) / where.sum((1, 2, 3))
  gap = np.asarray(task.operator.apply(jnp.asarray(found)) - measured(task, x))
  seen = 1.0 if task.hidden is None else 1 - where
  gap = np.sqrt((seen * gap**2).sum() / np.broadcast_to(seen, gap.shape).sum())
  words = f"{error.mean():.4f} +- {error.std(ddof=1) / len(x) ** 0.5:.4f}"
  print(f"| {task.title} | {method} | {evaluations} | {words} | {gap:.4f} |", flush=True)


def show(axis: Any, task: Task, rows: dict[str, np.ndarray]) -> None:
  shown = tile(np.concatenate([row[:COLUMNS] for row in rows.values()]), COLUMNS)
  axis.imshow(np.broadcast_to(shown, (*shown.shape[:2], 3)), interpolation="nearest")
  height = next(iter(rows.values())).shape[1] + 1
  axis.set(xticks=[], yticks=[height * (k + 0.5) for k in range(len(rows))], title=task.title)
  axis.set_yticklabels(list(rows))
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name", choices=("fashion", "emoji"))
  parser.add_argument("--model", type=Path, required=True, help="workdir of the trained run")
  parser.add_argument("--data", help="where the data lie, if not where they were")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent)
  options = parser.parse_args()
  sde, score, x = load(options.model, options.data)
  found = tasks(options.name, x.shape[1:])
  figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), layout="constrained")
  print("| seen | method | evaluations | mean squared error | rms of A x - y |\n|---|---|---|---|---|")
  for axis, task in zip(axes, found, strict=True):
    y = measured(task, x)
    seen = jnp.where(task.hidden == 1, 0.0, y) if task.hidden is not None else y
    seen = np.asarray(jax.image.resize(seen, (len(y), *x.shape[1:3], y.shape[-1]), "nearest"))
    rows = {"truth": x, "seen": np.broadcast_to(seen, x.shape), "no network": np.asarray(task.simple(y))}
    report(task, x, rows["no network"], "no network", 0)
    for method in ("PiGDM", task.other):
      rows[method], evaluations = restore(task, sde, score, x, method)
      report(task, x, rows[method], method, evaluations)
    rows["again"] = restore(task, sde, score, x[:COLUMNS], "PiGDM", seed=1)[0]
    show(axis, task, {words: rows[words] for words in ORDER if words in rows})
  figure.savefig(options.out / f"{options.name}.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
  main()
