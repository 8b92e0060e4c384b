"""What operators, guided scores and wrapped samplers of inverse problems refuse, and what they say."""

import functools

import jax
import numpy as np
import pytest
from test_inverse_samplers import EACH, MASK, SDE, WRAPPERS, grid, key, problem, toward

import jaxdiff as jd
from jaxdiff import inverse


@functools.cache
def ancestral():
  return jd.samplers.ancestral(SDE, grid(4))


def known():
  return inverse.mask(MASK)


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: inverse.mask(np.full((2, 2), 0.5)), ValueError, r"mask must be 1 where a value is known .* holds \[0.5\]"),
    (lambda: inverse.downsample(0), ValueError, "factor must be at least 1"),
    (lambda: inverse.downsample(2.0), TypeError, "factor must be an integer"),
    (
      lambda: inverse.downsample(3).apply(np.ones((1, 4, 4, 1), np.float32)),
      ValueError,
      "factor=3 does not divide the 4x4",
    ),
    (lambda: inverse.blur(np.ones((2, 3))), ValueError, r"kernel must be \[rows, columns\], odd .* got \(2, 3\)"),
    (lambda: inverse.blur(np.ones(3)), ValueError, r"kernel must be \[rows, columns\], odd .* got \(3,\)"),
    (
      lambda: inverse.blur(np.ones((5, 1))).apply(np.ones((1, 4, 4, 1), np.float32)),
      ValueError,
      "kernel must not be larger than",
    ),
    (
      lambda: inverse.crop(3, 0, 2, 2, (4, 4)),
      ValueError,
      r"2x2 at \(3, 0\), must lie in the image of 4x4",
    ),
    (
      lambda: inverse.crop(0, 0, 2, 2, (4, 4)).apply(np.ones((1, 5, 4, 1), np.float32)),
      ValueError,
      r"is not that of the images",
    ),
    (
      lambda: inverse.greyscale().apply(np.ones((1, 2, 2, 1), np.float32)),
      ValueError,
      "of 3 channels, .* these have 1",
    ),
    (lambda: inverse.greyscale((0.0, 0.0)), ValueError, "weights must be one number per channel, not all 0"),
    (
      lambda: inverse.downsample(2).apply(np.ones((4, 4), np.float32)),
      ValueError,
      r"downsample is for images \[b, h, w, c\]",
    ),
    (lambda: inverse.Operator(1, abs, abs), TypeError, "apply of an operator must be a function, got int"),
    (lambda: inverse.Operator(abs, abs, abs, "mask"), TypeError, "conditions must be a tuple of names"),
    (lambda: inverse.pigdm(toward, known()), TypeError, "score must have its process as .sde"),
    (lambda: inverse.pigdm(toward, known(), -0.1, sde=SDE), ValueError, "noise_std must be at least 0"),
    (lambda: inverse.pigdm(toward, known(), 0.1, 0.0, SDE), ValueError, "data_variance must be positive"),
    (lambda: inverse.pigdm(toward, inverse.mask, sde=SDE), TypeError, r"did you forget to call it: inverse.mask\(\)\?"),
    (lambda: inverse.reconstruction(toward, known(), -1.0, SDE), ValueError, "weight must be at least 0"),
    (lambda: inverse.dps(ancestral(), known(), -1.0), ValueError, "scale must be at least 0"),
    (lambda: inverse.projected(ancestral(), known(), -1.0), ValueError, "noise_std must be at least 0"),
    (lambda: inverse.projected(ancestral(), inverse.blur(np.eye(3)), 0.1), ValueError, "needs an operator with a gain"),
    (lambda: inverse.repaint(ancestral(), known(), 0, 1), ValueError, "resamplings must be at least 1"),
    (lambda: inverse.repaint(ancestral(), known(), 2, 0), ValueError, "jump must be at least 1"),
    (
      lambda: inverse.repaint(ancestral(), known(), 2, 5),
      ValueError,
      "jump must not be longer than the grid of 4 steps",
    ),
    (
      lambda: inverse.repaint(jd.samplers.dpm_solver(SDE, grid(4)), known(), 2, 2),
      ValueError,
      "sampler must take one network evaluation a step, this one takes 8 in 4",
    ),
    (
      lambda: inverse.restoration(SDE, ancestral(), known(), method="ddrm"),
      ValueError,
      "method must be one of 'pigdm'",
    ),
    (
      lambda: inverse.restoration(SDE, ancestral(), known(), data_variance=-1.0),
      ValueError,
      "data_variance must be positive",
    ),
  ],
)
def test_bad_arguments_are_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize("wrap", [inverse.dps, inverse.projected, inverse.repaint])
def test_samplers_that_cannot_be_wrapped_are_refused(wrap):
  for multistep in (jd.samplers.unipc(SDE, grid(4)), jd.samplers.dpm_solver_pp(SDE, grid(4))):
    with pytest.raises(ValueError, match="sampler must step from one state alone"):
      wrap(multistep, known())
  with pytest.raises(TypeError, match="sampler must be a FixedGrid, got function"):
    wrap(jd.samplers.probability_flow(SDE), known())


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: jd.samplers.edm(SDE, grid(4), order=1, churn=1.0), "asks elsewhere"),
    (lambda: jd.samplers.stochastic_heun(SDE, grid(4)), "asks more than once"),
    (
      lambda: jd.samplers.FixedGrid(SDE, grid(4), ancestral().method._replace(step=lambda f, x, m, n, k: (x, m))),
      "never does",
    ),
  ],
)
def test_dps_refuses_steps_that_ask_elsewhere(make, message):
  cond, x_T = problem()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda x_T: inverse.dps(make(), inverse.mask())(key(), x_T, toward, cond), x_T)


@EACH
@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"measurement": None}, ValueError, r"cond must hold 'measurement', .* it holds \['mask'\]"),
    ({"mask": None}, ValueError, r"cond must hold 'mask', .* it holds \['measurement'\]"),
    (
      {"measurement": np.ones((2, 4, 4, 1), np.float32)},
      ValueError,
      r"the shape of A x, \(2, 4, 4, 3\); got \(2, 4, 4, 1\)",
    ),
    ({"measurement": np.ones((2, 4, 4, 3), np.int32)}, TypeError, r"\['measurement'\] must be floating point"),
    ({"mask": np.ones((2, 4, 5))}, ValueError, r"mask must be of the size of the images, \(4, 4, 3\); got \(4, 5\)"),
    ({"mask": np.full((2, 4, 4), 0.5, np.float32)}, ValueError, "mask must be 1 where a value is known"),
  ],
)
def test_bad_measurements_are_refused(method, change, error, message):
  sampler = inverse.inpainting(SDE, ancestral(), method=method, **WRAPPERS[method])
  cond, x_T = problem()
  cond = {name: value for name, value in (cond | change).items() if value is not None}
  with pytest.raises(error, match=message):
    sampler(key(), x_T, toward, cond)
