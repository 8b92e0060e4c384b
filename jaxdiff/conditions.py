"""What a network can be told of an example, as configs name it: constructors by the `type` of their section."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models import conditioning
from jaxdiff.models.text import Text


class Condition(NamedTuple):
  """What a network is told of an example.

  Attributes:
    module: how the network reads it.
    of: makes it of the values of the example; None where it is a field of the example, of the condition's name.
    noises: None; of a level of noise, the name of the condition that training noises by it, and the largest level.
  """

  module: Any
  of: Callable[[Float[Array, "b *d"]], Array] | None = None
  noises: tuple[str, float] | None = None


def label(classes: int, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """A class of the example, dropped to one more."""
  return Condition(conditioning.Label(classes, dtype=dtype, param_dtype=param_dtype))


def scalar(max_frequency: float = 10.0, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """A number of the example; NaN where it is unknown."""
  return Condition(conditioning.Scalar(max_frequency, dtype=dtype, param_dtype=param_dtype))


def image(channels: int = 3, dtype: str = "float32") -> Condition:
  """Another image of the example; 8-bit images are scaled to [-1, 1]."""
  return Condition(conditioning.Image(channels, dtype=dtype))


def embedding(features: int, sequence: bool = False, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """What another model made of the example: a vector, or a sequence of vectors."""
  return Condition(conditioning.Embedding(features, sequence, dtype=dtype, param_dtype=param_dtype))


def text(
  length: int, width: int = 128, layers: int = 2, heads: int = 4, dtype: str = "float32", param_dtype: str = "float32"
) -> Condition:
  """The caption of the example, of data with as large a `text_length`."""
  return Condition(Text(length, width, layers, heads, dtype=dtype, param_dtype=param_dtype))


def downsampled(factor: int = 2, channels: int = 3, dtype: str = "float32") -> Condition:
  """The image itself, smaller by a factor: super-resolution."""

  if factor < 1:
    raise ValueError(f"factor must be at least 1, got {factor}")

  def smaller(x: Array) -> Array:
    b, h, w, c = x.shape
    if h % factor or w % factor:
      raise ValueError(f"factor={factor} does not divide the {h}x{w} pixels of the images: take one that does")
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))

  return Condition(conditioning.Image(channels, dtype=dtype), smaller)


def noise_level(
  image: str, most: float = 0.5, max_frequency: float = 10.0, dtype: str = "float32", param_dtype: str = "float32"
) -> Condition:
  """How much noise is on an image of the conditions: in training a random level up to the most, else none.

  It makes the large model of a cascade, which bears the faults of the small one's images: `losses.noised_condition`.
  """
  if not 0 < most < 1:
    raise ValueError(f"most must lie in (0, 1), the largest level of noise; got {most}")
  module = conditioning.Scalar(max_frequency, dtype=dtype, param_dtype=param_dtype)
  return Condition(module, lambda x: jnp.zeros(len(x), x.dtype), (image, most))


def noises(conditions: Mapping[str, Condition]) -> dict[str, tuple[str, float]]:
  """By name of a level of noise the image that training noises by it, and the largest level."""
  images = sorted(name for name, made in conditions.items() if isinstance(made.module, conditioning.Image))
  found = {name: made.noises for name, made in conditions.items() if made.noises is not None}
  for name, (image, _) in found.items():
    if image not in images:
      known = ", ".join(images) or "none"
      raise ValueError(f"{name}.image must name one of the images among them ({known}), got {image!r}")
  return found


def greyscale(dtype: str = "float32") -> Condition:
  """The brightness of the RGB image itself (ITU-R 601 luma): colorization."""

  def brightness(x: Array) -> Array:
    if x.shape[-1] != 3:
      raise ValueError(f"a greyscale condition is made of RGB images, of 3 channels; these have {x.shape[-1]}")
    return x @ jnp.array([[0.299], [0.587], [0.114]], x.dtype)

  return Condition(conditioning.Image(1, dtype=dtype), brightness)


CONDITIONS: Mapping[str, Callable[..., Any]] = {
  "label": label,
  "scalar": scalar,
  "image": image,
  "embedding": embedding,
  "text": text,
  "downsampled": downsampled,
  "noise_level": noise_level,
  "greyscale": greyscale,
}
