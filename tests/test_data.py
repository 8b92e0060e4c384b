"""Data: splits, order and coverage of batches, exact resume, sharding, file formats, and every refusal."""

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxdiff.data import pipeline, sources, transforms
from jaxdiff.data.examples import Source


def numbered(count, **options):
  """A source whose example i holds the number i, so that a batch tells which examples it is made of."""
  return sources.from_arrays(np.arange(count, dtype=np.float32)[:, None], **options)


def take(iterator, batches):
  return [next(iterator)["x"][:, 0].astype(int).tolist() for _ in range(batches)]


def all_examples(source):
  return source.gather(np.arange(len(source)))


class Rows:
  """A user's own sequence: random access and nothing else."""

  def __init__(self, rows):
    self.rows = rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return {"x": self.rows[index], "label": np.int32(index)}


# ---- sources


def test_digits_splits_are_the_whole_set_without_overlap():
  from sklearn.datasets import load_digits

  train, test = sources.digits("train"), sources.digits("test")
  assert (len(train), len(test)) == (1437, 360)
  assert train.shape == (8, 8, 1)
  assert train.levels == 17
  x = np.concatenate([all_examples(train)["x"], all_examples(test)["x"]])
  label = np.concatenate([all_examples(train)["label"], all_examples(test)["label"]])
  assert (x.dtype, label.dtype) == (np.uint8, np.int32)
  data = load_digits()
  assert len(np.unique(data.images.reshape(1797, -1), axis=0)) == 1797, "equal images would make the next line too weak"
  rows = sorted((*pixels.reshape(-1).tolist(), digit) for pixels, digit in zip(x, label, strict=True))
  assert rows == sorted((*map(int, p.reshape(-1)), d) for p, d in zip(data.images, data.target, strict=True))


def test_digits_are_a_function_of_the_seed():
  assert sources.digits("test").content_hash == sources.digits("test").content_hash
  assert sources.digits("test").content_hash != sources.digits("test", seed=1).content_hash
  assert len(sources.digits("test", held_out=10)) == 10


@pytest.mark.parametrize("name", ["moons", "circles", "swiss_roll", "mixture"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_toys_have_mean_zero_and_variance_one(name, noise):
  x = all_examples(sources.toy2d("train", name, size=100_000, noise=noise))["x"]
  assert x.dtype == np.float32
  # Standard errors: 1/sqrt(n) = 0.0032 for the mean, at most sqrt(2/n) = 0.0045 for the variance; five of each.
  np.testing.assert_allclose(x.mean(0), 0, atol=0.016)
  np.testing.assert_allclose(x.var(0), 1, atol=0.023)


def test_toy_moons_lie_on_their_curves():
  """Undoing the published standardization (mean (1/2, 1/4), variance (3/4, 9/16 - 1/pi)) gives two half circles."""
  batch = all_examples(sources.toy2d("train", "moons", size=500, noise=0.0))
  points = batch["x"] * np.sqrt([0.75, 0.5625 - 1 / np.pi]) + [0.5, 0.25]
  centre = np.where(batch["label"][:, None] == 0, [0.0, 0.0], [1.0, 0.5])
  np.testing.assert_allclose(np.linalg.norm(points - centre, axis=1), 1, atol=1e-5)
  assert (np.sign(points[:, 1] - centre[:, 1]) == np.where(batch["label"] == 0, 1, -1)).all()


def test_toy_splits_are_different_draws():
  train, test = (all_examples(sources.toy2d(split, size=100))["x"] for split in ("train", "test"))
  assert not np.intersect1d(train[:, 0], test[:, 0]).size
  np.testing.assert_array_equal(train, all_examples(sources.toy2d("train", size=100))["x"])


@pytest.mark.parametrize(("levels", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_integers_keep_their_values_in_the_smallest_type(levels, dtype):
  x = np.array([[0, levels - 1]], np.int64)
  kept = all_examples(sources.from_arrays(x, levels=levels))["x"]
  assert kept.dtype == dtype
  np.testing.assert_array_equal(kept, x)


def test_gather_of_a_plain_sequence_stacks_its_examples():
  rows = np.arange(12, dtype=np.float32).reshape(6, 2)
  batch = Source("mine", Rows(rows), None, (2,), "train", "v1").gather([4, 0, 4])
  np.testing.assert_array_equal(batch["x"], rows[[4, 0, 4]])
  np.testing.assert_array_equal(batch["label"], [4, 0, 4])


def test_arrays_in_memory_cannot_change_under_the_hash():
  with pytest.raises(ValueError, match="read-only"):
    sources.digits("test").examples[0]["x"][0, 0, 0] = 1


def test_npz_with_given_splits(tmp_path):
  arrays = {"x_train": np.eye(3), "x_test": np.ones((2, 3)), "label_train": np.array([2, 1, 0])}
  np.savez(tmp_path / "a.npz", **arrays)
  train, test = (all_examples(sources.npz(split, tmp_path / "a.npz")) for split in ("train", "test"))
  np.testing.assert_array_equal(train["x"], np.eye(3, dtype=np.float32))
  np.testing.assert_array_equal(train["label"], [2, 1, 0])
  assert test["x"].shape == (2, 3)
  assert "label" not in test


def test_npz_with_one_array_is_split_once(tmp_path):
  x = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
  np.savez(tmp_path / "a.npz", x=x, label=np.arange(50))
  train, test = (sources.npz(split, tmp_path / "a.npz", levels=256, test_fraction=0.2) for split in ("train", "test"))
  assert (len(train), len(test)) == (40, 10)
  rows = np.concatenate([all_examples(train)["label"], all_examples(test)["label"]])
  assert sorted(rows) == list(range(50))
  np.testing.assert_array_equal(np.concatenate([all_examples(train)["x"], all_examples(test)["x"]]), x[rows])


def write_images(folder, count, size=(6, 4), mode="RGB"):
  folder.mkdir(parents=True, exist_ok=True)
  images = [
    np.random.default_rng(i).integers(0, 256, (size[1], size[0], len(mode)), np.uint8).squeeze() for i in range(count)
  ]
  for i, image in enumerate(images):
    Image.fromarray(image).save(folder / f"{i:03}.png")
  return images


def test_image_folder_round_trip(tmp_path):
  images = [*write_images(tmp_path / "cat", 6), *write_images(tmp_path / "dog", 4)]
  (tmp_path / "README.txt").write_text("not an image")
  train, test = (sources.image_folder(split, tmp_path, test_fraction=0.3) for split in ("train", "test"))
  assert (len(train), len(test)) == (7, 3)
  assert (train.shape, train.levels) == ((4, 6, 3), 256)
  x = np.concatenate([all_examples(train)["x"], all_examples(test)["x"]])
  label = np.concatenate([all_examples(train)["label"], all_examples(test)["label"]])
  expected = sorted((image.tobytes(), int(i >= 6)) for i, image in enumerate(images))
  assert sorted(zip(map(bytes, x), label.tolist(), strict=True)) == expected


def test_image_folder_crops_the_centre_averages_and_converts(tmp_path):
  grey = np.zeros((4, 8), np.uint8)
  grey[:, 2:4] = [10, 30]
  for i in range(2):
    Image.fromarray(grey).save(tmp_path / f"{i}.png")
  batch = all_examples(sources.image_folder("test", tmp_path, size=2, channels=1))
  assert "label" not in batch
  np.testing.assert_array_equal(batch["x"][0, ..., 0], [[20, 0], [20, 0]])
  np.testing.assert_array_equal(sources.image_folder("test", tmp_path).examples[0]["x"], np.stack([grey] * 3, -1))


def test_image_folder_lays_transparency_on_white(tmp_path):
  for i in range(2):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / f"{i}.png")
  assert (all_examples(sources.image_folder("test", tmp_path))["x"] == 255).all()


# ---- refusals

IMAGES = np.zeros((3, 4, 4, 1), np.uint8)
BROKEN = np.ones((5, 2))
BROKEN[3] = [np.nan, np.inf]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: sources.from_arrays(BROKEN), "holds 2 values that are NaN or infinite in float32, the first in example 3"),
    (lambda: sources.from_arrays(np.full((2, 2), 1e300)), "4 values that are NaN or infinite in float32"),
    (lambda: sources.from_arrays(IMAGES + 17, levels=17), r"value 17 in example 0, outside 0\.\.16; .*levels=17"),
    (lambda: sources.from_arrays(IMAGES.astype(int) - 1, levels=17), r"value -1 in example 0, outside 0\.\.16"),
    (lambda: sources.from_arrays(IMAGES / 1.0, levels=17), r"dtype float64 where integers 0\.\.16 are expected"),
    (lambda: sources.from_arrays(IMAGES), "uint8 and levels=None.*pass levels"),
    (lambda: sources.from_arrays(IMAGES[..., 0], levels=17), r"shape \(4, 4\); expected \[h, w, c\] or \[d\]"),
    (lambda: sources.from_arrays(IMAGES, levels=1), "levels: got 1"),
    (lambda: sources.from_arrays(np.zeros(3)), r"x: 'arrays' has shape \(3,\)"),
    (lambda: sources.from_arrays(IMAGES[:0], levels=17, split="test"), "split: 'test' of 'arrays' is empty"),
    (lambda: sources.from_arrays(IMAGES, np.zeros(2, int), levels=17), r"label: .* int64\[2\]; expected 3 integers"),
    (lambda: sources.from_arrays(IMAGES, np.zeros(3), levels=17), r"label: .* float64\[3\]; expected 3 integers"),
    (lambda: sources.from_arrays(IMAGES, np.full(3, 2**31), levels=17), "do not fit int32"),
    (lambda: Source("mine", Rows(np.zeros((3, 2), np.float32)), None, (5,), "train", ""), r"shape \(2,\), not \(5,\)"),
    (lambda: sources.digits("trian"), r"split: got 'trian'; choose from 'train', 'test' \(did you mean 'train'\?\)"),
    (lambda: sources.digits("test", held_out=1797), "held_out: got 1797 of 1797"),
    (lambda: sources.digits("test", held_out=0), "held_out: got 0"),
    (lambda: sources.toy2d("tests"), "split: got 'tests'.*did you mean 'test'"),
    (lambda: sources.toy2d("test", "mons"), "name: got 'mons'.*did you mean 'moons'"),
    (lambda: sources.toy2d("test", size=0), "size: got 0"),
    (lambda: sources.toy2d("test", noise=-1.0), "noise: got -1.0"),
    (lambda: sources.image_folder("train", ".", channels=2), "channels, size: got 2"),
    (lambda: pipeline.train_batches(numbered(5), 0, 0), "batch_size: got 0 for the 5 examples"),
    (lambda: pipeline.train_batches(numbered(5), 6, 0), "batch_size: got 6 for the 5 examples"),
    (lambda: pipeline.eval_batches(numbered(5), 6), "batch_size: got 6 for the 5 examples"),
    (lambda: pipeline.eval_batches(numbered(5), 0), "batch_size: got 0 for the 5 examples"),
    (lambda: pipeline.train_batches(numbered(5), 3, 0, 0, 2), "batch_size: 3 does not divide among 2 processes"),
    (lambda: pipeline.train_batches(numbered(5), 4, 0, 2, 2), "process_index: got 2 of 2"),
    (lambda: pipeline.train_batches(numbered(5), 4, -1), "seed: got -1"),
    (lambda: transforms.random_flip(jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 2))), "flipping needs"),
  ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_input_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_validate_counts_over_the_whole_sequence():
  rows = np.zeros((9000, 2), np.float32)
  rows[[4500, 8999], 1] = np.nan
  with pytest.raises(ValueError, match=r"2 values .* the first in example 4500"):
    sources.validate(Source("mine", Rows(rows), None, (2,), "train", "v1"))


def test_validate_finds_a_later_example_of_another_shape():
  rows = [np.zeros((2, 2, 1), np.uint8)] * 4096 + [np.zeros((3, 2, 1), np.uint8)] * 2
  with pytest.raises(ValueError, match=r"shape \(3, 2, 1\) from 4096 on, not \(2, 2, 1\)"):
    sources.validate(Source("mine", Rows(rows), 256, (2, 2, 1), "train", "v1"))


def saved(write):
  buffer = io.BytesIO()
  write(buffer)
  return buffer.getvalue()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (saved(lambda f: np.savez(f, y=np.eye(2), z=np.eye(2))), "must hold either x, or x_train and x_test; .* y, z"),
    (saved(lambda f: np.savez(f, x_train=np.eye(2))), "must hold either x, or x_train and x_test"),
    (saved(lambda f: np.savez(f, x=np.eye(2), x_train=np.eye(2), x_test=np.eye(2))), "must hold either"),
    (saved(lambda f: np.savez(f, x=np.eye(4), label=np.arange(3))), r"it holds x \[4, 4\], label \[3\]"),
    (saved(lambda f: np.savez(f, x=np.array([object()]))), "cannot be read as an .npz archive of plain arrays"),
    (saved(lambda f: np.save(f, np.eye(2))), "cannot be read as an .npz"),
    (saved(lambda f: np.savez(f, x=np.eye(99)))[:-500], "cannot be read as an .npz"),
    (b"", "cannot be read as an .npz"),
    (b"text", "cannot be read as an .npz"),
  ],
)
def test_bad_npz_is_refused_by_name(tmp_path, content, message):
  (tmp_path / "mine.npz").write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    sources.npz("train", tmp_path / "mine.npz")
  assert "mine.npz" in str(error.value)


def test_missing_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"path: .*none.npz is not a file"):
    sources.npz("train", tmp_path / "none.npz")
  with pytest.raises(FileNotFoundError, match=r"path: .*none is not a folder"):
    sources.image_folder("train", tmp_path / "none")
  with pytest.raises(ValueError, match="holds 0 PNG or JPEG files"):
    sources.image_folder("train", tmp_path)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda file: file.write_bytes(file.read_bytes()[:100]), "003.png cannot be read as an image"),
    (lambda file: file.write_bytes(b"no image"), "003.png cannot be read as an image"),
    (lambda file: Image.new("RGB", (5, 4)).save(file), r"003.png has shape \(4, 5, 3\) but .*000.png has \(4, 6, 3\)"),
    (lambda file: Image.new("I;16", (6, 4)).save(file), "003.png has PIL mode 'I;16'"),
    (lambda file: write_images(file.parent / "sub", 1), "both beside and inside its subfolders"),
  ],
)
def test_bad_image_folder_is_refused_by_name(tmp_path, spoil, message):
  write_images(tmp_path, 5)
  spoil(tmp_path / "003.png")

  def read_both():
    return [sources.image_folder(split, tmp_path) for split in ("train", "test")]

  with pytest.raises(ValueError, match=message):
    read_both()


# ---- batches


def test_every_epoch_uses_each_example_once_in_a_new_order():
  # 10 examples, batches of 4: five batches are two epochs, and the third batch takes two examples of each.
  stream = list(itertools.chain(*take(pipeline.train_batches(numbered(10), 4, seed=3), 10)))
  epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 4


def test_the_order_depends_on_the_seed_only():
  first, again, threaded, other = (
    take(pipeline.train_batches(numbered(50), 8, seed, threads=threads), 20)
    for seed, threads in ((0, 4), (0, 4), (0, 1), (1, 4))
  )
  assert first == again == threaded
  assert first != other


def test_the_order_is_uniform():
  """Each example is as likely as any other to come first: chi-squared with 4 degrees of freedom, 99.9% below 18.5."""
  source = numbered(5)
  first = [next(pipeline.train_batches(source, 1, seed, threads=0))["x"][0, 0] for seed in range(500)]
  counts = np.bincount(np.array(first, int), minlength=5)
  assert ((counts - 100) ** 2 / 100).sum() < 18.5


@pytest.mark.parametrize("count", [16, 17])
def test_processes_read_the_rows_of_one_global_batch(count):
  source = numbered(count)
  whole = take(pipeline.train_batches(source, 8, seed=0), 12)
  for processes in (2, 4):
    parts = [take(pipeline.train_batches(source, 8, 0, i, processes), 12) for i in range(processes)]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole
    index = np.concatenate([pipeline.global_index(8, i, processes) for i in range(processes)])
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, np.arange(8))
  # Without the border of an epoch a global batch has no example twice.
  assert len(set(whole[0])) == 8


def test_batches_keep_x_and_label_together():
  train = sources.digits("train")
  everything = all_examples(train)
  label_of = {x.tobytes(): label for x, label in zip(everything["x"], everything["label"], strict=True)}
  batch = next(pipeline.train_batches(train, 128, 0))
  assert batch["x"].shape == (128, 8, 8, 1)
  assert [label_of[x.tobytes()] for x in batch["x"]] == batch["label"].tolist()


def test_resume_through_orbax_is_exact(tmp_path):
  source = numbered(11)
  expected = take(pipeline.train_batches(source, 4, seed=5), 12)
  iterator = pipeline.train_batches(source, 4, seed=5)
  take(iterator, 5)
  state = {"step": np.asarray(5)}
  with ocp.CheckpointManager(tmp_path) as manager:
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator))
    manager.save(5, args=arguments)
    take(iterator, 3)
  restored = pipeline.train_batches(source, 4, seed=5)
  with ocp.CheckpointManager(tmp_path) as manager:
    arguments = ocp.args.Composite(
      state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(restored)
    )
    manager.restore(5, args=arguments)
  assert take(restored, 7) == expected[5:]


def test_the_state_is_the_number_of_batches_on_any_number_of_processes():
  whole = take(pipeline.train_batches(numbered(11), 4, 0), 9)
  iterator = pipeline.train_batches(numbered(11), 4, 0, 1, 2)
  take(iterator, 3)
  assert iterator.get_state() == {"next_index": 3}
  iterator.set_state({"next_index": 7})
  assert take(iterator, 2) == [rows[2:] for rows in whole[7:]]


def test_fingerprint_survives_json_and_tells_batches_apart():
  source = sources.digits("train")
  current = pipeline.fingerprint(source, 128, 0)
  assert json.loads(json.dumps(current)) == current
  changes = {
    "seed": pipeline.fingerprint(source, 128, 1),
    "batch_size": pipeline.fingerprint(source, 64, 0),
    "content": pipeline.fingerprint(sources.digits("train", seed=1), 128, 0),
    "split": pipeline.fingerprint(sources.digits("test"), 128, 0),
    "count": pipeline.fingerprint(sources.digits("train", held_out=100), 128, 0),
    "levels": pipeline.fingerprint(sources.from_arrays(IMAGES, levels=2), 2, 0),
  }
  for entry, changed in changes.items():
    assert changed[entry] != current[entry]


def test_content_hash_sees_one_changed_label():
  first, second = (sources.from_arrays(IMAGES, np.array([0, 1, k]), levels=2).content_hash for k in (0, 1))
  assert first != second


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 10])
def test_eval_batches_cover_everything_once_in_order(batch_size):
  batches = list(pipeline.eval_batches(numbered(10), batch_size))
  assert {batch["x"].shape for batch, _ in batches} == {(batch_size, 1)}
  valid = np.concatenate([batch["x"][:count, 0] for batch, count in batches])
  np.testing.assert_array_equal(valid, np.arange(10))
  assert all((batch["x"][count:] == 9).all() for batch, count in batches)


# ---- transforms


def test_random_flip_mirrors_half_of_the_images_left_to_right():
  count = 2000
  keys = jax.random.split(jax.random.key(0), count)
  x = jnp.tile(jnp.arange(12, dtype=jnp.uint8).reshape(2, 3, 2), (count, 1, 1, 1))
  y = np.asarray(jax.jit(transforms.random_flip)(keys, x))
  flipped = (y == np.flip(x, 2)).all((1, 2, 3))
  assert (flipped | (y == x).all((1, 2, 3))).all()
  assert y.dtype == np.uint8
  assert abs(flipped.mean() - 0.5) < 5 * 0.5 / count**0.5
  np.testing.assert_array_equal(transforms.random_flip(keys[7:9], x[:2]), y[7:9])


@pytest.mark.parametrize("u", [0.0, 0.5, 0.99])
def test_to_uint8_inverts_dequantization(u):
  values = np.arange(256)
  x = jnp.asarray((values + u) / 256 * 2 - 1, jnp.float32)
  pictures = transforms.to_uint8(x)
  assert pictures.dtype == jnp.uint8
  np.testing.assert_array_equal(pictures, values)


def test_to_uint8_clips_and_takes_half_precision():
  np.testing.assert_array_equal(transforms.to_uint8(jnp.array([-9.0, 1.0, 9.0], jnp.bfloat16)), [0, 255, 255])


# ---- tfds


def run_python(code):
  """Runs code in a fresh interpreter, where no other test has imported anything."""
  return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)


def test_importing_sources_loads_nothing_heavy():
  heavy = {"tensorflow", "tensorflow_datasets", "orbax", "grain", "matplotlib", "sklearn", "PIL"}
  done = run_python(f"import sys, jaxdiff.data.sources, jaxdiff.data.transforms; print({heavy} & set(sys.modules))")
  assert done.stdout.strip() == "set()", done.stderr


def test_tfds_mock_data_feeds_the_pipeline_without_tensorflow():
  done = run_python(
    """
    import sys
    import tensorflow_datasets as tfds
    from jaxdiff.data import pipeline, sources
    with tfds.testing.mock_data(num_examples=20):
      source = sources.tfds_source("train", "cifar10")
      batch = next(pipeline.train_batches(source, 8, 0))
      print(len(source), source.levels, source.shape, batch["x"].shape, batch["x"].dtype, batch["label"].dtype)
    print("tensorflow" in sys.modules)
    """
  )
  assert done.stdout.splitlines() == ["20 256 (32, 32, 3) (8, 32, 32, 3) uint8 int32", "False"], done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A tfds data set of 12 random images, prepared as array_record."""
  import tensorflow_datasets as tfds

  images = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), np.uint8)

  class Noise(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"image": tfds.features.Image(shape=(5, 4, 3)), "label": tfds.features.ClassLabel(num_classes=12)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(range(9)), "test": self._generate_examples(range(9, 12))}

    def _generate_examples(self, rows):
      for i in rows:
        yield i, {"image": Image.fromarray(images[i]), "label": i}

  data_dir = tmp_path_factory.mktemp("tfds")
  Noise(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return data_dir, images


def test_tfds_rows_are_the_prepared_ones(prepared):
  data_dir, images = prepared
  for split, expected in (("train", range(9)), ("test", range(9, 12)), ("train[:2]+test", None), ("train[:5]", None)):
    source = sources.tfds_source(split, "noise", data_dir)
    batch = all_examples(source)
    np.testing.assert_array_equal(batch["x"], images[batch["label"]])
    assert expected is None or sorted(batch["label"]) == list(expected)
    np.testing.assert_array_equal(source.examples[1]["x"], batch["x"][1])
  assert len(source) == 5


def test_the_command_in_the_message_prepares_the_data(prepared, tmp_path):
  import tensorflow_datasets as tfds

  _, images = prepared
  with pytest.raises(FileNotFoundError) as error:
    sources.tfds_source("test", "noise", tmp_path)
  command = re.search(
    r"tfds\.builder\('(\w+)', data_dir='(\S+)', file_format='(\w+)'\)\.download_and_prepare\(\)", str(error.value)
  )
  name, data_dir, file_format = command.groups()
  assert str(error.value).endswith(f"and pass data_dir={data_dir!r}")
  tfds.builder(name, data_dir=data_dir, file_format=file_format).download_and_prepare()
  batch = all_examples(sources.tfds_source("test", "noise", data_dir))
  np.testing.assert_array_equal(batch["x"], images[batch["label"]])


def test_tfds_data_of_another_format_need_another_folder(prepared, tmp_path):
  data_dir, _ = prepared
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  info = tmp_path / "noise" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(FileNotFoundError, match="is there as tfrecord, not as array_record, .*data_dir='DIR'"):
    sources.tfds_source("train", "noise", tmp_path)


def test_tfds_refusals(prepared, tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  data_dir, _ = prepared
  with pytest.raises(ValueError, match=r"split: got 'tran'.*did you mean 'train'"):
    sources.tfds_source("tran", "noise", data_dir)
  with pytest.raises(ValueError, match=r"name: tfds knows no data set 'cifar01'.*did you mean 'cifar10"):
    sources.tfds_source("train", "cifar01", tmp_path)
  with pytest.raises(FileNotFoundError, match="'cifar10' is not prepared in .*tfds.builder.'cifar10'.*with TensorFlow"):
    sources.tfds_source("train", "cifar10", tmp_path)
  monkeypatch.setattr(tfds.core.splits.SplitInfo, "num_examples", 10)
  with pytest.raises(ValueError, match="has 9 rows where tfds announces 10"):
    sources.tfds_source("train", "noise", data_dir)
