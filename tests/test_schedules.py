import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES

import jaxdiff as jd
from jaxdiff import schedules
from jaxdiff.schedules import start_time

EACH = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
KINDS = pytest.mark.parametrize("kind", ["log_snr", "uniform", "karras"])


@EACH
@KINDS
def test_grids_decrease_from_prior_to_data(sde, kind):
  for steps in (1, 1000):
    ts = np.asarray(jd.time_grid(sde, steps, kind))
    assert ts.shape == (steps + 1,)
    assert ts[0] == np.float32(sde.t1)
    assert ts[-1] == float(start_time(sde, None, 2e-3))
    assert np.all(ts[1:] < ts[:-1])


@EACH
def test_grids_are_even_in_what_they_say(sde, x64):
  def gaps(values):
    values = np.asarray(values)
    return np.diff(values) / (values[-1] - values[0])

  alpha, sigma = sde.marginal(jd.time_grid(sde, 10, "karras"))
  np.testing.assert_allclose(gaps((sigma / alpha) ** (1 / 7)), 0.1, rtol=1e-8)
  np.testing.assert_allclose(gaps(jd.log_snr(sde, jd.time_grid(sde, 10))), 0.1, rtol=1e-8)
  np.testing.assert_allclose(gaps(jd.time_grid(sde, 10, "uniform")), 0.1, rtol=1e-8)


def test_karras_grid_is_the_published_one(x64):
  """Karras et al. 2022, eq. 5, for 18 steps: their sigma_0 = 80 to sigma_17 = 0.002 are 17 intervals."""
  i = np.arange(18)
  published = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  np.testing.assert_allclose(jd.time_grid(jd.EDM(), 17, "karras", t0=0.002), published, rtol=1e-9)


def test_start_time_means_the_same_noise_for_every_process():
  for name, sde in SDES.items():
    alpha, sigma = sde.marginal(start_time(sde, None, 2e-3))
    np.testing.assert_allclose(sigma / alpha, 0.01 if name == "ve" else 2e-3, rtol=1e-4)
  assert start_time(jd.VE(sigma_min=0.01), None, 1e-3) == 0


def test_cosine_schedule_ends_at_its_log_snr():
  np.testing.assert_allclose(jd.log_snr(jd.CosineVP(log_snr_min=-8.0), 1.0), -8.0, rtol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"steps": 5, "t0": 1.0}, r"t0 must lie in \[0, t1\)"),
    ({"steps": 5, "t0": -0.1}, r"t0 must lie in \[0, t1\)"),
    ({"steps": 5, "t0": 0.0}, "no noise"),
    ({"steps": 5, "kind": "cubic"}, "kind must be .* got .cubic."),
  ],
)
def test_bad_grids_are_refused(arguments, message, untyped):
  with pytest.raises(ValueError, match=message):
    jd.time_grid(jd.VP(), **arguments)


def test_invert_finds_the_root_and_its_derivative(x64):
  root = lambda scale, v: schedules.invert(lambda t: scale * t**3, v, 0.0, 2.0)
  run = jax.jit(jax.vmap(jax.value_and_grad(root, argnums=(0, 1)), in_axes=(None, 0)))
  values = np.array([0.0, 1e-7, 0.3, 1.0, 8.0])
  found, (by_scale, by_value) = jax.tree.map(np.asarray, run(1.0, values))
  exact, inside = np.cbrt(values), slice(1, 4)
  np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-15)
  np.testing.assert_allclose(by_scale[inside], -exact[inside] / 3, rtol=1e-5)
  np.testing.assert_allclose(by_value[inside], exact[inside] / values[inside] / 3, rtol=1e-5)


def test_invert_is_clipped_to_the_interval():
  values = np.float32([-1.0, 3.0])
  np.testing.assert_array_equal(jax.jit(lambda v: schedules.invert(lambda t: t, v, 0.0, 2.0))(values), [0.0, 2.0])


def test_invert_has_all_digits_of_roots_near_zero():
  root = np.float32(10.0 ** -np.arange(1.0, 30.0, 4.0))
  found = jax.jit(lambda root: schedules.invert(jnp.log, jnp.log(root), 0.0, 1.0))(root)
  np.testing.assert_allclose(found, root, rtol=1e-5)
