"""Thresholding: a score in, a score out whose data prediction D = E[x_0 | x_t] keeps to the range of the data.

    static    D <- clip(D, -limit, limit)                                                                            (1)
    dynamic   D <- limit / s clip(D, -s, s),  s = max(limit, quantile of |D| over the example)                       (2)
    score     (alpha D - x) / sigma^2                                                                                (3)

The samples are no longer those of the model: it is a remedy for guidance that overshoots. It belongs to sampling alone,
never to a likelihood.

References:
  Ho et al. 2020, published code, for (1); Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models with Deep
  Language Understanding, Section 2.3, for both.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff import checks, predictions
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import ScoreFn, State, Time


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sde", "score"], meta_fields=["limit", "quantile"])
@dataclass(frozen=True)
class _Thresholded:
  sde: ScalarSDE
  score: ScoreFn
  limit: float
  quantile: float | None

  def __call__(self, x: State, t: Time, /, **cond: Array) -> State:
    alpha, sigma = (expand(value, x) for value in self.sde.marginal(batch_time(t, x)))
    return (alpha * self.denoised(x, t, **cond) - x) / sigma**2

  def denoised(self, x: State, t: Time, /, **cond: Array) -> State:
    return self._within(predictions.denoised(self.sde, self.score, x, t, **cond))

  def denoised_and_v(self, x: State, t: Time, /, **cond: Array) -> tuple[State, State]:
    data, v = predictions.denoised_and_v(self.score, x, t, **cond)
    return self._within(data), v

  def evaluations(self, times: Array | None) -> int | Array:
    return predictions.evaluations(self.score, times)

  def _within(self, data: State) -> State:
    if self.quantile is None:
      return jnp.clip(data, -self.limit, self.limit)
    size = jnp.quantile(jnp.abs(data).reshape(len(data), -1), self.quantile, axis=1)
    reach = expand(jnp.maximum(size, self.limit), data)
    return jnp.clip(data, -reach, reach) * (self.limit / reach)


def thresholded(sde: ScalarSDE, score: ScoreFn, limit: float = 1.0, quantile: float | None = None) -> _Thresholded:
  """A score whose data prediction is kept within [-limit, limit], eq. (1) or (2).

  Args:
    sde: the process.
    score: from `jd.score_fn`, or any score.
    limit: of the data, in its units: 1 for images in [-1, 1].
    quantile: None for clipping; for dynamic thresholding the share of an example's values that is not clipped, 0.995 in
      the paper.

  Returns:
    A score with `.denoised`, a pytree if the score is one: for any sampler, at the same number of evaluations.

  Raises:
    ValueError: for a limit that is not positive, a quantile outside (0, 1].
    TypeError: for a factory or class given as process or score.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> score = jd.samplers.thresholded(sde, lambda x, t: -x)
    >>> float(score.denoised(jnp.full((1, 2), 30.0), 0.5).max())
    1.0
  """
  checks.made("sde", sde, ScalarSDE)
  checks.made("score", score)
  if not limit > 0:
    raise ValueError(f"limit must be positive, the largest size of the data; got {limit}")
  if quantile is not None and not 0 < quantile <= 1:
    raise ValueError(f"quantile must lie in (0, 1], or be None for clipping; got {quantile}")
  return _Thresholded(sde, score, limit, quantile)
