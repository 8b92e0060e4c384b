"""All samplers side by side, on a density in the plane and on digits: gallery.png.

    python experiments/samplers/gallery.py --toy2d=runs/toy2d --digits=runs/digits

Each column is one sampler of the command line, at its own number of network evaluations; each row one trained run. The
noise they start from is the same. What a run's config says of its sampler is not used.
"""

import argparse
from pathlib import Path
from typing import Any

import jaxdiff.cli  # noqa: F401  before jax: it sets the XLA flags that the command line runs with

# isort: split
import matplotlib
import numpy as np

from jaxdiff import components, factory, parallel, rundir, schema
from jaxdiff.evaluation import runs
from jaxdiff.evaluation.pictures import tile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = {"reverse_sde": 500, "reverse_diffusion": 500, "ancestral": 500, "predictor_corrector": 250}
STEPS |= {"stochastic_heun": 100, "ddim": 50, "dpm_solver": 15, "dpm_solver_pp": 25, "unipc": 20, "edm": 25}
FREE = {"probability_flow": {"rtol": 1e-4, "atol": 1e-4}, "adaptive_sde": {"rtol": 1e-2, "atol": 1e-2}}


def section(kind: str) -> dict[str, Any]:
  """The config section of a sampler."""
  return {"type": kind, **FREE.get(kind, {}), **({"grid": {"steps": STEPS[kind]}} if kind in STEPS else {})}


def draw(workdir: Path, kind: str, num: int) -> tuple[np.ndarray, float, np.ndarray]:
  """Samples of a run by this sampler, its mean number of evaluations, and data."""
  config = factory.read(workdir / "config.json") | {"sampler": section(kind)}
  schema.check_sections(config)
  source, params, _ = rundir.load(workdir, config)
  process = factory.make_process(config, params)
  sampler, score = factory.make_sampler(config, process), factory.make_score(config)
  mesh = parallel.make_mesh()
  drawn = runs.draw(score, params, process, sampler, source.shape, num, min(num, 500), 0, mesh)
  if drawn["code"].any():
    raise SystemExit(f"{kind} failed on {workdir}")
  return drawn["x"], float(drawn["nfe"].mean()), source.gather(np.arange(num))["x"]


def show(axis: Any, x: np.ndarray) -> None:
  """Points in the plane, or images as a grid."""
  axis.set(xticks=[], yticks=[])
  if x.shape[1:] == (2,):
    axis.scatter(*x.T, s=0.6, alpha=0.6, linewidths=0)
    axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
  else:
    axis.imshow(tile(x, 5)[..., 0], cmap="gray")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--toy2d", type=Path, required=True, help="workdir of a trained run in the plane")
  parser.add_argument("--digits", type=Path, required=True, help="workdir of a trained run on grey images")
  parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gallery.png")
  options = parser.parse_args()
  kinds = [kind for kind in components.SAMPLERS if kind in STEPS or kind in FREE]
  columns = -(-(len(kinds) + 1) // 2)
  figure, axes = plt.subplots(4, columns, figsize=(2 * columns, 8.6), layout="constrained")
  for row, (workdir, num) in enumerate(((options.toy2d, 2000), (options.digits, 25))):
    cells = [axes[row + 2 * (k // columns), k % columns] for k in range(2 * columns)]
    for axis, kind in zip(cells, kinds, strict=False):
      x, nfe, data = draw(workdir, kind, num)
      show(axis, x)
      axis.set_title(f"{kind}\n{nfe:.0f} evaluations" if row == 0 else f"{nfe:.0f} evaluations", fontsize=8)
      print(f"{workdir.name:<10} {kind:<22} {nfe:6.0f} evaluations", flush=True)
    show(cells[len(kinds)], data if data.ndim == 2 else 2 * (data + 0.5) / 17 - 1)
    cells[len(kinds)].set_title("data", fontsize=8)
    for axis in cells[len(kinds) + 1 :]:
      axis.axis("off")
  figure.savefig(options.out, dpi=130)
  print(options.out)


if __name__ == "__main__":
  main()
