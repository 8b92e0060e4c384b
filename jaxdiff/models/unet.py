"""U-Net of residual blocks with self-attention: (x: [b, h, w, c], t: [b]) -> [b, h, w, c].

The layout is that of DDPM (Ho et al., 2020): at each level `blocks` residual blocks on the way down and one more on the
way up, which also read the skip connections; between levels height and width halve and double. As in ADM (Dhariwal and
Nichol, 2021), the time embedding scales and shifts the normalized features.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models.layers import (
  ZERO,
  ResidualBlock,
  SelfAttention,
  TimeEmbedding,
  check_divisible,
  check_input,
  downsample,
  fourier_features,
  upsample,
)


def _keep_products(primitive: Any, *args: Any, **params: Any) -> Any:
  """Keeps convolutions and products with weights, not those of attention, whose size is quadratic in the positions."""
  products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return primitive is jax.lax.conv_general_dilated_p or products(primitive, *args, **params)


_POLICIES: dict[str, Callable[..., Any]] = {
  "dots": _keep_products,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class UNet(nn.Module):
  """U-Net for images; zero at initialization.

  Attributes:
    channels: feature channels at full resolution.
    channel_multipliers: one per level, from full resolution down; level k has channels * channel_multipliers[k]
      channels on a grid of h / 2^k by w / 2^k.
    blocks: residual blocks per level on the way down (one more on the way up).
    attention_levels: levels whose residual blocks are followed by self-attention (0 is full resolution). The middle of
      the network, at the lowest resolution, always has one.
    heads: attention heads; must divide the channels of the levels with attention.
    groups: groups of the group norms; must divide the channels of every level.
    dropout: probability of dropping an activation in the residual blocks, only with train=True.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    fourier_levels: levels of the data for `fourier_features` of the input, which must not be rescaled (as the EDM
      prediction does); 0 for none.
    parts: how many times the channels of x the output has: 2 for `losses.ddpm_hybrid` and learned variances.
    dtype: type of the computation; parameters are float32.
    remat: what the backward pass computes again, to save memory: "none"; "full", all within every residual block and
      attention, of which only the inputs are kept; "dots", norms, activations and attention weights, while the results
      of convolutions and of products with weights are kept. Parameters, outputs and gradients are the same.

  Example:
    >>> net, x, t = UNet(channels=16), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.jit(net.init)(jax.random.key(0), x, t)
    >>> jax.jit(net.apply)(params, x, t).shape
    (2, 8, 8, 1)
  """

  channels: int = 32
  channel_multipliers: tuple[int, ...] = (1, 2)
  blocks: int = 2
  attention_levels: tuple[int, ...] = ()
  heads: int = 1
  groups: int = 8
  dropout: float = 0.0
  max_frequency: float = 1000.0
  fourier_levels: int = 0
  parts: int = 1
  dtype: DTypeLike = jnp.float32
  remat: Literal["none", "dots", "full"] = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False
  ) -> Float[Array, "b h w _"]:
    """Applies the network.

    Args:
      x: images, or whatever the preconditioning makes of them.
      t: times.
      train: whether to drop activations; needs `rngs={"dropout": key}` if `dropout` is positive.

    Returns:
      An array like `x`, of `parts` times its channels, in its dtype.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], h or w not divisible by 2^(levels - 1), the channels of a level
        not divisible by `groups` or, with attention, `heads`, `attention_levels` names a level that does not exist, or
        `remat` is none of the three.
      TypeError: if x is not of floats.
    """
    self._check(x, t)
    embedding = TimeEmbedding(4 * self.channels, self.max_frequency, dtype=self.dtype)(t)
    features = fourier_features(x, self.fourier_levels) if self.fourier_levels else x
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(features.astype(self.dtype))
    skips = [h]
    levels = range(len(self.channel_multipliers))
    for level in levels:
      for _ in range(self.blocks):
        h = self._block(h, embedding, level, train)
        skips.append(h)
      if level != levels[-1]:
        h = downsample(h)
        skips.append(h)
    h = self._residual(h, embedding, levels[-1], train)
    h = self._residual(self._attention(h), embedding, levels[-1], train)
    for level in reversed(levels):
      for _ in range(self.blocks + 1):
        h = self._block(jnp.concatenate([h, skips.pop()], axis=-1), embedding, level, train)
      if level != 0:
        h = upsample(h)
    h = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(h))
    return nn.Conv(self.parts * x.shape[-1], (3, 3), dtype=self.dtype, kernel_init=ZERO, name="output")(h).astype(
      x.dtype
    )

  def _check(self, x: Array, t: Array) -> None:
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    levels = len(self.channel_multipliers)
    if wrong := [level for level in self.attention_levels if not 0 <= level < levels]:
      raise ValueError(f"attention_levels={self.attention_levels}: there is no level {wrong[0]}, take 0..{levels - 1}")
    if self.remat not in ("none", *_POLICIES):
      raise ValueError(f"remat={self.remat!r}: must be 'none', 'dots' or 'full'")
    factor = 2 ** (levels - 1)
    check_divisible("height of x", x.shape[1], "2^(levels - 1)", factor)
    check_divisible("width of x", x.shape[2], "2^(levels - 1)", factor)
    for level, multiplier in enumerate(self.channel_multipliers):
      check_divisible(f"channels at level {level}", self.channels * multiplier, "groups", self.groups)
      if level in self.attention_levels or level == levels - 1:
        check_divisible(f"channels at level {level}", self.channels * multiplier, "heads", self.heads)

  def _residual(self, h: Array, embedding: Array, level: int, train: bool) -> Array:
    features = self.channels * self.channel_multipliers[level]
    apply = lambda _, h, embedding: ResidualBlock(features, self.groups, self.dropout, self.dtype)(
      h, embedding, deterministic=not train
    )
    return self._rematerialized(apply)(self, h, embedding)

  def _attention(self, h: Array) -> Array:
    return self._rematerialized(lambda _, h: SelfAttention(self.heads, self.groups, self.dtype)(h))(self, h)

  def _rematerialized(self, apply: Callable[..., Array]) -> Callable[..., Array]:
    return apply if self.remat == "none" else nn.remat(apply, policy=_POLICIES[self.remat])

  def _block(self, h: Array, embedding: Array, level: int, train: bool) -> Array:
    h = self._residual(h, embedding, level, train)
    return self._attention(h) if level in self.attention_levels else h
