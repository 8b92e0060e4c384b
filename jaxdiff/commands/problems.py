"""What the command `edit` is given: images, what is known of them, and the operator between the two."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import inverse, keys
from jaxdiff.data import inputs
from jaxdiff.schema import ConfigError
from jaxdiff.settings import EditSettings

_NOISE = 4  # stream of a seed: training, sampling and likelihoods take 1 to 3
_ROUNDING = 1 / 255  # of 8-bit images in [-1, 1], which a deblurring would enlarge

Shape = tuple[int, ...]


class Problem(NamedTuple):
  """Images to be edited.

  Attributes:
    columns: what is shown of them, each float32 [n, h, w, c] in [-1, 1].
    cond: what the sampler is told of each of them, [n, ...] by name, and the score is not.
    operator: from an image to its measurement; None where there is none.
    noise: standard deviation of the measurement's noise.
  """

  columns: list[np.ndarray]
  cond: Mapping[str, np.ndarray]
  operator: inverse.Operator | None
  noise: float


def read(settings: EditSettings, shape: Shape, levels: int | None) -> Problem:
  """The images of a section `edit`, for a model of images of this shape and so many levels.

  Raises:
    ConfigError: images or masks that cannot be read, or are of another size.
  """
  read = _images(settings, shape, levels)
  images = np.stack([image for *_, image in read])
  if settings.task == "sdedit":
    return Problem([images], {"input": images}, None, 0.0)
  own = _known(settings, read, shape)
  operator = _operator(settings, images, shape)
  whole = settings.degrade or settings.task in ("inpaint", "colorize")
  arrays = {name: jnp.asarray(value) for name, value in own.items()}
  y = np.asarray(operator.apply(jnp.asarray(images), **arrays)) if whole else images
  noise = settings.noise
  if noise is None:
    noise = _ROUNDING if settings.task == "deblur" else 0.0
  if settings.degrade and noise:
    y = y + noise * _noise(settings.seed, y.shape)
    y = np.asarray(operator.restrict(jnp.asarray(y), **arrays))
  columns = [images, _shown(y, shape)] if whole else [_shown(y, shape)]
  return Problem(columns, {"measurement": y, **own}, operator, noise)


def _images(settings: EditSettings, shape: Shape, levels: int | None) -> list[inputs.Input]:
  size = (shape[0], shape[1]) if settings.resize else None
  read = _reading("input", lambda: inputs.read_inputs(Path(settings.input), shape[2], levels, size))
  for name, _, image in read:
    if settings.task == "superres" and not settings.degrade:
      _check_smaller(name, image.shape, shape)
    elif image.shape != shape:
      raise ConfigError(
        f"--input: {name} has {_size(image.shape)} pixels, images of the model have {_size(shape)}: give one of that "
        f"size{'' if settings.resize else ', or --resize, which crops and resizes image files'}"
      )
  if len({image.shape for *_, image in read}) > 1:
    raise ConfigError("--input: the images are of several sizes; give those of one size at a time")
  return read


def _check_smaller(name: str, small: Shape, shape: Shape) -> None:
  factor = shape[0] // small[0]
  if factor < 2 or (factor * small[0], factor * small[1]) != shape[:2]:
    raise ConfigError(
      f"--input: {name} has {_size(small)} pixels, and images of the model, {_size(shape)}, are not larger by a whole "
      "factor: give a smaller one, or --degrade for one of that size, to be made smaller first"
    )


def _known(settings: EditSettings, images: list[inputs.Input], shape: Shape) -> dict[str, np.ndarray]:
  """The masks of the images, True where they are known."""
  if settings.mask is None:
    return {}
  path, size = Path(settings.mask), (shape[0], shape[1]) if settings.resize else None
  masks = _reading("mask", lambda: inputs.read_masks(path, size))
  if len(masks) not in (1, len(images)):
    raise ConfigError(f"--mask: {path} holds {len(masks)} masks for {len(images)} images: give one, or one for each")
  masks = masks * (len(images) // len(masks))
  for image, mask in zip(images, masks, strict=True):
    if mask.size != image.size:
      raise ConfigError(
        f"--mask: {mask.name} has {_size(mask.size)} pixels and {image.name} has {_size(image.size)}: give a mask of "
        "the size that the input has in its file, before --resize"
      )
    if mask.image.all():
      raise ConfigError(f"--mask: {mask.name} is all black{', once cropped' * settings.resize}: white is painted anew")
  return {"mask": np.stack([mask.image for mask in masks])}


def _reading(flag: str, read: Callable[[], Any]) -> Any:
  try:
    return read()
  except (ValueError, OSError) as error:
    raise ConfigError(f"--{flag}: {str(error).removeprefix('path: ')}") from error


def _size(shape: Shape) -> str:
  return f"{shape[1]}x{shape[0]}"


def _operator(settings: EditSettings, images: np.ndarray, shape: Shape) -> inverse.Operator:
  if settings.task == "inpaint":
    return inverse.mask()
  if settings.task == "superres":
    factor = settings.factor if settings.degrade else shape[0] // images.shape[1]
    if shape[0] % factor or shape[1] % factor:
      raise ConfigError(f"config.edit.factor = {factor} does not divide the {_size(shape)} pixels of the images")
    return inverse.downsample(factor)
  if settings.task == "deblur":
    return inverse.blur(gaussian_kernel(settings.blur, min(shape[:2])))
  if shape[2] != 3:
    raise ConfigError("--task=colorize is for models of RGB images; those of this model are grey")
  return inverse.greyscale()


def gaussian_kernel(std: float, size: int) -> np.ndarray:
  """A Gaussian of a standard deviation in pixels, cut off at three of them or where images of this size end; sum 1."""
  radius = min(math.ceil(3 * std), (size - 1) // 2)
  line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
  kernel = line[:, None] * line
  return (kernel / kernel.sum()).astype(np.float32)


def _noise(seed: int, shape: Shape) -> np.ndarray:
  key = jax.random.fold_in(jax.random.key(seed), _NOISE)
  return np.asarray(keys.normal(keys.example_keys(key, 0, shape[0]), shape))


def _shown(y: np.ndarray, shape: Shape) -> np.ndarray:
  """A measurement as images of this shape: of large pixels where it is small, grey where it has no colours."""
  factor = shape[0] // y.shape[1]
  return np.broadcast_to(y.repeat(factor, axis=1).repeat(factor, axis=2), (len(y), *shape))
