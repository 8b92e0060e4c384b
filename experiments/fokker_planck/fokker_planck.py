"""One density, six ways: the Fokker-Planck equation on a grid beside samplers and likelihoods: figure.png.

    python experiments/fokker_planck/fokker_planck.py [--process VP] [--particles 30000] [--out FIGURE]

The density of a process dx = f dt + g dw follows the Kolmogorov forward (Fokker-Planck) equation

    dp/dt = -div J,     J = f p - D grad p,     D = g^2 / 2                                                          (1)

On square cells of width h the flux between a cell L and the next one R is that of constant f, D and J in between,

    J = D / h (B(-w) p_L - B(w) p_R),     w = f h / D,     B(w) = w / (e^w - 1)                                      (2)

of second order in h. Both weights are positive for every w, so that an Euler step of length dt keeps p >= 0 as long as
dt times the rate at which any cell loses mass is at most 1; what one cell loses the next one gains. A Heun step is the
mean of the old state and of two such Euler steps, and keeps both properties:

    p' = p + dt L(t) p,     p(t + dt) = (p + p' + dt L(t + dt) p') / 2                                               (3)

Langevin dynamics is (1) with f = D score: no flux in p itself, (2) gives zero when w = log p_R - log p_L.

References:
  Scharfetter & Gummel 1969, Large-Signal Analysis of a Silicon Read Diode Oscillator, Section II, and Chang & Cooper
  1970, A Practical Difference Scheme for Fokker-Planck Equations, for (2); Gottlieb, Shu & Tadmor 2001, Strong
  Stability-Preserving High-Order Time Discretization Methods, for (3); Song et al. 2021, Score-Based
  Generative Modeling through SDEs, Appendix D.1, for the forward equation of all these processes.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from scipy.special import gammaln

import jaxdiff as jd

PROCESSES = {"VP": jd.VP(), "SubVP": jd.SubVP()}
TIMES = (0.05, 0.1, 0.2, 0.35, 0.7)
_BLOCK = 4  # cells along an axis that are counted together
_NO_DIFFUSION = 1e-30
_LEAST_STEPS = 64  # between two times, also where the grid would allow longer ones
_GAUSS = 0.5 / math.sqrt(3)  # the two nodes of Gauss's rule, in widths of a cell from its center


class Grid(NamedTuple):
  """Square cells, `cells` along each axis of [-half, half]^2."""

  half: float
  cells: int

  @property
  def width(self) -> float:
    return 2 * self.half / self.cells

  @property
  def edges(self) -> Array:
    return jnp.linspace(-self.half, self.half, self.cells + 1)

  @property
  def centers(self) -> Array:
    return 0.5 * (self.edges[:-1] + self.edges[1:])

  def masses(self, x: Array) -> np.ndarray:
    """The histogram of particles x `[b, 2]` over the cells, as fractions of b."""
    edges = np.asarray(self.edges)
    return np.histogram2d(*np.asarray(x).T, bins=(edges, edges))[0] / len(x)


@dataclass(frozen=True)
class Mixture:
  """Data sum_k N(mean_k, std^2 I) / K in the plane."""

  means: np.ndarray
  std: float

  def _moments(self, sde: Any, t: Array) -> tuple[Array, Array]:
    """Means [b, K, 2] and variances [b] of the components at times t `[b]`."""
    alpha, sigma = sde.marginal(t)
    return alpha[:, None, None] * jnp.asarray(self.means, alpha.dtype)[None], (alpha * self.std) ** 2 + sigma**2

  def sample(self, key: Array, count: int) -> Array:
    pick, noise = jax.random.split(key)
    noise = self.std * jax.random.normal(noise, (count, 2))
    return jnp.asarray(self.means, noise.dtype)[jax.random.randint(pick, (count,), 0, len(self.means))] + noise

  def log_prob(self, sde: Any, x: Array, t: Array) -> Array:
    """log p_t(x), `[b]`."""
    means, variance = self._moments(sde, t)
    square = jnp.sum((x[:, None] - means) ** 2, axis=-1) / variance[:, None]
    return jax.nn.logsumexp(-0.5 * square, axis=1) - jnp.log(2 * jnp.pi * len(self.means) * variance)

  def score(self, sde: Any) -> Callable[[Array, Array], Array]:
    return jd.score_of(lambda x, t: self.log_prob(sde, x, t))

  def masses(self, sde: Any, t: float, grid: Grid) -> Array:
    """What p_t holds in every cell."""
    means, variance = self._moments(sde, jnp.full(1, t))
    away = (grid.edges[None, None] - means[0][..., None]) / jnp.sqrt(variance[0])
    along = jnp.diff(jax.scipy.stats.norm.cdf(away), axis=-1)
    return along[:, 0].T @ along[:, 1] / len(self.means)


def moons() -> Mixture:
  """Two moons, smoothed: ten Gaussians along each."""
  angle = np.pi * (np.arange(10) + 0.5) / 10
  outer = np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return Mixture(1.3 * (np.concatenate([outer, [1.0, 0.5] - outer]) - [0.5, 0.25]), 0.2)


class Coefficients(NamedTuple):
  """Of eq. (1): the drift across the inner faces, x `[n - 1, n]` and y `[n, n - 1]`, and the number D."""

  x: Array
  y: Array
  diffusivity: Array


def across_faces(drift: Callable[[Array], Array], grid: Grid) -> tuple[Array, Array]:
  """What a vector field `[b, 2] -> [b, 2]` has in the direction across the inner faces."""
  inner, centers = grid.edges[1:-1], grid.centers

  def at(x: Array, y: Array, axis: int) -> Array:
    points = jnp.stack(jnp.meshgrid(x, y, indexing="ij"), axis=-1)
    return drift(points.reshape(-1, 2))[:, axis].reshape(points.shape[:2])

  return at(inner, centers, 0), at(centers, inner, 1)


def forward_equation(sde: Any, grid: Grid) -> Callable[[Array], Coefficients]:
  """The coefficients at a time of the process itself."""
  return lambda t: Coefficients(*across_faces(lambda x: sde.drift(x, t), grid), 0.5 * sde.diffusion(t) ** 2)


def langevin_equation(score: Callable[[Array, Array], Array], t: float, grid: Grid) -> Coefficients:
  """The coefficients of dx = score / 2 dt + dw, for the score at one time."""
  drift = across_faces(lambda x: 0.5 * score(x, jnp.full(len(x), t)), grid)
  return Coefficients(*drift, jnp.asarray(0.5, drift[0].dtype))


def _exchange(drift: Array, diffusivity: Array, width: float) -> tuple[Array, Array]:
  """Rates D / h^2 B(-w) from a cell to the next one and D / h^2 B(w) back; B(-w) = B(w) + w, without cancellation."""
  size = jnp.abs(drift) * width / jnp.maximum(diffusivity, _NO_DIFFUSION)
  near = size < 1e-2
  bernoulli = jnp.where(near, 1 - size / 2 + size**2 / 12, size / jnp.expm1(jnp.where(near, 1.0, size)))
  common = diffusivity / width**2 * bernoulli
  return common + jnp.maximum(drift, 0) / width, common + jnp.maximum(-drift, 0) / width


def rate_of_change(mass: Array, at: Coefficients, width: float) -> Array:
  """L p of eq. (3): what flows into every cell less what flows out, with no flow through the border of the grid."""
  change = jnp.zeros_like(mass)
  for axis, drift in enumerate((at.x, at.y)):
    forth, back = _exchange(drift, at.diffusivity, width)
    cells = mass.shape[axis]
    left, right = (jax.lax.slice_in_dim(mass, i, cells - 1 + i, axis=axis) for i in (0, 1))
    border = [(int(k == axis), int(k == axis)) for k in (0, 1)]
    change -= jnp.diff(jnp.pad(forth * left - back * right, border), axis=axis)
  return change


def largest_loss(at: Coefficients, width: float) -> Array:
  """The largest rate at which a cell loses mass."""
  loss = jnp.zeros((at.x.shape[1], at.x.shape[1]), at.x.dtype)
  for axis, drift in enumerate((at.x, at.y)):
    forth, back = _exchange(drift, at.diffusivity, width)
    before, after = ([(int(k == axis) * (1 - i), int(k == axis) * i) for k in (0, 1)] for i in (0, 1))
    loss += jnp.pad(forth, after) + jnp.pad(back, before)
  return jnp.max(loss)


def solve(coefficients: Callable[[Array], Coefficients], mass: Array, times: Any, width: float) -> Array:
  """The masses `[len(times), n, n]` at increasing times, from those at the first, by the longest steps (3)."""
  limit = jax.jit(jax.vmap(lambda t: largest_loss(coefficients(t), width)))

  @jax.jit
  def leg(mass: Array, start: Array, end: Array, steps: Array) -> Array:
    dt = (end - start) / steps.astype(start.dtype)

    def step(i: Array, mass: Array) -> Array:
      t = start + i.astype(dt.dtype) * dt
      once = mass + dt * rate_of_change(mass, coefficients(t), width)
      return 0.5 * (mass + once + dt * rate_of_change(once, coefficients(t + dt), width))

    return jax.lax.fori_loop(0, steps, step, mass)

  states, times = [mass], jnp.asarray(times, mass.dtype)
  for start, end in itertools.pairwise(times):
    steps = jnp.ceil(1.01 * (end - start) * jnp.max(limit(jnp.linspace(start, end, 17)))).astype(int)
    states.append(leg(states[-1], start, end, jnp.maximum(steps, _LEAST_STEPS)))
  return jnp.stack(states)


def nodes(sde: Any, times: Any, steps: int) -> Array:
  """Decreasing times through the given increasing ones, `steps` apart, even in log-SNR in between."""
  times = jnp.asarray(times)[::-1]
  levels = jd.log_snr(sde, times)
  fraction = jnp.arange(1, steps, dtype=times.dtype) / steps
  inside = sde.time_of_log_snr((levels[:-1, None] + fraction[None] * jnp.diff(levels)[:, None]).ravel())
  return jnp.append(jnp.concatenate([times[:-1, None], inside.reshape(-1, steps - 1)], axis=1).ravel(), times[-1])


def forward_particles(key: Array, sde: Any, x: Array, times: Any, steps: int) -> Array:
  """Euler-Maruyama of the process: the states `[len(times), b, *d]` at increasing times, from those at the first."""
  times = jnp.asarray(times)
  lengths = jnp.diff(times)[:, None] / steps
  ts = times[:-1, None] + jnp.arange(steps, dtype=times.dtype)[None] * lengths
  keys = jax.random.split(key, ts.shape)

  def step(x: Array, node: tuple[Array, Array, Array]) -> tuple[Array, None]:
    t, dt, key = node
    noise = jax.random.normal(key, x.shape, x.dtype)
    return x + dt * sde.drift(x, t) + jnp.sqrt(dt) * sde.diffuse(t, noise), None

  def leg(x: Array, part: Any) -> tuple[Array, Array]:
    x, _ = jax.lax.scan(step, x, part)
    return x, x

  _, states = jax.lax.scan(leg, x, (ts, jnp.broadcast_to(lengths, ts.shape), keys))
  return jnp.concatenate([x[None], states])


def likelihood_masses(data: Mixture, sde: Any, t: float, grid: Grid) -> Array:
  """exp(log_prob) integrated over every cell by Gauss's rule of two by two points."""
  along = (grid.centers[:, None] + grid.width * jnp.asarray([-_GAUSS, _GAUSS])[None]).ravel()
  x = jnp.stack(jnp.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
  prior = lambda z: data.log_prob(sde, z, jnp.full(len(z), sde.t1))
  log_prob = jd.likelihood.log_prob(sde, jd.divergence.exact(), t0=t, prior_log_prob=prior)
  result = jax.jit(lambda x: log_prob(jax.random.key(0), x, data.score(sde)))(x)
  jd.raise_if_failed(result)
  density = jnp.exp(result.value).reshape(grid.cells, 2, grid.cells, 2)
  return 0.25 * grid.width**2 * jnp.sum(density, axis=(1, 3))


def expected_l1(masses: Any, count: int) -> float:
  """The L1 distance from cell masses to the histogram of `count` exact draws, on average over draws.

  De Moivre's mean absolute deviation of each binomial, E|N - n q| = 2 m C(n, m) q^m (1 - q)^(n - m + 1) with
  m = floor(n q) + 1. Its standard deviation is at most sqrt((1 - 2 / pi) / n) = 0.6 / sqrt(n): cells are Gaussian
  and negatively correlated.
  """
  q = np.asarray(masses, np.float64).ravel()
  q = q[q > 0]
  m = np.floor(count * q) + 1
  choose = gammaln(count + 1) - gammaln(m + 1) - gammaln(count - m + 1)
  return float(np.sum(2 * m * np.exp(choose + m * np.log(q) + (count - m + 1) * np.log1p(-q))) / count)


def l1(a: Any, b: Any) -> float:
  """sum |a - b|: twice the total variation."""
  return float(np.sum(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def blocks(masses: Any, size: int) -> np.ndarray:
  """The masses of blocks of `size` x `size` cells."""
  masses = np.asarray(masses)
  return masses.reshape(len(masses) // size, size, -1, size).sum(axis=(1, 3))


def langevin_particles(key: Array, data: Mixture, sde: Any, t: float, count: int, steps: int = 150) -> Array:
  """Langevin dynamics at p_t from exact draws: steps of 1e-2 in units of the variance of a component."""
  draw, noise, move = jax.random.split(key, 3)
  x, _ = jd.perturb(noise, data.sample(draw, count), t, sde)
  alpha, sigma = sde.marginal(t)
  sampler = jd.samplers.langevin(1e-2 * float((alpha * data.std) ** 2 + sigma**2), steps, t)
  return jax.jit(lambda x: sampler(move, x, data.score(sde)).x)(x)


def reverse_particles(key: Array, data: Mixture, sde: Any, x_T: Array, times: Any, steps: int) -> Array:
  """The reverse SDE from the prior: its states `[len(times), b, 2]` at increasing times, `steps` apart."""
  sampler = jd.samplers.reverse_sde(sde, nodes(sde, (*times, sde.t1), steps), path=steps)
  return jax.jit(lambda x: sampler(key, x, data.score(sde)).path)(x_T)[:0:-1]


def flow_particles(data: Mixture, sde: Any, x_T: Array, t: float) -> Array:
  """The probability flow from the prior to t."""
  flow = jd.samplers.probability_flow(sde, t0=t)
  sample = jax.jit(lambda x: flow(jax.random.key(0), x, data.score(sde)))(x_T)
  jd.raise_if_failed(sample)
  return sample.x


def compare(data: Mixture, sde: Any, grid: Grid, times: Any, count: int, steps: int) -> dict[str, list[np.ndarray]]:
  """Masses of the cells at each time, every way."""
  forward, prior, reverse, langevin = jax.random.split(jax.random.key(0), 4)
  from_zero = (0.0, *times)
  p = solve(forward_equation(sde, grid), data.masses(sde, 0.0, grid), from_zero, grid.width)[1:]
  x0, x_T = data.sample(forward, count), sde.prior_sample(prior, (count, 2))
  ahead = jax.jit(lambda x: forward_particles(forward, sde, x, from_zero, steps))(x0)[1:]
  back = reverse_particles(reverse, data, sde, x_T, times, steps)
  keys = jax.random.split(langevin, len(times))
  return {
    "Fokker-Planck": list(np.asarray(p)),
    "forward SDE": [grid.masses(x) for x in ahead],
    "reverse SDE": [grid.masses(x) for x in back],
    "probability flow": [grid.masses(flow_particles(data, sde, x_T, t)) for t in times],
    "exp(log_prob)": [np.asarray(likelihood_masses(data, sde, t, grid)) for t in times],
    "Langevin": [grid.masses(langevin_particles(key, data, sde, t, count)) for key, t in zip(keys, times, strict=True)],
  }


def draw(found: dict[str, list[np.ndarray]], times: Any, half: float, out: Path) -> None:
  """A row for every way, a column for every time; a column has one scale."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(len(found), len(times), figsize=(2 * len(times), 2.05 * len(found)), layout="constrained")
  for row, (name, masses) in zip(axes, found.items(), strict=True):
    for axis, mass, reference in zip(row, masses, found["Fokker-Planck"], strict=True):
      mass, top = blocks(mass, 2), blocks(reference, 2).max()
      axis.imshow(mass.T, origin="lower", extent=(-half, half) * 2, vmin=0, vmax=top, cmap="magma")
      axis.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-3, 3))
    row[0].set_ylabel(name)
  for axis, t in zip(axes[0], times, strict=True):
    axis.set_title(f"t = {t}")
  figure.savefig(out, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--process", default="VP", choices=PROCESSES)
  parser.add_argument("--cells", type=int, default=80, help="along an axis, a multiple of 4")
  parser.add_argument("--particles", type=int, default=30_000)
  parser.add_argument("--steps", type=int, default=150, help="of the SDEs, between two times")
  parser.add_argument("--out", type=Path, help="where the figure goes; none by default")
  options = parser.parse_args()
  sde, data, grid = PROCESSES[options.process], moons(), Grid(4.8, options.cells)
  found = compare(data, sde, grid, TIMES, options.particles, options.steps)
  if options.out:
    draw(found, TIMES, grid.half, options.out)
  p = [blocks(mass, _BLOCK) for mass in found.pop("Fokker-Planck")]
  exact = [blocks(data.masses(sde, t, grid), _BLOCK) for t in TIMES]
  rows = {"p_t itself": exact} | {name: [blocks(m, _BLOCK) for m in masses] for name, masses in found.items()}
  print(f"{options.process}: L1 distance to the Fokker-Planck equation, {len(p[0])} x {len(p[0])} blocks")
  line = lambda name, values: print(
    f"| {name:<32}" + "".join(f" | {value:6.4f}" for value in values) + " |", flush=True
  )
  print(f"| {'t':<32}" + "".join(f" | {t:<6}" for t in TIMES) + " |")
  for name, masses in rows.items():
    line(name, [l1(a, b) for a, b in zip(masses, p, strict=True)])
  line(f"expected of {options.particles} exact draws", [expected_l1(mass, options.particles) for mass in exact])


if __name__ == "__main__":
  main()
