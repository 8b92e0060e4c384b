"""Score matching: train a network s so that it gives the gradient of log p.

    explicit     1/2 |s - target|^2                         a known score: distillation, tests              (1)
    implicit     1/2 |s|^2 + tr(grad s)                     no target: integration by parts                 (2)
    sliced       1/2 (v . s)^2 + v . (grad s) v             random v with E v v^T = I in place of the trace (3)
      reduced    1/2 |s|^2 + v . (grad s) v                 the same mean, a lower variance near the score
    denoising    1/2 |s - grad log p(x_t | x_0)|^2          of data noised by a process                     (4)

all summed over the dimensions. Up to constants that do not depend on s they have one mean, and the score minimizes
each. Over the times of a process all carry the factor sigma_t^2 w(t), t in [t0, t1]: w weighs the squared error of
the noise eps_hat = -sigma s, see `weights` and `times`. (1) to (3) also work on data as they are, without a process.

References:
  Hyvarinen 2005, Estimation of Non-Normalized Statistical Models by Score Matching, Section 2, for (1), (2); Song et
  al. 2019, Sliced Score Matching, Section 3, for (3); Vincent 2011, A Connection Between Score Matching and Denoising
  Autoencoders, Section 4, for (4); Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 7, for times.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys
from jaxdiff import divergence as divergences
from jaxdiff.losses import times, weights
from jaxdiff.predictions import Prediction, call_at, checked_output, noise_factor, score, score_fn
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, float_time, start_time
from jaxdiff.sde import ScalarSDE, expand, perturb
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar, ScoreFn, State

_LARGEST_EXACT_DIMENSION = 4096


@runtime_checkable
class Loss(Protocol):
  """`loss(key, x0: [b, *d], network, cond={}, u=None) -> (per-example [b], aux)`."""

  def __call__(
    self, key: Keys, x0: Array, network: Network, /, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]: ...


def denoising(
  sde: ScalarSDE,
  prediction: Prediction,
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
) -> Loss:
  """Denoising score matching over the times of a process.

  Args:
    sde: a process with scalar marginals.
    prediction: what the network outputs.
    weight: `(sde, t) -> [b]` on the squared error of the noise: `weights.noise()`, `likelihood()`, `edm()` or
      `min_snr()`.
    time: `times.uniform()`, `importance()` (for the likelihood weight), `log_normal()` or `fixed(t)`.
    t0: smallest time; None for the time at which sigma / alpha = 1e-3.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux): half a weighted squared error, summed over dimensions;
    with `weights.likelihood()`, (t1 - t0) times it is in nats. `key` is one key or one per example; `network` is
    (x, t, **cond) -> [b, *d]; `u: [b]` in [0, 1) places the times (a trainer passes stratified numbers of the global
    batch), None draws them from `key`. aux: "t" and "noise_error", the mean squared error of the noise per dimension.

  Raises:
    ValueError: for a t0 outside [0, t1); when called, for stratified times without a batch to stratify, and for cond
      or u of another batch.
    TypeError: for a factory given where what it makes is due; when called, for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.denoising(jd.VP(), jd.predictions.noise())
    >>> value, aux = loss(jax.random.key(0), jnp.zeros((8, 2)), lambda x, t: jnp.zeros_like(x))
    >>> value.shape
    (8,)

  References:
    Vincent 2011, Section 4; Song et al. 2021a, Score-Based Generative Modeling through SDEs, eq. 7; Song et al. 2021b,
    Maximum Likelihood Training of Score-Based Diffusion Models, for the likelihood weight.
  """
  check_made(sde, prediction, weight, time)
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    noise_key, time_key = keys.split(keys.per_example(key, len(x0)))
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    t, correction = time.place(sde, first, u.astype(first.dtype))
    alpha, sigma = sde.marginal(t)
    x_t, noise = perturb(noise_key, x0, t, sde)
    squared = squared_noise_error(network, prediction, x0, noise, x_t, t, alpha, sigma, cond)
    dimension = x0[0].size
    return 0.5 * weight(sde, t) * correction * squared, {"t": t, "noise_error": squared / dimension}

  return loss


def check_made(sde: ScalarSDE, prediction: Prediction, weight: weights.Weight, time: times.Times) -> None:
  """Refuse factories that were not called, and what lacks the methods of its kind."""
  for name, value, kind in (
    ("sde", sde, ScalarSDE),
    ("prediction", prediction, Prediction),
    ("time", time, times.Times),
  ):
    checks.made(name, value, kind)
  checks.made("weight", weight)
  if not callable(weight):
    raise TypeError(f"weight must be a function of (sde, t), got {type(weight).__name__}")


def squared_noise_error(
  network: Network,
  prediction: Prediction,
  x0: State,
  noise: State,
  x_t: State,
  t: Float[Array, " b"],
  alpha: Float[Array, " b"],
  sigma: Float[Array, " b"],
  cond: Cond,
) -> Float[Array, " b"]:
  """|eps_hat - eps|^2 of the noise that the network sees in x_t = alpha x_0 + sigma eps, summed over the dimensions."""
  output = call_at(network, prediction, x_t, t, alpha, sigma, cond)
  x0, noise, output = (value.astype(t.dtype) for value in (x0, noise, output))
  target = prediction.target(x0, noise, expand(alpha, x0), expand(sigma, x0))
  return noise_factor(prediction, alpha, sigma) ** 2 * jnp.sum((output - target) ** 2, axis=range(1, x0.ndim))


def explicit(
  target: ScoreFn,
  sde: ScalarSDE | None = None,
  prediction: Prediction = score(),
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
  t: Scalar = 0.0,
) -> Loss:
  """Explicit score matching, the Fisher divergence from a given score: 1/2 |s - target|^2.

  Args:
    target: `(x, t, **cond) -> [b, *d]`, a score known in closed form or that of a teacher.
    sde: a process that noises the data, or None to take the data as they are.
    prediction: what the network outputs; without a process the score.
    weight: with a process, as in `denoising`.
    time: with a process, as in `denoising`.
    t0: with a process, as in `denoising`.
    t: without one, the time that network and target are called with.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux), as `denoising`; aux: "t".

  Raises:
    ValueError: for a prediction other than the score without a process.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.explicit(target=lambda x, t: -x)
    >>> loss(jax.random.key(0), jnp.ones((1, 3)), lambda x, t: 0 * x)[0].tolist()
    [1.5]
  """

  checks.made("target", target)
  if not callable(target):
    raise TypeError(f"target must be a score (x, t, **cond) -> [b, *d], got {type(target).__name__}")

  def fisher(key: Array, x: State, t: Array, score: ScoreFn, cond: Cond) -> Float[Array, " b"]:
    wanted = target(x, t, **cond)
    if wanted.shape != x.shape:
      raise ValueError(f"target must return an array of the shape of x, {x.shape}; got {wanted.shape}")
    error = score(x, t, **cond) - wanted.astype(x.dtype)
    return 0.5 * jnp.sum(error**2, axis=range(1, x.ndim))

  return _of_score(fisher, sde, prediction, weight, time, t0, t)


def implicit(
  sde: ScalarSDE | None = None,
  prediction: Prediction = score(),
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
  t: Scalar = 0.0,
  force: bool = False,
) -> Loss:
  """Implicit score matching: 1/2 |s|^2 + tr(grad s), the trace exactly, by d Jacobian-vector products of the network.

  Args:
    sde: as in `explicit`, with everything that follows.
    prediction: as in `explicit`.
    weight: as in `explicit`.
    time: as in `explicit`.
    t0: as in `explicit`.
    t: as in `explicit`.
    force: allow more than 4096 dimensions.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux), as `explicit`. Lower than it by 1/2 |target|^2 in the
    mean, so usually negative.

  Raises:
    ValueError: when called, for more than 4096 dimensions without `force`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> jd.losses.implicit()(jax.random.key(0), jnp.ones((1, 3)), lambda x, t: -x)[0].tolist()
    [-1.5]
  """
  trace = divergences.exact()

  def hyvarinen(key: Array, x: State, t: Array, score: ScoreFn, cond: Cond) -> Float[Array, " b"]:
    if x[0].size > _LARGEST_EXACT_DIMENSION and not force:
      raise ValueError(
        f"x0 has {x[0].size} dimensions, and implicit takes as many derivatives of the network for every example: "
        f"use losses.sliced, or force=True to go beyond {_LARGEST_EXACT_DIMENSION}"
      )

    value, estimate = trace.estimate(lambda x: score(x, t, **cond), x, None, jnp.zeros(()))
    return 0.5 * jnp.sum(value**2, axis=range(1, x.ndim)) + estimate[:, 0]

  return _of_score(hyvarinen, sde, prediction, weight, time, t0, t)


def sliced(
  probes: int = 1,
  reduced: bool = False,
  sde: ScalarSDE | None = None,
  prediction: Prediction = score(),
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
  t: Scalar = 0.0,
) -> Loss:
  """Sliced score matching: implicit score matching by Rademacher probes v, one Jacobian-vector product each.

  Args:
    probes: how many v per example, averaged.
    reduced: 1/2 |s|^2 instead of its estimate 1/2 (v . s)^2.
    sde: as in `explicit`, with everything that follows.
    prediction: as in `explicit`.
    weight: as in `explicit`.
    time: as in `explicit`.
    t0: as in `explicit`.
    t: as in `explicit`.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux), of the mean of `implicit`.

  Raises:
    ValueError: for probes below 1.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.sliced(probes=2, reduced=True)
    >>> loss(jax.random.key(0), jnp.ones((1, 3)), lambda x, t: -x)[0].tolist()
    [-1.5]
  """
  checks.whole("probes", probes, 1)
  hutchinson = divergences.hutchinson(probes)

  def slices(key: Array, x: State, t: Array, score: ScoreFn, cond: Cond) -> Float[Array, " b"]:
    v = hutchinson.draw(key, x)
    value, estimates = hutchinson.estimate(lambda x: score(x, t, **cond), x, v, jnp.zeros(()))
    if reduced:
      square = jnp.sum(value**2, axis=range(1, x.ndim))
    else:
      square = jnp.mean(jnp.sum(v * value[:, None], axis=range(2, v.ndim)) ** 2, axis=1)
    return 0.5 * square + jnp.mean(estimates, axis=1)

  return _of_score(slices, sde, prediction, weight, time, t0, t)


def _of_score(
  objective: Callable[[Array, State, Array, ScoreFn, Cond], Float[Array, " b"]],
  sde: ScalarSDE | None,
  prediction: Prediction,
  weight: weights.Weight,
  time: times.Times,
  t0: Scalar | None,
  t: Scalar,
) -> Loss:
  """The loss that a functional of a score is, on data as they are or over the times of a process."""
  if sde is None:
    if prediction != score():
      raise ValueError("prediction must be predictions.score() without an sde: there is no noise level to convert by")
    return _at(objective, t)
  check_made(sde, prediction, weight, time)
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    noise_key, time_key, probe_key = keys.split(keys.per_example(key, len(x0)), 3)
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    t, correction = time.place(sde, first, u.astype(first.dtype))
    x_t, _ = perturb(noise_key, x0, t, sde)
    model = score_fn(lambda _, x, t, **cond: network(x, t, **cond), None, sde, prediction)
    value = objective(probe_key, x_t, t, model, cond).astype(t.dtype)
    return sde.marginal(t)[1] ** 2 * weight(sde, t) * correction * value, {"t": t}

  return loss


def _at(objective: Callable[..., Float[Array, " b"]], t: Scalar) -> Loss:
  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    times = jnp.broadcast_to(float_time(t), x0.shape[:1])
    model = lambda x, t, **cond: checked_output(network(x, t, **cond), x)
    return objective(keys.per_example(key, len(x0)), x0, times, model, cond), {"t": times}

  return loss
