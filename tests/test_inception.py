"""The Inception network of the FID on random weights; against PyTorch's functions in test_parity_inception."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_features
from inception_state import PARAMETERS, picture, random_state

from jaxdiff.evaluation import features, inception, pth, report

torch_names = test_features.torch_names
BRANCHES = (320, 704, 1088, 1472, 1856)  # where the parts of the last block meet among the features
FROM_TORCH = (
  0.62585,
  0.566974,
  0.533804,
  0.614411,
  0.522892,
  0.820288,
)  # means of these parts by PyTorch's network on these weights and this picture


@pytest.fixture(scope="module")
def state():
  return random_state()


def means(made):
  return [np.mean(part) for part in np.split(np.asarray(made)[0], BRANCHES)]


class Recorded(dict):
  def __init__(self, weights):
    super().__init__(weights)
    self.read = []

  def __getitem__(self, name):
    self.read.append(name)
    return super().__getitem__(name)


def test_it_reads_every_weight_once_and_has_the_parameters_of_the_published_network(state, untyped):
  weights = Recorded(state)
  shape = jax.eval_shape(lambda x: inception.features(weights, x), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
  assert shape.shape == (2, 2048)
  assert sorted(weights.read) == sorted(state)
  assert sum(state[name].size for name in weights.read if "running" not in name) == PARAMETERS


def test_features_of_integers_from_a_file_are_those_of_pytorch(state, torch_names, tmp_path):
  """Grey integers enter as three equal colours 2 k / 255 - 1."""
  path, x = tmp_path / "w.pth", picture()
  classifier = {"fc.weight": np.zeros((1008, 2048)), "fc.bias": np.zeros(1008)}
  test_features.save(path, {name: test_features.tensor(value) for name, value in (state | classifier).items()})
  net = features.choose("inception", {"x": x}, 256, 0, str(path))
  assert net.name == "inception"
  assert net.params.keys() == state.keys()
  made = jax.jit(net.apply)(net.params, features.to_values(x, 256))
  assert made.shape == (1, 2048)
  np.testing.assert_allclose(means(made), FROM_TORCH, rtol=1e-4)


@pytest.mark.parametrize(
  ("kind", "stride", "pad", "reduce"),
  [("average", 1, 1, np.nanmean), ("max", 1, 1, np.nanmax), ("max/2", 2, 0, np.nanmax)],
)
def test_pools_take_what_is_inside_the_image_only(kind, stride, pad, reduce):
  x = np.random.default_rng(0).normal(-3, 1, (2, 7, 5, 3)).astype(np.float32)
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=np.nan)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
  np.testing.assert_allclose(inception._pool(kind, jnp.asarray(x)), reduce(windows, axis=(-2, -1)), rtol=1e-5)


@pytest.mark.parametrize(
  ("spec", "size", "stride"), [("6:1x1", (1, 1), 0), ("6:1x7", (1, 7), 0), ("6:3x3", (3, 3), 0), ("6:3x3/2", (3, 3), 2)]
)
def test_convolution_and_normalization_are_those_of_the_definition(spec, size, stride):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 7, 9, 4)), rng.normal(size=(6, 4, *size))
  scale, bias, mean, variance = 0.1 * rng.random((4, 6)) + 0.01  # variances where the epsilon of 1e-3 tells
  norm = {"n.bn.weight": scale, "n.bn.bias": bias, "n.bn.running_mean": mean, "n.bn.running_var": variance}
  weights = {name: np.float32(value) for name, value in {"n.conv.weight": kernel, **norm}.items()}
  made = inception._convolve(weights, "n", spec, jnp.asarray(x, jnp.float32))
  pads = [(0, 0) if stride else (k // 2, k // 2) for k in size]
  patches = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), *pads, (0, 0))), size, axis=(1, 2))
  values = np.einsum("bijcuv,ocuv->bijo", patches[:, :: stride or 1, :: stride or 1], kernel)
  expected = np.maximum((values - mean) / np.sqrt(variance + 1e-3) * scale + bias, 0)
  np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 3), (299, 400), (700, 1)])
def test_resizing_takes_two_points_an_axis(size):
  """np.interp at the centres of the 299 pixels, which repeats the ends, along one axis and then the other."""
  x = np.random.default_rng(0).normal(size=(1, *size, 1)).astype(np.float32)
  expected = x[0, ..., 0]
  for axis, n in enumerate(size):
    centres = (np.arange(299) + 0.5) * n / 299 - 0.5
    expected = np.apply_along_axis(lambda row: np.interp(centres, np.arange(n), row), axis, expected)
  np.testing.assert_allclose(inception._resize(jnp.asarray(x))[0, ..., 0], expected, atol=1e-4)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"Mixed_7c.branch_pool.bn.bias": None}, "KeyError: 'Mixed_7c.branch_pool.bn.bias'"),
    (
      {"Mixed_6c.branch7x7_2.conv.weight": np.zeros((160, 160, 7, 1), np.float32)},
      r"\(160, 160, 7, 1\), the network's is \(160, 160, 1, 7\)",
    ),
    ({"Mixed_5b.branch1x1.bn.bias": np.zeros(65, np.float32)}, r"bn.bias has shape \(65,\)"),
    ({"fc.weight": np.zeros((1000, 2048), np.float32)}, "trained otherwise, such as torchvision's"),
    ({"AuxLogits.conv0.bn.bias": np.zeros(128, np.float32)}, "trained otherwise, such as torchvision's"),
  ],
)
def test_weights_of_another_network_are_refused(state, monkeypatch, change, message):
  monkeypatch.setattr(pth, "read", lambda path: {k: v for k, v in (state | change).items() if v is not None})
  needed = "w.pth does not hold .* of the FID, which is pt_inception-2015-12-05-6726825d.pth of pytorch-fid: .*"
  with pytest.raises(ValueError, match=needed + message):
    inception.load(pathlib.Path("w.pth"))


def test_other_files_and_data_are_refused(torch_names, tmp_path, untyped):
  path, images = tmp_path / "w.pth", {"x": np.zeros((4, 8, 8, 3), np.uint8)}
  test_features.save(path, {"features.0.0.weight": test_features.tensor(np.ones(3))})
  for kind, data, weights, message in (
    ("inception", images, path, "w.pth does not hold the Inception network .*KeyError: 'Conv2d_1a_3x3.conv.weight'"),
    ("inception", images, None, "features 'inception' need weights, the path of pytorch-fid's pt_inception-2015-12-05"),
    ("inception", {"x": np.zeros((4, 8, 8, 2))}, path, r"images \[h, w, 1 or 3\]; the data have shape \(8, 8, 2\)"),
    ("inception", {"x": np.zeros((4, 2))}, path, r"the data have shape \(2,\)"),
  ):
    with pytest.raises(ValueError, match=message):
      features.choose(kind, data, 256, 0, weights and str(weights))
  with pytest.raises(FileNotFoundError):
    features.choose("inception", images, 256, 0, str(tmp_path / "none.pth"))
  path.write_bytes(b"no weights")
  with pytest.raises(ValueError, match="w.pth is (not read|damaged)"):
    inception.load(path)
  with pytest.raises(ValueError, match=r"x must be images \[b, h, w, 1 or 3\], got shape \(1, 8, 8, 2\)"):
    inception.features({}, jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize(("name", "called"), [("inception", ["FID", "KID"]), ("other", ["FD-other", "KD-other"])])
def test_only_with_these_features_the_distances_are_fid_and_kid(name, called):
  side = report.Side(*np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32))
  assert list(report.measure("samples", side, side, name, 0).rows)[:2] == called
