"""The network of variational diffusion models: (x: [b, h, w, c], t: [b]) -> [b, h, w, c].

A U-Net that never halves the image but is deep: a precise likelihood is a matter of single pixels. Attention is only in
its middle. Fourier features of the input tell neighbouring levels of the data apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models import conditioning
from jaxdiff.models.attention import SelfAttention
from jaxdiff.models.blocks import ResidualBlock
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import ZERO, TimeEmbedding, check_choice, check_divisible, check_input, fourier_features
from jaxdiff.models.remat import CHOICES as REMAT_CHOICES
from jaxdiff.models.remat import Remat, rematerialized
from jaxdiff.models.resampling import Padding


class VDMNet(nn.Module):
  """U-Net at full resolution; zero at initialization.

  `depth` residual blocks, two more around self-attention, and `depth` + 1 that also read the results of the first ones
  and of the first convolution, from the last to the first. Each of the two rows is one `lax.scan`, so that compile time
  does not grow with the depth; its parameters have a leading axis.

  Attributes:
    depth: residual blocks of the first row.
    channels: feature channels.
    groups: groups of the group norms; must divide `channels`.
    dropout: probability of dropping an activation in the residual blocks, only with train=True.
    fourier_levels: levels of the data for `fourier_features` of the input, which must not be rescaled (as the EDM
      prediction does); 0 for none.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    padding: what lies beyond the border: zeros ("SAME") or the other side ("CIRCULAR"), with which translations of the
      input are translations of the output.
    conditions: what the network is told beside x and t; modules by name, of vectors and channels: see `conditioning`.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    remat: what the backward pass computes again of every residual block: see `remat`.

  Example:
    >>> import jax
    >>> net, x, t = VDMNet(depth=1, channels=8, groups=4), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> jax.eval_shape(net.apply, params, x, t).shape
    (2, 8, 8, 1)

  References:
    Kingma et al. 2021, Variational Diffusion Models, Appendices B and C: depth 32 and 128 channels for CIFAR-10, 256
    with augmentation and for ImageNet at 32x32, depth 64 and 256 channels for ImageNet at 64x64. Its output is added
    to x there, so that it starts as the noise of pure noise; here it starts at zero, as all networks.
  """

  depth: int = 32
  channels: int = 128
  groups: int = 32
  dropout: float = 0.0
  fourier_levels: int = 256
  max_frequency: float = 1000.0
  padding: Padding = "SAME"
  conditions: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: Remat = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False, **cond: Array
  ) -> Float[Array, "b h w c"]:
    """Applies the network.

    Args:
      x: images as they are, so that `fourier_features` see the levels of the data.
      t: times.
      train: whether to drop activations; needs `rngs={"dropout": key}` if `dropout` is positive.
      **cond: an array for each of `conditions`.

    Returns:
      An array like `x`, in its dtype.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], `depth` below 1, `channels` not divisible by `groups`, or
        `conditions` give tokens or differ from `cond`.
      TypeError: if x is not of floats.
    """
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    check_divisible("channels", self.channels, "groups", self.groups)
    check_choice("remat", self.remat, REMAT_CHOICES)
    if self.depth < 1:
      raise ValueError(f"depth={self.depth}: pass 1 or more, such as 32")
    encoded = conditioning.encode(self.conditions, cond, x, 4 * self.channels)
    conditioning.refuse_tokens(encoded, "VDMNet")
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    embedding = TimeEmbedding(4 * self.channels, self.max_frequency, inputs=self.channels, **types)(t)
    if encoded.vector is not None:
      embedding = embedding + encoded.vector.astype(self.dtype)
    h = (fourier_features(x, self.fourier_levels) if self.fourier_levels else x).astype(self.dtype)
    if encoded.channels is not None:
      h = jnp.concatenate([h, encoded.channels.astype(self.dtype)], axis=-1)
    conv = lambda features, **fields: Conv(features, (3, 3), padding=self.padding, **types, **fields)
    block = functools.partial(
      ResidualBlock,
      self.channels,
      self.groups,
      self.dropout,
      modulation="add",
      all_biases=True,
      padding=self.padding,
      **types,
    )
    apply = lambda block, h: block(h, embedding, deterministic=not train)
    down = lambda block, h, _: 2 * (apply(block, h),)
    up = lambda block, h, skip: (apply(block, jnp.concatenate([h, skip], axis=-1)), None)
    h = first = conv(self.channels)(h)
    h, skips = self._row(down, self.depth)(block(name="down"), h, None)
    h = apply(block(name="middle_1"), h)
    h = apply(block(name="middle_2"), SelfAttention(1, self.groups, all_biases=True, **types)(h))
    h, _ = self._row(up, self.depth + 1)(block(name="up"), h, jnp.concatenate([first[None], skips])[::-1])
    h = nn.silu(nn.GroupNorm(self.groups, **types)(h))
    return conv(x.shape[-1], kernel_init=ZERO, name="output")(h).astype(x.dtype)

  def _row(self, body: Callable[..., Any], length: int) -> Callable[..., Any]:
    body = rematerialized(body, self.remat, within_scan=True)
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=length)
