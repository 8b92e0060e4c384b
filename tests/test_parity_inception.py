"""The Inception network against PyTorch's functions on the same random weights: whole, from a file it saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_state import picture, random_state
from test_inception import FROM_TORCH, means

from jaxdiff.evaluation import inception

torch = pytest.importorskip("torch", reason="parity of the Inception network needs torch")
F = torch.nn.functional


class Network:
  """As pytorch-fid describes it, step by step; x in [-1, 1], channels first."""

  def __init__(self, state):
    self.state, self.used = state, set()

  def weight(self, name):
    self.used.add(name)
    return self.state[name]

  def conv(self, name, x, stride=1, padding=0):
    x = F.conv2d(x, self.weight(f"{name}.conv.weight"), stride=stride, padding=padding)
    mean, var, weight, bias = (self.weight(f"{name}.bn.{p}") for p in ("running_mean", "running_var", "weight", "bias"))
    return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=0.001))

  def average(self, name, x):
    return self.conv(name, F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))

  def a(self, n, x):
    five = self.conv(f"{n}.branch5x5_2", self.conv(f"{n}.branch5x5_1", x), padding=2)
    three = self.conv(f"{n}.branch3x3dbl_2", self.conv(f"{n}.branch3x3dbl_1", x), padding=1)
    three = self.conv(f"{n}.branch3x3dbl_3", three, padding=1)
    return torch.cat([self.conv(f"{n}.branch1x1", x), five, three, self.average(f"{n}.branch_pool", x)], 1)

  def b(self, n, x):
    three = self.conv(f"{n}.branch3x3dbl_2", self.conv(f"{n}.branch3x3dbl_1", x), padding=1)
    three = self.conv(f"{n}.branch3x3dbl_3", three, stride=2)
    return torch.cat([self.conv(f"{n}.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, stride=2)], 1)

  def c(self, n, x):
    one = self.conv(f"{n}.branch7x7_2", self.conv(f"{n}.branch7x7_1", x), padding=(0, 3))
    one = self.conv(f"{n}.branch7x7_3", one, padding=(3, 0))
    two = self.conv(f"{n}.branch7x7dbl_2", self.conv(f"{n}.branch7x7dbl_1", x), padding=(3, 0))
    two = self.conv(f"{n}.branch7x7dbl_3", two, padding=(0, 3))
    two = self.conv(f"{n}.branch7x7dbl_4", two, padding=(3, 0))
    two = self.conv(f"{n}.branch7x7dbl_5", two, padding=(0, 3))
    return torch.cat([self.conv(f"{n}.branch1x1", x), one, two, self.average(f"{n}.branch_pool", x)], 1)

  def d(self, n, x):
    three = self.conv(f"{n}.branch3x3_2", self.conv(f"{n}.branch3x3_1", x), stride=2)
    seven = self.conv(f"{n}.branch7x7x3_2", self.conv(f"{n}.branch7x7x3_1", x), padding=(0, 3))
    seven = self.conv(f"{n}.branch7x7x3_3", seven, padding=(3, 0))
    seven = self.conv(f"{n}.branch7x7x3_4", seven, stride=2)
    return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)

  def e(self, n, x, pool):
    one = self.conv(f"{n}.branch3x3_1", x)
    two = self.conv(f"{n}.branch3x3dbl_2", self.conv(f"{n}.branch3x3dbl_1", x), padding=1)
    across = lambda name, y: self.conv(f"{n}.{name}", y, padding=(0, 1))
    down = lambda name, y: self.conv(f"{n}.{name}", y, padding=(1, 0))
    forks = [across("branch3x3_2a", one), down("branch3x3_2b", one)]
    forks += [across("branch3x3dbl_3a", two), down("branch3x3dbl_3b", two)]
    return torch.cat([self.conv(f"{n}.branch1x1", x), *forks, pool(f"{n}.branch_pool", x)], 1)

  def __call__(self, x):
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    x = self.conv("Conv2d_2a_3x3", self.conv("Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, padding=1), 3, stride=2)
    x = F.max_pool2d(self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x)), 3, stride=2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
      x = self.a(name, x)
    x = self.b("Mixed_6a", x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
      x = self.c(name, x)
    x = self.e("Mixed_7b", self.d("Mixed_7a", x), self.average)
    maximum = lambda name, x: self.conv(name, F.max_pool2d(x, 3, stride=1, padding=1))
    return F.adaptive_avg_pool2d(self.e("Mixed_7c", x, maximum), (1, 1))[:, :, 0, 0]


def difference(found, expected):
  return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


@pytest.fixture(scope="module")
def theirs():
  return {name: torch.from_numpy(value) for name, value in random_state().items()}


def run(network, x):
  with torch.no_grad():
    return network(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_whole_network_from_a_file_of_pytorch(theirs, tmp_path, legacy):
  """Colour images, enlarged or reduced by the resizing; every weight of the file is used, its classifier is not."""
  more = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
  more |= {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
  torch.save(theirs | more, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
  weights = inception.load(tmp_path / "w.pth")
  assert weights.keys() == theirs.keys()
  network, height = Network(theirs), 420 if legacy else 40
  x = np.random.default_rng(0).uniform(-1, 1, (1, height, 32, 3)).astype(np.float32)
  expected = run(network, x)
  assert network.used == theirs.keys()
  assert np.std(expected) > 0.1 * np.max(np.abs(expected))
  assert difference(jax.jit(inception.features)(weights, jnp.asarray(x)), expected) < 1e-5  # 3e-7 measured


def test_the_numbers_of_the_other_test_are_those_of_pytorch(theirs):
  """Integers enter as pytorch-fid has them, 2 k / 255 - 1."""
  x = np.repeat(picture() / np.float32(127.5) - 1, 3, axis=-1).astype(np.float32)
  expected = run(Network(theirs), x)
  np.testing.assert_allclose(means(expected), FROM_TORCH, rtol=1e-4)


@pytest.mark.parametrize("size", [(5, 7), (299, 300), (400, 613)])
def test_resizing(size):
  x = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
  expected = F.interpolate(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), size=(299, 299), mode="bilinear")
  np.testing.assert_allclose(inception._resize(jnp.asarray(x)), np.moveaxis(expected.numpy(), 1, -1), atol=2e-5)
