"""What a saved state contains: shape, dtype and a 32-bit checksum of every array, computed on the devices.

Checkpoint files have no checksums of the array values themselves: a flipped bit in a file can restore as other numbers
without an error. So checkpoints carry these. For an array with the words w_j (its bits, cut into unsigned words of at
most 32 bits)
  checksum = sum_j (2 j + 1) w_j  mod 2^32,
exact integer arithmetic: any one changed word changes it, and it does not depend on how the array is laid out over
devices.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, UInt32

Manifest = dict[str, dict]


def describe(tree: PyTree) -> Manifest:
  """Shape and dtype of every array (or abstract array) of `tree`, by its path as `jax.tree_util.keystr` writes it.

  Example:
    >>> describe({"w": jnp.zeros((2, 3), jnp.int32)})
    {"['w']": {'shape': [2, 3], 'dtype': 'int32'}}
  """
  return {
    jax.tree_util.keystr(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def manifest(tree: PyTree) -> Manifest:
  """`describe(tree)` with the checksum of every array; waits for the arrays.

  Example:
    >>> manifest({"w": jnp.arange(3, dtype=jnp.int32)})["['w']"]["checksum"]
    13
  """
  checksums = jax.device_get(_checksums(jax.tree.leaves(tree)))
  entries = describe(tree).items()
  return {path: {**entry, "checksum": int(c)} for (path, entry), c in zip(entries, checksums, strict=True)}


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, "n"]:
  return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(x: Array) -> UInt32[Array, ""]:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = 8 * min(x.dtype.itemsize, 4)
  words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32).ravel()
  position = lax.iota(jnp.uint32, words.size)
  return jnp.sum((2 * position + 1) * words, dtype=jnp.uint32)
