"""How exact the samplers are at a given number of network evaluations: the gap of the negative log-likelihood, in nats.

    python experiments/samplers/gap.py [--grid=log_snr] [--process=VP] [--dimension=64] [--std=0.05] [--evaluations N]

The data are five Gaussian modes of one standard deviation, so that score and density are known and nothing but the
sampler errs. The gap is E[-log p(sample)] - E[-log p(data)]: negative where samples lie too close to the modes (lost
fine-scale variance), positive where they lie too far out. Samples start from the exact p_t1. Data are noised to t0,
where the samplers stop, and both are judged under p_t0. Gaps below two standard errors are marked "~0".
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff import samplers

COUNT = 4000
EVALUATIONS = (10, 20, 40, 50, 80, 160, 200, 1000)
PROCESSES = {"VP": jd.VP(), "SubVP": jd.SubVP(), "CosineVP": jd.CosineVP(), "VE": jd.VE(), "EDM": jd.EDM()}

# A name, the evaluations of one step, and the sampler on a grid.
Row = tuple[str, int, Callable[[Any, jax.Array], Any]]
ROWS: list[Row] = [
  ("Euler-Maruyama", 1, samplers.reverse_sde),
  ("reverse diffusion", 1, samplers.reverse_diffusion),
  ("stochastic Heun", 2, samplers.stochastic_heun),
  (
    "predictor-corrector",
    2,
    lambda sde, ts: samplers.predictor_corrector(samplers.reverse_diffusion(sde, ts), samplers.langevin_corrector(0.1)),
  ),
  ("ancestral, beta", 1, lambda sde, ts: samplers.ancestral(sde, ts, "beta")),
  ("ancestral, beta~", 1, samplers.ancestral),
  ("DDIM", 1, samplers.ddim),
  ("DPM-Solver-2", 2, samplers.dpm_solver),
  ("DPM-Solver-3", 3, lambda sde, ts: samplers.dpm_solver(sde, ts, order=3)),
  ("DPM-Solver++ 2M", 1, samplers.dpm_solver_pp),
  ("DPM-Solver++ 3M", 1, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, order=3)),
  ("DPM-Solver++ 2M SDE", 1, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, eta=1.0)),
  ("DPM-Solver++ 3M SDE", 1, lambda sde, ts: samplers.dpm_solver_pp(sde, ts, order=3, eta=1.0)),
  ("UniPC 2", 1, samplers.unipc),
  ("UniPC 3", 1, lambda sde, ts: samplers.unipc(sde, ts, order=3)),
  ("EDM Euler", 1, lambda sde, ts: samplers.edm(sde, ts, order=1)),
  ("EDM Heun", 2, samplers.edm),
  ("EDM Heun, churn", 2, lambda sde, ts: samplers.edm(sde, ts, churn=40.0)),
]


class Modes:
  """Five modes with coordinates drawn from N(0, 1), of equal weight."""

  def __init__(self, dimension: int, std: float):
    self.means = jnp.asarray(np.random.default_rng(0).standard_normal((5, dimension)), jnp.float32)
    self.std = std

  def sample(self, key: jax.Array, count: int) -> jax.Array:
    pick, noise = jax.random.split(key)
    centers = self.means[jax.random.randint(pick, (count,), 0, 5)]
    return centers + self.std * jax.random.normal(noise, centers.shape)

  def _parts(self, sde: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-densities [b, 5] of the modes, the way to them [b, 5, d], and the variance [b]."""
    alpha, sigma = sde.marginal(t)
    variance = (alpha * self.std) ** 2 + sigma**2
    away = alpha[:, None, None] * self.means - x[:, None]
    dimension = x.shape[1]
    logs = -0.5 * jnp.sum(away**2, -1) / variance[:, None] - 0.5 * dimension * jnp.log(2 * jnp.pi * variance)[:, None]
    return logs, away, variance

  def log_prob(self, sde: Any, x: jax.Array, t: float) -> jax.Array:
    return jax.nn.logsumexp(self._parts(sde, x, jnp.full(len(x), t))[0], axis=1) - jnp.log(5.0)

  def score(self, sde: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def score(x: jax.Array, t: jax.Array) -> jax.Array:
      logs, away, variance = self._parts(sde, x, t)
      return jnp.einsum("bk,bkd->bd", jax.nn.softmax(logs), away) / variance[:, None]

    return score


def gap(data: Modes, sde: Any, sampler: Any, t0: float, key: jax.Array) -> tuple[float, float, int]:
  """Gap, its standard error, and the evaluations that the sampler counted."""
  noise_key, path_key, data_key = jax.random.split(key, 3)
  x_T, _ = jd.perturb(noise_key, data.sample(data_key, COUNT), sde.t1, sde)
  sample = jax.jit(lambda key, x: sampler(key, x, data.score(sde)))(path_key, x_T)
  jd.raise_if_failed(sample)
  fresh, _ = jd.perturb(data_key, data.sample(noise_key, COUNT), t0, sde)
  drawn, real = (np.asarray(-data.log_prob(sde, x, t0), np.float64) for x in (sample.x, fresh))
  error = np.sqrt((drawn.var() + real.var()) / COUNT)
  return float(drawn.mean() - real.mean()), float(error), int(sample.nfe.max())


def cell(value: float, error: float) -> str:
  return f"{value:+.2f}{'~' if abs(value) < 2 * error else ''}" if abs(value) < 1e4 else f"{value:+.0e}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--grid", default="log_snr", choices=("log_snr", "uniform", "karras"))
  parser.add_argument("--process", default="VP", choices=PROCESSES)
  parser.add_argument("--dimension", type=int, default=64)
  parser.add_argument("--std", type=float, default=0.05)
  parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
  options = parser.parse_args()
  sde, data = PROCESSES[options.process], Modes(options.dimension, options.std)
  t0 = float(jd.schedules.start_time(sde, None, jd.schedules.SAMPLING_NOISE_TO_SIGNAL))
  print(f"{options.process}, {options.grid} grid, {options.dimension}-D, modes of std {options.std}, n = {COUNT}")
  print(f"{'evaluations':<22}" + "".join(f"{n:>10}" for n in options.evaluations))
  for name, per_step, make in ROWS:
    cells = []
    for n in options.evaluations:
      if n // per_step < 3:
        cells.append("-")
        continue
      ts = jd.time_grid(sde, n // per_step, options.grid)
      value, error, _ = gap(data, sde, make(sde, ts), t0, jax.random.key(1))
      cells.append(cell(value, error))
    print(f"{name:<22}" + "".join(f"{text:>10}" for text in cells), flush=True)
  for name, sampler in (
    ("adaptive SDE 1e-2", samplers.adaptive_sde(sde, rtol=1e-2, atol=1e-2)),
    ("flow, Tsit5 1e-3", samplers.probability_flow(sde, 1e-3, 1e-3)),
    ("flow, Tsit5 1e-5", samplers.probability_flow(sde, 1e-5, 1e-5)),
    ("flow, Dopri8 1e-5", samplers.probability_flow(sde, 1e-5, 1e-5, solver="dopri8")),
  ):
    value, error, nfe = gap(data, sde, sampler, t0, jax.random.key(1))
    print(f"{name:<22}{cell(value, error):>10}   at most {nfe} evaluations")


if __name__ == "__main__":
  main()
