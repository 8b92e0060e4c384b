"""Orthonormal bases of the space of an example: pixels, the discrete cosine transform, principal components.

The two-dimensional DCT-II of each channel of images [h, w, c] or [h, w]:

    q_kl(i, j) = c_k c_l cos(pi k (i + 1/2) / h) cos(pi l (j + 1/2) / w),   c_0 = 1/sqrt(h), c_k = sqrt(2/h)

and likewise c_l with w. Its vectors are close to the principal components of grey photographs. Colours are correlated,
too: for the three of an image [h, w, 3] the DCT along the channels is the mean (1, 1, 1) / sqrt(3) and two differences,
(1, 0, -1) / sqrt(2) and (1, -2, 1) / sqrt(6).

References:
  Ahmed, Natarajan & Rao 1974, Discrete Cosine Transform; Ohta, Kanade & Sakai 1980, Color Information for Region
  Segmentation, for the colours.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxdiff import checks
from jaxdiff.typing import State

Matrix = Float[Array, "d d"] | Float[np.ndarray, "d d"]
Transform = Callable[[Float[Array, "n *d"]], Float[Array, "n *d"]]

_ORTHONORMAL = 1e-5  # what float32 eigenvectors keep
_CHUNK = 1024  # examples


class Basis(NamedTuple):
  """An orthonormal basis Q of examples `[*d]`.

  Attributes:
    synthesize: `[n, *d] -> [n, *d]`, Q r.
    analyze: `[n, *d] -> [n, *d]`, Q^T v, the coordinates of v.
  """

  synthesize: Transform
  analyze: Transform


def _pixels(x: Array) -> Array:
  return x


def _of_planes(transform: Callable[..., Array]) -> Transform:
  def apply(x: Array) -> Array:
    if x.ndim not in (3, 4):
      raise ValueError(
        f"the basis 'dct' needs examples [h, w] or [h, w, c], got {x.shape[1:]}: reshape them, or use another basis"
      )
    return transform(x, axes=(1, 2), norm="ortho")

  return apply


def _of_colors(planes: Transform, transform: Callable[..., Array]) -> Transform:
  def apply(x: Array) -> Array:
    if x.ndim != 4:
      raise ValueError(f"the basis 'color_dct' needs examples [h, w, c], got {x.shape[1:]}: use another basis")
    return planes(transform(x, axis=3, norm="ortho"))

  return apply


PIXELS = Basis(_pixels, _pixels)
DCT = Basis(_of_planes(jax.scipy.fft.idctn), _of_planes(jax.scipy.fft.dctn))
COLOR_DCT = Basis(_of_colors(DCT.synthesize, jax.scipy.fft.idct), _of_colors(DCT.analyze, jax.scipy.fft.dct))

Name = Literal["identity", "dct", "color_dct"]
_NAMED = {"identity": PIXELS, "dct": DCT, "color_dct": COLOR_DCT}


def of_matrix(matrix: Any) -> Basis:
  """The basis whose vectors are the columns of a matrix.

  Raises:
    TypeError: for a traced matrix.
    ValueError: for a matrix that is not square and orthonormal.
  """
  if isinstance(matrix, jax.core.Tracer):
    raise TypeError("basis must be known when the estimator is made, as it is verified: make it outside jit")
  q = np.asarray(matrix)
  if q.ndim != 2 or q.shape[0] != q.shape[1]:
    raise ValueError(f"basis must be a square matrix [d, d] for examples of d numbers, got shape {q.shape}")
  wide = q.astype(np.float64)
  error = np.max(np.abs(wide.T @ wide - np.eye(len(q))))
  if not error <= _ORTHONORMAL:
    raise ValueError(
      f"basis must have orthonormal columns, its Gram matrix is off by {error:.2g}: take Q of numpy.linalg.qr(basis)"
    )

  def times(x: Array, m: np.ndarray) -> Array:
    if x[0].size != len(q):
      raise ValueError(f"basis is {len(q)} x {len(q)}, but an example {x.shape[1:]} has {x[0].size} numbers")
    flat = jnp.matmul(x.reshape(len(x), -1), jnp.asarray(m, x.dtype), precision="highest")
    return flat.reshape(x.shape)

  return Basis(lambda r: times(r, q.T), lambda v: times(v, q))


def of_name(name: Name) -> Basis:
  """The pixels, or a discrete cosine transform."""
  checks.one_of("basis", name, Name)
  return _NAMED[name]


def principal(x: State) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
  """Variances and principal components (columns) of data `[n, *d]`, in float64."""
  flat = _centered(x).reshape(len(x), -1)
  variances, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
  return np.maximum(variances, 0.0), vectors


def coordinate_variances(x: State, basis: Basis) -> Float[np.ndarray, " d"]:
  """Variances of the coordinates of data `[n, *d]` in a basis, in float64."""
  centered = _centered(x)
  total = np.zeros(centered.shape[1:])
  for start in range(0, len(centered), _CHUNK):
    coefficients = np.asarray(basis.analyze(jnp.asarray(centered[start : start + _CHUNK])), np.float64)
    total += np.sum(coefficients**2, axis=0)
  return total.reshape(-1) / len(centered)


def _centered(x: State) -> np.ndarray:
  """The data less their mean, in float64, refused unless finite."""
  checks.batch("x", x)
  if len(x) < 2:
    raise ValueError(f"x must have at least 2 examples for a covariance, got {len(x)}")
  values = np.asarray(x, np.float64)
  if not np.isfinite(values).all():
    raise ValueError("x must be finite: it holds NaN or infinite numbers")
  return values - values.mean(axis=0)


def pca_basis(x: State) -> Float[np.ndarray, "d d"]:
  """The principal components of data, as a basis for `hutchinson`.

  Args:
    x: examples `[n, *d]`, as the model sees them; several times d of them tell the components apart.

  Returns:
    `[d, d]` float64, orthonormal columns by rising variance. Takes d^2 memory and d^3 time, on the host.

  Raises:
    TypeError: for data that are not floating point.
    ValueError: for fewer than 2 examples or data that are not finite.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> x = jnp.asarray([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> abs(jd.divergence.pca_basis(x)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
  """
  return principal(x)[1]
