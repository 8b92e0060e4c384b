"""Resampling against direct sums in numpy, adjoint pairs, constants."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

from jaxdiff.models.resampling import (
  DownsampleConv,
  UpsampleConv,
  fir_downsample,
  fir_upsample,
  nearest,
  pool,
)

pytestmark = pytest.mark.usefixtures("x64")
FIR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
MODES = {"SAME": "constant", "CIRCULAR": "wrap"}
PADDINGS = pytest.mark.parametrize("padding", MODES)


def images(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def padded(x, before, after, padding):
  return np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode=MODES[padding])


def correlate(x, kernel, stride=1):
  """sum_ijc x[b, s p + i, s q + j, c] kernel[i, j, c, f], where the kernel lies within x; or one [k, k] for each c."""
  if kernel.ndim == 2:
    kernel = kernel[:, :, None, None] * np.eye(x.shape[-1])
  size = [(n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
  y = np.zeros((len(x), *size, kernel.shape[-1]))
  for p, q in itertools.product(*map(range, size)):
    patch = x[:, stride * p : stride * p + len(kernel), stride * q : stride * q + len(kernel)]
    y[:, p, q] = np.einsum("bijc,ijcf->bf", patch, kernel)
  return y


def stretched(x):
  """Zeros between the pixels: [b, 2 h, 2 w, c], the pixels at even places."""
  y = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
  y[:, ::2, ::2] = x
  return y


@PADDINGS
def test_the_filter_is_that_of_the_direct_sum(padding):
  x = images(0, 2, 4, 6, 3)
  found = compiled(lambda x: (fir_downsample(x, padding), fir_upsample(x, padding)), x)
  down = correlate(padded(x, 1, 1, padding), FIR, stride=2)
  up = correlate(padded(stretched(x), 2, 1, padding), 4 * FIR)
  for value, expected in zip(found, (down, up), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


def test_pooling_and_repetition_are_blocks_of_four():
  x = images(1, 2, 4, 6, 3)
  pooled, up = compiled(lambda x: (pool(x), nearest(x)), x)
  np.testing.assert_allclose(pooled, correlate(x, np.full((2, 2), 0.25), stride=2), rtol=1e-12)
  for i, j in itertools.product(range(2), range(2)):
    np.testing.assert_array_equal(up[:, i::2, j::2], x)


@PADDINGS
def test_down_is_the_adjoint_of_up_over_four(padding):
  """<up x, y> = 4 <x, down y>."""
  x, y = images(2, 2, 4, 6, 3), images(3, 2, 8, 12, 3)
  pairs = (fir_downsample, fir_upsample), (lambda y, _: pool(y), lambda x, _: nearest(x))
  found = compiled(lambda x, y: [(down(y, padding), up(x, padding)) for down, up in pairs], x, y)
  for down, up in found:
    np.testing.assert_allclose(np.vdot(up, y), 4 * np.vdot(x, down), rtol=1e-12)


@PADDINGS
def test_constants_stay_but_for_the_border(padding):
  x = np.full((1, 6, 8, 2), 1.7)
  down, up = compiled(lambda x: (fir_downsample(x, padding), fir_upsample(x, padding)), x)
  inner = {"SAME": slice(1, -1), "CIRCULAR": slice(None)}[padding]
  for y in (down, up):
    np.testing.assert_allclose(y[:, inner, inner], 1.7, rtol=1e-14)
  assert (np.abs(up - 1.7).max() > 0.1) == (padding == "SAME")


def filled(layer, x):
  """Random parameters: the layer as a function, its kernel and bias."""
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["Conv_0"]
  kernel, bias = images(4, *shapes["kernel"].shape), images(5, *shapes["bias"].shape)
  return compiled(layer.apply, {"params": {"Conv_0": {"kernel": kernel, "bias": bias}}}, x), kernel, bias


@PADDINGS
@pytest.mark.parametrize("kind", ["conv", "conv_symmetric", "fir"])
def test_convolutions_that_halve(kind, padding):
  x = images(6, 2, 4, 6, 3)
  layer = DownsampleConv(5, kind, padding, jnp.float64, jnp.float64)
  y, kernel, bias = filled(layer, x)
  before, after = {"conv": (0, 1), "conv_symmetric": (1, 1), "fir": (2, 2)}[kind]
  x = padded(x, before, after, padding)
  expected = correlate(correlate(x, FIR) if kind == "fir" else x, kernel, stride=2) + bias
  assert y.shape == (2, 2, 3, 5)
  np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@PADDINGS
@pytest.mark.parametrize("fir", [False, True])
def test_convolutions_that_double(fir, padding):
  """With the filter in the order of StyleGAN2: first the transposed convolution of stride 2, then the filter."""
  x = images(7, 2, 4, 6, 3)
  y, kernel, bias = filled(UpsampleConv(5, fir, padding, jnp.float64, jnp.float64), x)
  if fir:
    x = padded(stretched(x), 3, 2 + (padding == "CIRCULAR"), padding)
    expected = correlate(correlate(x, kernel), 4 * FIR)[:, :8, :12] + bias
  else:
    expected = correlate(padded(x.repeat(2, 1).repeat(2, 2), 1, 1, padding), kernel) + bias
  assert y.shape == (2, 8, 12, 5)
  np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
