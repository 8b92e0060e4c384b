"""Stochastic sampling: the reverse SDE on a fixed grid of times.

Euler-Maruyama, for a step of length h = t_i - t_{i+1} > 0 back in time (weak order 1):

    x  <-  x - h [f - (1 + eta^2) / 2 g^2 score](x, t_i) + eta sqrt(h) g(t_i) z

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 6 and Section 4.1.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_grid
from jaxdiff.sde import SDE, check_eta, expand, reverse
from jaxdiff.typing import Scalar, State


def reverse_sde(sde: SDE, ts: Float[Array, " n"], eta: Scalar = 1.0, denoise: bool = False, path: int = 0) -> FixedGrid:
  """Sampler by Euler-Maruyama steps of the reverse SDE.

  Args:
    sde: any forward process.
    ts: decreasing times `[steps + 1]` from `jd.time_grid`.
    eta: amount of noise: 1 the reverse SDE, 0 Euler steps of the probability flow.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at `steps` network evaluations. Example k takes its noise from
    its own key: the same for any batch.

  Raises:
    ValueError: for a grid that does not decrease within [0, t1], a negative eta, a path that does not divide the number
      of steps; when called, for cond of another batch.
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
  ts = check_grid(ts, sde.t1)

  def step(field: Field, x: State, memory: Any, node: tuple[Array, Array], noise: Key[Array, " b"]) -> Any:
    t, h = node
    drift, diffuse = reverse(sde, field.score, eta)
    h = expand(h, x)
    return x - h * drift(x, t) + jnp.sqrt(h) * diffuse(t, keys.normal(noise, x.shape, x.dtype)), memory

  return FixedGrid(sde, ts, Method(step, (ts[:-1], ts[:-1] - ts[1:]), len(ts) - 1), denoise, path)
