"""Variational diffusion models: the bound of a variance-preserving process with a learned schedule gamma = -log SNR.

    continuous   1/2 gamma'(t) |eps_hat - eps|^2                               t uniform in [0, 1]           (1)
    T steps      T/2 expm1(gamma(t) - gamma(t - 1/T)) |eps_hat - eps|^2        t uniform in {1/T, .., 1}     (2)

plus the prior's and the decoder's costs, see `bounds`. With a network that sees the noise level rather than the time,
the mean of (1) depends on the two ends of gamma alone; the interior can then do something else: lower the variance of
the estimate. Its gradient is that of the squared loss, 2 loss * d loss, formed in the one backward pass of the loss;
the ends follow the bound. This takes networks that treat their examples one by one, and reverse-mode derivatives.

References:
  Kingma et al. 2021, Variational Diffusion Models: eq. 17 (1), eq. 14 (2), Section 5.1 (the interior does not matter),
  Section 5.3 and Appendix I.2 (its variance does).
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxdiff import checks, keys
from jaxdiff.losses import bounds, times
from jaxdiff.losses.score_matching import Loss, squared_noise_error
from jaxdiff.predictions import Prediction, noise
from jaxdiff.schedules import Gamma, of_gamma, slope
from jaxdiff.sde import VariancePreserving, expand
from jaxdiff.typing import NO_COND, Cond, Keys, Network


def vdm(
  gamma: Gamma,
  prediction: Prediction = noise(log_snr_time=True),
  levels: int | None = None,
  data_range: tuple[float, float] = (-1.0, 1.0),
  steps: int | None = None,
  interior: Literal["variance", "bound"] = "variance",
  stratified: bool = True,
  decoder: bounds.Decoder | None = None,
) -> Loss:
  """The bound on -log p(x | cond) in nats, of continuous time or of T steps, with gradients for the schedule.

  Make it inside the function that is differentiated, from the gamma being trained; sample and evaluate with
  `VariancePreserving(gamma)` and the same prediction.

  Args:
    gamma: the schedule; a pytree, whichever leaves of it are trained.
    prediction: what the network outputs; with `log_snr_time`, so that the network means the same under every schedule.
    levels: as in `bound`.
    data_range: as in `bound`.
    steps: T, up to about 10^4 in float32, or None for continuous time.
    interior: what the gradient of gamma.interior lowers: the "variance" of the diffusion cost at one time (its mean
      square, which for T steps is lowered by a lower mean, too), or the "bound" (no slope in continuous time).
    stratified: whether the times of a batch are spread evenly.
    decoder: as in `bound`.

  Returns:
    loss(key, x, network, cond={}, u=None) -> (bound [b] in nats, aux), as `bound`.

  Raises:
    ValueError: for steps below 1, levels below 2, or minimum >= maximum where gamma is concrete.
    TypeError: for a gamma that is not a `Gamma`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.vdm(jd.schedules.Gamma(-6.0, 6.0), levels=17)  # a straight schedule
    >>> x, network = jnp.zeros((4, 8), jnp.uint8), jax.tree_util.Partial(lambda x, t: 0 * x)
    >>> sorted(jax.eval_shape(loss, jax.random.key(0), x, network)[1])
    ['bits_per_dim', 'diffusion', 'prior', 'reconstruction']
  """
  if not isinstance(gamma, Gamma):
    raise TypeError(
      f"gamma must be a schedules.Gamma, with ends and an interior; got {type(gamma).__name__}. For other processes "
      "and schedules use losses.bound(jd.VariancePreserving(gamma))"
    )
  if steps is not None:
    checks.whole("steps", steps, 1, "or None for continuous time")
  checks.made("prediction", prediction, Prediction)
  if interior not in ("variance", "bound"):
    raise ValueError(f"interior must be 'variance' or 'bound', got {interior!r}")
  bounds.check_decoder(levels, data_range, decoder)
  time = times.uniform(stratified)
  prior = VariancePreserving(gamma).prior_log_prob

  def loss(
    key: Keys, x: Shaped[Array, "b *d"], network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], bounds.Costs]:
    noise_key, time_key, prior_key, decoder_key = keys.split(keys.per_example(key, len(x)), 4)
    x0 = bounds.to_state(x, levels, data_range)
    checks.batch("x", x0, cond, u)
    if u is None:
      u = times.draw(time, key, time_key, jnp.result_type(float))
    eps = keys.normal(noise_key, x0.shape, x0.dtype)
    ends = tuple(jnp.asarray(end, u.dtype) for end in (gamma.minimum, gamma.maximum))
    start, end = of_gamma(gamma.between(jnp.zeros((), u.dtype))), of_gamma(gamma.between(jnp.ones((), u.dtype)))
    diffusion = _with_gradient_of_square if interior == "variance" else _plain
    cost = _diffusion_cost(network, prediction, cond, steps)
    t = u if steps is None else (1 + jnp.floor(u * steps)) / steps
    place = slope(gamma.interior, t) if steps is None else (gamma.interior(t), gamma.interior(t - 1 / steps))
    return bounds.total(
      diffusion=diffusion(cost, place, ends, t, x0, eps),
      prior=bounds.prior_cost(prior_key, x0, *end, prior),
      reconstruction=bounds.reconstruction_cost(decoder_key, x, x0, *start, levels, data_range, decoder),
      dimension=x0[0].size,
    )

  return loss


def _diffusion_cost(
  network: Network, prediction: Prediction, cond: Cond, steps: int | None
) -> Callable[..., Float[Array, " b"]]:
  """(1) or (2), of the interior at t and its slope, or of the interior at t and at the step before."""

  def cost(place: tuple[Array, Array], ends: tuple[Any, Any], t: Array, x0: Array, eps: Array) -> Float[Array, " b"]:
    gamma = Gamma(*ends)
    alpha, sigma = of_gamma(gamma.between(place[0]))
    x_t = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
    squared = squared_noise_error(network, prediction, x0, eps, x_t, t, alpha, sigma, cond)
    rise = place[1] if steps is None else place[0] - place[1]
    change = (gamma.maximum - gamma.minimum) * rise
    return 0.5 * (change if steps is None else steps * jnp.expm1(change)) * squared

  return cost


def _plain(f: Callable[..., Array], *args: Any) -> Array:
  return f(*args)


def _with_gradient_of_square(f: Callable[..., Array], place: tuple[Array, Array], *rest: Any) -> Array:
  """f(place, *rest): [b], whose gradient is its own but for `place`, [b] each: there it is that of f^2.

  What f captures (parameters, conditions, keys) is made an argument, so that one backward pass serves all.
  """
  captured, static = eqx.partition(eqx.filter_closure_convert(f, place, *rest), eqx.is_array)

  def call(place: Any, rest: Any, captured: Any) -> Array:
    return eqx.combine(captured, static)(place, *rest)

  def forward(place: Any, rest: Any, captured: Any) -> tuple[Array, Any]:
    out, pull = jax.vjp(call, place, rest, captured)
    return out, (out, pull)

  def backward(residual: Any, cotangent: Array) -> tuple[Any, Any, Any]:
    out, pull = residual
    place, rest, captured = pull(cotangent)
    return jax.tree.map(lambda leaf: 2 * out * leaf, place), rest, captured

  value = jax.custom_vjp(call)
  value.defvjp(forward, backward)
  return value(place, rest, captured)
