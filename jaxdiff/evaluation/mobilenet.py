"""MobileNetV2 with the ImageNet weights of a torchvision file: features and classes of colour photographs.

References:
  Sandler et al. 2018, MobileNetV2: Inverted Residuals and Linear Bottlenecks, Table 2.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.evaluation import pth

SIDE = 224
FEATURES = 1280
_BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Weights = Mapping[str, Array | np.ndarray]


def load(path: Path) -> dict[str, np.ndarray]:
  """The weights in torchvision's file, such as mobilenet_v2-b0353104.pth.

  Raises:
    ValueError: the file holds something else.
    OSError: it cannot be read.
  """
  weights = {name: value for name, value in pth.read(path).items() if not name.endswith("num_batches_tracked")}
  try:
    jax.eval_shape(logits, weights, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} does not hold torchvision's MobileNetV2: {type(error).__name__}: {error}") from error
  return weights


def _convolve(weights: Weights, conv: str, norm: str, x: Array, stride: int = 1) -> Array:
  """Convolution, then batch normalization by its running moments."""
  kernel = jnp.asarray(weights[f"{conv}.weight"])
  groups, pad = x.shape[-1] // kernel.shape[1], kernel.shape[-1] // 2
  x = jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(pad, pad), (pad, pad)],
    dimension_numbers=("NHWC", "OIHW", "NHWC"),
    feature_group_count=groups,
  )
  scale, shift, mean, variance = (
    jnp.asarray(weights[f"{norm}.{part}"])[None, None, None]
    for part in ("weight", "bias", "running_mean", "running_var")
  )
  return (x - mean) * (scale * jax.lax.rsqrt(variance + 1e-5)) + shift


def _residuals() -> Iterator[tuple[int, int, int]]:
  """(number, expansion, stride) of every inverted residual block."""
  number = 0
  for expansion, _, repeats, stride in _BLOCKS:
    for repeat in range(repeats):
      number += 1
      yield number, expansion, stride if repeat == 0 else 1


def features(weights: Weights, x: Float[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
  """The mean over space of the last feature map.

  Args:
    weights: from `load`.
    x: colour images in [-1, 1], resized to 224 x 224.

  Returns:
    1280 features an image.

  Raises:
    ValueError: for images without three colours.
  """
  if x.ndim != 4 or x.shape[-1] != 3:
    raise ValueError(f"x must be colour images [b, h, w, 3], got shape {x.shape}: take other features for other data")
  x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "bilinear")
  x = (0.5 * (x + 1) - jnp.asarray(_MEAN)[None, None, None]) / jnp.asarray(_STD)[None, None, None]
  x = jax.nn.relu6(_convolve(weights, "features.0.0", "features.0.1", x, stride=2))
  for number, expansion, stride in _residuals():
    name, h, first = f"features.{number}.conv", x, 0
    if expansion != 1:
      h = jax.nn.relu6(_convolve(weights, f"{name}.0.0", f"{name}.0.1", h))
      first = 1
    h = jax.nn.relu6(_convolve(weights, f"{name}.{first}.0", f"{name}.{first}.1", h, stride))
    h = _convolve(weights, f"{name}.{first + 1}", f"{name}.{first + 2}", h)
    x = x + h if stride == 1 and h.shape == x.shape else h
  return jax.nn.relu6(_convolve(weights, "features.18.0", "features.18.1", x)).mean(axis=(1, 2))


def logits(weights: Weights, x: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
  """Unnormalized log-probabilities of the classes of ImageNet."""
  kernel, bias = (jnp.asarray(weights[f"classifier.1.{part}"]) for part in ("weight", "bias"))
  return features(weights, x) @ kernel.T + bias[None]
