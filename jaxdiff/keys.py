"""Random numbers that belong to an example, not to a batch.

Example k of a data set or of a run of samples has a key of its own, so its noise is the same for any batch size, chunk,
or number of devices. Every function of jaxdiff takes one key (example k then has `fold_in(key, k)`) or `[b]` of them.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from jaxdiff.typing import Keys


def check(key: Array) -> None:
  """Refuse keys of the old uint32 kind, and generators whose numbers depend on the batch."""
  dtype = getattr(key, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f"key must be a typed key made by jax.random.key(seed), got {dtype or type(key)}")
  if (impl := str(jax.random.key_impl(key))) != "threefry2x32":
    raise ValueError(
      f"key has the implementation {impl!r}, whose numbers change under vmap: "
      "use jax.random.key(seed, impl='threefry2x32')"
    )


def example_keys(key: Key[Array, ""], start: int | Array, count: int) -> Key[Array, " {count}"]:
  """Keys of the examples `start .. start + count - 1`: `fold_in(key, k)`.

  Args:
    key: one typed key.
    start: index of the first example.
    count: how many.

  Returns:
    Keys `[count]`.

  Example:
    >>> import jax, jaxdiff as jd
    >>> jd.example_keys(jax.random.key(0), start=64, count=32).shape
    (32,)
  """
  check(key)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, start + jnp.arange(count))


def per_example(key: Keys, batch: int) -> Key[Array, " {batch}"]:
  """`[batch]` keys: those given, or the first `batch` example keys of one."""
  check(key)
  if key.ndim == 0:
    return example_keys(key, 0, batch)
  if key.shape != (batch,):
    raise ValueError(f"key must be one key or one per example, [{batch}]; got shape {key.shape}")
  return key


def split(keys: Key[Array, " b"], parts: int = 2) -> tuple[Key[Array, " b"], ...]:
  """Split every example's key into named parts."""
  return tuple(jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, parts))(keys), 1, 0))


def fold_in(keys: Key[Array, " b"], data: int | Array) -> Key[Array, " b"]:
  """`jax.random.fold_in` for every example's key."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normal(keys: Key[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "b *d"]:
  """Standard normal numbers of `shape = (b, *d)`, each example's from its own key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(keys).reshape(shape)


def uniform(keys: Key[Array, " b"], shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "b *d"]:
  """Uniform numbers in [0, 1) of `shape = (b, *d)`, each example's from its own key."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape[1:], dtype))(keys).reshape(shape)
