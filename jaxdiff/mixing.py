"""The mixed score: a network corrects a normal prior rather than learning all of it.

    p(z) ~ N(z; 0, r^2 I)^(1 - a)  p'(z)^a ,      a in [0, 1] learned, one for every channel

of which the noise at x_t = alpha z + sigma eps is, exactly for the first factor alone and for the second alone,

    eps_hat(x, t) = (1 - a) sigma / (alpha^2 r^2 + sigma^2) x + a eps'(x, t)

The network is left with what the normal lacks: latents of a variational autoencoder are near to one.

References:
  Vahdat, Kreis & Kautz 2021, Score-based Generative Modeling in Latent Space, Section 3.2, there for r = 1 and
  variance-preserving processes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff import checks
from jaxdiff.sde import ScalarSDE, batch_time, expand
from jaxdiff.typing import Params, State, Time


class MixedScore(NamedTuple):
  """A pair of pure functions, made by `mixed_score`.

  Attributes:
    init: `(params of the network, channels) -> params`, a dict of "network" and "mix" `[channels]`, the logits of a.
    apply: `(params, x: [b, *d, channels], t, **cond) -> the noise`, to be read by `predictions.noise()`.
  """

  init: Callable[[Params, int], dict[str, Any]]
  apply: Callable[..., State]


def mixed_score(apply: Callable[..., Array], sde: ScalarSDE, std: float = 1.0, share: float = 0.01) -> MixedScore:
  """A network of the noise, mixed with that of N(0, std^2 I).

  Args:
    apply: `(params, x: [b, *d], t: [b], **cond) -> the noise [b, *d]`.
    sde: the process whose times t are: `predictions.noise()` hands them on as they are, `log_snr_time` does not.
    std: r, the standard deviation of the normal factor.
    share: a at the start, in (0, 1): near 0 the prior starts as the normal.

  Returns:
    MixedScore(init, apply). `jd.score_fn(mixed.apply, params, sde, jd.predictions.noise())` is a score like any other.

  Raises:
    ValueError: for a std that is not positive, a share outside (0, 1); when called, for "mix" of other channels than x,
      or a network's output of another shape.
    TypeError: for a factory given where what it makes is due.

  Example:
    >>> import jax.numpy as jnp, jaxdiff as jd
    >>> mixed = jd.mixed_score(lambda params, x, t: params * x, jd.VP())
    >>> params = mixed.init(jnp.float32(2.0), channels=3)
    >>> score = jd.score_fn(mixed.apply, params, jd.VP(), jd.predictions.noise())
    >>> round(float(score(jnp.ones((1, 3)), 1.0)[0, 0]), 2)  # 0.99 of -1, 0.01 of -2
    -1.01
  """
  checks.made("sde", sde, ScalarSDE)
  checks.made("apply", apply)
  if not std > 0:
    raise ValueError(f"std must be positive, the standard deviation of the normal factor; got {std}")
  if not 0 < share < 1:
    raise ValueError(f"share must be in (0, 1), how much of the network the mix starts with; got {share}")

  def init(params: Params, channels: int) -> dict[str, Any]:
    checks.whole("channels", channels, 1, "the size of the last axis of x")
    return {"network": params, "mix": jnp.full(channels, math.log(share / (1 - share)), jnp.result_type(float))}

  def mixed(params: dict[str, Any], x: State, t: Time, /, **cond: Array) -> State:
    if params["mix"].shape != x.shape[-1:]:
      raise ValueError(f"params['mix'] must be one number per channel of x, {x.shape[-1:]}; got {params['mix'].shape}")
    t = batch_time(t, x)
    alpha, sigma = sde.marginal(t)
    normal = expand(sigma / (alpha**2 * std**2 + sigma**2), x) * x
    noise = checks.score(x, apply(params["network"], x, t, **cond), "network")
    share = jax.nn.sigmoid(params["mix"]).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (1 - share) * normal + share * noise

  return MixedScore(init, mixed)
