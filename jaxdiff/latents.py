"""Gaussian posteriors of latents, as an encoder gives them, and what they say of data.

    q(z | x) = N(m(x), diag(v(x)))

    log q(z | x)        = -1/2 sum [ (z - m)^2 / v + log(2 pi v) ]
    H(q(z | x))         =  1/2 sum log(2 pi e v)
    KL(q || N(0, I))    =  1/2 sum [ m^2 + v - 1 - log v ]
    Var z               =  Var_x m(x) + E_x v(x)                          over data x
    active units        =  those with Var_x m(x) > 0.01

A diffusion of latents wants them with unit variance: `scaled(autoencoder, statistics.scale)`.

References:
  Kingma & Welling 2014, Auto-Encoding Variational Bayes, Appendix B, for the divergence; Burda et al. 2016, Importance
  Weighted Autoencoders, Section 5.2, for active units; Rombach et al. 2022, High-Resolution Image Synthesis with Latent
  Diffusion Models, Appendix G, for the scale.
"""

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key, Shaped

from jaxdiff import checks, keys
from jaxdiff.typing import Autoencoder, Scalar

ACTIVE = 0.01  # variance over the data of the mean of an active unit


class Posterior(NamedTuple):
  """q(z | x) of a batch.

  Attributes:
    mean: `[b, *k]`.
    log_variance: `[b, *k]`.
  """

  mean: Float[Array, "b *k"]
  log_variance: Float[Array, "b *k"]


class Statistics(NamedTuple):
  """What the posteriors of data say of an encoder.

  Attributes:
    std: standard deviation of z over data, draws and units, `[]`, or `[c]` of each channel.
    scale: 1 / std, which gives latents unit variance.
    active: share of the units whose mean varies over the data by more than 0.01.
    most: the largest of these variances.
    kl: mean KL(q(z | x) || N(0, I)), in nats per example.
  """

  std: Float[Array, "*c"]
  scale: Float[Array, "*c"]
  active: Float[Array, ""]
  most: Float[Array, ""]
  kl: Float[Array, ""]


def posterior(autoencoder: Autoencoder, x: Shaped[Array, "b *d"]) -> Posterior:
  """What the encoder says of x, in float32 or wider.

  Raises:
    TypeError: for an autoencoder that is none, or an encoder that returns anything but two arrays of floats.
    ValueError: if they are not of one shape `[b, *k]`.
  """
  checks.made("autoencoder", autoencoder, Autoencoder)
  encoded = autoencoder.encode(x)
  if not isinstance(encoded, tuple) or len(encoded) != 2:
    raise TypeError(f"encode must return (mean, log_variance), got {type(encoded).__name__}")
  for name, value in zip(("mean", "log_variance"), encoded, strict=True):
    checks.batch(f"{name} of encode", value)
  shapes = [value.shape for value in encoded]
  if shapes[0] != shapes[1] or shapes[0][0] != len(x):
    raise ValueError(f"encode must return mean and log_variance of one shape [{len(x)}, ...], got {shapes}")
  return Posterior(*(value.astype(jnp.float64 if value.dtype == jnp.float64 else jnp.float32) for value in encoded))


def sample(key: Key[Array, " b"], of: Posterior) -> Float[Array, "b *k"]:
  """z = m + sqrt(v) eps, differentiable in both."""
  return of.mean + jnp.exp(0.5 * of.log_variance) * keys.normal(key, of.mean.shape, of.mean.dtype)


def log_prob(of: Posterior, z: Float[Array, "b *k"]) -> Float[Array, " b"]:
  """log q(z | x), in nats."""
  away = (z - of.mean) * jnp.exp(-0.5 * of.log_variance)
  return -0.5 * _sum(away**2 + of.log_variance + math.log(2 * math.pi))


def entropy(of: Posterior) -> Float[Array, " b"]:
  """H(q(z | x)), in nats."""
  return 0.5 * _sum(of.log_variance + math.log(2 * math.pi * math.e))


def kl(of: Posterior) -> Float[Array, " b"]:
  """KL(q(z | x) || N(0, I)), in nats."""
  return 0.5 * _sum(of.mean**2 + jnp.expm1(of.log_variance) - of.log_variance)


def statistics(of: Posterior, per_channel: bool = False) -> Statistics:
  """What the posteriors of data say of the encoder: its scale, and whether it has collapsed.

  Args:
    of: posteriors `[n, *k]` of many examples, hundreds or more.
    per_channel: one scale for each entry of the last axis, rather than one for all.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff import latents
    >>> found = latents.statistics(latents.Posterior(jnp.asarray([[3.0, 0.0], [-3.0, 0.0]]), jnp.zeros((2, 2))), True)
    >>> (found.std**2).round(3).tolist(), float(found.active)  # 9 + 1 and 0 + 1, and one of two units
    ([10.0, 1.0], 0.5)
  """
  axes = range(of.mean.ndim - 1) if per_channel else None
  variance = jnp.var(of.mean, axis=axes) + jnp.mean(jnp.exp(of.log_variance), axis=axes)
  over_data = jnp.var(of.mean, axis=0)
  active = jnp.mean((over_data > ACTIVE).astype(variance.dtype))
  std = jnp.sqrt(variance)
  return Statistics(std, 1 / std, active, jnp.max(over_data), jnp.mean(kl(of)))


def warn_if_collapsed(found: Statistics) -> None:
  """Warn, on the host, of latents that say nothing of the data, and of a scale that is not finite."""
  std = np.asarray(found.std)
  if float(found.active) > 0 and np.all(np.isfinite(np.asarray(found.scale))):
    return
  warnings.warn(
    f"the encoder has collapsed: no latent varies with the data (share of active units {float(found.active):.3g}, "
    f"largest Var_x E[z|x] {float(found.most):.3g}, at most {ACTIVE} is inactive), the standard deviation of the "
    f"latents is {float(std.min()):.3g} to {float(std.max()):.3g}, and the KL divergence {float(found.kl):.3g} nats an "
    "example. Train it with a smaller or annealed weight of the KL term, or longer, before a diffusion of its latents",
    stacklevel=2,
  )


def scaled(autoencoder: Autoencoder, scale: Scalar) -> Autoencoder:
  """The autoencoder whose latents are `scale` times as large, and its decoder takes them so.

  Args:
    autoencoder: its functions are pytrees (`jax.tree_util.Partial`) where it passes through jit.
    scale: a number, or `[c]` of the channels, the last axis: `statistics(posteriors).scale`.

  Raises:
    ValueError: for a scale that is not positive and finite, unless it is traced.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> plain = jd.typing.Autoencoder(lambda x: (x, jnp.zeros_like(x)), lambda z: z)
    >>> twice = jd.latents.scaled(plain, 2.0)
    >>> mean, log_variance = twice.encode(jnp.ones((1, 1)))
    >>> float(mean[0, 0]), float(twice.decode(mean)[0, 0])
    (2.0, 1.0)
  """
  checks.made("autoencoder", autoencoder, Autoencoder)
  if not isinstance(scale, jax.core.Tracer):
    numbers = np.asarray(scale)
    if not (np.all(np.isfinite(numbers)) and np.all(numbers > 0)):
      raise ValueError(
        f"scale must be positive and finite, got {numbers}: latents of standard deviation 0 (a collapsed encoder) "
        "have none; see latents.statistics"
      )
  scale = jnp.asarray(scale, jnp.result_type(float))
  return Autoencoder(
    jax.tree_util.Partial(_encode_scaled, autoencoder.encode, scale),
    jax.tree_util.Partial(_decode_scaled, autoencoder.decode, scale),
  )


def _encode_scaled(encode, scale: Array, x: Array) -> tuple[Array, Array]:
  mean, log_variance = encode(x)
  factor = _of_channels(scale, mean)
  return factor * mean, log_variance + 2 * jnp.log(factor)


def _decode_scaled(decode, scale: Array, z: Array) -> Array:
  return decode(z / _of_channels(scale, z))


def _of_channels(scale: Array, z: Array) -> Array:
  return scale.astype(z.dtype).reshape((1,) * (z.ndim - scale.ndim) + scale.shape)


def _sum(values: Array) -> Float[Array, " b"]:
  return jnp.sum(values, axis=range(1, values.ndim))
