"""U-Nets of residual blocks with attention: (x: [b, h, w, c], t: [b], **cond) -> [b, h, w, parts c].

The layout is that of DDPM (Ho et al., 2020): at each level `blocks` residual blocks on the way down and one more on the
way up, which also read the skip connections; between levels height and width halve and double. The fields spell its
successors, too: DDPM++ and NCSN++ (Song et al. 2021, Score-Based Generative Modeling through SDEs, Appendix H) and ADM
(Dhariwal and Nichol 2021, Diffusion Models Beat GANs); `presets` has them.

Parameters, in the order of the computation. Blocks and attentions are numbered from 0 through the whole network, those
of the way down first, then those of the middle, then those of the way up from the lowest resolution to the full.

| name | what | where |
|---|---|---|
| TimeEmbedding_0 | see `layers` | |
| conditions_NAME | the condition module, see `conditioning` | `conditions` |
| Conv_0 | first convolution, kernel [3, 3, inputs, channels], bias | |
| ResidualBlock_k | `blocks`: blocks L on the way down, of L levels, 2 in the middle, L (blocks + 1) on the way up | |
| SelfAttention_k | see `attention`: after every block of `attention_levels`, between the two of the middle | |
| CrossAttention_k | see `attention`: after SelfAttention_k | conditions with tokens |
| down_LEVEL, up_LEVEL | from LEVEL to the next lower or higher resolution: Conv_0, or the names of a residual block | \
`resampling` |
| pyramid_down_LEVEL | Conv_0 of "residual", kernel [1, 1, inputs, features] of "input_skip" | `progressive_input` |
| pyramid_norm_LEVEL, pyramid_output_LEVEL, pyramid_up_LEVEL | norm, convolution; Conv_0 | `progressive_output` |
| GroupNorm_0, output | last norm and convolution, kernel [3, 3, channels, parts c], bias | not "output_skip" |
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jaxdiff.models import conditioning
from jaxdiff.models.attention import CrossAttention, Implementation, SelfAttention
from jaxdiff.models.blocks import ResidualBlock
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import (
  ZERO,
  TimeEmbedding,
  check_choice,
  check_divisible,
  check_input,
  fourier_features,
  rescaled,
)
from jaxdiff.models.remat import CHOICES as REMAT_CHOICES
from jaxdiff.models.remat import Remat, rematerialized
from jaxdiff.models.resampling import DownsampleConv, Padding, UpsampleConv, downsample, upsample

_CHOICES = {
  "time_embedding": ("sinusoidal", "fourier"),
  "modulation": ("add", "scale_shift"),
  "up_attention": ("block", "level"),
  "resampling": ("pool", "conv", "conv_symmetric", "fir"),
  "progressive_input": ("none", "input_skip", "residual"),
  "progressive_output": ("none", "output_skip", "residual"),
  "padding": ("SAME", "CIRCULAR"),
  "attention_implementation": ("xla", "cudnn"),
  "remat": REMAT_CHOICES,
}


class UNet(nn.Module):
  """U-Net for images; zero at initialization.

  Attributes:
    channels: feature channels at full resolution; the embedding of the time and the conditions has 4 times as many.
    channel_multipliers: one per level, from full resolution down; level k has channels * channel_multipliers[k]
      channels on a grid of h / 2^k by w / 2^k.
    blocks: residual blocks per level on the way down (one more on the way up).
    attention_levels: levels whose residual blocks are followed by self-attention (0 is full resolution).
    heads: attention heads; must divide the channels of the levels with attention.
    groups: groups of the group norms; must divide the channels of every level.
    dropout: probability of dropping an activation in the residual blocks, only with train=True.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    fourier_levels: levels of the data for `fourier_features` of the input, which must not be rescaled (as the EDM
      prediction does); 0 for none.
    parts: how many times the channels of x the output has: 2 for `losses.ddpm_hybrid` and learned variances.
    dtype: type of the computation.
    remat: what the backward pass computes again, to save memory: "none"; "full", all within every residual block and
      attention, of which only the inputs are kept; "dots", norms, activations and attention weights, while the results
      of convolutions and of products with weights are kept. Parameters, outputs and gradients are the same.
    param_dtype: type of the parameters.
    conditions: modules by the names of the keyword arguments that they encode: see `conditioning`. Vectors are added
      to the embedding of the time, channels stand beside those of x, tokens are read by a cross-attention after every
      self-attention.
    min_frequency: smallest angular frequency of the time embedding. That of DDPM is `max_frequency` / 10^4; that of ADM
      `max_frequency` / 10^(4 - 4/n) for its n frequencies.
    time_features: how many cosines and sines embed the time; 0 for as many as `channels`, 4 at least.
    time_embedding: "sinusoidal", or "fourier" for random frequencies, which are not trained (NCSN++): `TimeEmbedding`.
    fourier_scale: standard deviation of the random frequencies, cycles per unit of t.
    modulation: how the embedding acts in a residual block: "add", before the second norm (DDPM), or "scale_shift",
      after it (ADM).
    all_biases: whether the network has all biases and scales that published networks have: also those of first
      convolutions, of scaled and shifted norms, and of queries, keys and values, for which others can mostly stand.
    norm_epsilon: added to the variance in the norms (1e-6 in DDPM and NCSN++, 1e-5 in ADM).
    head_channels: channels of a head, which then has as many heads as `heads` would say; 0 to go by `heads`.
    middle_attention: whether the middle, at the lowest resolution, has a self-attention.
    up_attention: on the way up, self-attention after every "block" of a level (DDPM, ADM) or once a "level" (NCSN++).
    attention_implementation: "xla", or "cudnn" for the fused kernel, for bfloat16 on GPUs: see `attention`.
    resampling: "pool", "conv" (DDPM), "conv_symmetric" or "fir" (NCSN++): see `resampling`.
    resample_in_blocks: whether a residual block of its own halves or doubles (BigGAN, NCSN++, ADM), by "pool" or "fir".
    project_resampled: whether the shortcut of such a block is projected (NCSN++), not only if the channels change.
    skip_rescale: whether sums with shortcuts are divided by sqrt 2 (NCSN++).
    progressive_input: whether the downsampled input is added to the features of every level, projected: from the input
      itself ("input_skip") or from the level above ("residual").
    progressive_output: whether levels contribute to the output: each an image, which are upsampled and summed
      ("output_skip"), or features, which are upsampled and added to those of the next ("residual").
    padding: what lies beyond the border: zeros ("SAME") or the other side ("CIRCULAR"), for periodic data, on which
      the network then commutes with shifts by 2^(levels - 1) pixels.

  Example:
    >>> import jax
    >>> net, x, t = UNet(channels=16), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> jax.eval_shape(net.apply, params, x, t).shape
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
  remat: Remat = "none"
  param_dtype: DTypeLike = jnp.float32
  conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  min_frequency: float = 0.1
  time_features: int = 0
  time_embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
  fourier_scale: float = 16.0
  modulation: Literal["add", "scale_shift"] = "scale_shift"
  all_biases: bool = False
  norm_epsilon: float = 1e-6
  head_channels: int = 0
  middle_attention: bool = True
  up_attention: Literal["block", "level"] = "block"
  attention_implementation: Implementation = "xla"
  resampling: Literal["pool", "conv", "conv_symmetric", "fir"] = "pool"
  resample_in_blocks: bool = False
  project_resampled: bool = False
  skip_rescale: bool = False
  progressive_input: Literal["none", "input_skip", "residual"] = "none"
  progressive_output: Literal["none", "output_skip", "residual"] = "none"
  padding: Padding = "SAME"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False, **cond: Shaped[Array, "b ..."]
  ) -> Float[Array, "b h w _"]:
    """Applies the network.

    Args:
      x: images, or whatever the preconditioning makes of them.
      t: times.
      train: whether to drop activations; needs `rngs={"dropout": key}` if `dropout` is positive.
      **cond: conditions by name, all that `conditions` has.

    Returns:
      An array like `x`, of `parts` times its channels, in its dtype.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], h or w not divisible by 2^(levels - 1), the channels of a level
        not divisible by `groups` or, with attention, by `heads` or `head_channels`, `attention_levels` names a level
        that does not exist, a field is none of its choices, or the conditions are not those of the network.
      TypeError: if x is not of floats, or a condition of another type.
    """
    self._check(x, t)
    encoded = conditioning.encode(self.conditions, cond, x, 4 * self.channels)
    inputs = fourier_features(x, self.fourier_levels) if self.fourier_levels else x
    if encoded.channels is not None:
      inputs = jnp.concatenate([inputs.astype(self.dtype), encoded.channels.astype(self.dtype)], axis=-1)
    embedding = TimeEmbedding(
      4 * self.channels,
      self.max_frequency,
      self.dtype,
      self.min_frequency,
      self.time_features,
      self.time_embedding,
      self.fourier_scale,
      self.param_dtype,
    )(t)
    if encoded.vector is not None:
      embedding = embedding + encoded.vector.astype(self.dtype)
    residual = functools.partial(self._residual, embedding=embedding, train=train)
    attend = functools.partial(self._attend, encoded=encoded)
    h, skips = self._down(inputs.astype(self.dtype), residual, attend)
    h = residual(h, len(self.channel_multipliers) - 1)
    if self.middle_attention:
      h = attend(h)
    h = residual(h, len(self.channel_multipliers) - 1)
    return self._up(h, skips, self.parts * x.shape[-1], residual, attend).astype(x.dtype)

  def _down(self, inputs: Array, residual: Callable, attend: Callable) -> tuple[Array, list[Array]]:
    h, pyramid = self._conv(self.channels)(inputs), inputs
    skips = [h]
    for level in range(len(self.channel_multipliers)):
      for _ in range(self.blocks):
        h = residual(h, level)
        if level in self.attention_levels:
          h = attend(h)
        skips.append(h)
      if level + 1 < len(self.channel_multipliers):
        h = self._resample(h, level, "down", residual)
        h, pyramid = self._join_input(h, pyramid, level)
        skips.append(h)
    return h, skips

  def _up(self, h: Array, skips: list[Array], outputs: int, residual: Callable, attend: Callable) -> Array:
    pyramid = None
    for level in reversed(range(len(self.channel_multipliers))):
      for block in range(self.blocks + 1):
        h = residual(jnp.concatenate([h, skips.pop()], axis=-1), level)
        if level in self.attention_levels and (self.up_attention == "block" or block == self.blocks):
          h = attend(h)
      h, pyramid = self._join_output(h, pyramid, level, outputs)
      if level:
        h = self._resample(h, level, "up", residual)
    if pyramid is not None and self.progressive_output == "output_skip":
      return pyramid
    return self._conv(outputs, kernel_init=ZERO, name="output")(nn.silu(self._norm()(h)))

  def _resample(self, h: Array, level: int, way: Literal["down", "up"], residual: Callable) -> Array:
    """From a level to the one below or above."""
    name, fir = f"{way}_{level}", self.resampling == "fir"
    if self.resample_in_blocks:
      return residual(h, level, resample=way, fir=fir, project_resampled=self.project_resampled, name=name)
    if self.resampling in ("pool", "fir"):
      return (downsample if way == "down" else upsample)(h, fir, self.padding)
    if way == "down":
      return self._down_conv(h.shape[-1], name, self.resampling)(h)
    return self._up_conv(h.shape[-1], name)(h)

  def _join_input(self, h: Array, pyramid: Array, level: int) -> tuple[Array, Array]:
    """What the input, downsampled by one level more, adds to the features, and that input."""
    name, fir = f"pyramid_down_{level}", self.resampling == "fir"
    if self.progressive_input == "input_skip":
      pyramid = downsample(pyramid, fir, self.padding)
      return h + self._conv(h.shape[-1], (1, 1), name=name)(pyramid), pyramid
    if self.progressive_input == "residual":
      h = rescaled(h + self._down_conv(h.shape[-1], name, "fir" if fir else "conv")(pyramid), self.skip_rescale)
      return h, h
    return h, pyramid

  def _join_output(self, h: Array, pyramid: Array | None, level: int, outputs: int) -> tuple[Array, Array | None]:
    """What the level adds to the output, and what the levels below add to its features."""
    fir, up = self.resampling == "fir", f"pyramid_up_{level}"
    if self.progressive_output == "none":
      return h, None
    if self.progressive_output == "residual" and pyramid is not None:
      h = rescaled(h + self._up_conv(h.shape[-1], up)(pyramid), self.skip_rescale)
      return h, h
    features = nn.silu(self._norm(name=f"pyramid_norm_{level}")(h))
    if self.progressive_output == "residual":
      return h, self._conv(h.shape[-1], name=f"pyramid_output_{level}")(features)
    image = self._conv(outputs, kernel_init=ZERO, name=f"pyramid_output_{level}")(features)
    return h, image if pyramid is None else upsample(pyramid, fir, self.padding) + image

  def _residual(self, h: Array, level: int, embedding: Array, train: bool, **fields: Any) -> Array:
    fields = {"dropout": self.dropout, "modulation": self.modulation, "padding": self.padding, **fields}
    features = self.channels * self.channel_multipliers[level]
    apply = lambda _, h, embedding: ResidualBlock(features, **self._shared(), **fields)(
      h, embedding, deterministic=not train
    )
    return rematerialized(apply, self.remat)(self, h, embedding)

  def _attend(self, h: Array, encoded: conditioning.Encoded) -> Array:
    fields = self._shared() | {
      "heads": self._heads(h.shape[-1]),
      "implementation": self.attention_implementation,
    }
    h = rematerialized(lambda _, h: SelfAttention(**fields)(h), self.remat)(self, h)
    if encoded.tokens is None:
      return h
    apply = lambda _, h, tokens, mask: CrossAttention(**fields)(h, tokens, mask)
    return rematerialized(apply, self.remat)(self, h, encoded.tokens.astype(self.dtype), encoded.mask)

  def _heads(self, features: int) -> int:
    return features // self.head_channels if self.head_channels else self.heads

  def _types(self) -> dict[str, Any]:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}

  def _shared(self) -> dict[str, Any]:
    """Fields of blocks and attentions alike."""
    names = ("groups", "norm_epsilon", "all_biases", "skip_rescale")
    return self._types() | {name: getattr(self, name) for name in names}

  def _norm(self, **fields: Any) -> nn.GroupNorm:
    return nn.GroupNorm(self.groups, epsilon=self.norm_epsilon, **self._types(), **fields)

  def _conv(self, features: int, size: tuple[int, int] = (3, 3), **fields: Any) -> nn.Conv:
    return Conv(features, size, padding=self.padding, **self._types(), **fields)

  def _down_conv(self, features: int, name: str, kind: Any) -> DownsampleConv:
    return DownsampleConv(features, kind, self.padding, **self._types(), name=name)

  def _up_conv(self, features: int, name: str) -> UpsampleConv:
    return UpsampleConv(features, self.resampling == "fir", self.padding, **self._types(), name=name)

  def _check(self, x: Array, t: Array) -> None:
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    for name, choices in _CHOICES.items():
      check_choice(name, getattr(self, name), choices)
    if self.resample_in_blocks and self.resampling not in ("pool", "fir"):
      raise ValueError(f"resampling={self.resampling!r} with resample_in_blocks=True: take 'pool' or 'fir'")
    levels = len(self.channel_multipliers)
    if not levels or self.channels < 1 or min(self.channel_multipliers) < 1:
      raise ValueError(
        f"channels={self.channels}, channel_multipliers={self.channel_multipliers}: pass whole numbers of at least 1, "
        "one multiplier a level, such as (1, 2)"
      )
    if wrong := [level for level in self.attention_levels if not 0 <= level < levels]:
      raise ValueError(f"attention_levels={self.attention_levels}: there is no level {wrong[0]}, take 0..{levels - 1}")
    factor = 2 ** (levels - 1)
    check_divisible("height of x", x.shape[1], "2^(levels - 1)", factor)
    check_divisible("width of x", x.shape[2], "2^(levels - 1)", factor)
    for level, multiplier in enumerate(self.channel_multipliers):
      features = self.channels * multiplier
      check_divisible(f"channels at level {level}", features, "groups", self.groups)
      if level in self.attention_levels or (self.middle_attention and level == levels - 1):
        divisor = "head_channels" if self.head_channels else "heads"
        check_divisible(f"channels at level {level}", features, divisor, getattr(self, divisor))
