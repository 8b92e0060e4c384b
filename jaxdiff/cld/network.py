"""What a network says of velocities, and how it becomes a score of positions and velocities.

With u_t = m x_0 + L eps, L lower triangular, the score of the velocity given x_0 is -eps_v / L_vv. So with e(u, t)
trained to be eps_v, as by `losses.hybrid`,

    velocity score = -e / L_vv                                                                                       (1)
    E[x_0 | u_t] = (L_vx x - L_xx v + L_xx L_vv e) / (L_vx m_x - L_xx m_v)                                           (2)

where e is the output of the network or, mixed, the output and what e is for data N(0, I),

    e = output + L_vv (C_xx v - C_xv x) / det C,    C = L L^T + m m^T                                                (3)

Near the data L_vv goes as sqrt t, as the deviation of VP does, where L_xx goes as t.

References:
  Dockhorn, Vahdat & Kreis 2022, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Section 3.2
  for (1) and, mixed, v / Var(v) in place of (3): what (3) is where x and v are independent, as for gamma = 1 alone.
  (2) is Tweedie's formula of the velocity score.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks
from jaxdiff.cld.process import AugmentedSDE, join, split
from jaxdiff.predictions import checked_output
from jaxdiff.sde import batch_time, expand
from jaxdiff.typing import Cond, Network, Params, PhaseState, State, Time


def velocity_noise(network: Network, u: PhaseState, t: Time, sde: AugmentedSDE, mixed: bool, cond: Cond) -> State:
  """e(u, t) of eq. (1), what the network takes eps_v for, `[b, *d]`.

  Raises:
    ValueError: if the output has another shape than the positions.
    TypeError: if it is not an array of floating point numbers.
  """
  x, v = split(u)
  t = batch_time(t, u)
  output = checked_output(network(u, t, **cond), x)
  if not mixed:
    return output
  mean, cholesky = sde.given_position(t)
  (m_x, m_v), (xx, vx, vv) = (mean[..., 0], mean[..., 1]), _entries(cholesky)
  # The covariance of N(0, I) data, L L^T + m m^T, and its determinant, whose parts are squares.
  determinant = (xx * vv) ** 2 + (m_x * vx - m_v * xx) ** 2 + (m_x * vv) ** 2
  of_v, of_x = vv * (xx**2 + m_x**2) / determinant, vv * (xx * vx + m_x * m_v) / determinant
  return output + expand(of_v, v) * v - expand(of_x, x) * x


def _entries(cholesky: Float[Array, "... 2 2"]) -> tuple[Array, Array, Array]:
  return cholesky[..., 0, 0], cholesky[..., 1, 0], cholesky[..., 1, 1]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "sde"], meta_fields=["apply", "mixed"])
@dataclass(frozen=True)
class _Model:
  """A network read as a score; a pytree whose leaves are the parameters and the numbers of the process."""

  apply: Callable[..., Array]
  params: Params
  sde: AugmentedSDE
  mixed: bool

  def __call__(self, u: PhaseState, t: Time, /, **cond: Array) -> PhaseState:
    t = batch_time(t, u)
    noise = self._noise(u, t, cond)
    _, cholesky = self.sde.given_position(t)
    return join(jnp.zeros_like(noise), -noise / expand(cholesky[..., 1, 1], noise))

  def denoised(self, u: PhaseState, t: Time, /, **cond: Array) -> State:
    x, v = split(u)
    t = batch_time(t, u)
    mean, cholesky = self.sde.given_position(t)
    xx, vx, vv = _entries(cholesky)
    scale = vx * mean[..., 0] - xx * mean[..., 1]
    of_x, of_v, of_noise = (expand(value / scale, x) for value in (vx, xx, xx * vv))
    return of_x * x - of_v * v + of_noise * self._noise(u, t, cond)

  def _noise(self, u: PhaseState, t: Float[Array, " b"], cond: Cond) -> State:
    return velocity_noise(functools.partial(self.apply, self.params), u, t, self.sde, self.mixed, cond)


def score_fn(apply: Callable[..., Array], params: Params, sde: AugmentedSDE, mixed: bool = True) -> _Model:
  """Read a network as a score of positions and velocities, eq. (1).

  Args:
    apply: `(params, u: [b, *d, 2], t: [b], **cond) -> [b, *d]`, such as `on_channels(model.apply)`.
    params: its parameters, any pytree. Make the score inside the jitted function that takes them as an argument.
    sde: a process of positions and velocities.
    mixed: whether the output is what is missing to the noise of N(0, I) data, as `losses.hybrid` trained it.

  Returns:
    A callable pytree `score(u, t, **cond) -> [b, *d, 2]`: the velocity score, and 0 for positions, which have no noise
    that could ask for theirs. `score.denoised(u, t, **cond) -> [b, *d]` is E[x_0 | u_t], with which sampling ends.

  Raises:
    TypeError: for a process of another kind.
    ValueError, TypeError: when called, if the network returns another shape than that of positions or an integer type.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.CLD(gamma=1.0)
    >>> score = jd.cld.score_fn(lambda params, u, t: jnp.zeros_like(u[..., 0]), None, sde)  # that of N(0, I) data
    >>> [round(float(number), 3) for number in jax.jit(score)(jnp.ones((1, 1, 2)), 0.5)[0, 0]]  # (0, -v / M)
    [0.0, -4.0]
  """
  checks.made("sde", sde, AugmentedSDE)
  return _Model(apply, params, sde, bool(mixed))


@dataclass(frozen=True)
class _OnChannels:
  apply: Callable[..., Array]

  def __call__(self, params: Params, u: PhaseState, t: Array, **cond: Array) -> State:
    x, v = split(u)
    seen = jnp.concatenate([x, v], axis=-1)
    return checked_output(self.apply(params, seen, t, **cond), seen)[..., x.shape[-1] :]


def on_channels(apply: Callable[..., Array]) -> Callable[..., Array]:
  """A network that sees positions and velocities side by side on the last axis, the channels of images.

  Args:
    apply: `(params, [b, ..., 2 c], t: [b], **cond) -> [b, ..., 2 c]`, any network that returns as many channels as it
      is given, of which the second half is taken.

  Returns:
    `(params, u: [b, ..., c, 2], t: [b], **cond) -> [b, ..., c]`, for `score_fn` and, with its parameters bound, for
    `losses.hybrid`. It is initialized with as many channels: `model.init(key, jnp.zeros((1, h, w, 2 * c)), t)`.

  Raises:
    ValueError: when called, for an output of another shape than the input.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> apply = jd.cld.on_channels(lambda params, x, t: x)
    >>> u = jd.cld.join(jnp.zeros((1, 4, 4, 3)), jnp.ones((1, 4, 4, 3)))
    >>> apply(None, u, jnp.zeros(1)).shape, float(apply(None, u, jnp.zeros(1)).min())
    ((1, 4, 4, 3), 1.0)
  """
  return _OnChannels(apply)
