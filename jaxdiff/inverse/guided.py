"""Guided scores of inverse problems: the score of p_t(x | y) for y = A x_0 + noise_std n, from that of p_t(x).

With D = E[x_0 | x_t], J = dD / dx_t and p(x_0 | x_t) taken for a Gaussian around D, grad_x log p(y | x_t) is

    pigdm            J^T A^T (r^2 A A^T + noise_std^2 I)^-1 (y - A D),   r^2 = c sigma^2 / (alpha^2 c + sigma^2)     (1)
    reconstruction   weight alpha^2 / sigma^2 J^T A^T (y - A D)                                                      (2)

and the data prediction becomes D + sigma^2 / alpha of it; for (2), D - weight alpha / 2 grad |y - A D|^2. In (1) c is
the variance of the data: r^2 is the variance of p(x_0 | x_t) for data N(m, c I), for which (1) is exact under every
process; c = 1 for VE is the paper's sigma^2 / (1 + sigma^2). The DDIM steps of the paper add (1) with an "adaptive
weight", r^2 for sigma^2, which is not there here: (1) itself is the gradient. (2) has sigma^2 / alpha^2 for r^2 and no
account of A A^T: at high noise, where r^2 tends to c, it pulls far too little, and a weight above 1 makes up for it.

Known bias. Where the covariance C of Gaussian data is not c I, (1) has r^2 I in the place of
(C^-1 + alpha^2 / sigma^2 I)^-1. For two values of variance 1 and correlation 0.8, of which the first is measured as y
without noise, the second has the posterior N(0.8 y, 0.36), and its samples in many steps

                    by the flow         by the reverse SDE
    (1), c = 1      N(0.76 y, 0.39)     N(0.76 y, 0.38)
    (2), weight 1   N(0.37 y, 0.56)     N(0.55 y, 0.45)
    (2), weight 2   N(0.56 y, 0.42)     N(0.72 y, 0.36)
    (2), weight 5   N(0.79 y, 0.31)     N(0.87 y, 0.31)

D is differentiated: one call of the network with its gradient, which counts as one evaluation and takes about three
times the arithmetic. Where alpha is small, J of a network that predicts the noise is a difference of large numbers:
computed in bfloat16 it is lost there; take another prediction, or float32.

References:
  Song et al. 2023, Pseudoinverse-Guided Diffusion Models for Inverse Problems, eq. 5 to 7 and Section 3.2, for (1);
  Ho et al. 2022, Video Diffusion Models, Section 3.1 and eq. 7, for (2), there at the frames to be made alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.tree_util import Partial

from jaxdiff import checks, predictions
from jaxdiff.inverse.operators import Operator, check_noise_std, measured
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import Cond, Scalar, ScoreFn, State, Time


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sde", "score", "operator", "pull"], meta_fields=[])
@dataclass(frozen=True)
class _Guided:
  """A score with the gradient J^T pull(A^T, y - A D) added: see `pigdm` and `reconstruction`."""

  sde: ScalarSDE
  score: ScoreFn
  operator: Operator
  pull: Callable[..., Array]

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    alpha, sigma = (expand(value, x) for value in self.sde.marginal(batch_time(t, x)))
    return (alpha * self.denoised(x, t, **cond) - x) / sigma**2

  def denoised(self, x: State, t: Time, /, **cond: Array) -> State:
    def predict(x: State, told: Any) -> tuple[State, None]:
      return predictions.denoised(self.sde, self.score, x, t, **told), None

    return self._guide(predict, x, t, cond)[0]

  def denoised_and_v(self, x: State, t: Time, /, **cond: Array) -> tuple[State, State]:
    return self._guide(lambda x, told: predictions.denoised_and_v(self.score, x, t, **told), x, t, cond)

  def evaluations(self, times: Array | None) -> int | Array:
    return predictions.evaluations(self.score, times)

  def _guide(self, predict: Callable[..., Any], x: State, t: Time, cond: Cond) -> tuple[State, Any]:
    y, own, told = measured(self.operator, x, cond)
    alpha, sigma = self.sde.marginal(batch_time(t, x))

    def checked(x: State) -> tuple[State, Any]:
      data, more = predict(x, told)
      return checks.score(x, data), more

    data, back, more = jax.vjp(checked, x, has_aux=True)
    residual = y - self.operator.apply(data, **own)
    (shift,) = back(self.operator.adjoint(self.pull(self.operator, residual, alpha, sigma, own), **own))
    return data + expand(sigma**2 / alpha, x) * shift, more


def _by_pseudo_inverse(
  noise_std: Scalar, data_variance: Scalar, operator: Operator, residual: Array, alpha: Array, sigma: Array, own: Cond
) -> Array:
  variance = data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)
  return operator.solve(residual, noise_std**2 / variance, **own) / expand(variance, residual)


def _by_weight(weight: Scalar, operator: Operator, residual: Array, alpha: Array, sigma: Array, own: Cond) -> Array:
  return expand(weight * (alpha / sigma) ** 2, residual) * residual


def pigdm(
  score: ScoreFn,
  operator: Operator,
  noise_std: Scalar = 0.0,
  data_variance: Scalar = 1.0,
  sde: ScalarSDE | None = None,
) -> _Guided:
  """Pseudo-inverse guidance, eq. (1): exact for data N(m, data_variance I).

  Args:
    score: from `jd.score_fn`, or any score of a process.
    operator: A, such as `jd.inverse.mask()`.
    noise_std: standard deviation of the measurement's noise, in the units of the data.
    data_variance: c: the variance of the values where they are independent. Of correlated values, as of images, the
      variance along what they share is many times that, so that a larger c is nearer to it: 1 as in the paper.
    sde: the process, for a score that does not have it as `.sde`.

  Returns:
    A score with `.denoised`, a pytree if the score is one, for any sampler; it takes `cond["measurement"]` and what
    belongs to the operator, and does not tell the score of either. Evaluations are those of the score: its gradient is
    not counted by itself.

  Raises:
    ValueError: for a negative noise_std, a data_variance that is not positive; when called, for cond without the
      measurement, or one of another shape than A x.
    TypeError: for a score without a process, a factory or class for what it makes.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> score = jd.inverse.pigdm(lambda x, t: -x, jd.inverse.mask(jnp.asarray([1, 0])), noise_std=0.1, sde=sde)
    >>> score.denoised(jnp.zeros((1, 2)), 0.5, measurement=jnp.asarray([[1.01, jnp.nan]])).round(2).tolist()
    [[1.0, 0.0]]
  """
  check_noise_std(noise_std)
  if not isinstance(data_variance, jax.core.Tracer) and not float(data_variance) > 0:
    raise ValueError(f"data_variance must be positive, the variance of the data; got {data_variance}")
  return _guided(score, operator, sde, Partial(_by_pseudo_inverse, noise_std, data_variance))


def reconstruction(score: ScoreFn, operator: Operator, weight: Scalar, sde: ScalarSDE | None = None) -> _Guided:
  """Reconstruction guidance, eq. (2).

  Args:
    score: from `jd.score_fn`, or any score of a process.
    operator: A.
    weight: w_r of the paper, which has values above 1; 0 is no guidance. It counts |A|^2 times: where the gain of A is
      above 1, scale it and y down, or few steps run away.
    sde: the process, for a score that does not have it as `.sde`.

  Returns:
    A score as `pigdm` returns it.

  Raises:
    ValueError: for a negative weight; when called, as `pigdm`.
    TypeError: as `pigdm`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> score = jd.inverse.reconstruction(lambda x, t: -x, jd.inverse.mask(jnp.asarray([1, 0])), 2.0, jd.VP())
    >>> score(jnp.zeros((1, 2)), 0.5, measurement=jnp.ones((1, 2))).shape
    (1, 2)
  """
  if not isinstance(weight, jax.core.Tracer) and not 0 <= float(weight) < float("inf"):
    raise ValueError(f"weight must be at least 0, the strength of the guidance; got {weight}")
  return _guided(score, operator, sde, Partial(_by_weight, weight))


def _guided(score: ScoreFn, operator: Operator, sde: ScalarSDE | None, pull: Callable[..., Array]) -> _Guided:
  checks.made("score", score)
  checks.made("operator", operator, Operator)
  sde = getattr(score, "sde", None) if sde is None else sde
  if sde is None:
    raise TypeError(
      "score must have its process as .sde, as those of jaxdiff.score_fn do: give sde=... beside a plain function"
    )
  checks.made("sde", sde, ScalarSDE)
  return _Guided(sde, score, operator, pull)
