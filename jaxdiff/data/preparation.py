"""From raw files to prepared data: Fashion-MNIST, emoji, image folders and .npz files.

Every function reads raw files, writes `output` by `prepared.write` and returns the manifest. The same raw files give
the same bytes. Where the raw data have no test set, a tenth of them is it, chosen by a fixed permutation.
"""

import collections
import concurrent.futures
import gzip
import hashlib
import json
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxdiff.data import prepared, sources
from jaxdiff.data.examples import SPLITS, split_fraction
from jaxdiff.data.images import list_images, read_image
from jaxdiff.data.manifest import Manifest
from jaxdiff.data.prepared import Part

_TEST_FRACTION, _SEED = 0.1, 0
_AHEAD = 64  # images decoded ahead of the one that is written
_FASHION_MNIST = {
  "train": ("train", "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012"),
  "test": ("t10k", "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"),
}
_CLOTHES = (
  *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
  *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}

In = TypeVar("In")
Out = TypeVar("Out")


def fashion_mnist(raw: Path, output: Path) -> Manifest:
  """Fashion-MNIST (Xiao et al. 2017): 60000 and 10000 images of 28x28 grey pixels of ten kinds of clothes.

  Args:
    raw: a folder that holds, at any depth, the four files such as train-images-idx3-ubyte.gz.
    output: the folder to make.

  Raises:
    FileNotFoundError: a raw file is not there.
    ValueError: a raw file is damaged. Pixels other than the published ones only give a warning.
  """
  parts: dict[str, Part] = {}
  for split, (stem, published) in _FASHION_MNIST.items():
    x = read_idx(_find(raw, f"{stem}-images-idx3-ubyte.gz"))
    label = read_idx(_find(raw, f"{stem}-labels-idx1-ubyte.gz"))
    if x.shape[1:] != (28, 28) or label.shape != x.shape[:1] or len(x) == 0:
      raise ValueError(f"input: the {stem} files under {raw} hold images {x.shape} and labels {label.shape}")
    if label.max() >= len(_CLOTHES):
      raise ValueError(f"input: the {stem} files under {raw} hold the label {label.max()}, above {len(_CLOTHES) - 1}")
    if (found := hashlib.sha256(x.tobytes()).hexdigest()) != published:
      warnings.warn(f"the {split} images under {raw} are not the published ones: sha256 {found}", stacklevel=1)
    parts[split] = Part(len(x), zip(x[..., None], label.tolist(), strict=True))
  about = Manifest(
    name="fashion_mnist",
    shape=(28, 28, 1),
    dtype="uint8",
    levels=256,
    labelled=True,
    classes=_CLOTHES,
    source={"kind": "fashion_mnist"},
    command="jaxdiff data fashion_mnist --input=DIR --output=DIR",
  )
  return prepared.write(output, about, parts)


def read_idx(path: Path) -> np.ndarray:
  """Reads a gzipped idx file of bytes: 0, 0, 8, the number of axes, each length as a big-endian uint32, the values.

  Raises:
    ValueError: the file is anything else; it is named.
  """
  try:
    content = gzip.decompress(path.read_bytes())
    zeros, kind, axes = struct.unpack_from(">HBB", content)
    shape = struct.unpack_from(f">{axes}I", content, 4)
    if (zeros, kind) != (0, 8):
      raise ValueError("it does not begin with 0, 0, 8")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
  except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
    raise ValueError(f"input: {path} cannot be read as a gzipped idx file of bytes ({error}); fetch it anew") from error


def _find(raw: Path, name: str) -> Path:
  found = sorted(Path(raw).rglob(name))
  if not found:
    raise FileNotFoundError(f"input: there is no {name} in {raw}; jaxdiff data --help says where to get the raw files")
  return found[0]


def emoji(raw: Path, output: Path, size: int = 64) -> Manifest:
  """The emoji of Noto (the package emoji-datasource-google): RGB on white, labelled by category, with their names.

  An emoji, its skin tones, its older forms and those that look the same are all in one split. The files train.jsonl
  and test.jsonl hold captions such as "woman scientist, medium-dark skin" in the order of the examples.

  Args:
    raw: the unpacked package, with emoji.json and img/google/64.
    output: the folder to make.
    size: height and width in pixels; the raw images have 64.

  Raises:
    FileNotFoundError: the package is not there.
    ValueError: emoji.json or an image is damaged.
  """
  raw = Path(raw)
  path = raw / "emoji.json"
  if not path.is_file():
    raise FileNotFoundError(f"input: there is no {path}; jaxdiff data --help says where to get the raw files")
  try:
    entries, texts, links = _emoji_texts(json.loads(path.read_text(encoding="utf-8")))
    version = json.loads((raw / "package.json").read_text(encoding="utf-8"))
    package = f"{version['name']} {version['version']}"
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"input: {path} or package.json beside it cannot be read ({error!r}); fetch them anew") from error
  files = [raw / "img" / "google" / "64" / entry["image"] for entry in entries]
  x = np.stack(list(_in_threads(lambda file: read_image(file, size, 3), files)))
  classes = sorted({text["category"] for text in texts})
  label = [classes.index(text["category"]) for text in texts]
  parts = {}
  for split, rows in _split_groups(_groups(x, links)).items():
    pairs = ((x[i], label[i]) for i in rows)
    parts[split] = Part(len(rows), pairs, [texts[i] for i in rows])
  about = Manifest(
    name="emoji",
    shape=(size, size, 3),
    dtype="uint8",
    levels=256,
    labelled=True,
    classes=tuple(classes),
    source={"kind": "emoji", "package": package, "size": size, "test_fraction": _TEST_FRACTION, "seed": _SEED},
    command=f"jaxdiff data emoji --input=DIR --output=DIR --size={size}",
  )
  return prepared.write(output, about, parts)


def _emoji_texts(bases: list[dict[str, Any]]) -> tuple[list[dict], list[dict], list[tuple[int, int]]]:
  """Returns the entries that have an image, what is said of each, and pairs of those that must not be separated."""
  entries: list[dict] = []
  texts: list[dict] = []
  links: list[tuple[int, int]] = []
  first: dict[str, int] = {}
  for base in bases:
    for tones, entry in (("", base), *base.get("skin_variations", {}).items()):
      if not entry["has_img_google"]:
        continue
      skin = [_SKIN_TONES[tone] for tone in tones.split("-") if tone]
      said = base["name"].lower() + (f", {' and '.join(skin)} skin" if skin else "")
      text = {"file": entry["image"], "name": base["short_name"], "text": said}
      texts.append(text | {"category": base["category"], "subcategory": base["subcategory"], "skin_tones": skin})
      links.append((len(entries), first.setdefault(base["unified"], len(entries))))
      entries.append(entry)
  for base in bases:
    if (older := base.get("obsoletes")) in first and base["unified"] in first:
      links.append((first[base["unified"]], first[older]))
  return entries, texts, links


def _groups(x: np.ndarray, links: list[tuple[int, int]]) -> np.ndarray:
  """The number of the group of each example: linked, or with the same pixels, or through others."""
  from scipy.sparse import coo_matrix
  from scipy.sparse.csgraph import connected_components

  first: dict[bytes, int] = {}
  same = [(i, first.setdefault(hashlib.sha256(image.tobytes()).digest(), i)) for i, image in enumerate(x)]
  a, b = np.array(links + same).T
  return connected_components(coo_matrix((np.ones(len(a)), (a, b)), (len(x), len(x))), directed=False)[1]


def _split_groups(groups: np.ndarray) -> dict[str, list[int]]:
  """The rows of each split, in the order of a permutation; groups stay together."""
  order = np.random.default_rng(_SEED).permutation(len(groups))
  held_out = split_fraction("test", int(groups.max()) + 1, _TEST_FRACTION, _SEED)
  test = np.isin(groups, held_out)
  return {"train": [int(i) for i in order if not test[i]], "test": [int(i) for i in order if test[i]]}


def folder(raw: Path, output: Path, size: int = 64, channels: int = 3) -> Manifest:
  """A folder of PNG and JPEG files, as `sources.image_folder` reads it; the images are never all in memory.

  Args:
    raw: the folder, with the files directly inside or in one subfolder per class.
    output: the folder to make.
    size: height and width in pixels, of the largest central square.
    channels: 3 for RGB, 1 for grey.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: what `sources.image_folder` refuses.
  """
  if channels not in (1, 3) or size < 1:
    raise ValueError(f"channels, size: got {channels}, {size}; pass 1 or 3 channels and a size of at least 1 pixel")
  raw = Path(raw)
  files, classes = list_images(raw)
  number = {name: i for i, name in enumerate(classes)}
  parts = {}
  for split in SPLITS:
    chosen = [files[row] for row in split_fraction(split, len(files), _TEST_FRACTION, _SEED)]
    labels = [number[file.parent.name] if classes else None for file in chosen]
    images = _in_threads(lambda file: read_image(file, size, channels), chosen)
    parts[split] = Part(len(chosen), zip(images, labels, strict=True))
  options = {"size": size, "channels": channels}
  about = Manifest(
    name=f"folder/{raw.resolve().name}",
    shape=(size, size, channels),
    dtype="uint8",
    levels=256,
    labelled=bool(classes),
    classes=tuple(classes) or None,
    source={"kind": "folder", **options, "test_fraction": _TEST_FRACTION, "seed": _SEED},
    command=f"jaxdiff data folder PATH --output=DIR --size={size} --channels={channels}",
  )
  return prepared.write(output, about, parts)


def npz(raw: Path, output: Path, levels: int | None = None) -> Manifest:
  """Arrays in a .npz file, as `sources.npz` reads them.

  Args:
    raw: the file.
    output: the folder to make.
    levels: number of integer levels; None for continuous data.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: what `sources.npz` refuses, or shapes, types or labels that differ between the splits.
  """
  raw = Path(raw)
  read = {split: sources.npz(split, raw, levels, _TEST_FRACTION, _SEED) for split in SPLITS}
  first = read["train"].examples[0]
  parts = {split: Part(len(source), _pairs(source)) for split, source in read.items()}
  about = Manifest(
    name=f"npz/{raw.name}",
    shape=read["train"].shape,
    dtype=first["x"].dtype.name,
    levels=levels,
    labelled="label" in first,
    classes=None,
    source={"kind": "npz", "levels": levels, "test_fraction": _TEST_FRACTION, "seed": _SEED},
    command="jaxdiff data npz PATH --output=DIR" + (f" --levels={levels}" if levels else ""),
  )
  return prepared.write(output, about, parts)


def _pairs(source: sources.Source) -> Iterator[tuple[np.ndarray, int | None]]:
  for i in range(len(source)):
    example = source.examples[i]
    yield example["x"], int(example["label"]) if "label" in example else None


def _in_threads(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
  """Like `map`, with threads that work a little ahead."""
  waiting: collections.deque[concurrent.futures.Future[Out]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) >= _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
