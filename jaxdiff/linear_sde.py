"""Any linear process dx = f(t) x dt + g(t) dw, from its two functions of time.

The moments of x_t | x_0 ~ N(alpha x_0, sigma^2 I) solve

    alpha' = f alpha,  alpha(0) = 1,        (sigma^2)' = 2 f sigma^2 + g^2,  sigma(0) = 0

and are integrated once over 256 cells of [0, t1]. From the start s of its cell, time t is reached with

    alpha(t) = alpha(s) e^D(t),    sigma^2(t) = e^(2 D(t)) [sigma^2(s) + int_s^t g^2 e^(-2 D)],    D(t) = int_s^t f

where the outer integral is Gauss-Legendre quadrature with 8 nodes in [s, t], and D at these nodes the integral of the
polynomial through f at them. Nothing here grows with time, so alpha = e^-80 loses no digits in float32.

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 29; Karras et al. 2022, Elucidating the Design
  Space, Appendix B.1, for the moments; Hairer, Nørsett & Wanner 1993, Solving Ordinary Differential Equations I,
  Section II.7, for Gauss collocation.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.polynomial import legendre

from jaxdiff import checks, keys, schedules
from jaxdiff.schedules import float_time
from jaxdiff.sde import expand
from jaxdiff.sde import log_snr as log_snr_at
from jaxdiff.typing import Keys, State, Time

Coefficient = Callable[[Array], Array]

_CELLS = 256
_NODES = 8
_AGREEMENT = 1e-3


def _gauss() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Nodes and weights of [0, 1], and the integrals [n, n] from 0 to each node of the polynomials 1 at one node."""
  nodes, weights = legendre.leggauss(_NODES)
  basis = legendre.legvander(nodes, _NODES - 1)
  integrals = np.stack([legendre.legval(nodes, legendre.legint(row, lbnd=-1)) for row in np.eye(_NODES)], axis=1)
  return (nodes + 1) / 2, weights / 2, integrals @ np.linalg.inv(basis) / 2


_POINTS, _WEIGHTS, _INTEGRALS = _gauss()


def _values(name: str, function: Coefficient, t: Any) -> np.ndarray:
  """A function of time at the host's times, checked."""
  if not callable(function):
    raise TypeError(f"{name} must be a function of time, got {function!r}")
  values = function(jnp.asarray(t, jnp.result_type(float)))
  if isinstance(values, jax.core.Tracer):
    raise TypeError(f"{name} depends on a traced value: make the LinearSDE outside of jit, of functions of time alone")
  if np.shape(values) != t.shape:
    raise ValueError(
      f"{name}(t) must have the shape of t, {t.shape}; got {np.shape(values)}: for a constant c return "
      "jnp.full_like(t, c)"
    )
  if not np.all(np.isfinite(values)):
    worst = t[~np.isfinite(values)][0]
    raise ValueError(f"{name}(t) must be finite for 0 < t < t1, got {np.asarray(values)[t == worst][0]} at t = {worst}")
  return np.asarray(values, np.float64)


def _integrate(f: Coefficient, g: Coefficient, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(alpha, sigma^2) at these times, in float64 from values of the default type."""
  h = np.diff(times)[:, None]
  points = times[:-1, None] + h * _POINTS
  rate, noise = _values("drift_coefficient", f, points), _values("diffusion_coefficient", g, points)
  if np.any(noise < 0):
    raise ValueError(f"diffusion_coefficient(t) must not be negative, got {noise.min()}")
  inner = np.exp(-2 * h * rate @ _INTEGRALS.T)
  growth, added = np.exp(h[:, 0] * (rate @ _WEIGHTS)), h[:, 0] * ((noise**2 * inner) @ _WEIGHTS)
  variance = [0.0]
  for grown, more in zip(growth, added, strict=True):
    variance.append(grown**2 * (variance[-1] + more))
  return np.concatenate([[1.0], np.cumprod(growth)]), np.array(variance)


def _table(f: Coefficient, g: Coefficient, t1: float) -> tuple[np.ndarray, np.ndarray]:
  """(alpha, sigma^2) at the ends of the cells, compared with those of half as many cells."""
  with jax.ensure_compile_time_eval():
    times = _times(t1)
    alpha, variance = fine = _integrate(f, g, times)
    coarse = _integrate(f, g, times[::2])
  if not variance[-1] > 0:
    raise ValueError("diffusion_coefficient(t) must be positive somewhere in (0, t1): a process without noise, got 0")
  if not np.all(np.isfinite(fine)) or alpha[-1] == 0:
    raise ValueError(f"the moments leave the numbers: alpha(t1) = {alpha[-1]}, sigma(t1)^2 = {variance[-1]}")
  error = max(np.max(np.abs(a[1:] / b[::2][1:] - 1)) for a, b in zip(coarse, fine, strict=True))
  if error > _AGREEMENT:
    raise ValueError(
      f"drift_coefficient and diffusion_coefficient must be smooth functions of time: {_CELLS // 2} and {_CELLS} cells "
      f"give moments that differ by a part {error:.1e}; rescale time where they change fast"
    )
  return alpha, variance


def _times(t1: float) -> np.ndarray:
  """Ends of the cells: numbers that float32 and float64 both have."""
  return np.linspace(0.0, t1, _CELLS + 1).astype(np.float32).astype(np.float64)


@functools.partial(checks.pytree, static=("drift_coefficient", "diffusion_coefficient", "t1"))
@dataclass(frozen=True)
class LinearSDE:
  """dx = f(t) x dt + g(t) dw for functions f and g of your own, smooth in time; the prior is N(0, sigma(t1)^2 I).

  A pytree whose leaves are the tables of its moments. The functions belong to its structure and are compared by
  identity: make them once, since a process of new lambdas compiles everything anew. They are called with arrays of any
  shape, within jit; the moments are as differentiable in t, and as accurate in float32, as their values are.

  Args:
    drift_coefficient: f, elementwise on an array of times.
    diffusion_coefficient: g, elementwise, nowhere negative.
    t1: the last time, a Python number.

  Raises:
    TypeError: if t1 is no Python number, or f or g no function or one of a traced value.
    ValueError: for a t1 that is not positive; for functions that return another shape than that of t, numbers that are
      not finite, a g that is negative or 0 everywhere, or functions so rough that the moments are wrong.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.LinearSDE(lambda t: -5 * t, lambda t: jnp.sqrt(10 * t))
    >>> alpha, sigma = sde.marginal(0.5)
    >>> round(float(alpha), 4), round(float(alpha**2 + sigma**2), 4)  # exp(-5 / 8)
    (0.5353, 1.0)
  """

  drift_coefficient: Coefficient
  diffusion_coefficient: Coefficient
  t1: float | int = 1.0
  alphas: Any = field(init=False, repr=False, compare=False)
  variances: Any = field(init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    if isinstance(self.t1, bool) or not isinstance(self.t1, int | float):
      raise TypeError(f"t1 must be a Python number, got {type(self.t1).__name__}")
    if not (self.t1 > 0 and math.isfinite(self.t1)):
      raise ValueError(f"t1 must be positive and finite, the time at which the noise is the prior's; got {self.t1}")
    t1 = float(self.t1)
    alphas, variances = _table(self.drift_coefficient, self.diffusion_coefficient, t1)
    for name, value in (("t1", t1), ("alphas", alphas), ("variances", variances)):
      object.__setattr__(self, name, value)

  def drift(self, x: State, t: Time) -> State:
    return expand(self._at(self.drift_coefficient, float_time(t)), x) * x

  def diffuse(self, t: Time, v: State) -> State:
    return expand(self.diffusion(t), v) * v

  def diffusion(self, t: Time) -> Float[Array, "..."]:
    return self._at(self.diffusion_coefficient, float_time(t))

  def marginal(self, t: Time) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    shape, t = jnp.shape(t), float_time(t).ravel()
    cell = jnp.clip(jnp.floor(t * (_CELLS / self.t1)).astype(int), 0, _CELLS - 1)
    times, alphas, variances = (jnp.asarray(v, t.dtype)[cell] for v in (_times(self.t1), self.alphas, self.variances))
    points, weights, integrals = (jnp.asarray(v, t.dtype) for v in (_POINTS, _WEIGHTS, _INTEGRALS))
    h = t - times
    at = times[:, None] + h[:, None] * points[None]
    rate, noise = self._at(self.drift_coefficient, at), self._at(self.diffusion_coefficient, at)
    grown = h * jnp.matmul(rate, weights, precision="highest")
    inner = jnp.exp(-2 * h[:, None] * jnp.matmul(rate, integrals.T, precision="highest"))
    added = h * jnp.matmul(noise**2 * inner, weights, precision="highest")
    alpha, sigma = alphas * jnp.exp(grown), jnp.exp(grown) * jnp.sqrt(variances + added)
    return alpha.reshape(shape), sigma.reshape(shape)

  @jax.jit
  def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
    return schedules.invert(lambda t: -log_snr_at(self, t), -float_time(log_snr), 0.0, self.t1)

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    noise = keys.normal(keys.per_example(key, shape[0]), shape, jnp.result_type(float))
    return self._prior_scale(noise) * noise

  def prior_log_prob(self, z: State) -> Float[Array, " b"]:
    scale = self._prior_scale(z)
    squares = jnp.sum((z / scale) ** 2, axis=range(1, z.ndim))
    return -0.5 * squares - math.prod(z.shape[1:]) * (0.5 * math.log(2 * math.pi) + jnp.log(scale))

  def _prior_scale(self, like: Array) -> Array:
    return jnp.sqrt(jnp.asarray(self.variances, like.dtype)[-1])

  def _at(self, function: Coefficient, t: Array) -> Array:
    return function(t).astype(t.dtype)
