"""Imported layers against the formulas of those that were published, in NumPy."""

import numpy as np

from jaxdiff.weights import names


def test_imported_layers_are_those_of_the_published_formulas():
  """Linear, convolving and merged layers, whose weights are [out, in], [out, in, h, w] there."""
  rng = np.random.default_rng(0)
  made = lambda layer, *tensors: layer["x/kernel"].make(*tensors)
  w, wide, patch = (rng.standard_normal(size) for size in ((5, 4), (5, 4, 3, 3), (4, 3, 3)))
  x = patch[:, 1, 1]
  np.testing.assert_allclose(x @ made(names.linear("p", "x"), w), w @ x)
  np.testing.assert_allclose(x @ made(names.pointwise("p", "x"), w[:, :, None, None]), w @ x)
  kernel = made(names.conv("p", "x"), wide)
  np.testing.assert_allclose(np.einsum("uvco,cuv->o", kernel, patch), np.einsum("ocuv,cuv->o", wide, patch))
  merged = made(names.together(("p", "q"), "x"), w, 2 * w)
  np.testing.assert_allclose(x @ merged, np.concatenate([w @ x, 2 * w @ x]))
