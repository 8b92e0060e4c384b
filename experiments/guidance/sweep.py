"""Guided samples over the scale of guidance: are they of their class, like the data, and as varied as the data?

    python experiments/guidance/sweep.py digits --model=DIR --classifier=DIR
    python experiments/guidance/sweep.py fashion --model=DIR --classifier=DIR

Four ways to guide one network, which knows labels and the want of one; at scale 1 they all aim at p(x | label):

    free         classifier-free
    interval     classifier-free, where 0.2 < sigma / alpha <= 5, else the label alone
    classifier   scale times the gradient of a classifier of noised images, on the network without the label
    both         scale - 1 times that gradient, on the network with the label

All start from the same noise. A judge that saw clean images alone, with another seed and other layers than the
classifier that guides, says how many samples are of their class. Writes NAME.jsonl and NAME.png.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import jaxdiff.cli  # before jax: it sets the XLA flags that the command line runs with

# isort: split
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxdiff as jd
from jaxdiff import factory, keys, models, rundir
from jaxdiff.data.examples import Source
from jaxdiff.evaluation import classifier, distances, features, neighbours
from jaxdiff.evaluation.pictures import tile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WAYS = {
  "free": "classifier-free",
  "interval": "the same in an interval",
  "classifier": "classifier",
  "both": "classifier beside the label",
}
SCALES = {
  "digits": {
    "free": (0, 0.5, 1, 1.5, 2, 3, 5, 8),
    "interval": (2, 3, 5, 8),
    "classifier": (0.5, 1, 1.5, 2, 3, 5, 8),
    "both": (2, 3, 5, 8),
  },
  "fashion": {"free": (0, 1, 2, 4), "classifier": (1, 2, 4, 8)},
}
NUMBER = {"digits": 1000, "fashion": 250}
SHOWN = (0, 1, 2, 4, 8)
LOW, HIGH = 0.2, 5.0
STEPS, BATCH, REFERENCE, BOOTSTRAPS = 20, 250, 10_000, 20
FEATURES_SEED, JUDGE_SEED = 0, 1

Draw = Callable[[str, float, int, np.ndarray], Any]


def read(workdir: Path, data: str | None) -> Any:
  """The config of a run, with another place of the data if they are there."""
  config = factory.read(workdir / "config.json")
  return config | {"data": config["data"] | {"path": data}} if data else config


def make_draw(model: Path, classifying: Path, data: str | None) -> Draw:
  """`draw(way, scale, start, label [b]) -> Sample` of the examples start, start + 1, .. with these labels."""
  config, other = (read(path, data) for path in (model, classifying))
  (source, params, _), (_, noisy, _) = rundir.load(model, config), rundir.load(classifying, other)
  sde, prediction, apply = factory.make_process(config), factory.make_prediction(config), factory.make_apply(config)
  null = models.conditioning.null(factory.make_network(config).conditions)
  sampler = jd.samplers.dpm_solver_pp(sde, jd.time_grid(sde, STEPS))
  classify = factory.make_network(other).apply

  def unlabelled(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return apply(params, x, t, label=jnp.full(len(x), null["label"]))

  def score(way: str, params: Any, noisy: Any, scale: jax.Array) -> Any:
    labelled, log_prob = jd.score_fn(apply, params, sde, prediction), jd.guidance.log_probability(classify, noisy)
    if way == "free":
      return jd.guidance.classifier_free(labelled, null, scale)
    if way == "interval":
      return jd.guidance.classifier_free(labelled, null, jd.guidance.interval(sde, scale, LOW, HIGH))
    if way == "both":
      return jd.guidance.classifier(labelled, log_prob, scale - 1)
    nothing = jd.guidance.without(jd.score_fn(unlabelled, params, sde, prediction), "label")
    return jd.guidance.classifier(nothing, log_prob, scale)

  @functools.partial(jax.jit, static_argnums=0)
  def run(way: str, params: Any, noisy: Any, scale: jax.Array, start: jax.Array, label: jax.Array) -> Any:
    prior_key, path_key = keys.split(jd.example_keys(jax.random.key(0), start, len(label)))
    x = sde.prior_sample(prior_key, (len(label), *source.shape))
    return sampler(path_key, x, score(way, params, noisy, scale), {"label": label})

  return lambda way, scale, start, label: run(way, params, noisy, jnp.float32(scale), start, label)


def make_measure(train: Source) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
  """`measure(x, label)`: what the judge says of images, and how they lie beside those of training."""
  data = train.gather(np.arange(len(train)))
  values = lambda x: features.to_values(x, train.levels)
  space = features.cnn(data["x"], data["label"], train.levels, FEATURES_SEED)
  judge = classifier.fit(np.asarray(values(data["x"])), data["label"], JUDGE_SEED)
  extract = jax.jit(lambda x: space.apply(space.params, values(x)))
  judged = jax.jit(lambda x: classifier.Classifier(10).apply(judge, values(x))[1].argmax(axis=1))
  batched = lambda of, x: np.concatenate([np.asarray(of(x[k : k + BATCH])) for k in range(0, len(x), BATCH)])
  rows = np.random.default_rng(0).permutation(len(train))[:REFERENCE]
  reference = batched(extract, data["x"][rows])
  target = distances.moments(reference)

  def measure(x: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    found, right = batched(extract, x), batched(judged, x) == label
    distance = lambda found: distances.frechet_distance(target, distances.moments(found))
    drawn = np.random.default_rng(0).integers(len(x), size=(BOOTSTRAPS, len(x)))
    return {
      "n": len(x),
      "accuracy": float(right.mean()),
      "accuracy_se": float(right.std() / len(x) ** 0.5),
      "fd_cnn": distance(found),
      "fd_cnn_se": float(np.std([distance(found[rows]) for rows in drawn], ddof=1)),
      **neighbours.overlap(reference[: len(x)], found)._asdict(),
    }

  return measure


def sweep(name: str, draw: Draw, measure: Callable[..., Any], levels: int) -> tuple[list[Any], dict[Any, np.ndarray]]:
  """A row of numbers for every way and scale, and the samples, by both."""
  count, rows, samples = NUMBER[name], [], {}
  label = np.arange(count) % 10
  for way, scales in SCALES[name].items():
    for scale in scales:
      start = perf_counter()
      parts = [draw(way, scale, k, label[k : k + BATCH]) for k in range(0, count, BATCH)]
      x = features.to_levels(np.concatenate([np.asarray(part.x) for part in parts]), levels)
      row = {"way": way, "scale": scale, "nfe": int(parts[0].nfe[0]), "seconds": round(perf_counter() - start, 1)}
      rows.append(row | measure(x, label))
      print(json.dumps(rows[-1]), flush=True)
      samples[way, scale] = x
  return rows, samples


def save_picture(path: Path, samples: dict[Any, np.ndarray], levels: int) -> None:
  """The first two samples of every class, of the same noise in all rows."""
  rows = {f"{WAYS[way]}, {scale:g}": x[:20] for (way, scale), x in samples.items() if scale in SHOWN}
  shown = tile(np.asarray(features.to_values(np.concatenate(list(rows.values())), levels)), 20)
  figure, axis = plt.subplots(figsize=(11, 0.42 * len(rows)), layout="constrained")
  axis.imshow(shown[..., 0], cmap="gray", interpolation="nearest")
  height = shown.shape[0] / len(rows)
  axis.set(xticks=[], yticks=[height * (k + 0.5) for k in range(len(rows))])
  axis.set_yticklabels(rows, fontsize=8)
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)
  figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name", choices=tuple(SCALES))
  parser.add_argument("--model", type=Path, required=True, help="workdir of the network that is told labels")
  parser.add_argument("--classifier", type=Path, required=True, help="workdir of the classifier of noised images")
  parser.add_argument("--data", help="where the data lie, if not where they were")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent)
  options = parser.parse_args()
  config = read(options.model, options.data)
  train, test = (factory.make_source(config, split) for split in ("train", "test"))
  measure, count = make_measure(train), min(NUMBER[options.name], len(test))
  held_out = test.gather(np.arange(count))
  rows, samples = sweep(options.name, make_draw(options.model, options.classifier, options.data), measure, train.levels)
  rows.append({"way": "held-out data", **measure(held_out["x"], held_out["label"])})
  rows.append({"way": "as many samples at scale 1", **measure(samples["free", 1][:count], np.arange(count) % 10)})
  print(json.dumps(rows[-2]), json.dumps(rows[-1]), sep="\n")
  lines = "\n".join(json.dumps(row) for row in rows)
  (options.out / f"{options.name}.jsonl").write_text(lines + "\n", encoding="utf-8")
  save_picture(options.out / f"{options.name}.png", samples, train.levels)


if __name__ == "__main__":
  main()
