"""Codebooks as moving averages of the vectors that an encoder assigns to their codes, with revival of dead codes.

With n_k the number of positions that have code k, m_k the sum of their vectors, both means over the global batch:

    N_k <- d N_k + (1 - d) n_k,   M_k <- d M_k + (1 - d) m_k,   e_k <- M_k / N_k where n_k > 0                       (1)

For d = 0 it is a step of k-means. A code that the batch does not use keeps its vector, since its mean does not change.
N and M start at 0, so that the first step is one of k-means for every d. A code is dead when its share N_k / sum_j N_j
is below a threshold r; then

    e_k <- c_k,   N_k <- r sum_j N_j,   M_k <- N_k e_k                                                               (2)

for a random vector c_k of the batch: it lives if it gets a little more than the share r of the next batches.

`losses.vq` hands out -n, -m and -c as the gradients of "counts" N, "sums" M and "vectors" e, which a train step sums
over microbatches and devices as it does with others.

References:
  van den Oord et al. 2017, Neural Discrete Representation Learning, its appendix, for (1); Dhariwal et al. 2020,
  Jukebox, for random vectors of the batch in place of codes little used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def moving_average(decay: float = 0.99, revive_below: float = 0.0) -> optax.GradientTransformation:
  """An optimizer for the group {"vectors" [K, d], "counts" [K], "sums" [K, d]} alone, by (1) and (2).

  Args:
    decay: d, in [0, 1).
    revive_below: r, the share of all positions below which a code is dead, in [0, 1 / K); 0 revives none. A tenth of
      1 / K, for example.

  Returns:
    An Optax transformation without a state; give it the group by `optax.partition`, whose other groups keep theirs.

  Raises:
    ValueError: an argument is out of its range; in init, for a group of other names, or revive_below from 1 / K on.

  Example:
    >>> group = {"vectors": jnp.array([[0.0], [9.0]]), "counts": jnp.zeros(2), "sums": jnp.zeros((2, 1))}
    >>> found = {"vectors": jnp.zeros((2, 1)), "counts": jnp.array([4.0, 0.0]), "sums": jnp.array([[2.0], [0.0]])}
    >>> optimizer = moving_average()
    >>> minus = jax.tree.map(jnp.negative, found)
    >>> updates, _ = optimizer.update(minus, optimizer.init(group), group)
    >>> optax.apply_updates(group, updates)["vectors"].tolist()
    [[0.5], [9.0]]
  """
  for name, value in (("decay", decay), ("revive_below", revive_below)):
    if not 0 <= value < 1:
      raise ValueError(f"{name}={value!r}: must be in [0, 1)")

  def check(group: Any) -> None:
    if not _is_codebook(group):
      raise ValueError(
        "a codebook must be a dict of vectors, counts and sums; keep other groups apart by optax.partition"
      )
    if revive_below * len(group["counts"]) >= 1:
      raise ValueError(f"revive_below={revive_below!r}: must be below 1 / {len(group['counts'])}, an equal share")

  def init(params: Any) -> optax.EmptyState:
    jax.tree.map(check, params, is_leaf=_is_codebook)
    return optax.EmptyState()

  def update(gradients: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
    move = lambda group, minus: _move(group, jax.tree.map(jnp.negative, minus), decay, revive_below)
    return jax.tree.map(move, params, gradients, is_leaf=_is_codebook), state

  return optax.GradientTransformation(init, update)


def _is_codebook(tree: Any) -> bool:
  return isinstance(tree, dict) and tree.keys() == {"vectors", "counts", "sums"}


def _move(old: dict[str, Array], found: dict[str, Array], decay: float, revive_below: float) -> dict[str, Array]:
  """What (1) and (2) add."""
  counts, sums = (decay * old[name] + (1 - decay) * found[name] for name in ("counts", "sums"))
  used = found["counts"] > 0
  vectors = jnp.where(used[:, None], sums / jnp.where(used, counts, 1.0)[:, None], old["vectors"])
  least = revive_below * jnp.sum(counts)
  dead = counts < least
  counts = jnp.where(dead, least, counts)
  vectors = jnp.where(dead[:, None], found["vectors"], vectors)
  sums = jnp.where(dead[:, None], counts[:, None] * vectors, sums)
  return jax.tree.map(jnp.subtract, {"vectors": vectors, "counts": counts, "sums": sums}, old)
