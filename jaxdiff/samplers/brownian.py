"""A Brownian path that can be asked for any time, in any order: what adaptive steps of an SDE need.

A step that is refused has looked at the path; a shorter one in its place must see the same path, or large increments
are refused more often than small ones and the samples biased. The path on [0, 1] is a binary tree of midpoints,

    W((a + b) / 2) | W(a), W(b)  ~  N((W(a) + W(b)) / 2, (b - a) / 4 I)                                         (1)

whose noise belongs to the node, so nothing is stored; below the leaves, of width 2^-28, it is linear.

References:
  Li et al. 2020, Scalable Gradients for Stochastic Differential Equations, Section 4.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff.sde import expand

_LEVELS = 28


def brownian_path(
  keys: Key[Array, " b"], time: Float[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32
) -> Float[Array, "b *d"]:
  """Every example's standard Brownian path at its time in [0, 1], W(0) = 0.

  Args:
    keys: which path, one key for an example.
    time: `[b]`.
    shape: `(b, *d)`.
    dtype: of the result.

  Returns:
    W, `[b, *d]`, at the cost of 29 normal numbers for each of its own.
  """

  def normal(node: Array) -> Array:
    draw = lambda key, node: jax.random.normal(jax.random.fold_in(key, node), shape[1:], dtype)
    return jax.vmap(draw)(keys, node).reshape(shape)

  def level(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    left, right, rest, node = carry
    middle = 0.5 * (left + right) + expand(0.5 * 2.0 ** (-0.5 * i.astype(rest.dtype)), left) * normal(node)
    upper = 2 * rest >= 1
    side = upper.reshape(upper.shape + (1,) * (left.ndim - 1))
    left, right = jnp.where(side, middle, left), jnp.where(side, right, middle)
    return left, right, 2 * rest - upper.astype(rest.dtype), 2 * node + upper.astype(node.dtype)

  root = jnp.zeros(shape[0], jnp.uint32)
  carry = jnp.zeros(shape, dtype), normal(root), time, root + 1
  left, right, rest, _ = jax.lax.fori_loop(0, _LEVELS, level, carry)
  return left + expand(rest, left) * (right - left)
