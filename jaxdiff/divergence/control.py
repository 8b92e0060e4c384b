r"""A control variate for probes: what they would say of Gaussian data.

Under the probability flow of data N(m, C), C = sum_i l_i q_i q_i^T, the Jacobian does not depend on x, and its integral
over the flow is known: with growth(l) = 1/2 log [(alpha_1^2 l + sigma_1^2) / (alpha_0^2 l + sigma_0^2)], 0 and 1 the
ends of the flow, a probe v sees

    sum_i growth(l_i) (q_i . v)^2,      in the mean  sum_i growth(l_i)

The difference is subtracted from what the probe sees of the model. It has mean 0, costs nothing during the solve, and
takes away all the noise where the model is Gaussian. Rademacher probes in the basis q itself have (q_i . v)^2 = 1:
nothing is left to correct.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxdiff import checks
from jaxdiff.divergence import bases
from jaxdiff.divergence.bases import Basis
from jaxdiff.divergence.estimator import Estimates, Growth
from jaxdiff.typing import State


class GaussianControl(NamedTuple):
  """The covariance of data, as a control variate.

  Attributes:
    basis: its eigenvectors.
    variances: its eigenvalues `[d]`.
  """

  basis: Basis
  variances: Float[np.ndarray, " d"]

  def correction(self, v: Float[Array, "b m *d"], growth: Growth) -> Estimates:
    """sum_i growth(l_i) ((q_i . v)^2 - 1) for every probe v."""
    size = len(self.variances)
    if v[0, 0].size != size:
      raise ValueError(f"control is of data of {size} numbers, an example {v.shape[2:]} has {v[0, 0].size}")
    coordinates = self.basis.analyze(v.reshape(-1, *v.shape[2:])).reshape(*v.shape[:2], size)
    weights = growth(jnp.asarray(self.variances, v.dtype))
    return jnp.sum(weights[None, None] * (coordinates**2 - 1), axis=2)


def gaussian_control(x: State, basis: Literal["pca", "dct", "color_dct"] = "pca") -> GaussianControl:
  """The control variate of the covariance of data.

  Args:
    x: examples `[n, *d]`, as the model sees them: dequantized and in its range.
    basis: "pca": their whole covariance, d^2 memory and d^3 time on the host; "dct" or "color_dct": the variances of
      their coefficients alone, for large images.

  Returns:
    What `hutchinson` takes as `control`.

  Raises:
    TypeError: for data that are not floating point.
    ValueError: for fewer than 2 examples, data that are not finite, an unknown basis, or one that does not
      fit the data.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> x = jnp.asarray([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> jd.divergence.gaussian_control(x).variances.tolist()
    [0.5, 4.5]
  """
  checks.one_of("basis", basis, Literal["pca", "dct", "color_dct"])
  if basis != "pca":
    named = bases.of_name(basis)
    return GaussianControl(named, bases.coordinate_variances(x, named))
  variances, vectors = bases.principal(x)
  return GaussianControl(bases.of_matrix(vectors), variances)
