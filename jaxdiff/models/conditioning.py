"""What a network is told beside x and t: labels, numbers, images, sequences, each by itself and together.

A network has `conditions`, modules by name, and takes as many arrays of the same names as keyword arguments. Each
module encodes its array in the forms that it has for the network:

  vector     [b, e]         added to the embedding of the time
  channels   [b, h, w, c]   beside those of x
  tokens     [b, n, e]      read by cross-attention, where the mask [b, n] says that they are there

| module | array | forms | null |
|---|---|---|---|
| `Label(classes)` | integers [b], 0 .. classes - 1 | vector | classes |
| `Scalar()` | floats [b] | vector | NaN |
| `Image(channels)` | floats [b, h', w', channels] | channels | 0 |
| `Embedding(features)` | floats [b, features] or [b, n, features] | vector, tokens of a sequence | 0 |
| `text.Text(length)` | bytes [b, length] as uint8, the end filled with 0 | vector, tokens | 0 |

An array full of its null says nothing: so is trained, and asked, what the network knows without the condition
(Ho and Salimans 2022, Classifier-Free Diffusion Guidance). A module of your own with `null`, `nothing(x)`,
`check(name, value, x)` and `__call__(value, x, features) -> Encoded` is a condition, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from jaxdiff.models.layers import sinusoidal_embedding


class Encoded(NamedTuple):
  """What conditions are to a network of embedding width e, in the forms they have.

  Attributes:
    vector: what is added to the embedding of the time.
    channels: what stands beside the channels of x.
    tokens: what is read by cross-attention.
    mask: which of the tokens are there; at least one of each example.
  """

  vector: Float[Array, "b e"] | None = None
  channels: Float[Array, "b h w c"] | None = None
  tokens: Float[Array, "b n e"] | None = None
  mask: Bool[Array, "b n"] | None = None


def encode(conditions: Mapping[str, Any], cond: Mapping[str, Array], x: Array, features: int) -> Encoded:
  """All conditions together: vectors are summed, channels and tokens laid beside each other, by alphabet.

  Args:
    conditions: the modules by name.
    cond: the arrays by name.
    x: what the network is to denoise, of the shape that channels must have.
    features: width e of the embedding.

  Raises:
    ValueError: a condition that the network does not have, one that is missing, or one of another shape.
    TypeError: one of another type.
  """
  check_names(conditions, cond)
  for name, module in conditions.items():
    module.check(name, cond[name], x)
  parts = [_masked(conditions[name](cond[name], x, features)) for name in sorted(conditions)]
  joined = lambda kind: [value for part in parts if (value := getattr(part, kind)) is not None]
  together = lambda values, axis: jnp.concatenate(values, axis) if values else None
  vectors = joined("vector")
  return Encoded(
    vector=sum(vectors[1:], vectors[0]) if vectors else None,
    channels=together(joined("channels"), -1),
    tokens=together(joined("tokens"), 1),
    mask=together(joined("mask"), 1),
  )


def _masked(encoded: Encoded) -> Encoded:
  """With a mask beside the tokens: all of them are there if nothing else is said."""
  if encoded.tokens is None or encoded.mask is not None:
    return encoded
  return encoded._replace(mask=jnp.ones(encoded.tokens.shape[:2], bool))


def null(conditions: Mapping[str, Any]) -> dict[str, float | int]:
  """The value by name with which an array is filled to say nothing: the null condition, and what is put for a dropped
  one.

  Example:
    >>> null({"label": Label(10), "small": Image(3)})
    {'label': 10, 'small': 0}
  """
  return {name: module.null for name, module in conditions.items()}


def nothing(conditions: Mapping[str, Any], x: Array) -> dict[str, Array]:
  """The null condition of every example of x, with sequences of one.

  Example:
    >>> jax.tree.map(jnp.shape, nothing({"label": Label(10), "clip": Embedding(512)}, jnp.zeros((2, 8, 8, 3))))
    {'clip': (2, 512), 'label': (2,)}
  """
  return {name: module.nothing(x) for name, module in conditions.items()}


def check_names(conditions: Mapping[str, Any], cond: Mapping[str, Array]) -> None:
  """Raises a ValueError for conditions that the network does not have, and for those that are missing."""
  if taken := sorted({"x", "t", "train"} & conditions.keys()):
    raise ValueError(f"conditions has the name {taken[0]!r}, which is that of another argument: take another name")
  known = ", ".join(sorted(conditions)) or "none: give it `conditions`"
  if unknown := sorted(cond.keys() - conditions.keys()):
    raise ValueError(f"cond has {', '.join(map(repr, unknown))}, a condition that the network lacks; it has {known}")
  if missing := sorted(conditions.keys() - cond.keys()):
    raise ValueError(f"cond lacks {', '.join(map(repr, missing))}: pass all of {known}; the null condition is `null()`")


def refuse_tokens(encoded: Encoded, network: str) -> None:
  """Raises a ValueError if there are tokens, for a network without cross-attention."""
  if encoded.tokens is not None:
    raise ValueError(f"{network} has no cross-attention to read the tokens of its conditions: use a UNet or a DiT")


def check_array(name: str, value: Array, x: Array, shape: tuple[int | None, ...], kind: Any, words: str) -> None:
  """Raises a TypeError for another kind of numbers, a ValueError for another shape; None in `shape` is any size."""
  if not jnp.issubdtype(value.dtype, kind):
    raise TypeError(f"cond[{name!r}] has dtype {value.dtype}: pass {words}")
  due = (x.shape[0], *shape)
  if value.ndim != len(due) or any(d not in (None, n) for n, d in zip(value.shape, due, strict=True)):
    raise ValueError(f"cond[{name!r}] has shape {value.shape} beside x of shape {x.shape}: pass {words}")


def rows(table: Float[Array, "n e"], index: Integer[Array, "..."]) -> Float[Array, "... e"]:
  """The rows of a table, NaN where there is none: negative numbers do not count from the end."""
  inside = jnp.where(index < 0, len(table), index.astype(jnp.int32))
  return jnp.take(table, inside, axis=0, mode="fill", fill_value=jnp.nan)


class Label(nn.Module):
  """A class, by a learned vector.

  Attributes:
    classes: how many; labels are 0 .. classes - 1. Labels beyond give NaN.
    droppable: whether there is a vector for the null label, `classes`.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> label, x = Label(10), jnp.zeros((2, 8, 8, 1))
    >>> label.init_with_output(jax.random.key(0), jnp.array([3, 10]), x, 16)[0].vector.shape
    (2, 16)
  """

  classes: int
  droppable: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @property
  def null(self) -> int:
    if not self.droppable:
      raise ValueError("Label has droppable=False, so nothing stands for no label: set it to True to drop labels")
    return self.classes

  def nothing(self, x: Array) -> Int[Array, " b"]:
    return jnp.full(x.shape[:1], self.classes if self.droppable else 0, jnp.int32)

  def check(self, name: str, value: Array, x: Array) -> None:
    null = f", null {self.classes}" if self.droppable else ""
    check_array(name, value, x, (), jnp.integer, f"integers [b] from 0 to {self.classes - 1}{null}")

  @nn.compact
  def __call__(self, value: Integer[Array, " b"], x: Shaped[Array, "b ..."], features: int) -> Encoded:
    shape = self.classes + self.droppable, features
    table = self.param("table", nn.initializers.normal(0.02), shape, self.param_dtype)
    return Encoded(vector=rows(table, value).astype(self.dtype))


class Scalar(nn.Module):
  """A number, by sinusoids and a two-layer perceptron; NaN, which says nothing, by a learned vector.

  Attributes:
    max_frequency: see `sinusoidal_embedding`: about 10 for numbers of the order of 1 that need no more than 1 % of it.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  max_frequency: float = 10.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @property
  def null(self) -> float:
    return float("nan")

  def nothing(self, x: Array) -> Float[Array, " b"]:
    return jnp.full(x.shape[:1], self.null, jnp.float32)

  def check(self, name: str, value: Array, x: Array) -> None:
    check_array(name, value, x, (), jnp.floating, "floats [b], null NaN")

  @nn.compact
  def __call__(self, value: Float[Array, " b"], x: Shaped[Array, "b ..."], features: int) -> Encoded:
    nothing = jnp.isnan(value)
    known = jnp.where(nothing, 0.0, value)
    h = sinusoidal_embedding(known, max(4, features // 4 * 2), self.max_frequency, 1e-2 * self.max_frequency)
    h = nn.silu(nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype)(h.astype(self.dtype)))
    h = nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype)(h)
    unknown = self.param("unknown", nn.initializers.normal(0.02), (features,), self.param_dtype)
    return Encoded(vector=jnp.where(nothing[:, None], unknown[None].astype(self.dtype), h))


class Image(nn.Module):
  """An image beside x: of its height and width, or smaller by a whole factor and enlarged by linear interpolation.

  Attributes:
    channels: of the image.
    dtype: type of the computation.
  """

  channels: int
  dtype: DTypeLike = jnp.float32

  @property
  def null(self) -> int:
    return 0

  def nothing(self, x: Array) -> Float[Array, "b h w c"]:
    return jnp.zeros((*x.shape[:3], self.channels))

  def check(self, name: str, value: Array, x: Array) -> None:
    words = f"floats [b, h, w, {self.channels}] of the size of x or smaller by a whole factor, null 0"
    check_array(name, value, x, (None, None, self.channels), jnp.floating, words)
    if x.ndim != 4 or any(
      not small or large % small for large, small in zip(x.shape[1:3], value.shape[1:3], strict=False)
    ):
      raise ValueError(f"cond[{name!r}] has shape {value.shape} beside x of shape {x.shape}: pass {words}")

  @nn.compact
  def __call__(self, value: Float[Array, "b h w c"], x: Float[Array, "b H W C"], features: int) -> Encoded:
    size = (*x.shape[:3], self.channels)
    large = value if value.shape == size else jax.image.resize(value, size, "linear")
    return Encoded(channels=large.astype(self.dtype))


class Embedding(nn.Module):
  """What another model made of a text, an image or a sound: a vector, or a sequence of vectors.

  Of a sequence all vectors but those of zeros, which fill it up, are tokens; their mean is the vector.

  Attributes:
    features: size of the vectors.
    sequence: whether there is a sequence of them.
    dtype: type of the computation.
    param_dtype: type of the parameters.
  """

  features: int
  sequence: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @property
  def null(self) -> int:
    return 0

  def nothing(self, x: Array) -> Float[Array, "b *n f"]:
    return jnp.zeros((len(x), *(1,) * self.sequence, self.features))

  def check(self, name: str, value: Array, x: Array) -> None:
    words = f"floats [b, {'n, ' * self.sequence}{self.features}], null 0"
    check_array(name, value, x, (None,) * self.sequence + (self.features,), jnp.floating, words)

  @nn.compact
  def __call__(self, value: Float[Array, "b *n f"], x: Shaped[Array, "b ..."], features: int) -> Encoded:
    value = value.astype(self.dtype)
    there = jnp.any(value != 0, axis=-1)
    h = nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype)(value)
    if not self.sequence:
      return Encoded(vector=jnp.where(there[:, None], h, 0.0))
    h = jnp.where(there[..., None], h, 0.0)
    mean = jnp.sum(h, axis=1) / jnp.maximum(1, jnp.sum(there, axis=1)).astype(h.dtype)[:, None]
    first = self.param("first", nn.initializers.normal(0.02), (features,), self.param_dtype).astype(self.dtype)
    first = jnp.broadcast_to(first, (len(value), 1, features))  # there is always something to attend to
    tokens = jnp.concatenate([first, h], axis=1)
    return Encoded(vector=mean, tokens=tokens, mask=jnp.concatenate([jnp.ones_like(there[:, :1]), there], axis=1))
