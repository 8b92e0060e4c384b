"""Which trace estimator to take: measured on a pilot batch of the data.

What the probes cost depends on model and data: in which basis the Jacobian of the score is closest to diagonal, and how
near the model is to a Gaussian.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff import divergence as divergences
from jaxdiff import keys, status
from jaxdiff.divergence import Divergence
from jaxdiff.flow import LogDensity
from jaxdiff.typing import NO_COND, Cond, Keys, ScoreFn, State

PCA_UP_TO = 4096  # dimensions: a minute of eigenvectors


class Pilot(NamedTuple):
  """What a pilot batch says of trace estimators.

  Attributes:
    best: the name of the one with the least spread.
    spread: by name, the standard deviation of one estimate of log p in nats per dimension, over the probes: its root
      mean square over the batch.
  """

  best: str
  spread: dict[str, float]


def candidates(x: State, probes: int = 2) -> dict[str, Divergence]:
  """The usual trace estimators, by name.

  Args:
    x: training data `[n, *d]` as the model sees them, dequantized; of 1000 or more, or several times d.
    probes: of each; `pilot` needs at least 2.

  Returns:
    "pixels"; "dct" for images [h, w, c] or [h, w], with 3 channels "color_dct"; "pca" up to 4096 dimensions. All but
    the last also "+control", by the covariance of x; above 4096 dimensions the pixels alone, by the variances of the
    coefficients of images.

  Raises:
    TypeError: for data that are not floating point.
    ValueError: for probes below 1, fewer than 2 examples or data that are not finite.

  Example:
    >>> import jax, jaxdiff as jd
    >>> list(jd.likelihood.candidates(jax.random.normal(jax.random.key(0), (100, 4, 4, 1))))
    ['pixels', 'pixels+control', 'dct', 'dct+control', 'pca']
  """
  small = math.prod(x.shape[1:]) <= PCA_UP_TO
  cosines: list[Literal["dct", "color_dct"]] = ["dct"] if x.ndim in (3, 4) else []
  if x.shape[3:] == (3,):
    cosines.append("color_dct")
  control = divergences.gaussian_control(x, "pca" if small else cosines[-1]) if small or cosines else None
  made = {"pixels": divergences.hutchinson(probes)}
  if control is not None:
    made["pixels+control"] = divergences.hutchinson(probes, control=control)
  for name in cosines:
    made[name] = divergences.hutchinson(probes, basis=name)
    if small:
      made[f"{name}+control"] = divergences.hutchinson(probes, basis=name, control=control)
  if small:
    made["pca"] = divergences.hutchinson(probes, basis=divergences.pca_basis(x))
  return made


def pilot(
  key: Keys,
  x: State,
  score: ScoreFn,
  log_prob_of: Callable[[Divergence], LogDensity],
  candidates: Mapping[str, Divergence],
  cond: Cond = NO_COND,
) -> Pilot:
  """Measure the spread of trace estimators on the same examples and keys. Runs on the host, one solve a candidate.

  Args:
    key: one key, or one per example.
    x: a batch of data `[b, *d]`, as the model sees them; 64 examples tell apart what differs by a tenth.
    score: the model's.
    log_prob_of: makes the log-density that the estimator is for, loose tolerances will do:
      `lambda divergence: likelihood.log_prob(sde, divergence, 1e-3, 1e-3)`.
    candidates: estimators by name, with at least 2 probes each: `likelihood.candidates(x_train)`.
    cond: the condition, if the score has one.

  Returns:
    The best of them, and the spread of all.

  Raises:
    ValueError: without candidates, or for one with a single probe.
    SolveError: where the solve of an example fails.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> key = jax.random.key(0)
    >>> x = jax.random.normal(key, (64, 2)) @ jnp.asarray([[1.0, 0.9], [0.0, 0.4]])
    >>> score = lambda x, t: -x
    >>> log_prob_of = lambda divergence: jd.likelihood.log_prob(jd.VP(), divergence, 1e-2, 1e-2)
    >>> jd.likelihood.pilot(key, x, score, log_prob_of, {"pixels": jd.divergence.hutchinson(2)}).best
    'pixels'
  """
  if not candidates:
    raise ValueError("candidates must hold at least one trace estimator: take likelihood.candidates(x)")
  key = keys.per_example(key, len(x))
  spread = {}
  for name, divergence in candidates.items():
    estimates = _count(divergence, key, x)
    if estimates == 1 and not divergence.exact:
      raise ValueError(f"candidates[{name!r}] has one probe, whose spread is unknown: give it 2 or more")
    result = eqx.filter_jit(log_prob_of(divergence))(key, x, score, dict(cond))
    status.raise_if_failed(result)
    square = np.mean(np.asarray(result.standard_error, np.float64) ** 2)
    spread[name] = math.sqrt(estimates * square) / math.prod(x.shape[1:])
  return Pilot(min(spread, key=lambda name: spread[name]), spread)


def _count(divergence: Divergence, key: Array, x: Array) -> int:
  """How many estimates it makes."""

  def estimates(key: Array, x: Array) -> Array:
    return divergence.estimate(lambda x: x, x, divergence.draw(key, x), jnp.zeros((), x.dtype))[1]

  return jax.eval_shape(estimates, key, x).shape[1]
