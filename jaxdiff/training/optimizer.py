"""The optimizer of the shipped configs: clipped Adam(W), warm-up, then a cosine or constant learning rate (Optax)."""

from typing import Literal

import optax


def make_optimizer(
  learning_rate: float,
  warmup_steps: int,
  total_steps: int,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  schedule: Literal["cosine", "constant"] = "cosine",
) -> optax.GradientTransformation:
  """Clipping by global norm, then Adam, or AdamW when `weight_decay` > 0.

  The learning rate rises linearly from `learning_rate / warmup_steps` to `learning_rate` in `warmup_steps` steps, then
  falls to 0 at `total_steps` along half a cosine or stays.

  Args:
    learning_rate: the peak, > 0.
    warmup_steps: length of the linear rise in steps; 0 for none.
    total_steps: number of steps of the whole run, > `warmup_steps`.
    clip_norm: largest global gradient norm; None for no clipping.
    weight_decay: decoupled decay per unit of learning rate, on all parameters.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    schedule: "cosine" or "constant".

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
  adam = optax.adamw(rate, b1, b2, weight_decay=weight_decay) if weight_decay > 0 else optax.adam(rate, b1, b2)
  return optax.chain(clip, adam)
