"""What a saved state contains: shape, dtype and a 32-bit checksum of every array, computed on the devices.

Checkpoint files have no checksums of the array values themselves: a flipped bit in a file can restore as other numbers
without an error. So checkpoints carry these. For an array with the words w_j (its bits, cut into unsigned words of at
most 32 bits)
  checksum = sum_j (2 j + 1) w_j  mod 2^32,
exact integer arithmetic: any one changed word changes it, and it does not depend on how the array is laid out over
devices.
"""

import math
from typing import Any

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


def within(saved: Manifest, prefix: str) -> Manifest:
  """The entries whose path begins with `prefix`, without it.

  Example:
    >>> within({"['a']['w']": {}, "['b']['w']": {}}, "['a']")
    {"['w']": {}}
  """
  return {path.removeprefix(prefix): entry for path, entry in saved.items() if path.startswith(prefix)}


def differences(saved: dict[str, Any], given: dict[str, Any], limit: int = 5) -> str:
  """The entries of two nested dicts that differ, as text; empty if none.

  Example:
    >>> differences({"data": {"seed": 0, "name": "digits"}}, {"data": {"seed": 1, "name": "digits"}})
    'data.seed was 0, now 1'
  """
  saved, given = _flatten(saved), _flatten(given)
  names = [
    name for name in sorted(saved.keys() | given.keys()) if saved.get(name, "absent") != given.get(name, "absent")
  ]
  texts = [f"{name} was {saved.get(name, 'absent')!r}, now {given.get(name, 'absent')!r}" for name in names[:limit]]
  return ", ".join(texts + ([f"and {len(names) - limit} more"] if len(names) > limit else []))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return flat


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
  return [_checksum(leaf) for leaf in leaves]


def _checksum(x: Array) -> UInt32[Array, ""]:
  """No reshaping: each device sums the words that it has, at their positions in the whole array."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = 8 * min(x.dtype.itemsize, 4)
  words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
  odd = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = jnp.uint32(2 * math.prod(words.shape[axis + 1 :]) % 2**32)
    odd += stride * lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  return jnp.sum(odd * words, dtype=jnp.uint32)
