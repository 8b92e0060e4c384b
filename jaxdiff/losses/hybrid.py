"""Hybrid score matching: the score of velocities, from positions that are data and velocities that are marginalized.

    1/2 w(t) |e(u_t, t) - eps_v|^2,    u_t = m x_0 + L eps                                                          (1)

summed over the dimensions; e is what the network says of the noise, `cld.velocity_noise`. Denoising score matching of
u_t given both x_0 and v_0 has the same score for its minimizer, from targets that are up to 2 / sqrt 3 times as large
near t = 0, and that depend on v_0, which nothing has to learn. Targets of the score itself, -eps_v / L_vv, grow without
bound towards t = 0 in both: there x_t betrays the velocity.

References:
  Dockhorn, Vahdat & Kreis 2022, Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Section 3.2.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, cld, keys
from jaxdiff.losses import times, weights
from jaxdiff.losses.score_matching import Loss
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL
from jaxdiff.typing import NO_COND, Cond, Keys, Network, Scalar, State


def hybrid(
  sde: cld.AugmentedSDE,
  mixed: bool = True,
  weight: weights.Weight = weights.noise(),
  time: times.Times = times.uniform(),
  t0: Scalar | None = None,
) -> Loss:
  """Hybrid score matching (1) over the times of a process of positions and velocities.

  Args:
    sde: the process, such as `CLD()`.
    mixed: whether the output is what is missing to the noise of N(0, I) data: see `cld.score_fn`, which must agree.
    weight: `(sde, t) -> [b]` on the squared error of the velocity's noise: `weights.noise()` or
      `weights.velocity_likelihood()`.
    time: `times.uniform()` or `fixed(t)`.
    t0: smallest time; None for that at which the deviation of positions is 1e-3 of the weight of x_0.

  Returns:
    loss(key, x0: [b, *d], network, cond={}, u=None) -> (loss [b], aux), as `denoising`, with a network
    (u: [b, *d, 2], t, **cond) -> [b, *d]. aux: "t" and "noise_error", the mean squared error per dimension.

  Raises:
    ValueError: for a t0 outside (0, t1); when called, for stratified times without a batch to stratify, cond or u of
      another batch, a network that returns another shape than x0.
    TypeError: for a process of another kind, times by log-SNR (`importance`, `log_normal`); when called, for integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.hybrid(jd.CLD())
    >>> network = jd.cld.on_channels(lambda params, x, t: params * x)
    >>> network = jax.tree_util.Partial(network, 0.5)
    >>> value, aux = jax.eval_shape(loss, jax.random.key(0), jnp.zeros((8, 2)), network)
    >>> value.shape
    (8,)
  """
  checks.made("sde", sde, cld.AugmentedSDE)
  checks.made("time", time, times.Times)
  checks.made("weight", weight)
  if not callable(weight):
    raise TypeError(f"weight must be a function of (sde, t), got {type(weight).__name__}")
  first = cld.start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def loss(
    key: Keys, x0: State, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    noise_key, time_key = keys.split(keys.per_example(key, len(x0)))
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    t, correction = time.place(sde, first, u.astype(first.dtype))
    state, noise = cld.perturb(noise_key, x0, t, sde)
    error = cld.velocity_noise(network, state, t, sde, mixed, cond) - noise[..., 1]
    squared = jnp.sum(error.astype(t.dtype) ** 2, axis=range(1, x0.ndim))
    return 0.5 * weight(sde, t) * correction * squared, {"t": t, "noise_error": squared / x0[0].size}

  return loss
