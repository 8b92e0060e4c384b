"""Raw files into prepared data, through the command: what comes out is what went in, every time the same."""

import gzip
import hashlib
import itertools
import json
import struct

import numpy as np
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff.data import preparation, sources


def everything(folder):
  batches = {split: sources.array_record(split, folder) for split in ("train", "test")}
  return {split: source.gather(np.arange(len(source))) for split, source in batches.items()}


def run(*argv):
  cli.main(["data", *map(str, argv)])


def refused(capsys, *argv):
  with pytest.raises(SystemExit) as stop:
    run(*argv)
  assert stop.value.code == 2
  return capsys.readouterr().err


# ---- idx and Fashion-MNIST


def idx(array, kind=8):
  return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes(), mtime=0)


def test_idx_files_are_read_byte_by_byte(tmp_path):
  content = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 255])
  (tmp_path / "a.gz").write_bytes(gzip.compress(content))
  x = preparation.read_idx(tmp_path / "a.gz")
  assert x.dtype == np.uint8
  assert x.tolist() == [[[10, 20, 30], [40, 50, 255]]]


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"text",
    idx(np.zeros((2, 3), np.uint8))[:-9],
    gzip.compress(b"\0\0", mtime=0),
    gzip.compress(b"\0\0\x08\x03\0\0\0\x01", mtime=0),
    idx(np.zeros((2, 3), np.float32), kind=13),
    idx(np.zeros((2, 3), np.int8), kind=9),
    gzip.compress(gzip.decompress(idx(np.zeros((2, 3), np.uint8)))[:-1], mtime=0),
    gzip.compress(gzip.decompress(idx(np.zeros((2, 3), np.uint8))) + b"\0", mtime=0),
  ],
)
def test_other_files_than_idx_are_named(tmp_path, content):
  (tmp_path / "a.gz").write_bytes(content)
  with pytest.raises(ValueError, match=r"input: .*a\.gz cannot be read as a gzipped idx file of bytes"):
    preparation.read_idx(tmp_path / "a.gz")


def write_clothes(folder, train=30, test=6):
  deep = folder / "usr" / "share"
  deep.mkdir(parents=True)
  made = {}
  for split, stem, count in (("train", "train", train), ("test", "t10k", test)):
    x = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    label = np.arange(count, dtype=np.uint8) % 10
    (deep / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(x))
    (deep / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(label))
    made[split] = (x, label)
  return made


def test_fashion_mnist_keeps_pixels_labels_and_order(tmp_path, capsys):
  raw = write_clothes(tmp_path / "raw")
  out = tmp_path / "data" / "clothes"
  with pytest.warns(UserWarning, match="(train|test) images under .* are not the published ones: sha256"):
    run("fashion_mnist", f"--input={tmp_path / 'raw'}", f"--output={out}")
  for split, batch in everything(out).items():
    np.testing.assert_array_equal(batch["x"][..., 0], raw[split][0])
    np.testing.assert_array_equal(batch["label"], raw[split][1])
  said = capsys.readouterr().out
  assert "uint8[28, 28, 1], 256 levels, 10 classes" in said
  assert f"train: 30 examples, 0.1 MB in 1 file(s), pixels sha256 {hashlib.sha256(raw['train'][0]).hexdigest()}" in said
  assert Image.open(out / "preview.png").size > (200, 200)


def test_published_pixels_give_no_warning(tmp_path, monkeypatch, recwarn):
  raw = write_clothes(tmp_path / "raw")
  published = {s: (stem, hashlib.sha256(raw[s][0]).hexdigest()) for s, stem in (("train", "train"), ("test", "t10k"))}
  monkeypatch.setattr(preparation, "_FASHION_MNIST", published)
  preparation.fashion_mnist(tmp_path / "raw", tmp_path / "out")
  assert not [w for w in recwarn if "published" in str(w.message)]


def test_fashion_mnist_refusals(tmp_path, capsys):
  assert "there is no train-images-idx3-ubyte.gz in" in refused(
    capsys, "fashion_mnist", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"
  )
  write_clothes(tmp_path / "raw")
  labels = tmp_path / "raw" / "usr" / "share" / "t10k-labels-idx1-ubyte.gz"
  for wrong, message in ((np.zeros(5, np.uint8), r"labels \(5,\)"), (np.full(6, 10, np.uint8), "label 10, above 9")):
    labels.write_bytes(idx(wrong))
    with pytest.warns(UserWarning, match="published"), pytest.raises(ValueError, match=message):
      preparation.fashion_mnist(tmp_path / "raw", tmp_path / "out")
  assert not (tmp_path / "out").exists()


# ---- emoji

TONES = ("1F3FB", "1F3FF", "1F3FB-1F3FF")


def write_emoji(folder, bases=20):
  """Bases of which every third has skin tones; the last two look the same, and base 1 is the older form of base 2."""
  images = folder / "img" / "google" / "64"
  images.mkdir(parents=True)

  def picture(name, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[:8, :, 3] = 0
    Image.fromarray(pixels).save(images / name)

  entries = []
  for i in range(bases):
    entry = {"unified": f"B{i}", "name": f"NAME {i}", "short_name": f"name_{i}", "image": f"b{i}.png"}
    entry |= {"category": f"kind {i % 2}", "subcategory": "sub", "has_img_google": True}
    picture(entry["image"], min(i, bases - 2))
    if i % 3 == 0:
      entry["skin_variations"] = {
        tone: {"unified": f"B{i}-{tone}", "image": f"b{i}-{tone}.png", "has_img_google": tone != "1F3FF" or i > 0}
        for tone in TONES
      }
      for k, tone in enumerate(TONES):
        picture(f"b{i}-{tone}.png", 1000 + 10 * i + k)
    entries.append(entry)
  entries[2]["obsoletes"] = "B1"
  (folder / "emoji.json").write_text(json.dumps(entries))
  (folder / "package.json").write_text(json.dumps({"name": "emoji-datasource-google", "version": "0.0.1"}))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
  folder = tmp_path_factory.mktemp("emoji")
  write_emoji(folder / "package")
  preparation.emoji(folder / "package", folder / "out", size=16)
  return folder


def texts(folder, split):
  return [json.loads(line) for line in (folder / "out" / f"{split}.jsonl").read_text().splitlines()]


def test_emoji_are_on_white_with_category_and_text(emoji):
  assert json.loads((emoji / "out" / "manifest.json").read_text())["classes"] == ["kind 0", "kind 1"]
  for split, batch in everything(emoji / "out").items():
    lines = texts(emoji, split)
    assert len(lines) == len(batch["x"])
    for x, label, text in zip(batch["x"], batch["label"], lines, strict=True):
      assert (x[:2] == 255).all()
      raw = np.asarray(Image.open(emoji / "package" / "img" / "google" / "64" / text["file"]), float)
      alpha = raw[..., 3:] / 255
      expected = (raw[..., :3] * alpha + 255 * (1 - alpha)).reshape(16, 4, 16, 4, 3).mean((1, 3))
      np.testing.assert_allclose(x, expected, atol=1.5)  # rounded more than once
      number = int(text["file"].split("-")[0].removesuffix(".png")[1:])
      skin = f", {' and '.join(text['skin_tones'])} skin" if text["skin_tones"] else ""
      assert (text["name"], text["text"]) == (f"name_{number}", f"name {number}{skin}")
      assert label == number % 2 == int(text["category"][-1])
      assert len(text["skin_tones"]) == text["file"].count("1F3F")


def test_no_base_emoji_is_in_both_splits(emoji):
  bases = {split: {text["name"] for text in texts(emoji, split)} for split in ("train", "test")}
  assert bases["train"] | bases["test"] == {f"name_{i}" for i in range(20)}
  assert not bases["train"] & bases["test"]
  assert len(texts(emoji, "train")) + len(texts(emoji, "test")) == 20 + 3 * 7 - 1


def test_the_same_and_the_obsolete_are_not_separated(emoji):
  """Over many seeds the pairs that must stay together would be separated sometimes."""
  entries = json.loads((emoji / "package" / "emoji.json").read_text())
  _, said, links = preparation._emoji_texts(entries)
  x = np.arange(len(said))
  x[said.index(next(t for t in said if t["name"] == "name_19"))] = said.index(
    next(t for t in said if t["name"] == "name_18")
  )
  groups = preparation._groups(x[:, None], links)
  of = {text["name"]: group for text, group in zip(said, groups, strict=True)}
  assert len(set(of.values())) == 18
  assert of["name_1"] == of["name_2"]
  assert of["name_18"] == of["name_19"]
  assert sorted(itertools.chain(*preparation._split_groups(groups).values())) == list(range(len(said)))


def test_a_preparation_is_deterministic(emoji, tmp_path):
  preparation.emoji(emoji / "package", tmp_path / "out", size=16)
  names = sorted(file.name for file in (emoji / "out").iterdir())
  assert names == sorted(file.name for file in (tmp_path / "out").iterdir())
  assert all((emoji / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def test_emoji_refusals(tmp_path, capsys):
  argv = ("emoji", f"--input={tmp_path / 'package'}", f"--output={tmp_path / 'out'}")
  assert "emoji.json; jaxdiff data --help says where" in refused(capsys, *argv)
  write_emoji(tmp_path / "package", bases=5)
  lost = tmp_path / "package" / "img" / "google" / "64" / "b3.png"
  lost.unlink()
  assert "b3.png cannot be read as an image" in refused(capsys, *argv)
  (tmp_path / "package" / "emoji.json").write_text('[{"name": 3}]')
  assert "emoji.json or package.json beside it cannot be read" in refused(capsys, *argv)
  assert not (tmp_path / "out").exists()


# ---- folders and arrays


def write_photos(folder, count=12, classes=("cat", "dog")):
  for i in range(count):
    place = folder / classes[i % len(classes)] if classes else folder
    place.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(i).integers(0, 256, (10 + i, 14, 3), np.uint8)
    Image.fromarray(image).save(place / f"{i:02}.png")


@pytest.mark.parametrize("classes", [("cat", "dog"), ()])
def test_a_folder_is_what_image_folder_reads(tmp_path, capsys, classes):
  write_photos(tmp_path / "photos", classes=classes)
  run("folder", tmp_path / "photos", f"--output={tmp_path / 'out'}", "--size=8", "--channels=1")
  for split, batch in everything(tmp_path / "out").items():
    source = sources.image_folder(split, tmp_path / "photos", size=8, channels=1)
    expected = source.gather(np.arange(len(source)))
    assert batch.keys() == expected.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], expected[name])
  assert ("2 classes" if classes else "without labels") in capsys.readouterr().out


def test_only_some_images_of_a_folder_are_in_memory(tmp_path, monkeypatch):
  """Images are decoded when they are written, a bounded number ahead."""
  write_photos(tmp_path / "photos", count=30)
  monkeypatch.setattr(preparation, "_AHEAD", 4)
  read, most = [0, 0], []

  def counted(*arguments):
    read[0] += 1
    return sources.read_image(*arguments)

  def writing(output, about, parts):
    for part in parts.values():
      for _ in part.examples:
        read[1] += 1
        most.append(read[0] - read[1])
    return about

  monkeypatch.setattr(preparation, "read_image", counted)
  monkeypatch.setattr(preparation.prepared, "write", writing)
  preparation.folder(tmp_path / "photos", tmp_path / "out", size=4)
  assert read == [30, 30]
  assert max(most) <= 4


def test_a_broken_image_is_named_and_leaves_nothing(tmp_path, capsys):
  write_photos(tmp_path / "photos")
  (tmp_path / "photos" / "cat" / "04.png").write_bytes(b"no image")
  error = refused(capsys, "folder", tmp_path / "photos", f"--output={tmp_path / 'out'}")
  assert "04.png cannot be read as an image" in error
  assert [path.name for path in tmp_path.iterdir()] == ["photos"]
  assert "channels, size: got 2, 64" in refused(
    capsys, "folder", tmp_path / "photos", f"--output={tmp_path / 'out'}", "--channels=2"
  )


@pytest.mark.parametrize("levels", [256, None])
def test_npz_is_what_the_source_reads(tmp_path, levels):
  x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3))
  np.savez(tmp_path / "a.npz", x=x if levels else x / 10, label=np.arange(20))
  run("npz", tmp_path / "a.npz", f"--output={tmp_path / 'out'}", *([f"--levels={levels}"] if levels else []))
  for split, batch in everything(tmp_path / "out").items():
    source = sources.npz(split, tmp_path / "a.npz", levels)
    expected = source.gather(np.arange(len(source)))
    assert batch["x"].dtype == expected["x"].dtype
    for name in ("x", "label"):
      np.testing.assert_array_equal(batch[name], expected[name])
  assert (tmp_path / "out" / "preview.png").exists() == (levels is not None)


def test_npz_with_unlike_splits_is_refused(tmp_path, capsys):
  np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 2)), x_test=np.zeros((3, 5)))
  error = refused(capsys, "npz", tmp_path / "a.npz", f"--output={tmp_path / 'out'}")
  assert "x: an example is float32[5], not float32[2]" in error


# ---- the command


def test_check_reads_every_byte(tmp_path, capsys):
  np.savez(tmp_path / "a.npz", x=np.zeros((20, 4)))
  run("npz", tmp_path / "a.npz", f"--output={tmp_path / 'out'}")
  run("check", tmp_path / "out")
  path = tmp_path / "out" / "test-00000-of-00001.array_record"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  error = refused(capsys, "check", tmp_path / "out")
  assert f"{path} is corrupted" in error
  assert f"jaxdiff data npz PATH --output={tmp_path / 'out'}" in error
  assert "holds no manifest.json" in refused(capsys, "check", tmp_path)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ((), "the following arguments are required: NAME"),
    (("cifar10",), "invalid choice: 'cifar10'"),
    (("emoji", "--input=a"), "the following arguments are required: --output"),
    (("folder", "a", "--output=b", "--size=big"), "argument --size: invalid int value: 'big'"),
    (("npz", "none.npz", "--output=b"), "none.npz is not a file"),
    (("npz", "a", "--out=b"), "--output"),
  ],
)
def test_wrong_arguments_are_refused_in_one_line(tmp_path, capsys, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  error = refused(capsys, *argv)
  assert message in error
  assert error.startswith("jaxdiff: ")
  assert error.count("\n") == 1


def test_an_existing_folder_is_refused(tmp_path, capsys):
  np.savez(tmp_path / "a.npz", x=np.zeros((20, 4)))
  assert f"output: {tmp_path} is there already" in refused(capsys, "npz", tmp_path / "a.npz", f"--output={tmp_path}")


@pytest.mark.parametrize("argv", [("--help",), ("emoji", "--help")])
def test_help_says_where_the_raw_files_come_from(capsys, argv):
  with pytest.raises(SystemExit) as stop:
    run(*argv)
  assert not stop.value.code
  said = capsys.readouterr().out
  for text in ("dpkg-deb -x", "npm pack emoji-datasource-google", "--config.data.type=array_record"):
    assert text in said
