"""Prepared data: what is written is read, what has changed on disk is named, and nothing unfinished looks complete."""

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxdiff.data import manifest as manifests
from jaxdiff.data import pipeline, prepared, sources
from jaxdiff.data.manifest import Manifest
from jaxdiff.data.prepared import Part

COUNT = {"train": 50, "test": 7}
RECORD = 3 * 4 * 3 + 4


def images(split, shape=(3, 4, 3), dtype=np.uint8):
  return np.random.default_rng(COUNT[split]).integers(0, 256, (COUNT[split], *shape)).astype(dtype)


def about(**changes):
  made = Manifest("noise", (3, 4, 3), "uint8", 256, True, None, {"kind": "test"}, "make noise --output=DIR")
  return dataclasses.replace(made, **changes)


def parts(x=images):
  return {split: Part(COUNT[split], zip(x(split), range(COUNT[split]), strict=True)) for split in COUNT}


def prepare(folder, **options):
  return prepared.write(folder, about(), parts(), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """57 images, those of the train split in 5 files."""
  made = tmp_path_factory.mktemp("prepared") / "noise"
  prepare(made, shard_bytes=10 * RECORD)
  return made


@pytest.fixture
def own(tmp_path):
  """A folder of its own, to be spoiled."""
  prepare(tmp_path / "own", shard_bytes=10 * RECORD)
  return tmp_path / "own"


# ---- round trip


def test_what_is_written_is_read(folder):
  assert [file.name for file in sorted(folder.glob("train*"))] == [
    f"train-{k:05d}-of-00005.array_record" for k in range(5)
  ]
  for split, count in COUNT.items():
    source = sources.array_record(split, folder)
    assert (len(source), source.levels, source.shape, source.name) == (count, 256, (3, 4, 3), "noise")
    batch = source.gather(np.arange(count))
    assert (batch["x"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(batch["x"], images(split))
    np.testing.assert_array_equal(batch["label"], np.arange(count))


def test_rows_come_in_any_order_and_again(folder):
  rows = np.array([49, 0, 10, 9, 49, 30])
  source = sources.array_record("train", folder)
  np.testing.assert_array_equal(source.gather(rows)["x"], images("train")[rows])
  assert source.gather(rows)["label"].tolist() == rows.tolist()
  np.testing.assert_array_equal(source.examples[31]["x"], images("train")[31])
  with pytest.raises(IndexError, match=r"got -1\.\.3 of 50"):
    source.gather([3, -1])


@pytest.mark.parametrize(("dtype", "levels"), [("uint16", 300), ("uint32", 1 << 20), ("float32", None)])
def test_other_types_without_labels(tmp_path, dtype, levels):
  x = np.array([[0, 1], [299, 7]], dtype) * np.dtype(dtype).type(1 if levels else 1e-3)
  layout = about(shape=(2,), dtype=dtype, levels=levels, labelled=False)
  prepared.write(tmp_path / "a", layout, {"train": Part(2, ((row, None) for row in x))})
  source = sources.array_record("train", tmp_path / "a")
  batch = source.gather([1, 0])
  assert (set(batch), batch["x"].dtype, source.levels) == ({"x"}, np.dtype(dtype), levels)
  np.testing.assert_array_equal(batch["x"], x[::-1])


def test_the_same_examples_give_the_same_bytes(folder, tmp_path):
  prepare(tmp_path / "again", shard_bytes=10 * RECORD)
  files = sorted(file.name for file in folder.iterdir())
  assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
  assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_the_content_hash_is_that_of_the_examples_however_they_are_cut(folder, tmp_path):
  prepare(tmp_path / "whole")

  def changed(split):
    x = images(split).copy()
    x[-1, -1, -1, -1] ^= 1
    return x

  prepared.write(tmp_path / "changed", about(), parts(changed))
  whole, cut, other = (
    sources.array_record("train", place).content_hash for place in (tmp_path / "whole", folder, tmp_path / "changed")
  )
  assert whole == cut != other
  labels = {split: Part(COUNT[split], ((x, 0) for x in images(split))) for split in COUNT}
  prepared.write(tmp_path / "labels", about(), labels)
  assert sources.array_record("train", tmp_path / "labels").content_hash != whole


def test_threads_read_at_the_same_time(folder):
  source, expected = sources.array_record("train", folder), images("train")
  rows = [np.random.default_rng(k).integers(0, 50, 20) for k in range(200)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    batches = list(pool.map(source.gather, rows))
  assert all((batch["x"] == expected[row]).all() for batch, row in zip(batches, rows, strict=True))


# ---- batches


def test_processes_read_the_rows_of_one_global_batch_and_resume_on_another_number(folder):
  def batches(index=0, count=1, start=0, steps=7):
    # Each process opens the files for itself.
    iterator = pipeline.train_batches(sources.array_record("train", folder), 8, 5, index, count)
    iterator.set_state(json.loads(json.dumps({"next_index": start})))
    return [next(iterator) for _ in range(steps)], iterator.get_state()

  whole, state = batches()
  assert state == {"next_index": 7}
  assert sorted(np.concatenate([b["label"] for b in whole])[:50].tolist()) == list(range(50))
  for start, processes in ((0, 2), (3, 4)):
    shares = [batches(i, processes, start, 7 - start) for i in range(processes)]
    assert all(share[1] == state for share in shares)
    for name in ("x", "label"):
      joined = [np.concatenate([b[name] for b in step]) for step in zip(*(s[0] for s in shares), strict=True)]
      np.testing.assert_array_equal(joined, [b[name] for b in whole[start:]])


def test_a_file_that_changes_while_it_is_read_is_named(own):
  source = sources.array_record("test", own)
  path = next(own.glob("test*"))
  path.write_bytes(path.read_bytes()[:100])
  fresh = prepared.Records(own, manifests.read(own), "test")
  with pytest.raises(OSError, match=r"test-00000-of-00001.array_record"):
    fresh.gather(np.array([0, 3]))
  assert len(source) == 7


# ---- what is wrong is named


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (flip, r"train-00003-of-00005.array_record is corrupted: its sha256"),
    (
      lambda path: path.write_bytes(path.read_bytes()[:-1]),
      r"train-00003-of-00005.array_record has \d+ bytes, not \d+",
    ),
    (lambda path: path.unlink(), r"train-00003-of-00005.array_record is missing"),
  ],
)
def test_a_changed_file_is_named_before_anything_is_read(own, spoil, message):
  spoil(own / "train-00003-of-00005.array_record")
  with pytest.raises(ValueError, match=message) as error:
    sources.array_record("train", own)
  assert str(error.value).endswith(f"or delete {own} and prepare it anew: make noise --output={own}")
  assert "00002" not in str(error.value)
  assert len(sources.array_record("test", own)) == 7


def test_all_changed_files_are_named(own):
  for k in (1, 4):
    flip(own / f"train-0000{k}-of-00005.array_record")
  with pytest.raises(ValueError, match=r"train-00001.* is corrupted.*train-00004.* is corrupted"):
    sources.array_record("train", own)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda m: m.pop("shape"), "is damaged .*shape"),
    (lambda m: m.update(format=2), "has format 2, this version reads 1"),
    (lambda m: m.update(shape=[3, -4, 3]), "is damaged .*-4"),
    (lambda m: m.update(dtype="object"), "is damaged .*'object'"),
    (lambda m: m.update(levels=None), "is damaged .*levels None"),
    (lambda m: m.update(more=1), "is damaged .*more"),
    (lambda m: m["splits"]["train"].update(count=51), "is damaged .*count 51"),
    (lambda m: m["splits"]["train"]["files"][0].update(name="../secret"), "is damaged .*secret"),
    (lambda m: m["splits"]["train"]["files"][0].update(bytes="many"), "is damaged .*many"),
  ],
)
def test_a_damaged_manifest_is_refused(own, untyped, change, message):
  path = own / "manifest.json"
  plain = json.loads(path.read_text())
  change(plain)
  path.write_text(json.dumps(plain))
  with pytest.raises(ValueError, match=message):
    sources.array_record("train", own)


@pytest.mark.parametrize("content", ["", "[]", "{", "3", '{"format": 1, "splits": 3}'])
def test_a_manifest_that_is_none_is_refused(own, content):
  (own / "manifest.json").write_text(content)
  with pytest.raises(ValueError, match=r"manifest.json is damaged"):
    sources.array_record("train", own)


def test_a_folder_without_data_names_the_command(tmp_path, folder):
  for place in (tmp_path, tmp_path / "none"):
    with pytest.raises(
      FileNotFoundError, match=rf"{place} holds no manifest.json.*jaxdiff data NAME.*--output={place}"
    ):
      sources.array_record("train", place)
  with pytest.raises(ValueError, match=r"split: got 'tset'; choose from 'train', 'test' \(did you mean 'test'"):
    sources.array_record("tset", folder)


# ---- writing


class Stop(BaseException):
  """As a user who interrupts."""


@pytest.mark.parametrize("error", [Stop, ValueError, OSError])
def test_an_interrupted_preparation_leaves_nothing(tmp_path, error):
  def broken():
    yield from zip(images("train")[:30], range(30), strict=True)
    raise error

  with pytest.raises(error):
    prepared.write(tmp_path / "a", about(), {"train": Part(50, broken())}, shard_bytes=10 * RECORD)
  assert list(tmp_path.iterdir()) == []


def test_the_folder_has_no_manifest_until_all_is_there(tmp_path):
  seen = []

  def watched():
    for i, x in enumerate(images("train")):
      seen.extend(tmp_path.rglob("manifest.json"))
      assert not (tmp_path / "a").exists()
      yield x, i

  prepared.write(tmp_path / "a", about(), {"train": Part(50, watched())}, shard_bytes=10 * RECORD)
  assert seen == []
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  def full(*arguments):
    raise OSError("No space left on device")

  monkeypatch.setattr(prepared.manifests, "write", full)
  with pytest.raises(OSError, match="No space left"):
    prepare(tmp_path / "a")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_preparation_leaves_no_data(tmp_path):
  code = f"""
    import itertools, pathlib, numpy as np
    from jaxdiff.data import prepared
    from jaxdiff.data.manifest import Manifest
    x = np.zeros((64, 64, 3), np.uint8)
    about = Manifest("zeros", x.shape, "uint8", 256, False, None, {{}}, "none")
    endless = prepared.Part(10**9, ((x, None) for _ in itertools.count()))
    prepared.write(pathlib.Path({str(tmp_path / "a")!r}), about, {{"train": endless}}, shard_bytes=1 << 33)
    """
  process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
  deadline = time.monotonic() + 120
  while not list(tmp_path.glob(".a.unfinished-*/*.array_record")) and time.monotonic() < deadline:
    time.sleep(0.1)
  process.kill()
  process.wait()
  (left,) = tmp_path.iterdir()
  assert left.name.startswith(".a.unfinished-")
  for place in (left, tmp_path / "a"):
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
      sources.array_record("train", place)
  prepare(tmp_path / "a")
  assert len(sources.array_record("train", tmp_path / "a")) == 50


def test_an_existing_folder_is_left_alone(own, tmp_path):
  before = (own / "manifest.json").read_bytes()
  (tmp_path / "empty").mkdir()
  for place in (own, tmp_path / "empty"):
    with pytest.raises(FileExistsError, match=rf"output: {place} is there already"):
      prepare(place)
  assert (own / "manifest.json").read_bytes() == before
  assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
  ("layout", "examples", "message"),
  [
    (about(), [(np.zeros((3, 4, 1), np.uint8), 0)], r"uint8\[3, 4, 1\], not uint8\[3, 4, 3\]"),
    (about(), [(np.zeros((3, 4, 3), np.int64), 0)], r"int64\[3, 4, 3\], not uint8"),
    (about(levels=17), [(np.full((3, 4, 3), 17, np.uint8), 0)], r"value 17, outside 0\.\.16"),
    (about(), [(np.zeros((3, 4, 3), np.uint8), None)], "got None in data that are labelled"),
    (about(labelled=False), [(np.zeros((3, 4, 3), np.uint8), 1)], "got 1 in data that are not labelled"),
    (about(), [], "got 0 examples where 1 were announced"),
    (about(), [(np.zeros((3, 4, 3), np.uint8), 0)] * 2, "more than the 1 examples announced"),
  ],
)
def test_examples_unlike_the_layout_are_refused(tmp_path, layout, examples, message):
  with pytest.raises(ValueError, match=message):
    prepared.write(tmp_path / "a", layout, {"train": Part(1, iter(examples))})
  assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_keep_what_it_gets_is_noticed(tmp_path, monkeypatch):
  from array_record.python import array_record_module

  class Full(array_record_module.ArrayRecordWriter):
    def write(self, record):
      raise RuntimeError("No space left on device")

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(OSError, match=r"train-00000-of-00001.array_record cannot be written: No space left"):
    prepare(tmp_path / "a")
  assert list(tmp_path.iterdir()) == []
