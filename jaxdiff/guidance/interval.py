"""The scale of guidance: one number, or a function of time such as a limited interval of noise levels.

    scale(t) = gamma where low < sigma_t / alpha_t <= high, else 1                                                   (1)

At 1 guidance does nothing, so that the second branch is not computed there. A function of time takes and returns `[b]`.

References:
  Kynkaanniemi et al. 2024, Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
  Diffusion Models, Section 3, for (1), there of the sigma of EDM, where alpha = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Bool, Float

from jaxdiff import checks
from jaxdiff.sde import ScalarSDE
from jaxdiff.typing import Scalar

Scale = Scalar | Callable[[Array], Array]


@checks.pytree
@dataclass(frozen=True)
class _Interval:
  sde: ScalarSDE
  scale: Scalar
  low: Scalar
  high: Scalar

  def __call__(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    alpha, sigma = self.sde.marginal(t)
    level = sigma / alpha
    return jnp.where((self.low < level) & (level <= self.high), self.scale, 1.0).astype(level.dtype)


def interval(sde: ScalarSDE, scale: Scalar, low: Scalar, high: Scalar) -> _Interval:
  """A scale for some noise levels alone, eq. (1): the `scale` of `classifier_free` and `autoguidance`.

  Args:
    sde: a process with scalar marginals.
    scale: gamma, at least 0.
    low: sigma / alpha above which there is guidance, at least 0.
    high: sigma / alpha up to which there is guidance; infinity for no limit.

  Returns:
    A function of time `[b] -> [b]`, a pytree.

  Raises:
    ValueError: for a negative scale, or low and high that are not 0 <= low < high.
    TypeError: for a class given as the process.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> scale = jd.guidance.interval(jd.EDM(), 2.0, 0.2, 5.0)
    >>> scale(jnp.asarray([0.1, 1.0, 6.0])).tolist()
    [1.0, 2.0, 1.0]
  """
  checks.made("sde", sde, ScalarSDE)
  check_scale("scale", scale, functions=False)
  if not any(isinstance(end, jax.core.Tracer) for end in (low, high)) and not 0 <= float(low) < float(high):
    raise ValueError(f"low and high must be noise levels sigma / alpha with 0 <= low < high; got {low} and {high}")
  return _Interval(sde, scale, low, high)


def check_scale(name: str, value: Any, functions: bool = True) -> None:
  """Refuse a scale that is negative or no number, and functions where they are not meant; a traced one passes."""
  if callable(value):
    checks.made(name, value)
    if not functions:
      raise TypeError(f"{name} must be one number here, got a function of time")
    return
  if jnp.ndim(value) != 0:
    raise ValueError(
      f"{name} must be one number for all examples, got shape {jnp.shape(value)}: for one of each example map over "
      "them, jax.vmap of a function that guides and samples one"
    )
  if isinstance(value, jax.core.Tracer):
    return
  if isinstance(value, str) or not jnp.isrealobj(value):
    raise TypeError(f"{name} must be a number, got {value!r}")
  if not 0 <= float(value) < float("inf"):
    raise ValueError(f"{name} must be at least 0, got {value}: to be led away from a condition, use it as the null")


def at(scale: Scale, t: Float[Array, " b"]) -> Array:
  """The scale at times `[b]`: `[b]`, or one number for all.

  Raises:
    ValueError: for a function of time that returns another shape.
  """
  return jnp.asarray(checks.per_example("scale(t)", scale(t), len(t)) if callable(scale) else scale)


@custom_vmap
def everywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
  """The flag; under `vmap` whether it holds for all, so that it can decide a `lax.cond` that computes one branch."""
  return flag


@everywhere.def_vmap
def _everywhere(size: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
  return everywhere(jnp.all(flag)), False


def is_one(scale: Array) -> Bool[Array, ""]:
  """Whether the scale is 1 for all examples, also those of an outer `vmap`."""
  return everywhere(jnp.all(jax.lax.stop_gradient(scale) == 1))
