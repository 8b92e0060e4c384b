"""From published parameters to ours: which of theirs each of ours is made of, and that all fit.

A map has, for each of our parameters, by its path such as "Conv_0/kernel", the published tensors it is made of and how.
`assemble` applies it to what a file holds; what is missing, superfluous or of another shape is listed, all of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from jaxdiff.weights.files import Tensors, refuse_misfits


class Made(NamedTuple):
  """How one of our parameters is made.

  Attributes:
    names: of the published tensors.
    make: from these to ours.
  """

  names: tuple[str, ...]
  make: Callable[..., np.ndarray]


Map = dict[str, Made]


def same(name: str) -> Made:
  """The published tensor as it is."""
  return Made((name,), lambda value: value)


def linear(prefix: str, here: str) -> Map:
  """A linear layer of PyTorch, weight [out, in]."""
  return {f"{here}/kernel": Made((f"{prefix}.weight",), np.transpose), f"{here}/bias": same(f"{prefix}.bias")}


def conv(prefix: str, here: str) -> Map:
  """A convolution of PyTorch, weight [out, in, h, w]."""
  kernel = Made((f"{prefix}.weight",), lambda weight: weight.transpose(2, 3, 1, 0))
  return {f"{here}/kernel": kernel, f"{here}/bias": same(f"{prefix}.bias")}


def pointwise(prefix: str, here: str) -> Map:
  """A convolution of PyTorch of one pixel, weight [out, in, 1, 1] (or that of a linear layer), as a linear layer."""
  kernel = Made((f"{prefix}.weight",), lambda weight: weight.reshape(weight.shape[:2]).T)
  return {f"{here}/kernel": kernel, f"{here}/bias": same(f"{prefix}.bias")}


def norm(prefix: str, here: str) -> Map:
  """A norm of PyTorch."""
  return {f"{here}/scale": same(f"{prefix}.weight"), f"{here}/bias": same(f"{prefix}.bias")}


def together(prefixes: tuple[str, ...], here: str) -> Map:
  """Linear layers of PyTorch of one input, or convolutions of one pixel, whose outputs are laid beside each other."""
  flat = lambda weights: [weight.reshape(weight.shape[:2]).T for weight in weights]
  return {
    f"{here}/kernel": Made(tuple(f"{p}.weight" for p in prefixes), lambda *w: np.concatenate(flat(w), axis=1)),
    f"{here}/bias": Made(tuple(f"{p}.bias" for p in prefixes), lambda *biases: np.concatenate(biases)),
  }


def one_step_later(prefix: str, here: str, frequencies: np.ndarray, sines_first: bool) -> Map:
  """The linear layer after the sinusoids of the time, for sinusoids of a time that is one step later.

      cos(w n) = cos w cos w(n + 1) + sin w sin w(n + 1)
      sin(w n) = cos w sin w(n + 1) - sin w cos w(n + 1)

  Published networks count the steps of a chain 0 .. T - 1, where the last of them leaves the least noise; here they
  are 1 .. T and 0 is the data. So the same network is told the time (n + 1) / T.

  Args:
    prefix: of the published layer, a linear one of PyTorch.
    here: ours, which reads cosines, then sines.
    frequencies: w, radians per step, in the order of the features.
    sines_first: whether the published layer reads sines, then cosines.
  """

  kernel = lambda weight: turned(weight.T, frequencies, sines_first)
  return {f"{here}/kernel": Made((f"{prefix}.weight",), kernel), f"{here}/bias": same(f"{prefix}.bias")}


def turned(kernel: np.ndarray, angles: np.ndarray, sines_first: bool) -> np.ndarray:
  """The kernel after [cos p, sin p] of a layer whose kernel reads cosines and sines of p - a.

  Args:
    kernel: [features, outputs], of the published layer.
    angles: a, [features / 2].
    sines_first: whether its first half is for the sines.
  """
  first, second = np.split(kernel.astype(np.float64), 2)
  sines, cosines = (first, second) if sines_first else (second, first)
  c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
  return np.concatenate([c * cosines - s * sines, c * sines + s * cosines]).astype(kernel.dtype)


def assemble(made: Map, tensors: Tensors, shapes: Mapping[str, Any], what: str) -> dict[str, Any]:
  """Our parameters, `{"params": {...}}`, made of published tensors.

  Args:
    made: the map.
    tensors: what the file holds.
    shapes: what `jax.eval_shape` of the network's `init` gave.
    what: the file, for messages.

  Raises:
    WeightsError: names every tensor that is missing, is not used, or has another shape than the network needs.
  """
  due = flatten(shapes)
  used = {name for entry in made.values() for name in entry.names}
  wrong = [f"missing: {name}" for name in sorted(used - tensors.keys())]
  wrong += [f"not used: {name}, shape {list(tensors[name].shape)}" for name in sorted(tensors.keys() - used)]
  wrong += [f"the network has no parameter {path}" for path in sorted(made.keys() - due.keys())]
  wrong += [f"nothing makes the network's parameter {path}" for path in sorted(due.keys() - made.keys())]
  params = {}
  for path in sorted(made.keys() & due.keys()):
    names = made[path].names
    if any(name not in tensors for name in names):
      continue
    try:
      value, shape = made[path].make(*(tensors[name] for name in names)), None
      params[path], shape = np.ascontiguousarray(value, due[path].dtype), value.shape
    except (ValueError, IndexError):
      shape = None
    if shape != due[path].shape:
      there = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names)
      gives = "" if shape is None else f", which gives {list(shape)}"
      wrong.append(f"wrong shape: {there}{gives}; the network has {path} {list(due[path].shape)}")
  refuse_misfits(what, wrong)
  return {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of `{"params": {...}}` by their path, "Conv_0/kernel"."""
  return flax.traverse_util.flatten_dict(dict(params["params"]), sep="/")
