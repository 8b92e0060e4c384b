"""Pictures of a run: samples, denoising trajectories and the loss, as PNG files; the path to the samples as a GIF."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image

from jaxdiff.data.transforms import to_uint8

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

_SMALLEST = 480
_FRAME, _LAST_FRAME = 60, 2000  # milliseconds


def tile(images: Float[np.ndarray, "n h w c"], columns: int) -> np.ndarray:
  """Images in [-1, 1] as one uint8 picture with `columns` a row, a gap of one pixel between them.

  Args:
    images: `[n, h, w, c]` with c = 1 or 3.
    columns: images a row.

  Returns:
    uint8 `[rows (h + 1) + 1, columns (w + 1) + 1, c]`, white between the images.
  """
  n, h, w, c = images.shape
  rows = -(-n // columns)
  pixels = np.asarray(to_uint8(jnp.asarray(images)))
  canvas = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 255, np.uint8)
  for k in range(n):
    top, left = (k // columns) * (h + 1) + 1, (k % columns) * (w + 1) + 1
    canvas[top : top + h, left : left + w] = pixels[k]
  return canvas


def save_grid(path: Path, images: Float[np.ndarray, "n h w c"], columns: int) -> None:
  """Write images as a PNG grid, enlarged by a whole factor so that small ones can be seen."""
  _picture(images, columns).save(path)


def _picture(images: np.ndarray, columns: int) -> Image.Image:
  canvas = tile(images, columns)
  factor = max(1, -(-_SMALLEST // max(canvas.shape[:2])))
  canvas = canvas.repeat(factor, axis=0).repeat(factor, axis=1)
  return Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas)


def save_animation(path: Path, states: Float[np.ndarray, "k n *d"], columns: int) -> None:
  """Write the path from the prior to the samples as a GIF: grids of images, or points in the plane."""
  frames = _clouds(states) if states.shape[2:] == (2,) else [_picture(images, columns) for images in states]
  durations = [_FRAME] * (len(frames) - 1) + [_LAST_FRAME]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _clouds(states: np.ndarray) -> list[Image.Image]:
  low, high = states[-1].min(axis=0) - 0.5, states[-1].max(axis=0) + 0.5
  figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
  canvas = FigureCanvasAgg(figure)
  points = axis.scatter(states[0, :, 0], states[0, :, 1], s=3, alpha=0.5, linewidths=0)
  axis.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
  frames = []
  for state in states:
    points.set_offsets(state)
    canvas.draw()
    frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
  plt.close(figure)
  return frames


def save_neighbours(
  path: Path,
  samples: Float[np.ndarray, "n h w c"],
  train: Float[np.ndarray, "m h w c"],
  near: Int[np.ndarray, "n k"],
) -> None:
  """Write a PNG with a row for each sample: the sample, then its nearest training images as `near` numbers them."""
  rows = np.concatenate([samples[:, None], train[near]], axis=1)
  save_grid(path, rows.reshape(-1, *samples.shape[1:]), columns=rows.shape[1])


def save_pairs(path: Path, x: Float[np.ndarray, "n h w c"], y: Float[np.ndarray, "n h w c"], columns: int = 8) -> None:
  """Write rows of images x, and below each row what became of them, y."""
  rows = [part[k : k + columns] for k in range(0, len(x), columns) for part in (x, y)]
  save_grid(path, np.concatenate(rows), columns=columns)


def save_samples(path: Path, x: Float[np.ndarray, "n *d"], reference: Shaped[np.ndarray, "m *d"]) -> None:
  """Write images as a square grid, or points in the plane beside those of the data."""
  if x.shape[1:] == (2,):
    save_scatter(path, x, reference)
  else:
    save_grid(path, x, columns=round(len(x) ** 0.5))


def save_scatter(path: Path, points: Float[np.ndarray, "n 2"], reference: Float[np.ndarray, "m 2"]) -> None:
  """Write samples in the plane beside the data, to the same scale."""
  low, high = np.quantile(reference, [0.0, 1.0], axis=0)
  figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharex=True, sharey=True)
  for axis, values, title in zip(axes, (reference, points), ("data", "samples"), strict=True):
    axis.scatter(values[:, 0], values[:, 1], s=3, alpha=0.5, linewidths=0)
    axis.set(title=title, aspect="equal", xlim=(low[0] - 0.5, high[0] + 0.5), ylim=(low[1] - 0.5, high[1] + 0.5))
  figure.savefig(path, dpi=120)
  plt.close(figure)


def save_paths(path: Path, states: Float[np.ndarray, "k n 2"], reference: Float[np.ndarray, "m 2"]) -> None:
  """Write trajectories in the plane from the prior (open circles) to the samples (dots), over the data."""
  figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
  axis.scatter(reference[:, 0], reference[:, 1], s=2, color="0.8", linewidths=0)
  for k in range(states.shape[1]):
    (line,) = axis.plot(*states[:, k].T, linewidth=0.8)
    axis.plot(*states[0, k], "o", markerfacecolor="none", color=line.get_color())
    axis.plot(*states[-1, k], "o", color=line.get_color())
  axis.set(aspect="equal", title="from noise (open) to sample (full)")
  figure.savefig(path, dpi=120)
  plt.close(figure)


def save_loss(path: Path, steps: Sequence[int], loss: Sequence[float], label: str) -> None:
  """Write the training loss over the steps."""
  figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
  axis.plot(steps, loss, linewidth=1)
  axis.set(xlabel="step", ylabel=label, title="training loss")
  axis.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def save_accuracy(
  path: Path, log_snr: Float[np.ndarray, " k"], accuracy: Float[np.ndarray, " k"], chance: float, title: str
) -> None:
  """Write how often a classifier is right against the log-SNR of what it sees, with what the commonest class gives."""
  figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
  axis.plot(log_snr, accuracy, marker="o", linewidth=1, markersize=3)
  axis.axhline(chance, color="0.5", linestyle="--", linewidth=1, label="the commonest class")
  axis.set(xlabel="log-SNR, log(alpha^2 / sigma^2)", ylabel="accuracy", ylim=(0, 1), title=title)
  axis.grid(alpha=0.3)
  axis.legend()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def save_histograms(path: Path, values: Mapping[str, Float[np.ndarray, " n"]], label: str, title: str) -> None:
  """Write histograms of numbers in one frame and on the same bins, each with its mean; what is not finite is left out.

  Args:
    path: of the PNG.
    values: by the name of what they are of.
    label: what the numbers are, with their unit.
    title: above all.
  """
  finite = {name: x[np.isfinite(x)] for name, x in values.items()}
  finite = {name: x for name, x in finite.items() if len(x)}
  figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
  every = np.concatenate([*finite.values(), np.empty(0)])
  for k, (name, x) in enumerate(finite.items()):
    bins = np.histogram_bin_edges(every, bins=max(10, min(80, len(every) // 10)))
    axis.hist(x, bins.tolist(), density=True, alpha=0.6, color=f"C{k}", label=f"{name}: {len(x)} examples")
    axis.axvline(x.mean(), color=f"C{k}", linestyle="--", label=f"mean {x.mean():.4g}")
  axis.set(xlabel=label, ylabel="density", title=title)
  if finite:
    axis.legend()
  figure.savefig(path, dpi=120)
  plt.close(figure)
