"""Random probes: tr J = E[v . J v] for E[v v^T] = I.

Of one probe, with S the symmetric part of J, in d dimensions,

    Rademacher in a basis Q   Var = 2 (|S|^2 - sum_i (Q^T S Q)_ii^2)
    Gaussian                  Var = 2 |S|^2
    sphere                    Var = 2 d / (d + 2) (|S|^2 - tr(S)^2 / d)

Rademacher probes are exact in the basis of the eigenvectors of S; the others look the same in every basis.

References:
  Hutchinson 1989, A Stochastic Estimator of the Trace of the Influence Matrix; Girard 1989, A Fast Monte-Carlo
  Cross-Validation Procedure, for the sphere; Avron & Toledo 2011, Randomized Algorithms for Estimating the Trace, for
  the variances; Grathwohl et al. 2019, FFJORD, eq. 7.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from jaxdiff import checks
from jaxdiff.divergence import bases
from jaxdiff.divergence.bases import Basis, Matrix
from jaxdiff.divergence.control import GaussianControl
from jaxdiff.divergence.estimator import Divergence, Estimates, over_probes
from jaxdiff.divergence.exact import EXACT_UP_TO, exact
from jaxdiff.typing import State

Noise = Literal["rademacher", "gaussian", "sphere"]


def default(dimension: int) -> Divergence:
  """The exact trace up to 64 dimensions, one Rademacher probe above."""
  return exact() if dimension <= EXACT_UP_TO else hutchinson()


def _sphere(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  """`[m, *d]`, uniform on the spheres of radius sqrt(d)."""
  v = jax.random.normal(key, shape, dtype)
  square = jnp.sum(v**2, axis=range(1, v.ndim), keepdims=True)
  return v * jnp.sqrt(math.prod(shape[1:]) / square)


def _rademacher(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  """Random signs, the same ones in float32 and float64."""
  return 2 * (jax.random.bits(key, shape, jnp.uint8) & 1).astype(dtype) - 1


_DRAW = {"rademacher": _rademacher, "gaussian": jax.random.normal, "sphere": _sphere}


def hutchinson(
  probes: int = 1,
  noise: Noise = "rademacher",
  basis: bases.Name | Matrix | None = None,
  control: GaussianControl | None = None,
) -> Divergence:
  """The mean of v . J v over random probes v = Q r.

  Args:
    probes: how many; their standard error needs at least 2.
    noise: of r: random signs, standard normal, or uniform on the sphere of radius sqrt(d).
    basis: Q: None or "identity" for the pixels; "dct" for the cosine transform of each channel of images [h, w, c]
      or [h, w], "color_dct" for that along the channels as well; a matrix [d, d] with orthonormal columns, such as
      `pca_basis(x)`. Other noise than Rademacher is the same in every basis.
    control: of `gaussian_control(x)`, subtracted from integrals over a flow by `likelihood.log_prob`.

  Raises:
    ValueError: for probes below 1, an unknown distribution, a basis that is unknown or not orthonormal, or one with
      noise that is the same in every basis; when called, for examples that do not fit the basis.
    TypeError: for a traced basis, or a control that is none.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> divergence = jd.divergence.hutchinson(probes=4)
    >>> x = jnp.ones((1, 3))
    >>> v = divergence.draw(jax.random.split(jax.random.key(0), 1), x)
    >>> divergence.estimate(lambda x: 2 * x, x, v, jnp.zeros(()))[1].tolist()
    [[6.0, 6.0, 6.0, 6.0]]
  """
  checks.whole("probes", probes, 1)
  checks.one_of("noise", noise, Noise)
  q = _basis(basis)
  if noise != "rademacher" and q is not bases.PIXELS:
    raise ValueError(f"noise={noise!r} is the same in every basis: leave basis out, or use noise='rademacher'")
  if control is not None:
    checks.made("control", control, GaussianControl)

  def draw(key: Key[Array, " b"], x: State) -> Array:
    return jax.vmap(lambda key, x: q.synthesize(_DRAW[noise](key, (probes, *x.shape), x.dtype)))(key, x)

  if control is None:
    return Divergence(draw, estimate, over_probes)
  return Divergence(draw, estimate, over_probes, control.correction)


def _basis(basis: bases.Name | Matrix | None) -> Basis:
  if basis is None or isinstance(basis, str):
    return bases.of_name(basis or "identity")
  return bases.of_matrix(basis)


def estimate(f: Callable[[State], State], x: State, v: Array, identity: Array) -> tuple[State, Estimates]:
  """f(x) and v . J v for the probes v `[b, m, *d]`, all by one linearization."""
  value, linear = jax.linearize(f, x)
  products = jax.vmap(linear, in_axes=1, out_axes=1)(v)
  return value, jnp.sum(v * products, axis=range(2, v.ndim))
