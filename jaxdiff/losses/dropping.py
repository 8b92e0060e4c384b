"""Training with and without conditions at once, for classifier-free guidance: some examples are told nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import checks, keys
from jaxdiff.losses.score_matching import Loss
from jaxdiff.typing import NO_COND, Cond, Keys, Scalar


def drop_conditions(loss: Loss, null: Mapping[str, Scalar], probability: float) -> Loss:
  """The loss of a network that is told its conditions, or with a probability none of them.

  One draw an example drops all conditions that `null` names, together. Those it does not name stay; to drop two of
  them independently, wrap twice.

  Args:
    loss: any of `jaxdiff.losses`.
    null: by name the number with which a dropped condition is filled, as `jaxdiff.models.conditioning.null` gives it.
    probability: of dropping, in [0, 1]; 0.1 to 0.2 is usual.

  Returns:
    loss(key, x0, network, cond, u=None) -> ([b], aux), with aux "dropped": 1 where the example was told nothing.

  Raises:
    ValueError: a probability outside [0, 1]; when called, a condition that `null` names and cond lacks, or one whose
      type cannot hold its null.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.drop_conditions(jd.losses.denoising(jd.VP(), jd.predictions.noise()), {"label": 10}, 0.1)
    >>> network, label = jax.tree_util.Partial(lambda x, t, label: x * label[:, None]), jnp.arange(8)
    >>> jax.eval_shape(loss, jax.random.key(0), jnp.zeros((8, 2)), network, {"label": label})[0].shape
    (8,)

  References:
    Ho and Salimans 2022, Classifier-Free Diffusion Guidance, Algorithm 1.
  """
  checks.made("loss", loss)
  if not 0 <= probability <= 1:
    raise ValueError(f"probability must be in [0, 1], got {probability}")

  def dropping(
    key: Keys, x0: Array, network: Any, /, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    keys.check(key)
    if missing := sorted(null.keys() - cond.keys()):
      raise ValueError(
        f"cond lacks {', '.join(map(repr, missing))}, which null says how to drop: pass it, or leave it out"
      )
    drop_key, loss_key = jax.random.split(key) if key.ndim == 0 else keys.split(key)
    dropped = keys.uniform(keys.per_example(drop_key, len(x0)), (len(x0),)) < probability

    def drop(name: str, value: Array) -> Array:
      where = dropped.reshape(-1, *(1,) * (value.ndim - 1))
      return jnp.where(where, as_type(null[name], value.dtype, name), value)

    told = {name: drop(name, value) if name in null else value for name, value in cond.items()}
    value, aux = loss(loss_key, x0, network, told, u)
    return value, {**aux, "dropped": dropped.astype(value.dtype)}

  return dropping


def as_type(nothing: Any, dtype: Any, name: str) -> Array:
  """A null value, a number or an array, in the type of its condition, which must hold it."""
  if not isinstance(nothing, jax.core.Tracer):
    given = np.asarray(nothing)
    with np.errstate(invalid="ignore", over="ignore"):
      there = given.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):  # rounding is no loss, overflow is
      held = np.array_equal(np.isfinite(there), np.isfinite(given))
    else:
      held = np.array_equal(there, given)
    if not held:
      raise ValueError(f"cond[{name!r}] has dtype {dtype}, which cannot hold its null {nothing}: pass a wider type")
  return jnp.asarray(nothing).astype(dtype)
