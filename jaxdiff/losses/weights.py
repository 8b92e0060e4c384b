"""Weights of the denoising loss over noise levels.

Each is a function `(sde, t: [b]) -> [b]` that multiplies the squared error of the *noise*, |eps_hat - eps|^2. The
squared error of the score is sigma^-2 times that, of the denoised data (sigma / alpha)^2 times that: so `noise()`,
uniform in the noise, is sigma^2 on the score (the weighting of NCSN), and g^2 on the score is g^2 / sigma^2 here.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff.cld import AugmentedSDE
from jaxdiff.sde import ScalarSDE, log_snr

Weight = Callable[[Any, Array], Array]


def noise() -> Weight:
  """1 on the noise, which is sigma^2 on the score: L_simple of DDPM, the weighting of NCSN."""
  return lambda sde, t: jnp.ones_like(t)


def likelihood() -> Weight:
  """g^2 on the score: maximum likelihood.

  (t1 - t0) times the loss, in nats, bounds the negative log-likelihood up to a constant that does not depend on the
  network (Song et al. 2021b, Maximum Likelihood Training of Score-Based Diffusion Models, Corollary 1).
  """
  return lambda sde, t: log_snr_rate(sde, t)


def velocity_likelihood() -> Weight:
  """g^2 on the score of velocities, for `losses.hybrid`: maximum likelihood of positions and velocities together."""

  def weight(sde: AugmentedSDE, t: Array) -> Array:
    unit = jnp.ones((len(t), 1, 2), t.dtype)
    return (sde.diffuse(t, unit)[:, 0, 1] / sde.given_position(t)[1][:, 1, 1]) ** 2

  return weight


def log_snr_rate(sde: ScalarSDE, t: Float[Array, " b"]) -> Float[Array, " b"]:
  """g^2 / sigma^2, which is -d(log-SNR)/dt; never 0, so that samplers of times may divide by it."""
  return jnp.maximum((sde.diffusion(t) / sde.marginal(t)[1]) ** 2, 1e-30)


def edm(sigma_data: float = 0.5) -> Weight:
  """(s^2 + sigma_data^2) / (s sigma_data)^2 on the denoised data, s = sigma / alpha (Karras et al. 2022, Table 1)."""
  if not sigma_data > 0:
    raise ValueError(f"sigma_data must be positive, the standard deviation of the data; got {sigma_data}")
  return lambda sde, t: jnp.exp(-log_snr(sde, t)) / sigma_data**2 + 1


def min_snr(gamma: float = 5.0) -> Weight:
  """min(SNR, gamma) on the denoised data (Hang et al. 2023, Min-SNR Weighting Strategy, Section 3.4)."""
  if not gamma > 0:
    raise ValueError(f"gamma must be positive, the signal-to-noise ratio above which the weight is flat; got {gamma}")
  return lambda sde, t: jnp.minimum(1.0, gamma * jnp.exp(-log_snr(sde, t)))
