"""Held-out images restored by networks that were not trained to: pictures, and errors against the truth.

    python experiments/restoration/restoration.py fashion --model=DIR
    python experiments/restoration/restoration.py emoji --model=DIR

An image x is seen as y = A x + noise: a part of it is hidden, or 2x2 or 4x4 pixels are one, or it is blurred, or grey.
Two methods draw samples of p(x | y) with a network of p(x) alone, a conditional one with its null condition, and are
compared with what one would do without a network. Writes NAME.png and prints a table.
"""

import argparse
import functools
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

COUNT, BATCH = 48, 16
STEPS = {"PiGDM": 50, "DPS": 200, "RePaint": 50}


class Task(NamedTuple):
  """What is seen of an image.

  Attributes:
    title: of the pictures.
    operator: A.
    helper: `(sde, sampler, method=..., noise_std=...) -> sampler`, of `jd.inverse`.
    simple: from a measurement to an image, without a network.
    other: the method beside PiGDM.
    noise_std: of the measurement.
    hidden: where the error is measured, [h, w, 1]: 1 there; None everywhere.
  """

  title: str
  operator: Any
  helper: Callable[..., Any]
  simple: Callable[[jax.Array], jax.Array]
  other: str
  noise_std: float = 0.0
  hidden: jax.Array | None = None


def tasks(name: str, shape: tuple[int, ...]) -> list[Task]:
  """The tasks of a data set of images of this shape."""
  enlarge = lambda y: jax.image.resize(y, (len(y), *shape), "linear")
  known = jnp.ones(shape).at[shape[0] // 2 :].set(0) if name == "fashion" else jnp.ones(shape).at[8:24, 8:24].set(0)
  inpaint = Task(
    "lower half hidden" if name == "fashion" else "middle hidden",
    inverse.mask(known),
    functools.partial(inverse.inpainting, mask=known),
    lambda y: jnp.where(known == 1, y, jnp.sum(known * y, (1, 2), keepdims=True) / jnp.sum(known, (0, 1))),
    "RePaint",
    hidden=1 - known,
  )
  larger = lambda factor: Task(
    f"{factor}x{factor} pixels in one",
    inverse.downsample(factor),
    functools.partial(inverse.super_resolution, factor=factor),
    enlarge,
    "DPS",
  )
  if name == "emoji":
    grey = Task(
      "grey", inverse.greyscale(), inverse.colorization, lambda y: jnp.broadcast_to(y, (len(y), *shape)), "DPS"
    )
    return [inpaint, larger(2), larger(4), grey]
  at = jnp.arange(-4, 5)
  bell = jnp.exp(-(at**2) / (2 * 1.5**2))
  kernel = jnp.outer(bell, bell) / jnp.sum(bell) ** 2
  blur = functools.partial(inverse.deblurring, kernel=kernel)
  return [
    inpaint,
    larger(2),
    larger(4),
    Task("blurred, with noise", inverse.blur(kernel), blur, lambda y: y, "DPS", 0.05),
  ]


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


def make_sampler(task: Task, sde: Any, method: str) -> Callable[..., Any]:
  """Samples of the posterior: ancestral steps, guided by the measurement."""
  sampler = jd.samplers.ddim(sde, jd.time_grid(sde, STEPS[method]), eta=1.0)
  return task.helper(sde, sampler, method=method.lower(), noise_std=task.noise_std)


def restore(task: Task, sde: Any, score: Any, x: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, int]:
  """A sample for each measurement, and its evaluations."""
  sampler = make_sampler(task, sde, method)

  @jax.jit
  def run(score: Any, start: jax.Array, y: jax.Array) -> Any:
    prior_key, path_key = keys.split(jd.example_keys(jax.random.key(seed), start, len(y)))
    return sampler(path_key, sde.prior_sample(prior_key, (len(y), *x.shape[1:])), score, {"measurement": y})

  y = measured(task, x)
  parts = [run(score, k, y[k : k + BATCH]) for k in range(0, len(y), BATCH)]
  return np.concatenate([np.asarray(part.x) for part in parts]), int(parts[0].nfe[0])


def measured(task: Task, x: np.ndarray) -> jax.Array:
  y = task.operator.apply(jnp.asarray(x))
  return y + task.noise_std * jax.random.normal(jax.random.key(99), y.shape)


def report(task: Task, x: np.ndarray, found: np.ndarray, method: str, evaluations: int) -> None:
  """Prints a line of the table."""
  where = np.broadcast_to(1.0 if task.hidden is None else task.hidden, x.shape)
  error = (where * (found - x) ** 2).sum((1, 2, 3)) / where.sum((1, 2, 3))
  psnr = 10 * np.log10(4 / error)
  gap = np.asarray(task.operator.apply(jnp.asarray(found)) - measured(task, x))
  seen = 1.0 if task.hidden is None else 1 - where
  gap = np.sqrt((seen * gap**2).sum() / np.broadcast_to(seen, gap.shape).sum())
  words = f"{psnr.mean():.2f} +- {psnr.std(ddof=1) / len(x) ** 0.5:.2f}"
  print(f"| {task.title} | {method} | {evaluations} | {words} | {gap:.4f} |", flush=True)


def show(axis: Any, task: Task, rows: dict[str, np.ndarray], columns: int) -> None:
  shown = tile(np.concatenate([row[:columns] for row in rows.values()]), columns)
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
  figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
  print("| seen | method | evaluations | PSNR, dB | rms of A x - y |\n|---|---|---|---|---|")
  for axis, task in zip(axes.flat, tasks(options.name, x.shape[1:]), strict=True):
    y = measured(task, x)
    seen = jnp.where(task.hidden == 1, 0.0, y) if task.hidden is not None else y
    seen = np.asarray(jax.image.resize(seen, (len(y), *x.shape[1:3], y.shape[-1]), "nearest"))
    rows = {"truth": x, "seen": np.broadcast_to(seen, x.shape), "no network": np.asarray(task.simple(y))}
    report(task, x, rows["no network"], "no network", 0)
    for method in ("PiGDM", task.other):
      for seed, words in enumerate((method, "another")):
        rows[words if seed == 0 else f"{words} {method}"], evaluations = restore(task, sde, score, x, method, seed)
      report(task, x, rows[method], method, evaluations)
    show(axis, task, rows, columns=10)
  figure.savefig(options.out / f"{options.name}.png", dpi=100)


if __name__ == "__main__":
  main()
