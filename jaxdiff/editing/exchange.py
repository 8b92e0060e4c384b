"""Inversion with an edited condition: an image is encoded under what it is and decoded under what it shall be.

    z = encode(x; c),    x' = decode(z; c')                                                                          (1)

by the probability flow, adaptive or by DDIM. It carries the density of x_0 given c to the prior's and that to the
density given c', so that images of the one condition become images of the other. With c' = c it is the identity, up to
the error of the steps. What of an image no condition tells, the latent z keeps.

References:
  Song et al. 2021, Denoising Diffusion Implicit Models, Section 4.3, for encoding; Su et al. 2023, Dual Diffusion
  Implicit Bridges, Section 3, for two models, here one of two conditions.
"""

from collections.abc import Callable

from jaxdiff import checks, keys
from jaxdiff.editing.solves import Solve, check_pair, joined
from jaxdiff.typing import Cond, Keys, Sample, ScoreFn, State


def exchange(encode: Solve, decode: Solve) -> Callable[..., Sample]:
  """Editor by eq. (1), which gives an image another condition.

  Args:
    encode: `samplers.ddim_encode(sde, ts)` or `samplers.probability_flow_encode(sde)`.
    decode: `samplers.ddim(sde, ts)` of the same ts, or `samplers.probability_flow(sde)`.

  Returns:
    edit(key, x: [b, *d], score, cond, new_cond) -> Sample, at the evaluations of both; x belongs to the last time of
    the decoder's grid. The path, where there is one, is that of decoding.

  Raises:
    ValueError: for solvers that walk the wrong way or do not meet; when called, for conditions of another batch, or of
      `cond` that `new_cond` lacks.
    TypeError: for factories, and for what is no function.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> score = jax.tree_util.Partial(lambda x, t, mean: sde.marginal(t)[0][:, None] * mean[:, None] - x)
    >>> ts = jd.time_grid(sde, 100)
    >>> edit = jd.editing.exchange(jd.samplers.ddim_encode(sde, ts), jd.samplers.ddim(sde, ts))
    >>> mean, other = {"mean": jnp.zeros(1)}, {"mean": jnp.ones(1)}
    >>> sample = jax.jit(edit)(jax.random.key(0), jnp.zeros((1, 2)), score, mean, other)
    >>> [round(float(value), 1) for value in sample.x[0]], sample.nfe.tolist()
    ([1.0, 1.0], [200])
  """
  check_pair(encode, decode)

  def edit(key: Keys, x: State, score: ScoreFn, cond: Cond, new_cond: Cond) -> Sample:
    checks.batch("x", x, cond)
    checks.batch("x", x, new_cond)
    if missing := sorted(cond.keys() - new_cond.keys()):
      raise ValueError(
        f"new_cond lacks {', '.join(map(repr, missing))}: pass all conditions, those that change and those that stay"
      )
    encode_key, decode_key = keys.split(keys.per_example(key, len(x)))
    latent = encode(encode_key, x, score, cond)
    return joined(latent, decode(decode_key, latent.x, score, new_cond))

  return edit
