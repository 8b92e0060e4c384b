"""Classifier-free guidance: a conditional score, led away from what it says under a null condition.

    scale  gamma         s = gamma s(x | y) + (1 - gamma) s(x)                                                       (1)
    extra  omega         s = (1 + omega) s(x | y) - omega s(x),      gamma = 1 + omega                               (2)

gamma = 1 (omega = 0) is the conditional model, gamma = 0 the unconditional one. With exact scores (1) is the score of
p_t(x) p_t(y | x)^gamma at every t. The same sums hold of data predictions D. Guidance pushes D out of the range of the
data; rescaling takes it back to the spread that the conditional one has, over the values of an example:

    D <- phi std(D(x | y)) / std(D) D + (1 - phi) D                                                                  (3)

Samples are not those of p_0(x) p_0(y | x)^gamma: the diffusion of that density has other scores at t > 0. For
p_0(x | y) = N(m, v) and p_0(x) = N(0, V), that density has the gamma-weighted harmonic mean of the variances,
1 / (gamma / v + (1 - gamma) / V), while the probability flow of (1) ends at the geometric one, v^gamma V^(1 - gamma),
which is smaller for gamma > 1 and v < V: guided samples are less diverse than the exponent says. For gamma = 2, V = 1,
v = 1/4 and m = 1: variance 1/7 and mean 8/7 of the density, 1/16 and 1.38 of the flow, 7/64 and 5/4 of the reverse SDE.

References:
  Ho and Salimans 2022, Classifier-Free Diffusion Guidance, eq. 6, for (2); Saharia et al. 2022, Photorealistic
  Text-to-Image Diffusion Models with Deep Language Understanding, eq. 2, for (1); Lin et al. 2023, Common Diffusion
  Noise Schedules and Sample Steps Are Flawed, Section 3.4, for (3), there of the output of the network; Chidambaram et
  al. 2024, What Does Guidance Do?, for what is sampled.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff import checks, predictions
from jaxdiff.guidance.branches import Null, check_null, check_present, filled, in_one_call
from jaxdiff.guidance.guided import Guided, Reading, check_score
from jaxdiff.guidance.interval import Scale, at, check_scale, is_one
from jaxdiff.sde import expand
from jaxdiff.typing import Scalar, ScoreFn, State


@functools.partial(checks.pytree, static=("rescale",))
@dataclass(frozen=True)
class _Free:
  null: Null
  scale: Scale
  rescale: float

  def __call__(self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> tuple[State, ...]:
    check_present(self.null, cond)
    if self.rescale and not read.data:
      (data,) = self(read._replace(data=True), score, x, t, cond)
      alpha, sigma = (expand(value, x) for value in read.sde.marginal(t))
      return ((alpha * data - x) / sigma**2,)
    scale = at(self.scale, t)
    both = lambda: self._both(read, score, x, t, cond, scale)
    if not callable(self.scale):
      return both()
    return jax.lax.cond(is_one(scale), lambda: read.values(score, x, t, cond), both)

  def evaluations(self, score: ScoreFn, times: Array | None) -> int | Array:
    single = predictions.evaluations(score, times)
    if times is None or not callable(self.scale):
      return 2 * single
    return jnp.where(at(self.scale, times) == 1, single, 2 * single)

  def _both(
    self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array], scale: Array
  ) -> tuple[State, ...]:
    same = {name: value for name, value in cond.items() if name not in self.null}
    pairs = {
      name: jnp.stack([cond[name], filled(name, nothing, cond[name])], axis=1) for name, nothing in self.null.items()
    }
    call = lambda x, t, cond: read.values(score, x, t, cond)
    value, *v = in_one_call(call, x, t, same, pairs, 2)
    told, untold = value[:, 0], value[:, 1]
    guided = expand(scale, x) * told + expand(1 - scale, x) * untold
    if self.rescale:
      guided = _with_spread(guided, told, self.rescale)
    return guided, *(one[:, 0] for one in v)


def _with_spread(data: State, like: State, share: float) -> State:
  """Eq. (3); data of no spread at all stay as they are."""
  axes = range(1, data.ndim)
  spread = jnp.var(data, axis=axes)
  some = spread > 0
  ratio = jnp.sqrt(jnp.where(some, jnp.var(like, axis=axes) / jnp.where(some, spread, 1.0), 1.0))
  return expand(1 + share * (ratio - 1), data) * data


def classifier_free(
  score: ScoreFn, null: Null, scale: Scale | None = None, *, extra: Scalar | None = None, rescale: float = 0.0
) -> Guided:
  """A score led to its conditions and away from the null ones; both in one call of the network, of batch 2 b.

  Args:
    score: conditional, trained with dropped conditions (`losses.drop_conditions`).
    null: by name a number, or the array of one example's condition, that stands for no condition, as
      `models.conditioning.null` gives it. Any other value is a negative condition, which samples are led away from.
      Conditions that it does not name are told to both branches.
    scale: gamma of eq. (1), at least 0, or a function of time `[b] -> [b]` such as `interval(...)`. Where the function
      is 1 for all examples, the null branch is not computed.
    extra: omega of eq. (2), the scale less 1, instead of the scale.
    rescale: phi of eq. (3), in [0, 1]; 0.7 in the paper.

  Returns:
    A score, at twice the evaluations of `score`, or once where a function of time is 1. A learned variance is that of
    the conditional branch.

  Raises:
    ValueError: for both or none of scale and extra, a negative scale, an empty null, a rescale outside [0, 1]; when
      called, for cond without what null names, or null values of another shape.
    TypeError: for a score or a null that is none, a rescale of a score that has no process `sde`.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> score = lambda x, t, label: label[:, None] - x
    >>> guided = jd.guidance.classifier_free(score, {"label": 0.0}, scale=3.0)
    >>> guided(jnp.zeros((1, 2)), 0.5, label=jnp.asarray([1.0])).tolist()
    [[3.0, 3.0]]
    >>> same = jd.guidance.classifier_free(score, {"label": 0.0}, extra=2.0)
    >>> same(jnp.zeros((1, 2)), 0.5, label=jnp.asarray([1.0])).tolist()
    [[3.0, 3.0]]
  """
  check_score("score", score)
  check_null(null)
  gamma = _gamma(scale, extra)
  if not 0 <= rescale <= 1:
    raise ValueError(f"rescale must lie in [0, 1] (0 for none, 1 for the conditional spread), got {rescale}")
  if rescale and getattr(score, "sde", None) is None:
    raise TypeError(
      f"rescale={rescale} needs the process of the score, as score.sde: make it with jd.score_fn, or leave rescale at 0"
    )
  return Guided(score, _Free(dict(null), gamma, float(rescale)))


def _gamma(scale: Any, extra: Any) -> Scale:
  if (scale is None) == (extra is None):
    raise ValueError(
      "give either scale (gamma, 1 is the conditional model) or extra (omega = gamma - 1, 0 is the conditional model); "
      f"got scale={scale}, extra={extra}"
    )
  if scale is not None:
    check_scale("scale", scale)
    return scale
  check_scale("extra", extra, functions=False)
  return 1 + extra
