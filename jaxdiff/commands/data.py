"""The command `jaxdiff data`: raw files into a folder of array_record that training reads from disk, and its check."""

import argparse
from pathlib import Path
from typing import NoReturn

import numpy as np

from jaxdiff.commands import console
from jaxdiff.data import manifest as manifests
from jaxdiff.data import preparation, sources
from jaxdiff.data.manifest import Manifest
from jaxdiff.evaluation import features, pictures
from jaxdiff.schema import ConfigError

_PREVIEW = 8  # images a side
_SOURCES = """where the raw files come from:
  fashion_mnist  the Debian package dataset-fashion-mnist (MIT licence, 31 MB). Without root:
                   apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb raw
                   jaxdiff data fashion_mnist --input=raw --output=data/fashion_mnist
  emoji          the npm package emoji-datasource-google (images: Apache 2.0 licence, 74 MB):
                   npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
                   jaxdiff data emoji --input=package --output=data/emoji64
  folder         your own PNG and JPEG files, directly in the folder or in one subfolder per class
  npz            your own arrays: x_train and x_test (label_train, label_test), or x (label), with a leading axis

Where there is no test set, a fixed tenth of the examples is it. Train with --config.data.type=array_record and
--config.data.path=DIR. A preparation that is killed leaves .DIR.unfinished-*, which can be deleted.
"""


class _Parser(argparse.ArgumentParser):
  """Refuses as the other commands do."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f"{message}; {self.prog} --help lists the arguments")


def data(argv: list[str]) -> None:
  """Prepare data, or check what was prepared.

  Raises:
    ConfigError: for arguments or raw files that cannot be used, and for prepared data that have changed.
  """
  given = vars(_parser().parse_args(argv))
  make = given.pop("make")
  try:
    make(**given)
  except (ValueError, OSError) as error:
    raise ConfigError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
  form = argparse.RawDescriptionHelpFormatter
  parser = _Parser("jaxdiff data", description=__doc__, epilog=_SOURCES, formatter_class=form, allow_abbrev=False)
  kinds = parser.add_subparsers(metavar="NAME", required=True, parser_class=_Parser)

  def add(name: str, what: str, make, raw: str = "") -> argparse.ArgumentParser:
    kind = kinds.add_parser(name, help=what, epilog=_SOURCES, formatter_class=form, allow_abbrev=False)
    if raw:
      kind.add_argument(raw, dest="raw", type=_path, required=True, metavar="DIR", help="the folder of the raw files")
    else:
      kind.add_argument("raw", type=_path, metavar="PATH", help="what to read")
    kind.set_defaults(make=make)
    return kind

  fashion = add("fashion_mnist", "70000 images of clothes, 28x28, grey", _fashion_mnist, raw="--input")
  emoji = add("emoji", "3786 emoji, RGB, with captions", _emoji, raw="--input")
  folder = add("folder", "your PNG and JPEG files", _folder)
  npz = add("npz", "your arrays", _npz)
  add("check", "compare prepared data with their manifest, byte by byte", _check)
  for kind in (fashion, emoji, folder, npz):
    kind.add_argument("--output", type=_path, required=True, metavar="DIR", help="the folder to make")
  for kind in (emoji, folder):
    kind.add_argument("--size", type=int, default=64, help="height and width of the images in pixels (64)")
  folder.add_argument("--channels", type=int, default=3, help="3 for RGB (the default), 1 for grey")
  npz.add_argument("--levels", type=int, help="number of integer levels, such as 256; without it x is continuous")
  return parser


def _path(text: str) -> Path:
  return Path(text).expanduser()


def _fashion_mnist(raw: Path, output: Path) -> None:
  _report(preparation.fashion_mnist(raw, output), output)


def _emoji(raw: Path, output: Path, size: int) -> None:
  _report(preparation.emoji(raw, output, size), output)


def _folder(raw: Path, output: Path, size: int, channels: int) -> None:
  _report(preparation.folder(raw, output, size, channels), output)


def _npz(raw: Path, output: Path, levels: int | None) -> None:
  _report(preparation.npz(raw, output, levels), output)


def _check(raw: Path) -> None:
  manifest = manifests.read(raw)
  manifests.verify(raw, manifest, manifest.splits)
  _describe(manifest, raw)


def _report(manifest: Manifest, output: Path) -> None:
  _describe(manifest, output)
  if manifest.levels is not None and len(manifest.shape) == 3 and manifest.shape[-1] in (1, 3):
    source = sources.array_record("train", output)
    x = source.gather(np.arange(min(len(source), _PREVIEW**2)))["x"]
    pictures.save_grid(output / "preview.png", np.asarray(features.to_values(x, source.levels)), columns=_PREVIEW)
  console.list_files(output, manifests.FILE, "preview.png")


def _describe(manifest: Manifest, folder: Path) -> None:
  kind = "continuous" if manifest.levels is None else f"{manifest.levels} levels"
  labels = "labelled" if manifest.labelled else "without labels"
  if manifest.classes:
    labels = f"{len(manifest.classes)} classes"
  print(f"{manifest.name} in {folder}: {manifest.dtype}{list(manifest.shape)}, {kind}, {labels}")
  for name, split in manifest.splits.items():
    files = f"{sum(file.bytes for file in split.files) / 1e6:.1f} MB in {len(split.files)} file(s)"
    print(f"  {name}: {split.count} examples, {files}, pixels sha256 {split.pixels}")
