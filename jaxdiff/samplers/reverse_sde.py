"""Stochastic sampling: the reverse SDE on a fixed grid of times.

Euler-Maruyama, for a step of length h = t_i - t_{i+1} > 0 back in time (weak order 1):

    x  <-  x - h [f - (1 + eta^2) / 2 g^2 score](x, t_i) + eta sqrt(h) g(t_i) z

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 6 and Section 4.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys, status
from jaxdiff.sde import SDE, check_eta, reverse
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State, Status


def check_grid(ts: Float[Array, " n"], t1: Scalar) -> None:
  """Refuse a grid that is not a decreasing sequence of at least two times in [0, t1]; a traced one passes."""
  if ts.ndim != 1 or len(ts) < 2:
    raise ValueError(f"ts must be [steps + 1] decreasing times, got shape {ts.shape}")
  if isinstance(ts, jax.core.Tracer) or isinstance(t1, jax.core.Tracer):
    return
  times = np.asarray(ts)
  if not np.all(times[1:] < times[:-1]):
    raise ValueError(
      f"ts must decrease from the prior's time to the data's, got {times}: make it with jaxdiff.time_grid"
    )
  if times[-1] < 0 or times[0] > float(t1):
    raise ValueError(f"ts must lie in [0, t1] = [0, {t1}], got {times[-1]} to {times[0]}")


def reverse_sde(sde: SDE, ts: Float[Array, " n"], eta: Scalar = 1.0, path: bool = False):
  """Sampler by Euler-Maruyama steps of the reverse SDE.

  Args:
    sde: any forward process.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    eta: amount of noise: 1 the reverse SDE, 0 Euler steps of the probability flow.
    path: whether to return all steps + 1 states, from x_T to the sample.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations. Example k takes its noise from
    its own key: the same for any batch.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], a negative eta; when called, for cond of another
      batch.
    TypeError: for a class given as the process; when called, for an x_T that is no array of floating point numbers.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 100))
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> sample = sampler(jax.random.key(1), x_T, lambda x, t: -x)
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 2), [100, 100, 100, 100])
  """
  checks.made("sde", sde, SDE)
  check_eta(eta)
  ts = jnp.asarray(ts)
  check_grid(ts, sde.t1)
  steps = len(ts) - 1

  def sampler(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    batch = len(x_T)
    noise_keys = keys.per_example(key, batch)
    drift, diffuse = reverse(sde, score, eta)

    def step(carry: tuple[Array, Array], node: tuple[Array, Array, Array]):
      x, good = carry
      i, t, t_next = node
      h = (t - t_next).astype(x.dtype)
      noise = keys.normal(keys.fold_in(noise_keys, i), x.shape, x.dtype)
      x = x - h * drift(x, t, **cond) + jnp.sqrt(h) * diffuse(t, noise)
      finite = jnp.all(jnp.isfinite(x), axis=range(1, x.ndim))
      return (x, jnp.where(finite & (good == i), good + 1, good)), x if path else None

    nodes = jnp.arange(steps), ts[:-1], ts[1:]
    (x, good), states = jax.lax.scan(step, (x_T, jnp.zeros(batch, jnp.arange(0).dtype)), nodes)
    code = jnp.where(good == steps, status.SUCCESS, status.NON_FINITE)
    states = jnp.concatenate([x_T[None], states]) if path else None
    return Sample(x, jnp.full(batch, steps), states, Status(code, good, jnp.zeros_like(good)))

  return sampler
