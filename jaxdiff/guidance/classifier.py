"""Classifier guidance: a score of all data, led by the gradient of log p(y | x_t, t) of a classifier of noised data.

    score            s + gamma g,                        g = grad_x log p(y | x_t, t)                                (1)
    noise            eps - gamma sigma g                                                                             (2)
    data prediction  D + gamma sigma^2 / alpha g                                                                     (3)
    ancestral mean   mu + gamma std^2 g(mu, t_next)                                                                  (4)

At gamma = 1, (1) is the score of p_t(x | y), by Bayes' rule; else it is that of p_t(x) p_t(y | x)^gamma, which is not
the diffusion of p_0(x) p_0(y | x)^gamma: samples are not from that density, see `classifier_free`. (1), (2) and (3) say
the same: eps = -sigma s, and D = (x + sigma^2 s) / alpha. (4) is for `samplers.ancestral(..., shift=mean_shift(...))`:
the classifier is linearized at the mean of the step, that is at its end, where (1) has it at the start; both agree as
the steps become small.

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, Section 5, eq. 14, for (1); Dhariwal and Nichol 2021,
  Diffusion Models Beat GANs on Image Synthesis, Section 4.2, eq. 14 and Algorithm 2, for (2), Section 4.1, eq. 10 and
  Algorithm 1, for (4).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, predictions
from jaxdiff.guidance.guided import Guided, Reading, check_callable, check_score
from jaxdiff.guidance.interval import check_scale
from jaxdiff.losses.classification import label_log_prob, label_of
from jaxdiff.sde import batch_time, expand
from jaxdiff.typing import Params, Scalar, ScoreFn, State, Time

_LOG_PROB = "a function (x: [b, *d], t: [b], **cond) -> log p(y | x, t) [b]"


@checks.pytree
@dataclass(frozen=True)
class _Gradient:
  log_prob: Callable[..., Array]
  scale: Scalar

  def __call__(self, read: Reading, score: ScoreFn, x: State, t: Array, cond: dict[str, Array]) -> tuple[State, ...]:
    value, *v = read.values(score, x, t, cond)
    return value + read.slope(x, t) * _scaled_gradient(self, x, t, cond), *v

  def evaluations(self, score: ScoreFn, times: Array | None) -> int | Array:
    return predictions.evaluations(score, times) + 1


@checks.pytree
@dataclass(frozen=True)
class _Shift:
  log_prob: Callable[..., Array]
  scale: Scalar

  def __call__(self, mean: State, variance: State, t_next: Float[Array, " b"], /, **cond: Array) -> State:
    return variance * _scaled_gradient(self, mean, t_next, cond)


def _scaled_gradient(guide: _Gradient | _Shift, x: State, t: Array, cond: dict[str, Array]) -> State:
  total = lambda x: jnp.sum(checks.per_example("log_prob", guide.log_prob(x, t, **cond), len(x)))
  return expand(jnp.asarray(guide.scale), x) * jax.grad(total)(x)


def classifier(score: ScoreFn, log_prob: Callable[..., Array], scale: Scalar) -> Guided:
  """A score led by a classifier, eqs. (1) and (3); for a network that predicts the noise this is eq. (2).

  Args:
    score: from `jd.score_fn`, or any score. It is told all of cond: take `without(score, "label")` for an unconditional
      one.
    log_prob: `(x: [b, *d], t: [b], **cond) -> log p(y | x, t) [b]`, differentiable in x: `log_probability(...)` of a
      network. It is told all of cond.
    scale: gamma, at least 0; 1 gives the score of p_t(x | y), more the trade of diversity for certainty.

  Returns:
    A score, at the evaluations of `score` and one more, the classifier's.

  Raises:
    ValueError: for a negative scale; when called, for a log_prob that is not one number per example.
    TypeError: for a scale that is a function; for a score or log_prob that is no function or not called.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> log_prob = lambda x, t, target: -0.5 * jnp.sum((x - target) ** 2, axis=1)
    >>> unconditional = jd.guidance.without(lambda x, t: -x, "target")
    >>> guided = jd.guidance.classifier(unconditional, log_prob, scale=2.0)
    >>> guided(jnp.ones((1, 2)), 0.5, target=jnp.asarray([[3.0, 1.0]])).tolist()
    [[3.0, -1.0]]
  """
  check_score("score", score)
  check_callable("log_prob", log_prob, _LOG_PROB)
  check_scale("scale", scale, functions=False)
  return Guided(score, _Gradient(log_prob, scale))


def mean_shift(log_prob: Callable[..., Array], scale: Scalar) -> Callable[..., State]:
  """Classifier guidance of ancestral steps, eq. (4): the `shift` of `samplers.ancestral`.

  Args:
    log_prob: as in `classifier`.
    scale: gamma, at least 0.

  Returns:
    shift(mean: [b, *d], variance: [b, *d], t_next: [b], **cond) -> [b, *d], a pytree if log_prob is one. The sampler
    counts one evaluation of it a step. It holds the classifier's parameters: make both inside the jitted function.

  Raises:
    ValueError, TypeError: as `classifier` does.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> shift = jd.guidance.mean_shift(lambda x, t: -jnp.sum((x - 2) ** 2, axis=1), scale=1.0)
    >>> sampler = jd.samplers.ancestral(jd.VP(), jd.time_grid(jd.VP(), 10), shift=shift)
    >>> sampler(jax.random.key(0), jnp.ones((1, 2)), lambda x, t: -x).nfe.tolist()  # of the score and the classifier
    [20]
  """
  check_callable("log_prob", log_prob, _LOG_PROB)
  check_scale("scale", scale, functions=False)
  return _Shift(log_prob, scale)


@functools.partial(checks.pytree, static=("apply",))
@dataclass(frozen=True)
class _LogProbability:
  apply: Callable[..., Array]
  params: Params

  def __call__(self, x: State, t: Time, /, **cond: Array) -> Float[Array, " b"]:
    label, told = label_of(cond), {name: value for name, value in cond.items() if name != "label"}
    return label_log_prob(self.apply(self.params, x, batch_time(t, x), **told).astype(x.dtype), label, x)


def log_probability(apply: Callable[..., Any], params: Params) -> _LogProbability:
  """log p(y | x_t, t) of a classifier network, in nats: log softmax of its logits at cond["label"].

  Args:
    apply: `(params, x: [b, *d], t: [b], **cond) -> logits [b, classes]`; it is told all of cond but the label.
    params: its parameters, any pytree.

  Returns:
    (x, t, **cond) -> `[b]`, a pytree; cond["label"]: integers `[b]` from 0. Labels beyond the classes give NaN,
    and a gradient of NaN.

  Raises:
    TypeError: if apply is no function; when called, for labels that are no integers.
    ValueError: when called, for cond without labels, labels or logits of another shape.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> log_prob = jd.guidance.log_probability(lambda params, x, t: x * params, jnp.float32(1.0))
    >>> round(float(log_prob(jnp.zeros((1, 2)), 0.5, label=jnp.asarray([1]))[0]), 4)
    -0.6931
  """
  check_callable("apply", apply, "a function (params, x, t, **cond) -> logits [b, classes]")
  return _LogProbability(apply, params)
