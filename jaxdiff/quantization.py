"""Discrete latents: vectors replaced by those of a codebook, and samples of categorical codes.

    nearest code         k(z) = argmin_k |z - e_k|,   z_q = e_k(z)                                                   (1)
    straight-through     z + stop_gradient(z_q - z): the value of z_q, with the gradient of z                        (2)
    perplexity           exp(-sum_k p_k log p_k) of the shares p_k of the codes: K for equal ones, 1 for one alone   (3)
    Gumbel-max           argmax_k (logit_k + g_k) ~ softmax(logits),   g_k = -log(-log u_k)                          (4)
    Gumbel-softmax       softmax((logits + g) / temperature): (4) as one-hot, relaxed                                (5)

(4) of (5) with the same key is its largest entry, at every temperature; as the temperature goes to 0, (5) goes to the
one-hot of (4).

References:
  van den Oord et al. 2017, Neural Discrete Representation Learning, Sections 3.1 and 3.2, for (1), (2); Bengio et al.
  2013, Estimating or Propagating Gradients Through Stochastic Neurons, for (2); Maddison et al. 2014, A* Sampling,
  Section 2, for (4); Jang et al. 2017, Categorical Reparameterization with Gumbel-Softmax, and Maddison et al. 2017,
  The Concrete Distribution, for (5).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, Real

from jaxdiff import checks, keys
from jaxdiff.typing import Keys, Scalar

Temperature = Callable[[Int[Array, "..."] | int], Float[Array, "..."]]


def nearest(z: Float[Array, "*p d"], vectors: Float[Array, "K d"]) -> Int[Array, "*p"]:
  """The codes of the vectors nearest to z, (1); of two equally near the first.

  Products are summed in full precision on every device, so that a code does not depend on how it multiplies. Memory:
  an array `[*p, K]`.

  Args:
    z: vectors.
    vectors: the codebook, K of them.

  Returns:
    Codes 0..K-1.

  Raises:
    ValueError: for a codebook of less than 2 vectors.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff import quantization
    >>> quantization.nearest(jnp.array([[0.9], [-7.0]]), jnp.array([[0.0], [1.0]])).tolist()
    [1, 0]
  """
  check_codes(vectors.shape[0])
  # |z|^2 is the same for all codes; around their mean no digits are lost to what all have in common.
  middle = jnp.mean(vectors, axis=0)
  vectors, z = vectors - middle[None], z - middle.reshape((1,) * (z.ndim - 1) + (-1,))
  products = jnp.einsum("...d,kd->...k", z, vectors, precision="highest")
  squares = jnp.sum(vectors**2, axis=1).reshape((1,) * (z.ndim - 1) + (-1,))
  return jnp.argmin(squares - 2 * products, axis=-1).astype(jnp.int32)


def straight_through(z: Float[Array, "*s"], value: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """The value, up to rounding, with the gradient of z, (2)."""
  return z + jax.lax.stop_gradient(value - z)


def usage(codes: Int[Array, "..."], size: int) -> Float[Array, " {size}"]:
  """How often each code occurs; sum the counts of several batches before you ask for the perplexity.

  Raises:
    ValueError: for a size below 2.
  """
  check_codes(size)
  return jnp.bincount(codes.ravel(), length=size).astype(jnp.result_type(float))


def perplexity(counts: Real[Array, " K"]) -> Float[Array, ""]:
  """How many codes are in use, (3), in [1, K]; NaN where nothing was counted.

  It is a statistic of a whole data set: that of a batch is smaller on average, and a mean over batches or examples is
  not it. The moving counts of a codebook serve as well as those of held-out data.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff import quantization
    >>> float(quantization.perplexity(jnp.array([5.0, 5.0, 0.0])))
    2.0
  """
  counts = counts.astype(jnp.result_type(float))
  return jnp.exp(jnp.sum(jax.scipy.special.entr(counts / jnp.sum(counts))))


def gumbel_max(key: Keys, logits: Float[Array, "b *p K"]) -> Int[Array, "b *p"]:
  """Samples of the categorical distributions softmax(logits), (4).

  Args:
    key: one key, or one per example.
    logits: of every example, at any positions.

  Returns:
    Codes 0..K-1.
  """
  return jnp.argmax(_perturbed(key, logits), axis=-1).astype(jnp.int32)


def gumbel_softmax(
  key: Keys, logits: Float[Array, "b *p K"], temperature: Scalar, hard: bool = False
) -> Float[Array, "b *p K"]:
  """Relaxed one-hot samples of softmax(logits), (5), which have gradients.

  Args:
    key: one key, or one per example; with the same key the largest entry is that of `gumbel_max`.
    logits: of every example, at any positions.
    temperature: > 0; small ones give samples near one-hot, and gradients of a high variance.
    hard: whether the value is the one-hot itself, with the gradient of the relaxed sample (straight-through).

  Returns:
    Samples on the simplex.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxdiff import quantization
    >>> quantization.gumbel_softmax(jax.random.key(0), jnp.array([[0.0, 9.0]]), 0.1).round(3).tolist()
    [[0.0, 1.0]]
  """
  noisy = _perturbed(key, logits)
  soft = jax.nn.softmax(noisy / jnp.asarray(temperature, logits.dtype))
  if not hard:
    return soft
  return straight_through(soft, jax.nn.one_hot(jnp.argmax(noisy, axis=-1), logits.shape[-1], dtype=logits.dtype))


def annealed(first: float = 1.0, last: float = 0.5, steps: int = 10_000) -> Temperature:
  """A temperature that falls geometrically, then stays: first (last / first)^min(step / steps, 1).

  Args:
    first: at step 0, > 0.
    last: from `steps` on, > 0.
    steps: length of the fall.

  Returns:
    temperature(step), a float for every integer.

  Raises:
    ValueError: for temperatures that are not positive, or steps below 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxdiff import quantization
    >>> temperature = quantization.annealed(1.0, 0.25, steps=100)
    >>> temperature(jnp.array([0, 50, 1000])).tolist()
    [1.0, 0.5, 0.25]

  References:
    Jang et al. 2017, Section 4.
  """
  for name, value in (("first", first), ("last", last)):
    if not value > 0:
      raise ValueError(f"{name} must be a temperature > 0, got {value}")
  checks.whole("steps", steps, 1)
  rate = math.log(last / first)

  def temperature(step: Int[Array, "..."] | int) -> Float[Array, "..."]:
    part = jnp.minimum(jnp.asarray(step, jnp.result_type(float)) / steps, 1)
    return first * jnp.exp(rate * part)

  return temperature


def check_codes(size: int) -> None:
  """Refuse a codebook of less than 2 codes."""
  checks.whole("codes", size, 2, "the number of vectors of a codebook")


def _perturbed(key: Keys, logits: Float[Array, "b *p K"]) -> Float[Array, "b *p K"]:
  """Logits and Gumbel noise."""
  each: Key[Array, " b"] = keys.per_example(key, len(logits))
  return logits + jax.vmap(lambda one: jax.random.gumbel(one, logits.shape[1:], logits.dtype))(each)
