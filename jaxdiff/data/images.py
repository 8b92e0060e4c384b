"""Image files: which there are in a folder, and one of them as an array."""

from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def list_images(folder: Path) -> tuple[list[Path], list[str]]:
  """Returns the image files in the order of their paths and the class names (none without subfolders)."""
  if not folder.is_dir():
    raise FileNotFoundError(f"path: {folder} is not a folder; pass a folder of PNG or JPEG files")
  files = sorted(
    file
    for file in (*folder.glob("*"), *folder.glob("*/*"))
    if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
  )
  if len(files) < 2:
    raise ValueError(f"path: {folder} holds {len(files)} PNG or JPEG files; training and test need at least one each")
  inside = [file for file in files if file.parent != folder]
  if inside and len(inside) != len(files):
    raise ValueError(f"path: {folder} holds images both beside and inside its subfolders; keep one of the two layouts")
  return files, sorted({file.parent.name for file in inside})


def read_image(file: Path, size: int | None, channels: int) -> np.ndarray:
  """One image as uint8 [h, w, channels]: turned as its EXIF data say, on white, cropped to a square and resized.

  Args:
    file: a PNG or JPEG file.
    size: crop the largest central square and resize it to size x size by area averages; None keeps the image as it is.
    channels: 3 for RGB, 1 for grey (ITU-R 601 luma).

  Raises:
    ValueError: the file cannot be read or is not an 8-bit image; it is named.
  """
  from PIL import Image, ImageOps

  try:
    with Image.open(file) as opened:
      mode, image = opened.mode, ImageOps.exif_transpose(opened)
      image.load()
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise ValueError(f"path: {file} cannot be read as an image ({error}); repair or remove it") from error
  if mode not in _EIGHT_BIT_MODES:
    raise ValueError(f"path: {file} has PIL mode {mode!r}; convert it to 8-bit grey or RGB")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = image.convert("RGB" if channels == 3 else "L")
  if size is not None:
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BOX)
  return np.asarray(image).reshape(*image.size[::-1], channels)
