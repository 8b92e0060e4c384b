"""Several groups of parameters in one pytree, and an optimizer for each."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def partitioned(optimizers: Mapping[str, optax.GradientTransformation], usual: str) -> optax.GradientTransformation:
  """An optimizer for every group, by its name among the keys of the pytree; of groups within groups the inner one's.

  What is in none belongs to the usual one.

  Gradients are clipped, where they are, within their group.
  """

  def label(path: Any, _: Any) -> str:
    names = [str(getattr(step, "key", "")) for step in path]
    return next((name for name in reversed(names) if name in optimizers), usual)

  return optax.partition(dict(optimizers), lambda params: jax.tree_util.tree_map_with_path(label, params))
