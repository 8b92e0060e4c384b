"""The optimizer of the shipped configs (Optax): clipping, Adam or Muon, a warm-up, then a cosine or constant rate.

Muon (Jordan et al. 2024) orthogonalizes the momentum of every weight matrix; convolution kernels count as matrices from
all inputs of a window to the outputs. Biases, norms, and maps from or to a single feature are left to Adam.
"""

from typing import Any, Literal

import jax
import optax
from optax import contrib


def make_optimizer(
  learning_rate: float,
  warmup_steps: int,
  total_steps: int,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  schedule: Literal["cosine", "constant"] = "cosine",
  algorithm: Literal["adam", "muon"] = "adam",
) -> optax.GradientTransformation:
  """Clipping by global norm, then Adam (AdamW when `weight_decay` > 0) or Muon.

  The learning rate rises linearly from `learning_rate / warmup_steps` to `learning_rate` in `warmup_steps` steps, then
  falls to 0 at `total_steps` along half a cosine or stays.

  Args:
    learning_rate: the peak, > 0. Muon's updates are scaled to the size of Adam's, so both take similar rates.
    warmup_steps: length of the linear rise in steps; 0 for none.
    total_steps: number of steps of the whole run, > `warmup_steps`.
    clip_norm: largest global gradient norm; None for no clipping.
    weight_decay: decoupled decay per unit of learning rate: on all parameters with Adam, on the matrices with Muon.
    b1: Adam's decay of the first moment, in [0, 1).
    b2: Adam's decay of the second moment, in [0, 1).
    schedule: "cosine" or "constant".
    algorithm: "adam" or "muon".

  Returns:
    An Optax gradient transformation.

  Raises:
    ValueError: an argument is out of its range.

  Example:
    >>> optimizer = make_optimizer(1e-3, warmup_steps=100, total_steps=1500)
  """
  ranges = {
    "learning_rate": (learning_rate, learning_rate > 0, "> 0"),
    "warmup_steps": (warmup_steps, 0 <= warmup_steps < total_steps, f"in [0, total_steps={total_steps})"),
    "clip_norm": (clip_norm, clip_norm is None or clip_norm > 0, "> 0, or None for no clipping"),
    "weight_decay": (weight_decay, weight_decay >= 0, ">= 0"),
    "b1": (b1, 0 <= b1 < 1, "in [0, 1)"),
    "b2": (b2, 0 <= b2 < 1, "in [0, 1)"),
    "schedule": (schedule, schedule in ("cosine", "constant"), '"cosine" or "constant"'),
    "algorithm": (algorithm, algorithm in ("adam", "muon"), '"adam" or "muon"'),
  }
  for name, (value, valid, condition) in ranges.items():
    if not valid:
      raise ValueError(f"{name}={value!r}: must be {condition}")

  first = learning_rate / max(warmup_steps, 1)
  if schedule == "cosine":
    rate = optax.warmup_cosine_decay_schedule(first, learning_rate, warmup_steps, decay_steps=total_steps)
  else:
    rate = optax.warmup_constant_schedule(first, learning_rate, warmup_steps)
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  if algorithm == "muon":
    update = contrib.muon(
      rate,
      weight_decay=weight_decay,
      adam_b1=b1,
      adam_b2=b2,
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2,
    )
  elif weight_decay > 0:
    update = optax.adamw(rate, b1, b2, weight_decay=weight_decay)
  else:
    update = optax.adam(rate, b1, b2)
  return optax.chain(clip, update)


def _matrices(params: Any) -> Any:
  """Which parameters are matrices, and between which axes; None for the others."""

  def axes(p: jax.Array) -> contrib.MuonDimensionNumbers | None:
    if p.ndim < 2 or min(p.shape[-2:]) == 1:
      return None
    return contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

  return jax.tree.map(axes, params)
