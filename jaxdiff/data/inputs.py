"""Images from outside, to be edited: a file, a folder of files or an .npz file, as a model of images sees them.

Eight bits k are the number (k + 1/2) / 128 - 1 in [-1, 1], which `transforms.to_uint8` takes back to k. Colours are as
the model has them, transparent images stand on white, as in training data (`images.read_image`).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.data.images import IMAGE_SUFFIXES, read_image
from jaxdiff.data.sources import read_npz


class Input(NamedTuple):
  """An image or a mask.

  Attributes:
    name: what it is called in messages.
    size: height and width before it was resized.
    image: [h, w, c]: float32 in [-1, 1]; of a mask boolean, c = 1, False where there is nothing known.
  """

  name: str
  size: tuple[int, int]
  image: np.ndarray


def read_inputs(path: Path, channels: int, levels: int | None, size: tuple[int, int] | None = None) -> list[Input]:
  """The images of a file or a folder of PNG and JPEG files, or of the array `x` [n, h, w, c] of an .npz file.

  Args:
    path: the file or the folder.
    channels: 3 for RGB, 1 for grey.
    levels: of the integers that an .npz file may hold; of None it must hold real numbers.
    size: height and width to which images of files are cropped, around their centre, and resized by area averages;
      None keeps them as they are.

  Raises:
    ValueError: no images, a file that is none, an array of another kind; it is named.
  """
  if path.suffix == ".npz":
    return _of_array(path, channels, levels)
  files = image_files(path, "an image, a folder of images or an .npz file")
  read = [_fitted(file, channels, size, Image.Resampling.BOX) for file in files]
  return [image._replace(image=(image.image + np.float32(0.5)) / 128 - 1) for image in read]


def image_files(path: Path, kinds: str) -> list[Path]:
  """A file, or the image files of a folder by their names.

  Args:
    path: of either.
    kinds: what it may be, for messages.

  Raises:
    ValueError: there is none.
  """
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ValueError(f"{path} does not exist: give {kinds}")
  files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
  if not files:
    raise ValueError(f"{path} holds no images: give a folder of PNG or JPEG files")
  return files


def read_masks(path: Path, size: tuple[int, int] | None = None) -> list[Input]:
  """Masks, False where their images are white: nothing is known there.

  Args:
    path: an image or a folder of images.
    size: as in `read_inputs`, by the nearest pixel.

  Raises:
    ValueError: no image, or one that is not black and white; it is named.
  """
  if path.suffix == ".npz":
    raise ValueError(f"{path}: a mask is an image, white where to paint anew, and no .npz file: give a PNG file")
  masks = []
  for file in image_files(path, "an image or a folder of images"):
    mask = _fitted(file, 1, size, Image.Resampling.NEAREST)
    if others := sorted(set(np.unique(mask.image).tolist()) - {0, 255}):
      raise ValueError(
        f"{file} must be black and white, 0 and 255, and holds {others[0]}, too, one of {len(others)} other values: "
        "make it so, and no JPEG"
      )
    masks.append(mask._replace(image=mask.image == 0))
  return masks


def _fitted(file: Path, channels: int, size: tuple[int, int] | None, method: Image.Resampling) -> Input:
  """An 8-bit image, cropped around its centre to the shape of a size and resized to it."""
  image = read_image(file, None, channels)
  height, width = image.shape[:2]
  if size is not None:
    plain = Image.fromarray(image[..., 0] if channels == 1 else image)
    image = np.asarray(ImageOps.fit(plain, size[::-1], method=method)).reshape(*size, channels)
  return Input(str(file), (height, width), image)


def _of_array(path: Path, channels: int, levels: int | None) -> list[Input]:
  x = read_npz(path).get("x")
  if x is None or x.dtype.kind not in "iuf" or x.ndim not in (3, 4) or not len(x):
    found = "no x" if x is None else f"x {x.dtype}{list(x.shape)}"
    raise ValueError(f"{path} must hold numbers x [n, h, w, c], and holds {found}")
  x = x[..., None] if x.ndim == 3 else x
  if x.shape[-1] != channels:
    raise ValueError(f"{path} holds images of {x.shape[-1]} channels, the model has {channels}: convert them")
  if x.dtype.kind in "iu":
    if levels is None:
      raise ValueError(f"{path} holds integers, and the model is of real numbers: give these")
    if not 0 <= x.min() <= x.max() < levels:
      raise ValueError(
        f"{path} holds integers from {x.min()} to {x.max()}, the model has 0 to {levels - 1}: "
        "scale them to [-1, 1] as floats, or give PNG files"
      )
    x = (x.astype(np.float32) + 0.5) * 2 / levels - 1
  elif not np.isfinite(x).all() or (levels is not None and np.abs(x).max() > 1):
    raise ValueError(f"{path} must hold finite numbers in [-1, 1]")
  return [Input(f"{path}[{i}]", x.shape[1:3], image) for i, image in enumerate(x.astype(np.float32))]
