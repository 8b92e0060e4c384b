"""The spread of trace estimators on trained networks: table on stdout, figure spread.png.

    python experiments/trace_estimators/spread.py --workdir runs/digits runs/patches [--mixture]

For held-out examples of each run, in bits per dimension: the standard deviation of one estimate of log p over the
probes, its root mean square over the examples. All probes of a table share one solve. Then estimators at 16 products
an evaluation, and the time of an evaluation. `--mixture`: also the exact score of a Gaussian mixture fitted to grey
12 x 12 crops of the last run's images, on samples of it.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxdiff.cli

# isort: split
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxdiff as jd
from jaxdiff import divergence, factory, likelihood, rundir
from jaxdiff.divergence import Divergence

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COVARIANCE_EXAMPLES = 20_000
PRODUCTS = 16
TOLERANCE = 1e-4
COMPONENTS, CROP = 8, 12


class Model(NamedTuple):
  """A score with its process, and data as it sees them: to fit a covariance to, and held-out ones."""

  name: str
  sde: Any
  score: Callable[[Any], Any]
  params: Any
  train: jax.Array
  test: jax.Array


def of_run(workdir: Path, examples: int) -> Model:
  config = factory.read(workdir / "config.json")
  source, params, step = rundir.load(workdir, config)
  print(f"{workdir.name}: {source.name} {source.shape}, step {step}", flush=True)
  dequantized = lambda key, source, n: likelihood.dequantize(
    jax.random.key(key), jnp.asarray(source.gather(np.arange(min(n, len(source))))["x"]), source.levels
  )
  train = dequantized(1, source, COVARIANCE_EXAMPLES)
  test = dequantized(2, factory.make_source(config, "test"), examples)
  return Model(workdir.name, factory.make_process(config, params), factory.make_score(config), params, train, test)


def of_mixture(model: Model) -> Model:
  """The exact score of a mixture fitted to grey crops of the data of another model, and samples of the mixture.

  Crops of other photographs lie between its components, where few of them decide what the mean square is.
  """
  from sklearn.mixture import GaussianMixture

  grey = lambda x: x.mean(axis=-1, keepdims=True)[:, :CROP, :CROP]
  train = grey(model.train)
  mixture = GaussianMixture(COMPONENTS, reg_covar=1e-4, random_state=0, max_iter=20)
  fit = mixture.fit(np.asarray(train).reshape(len(train), -1))
  variances, vectors = np.linalg.eigh(fit.covariances_)
  samples = np.random.default_rng(0).permutation(fit.sample(10 * len(model.test))[0])[: len(model.test)]
  test = jnp.asarray(samples, jnp.float32).reshape(-1, *train.shape[1:])
  params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (fit.weights_, fit.means_, variances, vectors))
  sde = jd.VP()

  def score(params: Any) -> Any:
    weights, means, variances, vectors = params

    def of_example(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
      at = jnp.einsum("kde,kd->ke", vectors, x[None] - alpha * means)
      noised = alpha**2 * variances + sigma**2
      logits = jnp.log(weights) - 0.5 * jnp.sum(at**2 / noised + jnp.log(noised), axis=1)
      return -jnp.einsum("k,kde,ke->d", jax.nn.softmax(logits), vectors, at / noised)

    return lambda x, t: jax.vmap(of_example)(x.reshape(len(x), -1), *sde.marginal(t)).reshape(x.shape)

  return Model("mixture", sde, score, params, train, test)


def solve(model: Model, trace: Divergence, key: jax.Array) -> Any:
  """The log-densities of the held-out examples."""
  log_prob = likelihood.log_prob(model.sde, trace, TOLERANCE, TOLERANCE)
  result = jax.jit(lambda key, params, x: log_prob(key, x, model.score(params)))(key, model.params, model.test)
  jd.raise_if_failed(result)
  return result


def spreads(model: Model, probes: int) -> dict[str, dict[str, float]]:
  """Standard deviations of one estimate, bits per dimension, by probes and control."""
  in_color = model.test.shape[3:] == (3,)
  colors = {"color DCT": divergence.hutchinson(probes, basis="color_dct")} if in_color else {}
  rows = {
    "pixels": divergence.hutchinson(probes),
    "DCT": divergence.hutchinson(probes, basis="dct"),
    **colors,
    "PCA": divergence.hutchinson(probes, basis=divergence.pca_basis(model.train)),
    "sphere": divergence.hutchinson(probes, "sphere"),
    "Gaussian": divergence.hutchinson(probes, "gaussian"),
  }
  controls = {name: divergence.gaussian_control(model.train, name) for name in ("pca", "dct")}
  estimate = rows["pixels"].estimate

  def repeated(f: Any, x: jax.Array, v: jax.Array, identity: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, estimates = estimate(f, x, v, identity)
    return value, jnp.tile(estimates, (1, 1 + len(controls)))

  def corrections(v: jax.Array, growth: Any) -> jax.Array:
    return jnp.concatenate([jnp.zeros(v.shape[:2]), *(c.correction(v, growth) for c in controls.values())], axis=1)

  integrals = Divergence(
    draw=lambda key, x: jnp.concatenate([row.draw(key, x) for row in rows.values()], axis=1),
    estimate=repeated,
    standard_error=lambda estimates: estimates,  # themselves: their deviations are taken below
    correction=corrections,
  )
  result = solve(model, integrals, jd.example_keys(jax.random.key(0), 0, len(model.test)))
  print(f"{float(jnp.mean(result.nfe)):.0f} evaluations an example", flush=True)
  columns = ["none", *controls]
  deviation = jnp.std(result.standard_error.reshape(-1, len(columns), len(rows), probes), axis=3, ddof=1)
  return {
    row: {column: in_bits(model, deviation[:, k, i]) for k, column in enumerate(columns)} for i, row in enumerate(rows)
  }


def in_bits(model: Model, deviation: jax.Array) -> float:
  return float(jnp.sqrt(jnp.mean(deviation**2))) / (math.prod(model.test.shape[1:]) * math.log(2))


def sketched(model: Model) -> Iterator[tuple[str, tuple[float, float]]]:
  """The standard error of Hutch++ by as many products, and its evaluations."""
  key = jd.example_keys(jax.random.key(0), 0, len(model.test))
  for sketch in (2, 5):
    result = solve(model, divergence.hutchpp(sketch, PRODUCTS - 2 * sketch), key)
    yield f"Hutch++, sketch {sketch}", (in_bits(model, result.standard_error), float(jnp.mean(result.nfe)))


def times(model: Model, batch: int = 16) -> dict[str, float]:
  """Seconds of one evaluation of the flow with its trace; the best of five rounds, interleaved."""
  traces = {
    "1 probe": divergence.hutchinson(),
    "1 probe, DCT": divergence.hutchinson(basis="dct"),
    f"{PRODUCTS} probes": divergence.hutchinson(PRODUCTS),
    "Hutch++, sketch 2": divergence.hutchpp(2, PRODUCTS - 4),
    "Hutch++, sketch 5": divergence.hutchpp(5, PRODUCTS - 10),
  }
  if math.prod(model.test.shape[1:]) <= divergence.EXACT_UP_TO:
    traces["exact"] = divergence.exact()
  x, key, t = model.test[:batch], jd.example_keys(jax.random.key(0), 0, batch), jnp.full(batch, 0.3)

  def compiled(trace: Divergence) -> Callable[[], Any]:
    def run(params: Any, v: Any, x: jax.Array) -> Any:
      drift, _ = jd.reverse(model.sde, model.score(params), eta=0.0)
      return trace.estimate(lambda x: drift(x, t), x, v, jnp.zeros(()))

    made, v = jax.jit(run), trace.draw(key, x)
    return lambda: jax.block_until_ready(made(model.params, v, x))

  runs = {name: compiled(trace) for name, trace in traces.items()}
  best = dict.fromkeys(runs, math.inf)
  for round_ in range(6):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      best[name] = min(best[name], time.perf_counter() - start) if round_ else best[name]
  return best


def report(model: Model, probes: int) -> dict[str, dict[str, float]]:
  """Print the tables of a model in Markdown, each when it is measured; return the first."""
  table = spreads(model, probes)
  print(f"\n{model.name}, {len(model.test)} examples: standard deviation of one estimate, bits/dim\n")
  print("| probes | no control | control, PCA | control, DCT |\n|---|---:|---:|---:|")
  for row, values in table.items():
    print(f"| {row} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |")
  seconds = times(model)
  print("\ntime of an evaluation, relative to one probe\n\n| | |\n|---|---:|")
  for name, value in seconds.items():
    print(f"| {name} | {value / seconds['1 probe']:.2f} |")
  print(f"\nstandard error at {PRODUCTS} products, bits/dim\n\n| estimator | |\n|---|---:|")
  for row in [row for row in table if row not in ("sphere", "Gaussian")]:
    for column in ("none", "pca"):
      print(f"| {row}, {column} control | {table[row][column] / PRODUCTS**0.5:.4f} |")
  print(flush=True)
  for name, (error, nfe) in sketched(model):
    print(f"| {name}, {nfe:.0f} evaluations | {error:.4f} |", flush=True)
  return table


def draw_figure(tables: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
  figure, axes = plt.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.4), layout="constrained", squeeze=False)
  for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
    places = np.arange(len(table))
    for k, (control, label) in enumerate((("none", "no control"), ("pca", "control, PCA"), ("dct", "control, DCT"))):
      axis.bar(places + 0.27 * (k - 1), [row[control] for row in table.values()], 0.25, label=label)
    axis.set(yscale="log", title=name, xticks=places)
    axis.set_xticklabels(table, rotation=30)
  axes[0, 0].set_ylabel("standard deviation of one estimate\nbits/dim")
  axes[0, 0].legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=130)
  print(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=Path, nargs="+", required=True, help="trained runs on images")
  parser.add_argument("--mixture", action="store_true", help="also an exact score, fitted to the last run's data")
  parser.add_argument("--examples", type=int, default=64, help="held-out examples")
  parser.add_argument("--probes", type=int, default=4, help="probes of each kind")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "spread.png")
  options = parser.parse_args()
  models = [of_run(workdir, options.examples) for workdir in options.workdir]
  models += [of_mixture(models[-1])] if options.mixture else []
  draw_figure({model.name: report(model, options.probes) for model in models}, options.out)


if __name__ == "__main__":
  main()
