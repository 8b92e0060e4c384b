"""Interpolation: images between two images, on the arcs between their encodings.

    z_0 = encode(x_0),  z_1 = encode(x_1),    x(u) = decode(z(u)),    z(u) on the arc of `samplers.interpolate`      (1)

Latents on the straight line between two would be shorter than those that the prior draws; those on the arc are not.

References:
  Song et al. 2021, Denoising Diffusion Implicit Models, Section 5.3 and Appendix D.5; Shoemake 1985, Animating Rotation
  with Quaternion Curves, Section 3.3, for the arc.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import checks, keys
from jaxdiff.editing.solves import Solve, check_pair, joined
from jaxdiff.samplers.probability_flow import interpolate
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, ScoreFn, State


def interpolation(encode: Solve, decode: Solve) -> Callable[..., Sample]:
  """Images between two images by eq. (1).

  Args:
    encode: `samplers.ddim_encode(sde, ts)` or `samplers.probability_flow_encode(sde)`.
    decode: `samplers.ddim(sde, ts)` of the same ts, or `samplers.probability_flow(sde)`.

  Returns:
    between(key, first: [b, *d], last: [b, *d], fractions: [n], score, cond={}) -> Sample of n b images, `[n * b, *d]`:
    the b images at the first fraction, then those at the next. Fraction 0 is `first` and 1 is `last`, up to the error
    of the solvers. Conditions `[b, ...]` are those of both ends. nfe counts for each image the two encodings that it
    comes from, which are computed once for all fractions, and its decoding.

  Raises:
    ValueError: for solvers that walk the wrong way or do not meet; when called, for ends of different shapes, fractions
      that are no vector, conditions of another batch.
    TypeError: for factories, and for what is no function.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde, key = jd.VP(), jax.random.key(0)
    >>> ts = jd.time_grid(sde, 50)
    >>> between = jd.editing.interpolation(jd.samplers.ddim_encode(sde, ts), jd.samplers.ddim(sde, ts))
    >>> first, last = jax.random.normal(key, (2, 3, 8, 8, 1))
    >>> score = jax.tree_util.Partial(lambda x, t: -x)
    >>> sample = jax.jit(between)(key, first, last, jnp.linspace(0, 1, 5), score)
    >>> sample.x.reshape(5, 3, 8, 8, 1).shape, int(sample.nfe[0])
    ((5, 3, 8, 8, 1), 150)
  """
  check_pair(encode, decode)

  def between(
    key: Keys, first: State, last: State, fractions: Float[Array, " n"], score: ScoreFn, cond: Cond = NO_COND
  ) -> Sample:
    checks.batch("first", first, cond)
    if first.shape != last.shape:
      raise ValueError(f"first and last must have one shape, got {first.shape} and {last.shape}")
    if jnp.ndim(fractions) != 1:
      raise ValueError(f"fractions must be a vector [n], got shape {jnp.shape(fractions)}")
    n, (first_key, last_key, decode_key) = len(fractions), keys.split(keys.per_example(key, len(first)), 3)
    start, end = encode(first_key, first, score, cond), encode(last_key, last, score, cond)
    latents = interpolate(start.x, end.x, fractions)

    def tiled(value: Array) -> Array:
      return jnp.tile(value, (n,) + (1,) * (value.ndim - 1))

    each = jax.vmap(lambda i: keys.fold_in(decode_key, i))(jnp.arange(n)).reshape(-1)
    told = {name: tiled(value) for name, value in cond.items()}
    sample = decode(each, latents.reshape(-1, *first.shape[1:]), score, told)
    encoded = joined(start, end)
    return joined(jax.tree.map(tiled, encoded._replace(path=None)), sample)

  return between
