"""Random weights under the names and shapes of pytorch-fid's file, written out apart from the table of the network."""

import numpy as np

PARAMETERS = 21_785_568  # torchvision's 27,161,264, less 3,326,696 of AuxLogits and 2,049,000 of its classifier


def _mixed(name, width, kind, own):
  """(name, channels out, channels in, kernel) of a block; `own` is the number that blocks of its kind differ in."""
  layers = {
    "A": lambda: (
      ("branch1x1", 64, width, 1, 1),
      ("branch5x5_1", 48, width, 1, 1),
      ("branch5x5_2", 64, 48, 5, 5),
      ("branch3x3dbl_1", 64, width, 1, 1),
      ("branch3x3dbl_2", 96, 64, 3, 3),
      ("branch3x3dbl_3", 96, 96, 3, 3),
      ("branch_pool", own, width, 1, 1),
    ),
    "B": lambda: (
      ("branch3x3", 384, width, 3, 3),
      ("branch3x3dbl_1", 64, width, 1, 1),
      ("branch3x3dbl_2", 96, 64, 3, 3),
      ("branch3x3dbl_3", 96, 96, 3, 3),
    ),
    "C": lambda: (
      ("branch1x1", 192, width, 1, 1),
      ("branch7x7_1", own, width, 1, 1),
      ("branch7x7_2", own, own, 1, 7),
      ("branch7x7_3", 192, own, 7, 1),
      ("branch7x7dbl_1", own, width, 1, 1),
      ("branch7x7dbl_2", own, own, 7, 1),
      ("branch7x7dbl_3", own, own, 1, 7),
      ("branch7x7dbl_4", own, own, 7, 1),
      ("branch7x7dbl_5", 192, own, 1, 7),
      ("branch_pool", 192, width, 1, 1),
    ),
    "D": lambda: (
      ("branch3x3_1", 192, width, 1, 1),
      ("branch3x3_2", 320, 192, 3, 3),
      ("branch7x7x3_1", 192, width, 1, 1),
      ("branch7x7x3_2", 192, 192, 1, 7),
      ("branch7x7x3_3", 192, 192, 7, 1),
      ("branch7x7x3_4", 192, 192, 3, 3),
    ),
    "E": lambda: (
      ("branch1x1", 320, width, 1, 1),
      ("branch3x3_1", 384, width, 1, 1),
      ("branch3x3_2a", 384, 384, 1, 3),
      ("branch3x3_2b", 384, 384, 3, 1),
      ("branch3x3dbl_1", 448, width, 1, 1),
      ("branch3x3dbl_2", 384, 448, 3, 3),
      ("branch3x3dbl_3a", 384, 384, 1, 3),
      ("branch3x3dbl_3b", 384, 384, 3, 1),
      ("branch_pool", 192, width, 1, 1),
    ),
  }
  return [(f"{name}.{layer}", *shape) for layer, *shape in layers[kind]()]


LAYERS = (
  ("Conv2d_1a_3x3", 32, 3, 3, 3),
  ("Conv2d_2a_3x3", 32, 32, 3, 3),
  ("Conv2d_2b_3x3", 64, 32, 3, 3),
  ("Conv2d_3b_1x1", 80, 64, 1, 1),
  ("Conv2d_4a_3x3", 192, 80, 3, 3),
  *_mixed("Mixed_5b", 192, "A", 32),
  *_mixed("Mixed_5c", 256, "A", 64),
  *_mixed("Mixed_5d", 288, "A", 64),
  *_mixed("Mixed_6a", 288, "B", None),
  *_mixed("Mixed_6b", 768, "C", 128),
  *_mixed("Mixed_6c", 768, "C", 160),
  *_mixed("Mixed_6d", 768, "C", 160),
  *_mixed("Mixed_6e", 768, "C", 192),
  *_mixed("Mixed_7a", 768, "D", None),
  *_mixed("Mixed_7b", 1280, "E", None),
  *_mixed("Mixed_7c", 2048, "E", None),
)


def random_state():
  """Kernels that keep the scale of their input, and batch normalizations near the identity."""
  rng, state = np.random.default_rng(0), {}
  for name, size, *window in LAYERS:
    kernel = rng.standard_normal((size, *window), np.float32)
    state[f"{name}.conv.weight"] = kernel * np.float32((2 / np.prod(window)) ** 0.5)
    for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
      state[f"{name}.bn.{part}"] = np.float32(value) + 0.1 * rng.random(size, np.float32)
  return state


def picture():
  """A grey image of 256 levels, [1, 24, 20, 1]: smooth, with some noise."""
  i, j = np.mgrid[:24, :20]
  waves = 128 + 70 * np.sin(0.4 * i) + 50 * np.cos(0.7 * j + 0.1 * i)
  return np.clip(waves + np.random.default_rng(1).integers(-8, 9, waves.shape), 0, 255).astype(np.uint8)[
    None, ..., None
  ]
