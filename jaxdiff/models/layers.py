"""What the networks share: checks of their arguments, the embedding of the time, Fourier features of the input."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ZERO = nn.initializers.zeros_init()


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
  """Raises a ValueError that names both arguments if `divisor` does not divide `value`."""
  if value % divisor:
    nearest = max(divisor, round(value / divisor) * divisor)
    raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}: use {name}={nearest}, for example")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises a ValueError that lists the choices if `value` is none of them."""
  if value not in choices:
    *most, last = map(repr, choices)
    raise ValueError(f"{name}={value!r}: must be {', '.join(most)} or {last}")


def check_input(x: Array, t: Array, rank: int, layout: str) -> None:
  """Raises a TypeError if `x` is not of floats, a ValueError for a wrong shape of `x` or `t`."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"x has dtype {x.dtype}: pass floats; integers of images are dequantized or scaled first")
  if x.ndim != rank:
    raise ValueError(f"x has shape {x.shape}: pass {layout}, with a leading batch axis")
  if t.shape != x.shape[:1]:
    raise ValueError(f"t has shape {t.shape}: pass one time per example, shape {x.shape[:1]}")


def rescaled(x: Array, rescale: bool) -> Array:
  """A sum of two, over sqrt 2 if `rescale`: of the variance of its terms (Song et al. 2021, Appendix H)."""
  return x * math.sqrt(0.5) if rescale else x


def sinusoidal_embedding(
  t: Float[Array, " b"], features: int, max_frequency: float = 1000.0, min_frequency: float = 0.1
) -> Float[Array, "b {features}"]:
  """Cosines and sines of `t` at geometrically spaced angular frequencies.

  e(t) = [cos(w_k t), sin(w_k t)],  w_k = max_frequency (min_frequency / max_frequency)^(k / (features/2 - 1))

  Differences in time much below 1 / `max_frequency` are not resolved; above it the embedding is smooth in t up to
  1 / `min_frequency`. The defaults are those of DDPM for t in [0, 1] (its 1000 t with periods up to 10000). Choose
  `max_frequency` from the smallest time that matters: about 1e4 for a VP process conditioned on t down to 1e-5, about
  10 for log(sigma) / 4 of the EDM preconditioning.

  Args:
    t: times, in whatever unit the network is conditioned on.
    features: size of the embedding, even and at least 4.
    max_frequency: largest angular frequency, radians per unit of t.
    min_frequency: smallest angular frequency, radians per unit of t.

  Returns:
    Embedding, float32 (float64 for float64 times).

  Raises:
    ValueError: if `features` is odd or below 4.

  Example:
    >>> sinusoidal_embedding(jnp.zeros(3), features=8).shape
    (3, 8)

  References:
    Ho et al., Denoising Diffusion Probabilistic Models, 2020, appendix B (embedding of Vaswani et al., 2017, 3.5).
  """
  _check_waves(features)
  half = features // 2
  dtype = jnp.promote_types(t.dtype, jnp.float32)
  exponent = jnp.arange(half, dtype=dtype) / (half - 1)
  phase = t.astype(dtype)[:, None] * (max_frequency * (min_frequency / max_frequency) ** exponent)[None, :]
  return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def _check_waves(features: int) -> None:
  if features < 4 or features % 2:
    raise ValueError(f"features={features} of the time embedding is odd or below 4: use an even number such as 64")


def fourier_features(x: Float[Array, "... c"], levels: int) -> Float[Array, "... 5*c"]:
  """The input beside its sines and cosines at the two highest frequencies of data of this many levels in [-1, 1].

      x, sin(pi L x / 2), cos(pi L x / 2), sin(pi L x), cos(pi L x)

  with periods of two levels and of one: what tells neighbouring levels apart, which a network else is slow to learn.
  For L = 256 they are n = 7 and 8 of sin(2^n pi x).

  References:
    Kingma et al. 2021, Variational Diffusion Models, Appendix C.
  """
  angles = [math.pi * levels / 2 * x, math.pi * levels * x]
  return jnp.concatenate([x, *(wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos))], axis=-1)


class TimeEmbedding(nn.Module):
  """Waves of the time, then a two-layer perceptron.

  Parameters: Dense_0, Dense_1 (kernel, bias) and, with "fourier", frequencies [inputs / 2], which are drawn once and
  not trained: their gradient is zero.

  Attributes:
    features: size of the output.
    max_frequency: see `sinusoidal_embedding`, radians per unit of time.
    dtype: type of the computation.
    min_frequency: see `sinusoidal_embedding`.
    inputs: how many cosines and sines, an even number of 4 or more; 0 for a quarter of `features`, rounded up to one.
    kind: "sinusoidal"; "fourier": cos(2 pi f t), sin(2 pi f t) at random frequencies f ~ N(0, fourier_scale^2) (Tancik
      et al. 2020, Fourier Features Let Networks Learn High Frequency Functions).
    fourier_scale: cycles per unit of time.
    param_dtype: type of the parameters; frequencies are float32.
  """

  features: int
  max_frequency: float = 1000.0
  dtype: DTypeLike = jnp.float32
  min_frequency: float = 0.1
  inputs: int = 0
  kind: Literal["sinusoidal", "fourier"] = "sinusoidal"
  fourier_scale: float = 16.0
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b features"]:
    inputs = self.inputs or max(4, 2 * math.ceil(self.features / 8))
    if self.kind == "fourier":
      _check_waves(inputs)
      frequencies = self.param("frequencies", nn.initializers.normal(self.fourier_scale), (inputs // 2,))
      dtype = jnp.promote_types(t.dtype, jnp.float32)
      phase = 2 * math.pi * t.astype(dtype)[:, None] * jax.lax.stop_gradient(frequencies).astype(dtype)[None, :]
      h = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
    else:
      h = sinusoidal_embedding(t, inputs, self.max_frequency, self.min_frequency)
    dense = functools.partial(nn.Dense, self.features, dtype=self.dtype, param_dtype=self.param_dtype)
    h = nn.silu(dense()(h.astype(self.dtype)))
    return dense()(h)
