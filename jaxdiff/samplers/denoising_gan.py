"""Few large steps with a generator in the place of a denoiser, for what `losses.denoising_gan` trains.

    x_{t-1} ~ q(x_{t-1} | x_t, G(x_t, z, t)),   z ~ N(0, I),   t = T .. 1                                            (1)

with the posterior of `ddpm.Chain`, without noise at t = 1. It is DDPM's step but for z: over z the distribution of
x_{t-1} is a mixture of these Gaussians, as the true one of a large step is.

References:
  Xiao et al. 2022, Tackling the Generative Learning Trilemma with Denoising Diffusion GANs, Section 3.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from jaxdiff import checks, keys
from jaxdiff.ddpm import Chain
from jaxdiff.losses.adversarial import generated
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method
from jaxdiff.typing import State


def denoising_gan(chain: Chain, latent_dim: int, path: int = 0) -> FixedGrid:
  """Sampler by the T steps of a chain, eq. (1).

  Args:
    chain: the chain of the loss.
    latent_dim: size of z, that of the loss.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides T.

  Returns:
    sampler(key, x_T: [b, *d], generator, cond={}) -> Sample, at T network evaluations. `generator` is
    (x_t, time, latent: [b, latent_dim], **cond) -> x_0, called at `chain.time(t)`.

  Raises:
    ValueError: for a latent_dim below 1, a path that does not divide T; when called, for cond with the name "latent" or
      "x_t".
    TypeError: for what is no chain, numbers that are no integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> chain = jd.ddpm.Chain(jd.ddpm.vp_betas(4))
    >>> x_T = chain.sde().prior_sample(jax.random.key(0), (3, 2))
    >>> signs = jax.tree_util.Partial(lambda x, t, latent: jnp.sign(latent))
    >>> sample = jax.jit(jd.samplers.denoising_gan(chain, latent_dim=2))(jax.random.key(1), x_T, signs)
    >>> jnp.abs(sample.x).round(4).tolist(), sample.nfe.tolist()
    ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [4, 4, 4])
  """
  checks.made("chain", chain, Chain)
  checks.whole("latent_dim", latent_dim, 1, "the size of z")
  with jax.ensure_compile_time_eval():
    steps = jnp.arange(chain.steps, 0, -1)
    times = chain.time(jnp.arange(chain.steps, -1, -1))

  def step(field: Field, x: State, memory: Any, t: Array, noise: Key[Array, " b"]) -> tuple[State, Any]:
    latent, posterior = keys.split(noise)
    data = generated(chain, field.network, latent, latent_dim, x, t, field.cond)
    return chain.sample_posterior(posterior, data, x, t), memory

  return FixedGrid(chain.sde(), times, Method(step, steps, times[:-1], to_data=True), path=path)
