"""Pure JAX functions on batches: augmentation inside the jitted step, and pictures from samples.

Dequantization lives with the likelihood (`jaxdiff.likelihood.dequantize`); `to_uint8` inverts it for 256 levels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped, UInt8


def random_flip(keys: Key[Array, "b"], x: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
  """Mirrors each image left to right with probability 1/2.

  Args:
    keys: one typed key per example, so that the result does not depend on batch mates or sharding.
    x: images [b, h, w, c] of any type.

  Returns:
    Images [b, h, w, c] of the same type.

  Raises:
    ValueError: `x` is not a batch of images.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> random_flip(keys, jnp.zeros((3, 8, 8, 1))).shape
    (3, 8, 8, 1)
  """
  if x.ndim != 4:
    raise ValueError(f"x: got shape {x.shape}; flipping needs images [b, h, w, c], so leave it out for other data")
  flip = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
  """Pictures from numbers in [-1, 1]: floor(128 (x + 1)), clipped to 0..255.

  The inverse of uniform dequantization with 256 levels; data of fewer levels keep their brightness. Values outside
  [-1, 1] are clipped on purpose. NaN has no picture: call `jaxdiff.raise_if_failed` on the samples first.

  Args:
    x: numbers in [-1, 1], any shape.

  Returns:
    uint8 of the same shape.

  Example:
    >>> to_uint8(jnp.array([-1.0, 0.0, 1.0])).tolist()
    [0, 128, 255]
  """
  return jnp.clip(jnp.floor((x.astype(jnp.float32) + 1) * 128), 0, 255).astype(jnp.uint8)
