"""Critically-damped Langevin diffusion: data are positions, moved by velocities, and only velocities are noised.

    dx = beta v / M dt,    dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dw,    Gamma^2 = 4 M              (1)

keeps N(0, I) for positions with N(0, M I) for velocities, its prior. A state is u = (x, v), `[b, *d, 2]`. With tau =
beta t / sqrt M and z = 2 tau every coordinate of (x, v / sqrt M) has

    mean       e^-tau [[1 + tau, tau], [-tau, 1 - tau]] of where it was                                             (2)
    variances  S_xx = 1 - e^-z (1 + z + z^2 / 2),    S_xv = z^2 / 2 e^-z,    S_vv = 1 - e^-z (1 - z + z^2 / 2)
    determinant  4 e^-z (sinh tau - tau) (sinh tau + tau)                                                           (3)

given where it was. Given x_0 alone, with velocities N(0, gamma M I) at the start marginalized, the variances grow by
gamma a a^T for the second column a of the matrix in (2), and the determinant by

    gamma a^T adj(S) a = gamma e^-z (z^2 / 2 - z + 1 - e^-z)                                                        (4)

S_xx is of order tau^3, the determinant of tau^4: what cancels in them at small tau is summed as series, of which no
digits are lost.

References:
  Dockhorn, Vahdat & Kreis 2022, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Section 3.1
  for (1), Appendix B for (2).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys, schedules
from jaxdiff.schedules import float_time
from jaxdiff.sde import SDE, batch_time, expand
from jaxdiff.typing import Keys, PhaseState, Scalar, State, Time

Kind = Literal["uniform", "quadratic"]

_TERMS = 21
_SMALL = 2.0  # of z, below which differences are summed as series


@runtime_checkable
class AugmentedSDE(SDE, Protocol):
  """A process of positions and velocities, `[b, *d, 2]`, that noises velocities; Gaussian given the position x_0."""

  @property
  def velocity_std(self) -> Scalar:
    """The standard deviation of the velocities at t = 0."""
    ...

  def given_position(self, t: Time) -> tuple[Float[Array, "... 2"], Float[Array, "... 2 2"]]:
    """(m, L), L lower triangular, of u_t | x_0 ~ N(m x_0, L L^T), coordinate by coordinate."""
    ...


@checks.pytree
@dataclass(frozen=True)
class CLD:
  """Critically-damped Langevin diffusion, eq. (1); friction Gamma = 2 sqrt M.

  Attributes:
    beta: rate of time; positions come to rest as (1 + tau) e^-tau with tau = beta t / sqrt M.
    mass: M, the variance of velocities in the prior.
    gamma: variance of velocities at t = 0, as a part of M.

  Raises:
    ValueError: for numbers that are not positive and finite; when called, for a state that is not [b, *d, 2].

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.CLD()
    >>> u = sde.prior_sample(jax.random.key(0), (4, 3, 2))  # 4 examples of 3 dimensions
    >>> jax.eval_shape(sde.prior_log_prob, u).shape, jax.eval_shape(sde.drift, u, 0.5).shape
    ((4,), (4, 3, 2))
  """

  beta: Scalar = 4.0
  mass: Scalar = 0.25
  gamma: Scalar = 0.04

  t1 = 1.0

  def __post_init__(self) -> None:
    numbers = vars(self).values()
    if all(isinstance(v, int | float) for v in numbers) and not all(math.isfinite(v) and v > 0 for v in numbers):
      raise ValueError(f"CLD needs positive, finite numbers beta, mass and gamma, got {self}")

  @property
  def friction(self) -> Scalar:
    """Gamma, of critical damping."""
    return 2 * self.mass**0.5

  @property
  def velocity_std(self) -> Scalar:
    return (self.gamma * self.mass) ** 0.5

  def drift(self, u: PhaseState, t: Time) -> PhaseState:
    x, v = split(u)
    beta, mass, friction = (jnp.asarray(value, u.dtype) for value in (self.beta, self.mass, self.friction))
    return beta * join(v / mass, -x - friction / mass * v)

  def diffuse(self, t: Time, w: PhaseState) -> PhaseState:
    x, v = split(w)
    return join(jnp.zeros_like(x), jnp.sqrt(2 * jnp.asarray(self.friction * self.beta, w.dtype)) * v)

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> PhaseState:
    _check("shape of the prior's samples", shape)
    x, v = split(keys.normal(keys.per_example(key, shape[0]), shape, jnp.result_type(float)))
    return join(x, jnp.sqrt(jnp.asarray(self.mass, v.dtype)) * v)

  def prior_log_prob(self, z: PhaseState) -> Float[Array, " b"]:
    x, v = split(z)
    mass = jnp.asarray(self.mass, z.dtype)
    squares = jnp.sum(x**2 + v**2 / mass, axis=range(1, x.ndim))
    return -0.5 * squares - x[0].size * (math.log(2 * math.pi) + 0.5 * jnp.log(mass))

  def transition(self, t: Time, s: Time = 0.0) -> tuple[Float[Array, "... 2 2"], Float[Array, "... 2 2"]]:
    """(A, L), L lower triangular, of u_t | u_s ~ N(A u_s, L L^T), coordinate by coordinate, s <= t."""
    tau, root = self._tau(float_time(t) - float_time(s))
    return _mean(tau, root), _cholesky(tau, jnp.zeros_like(tau), root)

  def given_position(self, t: Time) -> tuple[Float[Array, "... 2"], Float[Array, "... 2 2"]]:
    tau, root = self._tau(float_time(t))
    return _mean(tau, root)[..., 0], _cholesky(tau, jnp.asarray(self.gamma, tau.dtype), root)

  def step_back(self, u: PhaseState, t: Time, s: Time, noise: PhaseState) -> PhaseState:
    """u_s given u_t = u, s <= t, where the process keeps its prior: (2) and (3) with velocities turned round.

    Args:
      u: the state at t, `[b, *d, 2]`.
      t: a time, or one per example.
      s: an earlier one.
      noise: standard normal numbers like u.
    """
    matrix, cholesky = self.transition(t, s)
    x, v = split(u)
    x, v = split(_apply(matrix, join(x, -v)) + _apply(cholesky, noise))
    return join(x, -v)

  def _tau(self, t: Float[Array, "..."]) -> tuple[Array, Array]:
    root = jnp.sqrt(jnp.asarray(self.mass, t.dtype))
    return jnp.asarray(self.beta, t.dtype) * t / root, root


def split(u: PhaseState) -> tuple[State, State]:
  """Positions and velocities of a state `[b, *d, 2]`, each `[b, *d]`.

  Raises:
    ValueError: for another last axis, or none of data before it.
  """
  _check("u", jnp.shape(u))
  return u[..., 0], u[..., 1]


def join(x: State, v: State) -> PhaseState:
  """The state `[b, *d, 2]` of positions and velocities."""
  return jnp.stack([x, v], axis=-1)


def _check(name: str, shape: tuple[int, ...]) -> None:
  if len(shape) < 3 or shape[-1] != 2:
    raise ValueError(
      f"{name} must be [b, *d, 2], with position and velocity on the last axis, got {tuple(shape)}: data become "
      "a state by cld.perturb, and sampling starts from sde.prior_sample(key, (b, *d, 2))"
    )


def _matrix(xx: Array, xv: Array, vx: Array, vv: Array) -> Float[Array, "... 2 2"]:
  return jnp.stack([jnp.stack([xx, xv], axis=-1), jnp.stack([vx, vv], axis=-1)], axis=-2)


def _apply(matrix: Float[Array, "... 2 2"], u: PhaseState) -> PhaseState:
  """The matrix of every example times every coordinate's (x, v)."""
  x, v = split(u)
  row = lambda i: expand(matrix[..., i, 0], x) * x + expand(matrix[..., i, 1], v) * v
  return join(row(0), row(1))


def _mean(tau: Array, root: Array) -> Float[Array, "... 2 2"]:
  """Eq. (2) for v itself; root is sqrt M."""
  decay = jnp.exp(-tau)
  return _matrix(decay * (1 + tau), decay * tau / root, -decay * tau * root, decay * (1 - tau))


def _series(z: Array) -> Array:
  """(e^z - 1 - z - z^2 / 2) / z^3 of small z."""
  total = jnp.zeros_like(z)
  for k in reversed(range(_TERMS)):
    total = total * z + 1 / math.factorial(k + 3)
  return total


def _cholesky(tau: Array, gamma: Array, root: Array) -> Float[Array, "... 2 2"]:
  """L of the covariance (3) and (4) for v itself: from S_xx / tau^2, S_xv / tau and the determinant / tau^2."""
  z = 2 * tau
  small = z < _SMALL
  near, far = jnp.where(small, tau, 0), jnp.where(small, 1, tau)
  decay = jnp.exp(-z)
  of_small = lambda value, otherwise: jnp.where(small, value, otherwise / far**2)
  rising, falling, ahead, behind = _series(jnp.stack([2 * near, -2 * near, near, -near]))
  position = of_small(8 * near * decay * rising, 1 - decay * (1 + z + z**2 / 2))
  start = of_small(8 * near * falling, z**2 / 2 - z + 1 - decay)
  # 2 e^-tau (sinh tau - tau), the factor of the determinant that is small.
  slow = of_small(near * jnp.exp(-tau) * (ahead + behind), 1 - decay - z * jnp.exp(-tau))
  determinant = slow * (z * jnp.exp(-tau) - jnp.expm1(-z)) + gamma * decay * start
  variance = jnp.maximum(position + gamma * decay, jnp.finfo(tau.dtype).tiny)  # 0 at tau = 0 from a given u
  covariance = decay * (z + gamma * (1 - tau))
  xx, vx, vv = tau * jnp.sqrt(variance), root * covariance / jnp.sqrt(variance), jnp.sqrt(determinant / variance)
  return _matrix(xx, jnp.zeros_like(tau), vx, root * vv)


def start_time(sde: AugmentedSDE, t0: Scalar | None, noise_to_signal: float) -> Float[Array, ""]:
  """The smallest time: t0, or for None that at which the position's deviation is this part of the weight of x_0.

  Raises:
    ValueError: for a t0 outside (0, t1), at whose lower end the velocity has no score given x_0.
  """
  known = not any(isinstance(value, jax.core.Tracer) for value in (t0, sde.t1))
  if t0 is not None:
    if known and not 0 < float(t0) < float(sde.t1):
      raise ValueError(f"t0 must lie in (0, t1) = (0, {sde.t1}), got {t0}: the velocity has no score at 0")
    return float_time(t0)

  def ratio(t: Array) -> Array:
    mean, cholesky = sde.given_position(t)
    return cholesky[..., 0, 0] / mean[..., 0]

  with jax.ensure_compile_time_eval():
    time = schedules.invert(ratio, float_time(noise_to_signal), 0.0, sde.t1)
    late = time >= sde.t1
  if not isinstance(late, jax.core.Tracer) and late:
    raise ValueError(f"positions are not noised by a part {noise_to_signal} before t1 = {sde.t1}: pass t0; got {sde}")
  return time


def time_grid(
  sde: AugmentedSDE, steps: int, kind: Kind = "quadratic", t0: Scalar | None = None
) -> Float[Array, " {steps}+1"]:
  """Times from the prior to the data, where a sampler steps.

  Args:
    sde: a process of positions and velocities.
    steps: number of steps.
    kind: what is evenly spaced: "quadratic" (sqrt t, so that steps are short near the data) or "uniform" (t itself).
    t0: the last time; None for that at which the deviation of positions is 2e-3 of the weight of x_0.

  Returns:
    Decreasing times `[steps + 1]`, from exactly `sde.t1` to exactly `t0`.

  Raises:
    ValueError: for steps below 1, an unknown kind, a t0 outside (0, t1).
    TypeError: for steps that are no integer.

  Example:
    >>> import jaxdiff as jd
    >>> [round(float(t), 2) for t in jd.cld.time_grid(jd.CLD(), 4, t0=0.01)]
    [1.0, 0.6, 0.3, 0.11, 0.01]

  References:
    Dockhorn et al. 2022, Section 5 (quadratic striding).
  """
  checks.made("sde", sde, AugmentedSDE)
  checks.whole("steps", steps, 1)
  checks.one_of("kind", kind, Kind)
  first, last = float_time(sde.t1), start_time(sde, t0, schedules.SAMPLING_NOISE_TO_SIGNAL)
  with jax.ensure_compile_time_eval():
    last = last.astype(first.dtype)
    fraction = jnp.linspace(0.0, 1.0, steps + 1, dtype=first.dtype)
    if kind == "quadratic":
      times = (jnp.sqrt(first) + fraction * (jnp.sqrt(last) - jnp.sqrt(first))) ** 2
    else:
      times = first + fraction * (last - first)
    return times.at[0].set(first).at[-1].set(last)


def perturb(key: Keys, x0: State, t: Time, sde: AugmentedSDE) -> tuple[PhaseState, PhaseState]:
  """Noise the data, with their velocities at t = 0 drawn and marginalized: u_t = m x_0 + L eps.

  Args:
    key: one key, or one per example.
    x0: data `[b, *d]`.
    t: a time, or one per example.
    sde: a process of positions and velocities.

  Returns:
    (u_t, eps), each `[b, *d, 2]` of the type of x0.

  Raises:
    TypeError: for an x0 that is no array of floating point numbers.
    ValueError: for a t of another length, an x0 without an axis of data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> noised = lambda key, x0, t: jd.cld.perturb(key, x0, t, jd.CLD())
    >>> u, noise = jax.eval_shape(noised, jax.random.key(0), jnp.ones((4, 3)), 0.5)
    >>> u.shape, noise.shape
    ((4, 3, 2), (4, 3, 2))
  """
  checks.batch("x0", x0)
  checks.vectors("x0", x0)
  mean, cholesky = sde.given_position(batch_time(t, x0))
  noise = keys.normal(keys.per_example(key, len(x0)), (*x0.shape, 2), x0.dtype)
  return join(*(expand(mean[..., i], x0) * x0 for i in range(2))) + _apply(cholesky, noise), noise
