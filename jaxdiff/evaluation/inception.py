"""Inception-v3 as the FID and the KID have it: the TensorFlow graph of 2015-12-05, from the file of pytorch-fid.

The weights are the user's: `FILE`, which the pytorch-fid project publishes, and without which no number here is an FID.
They have the names of torchvision's Inception3, whose own weights are others. The network differs from that one:

    average pools       over what lies inside the image, the padding not counted
    Mixed_7c            a maximum where its pool is an average elsewhere
    input               in [-1, 1], resized to 299 x 299: bilinear, pixel centres aligned, no antialiasing
    classes             1008, not needed here

It was verified against the same network in PyTorch on random weights (tests/test_parity_inception.py), not on the file.

References:
  Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision, Table 1 and Figures 5-7.
  Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (FID).
  Binkowski et al. 2018, Demystifying MMD GANs (KID).
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.evaluation import pth

SIDE = 299
FILE = "pt_inception-2015-12-05-6726825d.pth"

Weights = Mapping[str, Array | np.ndarray]
_Branches = Mapping[str, str]


def _a(pool: int) -> _Branches:
  return {
    "branch1x1": "64:1x1",
    "branch5x5": "48:1x1 64:5x5",
    "branch3x3dbl": "64:1x1 96:3x3 96:3x3",
    "branch_pool": f"average {pool}:1x1",
  }


def _c(width: int) -> _Branches:
  return {
    "branch1x1": "192:1x1",
    "branch7x7": f"{width}:1x1 {width}:1x7 192:7x1",
    "branch7x7dbl": f"{width}:1x1 {width}:7x1 {width}:1x7 {width}:7x1 192:1x7",
    "branch_pool": "average 192:1x1",
  }


def _e(pool: str) -> _Branches:
  return {
    "branch1x1": "320:1x1",
    "branch3x3": "384:1x1 384:1x3+384:3x1",
    "branch3x3dbl": "448:1x1 384:3x3 384:1x3+384:3x1",
    "branch_pool": f"{pool} 192:1x1",
  }


_B = {"branch3x3": "384:3x3/2", "branch3x3dbl": "64:1x1 96:3x3 96:3x3/2", "branch_pool": "max/2"}
_D = {"branch3x3": "192:1x1 320:3x3/2", "branch7x7x3": "192:1x1 192:1x7 192:7x1 192:3x3/2", "branch_pool": "max/2"}

# Blocks in their order, of parallel branches, each a chain. Convolutions are width:kernel, with the size of the image
# kept, or width:kernel/stride, without padding; those joined by + read the same input. Pools are over 3 x 3.
_BLOCKS: tuple[tuple[str, _Branches], ...] = (
  ("", {"Conv2d_1a_3x3": "32:3x3/2"}),
  ("", {"Conv2d_2a_3x3": "32:3x3/1"}),
  ("", {"Conv2d_2b_3x3": "64:3x3"}),
  ("", {"pool1": "max/2"}),
  ("", {"Conv2d_3b_1x1": "80:1x1"}),
  ("", {"Conv2d_4a_3x3": "192:3x3/1"}),
  ("", {"pool2": "max/2"}),
  ("Mixed_5b.", _a(32)),
  ("Mixed_5c.", _a(64)),
  ("Mixed_5d.", _a(64)),
  ("Mixed_6a.", _B),
  ("Mixed_6b.", _c(128)),
  ("Mixed_6c.", _c(160)),
  ("Mixed_6d.", _c(160)),
  ("Mixed_6e.", _c(192)),
  ("Mixed_7a.", _D),
  ("Mixed_7b.", _e("average")),
  ("Mixed_7c.", _e("max")),
)


def load(path: Path) -> dict[str, np.ndarray]:
  """The weights in pytorch-fid's file; its classifier, if there, is left out.

  Raises:
    ValueError: the file holds something else, such as torchvision's own weights.
    OSError: it cannot be read.
  """
  weights = {name: value for name, value in pth.read(path).items() if not name.endswith("num_batches_tracked")}
  classes, _ = weights.pop("fc.weight", None), weights.pop("fc.bias", None)
  try:
    if any(name.startswith("AuxLogits.") for name in weights) or (classes is not None and len(classes) != 1008):
      raise ValueError("these are weights of the same network trained otherwise, such as torchvision's")
    jax.eval_shape(features, weights, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} does not hold the Inception network of the FID, which is {FILE} of pytorch-fid: "
      f"{type(error).__name__}: {error}"
    ) from error
  return weights


def features(weights: Weights, x: Float[Array, "b h w c"]) -> Float[Array, "b 2048"]:
  """The mean over space of the last feature map ("pool3"): what the FID and the KID compare.

  Args:
    weights: from `load`.
    x: colour or grey images in [-1, 1] of any size; grey ones are taken as three equal colours.

  Returns:
    2048 features an image, in float32 on every device.

  Raises:
    ValueError: for images without one or three colours.
  """
  if x.ndim != 4 or x.shape[-1] not in (1, 3):
    raise ValueError(f"x must be images [b, h, w, 1 or 3], got shape {x.shape}: take other features for other data")
  x = _resize(x)
  x = jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
  for prefix, branches in _BLOCKS:
    outputs = [_branch(weights, prefix + name, chain, x) for name, chain in branches.items()]
    x = jnp.concatenate(outputs, axis=-1)
  return x.mean(axis=(1, 2))


def _resize(x: Array) -> Array:
  return jax.image.resize(x, (len(x), SIDE, SIDE, x.shape[-1]), "bilinear", antialias=False)


def _branch(weights: Weights, name: str, chain: str, x: Array) -> Array:
  """One branch; its convolutions are numbered from 1 if there are several, those side by side also lettered."""
  steps, number = chain.split(), 0
  several = chain.count(":") > 1
  for step in steps:
    if ":" not in step:
      x = _pool(step, x)
      continue
    number += 1
    parts = step.split("+")
    label = f"{name}_{number}" if several else name
    letters = ("",) if len(parts) == 1 else ("a", "b")
    outputs = [_convolve(weights, label + letter, part, x) for letter, part in zip(letters, parts, strict=True)]
    x = jnp.concatenate(outputs, axis=-1)
  return x


def _convolve(weights: Weights, name: str, spec: str, x: Array) -> Array:
  """Convolution, batch normalization by its running moments, the positive part."""
  width, size = spec.split(":")
  size, _, stride = size.partition("/")
  height_width = [int(number) for number in size.split("x")]
  kernel = _weight(weights, f"{name}.conv.weight", (int(width), x.shape[-1], *height_width))
  x = jax.lax.conv_general_dilated(
    x,
    kernel,
    (int(stride or 1),) * 2,
    "VALID" if stride else "SAME",
    dimension_numbers=("NHWC", "OIHW", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )
  scale, shift, mean, variance = (
    _weight(weights, f"{name}.bn.{part}", (int(width),))[None, None, None]
    for part in ("weight", "bias", "running_mean", "running_var")
  )
  return jax.nn.relu((x - mean) * (scale * jax.lax.rsqrt(variance + 1e-3)) + shift)


def _weight(weights: Weights, name: str, shape: tuple[int, ...]) -> Array:
  value = jnp.asarray(weights[name])
  if value.shape != shape:
    raise ValueError(f"{name} has shape {value.shape}, the network's is {shape}")
  return value


def _pool(kind: str, x: Array) -> Array:
  """Over 3 x 3: the maximum, the maximum at every second place without padding, the mean of what is no padding."""
  slide = lambda x, start, join, stride, padding: jax.lax.reduce_window(
    x, start, join, (1, 3, 3, 1), (1, stride, stride, 1), padding
  )
  if kind == "average":
    total = lambda x: slide(x, 0.0, jax.lax.add, 1, "SAME")
    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
  return slide(x, -jnp.inf, jax.lax.max, *((2, "VALID") if kind == "max/2" else (1, "SAME")))
