"""Moving averages of the parameters: the usual decay with warm-up, and power functions of any length.

Usual decay, after update number s = 0, 1, ...:
  ema <- ema + (1 - d_s) (params - ema),  d_s = min(decay, (1 + s) / (10 + s)).

Power function of exponent γ (Karras et al. 2024, Section 3.1; t = 1, 2, ... counts updates):
  θ_γ(t) = ∫_0^t p(τ) θ(τ) dτ,  p(τ) = (γ + 1) τ^γ / t^(γ+1);
  θ_γ <- β θ_γ + (1 - β) θ,  β = (1 - 1/t)^(γ+1).
The recursion is the integral itself, for parameters that are constant between updates: update i has the weight
(i^(γ+1) - (i-1)^(γ+1)) / t^(γ+1), and the parameters before the first update have none. The profile only stretches with
t; its length is its standard deviation divided by t,
  σ_rel = sqrt((γ + 1) / ((γ + 2)² (γ + 3))),
0.05 or 0.1, say. Any length at any step follows afterwards from stored averages: the weights x that bring
sum_i x_i p_i closest to the wanted profile p in the L2 norm solve A x = b, A_ij = <p_i, p_j>, b_i = <p_i, p> (Section
3.2).

References:
  Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696, Section 3 and
  its appendix.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

MAX_LENGTH = 12**-0.5  # of the uniform average, γ = 0


def decay_update(ema_params: PyTree, params: PyTree, step: Int[jax.Array, ""], decay: float) -> PyTree:
  """One step of the usual average with warm-up.

  Args:
    ema_params: the average before this update.
    params: the parameters after it, of the same shapes.
    step: number of updates before this one.
    decay: asymptotic decay per step, in [0, 1).

  Returns:
    The new average, in the dtypes of `ema_params`.
  """
  return _towards(ema_params, params, jnp.maximum(1 - decay, 9 / (10 + step.astype(jnp.float32))))


def power_update(average: PyTree, params: PyTree, step: Int[jax.Array, ""], length: float) -> PyTree:
  """One step of the power-function average of relative width `length`.

  Args:
    average: the average before this update.
    params: the parameters after it, of the same shapes.
    step: number of updates before this one.
    length: relative width σ_rel, in (0, 1 / sqrt(12)].

  Returns:
    The new average, in the dtypes of `average`.

  Example:
    >>> float(power_update(jnp.float32(7.0), jnp.float32(2.0), jnp.int32(0), 0.1))
    2.0
  """
  rate = -jnp.expm1((exponent(length) + 1) * jnp.log1p(-1 / (step.astype(jnp.float32) + 1)))
  return _towards(average, params, rate)


def exponent(length: float) -> float:
  """The exponent γ >= 0 of the profile with relative width σ_rel = `length`.

  The largest root of (γ + 2)² (γ + 3) σ_rel² = γ + 1.

  Raises:
    ValueError: `length` is outside (0, 1 / sqrt(12)].

  Example:
    >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
    (16.97, 6.94)
  """
  if not 0 < length <= MAX_LENGTH:
    raise ValueError(
      f"length={length!r}: relative widths of power-function averages are in (0, {MAX_LENGTH:.4f}], e.g. 0.05"
    )
  inverse = length**-2
  return max(0.0, float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()))


def relative_width(gamma: float) -> float:
  """The relative width σ_rel of the profile with exponent `gamma` > -1; the inverse of `exponent` where it is >= 0."""
  return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def combination(stored: Sequence[tuple[int, float]], step: int, length: float) -> tuple[Float[np.ndarray, "n"], float]:
  """How to combine stored averages into the one of another length or step.

  Args:
    stored: (step, length) of each stored average.
    step: the step of the wanted one; averages stored later get no weight.
    length: its relative width.

  Returns:
    (weights [n] in float64, distance): the distance of the combined profile from the wanted one in the L2 norm,
    relative to the norm of the wanted one.

  Raises:
    ValueError: nothing is stored up to `step`, or a length is out of range.

  Example:
    >>> weights, distance = combination([(100, 0.1), (200, 0.1), (200, 0.05)], step=200, length=0.07)
    >>> weights.round(2).tolist(), round(distance, 2)
    ([-0.0, 0.58, 0.45], 0.04)
  """
  use = np.array([i for i, (t, _) in enumerate(stored) if t <= step], np.int64)
  if not len(use):
    raise ValueError(f"step={step!r}: no average is stored up to this step; the first is of step {min(stored)[0]}")
  t = np.array([*(stored[i][0] for i in use), step], np.float64)
  gamma = np.array([*(exponent(stored[i][1]) for i in use), exponent(length)])
  products = _products(t, gamma)
  a, b = products[:-1, :-1], products[:-1, -1]
  x = np.linalg.lstsq(a, b, rcond=None)[0]
  norms, weights = np.sqrt(_squared_norm(t, gamma)), np.zeros(len(stored))
  weights[use] = x * norms[-1] / norms[:-1]
  return weights, float(np.sqrt(max(0.0, 1 - 2 * x @ b + x @ a @ x)))


def _products(t: np.ndarray, gamma: np.ndarray) -> np.ndarray:
  """The inner products of the profiles, each scaled to norm 1, in closed form.

  <p_i, p_j> = (γ_i + 1) (γ_j + 1) / (γ_i + γ_j + 1) * (s / l)^γ_l / l, for s the smaller and l the larger of the two t.
  """
  g, h = gamma[:, None], gamma[None, :]
  s, l = np.minimum(t[:, None], t[None, :]), np.maximum(t[:, None], t[None, :])
  ratio = (s / l) ** np.where(t[:, None] > t[None, :], g, h)
  norms = np.sqrt(_squared_norm(t, gamma))
  return (g + 1) * (h + 1) / (g + h + 1) * ratio / l / (norms[:, None] * norms[None, :])


def _squared_norm(t: np.ndarray, gamma: np.ndarray) -> np.ndarray:
  return (gamma + 1) ** 2 / ((2 * gamma + 1) * t)


def _towards(average: PyTree, params: PyTree, rate: jax.Array) -> PyTree:
  return jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p.astype(a.dtype) - a), average, params)
