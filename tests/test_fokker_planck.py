import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "fokker_planck" / "fokker_planck.py"
_SPEC = importlib.util.spec_from_file_location("fokker_planck", _PATH)
fp = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fp)

DATA = fp.Mixture(np.array([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.2]]), 0.35)
HALF = 4.8  # a standard Gaussian has 3e-6 of its mass outside


def by_equation(sde, cells, times):
  grid = fp.Grid(HALF, cells)
  return grid, fp.solve(fp.forward_equation(sde, grid), DATA.masses(sde, 0.0, grid), (0.0, *times), grid.width)[1:]


@pytest.mark.parametrize(
  "sde", [jd.VP(), jd.SubVP(), jd.VE(sigma_max=1.0)], ids=["advection and diffusion", "no diffusion at 0", "diffusion"]
)
def test_scheme_is_of_second_order(sde):
  """Halving the cells divides the distance to the exact density by 4, 3.4 for an order of 1.75, and keeps the mass."""
  distance = []
  for cells in (40, 80):
    grid, (mass,) = by_equation(sde, cells, (0.5,))
    distance.append(fp.l1(mass, DATA.masses(sde, 0.5, grid)))
    assert mass.min() >= 0
    before, after = (np.asarray(value, np.float64).sum() for value in (DATA.masses(sde, 0.0, grid), mass))
    assert abs(after - before) < 1e-6
  assert distance[1] < min(2e-3, distance[0] / 3.4)


def test_steps_as_long_as_allowed_keep_positivity():
  """One full cell and flow that outruns diffusion, where central differences or longer steps would go below 0."""
  grid = fp.Grid(HALF, 20)
  at = fp.Coefficients(*fp.across_faces(lambda x: 50 * jnp.sin(3 * x[:, ::-1]), grid), jnp.float32(0.1))
  mass = jnp.zeros((20, 20)).at[7, 12].set(1.0)
  states = fp.solve(lambda t: at, mass, np.linspace(0.0, 2.0, 5), grid.width)
  assert states.min() >= 0
  np.testing.assert_allclose(jnp.sum(states, axis=(1, 2)), 1.0, rtol=1e-6)
  assert states[-1].max() < 0.5


def test_drift_of_a_density_keeps_it_to_rounding(x64):
  """With w = log p_R - log p_L across every face there is no flux: weak drift, strong drift, none."""
  log_p = jnp.asarray(20 * np.random.default_rng(0).standard_normal((12, 12)) * (np.arange(12) > 3))
  drifts = (jnp.diff(log_p, axis=axis) * 0.7 / 0.1 for axis in (0, 1))
  p = jax.nn.softmax(log_p.ravel()).reshape(12, 12)
  at = fp.Coefficients(*drifts, jnp.asarray(0.7))
  assert jnp.abs(fp.rate_of_change(p, at, 0.1)).max() < 1e-12 * fp.largest_loss(at, 0.1)


def test_langevin_keeps_the_density(x64):
  """dp/dt = 0, and on the grid tends to it with the square of the width; twice the drift leaves a rest."""
  sde, t = jd.VP(), 0.1

  @functools.partial(jax.jit, static_argnums=0)
  def rest(cells, factor):
    grid = fp.Grid(HALF, cells)
    at = fp.langevin_equation(lambda x, t: factor * DATA.score(sde)(x, t), t, grid)
    return jnp.sum(jnp.abs(fp.rate_of_change(DATA.masses(sde, t, grid), at, grid.width)))

  coarse, fine = rest(40, 1.0), rest(80, 1.0)
  assert fine < min(0.05, coarse / 3.4)
  assert rest(80, 2.0) > 1.0


@pytest.fixture(scope="module")
def count():
  return 20_000


def agrees(grid, x, mass, scheme):
  """Whether particles are draws from these masses: the L1 distance of their histogram, over blocks of cells, is that of
  exact draws, within five of its standard deviations and the error of the scheme."""
  particles, mass = (fp.blocks(value, 2) for value in (grid.masses(x), mass))
  excess = fp.l1(particles, mass) - fp.expected_l1(mass, len(x))
  return abs(excess) < 5 * np.sqrt((1 - 2 / np.pi) / len(x)) + scheme


def test_equation_particles_and_likelihood_agree(count):
  sde, times = jd.VP(), (0.1, 0.4)
  grid, masses = by_equation(sde, 40, times)
  forward, prior, reverse = jax.random.split(jax.random.key(0), 3)
  x0, x_T = DATA.sample(forward, count), sde.prior_sample(prior, (count, 2))
  ahead = jax.jit(lambda x: fp.forward_particles(forward, sde, x, (0.0, *times), 100))(x0)[1:]
  back = fp.reverse_particles(reverse, DATA, sde, x_T, times, 100)
  schemes = [fp.l1(mass, DATA.masses(sde, t, grid)) for t, mass in zip(times, masses, strict=True)]
  assert max(schemes) < 0.03
  for mass, there, here, scheme in zip(masses, ahead, back, schemes, strict=True):
    assert agrees(grid, there, mass, scheme), "forward SDE"
    assert agrees(grid, here, mass, scheme), "reverse SDE"
  assert agrees(grid, fp.flow_particles(DATA, sde, x_T, times[0]), masses[0], schemes[0]), "probability flow"
  # Gauss's rule errs by about 1e-4 here, the solver by less.
  assert fp.l1(fp.likelihood_masses(DATA, sde, times[0], grid), masses[0]) < schemes[0] + 1e-3, "log_prob"


def test_langevin_particles_keep_the_histogram(count):
  grid, (mass,) = by_equation(jd.VP(), 40, (0.1,))
  x = fp.langevin_particles(jax.random.key(3), DATA, jd.VP(), 0.1, count)
  assert agrees(grid, x, mass, fp.l1(mass, DATA.masses(jd.VP(), 0.1, grid)))


def test_expected_distance_is_that_of_exact_draws():
  """Multinomial draws over cells of very different masses, 200 times: the mean within four standard errors."""
  rng = np.random.default_rng(0)
  q = rng.dirichlet(np.full(100, 0.2))
  found = np.abs(rng.multinomial(500, q, 200) / 500 - q).sum(1)
  assert abs(found.mean() - fp.expected_l1(q, 500)) < 4 * found.std() / np.sqrt(200)
  assert found.std() < np.sqrt((1 - 2 / np.pi) / 500)
