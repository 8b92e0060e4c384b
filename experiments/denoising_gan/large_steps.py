"""How far from normal the true denoising distribution is, by the size of the step: large_steps.png and a table.

    python experiments/denoising_gan/large_steps.py [--out FOLDER]

Data are five Gaussians of standard deviation 0.1 on a line, 2 apart. For times s < t of `jd.VP()` with a = alpha_t /
alpha_s and beta = sigma_t^2 - a^2 sigma_s^2,

    q(x_s | x_t) ~ N(x_t; a x_s, beta) sum_k N(x_s; alpha_s m_k, v),     v = alpha_s^2 std^2 + sigma_s^2             (1)

is a mixture of five Gaussians in x_s, known exactly. It is set beside the normal of its own mean and variance: total
variation by the rectangle rule, averaged over x_t by the midpoints of 40 equal parts of each component of q(x_t), and
over the steps t of the chain `Chain(vp_betas(T))`, all of them or 20 evenly spaced.
"""

import argparse
from pathlib import Path

import jax
import matplotlib
import numpy as np
from scipy.special import ndtri

import jaxdiff as jd

matplotlib.use("Agg")
from matplotlib import pyplot

MEANS, STD = 2.0 * np.arange(-2, 3), 0.1
CHAINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SHOWN = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 256)  # step sizes of the figure, all from t = 1/4
PARTS, POINTS = 40, 6001  # of each component of q(x_t); of the grid of x_s
WIDTH, RARE = 8.0, 1e-9  # how many deviations of its components the grid reaches, but for those of less weight


def marginal(t: float) -> tuple[float, float]:
  alpha, sigma = jd.VP().marginal(t)
  return float(alpha), float(sigma)


def conditional(s: float, t: float, x_t: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """Weights `[n, 5]`, means `[n, 5]` and variance of the components of q(x_s | x_t), eq. (1)."""
  (alpha_s, sigma_s), (alpha_t, sigma_t) = marginal(s), marginal(t)
  a, v = alpha_t / alpha_s, (alpha_s * STD) ** 2 + sigma_s**2
  beta = sigma_t**2 - (a * sigma_s) ** 2
  away = x_t[:, None] - alpha_t * MEANS
  log_weight = -0.5 * away**2 / (a**2 * v + beta)
  weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
  return (
    weight / weight.sum(axis=1, keepdims=True),
    alpha_s * MEANS + a * v / (a**2 * v + beta) * away,
    v * beta / (a**2 * v + beta),
  )


def normal(x: np.ndarray, mean: np.ndarray, variance: np.ndarray | float) -> np.ndarray:
  return np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def densities(s: float, t: float, x_t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Points x_s `[n, POINTS]`, q(x_s | x_t) there, and the normal of its mean and variance."""
  weight, means, variance = conditional(s, t, x_t)
  mean = (weight * means).sum(axis=1, keepdims=True)
  total = variance + (weight * (means - mean) ** 2).sum(axis=1, keepdims=True)
  there = weight > RARE
  low = np.where(there, means, np.inf).min(axis=1, keepdims=True) - WIDTH * np.sqrt(variance)
  high = np.where(there, means, -np.inf).max(axis=1, keepdims=True) + WIDTH * np.sqrt(variance)
  x = low + (high - low) * np.linspace(0.0, 1.0, POINTS)
  q = sum(weight[:, k, None] * normal(x, means[:, k, None], variance) for k in range(len(MEANS)))
  return x, q, normal(x, mean, total)


def distance(s: float, t: float) -> float:
  """Total variation between q(x_s | x_t) and its normal, averaged over x_t."""
  alpha, sigma = marginal(t)
  parts = ndtri((np.arange(PARTS) + 0.5) / PARTS)
  x_t = (alpha * MEANS[:, None] + np.sqrt((alpha * STD) ** 2 + sigma**2) * parts).ravel()
  x, q, fitted = densities(s, t, x_t)
  width = x[:, 1] - x[:, 0]
  assert np.all(np.abs(q.sum(axis=1) * width - 1) < 1e-6)
  beyond = 1 - fitted.sum(axis=1) * width  # of the normal, where q has nothing
  return float(np.mean(0.5 * (np.abs(q - fitted).sum(axis=1) * width + beyond)))


def measure() -> dict[int, tuple[float, float]]:
  """Mean and largest distance over the steps of every chain."""
  table = {}
  for steps in CHAINS:
    ends = np.unique(np.linspace(1, steps, min(steps, 20)).round().astype(int))
    each = [distance((end - 1) / steps, end / steps) for end in ends]
    table[steps] = float(np.mean(each)), max(each)
    print(f"| {steps} | {table[steps][0]:.2g} | {table[steps][1]:.2g} |", flush=True)
  return table


def draw(table: dict[int, tuple[float, float]], out: Path) -> None:
  figure, axes = pyplot.subplots(1, len(SHOWN) + 1, figsize=(15, 2.7), layout="constrained")
  t = 0.25
  x_t = np.asarray([0.5 * marginal(t)[0] * (MEANS[2] + MEANS[3])])
  for axis, size in zip(axes, SHOWN, strict=False):
    x, q, fitted = densities(t - size, t, x_t)
    axis.plot(x[0], q[0], label="q(x_s | x_t)")
    axis.plot(x[0], fitted[0], "--", label="normal")
    near = x[0][(q[0] > 1e-3 * q[0].max()) | (fitted[0] > 1e-3 * fitted[0].max())]
    axis.set(xlim=(near.min(), near.max()), yticks=[], xlabel="x_s")
    axis.set_title(f"step 1/{round(1 / size)}", fontsize=10)
  axes[0].legend(fontsize=7)
  steps = np.asarray(list(table))
  for k, name in enumerate(("mean over the steps", "worst step")):
    axes[-1].loglog(steps, [values[k] for values in table.values()], "o-", markersize=3, label=name)
  axes[-1].set(xlabel="steps T of the chain")
  axes[-1].set_title("total variation to the normal", fontsize=10)
  axes[-1].legend(fontsize=7)
  figure.savefig(out / "large_steps.png", dpi=90)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=Path, default=Path(__file__).parent)
  with jax.enable_x64(True):
    draw(measure(), parser.parse_args().out)


if __name__ == "__main__":
  main()
