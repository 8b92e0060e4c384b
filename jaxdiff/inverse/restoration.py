"""Restoration in one line: inpainting, colorization, super-resolution, deblurring; a sampler in, a sampler out.

The method is one of

    pigdm            pseudo-inverse guidance of the score: for any sampler, exact for isotropic Gaussian data
    reconstruction   reconstruction guidance of the score, with `weight`: for any sampler
    dps              `dps`, with `scale`: moves beside the steps of a sampler
    projection       `projected`: the cheapest, its unknown values follow the known ones the least
    repaint          `repaint`, with `resamplings` and `jump`: the dearest

and where the measurement has no noise every method ends with A x = y.
"""

import functools
from typing import Any, Literal

import jax
from jax.typing import ArrayLike

from jaxdiff import checks
from jaxdiff.inverse import operators
from jaxdiff.inverse.dps import dps
from jaxdiff.inverse.guided import pigdm, reconstruction
from jaxdiff.inverse.operators import Operator
from jaxdiff.inverse.projection import consistent, projected
from jaxdiff.inverse.repaint import repaint
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State

Way = Literal["pigdm", "reconstruction", "dps", "projection", "repaint"]
_WEIGHT = 2.0


def restoration(
  sde: ScalarSDE, sampler: Any, operator: Operator, noise_std: Scalar = 0.0, method: Way = "pigdm", **options: Any
) -> Any:
  """Sampler of p(x | y) for any operator, by one of the methods of this package.

  Args:
    sde: the process.
    sampler: any for a guided score ("pigdm", "reconstruction"), one on a grid for the others.
    operator: A.
    noise_std: standard deviation of the measurement's noise; 0 ends with A x = y.
    method: "pigdm", "reconstruction", "dps", "projection" or "repaint".
    options: what the method takes beside, in this order: `data_variance`; `weight`, 2 unless given; `scale`; nothing;
      `resamplings` and `jump`.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={"measurement": y, ...}) -> Sample.

  Raises:
    ValueError: for another method; as the method does.
    TypeError: for an option that the method does not have; as the method does.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.inverse.restoration(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 4)), jd.inverse.downsample(2))
    >>> y, score = jnp.ones((1, 2, 2, 1)), jax.tree_util.Partial(lambda x, t: -x)
    >>> x = jax.jit(sampler)(jax.random.key(0), jnp.ones((1, 4, 4, 1)), score, {"measurement": y}).x
    >>> bool(abs(jd.inverse.downsample(2).apply(x) - y).max() < 1e-6)
    True
  """
  checks.made("sde", sde, ScalarSDE)
  checks.made("sampler", sampler)
  checks.one_of("method", method, Way)
  operators.check_noise_std(noise_std)
  if method in ("projection", "repaint"):
    return (projected if method == "projection" else repaint)(sampler, operator, noise_std=noise_std, **options)
  if method == "dps":
    run = dps(sampler, operator, **options)
  else:
    guide = functools.partial(pigdm, noise_std=noise_std, **options)
    if method == "reconstruction":
      guide = functools.partial(reconstruction, **{"weight": _WEIGHT} | options)
    run = _guiding(sampler, functools.partial(guide, operator=operator, sde=sde))
  exact = not isinstance(noise_std, jax.core.Tracer) and noise_std == 0
  return consistent(run, operator) if exact else run


def _guiding(sampler: Any, guide: Any) -> Any:
  guide(lambda x, t: x)  # refuses bad options before a score is there

  def run(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    return sampler(key, x_T, guide(score), cond)

  return run


def inpainting(
  sde: ScalarSDE,
  sampler: Any,
  mask: ArrayLike | None = None,
  noise_std: Scalar = 0.0,
  method: Way = "pigdm",
  **options: Any,
) -> Any:
  """Sampler of what a mask hides; `cond["measurement"]` is the image, `[b, h, w, c]`, of anything where it is hidden.

  Args:
    sde: the process.
    sampler: see `restoration`.
    mask: 1 known, 0 hidden, for all images; None for one per image in `cond["mask"]`.
    noise_std: standard deviation of the noise of known values; they are kept exactly if it is 0.
    method: see `restoration`.
    options: see `restoration`.

  Returns:
    sampler(key, x_T: [b, *d], score, cond) -> Sample.

  Raises:
    ValueError, TypeError: as `restoration` and `jd.inverse.mask`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.inverse.inpainting(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 4)))
    >>> cond = {"measurement": jnp.full((1, 2, 2, 1), 0.5), "mask": jnp.asarray([[[1, 0], [0, 1]]])}
    >>> x = sampler(jax.random.key(0), jnp.ones((1, 2, 2, 1)), lambda x, t: -x, cond).x
    >>> (x.ravel() == 0.5).tolist()
    [True, False, False, True]
  """
  return restoration(sde, sampler, operators.mask(mask), noise_std, method, **options)


def colorization(sde: ScalarSDE, sampler: Any, noise_std: Scalar = 0.0, method: Way = "pigdm", **options: Any) -> Any:
  """Sampler of RGB images of a given brightness, `cond["measurement"]`: `[b, h, w, 1]`; see `restoration`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.inverse.colorization(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 4)))
    >>> cond = {"measurement": jnp.zeros((1, 2, 2, 1))}
    >>> x_T, score = jnp.ones((1, 2, 2, 3)), jax.tree_util.Partial(lambda x, t: -x)
    >>> jax.eval_shape(sampler, jax.random.key(0), x_T, score, cond).x.shape
    (1, 2, 2, 3)
  """
  return restoration(sde, sampler, operators.greyscale(), noise_std, method, **options)


def super_resolution(
  sde: ScalarSDE, sampler: Any, factor: int, noise_std: Scalar = 0.0, method: Way = "pigdm", **options: Any
) -> Any:
  """Sampler of images whose means over factor x factor pixels are `cond["measurement"]`; see `restoration`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.inverse.super_resolution(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 4)), factor=2)
    >>> cond = {"measurement": jnp.zeros((1, 2, 2, 1))}
    >>> x_T, score = jnp.ones((1, 4, 4, 1)), jax.tree_util.Partial(lambda x, t: -x)
    >>> jax.eval_shape(sampler, jax.random.key(0), x_T, score, cond).x.shape
    (1, 4, 4, 1)
  """
  return restoration(sde, sampler, operators.downsample(factor), noise_std, method, **options)


def deblurring(
  sde: ScalarSDE, sampler: Any, kernel: ArrayLike, noise_std: Scalar = 0.0, method: Way = "pigdm", **options: Any
) -> Any:
  """Sampler of images that a kernel blurs to `cond["measurement"]`, periodic at the borders; see `restoration`.

  A photograph has noise: give a noise_std (1 / 255 for 8-bit images in [-1, 1]), which "pigdm" knows to use. Without it
  what the kernel weakens a thousandfold is taken from the measurement, its rounding included.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> kernel = jnp.ones((3, 3)) / 9
    >>> sampler = jd.inverse.deblurring(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 4)), kernel, noise_std=0.01)
    >>> cond = {"measurement": jnp.zeros((1, 4, 4, 1))}
    >>> x_T, score = jnp.ones((1, 4, 4, 1)), jax.tree_util.Partial(lambda x, t: -x)
    >>> jax.eval_shape(sampler, jax.random.key(0), x_T, score, cond).x.shape
    (1, 4, 4, 1)
  """
  return restoration(sde, sampler, operators.blur(kernel), noise_std, method, **options)
