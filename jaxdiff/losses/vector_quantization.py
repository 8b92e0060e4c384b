"""The VQ-VAE: the negative ELBO of vectors replaced by those of a codebook, with what trains encoder and codebook.

    -log p(x)  <=  -log p(x | z_q) + n log K     n positions, q(z | x) all on the nearest codes, uniform prior       (1)
    loss        =  (1) + beta |z - sg(z_q)|^2    keeps the encoder near its codes ("commitment")                     (2)
                     + |sg(z) - z_q|^2           moves the codes, if they are trained by this loss                   (3)

with sg = stop_gradient and squares summed over positions and channels; the decoder sees z + sg(z_q - z).

Codes that are moving averages of what the encoder gives (`jaxdiff.training.codebook`) need statistics of the global
batch, which a train step sums over examples, microbatches and devices for gradients alone. So the statistics are
gradients: the loss gets -(<counts, n> + <sums, m> + <vectors, c>) added, minus its own value, that is exactly 0, where

    n_k   how many positions of the example have code k;    m_k   the sum of their vectors
    c_k   B z_p of the example i where (i, p) is drawn for code k by (step, k), uniform over the B examples of the
          global batch and their positions; else 0

The mean over the global batch of the gradient for "counts" is minus the mean of n, for "sums" minus that of m, and for
"vectors" minus one random vector of the encoder for each code.

References:
  van den Oord et al. 2017, Neural Discrete Representation Learning: eq. 3 (1) to (3), where the squares are means over
  the positions; its appendix for moving averages.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jaxdiff import checks, quantization
from jaxdiff.losses.autoencoding import Costs, check, to_state
from jaxdiff.losses.observations import Observation
from jaxdiff.typing import NO_COND, Cond, Keys, QuantizedAutoencoder

_SEED = 0  # of the places of the candidates; what they hold changes with every run


def vq(
  observation: Observation, beta: float = 0.25, codebook: Literal["ema", "loss"] = "ema"
) -> Callable[..., tuple[Float[Array, " b"], Costs]]:
  """The negative ELBO of a vector-quantized autoencoder, commitment and codebook.

  How many codes are in use is no mean over examples, so it is not in aux: take `quantization.perplexity` of the `usage`
  of held-out data, or of the moving counts of the codebook.

  Args:
    observation: p(x | output of the decoder), of `losses.observations`.
    beta: the weight of the commitment.
    codebook: how the codes are trained: "ema", their gradients are the statistics for `moving_average` of
      `jaxdiff.training.codebook`, and the codebook has "counts" and "sums"; "loss", by (3), with any optimizer.

  Returns:
    loss(key, x, network, cond={}, u=None, step=None, index=None, global_batch=None) -> (loss [b], aux). `network` is a
    `jaxdiff.typing.QuantizedAutoencoder`. With `step`, an integer, `index` [b], the examples' places in the global
    batch, and `global_batch`, its size, the codebook gets its statistics; without them it gets none: for evaluation.
    Nothing is drawn, so key and u are not used. aux: "reconstruction", -log p(x | z_q), and "nats", the bound (1), in
    nats; "commitment", |z - z_q|^2.

  Raises:
    ValueError: for a negative beta, an unknown codebook; when called, for less than 2 codes, conditions, outputs that
      the observation does not fit, some but not all of step, index and global_batch.
    TypeError: for a factory given where what it makes is due; when called, for data of the wrong type.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.vq(jd.losses.observations.gaussian(std=1.0), codebook="loss")
    >>> codes = {"vectors": jnp.array([[0.0], [1.0]])}
    >>> network = jd.typing.QuantizedAutoencoder(lambda x: x[..., None], lambda z: z[..., 0], codes)
    >>> _, aux = jax.jit(lambda x: loss(jax.random.key(0), x, network))(jnp.array([[0.0, 1.0]]))
    >>> round(float(aux["nats"][0]), 4)  # log(2 pi) + 2 log 2
    3.2242
  """
  check(observation, beta=beta)
  checks.one_of("codebook", codebook, Literal["ema", "loss"])

  def loss(
    key: Keys,
    x: Shaped[Array, "b *d"],
    network: QuantizedAutoencoder,
    cond: Cond = NO_COND,
    u: Float[Array, " b"] | None = None,
    step: Int[Array, ""] | None = None,
    index: Int[Array, " b"] | None = None,
    global_batch: int | None = None,
  ) -> tuple[Float[Array, " b"], Costs]:
    checks.made("network", network, QuantizedAutoencoder)
    if len({step is None, index is None, global_batch is None}) > 1:
      raise ValueError("step, index and global_batch belong together: pass all to train, none to evaluate")
    z = network.encode(to_state(observation, x, cond, u))
    _check_codebook(network.codebook, z, averaged=codebook == "ema" and step is not None)
    vectors = network.codebook["vectors"].astype(z.dtype)
    codes = quantization.nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(vectors))
    quantized = vectors[codes]
    output = network.decode(quantization.straight_through(z, quantized))
    reconstruction = -observation.log_prob(x, output)
    distance = lambda a, b: jnp.sum((a - b) ** 2, axis=range(1, z.ndim))
    commitment = distance(z, jax.lax.stop_gradient(quantized))
    bound = reconstruction + codes[0].size * math.log(len(vectors))
    value = bound + beta * commitment
    if codebook == "loss":
      value = value + distance(jax.lax.stop_gradient(z), quantized)
    elif step is not None and index is not None and global_batch is not None:
      value = value + _statistics(network.codebook, z, codes, step, index, global_batch).astype(value.dtype)
    return value, {"reconstruction": reconstruction, "nats": bound, "commitment": commitment}

  return loss


def _check_codebook(codebook: Any, z: Array, averaged: bool) -> None:
  due = ("vectors", "counts", "sums") if averaged else ("vectors",)
  if not isinstance(codebook, Mapping) or any(name not in codebook for name in due):
    raise ValueError(f"network.codebook must be a dict of {', '.join(due)}, as models.VQVAE has it")
  if (shape := codebook["vectors"].shape)[-1] != z.shape[-1]:
    raise ValueError(
      f"network.codebook['vectors'] must be as wide as what encode returns, [K, {z.shape[-1]}]; got the shape {shape}"
    )


def _statistics(
  codebook: Mapping[str, Array],
  z: Float[Array, "b *p d"],
  codes: Int[Array, "b *p"],
  step: Int[Array, ""],
  index: Int[Array, " b"],
  global_batch: int,
) -> Float[Array, " b"]:
  """Zeros, whose gradients for the codebook are the statistics. Memory: an array `[b, K, d]`."""
  counts, sums, vectors = (codebook[name] for name in ("counts", "sums", "vectors"))
  z = jax.lax.stop_gradient(z).astype(sums.dtype).reshape(len(z), -1, z.shape[-1])
  codes = codes.reshape(len(z), -1)
  found = jnp.sum(counts[codes], axis=1) + jnp.sum(sums[codes] * z, axis=(1, 2))
  example, position = _places(step, len(counts), global_batch, codes.shape[1])
  drawn = global_batch * (index[:, None] == example[None]).astype(z.dtype)
  candidates = jnp.sum(drawn[:, :, None] * vectors[None] * z[:, position], axis=(1, 2))
  value = -(found + candidates)
  return value - jax.lax.stop_gradient(value)


def _places(
  step: Int[Array, ""], codes: int, global_batch: int, positions: int
) -> tuple[Int[Array, " {codes}"], Int[Array, " {codes}"]]:
  """The example and the position that every code's candidate comes from at this step."""
  of_example, of_position = jax.random.split(jax.random.fold_in(jax.random.key(_SEED), step))
  draw = lambda key, size: jax.random.randint(key, (codes,), 0, size, jnp.int32)
  return draw(of_example, global_batch), draw(of_position, positions)
