"""At which times a loss looks: maps from uniform numbers to times, with the correction of an importance sampler.

The loss is an expectation over t uniform in [t0, t1]; `importance` estimates the same one with times where they matter
and the correction uniform density / own density. Stratified numbers u_i = frac(u + i / n) cover [0, 1) evenly, one in
each n-th, with one random offset (Kingma et al. 2021, Variational Diffusion Models, Appendix I.1).
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import keys
from jaxdiff.losses.weights import log_snr_rate
from jaxdiff.sde import SDE, ScalarSDE, log_snr
from jaxdiff.typing import Keys, Scalar


@runtime_checkable
class _Place(Protocol):
  def __call__(self, sde: Any, t0: Array, u: Float[Array, " b"], /) -> tuple[Array, Array]: ...


class Times(NamedTuple):
  """Where times fall.

  Attributes:
    place: `(sde, t0, u: [b]) -> (t: [b], correction: [b])` for u uniform in [0, 1).
    stratified: whether the u of a batch are spread evenly rather than drawn one by one.
    unbiased: whether the corrected loss is that of t uniform in [t0, t1], as bounds need.
  """

  place: _Place
  stratified: bool
  unbiased: bool = True


def uniform(stratified: bool = True) -> Times:
  """t uniform in [t0, t1]."""

  def place(sde: SDE, t0: Array, u: Array) -> tuple[Array, Array]:
    return t0 + u * (sde.t1 - t0), jnp.ones_like(u)

  return Times(place, stratified)


def importance(stratified: bool = True) -> Times:
  """t with density proportional to g^2 / sigma^2, the likelihood weight: uniform in log-SNR.

  For every linear process g^2 / sigma^2 = -d(log-SNR)/dt, so the sampler is closed-form, and with
  `weights.likelihood()` the product of weight and correction is constant (Kingma et al. 2021, eq. 17; Song et al.
  2021b, Section 5).
  """

  def place(sde: ScalarSDE, t0: Array, u: Array) -> tuple[Array, Array]:
    first, last = log_snr(sde, t0), log_snr(sde, jnp.asarray(sde.t1, t0.dtype))
    t = jnp.clip(sde.time_of_log_snr(first + u * (last - first)), t0, sde.t1)
    return t, (first - last) / (sde.t1 - t0) / log_snr_rate(sde, t)

  return Times(place, stratified)


def log_normal(mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> Times:
  """log(sigma / alpha) ~ N(mean, std^2), cut off at [t0, t1]: part of the EDM objective, so without correction.

  References:
    Karras et al. 2022, Table 1, P_mean and P_std.
  """
  if not std > 0:
    raise ValueError(f"std must be positive, got {std}")

  def place(sde: ScalarSDE, t0: Array, u: Array) -> tuple[Array, Array]:
    ends = -0.5 * jnp.stack([log_snr(sde, t0), log_snr(sde, jnp.asarray(sde.t1, t0.dtype))])
    low, high = jax.scipy.stats.norm.cdf((ends - mean) / std)
    level = jnp.clip(mean + std * jax.scipy.special.ndtri(low + u * (high - low)), ends[0], ends[1])
    return jnp.clip(sde.time_of_log_snr(-2 * level), t0, sde.t1), jnp.ones_like(u)

  return Times(place, stratified, unbiased=False)


def fixed(t: Scalar) -> Times:
  """One time only: `fixed(sigma)` with `EDM` is score matching at the noise level sigma."""

  def place(sde: SDE, t0: Array, u: Array) -> tuple[Array, Array]:
    if not isinstance(t, jax.core.Tracer) and not isinstance(sde.t1, jax.core.Tracer) and not 0 < t <= sde.t1:
      raise ValueError(f"the fixed time must lie in (0, t1] = (0, {sde.t1}], got {t}")
    return jnp.full_like(u, t), jnp.ones_like(u)

  return Times(place, stratified=False, unbiased=False)


def stratified(offset: Float[Array, "..."], index: Array, total: int) -> Float[Array, "..."]:
  """frac(offset + index / total), always below 1."""
  u = jnp.mod(offset + index.astype(offset.dtype) / total, 1.0)
  return jnp.where(u < 1.0, u, 0.0)


def draw(times: Times, key: Keys, per_example: Key[Array, " b"], dtype) -> Float[Array, " b"]:
  """The u of a batch from its key.

  Raises:
    ValueError: if stratified numbers are wanted of per-example keys, which know no batch, or of a batch of one.
  """
  (batch,) = per_example.shape
  if not times.stratified:
    return keys.uniform(per_example, (batch,), dtype)
  if key.ndim:
    raise ValueError(
      "key is one key per example, but stratified times need the place of each example in the batch: pass one key, "
      "or u = frac(offset + index / global batch) with one offset for the whole batch, or set stratified=False"
    )
  if batch == 1:
    raise ValueError("stratified times need a batch of at least 2: set stratified=False, or pass u")
  return stratified(jax.random.uniform(per_example[0], (), dtype), jnp.arange(batch), batch)
