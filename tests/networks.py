"""Networks in tests, without the compilation of their initialization, which is most of their time.

Parameters are drawn by NumPy for the shapes of the abstract `init`; one program has the output and both gradients.
"""

import math

import jax
import numpy as np


def filled(shapes, seed=0):
  """Random parameters, so that no zero initialization hides a path; kernels of the variance 1 / inputs."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    size = math.prod(leaf.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.3
    return np.asarray(size * random.normal(size=leaf.shape) + (path[-1].key == "scale"), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def moved(net, x, t, seed=0, **cond):
  """The parameters of a network, all of them away from their initial values."""
  return filled(jax.eval_shape(net.init, jax.random.key(0), x, t, **cond), seed)


def at_first(net, params, names, *args, **cond):
  """`params` with the layers `names` as they are initialized: a program of nothing else."""
  init = lambda key: {name: net.init(key, *args, **cond)["params"][name] for name in names}
  return {"params": params["params"] | jax.jit(init)(jax.random.key(0))}


def program(net):
  """The jitted (params, x, t, cond, cotangent) -> output, and the gradients in params and in x."""

  def run(params, x, t, cond, cotangent):
    y, pullback = jax.vjp(lambda params, x: net.apply(params, x, t, **cond), params, x)
    return y, *pullback(cotangent)

  return jax.jit(run)


def silent(gradients):
  """The names of the parameters that no gradient reaches."""
  named = jax.tree_util.tree_leaves_with_path(jax.device_get(gradients))
  return [jax.tree_util.keystr(path, simple=True) for path, leaf in named if not np.any(leaf != 0)]
