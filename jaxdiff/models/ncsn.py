"""Small network of dilated convolutions after NCSN: (x: [b, h, w, c], t: [b]) -> [b, h, w, c].

NCSN (Song and Ermon, 2019) is a RefineNet whose convolutions are dilated where others halve the image. `RefineNet` is a
light one, for images of 8x8 to 28x28 pixels: at full resolution throughout, of one width, with one residual unit where
NCSN has three or more. The noise level enters through the embedding of t, from which every norm takes its factors;
NCSN has a table of them for its ten levels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.models import conditioning
from jaxdiff.models.convolution import Conv
from jaxdiff.models.layers import ZERO, TimeEmbedding, check_input
from jaxdiff.models.resampling import Padding


class ConditionalInstanceNorm(nn.Module):
  """Norm of every channel of every image, which keeps how the channels' means differ ("instance norm++").

      gamma_k (x_k - mu_k) / s_k + alpha_k (mu_k - m) / v + beta_k

  with mu_k and s_k the mean and deviation of channel k, m and v those of the mu_k, and 1 - gamma, 1 - alpha and beta
  linear in the embedding.

  Attributes:
    dtype: type of the computation; means and deviations are in float32 or wider.
    param_dtype: type of the parameters.

  References:
    Song and Ermon 2019, Generative Modeling by Estimating Gradients of the Data Distribution, Appendix A.1.
  """

  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"]) -> Float[Array, "b h w c"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mu = jnp.mean(wide, axis=(1, 2), keepdims=True)
    normalized = (wide - mu) * jax.lax.rsqrt(jnp.var(wide, axis=(1, 2), keepdims=True) + 1e-5)
    m, variance = jnp.mean(mu, axis=-1, keepdims=True), jnp.var(mu, axis=-1, keepdims=True)
    offset = (mu - m) * jax.lax.rsqrt(variance + 1e-5)
    factors = nn.Dense(3 * x.shape[-1], dtype=self.dtype, param_dtype=self.param_dtype)(nn.silu(embedding))
    gamma, alpha, beta = jnp.split(factors[:, None, None, :], 3, axis=-1)
    return (1 + gamma) * normalized.astype(self.dtype) + (1 + alpha) * offset.astype(self.dtype) + beta


class RefineNet(nn.Module):
  """Dilated residual network whose stages are refined from the last to the first; zero at initialization.

  Each stage has residual blocks of one dilation. On the way back the result of a stage is fused with what was refined
  so far, pooled in a chain over 5x5 and then 9x9 pixels, and passed through one more residual block.

  Attributes:
    channels: feature channels; the embedding has twice as many.
    dilations: of the stages, in pixels.
    blocks: residual blocks of a stage.
    max_frequency: largest angular frequency of the time embedding, radians per unit of t: see `sinusoidal_embedding`.
    padding: what is beyond the border: zeros ("SAME") or the other side ("CIRCULAR"), with which translations of the
      input are translations of the output.
    conditions: what the network is told beside x and t; modules by name, of vectors and channels: see `conditioning`.
    dtype: type of the computation.
    param_dtype: type of the parameters.

  Example:
    >>> net, x, t = RefineNet(channels=4, dilations=(2,), blocks=1), jnp.ones((2, 8, 8, 1)), jnp.array([0.1, 0.9])
    >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    >>> jax.eval_shape(net.apply, params, x, t).shape
    (2, 8, 8, 1)

  References:
    Song and Ermon 2019, Generative Modeling by Estimating Gradients of the Data Distribution, Appendix A.
    Lin et al. 2017, RefineNet; Nekrasov et al. 2018, Light-Weight RefineNet for Real-Time Semantic Segmentation.
  """

  channels: int = 32
  dilations: Sequence[int] = (1, 2, 4)
  blocks: int = 2
  max_frequency: float = 1000.0
  padding: Padding = "SAME"
  conditions: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], t: Float[Array, " b"], *, train: bool = False, **cond: Array
  ) -> Float[Array, "b h w c"]:
    """Applies the network.

    Args:
      x: images, or whatever the preconditioning makes of them.
      t: times.
      train: has no effect.
      **cond: an array for each of `conditions`.

    Returns:
      An array like `x`, in its dtype.

    Raises:
      ValueError: if x is not [b, h, w, c], t not [b], `dilations` has none or one below 1, `padding` is neither of the
        two, or `conditions` give tokens or differ from `cond`.
      TypeError: if x is not of floats.
    """
    self._check(x, t)
    encoded = conditioning.encode(self.conditions, cond, x, 2 * self.channels)
    conditioning.refuse_tokens(encoded, "RefineNet")
    types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    embedding = TimeEmbedding(2 * self.channels, self.max_frequency, **types)(t)
    if encoded.vector is not None:
      embedding = embedding + encoded.vector.astype(self.dtype)
    h = x.astype(self.dtype)
    if encoded.channels is not None:
      h = jnp.concatenate([h, encoded.channels.astype(self.dtype)], axis=-1)
    h = self._conv(h, use_bias=True)
    stages = []
    for dilation in self.dilations:
      for _ in range(self.blocks):
        h = self._residual(h, embedding, dilation)
      stages.append(h)
    h = self._residual(self._pool(stages.pop(), embedding), embedding)
    for stage in reversed(stages):
      h = self._conv(self._norm(stage, embedding)) + self._conv(self._norm(h, embedding))
      h = self._residual(self._pool(h, embedding), embedding)
    h = nn.elu(self._norm(h, embedding))
    return self._conv(h, features=x.shape[-1], use_bias=True, kernel_init=ZERO, name="output").astype(x.dtype)

  def _check(self, x: Array, t: Array) -> None:
    check_input(x, t, rank=4, layout="images [b, h, w, c]")
    if not self.dilations or min(self.dilations) < 1:
      raise ValueError(f"dilations={tuple(self.dilations)}: pass at least one, each of 1 or more, such as (1, 2, 4)")
    if self.padding not in ("SAME", "CIRCULAR"):
      raise ValueError(f"padding={self.padding!r}: must be 'SAME' or 'CIRCULAR'")

  def _norm(self, h: Array, embedding: Array) -> Array:
    return ConditionalInstanceNorm(self.dtype, self.param_dtype)(h, embedding)

  def _conv(self, h: Array, dilation: int = 1, features: int | None = None, **options: Any) -> Array:
    return Conv(
      features or self.channels,
      (3, 3),
      kernel_dilation=dilation,
      padding=self.padding,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      **{"use_bias": False, **options},
    )(h)

  def _residual(self, h: Array, embedding: Array, dilation: int = 1) -> Array:
    y = self._conv(nn.elu(self._norm(h, embedding)), dilation)
    return h + self._conv(nn.elu(self._norm(y, embedding)), dilation, kernel_init=ZERO)

  def _pool(self, h: Array, embedding: Array) -> Array:
    """Chained residual pooling."""
    h = path = nn.elu(h)
    for _ in range(2):
      path = self._norm(path, embedding)
      if self.padding == "CIRCULAR":
        path = jnp.pad(path, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="wrap")
      borders = "VALID" if self.padding == "CIRCULAR" else "SAME"
      path = self._conv(nn.pool(path, 0.0, jax.lax.add, (5, 5), (1, 1), borders) / 25)
      h = h + path
    return h
