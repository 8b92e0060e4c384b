"""Features, the chunks that keep them, and weights from files that may be hostile."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parallel
from jaxdiff.data import sources
from jaxdiff.evaluation import chunks, classifier, features, mobilenet, pth

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def digits():
  return [source.gather(np.arange(len(source))) for source in map(sources.digits, ("train", "test"))]


@pytest.fixture
def short(monkeypatch):
  for name, value in {"_STEPS": 50, "_BATCH": 16, "_RATE": 5e-3}.items():
    monkeypatch.setattr(classifier, name, value)


def test_the_classifier_learns_its_classes_and_is_the_same_again(digits, short):
  train, test = digits
  first, again = (features.choose("auto", train, 17, 3, None) for _ in range(2))
  assert first.name == "cnn"
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
    np.testing.assert_array_equal(a, b)
  both = lambda params, x: (first.apply(params, x), classifier.Classifier(10).apply(params, x)[1])
  made, logits = jax.device_get(jax.jit(both)(first.params, features.to_values(test["x"], 17)))
  assert np.mean(np.argmax(logits, axis=1) == test["label"]) > 0.9
  assert made.shape == (360, 64)
  np.testing.assert_allclose(np.mean(made**2, axis=1), 1, rtol=1e-2)  # but for the epsilon of the norm


def test_samples_are_rounded_to_the_levels_of_the_data():
  for levels in (2, 17, 256, 1000):
    x = np.arange(levels)[:, None]
    values = np.asarray(features.to_values(x, levels))
    np.testing.assert_array_equal(features.to_levels(values, levels), x)
    np.testing.assert_array_equal(features.to_levels(values + 0.98 / levels, levels), x)
    np.testing.assert_array_equal(features.to_levels(np.array([[-3.0], [3.0]]), levels), x[[0, -1]])
  y = np.float32([[0.3]])
  assert features.to_levels(y, None) is y


def linear():
  weights = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  return features.Features("linear", weights, lambda w, x: jnp.tanh(x.reshape(len(x), -1) @ w))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(("devices", "batch_size"), [(8, 16), (1, 7), (4, 60)])
def test_features_do_not_depend_on_batch_size_or_devices(devices, batch_size, tmp_path):
  x = np.random.default_rng(1).integers(0, 9, (50, 2, 2, 3)).astype(np.uint8)
  made = linear()
  mesh = parallel.make_mesh(jax.local_devices()[:devices])
  extracted = features.extractor(made, 9, batch_size, mesh, tmp_path)("x", x, "a")
  expected = made.apply(made.params, (2 * (x + 0.5) / 9 - 1).astype(np.float32))
  np.testing.assert_allclose(extracted, expected, rtol=1e-5, atol=1e-6)


def test_features_are_kept_for_the_same_examples_and_parameters_only(tmp_path):
  x, calls = np.ones((8, 12), np.float32), []
  apply = lambda w, x: calls.append(1) or x @ w
  mesh = parallel.make_mesh(jax.local_devices()[:1])
  run = lambda weights, x, identity: features.extractor(
    features.Features("f", weights, apply), None, 4, mesh, tmp_path
  )("x", x, identity)
  first = run(np.ones((12, 2), np.float32), x, "a")
  traced = len(calls)
  np.testing.assert_array_equal(run(np.ones((12, 2), np.float32), 0 * x, "a"), first)
  assert len(calls) == traced
  np.testing.assert_array_equal(run(np.ones((12, 2), np.float32), 0 * x, "b"), 0 * first)
  np.testing.assert_array_equal(run(2 * np.ones((12, 2), np.float32), x, "a"), 2 * first)


# chunks


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
  done = []

  def compute(start, stop_at=None):
    if start == stop_at:
      raise KeyboardInterrupt
    done.append(start)
    return {"x": np.arange(start, start + 4.0), "n": np.full(4, start)}

  run = lambda count, compute=compute, identity="a": chunks.in_chunks(tmp_path, "c", identity, count, 4, compute)
  with pytest.raises(KeyboardInterrupt):
    run(10, lambda start: compute(start, stop_at=8))
  whole = run(10)
  assert done == [0, 4, 8]
  np.testing.assert_array_equal(whole["x"], np.arange(10.0))
  np.testing.assert_array_equal(run(14)["n"], np.repeat([0, 4, 8, 12], 4)[:14])
  assert done == [0, 4, 8, 12]
  file = tmp_path / "c-00000004.npz"
  file.write_bytes(file.read_bytes()[:-40])
  np.testing.assert_array_equal(run(14)["x"], np.arange(14.0))
  assert done == [0, 4, 8, 12, 4]
  run(5, identity="b")
  assert done[5:] == [0, 4]
  assert not list(tmp_path.glob("*.part"))


def test_a_chunk_that_was_not_finished_leaves_nothing(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    args[0].write(b"half")
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
      chunks.in_chunks(tmp_path, "c", "a", 2, 2, lambda start: {"x": np.ones(2)})
  assert chunks.in_chunks(tmp_path, "c", "a", 2, 2, lambda start: {"x": np.zeros(2)})["x"].tolist() == [0, 0]


# files of weights: written here as PyTorch writes them, with stand-ins for its names


class FloatStorage:
  def __init__(self, values):
    self.values = np.asarray(values, np.float32).ravel()


class LongStorage(FloatStorage):
  pass


class Tensor:
  def __init__(self, storage, offset, shape, strides):
    self.parts = storage, offset, shape, strides, False, collections.OrderedDict()

  def __reduce__(self):
    return _rebuild_tensor_v2, self.parts


def _rebuild_tensor_v2(*parts):
  raise AssertionError("the file was run")


FloatStorage.__module__ = LongStorage.__module__ = "torch"
_rebuild_tensor_v2.__module__ = "torch._utils"


@pytest.fixture
def torch_names(monkeypatch):
  for name, parts in {
    "torch": {"FloatStorage": FloatStorage, "LongStorage": LongStorage},
    "torch._utils": {"_rebuild_tensor_v2": _rebuild_tensor_v2},
  }.items():
    module = types.ModuleType(name)
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, name, module)


def dump(obj, storages, legacy, protocol=2):
  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if not isinstance(value, FloatStorage):
        return None
      key = storages.setdefault(id(value), (str(len(storages)), value))[0]
      return "storage", type(value), key, "cpu", len(value.values), *((None,) if legacy else ())

  buffer = io.BytesIO()
  Pickler(buffer, protocol=protocol).dump(obj)
  return buffer.getvalue()


def save(path, tensors, legacy=False, protocol=2):
  """The format of torch.save since 1.6 (a zip file), or the one before it."""
  storages = {}
  body = dump(tensors, storages, legacy, protocol)
  if legacy:
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    tail = [len(s.values).to_bytes(8, "little") + s.values.tobytes() for _, s in storages.values()]
    path.write_bytes(b"".join([*head, body, pickle.dumps([key for key, _ in storages.values()], 2), *tail]))
    return
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("archive/data.pkl", body)
    for key, storage in storages.values():
      file.writestr(f"archive/data/{key}", storage.values.tobytes())


def tensor(x):
  x = np.asarray(x, np.float32)
  return Tensor(FloatStorage(x), 0, x.shape, tuple(s // x.itemsize for s in x.strides))


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_read_as_they_were_saved(torch_names, tmp_path, legacy):
  x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  shared = FloatStorage(x)
  state = collections.OrderedDict(
    a=tensor(x),
    transposed=Tensor(shared, 0, (4, 3), (1, 4)),
    part=Tensor(shared, 5, (2, 2), (4, 1)),
    scalar=Tensor(shared, 7, (), ()),
  )
  state._metadata = {"": {"version": 1}}
  save(tmp_path / "w.pth", state, legacy)
  read = pth.read(tmp_path / "w.pth")
  assert list(read) == ["a", "transposed", "part", "scalar"]
  for name, expected in {"a": x, "transposed": x.T, "part": x[1:3, 1:3], "scalar": x[1, 3]}.items():
    np.testing.assert_array_equal(read[name], expected)


class Command:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_a_command_is_refused_and_nothing_runs(torch_names, tmp_path, legacy, protocol):
  made = tmp_path / "made"
  for hostile in (Command(os.system, f"touch {made}"), Command(exec, f"open({str(made)!r}, 'w')")):
    save(tmp_path / "w.pth", {"a": tensor([1.0]), "b": hostile}, legacy, protocol)
    with pytest.raises(ValueError, match="is not read: its pickle (names|has the opcode) .*; refused, nothing was run"):
      pth.read(tmp_path / "w.pth")
    assert not made.exists()
    pickle.loads(dump(hostile, {}, legacy, protocol))  # what unpickling would have done
    assert made.exists()
    made.unlink()


@pytest.mark.parametrize(
  ("state", "message"),
  [
    ({"a": Tensor(FloatStorage([1.0, 2.0]), 1, (2,), (1,))}, r"tensor of shape \(2,\) does not fit its storage of 2"),
    ({"a": Tensor(FloatStorage([1.0, 2.0]), 0, (99,), (0,))}, "does not fit"),
    ({"a": Tensor(FloatStorage([1.0, 2.0]), -1, (1,), (1,))}, "does not fit"),
    ({"a": Tensor(FloatStorage([1.0, 2.0]), 1, (2,), (-1,))}, "does not fit"),
    ({"a": Tensor(LongStorage([1.0, 2.0]), 0, (1,), (1,))}, "does not fit"),
    ({"a": Tensor("no storage", 0, (1,), (1,))}, "damaged or no state dict"),
    ([1, 2], "damaged or no state dict"),
    ({"a": 1 + 2j}, "its pickle names"),
  ],
)
def test_tensors_that_do_not_fit_their_file_are_refused(torch_names, tmp_path, state, message):
  save(tmp_path / "w.pth", state)
  with pytest.raises(ValueError, match=message):
    pth.read(tmp_path / "w.pth")


def test_other_files_are_refused(torch_names, tmp_path):
  path = tmp_path / "w.pth"
  save(path, {"a": tensor(np.ones(100))}, legacy=True)
  whole = path.read_bytes()
  for content in (b"", b"text", pickle.dumps(3), whole[:-9], whole[:60], whole[:200]):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="w.pth is (not read|damaged)"):
      pth.read(path)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("a.txt", "b")
  with pytest.raises(ValueError, match="no data.pkl"):
    pth.read(path)


# MobileNetV2


def mobilenet_state():
  """Random weights of the shapes of Table 2 of the paper, under torchvision's names."""
  rng, state = np.random.default_rng(0), {}

  def conv(name, norm, size, channels, kernel=1):
    state[f"{name}.weight"] = rng.normal(size=(size, channels, kernel, kernel)) * (2 / (channels * kernel**2)) ** 0.5
    for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
      state[f"{norm}.{part}"] = value + 0.1 * rng.random(size)
    state[f"{norm}.num_batches_tracked"] = np.ones(())

  conv("features.0.0", "features.0.1", 32, 3, 3)
  before, number = 32, 0
  for expansion, channels, repeats in (
    (1, 16, 1),
    (6, 24, 2),
    (6, 32, 3),
    (6, 64, 4),
    (6, 96, 3),
    (6, 160, 3),
    (6, 320, 1),
  ):
    for _ in range(repeats):
      number += 1
      name, wide, step = f"features.{number}.conv", expansion * before, 0
      if expansion > 1:
        conv(f"{name}.0.0", f"{name}.0.1", wide, before)
        step = 1
      conv(f"{name}.{step}.0", f"{name}.{step}.1", wide, 1, 3)
      conv(f"{name}.{step + 1}", f"{name}.{step + 2}", channels, wide)
      before = channels
  conv("features.18.0", "features.18.1", 1280, before)
  state["classifier.1.weight"], state["classifier.1.bias"] = rng.normal(size=(1000, 1280)), rng.normal(size=1000)
  return state


def test_mobilenet_from_a_file(torch_names, tmp_path):
  """It has the 3,504,872 parameters of torchvision's; the features tell images apart, and know no batch."""
  state = mobilenet_state()
  trained = [v.size for name, v in state.items() if "running" not in name and "num_batches" not in name]
  assert sum(trained) == 3_504_872
  path = tmp_path / "mobilenet.pth"
  save(path, {name: tensor(value) for name, value in state.items()})
  data = {"x": np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)}
  net = features.choose("mobilenet", data, 256, 0, str(path))
  apply = jax.jit(net.apply)
  made = apply(net.params, features.to_values(data["x"], 256))
  assert made.shape == (3, 1280)
  assert float(jnp.std(made, axis=0).max()) > 1e-3
  swapped = apply(net.params, features.to_values(data["x"][::-1], 256))
  np.testing.assert_allclose(swapped[::-1], made, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"images \[h, w, 3\]; the data have shape \(8, 8, 1\)"):
    features.choose("mobilenet", {"x": data["x"][..., :1]}, 256, 0, str(path))
  save(path, {name: tensor(value) for name, value in state.items() if name != "features.7.conv.2.weight"})
  with pytest.raises(ValueError, match="does not hold torchvision's MobileNetV2: KeyError: 'features.7.conv.2.weight'"):
    mobilenet.load(path)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (4, 1), (4, 2)])
def test_convolution_and_normalization_are_those_of_the_definition(groups, stride):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 5, 5, 4)), rng.normal(size=(4, 4 // groups, 3, 3))
  scale, bias, mean, variance = rng.random((4, 4)) + 0.5
  norm = {"n.weight": scale, "n.bias": bias, "n.running_mean": mean, "n.running_var": variance}
  weights = {name: np.float32(value) for name, value in {"c.weight": kernel, **norm}.items()}
  convolve = jax.jit(lambda weights, x: mobilenet._convolve(weights, "c", "n", x, stride))
  made = np.asarray(convolve(weights, x.astype(np.float32)))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  for b, i, j, o in np.ndindex(*made.shape):
    window = padded[b, stride * i : stride * i + 3, stride * j : stride * j + 3]
    window = window if groups == 1 else window[..., o : o + 1]
    value = np.sum(window * kernel[o].transpose(1, 2, 0))
    expected = (value - mean[o]) / np.sqrt(variance[o] + 1e-5) * scale[o] + bias[o]
    assert made[b, i, j, o] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("cnn", r"features 'cnn' .* need images \[h, w, c\] with labels"),
    ("mobilenet", "features 'mobilenet' need weights"),
  ],
)
def test_features_that_do_not_fit_the_data_are_refused(kind, message):
  data = {"x": np.zeros((4, 2), np.float32), "label": np.zeros(4, np.int32)}
  with pytest.raises(ValueError, match=message):
    features.choose(kind, data, None, 0, None)
  assert features.choose("auto", data, None, 0, None).name == "raw"
  assert features.choose("auto", {"x": np.zeros((4, 2, 2, 1), np.float32)}, None, 0, None).name == "raw"
