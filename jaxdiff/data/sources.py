"""Where examples come from: one function per kind of data, each returning a `Source`.

| function | data | x | split |
|---|---|---|---|
| `digits` | scikit-learn's 1797 handwritten digits, in the wheel | uint8 [8, 8, 1], 17 levels | fixed permutation |
| `toy2d` | moons, circles, ... (see `toys`) | float32 [2] | two seeds |
| `npz` | your arrays | integers or float32 | in the file, or a fixed permutation |
| `image_folder` | your PNG and JPEG files | uint8 [h, w, c], 256 levels | fixed permutation |
| `array_record` | what `jaxdiff data` prepared, read from disk | integers or float32 | in the folder |
| `tfds_source` | any prepared tfds image data set, read without TensorFlow | uint8 [h, w, c], 256 levels | tfds |
| `absent` | none: what an imported model was trained on, of which the shape is known | integers or float32 | |
| `from_arrays` | arrays of your program | integers or float32 | you name it |

All but `array_record` and `tfds_source` keep the split in memory, images in one byte per value. A permutation depends
on the seed and the number of examples only, so train and test never overlap while both stay the same. With a
`text_length`, `npz` and `array_record` hand out captions, too: `text`, bytes of that length (see `data.text`).
"""

import difflib
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.data import manifest as manifests
from jaxdiff.data.examples import (
  SPLITS,
  CaptionedExamples,
  Examples,
  NoExamples,
  Source,
  check_choice,
  from_arrays,
  split_fraction,
  split_indices,
  validate,
)
from jaxdiff.data.images import list_images, read_image
from jaxdiff.data.prepared import Records, read_texts
from jaxdiff.data.text import encode_text
from jaxdiff.data.toys import toy2d

__all__ = [
  "Source",
  "absent",
  "array_record",
  "digits",
  "from_arrays",
  "image_folder",
  "npz",
  "tfds_source",
  "toy2d",
  "validate",
]


def digits(split: str, held_out: int = 360, seed: int = 0) -> Source:
  """Scikit-learn's handwritten digits: 1797 images of 8x8 pixels with 17 levels (0..16), and their classes.

  Args:
    split: "train" or "test".
    held_out: number of test images.
    seed: seed of the permutation that splits the images.

  Returns:
    uint8 [8, 8, 1] with 17 levels and an int32 label.

  Raises:
    ValueError: an unknown split, or `held_out` outside 1..1796.

  Example:
    >>> len(digits("train")), len(digits("test"))
    (1437, 360)
  """
  check_choice("split", split, SPLITS)
  from sklearn.datasets import load_digits

  pixels, label = map(np.asarray, load_digits(return_X_y=True))
  rows = split_indices(split, len(pixels), held_out, seed)
  x = pixels[rows].reshape(-1, 8, 8, 1).astype(np.uint8)
  return from_arrays(x, label[rows], levels=17, name="digits", split=split)


def npz(
  split: str,
  path: str | Path,
  levels: int | None = None,
  test_fraction: float = 0.1,
  seed: int = 0,
  text_length: int = 0,
) -> Source:
  """Your own arrays in a `.npz` file.

  The file holds either `x_train` and `x_test` (labels, if any, in `label_train` and `label_test`, captions in
  `text_train` and `text_test`), or one array `x` (labels in `label`, captions in `text`), which a permutation of `seed`
  splits. Other arrays of numbers go with the examples, under their own names (`NAME_train` and `NAME_test`, or
  `NAME`). Arrays have a leading example axis; captions are strings, or bytes [n, text_length] of `encode_text`. Pickled
  objects are refused.

  Args:
    split: "train" or "test".
    path: the file.
    levels: number of integer levels (256 for 8-bit images); None for continuous data.
    test_fraction: share of test examples where the file holds one array.
    seed: seed of that permutation.
    text_length: bytes of a caption; 0 leaves captions out. A warning says how many are longer and therefore cut.

  Returns:
    The split, in memory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is no archive of arrays, misses `x` or captions, or holds data that `validate` refuses.

  Example:
    >>> npz("train", "faces.npz", levels=256)  # doctest: +SKIP
  """
  check_choice("split", split, SPLITS)
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"path: {path} is not a file; pass an .npz file with an array x")
  arrays = read_npz(path)
  whole, parts = "x" in arrays, any(f"x_{name}" in arrays for name in SPLITS)
  missing = [f"x_{name}" for name in SPLITS if parts and f"x_{name}" not in arrays]
  if whole == parts or missing:
    found = ", ".join(arrays) or "nothing"
    raise ValueError(f"path: {path} must hold either x, or x_train and x_test; it holds {found}")
  end = f"_{split}" if parts else ""
  x, label = arrays[f"x{end}"], arrays.get(f"label{end}")
  text = _npz_text(arrays, f"text{end}", text_length, path) if text_length else None
  others = {
    name.removesuffix(end): array
    for name, array in arrays.items()
    if name.endswith(end) and name.removesuffix(end) not in ("x", "label", "text") and array.dtype.kind in "fiu"
  }
  given = {"label": label, "text": text} | others
  fields = {name: array for name, array in given.items() if array is not None}
  if whole:
    if x.ndim == 0 or any(array.shape[:1] != x.shape[:1] for array in fields.values()):
      raise ValueError(
        f"path: {path} needs x [n, ...], label [n], text [n] and others [n, ..]; it holds {_shapes(arrays)}"
      )
    rows = split_fraction(split, len(x), test_fraction, seed)
    x, fields = x[rows], {name: array[rows] for name, array in fields.items()}
  label, text = fields.pop("label", None), fields.pop("text", None)
  return from_arrays(x, label, text=text, more=fields, levels=levels, name=f"npz/{path.name}", split=split)


def image_folder(
  split: str,
  path: str | Path,
  size: int | None = None,
  channels: int = 3,
  test_fraction: float = 0.1,
  seed: int = 0,
) -> Source:
  """A folder of PNG and JPEG files, directly inside or in one subfolder per class.

  Subfolders in alphabetical order give the labels 0, 1, ...; other files and hidden ones are passed over. Images are
  turned as their EXIF data say and transparent pixels are laid on white. The split's images are decoded once, at the
  start, and kept in memory: for more than fit there, prepare the same folder with `jaxdiff data folder`.

  Args:
    split: "train" or "test".
    path: the folder.
    size: crop the largest central square and resize it to size x size by area averages; None keeps images as they
      are, and then all must have one shape.
    channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
    test_fraction: share of test images.
    seed: seed of the permutation that splits the files, taken in the order of their paths.

  Returns:
    uint8 [h, w, channels] with 256 levels, and an int32 label where there are subfolders.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a file cannot be read, is not an 8-bit image or has another shape (the file is named), fewer than two
      images, or images both beside and inside the subfolders.

  Example:
    >>> image_folder("train", "photos", size=64)  # doctest: +SKIP
  """
  check_choice("split", split, SPLITS)
  if channels not in (1, 3) or (size is not None and size < 1):
    raise ValueError(f"channels, size: got {channels}, {size}; pass 1 or 3 channels and a size of at least 1 pixel")
  files, classes = list_images(Path(path))
  rows = split_fraction(split, len(files), test_fraction, seed)
  first = read_image(files[0], size, channels)
  x = np.empty((len(rows), *first.shape), np.uint8)
  for i, row in enumerate(rows):
    image = read_image(files[row], size, channels)
    if image.shape != first.shape:
      raise ValueError(
        f"path: {files[row]} has shape {image.shape} but {files[0]} has {first.shape}; pass size=... to crop and resize"
      )
    x[i] = image
  label = None
  if classes:
    number = {name: i for i, name in enumerate(classes)}
    label = np.array([number[files[row].parent.name] for row in rows], np.int32)
  return from_arrays(x, label, levels=256, name=f"image_folder/{Path(path).resolve().name}", split=split)


def array_record(split: str, path: str | Path, text_length: int = 0) -> Source:
  """Data that `jaxdiff data` prepared: array_record files with a manifest, read from disk while training.

  The files of the split are compared with the manifest first, byte by byte.

  Args:
    split: "train", "test", or what other splits the folder has.
    path: the folder.
    text_length: bytes of a caption; 0 leaves captions out. A warning says how many are longer and therefore cut.

  Returns:
    Examples of the shape, type and levels that the manifest says, with an int32 label where they have one, and their
    caption as uint8 [text_length] (of all examples in memory). The content hash covers all pixels, labels and captions
    that are handed out, in order, not the files they lie in.

  Raises:
    FileNotFoundError: the folder holds no manifest.
    ValueError: an unknown split, a damaged manifest, a file that is missing or has changed (it is named), or no
      captions where `text_length` asks for them.

  Example:
    >>> array_record("train", "data/fashion_mnist")  # doctest: +SKIP
  """
  folder = Path(path)
  manifest = manifests.read(folder)
  check_choice("split", split, manifest.splits)
  manifests.verify(folder, manifest, [split])
  content = manifests.content_hash(manifest, split)
  examples: Examples = Records(folder, manifest, split)
  if text_length:
    text = encode_text(read_texts(folder, manifest, split), text_length)
    examples = CaptionedExamples(examples, text)
    content = hashlib.sha256(f"{content}:{text.shape}:".encode() + text.tobytes()).hexdigest()[:16]
  return Source(manifest.name, examples, manifest.levels, manifest.shape, split, content)


def tfds_source(split: str, name: str, data_dir: str | Path | None = None) -> Source:
  """An image data set of tensorflow-datasets that was prepared as array_record, read without TensorFlow.

  Nothing is downloaded. Prepare the data once with `tfds.builder(name, data_dir=..., file_format="array_record")
  .download_and_prepare()`, which needs TensorFlow for most data sets. Images are decoded when they are read, so this
  scales beyond memory.

  Args:
    split: a tfds split with optional slice, such as "train" or "train[:90%]".
    name: tfds name with optional config and version, such as "cifar10".
    data_dir: the tfds folder; None for `~/tensorflow_datasets`.

  Returns:
    uint8 [h, w, c] with 256 levels, and an int32 label where the data set has one. The content hash covers the tfds
    name and version, the number of examples and the first example.

  Raises:
    FileNotFoundError: the data set is not prepared in `data_dir` as array_record.
    ValueError: an unknown name or split, no 8-bit feature `image` of fixed shape, or fewer rows than announced.

  Example:
    >>> tfds_source("train", "cifar10", data_dir="/data/tfds")  # doctest: +SKIP
  """
  import tensorflow_datasets as tfds

  try:
    builder: Any = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"name: tfds knows no data set {name!r} and {data_dir} holds none{hint}") from None
  rows = _open_tfds(builder, split, name)
  features = dict(builder.info.features.items())
  image, label = features.get("image"), features.get("label")
  if image is None or image.np_dtype != np.uint8 or None in image.shape:
    raise ValueError(f"name: {name!r} needs a uint8 feature 'image' of fixed shape; it has {features}")
  has_label = label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
  examples = TfdsExamples(rows, has_label)
  digest = hashlib.sha256(f"{builder.info.full_name}:{split}:{len(rows)}".encode())
  digest.update(examples[0]["x"].tobytes())
  return Source(f"tfds/{builder.info.full_name}", examples, 256, image.shape, split, digest.hexdigest()[:16])


def absent(split: str, shape: tuple[int, ...], levels: int | None = 256) -> Source:
  """Data that are not there: enough to draw samples of an imported model, not to train or to evaluate it.

  Args:
    split: any.
    shape: of one x.
    levels: number of integer levels; None for continuous data.

  Returns:
    A source without examples.

  Raises:
    ValueError: for a shape with a size below 1.

  Example:
    >>> len(absent("train", (32, 32, 3)))
    0
  """
  if not shape or min(shape) < 1:
    raise ValueError(f"shape: got {shape}; pass sizes of at least 1, such as (32, 32, 3)")
  examples = NoExamples(tuple(shape), np.float32 if levels is None else np.uint8)
  return Source("absent", examples, levels, tuple(shape), split, content_hash="")


class TfdsExamples:
  """Rows of a tfds data source, decoded one by one, with `image` renamed to `x`."""

  def __init__(self, rows: Any, has_label: bool):
    self._rows = rows
    self._has_label = has_label

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    row = self._rows[index]
    return {"x": row["image"]} | ({"label": np.asarray(row["label"], np.int32)} if self._has_label else {})


def _open_tfds(builder: Any, split: str, name: str) -> Any:
  """Returns the tfds data source of the split, all rows accounted for (tfds' mock_data announces no splits)."""
  if builder.info.splits:
    for part in split.split("+"):
      check_choice("split", part.partition("[")[0].strip(), builder.info.splits)
  try:
    rows = builder.as_data_source(split)
  except (AssertionError, FileNotFoundError, NotImplementedError) as error:
    raise FileNotFoundError(_unprepared(builder, name)) from error
  announced = builder.info.splits[split].num_examples if builder.info.splits else len(rows)
  if len(rows) != announced:
    raise ValueError(
      f"split: {name!r} {split!r} has {len(rows)} rows where tfds announces {announced}; prepare it anew"
    )
  return rows


def _unprepared(builder: Any, name: str) -> str:
  """What is missing, and the command that prepares it; tfds cannot prepare a second format in the same folder."""
  folder, there = str(builder.data_dir), Path(builder.data_dir).exists()
  root = "DIR" if there else folder.removesuffix(f"/{builder.info.full_name}")
  command = f"tfds.builder({name!r}, data_dir={root!r}, file_format='array_record').download_and_prepare()"
  state = f"is there as {builder.info.file_format.value}, not as array_record," if there else "is not prepared"
  return (
    f'name: {name!r} {state} in {folder}; prepare it with python -c "import tensorflow_datasets as tfds; {command}" '
    f"(with TensorFlow, which training does not need) and pass data_dir={root!r}"
  )


def read_npz(path: Path) -> dict[str, np.ndarray]:
  """The arrays of an .npz file, without pickled ones."""
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {key: archive[key] for key in archive.files}
  except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
    raise ValueError(
      f"path: {path} cannot be read as an .npz archive of plain arrays ({error}); write it with np.savez(path, x=...)"
    ) from error


def _npz_text(arrays: dict[str, np.ndarray], name: str, length: int, path: Path) -> np.ndarray:
  """Captions as bytes."""
  if (text := arrays.get(name)) is None:
    raise ValueError(f"path: {path} has no captions {name}; set text_length=0, or write strings under that name")
  if text.dtype.kind == "U" and text.ndim == 1:
    return encode_text(text.tolist(), length)
  if text.dtype != np.uint8 or text.ndim != 2 or text.shape[1] != length:
    found = f"{text.dtype}{list(text.shape)}"
    raise ValueError(
      f"path: {path} has {name} {found}; expected strings [n], or bytes [n, text_length={length}] as uint8"
    )
  return text


def _shapes(arrays: dict[str, np.ndarray]) -> str:
  return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
