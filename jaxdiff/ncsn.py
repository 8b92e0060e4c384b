"""The noise levels of NCSN: a chain that adds noise in N steps, and its continuous process.

    x_i = x_{i-1} + sqrt(sigma_i^2 - sigma_{i-1}^2) eps,      i = 1 .. N,      sigma_0 = 0                           (1)
    q(x_i | x_0) = N(x_0, sigma_i^2 I)                                                                               (2)
    q(x_{i-1} | x_i, x_0) = N(x_0 + (sigma_{i-1} / sigma_i)^2 (x_i - x_0),
                              sigma_{i-1}^2 (sigma_i^2 - sigma_{i-1}^2) / sigma_i^2 I)                               (3)

References:
  Song & Ermon 2019, Generative Modeling by Estimating Gradients of the Data Distribution, Section 4, for (2); Song et
  al. 2021, Score-Based Generative Modeling through SDEs, eq. 8 and Appendix F, for (1) and (3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxdiff import checks, keys
from jaxdiff.schedules import float_time, piecewise_linear, table_entry
from jaxdiff.sde import VE, expand
from jaxdiff.typing import Keys, State, Step, Time

Coefficient = Float[Array, "..."]


def geometric_sigmas(levels: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Float[Array, " {levels}"]:
  """Noise levels with a constant ratio, from sigma_min to sigma_max.

  Raises:
    ValueError: for levels below 2, or not 0 < sigma_min < sigma_max.

  References:
    Song & Ermon 2020, Improved Techniques for Training Score-Based Generative Models, Technique 2.
  """
  if levels < 2:
    raise ValueError(f"levels must be at least 2, got {levels}")
  if not 0 < sigma_min < sigma_max:
    raise ValueError(f"sigma_min and sigma_max must be positive and increase, got {sigma_min} and {sigma_max}")
  return jnp.asarray(np.geomspace(sigma_min, sigma_max, levels), jnp.result_type(float))


def _check_sigmas(sigmas: np.ndarray) -> None:
  if sigmas.ndim != 1 or sigmas.size < 2:
    raise ValueError(f"sigmas must have the shape [N] with N >= 2, got {sigmas.shape}")
  if not np.all((sigmas > 0) & np.isfinite(sigmas)):
    raise ValueError(f"sigmas must be positive and finite, got values from {sigmas.min()} to {sigmas.max()}")
  if not np.all(np.diff(sigmas) > 0):
    raise ValueError(
      f"sigmas must increase: sigmas[0] = {sigmas[0]} is the level next to the data, sigmas[-1] = {sigmas[-1]} the "
      "noisiest. If the array runs from noise to data, as in the papers on NCSN, pass sigmas[::-1]"
    )


@checks.pytree
@dataclass(frozen=True, eq=False, init=False)
class Chain:
  """N noise levels; a pytree. Levels i are integers 0..N, scalar or `[b]`: 1 is the least noise, 0 the data.

  Args:
    sigmas: `[N]`, increasing, such as `geometric_sigmas(levels)`. Sigmas that are being traced are taken as they are.

  Raises:
    ValueError: for sigmas of another shape, not positive, or not increasing. Every method raises it for a Python
      integer i that is outside the chain; for an array it gives NaN there.
    TypeError: by every method, for an i that is not an integer.

  Example:
    >>> import jaxdiff as jd
    >>> chain = jd.ncsn.Chain(jd.ncsn.geometric_sigmas(10, sigma_min=0.01, sigma_max=1.0))
    >>> [round(float(chain.marginal(i)[1]), 3) for i in (0, 1, 10)]
    [0.0, 0.01, 1.0]
  """

  sigmas: Float[Array, " N"]

  def __init__(self, sigmas: ArrayLike | Sequence[float]):
    if not isinstance(sigmas, jax.core.Tracer):
      _check_sigmas(np.asarray(sigmas))
    object.__setattr__(self, "sigmas", jnp.asarray(sigmas, jnp.result_type(float)))

  @property
  def steps(self) -> int:
    """N."""
    return self.sigmas.shape[0]

  def marginal(self, i: Step) -> tuple[Coefficient, Coefficient]:
    """(1, sigma_i), each of the shape of i; (1, 0) at i = 0."""
    sigma = table_entry(jnp.concatenate([jnp.zeros_like(self.sigmas[:1]), self.sigmas]), i)
    return jnp.ones_like(sigma), sigma

  def perturb(self, key: Keys, x0: State, i: Step) -> tuple[State, State]:
    """Noise the data in one leap: (x_i, eps) with x_i = x_0 + sigma_i eps, as `jaxdiff.perturb` does."""
    noise = keys.normal(keys.per_example(key, len(x0)), x0.shape, x0.dtype)
    return x0 + expand(self.marginal(i)[1], x0) * noise, noise

  def posterior(self, x0: State, x_i: State, i: Step) -> tuple[State, Coefficient]:
    """Mean `[b, *d]` and variance (of the shape of i) of x_{i-1} given x_i and x_0, eq. (3); i >= 1."""
    before, sigma = self.marginal(jnp.asarray(i) - 1)[1], self.marginal(i)[1]
    left = (before / sigma) ** 2
    return x0 + expand(left, x0) * (x_i - x0), left * (sigma - before) * (sigma + before)

  def time(self, i: Step) -> Coefficient:
    """(i - 1) / (N - 1), the time of level i >= 1 in the process `sde()`."""
    return (jnp.asarray(i).astype(self.sigmas.dtype) - 1) / (self.steps - 1)

  def index(self, time: Time) -> Int[Array, "..."]:
    """The level nearest to a time in [0, 1], int32 in 1..N: for a network that takes the number of the level.

    The time that a network is given is that of the chain, unless the prediction is `edm` or has `log_snr_time`.
    """
    return jnp.round(float_time(time) * (self.steps - 1)).astype(jnp.int32) + 1

  def sde(self) -> "ChainSDE":
    """The continuous process through the levels, from sigma_1 at t = 0 to sigma_N at t = 1."""
    log_sigmas = jnp.log(self.sigmas)
    return ChainSDE(log_sigmas, jnp.diff(log_sigmas))


@checks.pytree
@dataclass(frozen=True, eq=False)
class ChainSDE:
  """Variance exploding, log sigma linear between the levels of a chain; made by `Chain.sde()`.

  For `geometric_sigmas` this is `jaxdiff.VE`. For others g(t) jumps at the levels. sigma is sigma_1, not 0, at t = 0.
  """

  log_sigmas: Float[Array, " nodes"]
  rises: Float[Array, " pieces"]

  t1 = 1.0

  def _at(self, t: Time) -> tuple[Coefficient, Coefficient]:
    return piecewise_linear(self.log_sigmas, self.rises, float_time(t))

  def drift(self, x: State, t: Time) -> State:
    return jnp.zeros_like(x)

  def diffusion(self, t: Time) -> Coefficient:
    log_sigma, rate = self._at(t)
    return jnp.exp(log_sigma) * jnp.sqrt(2 * rate)

  def diffuse(self, t: Time, v: State) -> State:
    return expand(self.diffusion(t), v) * v

  def marginal(self, t: Time) -> tuple[Coefficient, Coefficient]:
    sigma = jnp.exp(self._at(t)[0])
    return jnp.ones_like(sigma), sigma

  def time_of_log_snr(self, log_snr: Time) -> Coefficient:
    log_sigma = -0.5 * float_time(log_snr)
    nodes = jnp.linspace(0.0, 1.0, self.log_sigmas.size, dtype=log_sigma.dtype)
    known = self.log_sigmas.astype(log_sigma.dtype)
    return jnp.interp(log_sigma, known, nodes, left="extrapolate", right="extrapolate")

  def _limit(self) -> VE:
    return VE(jnp.exp(self.log_sigmas[0]), jnp.exp(self.log_sigmas[-1]))

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    return self._limit().prior_sample(key, shape)

  def prior_log_prob(self, z: State) -> Float[Array, " b"]:
    return self._limit().prior_log_prob(z)
