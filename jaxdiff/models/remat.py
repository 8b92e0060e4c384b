"""What a backward pass computes again, to save memory: the policies of the field `remat` of networks.

"none": nothing; "full": all within a part of the network, of which only the inputs are kept; "dots": norms,
activations and attention weights, while the results of convolutions and of products with weights are kept.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

from jaxdiff.models import convolution

Remat = Literal["none", "dots", "full"]
CHOICES = ("none", "dots", "full")


def rematerialized(apply: Callable[..., Any], remat: Remat, within_scan: bool = False) -> Callable[..., Any]:
  """`apply(module, *arrays)`, a part of a network, with the same outputs and gradients.

  Args:
    apply: what the module computes of the arrays.
    remat: what is computed again.
    within_scan: whether the part is the body of a `nn.scan`, in which XLA cannot undo it.
  """
  if remat == "none":
    return apply
  policy = _keep_products if remat == "dots" else jax.checkpoint_policies.nothing_saveable
  return nn.remat(apply, policy=policy, prevent_cse=not within_scan)


def _keep_products(primitive: Any, *args: Any, **params: Any) -> Any:
  """Keeps convolutions and products with weights, not those of attention, whose size is quadratic in the positions."""
  products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  convolutions = jax.lax.conv_general_dilated_p, convolution.primitive
  return primitive in convolutions or products(primitive, *args, **params)
