"""Whether conditions matter on held-out emoji: losses with true, exchanged and no conditions, and pictures.

    python experiments/conditioning/conditioning.py --text=DIR --color=DIR --large=DIR

Of every held-out image and noise level the network is given the same noise with three conditions: the true one, that
of another held-out image, and, for the text, none. The error is that of the denoised image, the mean of squares over
pixels and colours in [-1, 1]. Standard errors are of paired differences, with all skin tones of an emoji as one draw.
"""

import argparse
import functools
import json
import textwrap
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
from jaxdiff import factory, keys, likelihood, rundir
from jaxdiff.data.examples import Source
from jaxdiff.data.text import decode_text
from jaxdiff.evaluation.pictures import tile
from jaxdiff.losses import times
from jaxdiff.models import conditioning

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEVELS = np.geomspace(0.1, 20, 8)  # sigma / alpha
BATCH, COLUMNS, GUIDANCE = 100, 12, 3.0
TITLES = {"text": "captions", "color": "brightness, for colours", "large": "16x16, for 32x32"}


class Run(NamedTuple):
  """A trained network, its config, its conditions of a batch, and their null."""

  config: Any
  params: Any
  cond: Callable[..., dict[str, jax.Array]]
  null: dict[str, Any]


def load(workdir: Path, held_out: Source) -> Run:
  config = factory.read(workdir / "config.json")
  _, params, step = rundir.load(workdir, config)
  made = factory.make_network(config)
  print(f"{workdir.name}: {step} steps, {sum(p.size for p in jax.tree.leaves(params)):,} parameters")
  return Run(config, params, factory.make_cond(config, held_out), conditioning.null(made.conditions))


def exchanged(cond: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of every example the condition of another: of the next in a fixed random order."""
  order = np.random.default_rng(1).permutation(len(next(iter(cond.values()))))
  other = np.empty_like(order)
  other[order] = np.roll(order, 1)
  return {name: value[other] for name, value in cond.items()}


def errors(run: Run, batch: dict[str, np.ndarray], cond: dict[str, np.ndarray]) -> np.ndarray:
  """Errors of the denoised images: [levels, n]; the noise depends on the level and the example alone."""
  sde, prediction = factory.make_process(run.config), factory.make_prediction(run.config)
  apply = factory.make_apply(run.config)

  @jax.jit
  def one(params: Any, level: jax.Array, example_keys: Any, x: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
    data_key, loss_key = keys.split(example_keys)
    x = likelihood.dequantize(data_key, x, 256)
    loss = jd.losses.denoising(sde, prediction, time=times.fixed(sde.time_of_log_snr(-2 * jnp.log(level))))
    return loss(loss_key, x, functools.partial(apply, params), cond)[1]["noise_error"] * level**2

  rows = []
  for number, level in enumerate(LEVELS):
    parts = []
    for start in range(0, len(batch["x"]), BATCH):
      piece = slice(start, start + BATCH)
      drawn = jd.example_keys(jax.random.key(number), start, len(batch["x"][piece]))
      there = {name: value[piece] for name, value in cond.items()}
      parts.append(np.asarray(one(run.params, jnp.float32(level), drawn, batch["x"][piece], there)))
    rows.append(np.concatenate(parts))
  return np.array(rows)


def standard_error(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Of the mean over the last axis, when examples come in groups that were drawn together."""
  members = np.eye(groups.max() + 1)[groups]
  sums = (values - values.mean(axis=-1, keepdims=True)) @ members
  count = members.shape[1]
  return np.sqrt(count / (count - 1) * (sums**2).sum(axis=-1)) / values.shape[-1]


def compare(name: str, run: Run, batch: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
  """Prints and returns the errors with true, exchanged and, for a text, no conditions."""
  true = jax.tree.map(np.asarray, run.cond(batch))
  told = {"true": true, "exchanged": exchanged(true)}
  if name == "text":
    told["none"] = {key: np.full_like(value, run.null[key]) for key, value in true.items()}
  found = {how: errors(run, batch, cond) for how, cond in told.items()}
  print(f"\n{TITLES[name]}: n = {len(groups)} in {groups.max() + 1} groups")
  if name != "text":
    error = np.mean((enlarged(true, batch, "linear") - pictures(batch)) ** 2)
    print(f"the condition itself in place of the denoised image: {error:.5f}")
  others = [how for how in found if how != "true"]
  print("sigma/alpha      true  " + "  ".join(f"{how + ' - true':>32}" for how in others))
  for k, level in enumerate(LEVELS):
    line = f"{level:11.3f}  {found['true'][k].mean():8.5f}  "
    print(line + "  ".join(_in_words(found[how][k] - found["true"][k], found["true"][k], groups) for how in others))
  return found


def _in_words(gap: np.ndarray, true: np.ndarray, groups: np.ndarray) -> str:
  error = standard_error(gap, groups)
  return f"{gap.mean():+9.5f} +- {error:.5f} ({100 * gap.mean() / true.mean():+5.1f} %)"


def by_category(found: dict[str, np.ndarray], groups: np.ndarray, categories: np.ndarray) -> None:
  """Prints the differences for each kind of emoji, at one level."""
  level = len(LEVELS) - 3
  print(f"\nexchanged - true at sigma/alpha = {LEVELS[level]:.3f}")
  for category in np.unique(categories):
    rows = categories == category
    true, inside = found["true"][level, rows], np.unique(groups[rows], return_inverse=True)[1]
    gap = found["exchanged"][level, rows] - true
    print(f"{category:20} n = {rows.sum():3} in {inside.max() + 1:2} groups  {_in_words(gap, true, inside)}")


def draw(run: Run, batch: dict[str, np.ndarray], seed: int, guidance: float = 1.0) -> np.ndarray:
  """A sample for each example of the batch, given its condition.

  With a guidance w other than 1 the score is s(null) + w (s(cond) - s(null)) (Ho and Salimans 2022, eq. 6).
  """
  process = factory.make_process(run.config)
  sampler, score_of = factory.make_sampler(run.config, process), factory.make_score(run.config)

  @jax.jit
  def sample(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    score, cond = score_of(params), run.cond(batch)

    def guided(x: jax.Array, t: jax.Array, **cond: jax.Array) -> jax.Array:
      nothing = score(x, t, **{name: jnp.full_like(value, run.null[name]) for name, value in cond.items()})
      return nothing + guidance * (score(x, t, **cond) - nothing)

    prior_key, path_key = keys.split(jd.example_keys(jax.random.key(seed), 0, len(batch["x"])))
    x = process.prior_sample(prior_key, batch["x"].shape)
    return sampler(path_key, x, score if guidance == 1 else guided, cond).x

  return np.asarray(sample(run.params, batch))


def pictures(batch: dict[str, np.ndarray]) -> np.ndarray:
  """The images themselves, in [-1, 1]."""
  return (batch["x"].astype(np.float32) + 0.5) / 128 - 1


def enlarged(cond: dict[str, Any], batch: dict[str, np.ndarray], method: str) -> np.ndarray:
  """The image that is the condition, of the size and with the colours of x."""
  (told,) = cond.values()
  told = jax.image.resize(jnp.asarray(told), (*batch["x"].shape[:3], told.shape[-1]), method)
  return np.broadcast_to(np.asarray(told), batch["x"].shape)


def chosen(batch: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
  """The first examples of different groups, in the order of the split, which is random."""
  rows = np.sort(np.unique(groups, return_index=True)[1])[:COLUMNS]
  return {name: value[rows] for name, value in batch.items()}


def show_rows(axis: Any, rows: list[np.ndarray], words: list[str]) -> None:
  axis.imshow(tile(np.concatenate(rows), len(rows[0])), interpolation="nearest")
  height = rows[0].shape[1] + 1
  axis.set(xticks=[], yticks=[height * (k + 0.5) for k in range(len(rows))])
  axis.set_yticklabels(words, fontsize=8)
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)


def save_texts(path: Path, run: Run, batch: dict[str, np.ndarray]) -> None:
  """Samples for captions, with and without guidance."""
  rows = [draw(run, batch, seed=0), draw(run, batch, seed=1)]
  rows += [draw(run, batch, seed=0, guidance=GUIDANCE), draw(run, batch, seed=1, guidance=GUIDANCE), pictures(batch)]
  words = ["sample", "another", f"guidance {GUIDANCE:g}", "another", "original"]
  figure, axis = plt.subplots(figsize=(12, 5.8), layout="constrained")
  show_rows(axis, rows, words)
  for k, text in enumerate(decode_text(batch["text"])):
    axis.text(33 * (k + 0.5), -2, textwrap.fill(text, 15), ha="center", va="bottom", fontsize=7)
  figure.savefig(path, dpi=100)


def save_images(path: Path, runs: dict[str, Run], batch: dict[str, np.ndarray]) -> None:
  """Colorized and enlarged images."""
  figure, axes = plt.subplots(2, 1, figsize=(12, 9.2), layout="constrained")
  for axis, (name, run) in zip(axes, runs.items(), strict=True):
    shown = enlarged(run.cond(batch), batch, "nearest")
    show_rows(
      axis,
      [shown, draw(run, batch, seed=0), draw(run, batch, seed=1), pictures(batch)],
      ["given", "sample", "another", "original"],
    )
    axis.set_title(TITLES[name], fontsize=9)
  figure.savefig(path, dpi=100)


def save_effects(path: Path, found: dict[str, dict[str, np.ndarray]], groups: np.ndarray) -> None:
  """What the true condition saves of the error, by noise level."""
  figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), layout="constrained")
  for axis, (name, of) in zip(axes, found.items(), strict=True):
    mean = of["true"].mean(axis=-1)
    for how in [how for how in of if how != "true"]:
      gap = of[how] - of["true"]
      bars = 2 * standard_error(gap, groups) / mean
      axis.errorbar(LEVELS, gap.mean(axis=-1) / mean, bars, marker="o", markersize=3, capsize=2, label=how)
    axis.axhline(0, color="grey", linewidth=0.6)
    axis.set(xscale="log", xlabel="sigma / alpha", title=TITLES[name])
    axis.legend(title="condition", fontsize=8)
  axes[0].set_ylabel("more error than with the true one,\nas a share of it (+- 2 s.e.)")
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in TITLES:
    parser.add_argument(f"--{name}", type=Path, required=True, help="workdir of the trained run")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent)
  options = parser.parse_args()
  data = factory.read(options.text / "config.json")
  held_out = factory.make_source(data, "test")
  batch = held_out.gather(np.arange(len(held_out)))
  lines = (Path(data["data"]["path"]) / "test.jsonl").read_text(encoding="utf-8").splitlines()
  said = [json.loads(line) for line in lines]
  groups = np.unique([each["name"] for each in said], return_inverse=True)[1]
  runs = {name: load(getattr(options, name), held_out) for name in TITLES}
  found = {name: compare(name, run, batch, groups) for name, run in runs.items()}
  by_category(found["text"], groups, np.array([each["category"] for each in said]))
  save_effects(options.out / "effect.png", found, groups)
  few = chosen(batch, groups)
  save_texts(options.out / "text.png", runs.pop("text"), few)
  save_images(options.out / "images.png", runs, few)


if __name__ == "__main__":
  main()
