"""What guidance gives and takes: accuracy, distance to the data, precision and recall over the scale.

python experiments/guidance/figure.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
TITLES = {"digits": "digits, 8x8", "fashion": "Fashion-MNIST, 28x28"}
LINES = {
  "free": ("classifier-free", "tab:blue", "o-"),
  "interval": ("classifier-free, in an interval", "tab:cyan", "s--"),
  "classifier": ("classifier", "tab:red", "^-"),
  "both": ("classifier beside the label", "tab:orange", "v--"),
}
STARTS = {"interval": {1}, "both": {1}, "classifier": {0}}  # scales at which they are the network of "free"


def draw_row(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
  """Three panels of one data set."""
  held_out = next(row for row in rows if row["way"] == "held-out data")
  for way, (words, colour, style) in LINES.items():
    if not any(row["way"] == way for row in rows):
      continue
    start = STARTS.get(way, set())
    of = [row for row in rows if row["way"] == way or (row["way"] == "free" and row["scale"] in start)]
    of = sorted(of, key=lambda row: row["scale"])
    scales = [row["scale"] for row in of]
    column = lambda name, of=of: [row[name] for row in of]
    for axis, name in zip(axes, ("accuracy", "fd_cnn"), strict=False):
      bars = [2 * row[f"{name}_se"] for row in of]
      axis.errorbar(scales, column(name), bars, fmt=style, color=colour, markersize=4, capsize=2, label=words)
    guided = [row for row in of if row["scale"] >= 1]
    recall, precision = ([row[name] for row in guided] for name in ("recall", "precision"))
    axes[2].plot(recall, precision, style, color=colour, markersize=4, label=words)
    if way in ("free", "classifier"):
      for row in guided:
        axes[2].annotate(
          f"{row['scale']:g}",
          (row["recall"], row["precision"]),
          (4, 4),
          textcoords="offset points",
          fontsize=7,
          color=colour,
        )
  axes[0].axhline(held_out["accuracy"], color="grey", linestyle=":", label="held-out data")
  axes[0].set(ylabel=f"{title}\n\nshare, as the judge sees it", ylim=(0, 1.03))
  axes[1].set(ylabel="FD-cnn to the training data", ylim=0)
  axes[2].set(xlabel="recall (diversity)", ylabel="precision (quality)")
  for axis in axes[:2]:
    axis.set(xlabel="scale of guidance")


def main() -> None:
  figure, axes = plt.subplots(len(TITLES), 3, figsize=(12, 3.6 * len(TITLES)), layout="constrained", squeeze=False)
  for line, (name, title) in zip(axes, TITLES.items(), strict=True):
    rows = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    draw_row(line, title, rows)
  for axis, title in zip(
    axes[0],
    ("Of the class they were told", "Far from the data", "Quality against diversity, by scale"),
    strict=True,
  ):
    axis.set_title(title)
  axes[0, 0].legend(fontsize=8)
  figure.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
  main()
