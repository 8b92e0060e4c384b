"""Diffusion transformer: (x: [b, h, w, c], t: [b]) -> [b, h, w, c].

The image is cut into patches, each of which a linear map turns into a vector; to it is added where the patch lies, by
sines and cosines that are not trained. Blocks of attention and of a perceptron follow, with adaLN-Zero: of the
embedding e of the time and the conditions a linear map makes shifts, scales and gates,

    (b1, s1, g1, b2, s2, g2) = W silu(e)
    h <- h + g1 attention(norm(h) (1 + s1) + b1)
    h <- h + cross-attention(norm(h), tokens)                     where there are tokens
    h <- h + g2 perceptron(norm(h) (1 + s2) + b2)

where W = 0 at first, so that all blocks are the identity, and the network is 0.

The published networks (Table 4 of the paper; latents of 32 x 32 x 4, 1000 classes and none, learned variances):

| | layers | width | heads | patch 2 | patch 4 | patch 8 |
|---|---|---|---|---|---|---|
| `dit_s` | 12 | 384 | 6 | 32,865,056 (33 M) | 32,920,448 (33 M) | 33,142,016 (33 M) |
| `dit_b` | 12 | 768 | 12 | 130,315,808 (130 M) | 130,426,496 (130 M) | 130,869,248 (131 M) |
| `dit_l` | 24 | 1024 | 16 | 457,840,672 (458 M) | 457,988,224 (458 M) | 458,578,432 (459 M) |
| `dit_xl` | 28 | 1152 | 16 | 674,834,720 (675 M) | 675,000,704 (675 M) | 675,664,640 (676 M) |

What the parameters are in `DiTTransformer2DModel` of diffusers (`weight` [out, in] there is `kernel` [in, out] here):

| here | there |
|---|---|
| `patches` | `pos_embed.proj`: [e, c, p, p] there is [p p c, e] here, the channel fastest |
| `time_1`, `time_2` | `transformer_blocks.*.norm1.emb.timestep_embedder.linear_1`, `linear_2` |
| `conditions_label` `table` | `transformer_blocks.*.norm1.emb.class_embedder.embedding_table` |
| `block_i` `modulation` | `transformer_blocks.i.norm1.linear`: the six parts in the same order |
| `block_i` `query_key_value` | `transformer_blocks.i.attn1.to_q`, `to_k`, `to_v`, one after the other |
| `block_i` `attention_output` | `transformer_blocks.i.attn1.to_out.0` |
| `block_i` `perceptron_1`, `perceptron_2` | `transformer_blocks.i.ff.net.0.proj`, `ff.net.2` |
| `modulation` | `proj_out_1` |
| `output` | `proj_out_2` |

Every block there has an embedding of time and class of its own; in what was published all are copies of the one that
was trained, and the last layer takes that of the first block. Where they differ the network is another. Time is there a
number of 0 .. 999: `max_frequency=1.0, min_frequency=1e-4` (the paper's code has 10000^(-k / 128): `min_frequency=
1.0746e-4`). The norm before the perceptron has an epsilon of 1e-5 there, of 1e-6 here, as all have in the paper's code.

References:
  Peebles and Xie 2023, Scalable Diffusion Models with Transformers, Section 3.2, Tables 1 and 4.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from jaxdiff.models import conditioning
from jaxdiff.models.attention import Implementation, attention
from jaxdiff.models.layers import ZERO, check_choice, check_divisible, check_input, sinusoidal_embedding
from jaxdiff.models.remat import CHOICES as REMAT_CHOICES
from jaxdiff.models.remat import Remat, rematerialized

_SINUSOIDS = 256
_XAVIER = nn.initializers.xavier_uniform()
_SMALL = nn.initializers.normal(0.02)


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n d"]:
  """The patches of p x p pixels, row after row; the numbers of each row by row, the channel fastest.

  Example:
    >>> patchify(jnp.zeros((1, 4, 6, 3)), 2).shape
    (1, 6, 12)
  """
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Float[Array, "b n d"], height: int, width: int, patch: int) -> Float[Array, "b h w c"]:
  """The image of this height and width that has these patches: the inverse of `patchify`."""
  b, _, d = patches.shape
  x = patches.reshape(b, height // patch, width // patch, patch, patch, d // patch**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, d // patch**2)


def position_embedding(rows: int, columns: int, features: int) -> Float[np.ndarray, "n features"]:
  """Sines and cosines of the column, then of the row, of each patch, row after row.

      [sin(w_k column), cos(w_k column), sin(w_k row), cos(w_k row)],   w_k = 10000^(-k / (features / 4))

  Example:
    >>> position_embedding(2, 3, 8).shape
    (6, 8)
  """
  row, column = np.indices((rows, columns)).reshape(2, -1, 1)
  frequencies = 10000.0 ** (-np.arange(features // 4) / (features // 4))
  waves = [wave(frequencies * place) for place in (column, row) for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=-1)


class Block(nn.Module):
  """Attention, cross-attention where there are tokens, and a perceptron; the identity at initialization.

  Attributes:
    heads: attention heads; must divide the width of the input.
    mlp_ratio: hidden width of the perceptron by that of the input.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    implementation: see `attention`.
  """

  heads: int
  mlp_ratio: float = 4.0
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  implementation: Implementation = "xla"

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "b n e"],
    embedding: Float[Array, "b e"],
    tokens: Float[Array, "b m e"] | None = None,
    mask: Bool[Array, "b m"] | None = None,
  ) -> Float[Array, "b n e"]:
    e = h.shape[-1]
    split = lambda y, parts: jnp.split(y, parts, axis=-1)
    heads = lambda y: y.reshape(*y.shape[:2], self.heads, e // self.heads)
    attend = lambda q, k, v, there=None: attention(q, k, v, there, self.implementation).reshape(h.shape)
    parts = split(self._dense("modulation", 6 * e, ZERO)(nn.silu(embedding)), 6)
    y = self._dense("query_key_value", 3 * e)(_modulated(h, *parts[:2]))
    y = attend(*map(heads, split(y, 3)))
    h = h + parts[2][:, None, :] * self._dense("attention_output", e)(y)
    if tokens is not None:
      query = heads(self._dense("cross_query", e)(_norm(h)))
      key, value = (heads(part) for part in split(self._dense("cross_key_value", 2 * e)(tokens), 2))
      h = h + self._dense("cross_output", e, ZERO)(attend(query, key, value, mask))
    y = self._dense("perceptron_1", round(self.mlp_ratio * e))(_modulated(h, *parts[3:5]))
    return h + parts[5][:, None, :] * self._dense("perceptron_2", e)(nn.gelu(y, approximate=True))

  def _dense(self, name: str, features: int, kernel_init: Callable[..., Array] = _XAVIER) -> nn.Dense:
    return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=kernel_init, name=name)


def _norm(h: Array) -> Array:
  return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=h.dtype)(h)


def _modulated(h: Array, shift: Array, scale: Array) -> Array:
  return _norm(h) * (1 + scale[:, None, :]) + shift[:, None, :]


class DiT(nn.Module):
  """Transformer of the patches of an image; zero at initialization.

  Attributes:
    patch: pixels along each side of a patch; must divide the height and the width of the images.
    width: of the vectors that stand for the patches; must be divisible by 4 and by `heads`.
    depth: number of blocks.
    heads: attention heads.
    mlp_ratio: hidden width of the perceptrons by `width`.
    parts: how many times the channels of x the output has: 2 for `losses.ddpm_hybrid` and learned variances.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    min_frequency: the smallest.
    conditions: what is told beside x and t, by name: see `conditioning`. Tokens are read by cross-attention in every
      block.
    dtype: type of the computation.
    param_dtype: type of the parameters.
    remat: what the backward pass computes again, to save memory: "none"; "full", all within every block, of which only
      the input is kept; "dots", norms, activations and attention weights, while the results of products with weights
      are kept. Parameters, outputs and gradients are the same.
    attention_implementation: "xla", or "cudnn" for the fused kernel, for bfloat16 on GPUs: see `attention`.
    scan: whether the blocks are one loop of the program, which compiles in the time of one block, with parameters
      `blocks` of a leading axis [depth], or, without, written out one after the other, with parameters `block_0`,
      `block_1` and so on. See `stacked`.

  Example:
    >>> net, x, t = DiT(width=16, depth=2, heads=2), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> jax.eval_shape(net.apply, params, x, t).shape
    (2, 8, 8, 1)
  """

  patch: int = 2
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0
  parts: int = 1
  max_frequency: float = 1000.0
  min_frequency: float = 0.1
  conditions: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: Remat = "none"
  attention_implementation: Implementation = "xla"
  scan: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False, **cond: Shaped[Array, "b ..."]
  ) -> Float[Array, "b h w _"]:
    """Applies the network.

    Args:
      x: images, or whatever the preconditioning makes of them.
      t: times.
      train: without effect: nothing is dropped.
      **cond: the arrays of `conditions`, by name.

    Returns:
      An array like `x`, of `parts` times its channels, in its dtype.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], h or w not divisible by `patch`, `width` not divisible by 4 or
        `heads`, `depth` not positive, a field none of its choices, or a condition missing, unknown or of another shape.
      TypeError: if x is not of floats, or a condition of another type.
    """
    self._check(x, t)
    (_, height, width, channels), dtype = x.shape, self.dtype
    told = conditioning.encode(self.conditions, cond, x, self.width)
    embedding = self._time(t)
    if told.vector is not None:
      embedding = embedding + told.vector.astype(dtype)
    seen = x.astype(dtype)
    if told.channels is not None:
      seen = jnp.concatenate([seen, told.channels.astype(dtype)], axis=-1)
    positions = position_embedding(height // self.patch, width // self.patch, self.width)
    h = self._dense("patches", self.width)(patchify(seen, self.patch)) + jnp.asarray(positions, dtype)[None]
    h = self._blocks(h, embedding, None if told.tokens is None else told.tokens.astype(dtype), told.mask)
    shift, scale = jnp.split(self._dense("modulation", 2 * self.width, ZERO)(nn.silu(embedding)), 2, axis=-1)
    h = self._dense("output", self.patch**2 * self.parts * channels, ZERO)(_modulated(h, shift, scale))
    return unpatchify(h, height, width, self.patch).astype(x.dtype)

  def _time(self, t: Array) -> Array:
    h = sinusoidal_embedding(t, _SINUSOIDS, self.max_frequency, self.min_frequency).astype(self.dtype)
    return self._dense("time_2", self.width, _SMALL)(nn.silu(self._dense("time_1", self.width, _SMALL)(h)))

  def _blocks(self, h: Array, *context: Array | None) -> Array:
    fields = self.heads, self.mlp_ratio, self.dtype, self.param_dtype, self.attention_implementation
    block = lambda name: Block(*fields, name=name)
    apply = rematerialized(lambda block, h, *context: block(h, *context), self.remat, within_scan=self.scan)
    if not self.scan:
      for i in range(self.depth):
        h = apply(block(f"block_{i}"), h, *context)
      return h
    step = lambda block, h, *context: (apply(block, h, *context), None)
    every = nn.scan(
      step, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth
    )
    return every(block("blocks"), h, *context)[0]

  def _dense(self, name: str, features: int, kernel_init: Callable[..., Array] = _XAVIER) -> nn.Dense:
    return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=kernel_init, name=name)

  def _check(self, x: Array, t: Array) -> None:
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    if self.patch < 1 or self.depth < 1:
      raise ValueError(f"patch={self.patch} and depth={self.depth} must be positive")
    check_choice("remat", self.remat, REMAT_CHOICES)
    check_choice("attention_implementation", self.attention_implementation, ("xla", "cudnn"))
    check_divisible("width", self.width, "the four waves of the positions", 4)
    check_divisible("width", self.width, "heads", self.heads)
    check_divisible("height of x", x.shape[1], "patch", self.patch)
    check_divisible("width of x", x.shape[2], "patch", self.patch)


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of a `DiT` without `scan` as those of the same network with it.

  Args:
    params: what `init` gave, {"params": {..}}.

  Returns:
    The same with `block_0`, `block_1`, .. laid on each other as `blocks`.
  """
  tree = dict(params["params"])
  blocks = [tree.pop(f"block_{i}") for i in range(sum(name.startswith("block_") for name in tree))]
  return {"params": tree | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def dit_s(patch: int = 2, classes: int = 1000) -> DiT:
  """DiT-S, told `label`; change what you like by `.clone(...)`."""
  return _published(patch, 384, 12, 6, classes)


def dit_b(patch: int = 2, classes: int = 1000) -> DiT:
  """DiT-B, as `dit_s`."""
  return _published(patch, 768, 12, 12, classes)


def dit_l(patch: int = 2, classes: int = 1000) -> DiT:
  """DiT-L, as `dit_s`."""
  return _published(patch, 1024, 24, 16, classes)


def dit_xl(patch: int = 2, classes: int = 1000) -> DiT:
  """DiT-XL, as `dit_s`."""
  return _published(patch, 1152, 28, 16, classes)


def _published(patch: int, width: int, depth: int, heads: int, classes: int) -> DiT:
  return DiT(patch, width, depth, heads, parts=2, conditions={"label": conditioning.Label(classes)})
