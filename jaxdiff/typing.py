"""The vocabulary: what every signature of jaxdiff is written in.

Shapes: `x: [b, *d]` with a leading batch axis, `t`: a scalar or `[b]`. Time runs from data at `t = 0` to the prior at
`sde.t1`. A phase state has position and velocity on its last axis. A condition `cond` is a dict of arrays with a
leading batch axis, handed on as keyword arguments.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float, Int, Integer, Key, Real, Shaped

Scalar = float | int | Array
Keys = Key[Array, ""] | Key[Array, " b"]
Time = Real[Array, ""] | Real[Array, " b"] | float | int
Times = Float[Array, " b"]
Step = Integer[Array, ""] | Integer[Array, " b"] | int
State = Float[Array, "b *d"]
PhaseState = Float[Array, "b *d 2"]
Cond = Mapping[str, Shaped[Array, "b ..."]]
Params = Any

NO_COND: Cond = MappingProxyType({})


@runtime_checkable
class Network(Protocol):
  """Any callable `(x: [b, *d], t: [b], **cond) -> [b, *d]`: linen, nnx, equinox or a plain function."""

  def __call__(self, x: Array, t: Array, /, **cond: Array) -> Array: ...


@runtime_checkable
class ScoreFn(Protocol):
  """`(x: [b, *d], t: [b], **cond) -> [b, *d]`, the gradient of log p_t at x."""

  def __call__(self, x: Array, t: Array, /, **cond: Array) -> Array: ...


class Autoencoder(NamedTuple):
  """A pair of pure functions between data and latents; a pytree, so that gradients reach or spare its parameters, where
  both are `jax.tree_util.Partial(f, params)`.

  Attributes:
    encode: `x [b, *d] -> (mean, log_variance)`, each `[b, *k]`, of the Gaussian posterior of the latents; integers are
      at their places in the data range, floats in [-1, 1], as `losses.observations` say.
    decode: `z [b, *k] -> output [b, ...]`, the parameters of the distribution of x given z.
  """

  encode: Callable[[Array], tuple[Array, Array]]
  decode: Callable[[Array], Array]


class DiscreteAutoencoder(NamedTuple):
  """As `Autoencoder`, with latents that are codes 0..K-1.

  Attributes:
    encode: `x [b, *d] -> logits [b, *p, K]` of the posterior of the code at every position.
    decode: `probabilities [b, *p, K] -> output [b, ...]`, the parameters of the distribution of x given the codes.
  """

  encode: Callable[[Array], Array]
  decode: Callable[[Array], Array]


class QuantizedAutoencoder(NamedTuple):
  """As `Autoencoder`, with latents that are vectors of a codebook.

  Attributes:
    encode: `x [b, *d] -> [b, *p, e]`, a vector at every position.
    decode: `z [b, *p, e] -> output [b, ...]`, the parameters of the distribution of x given the vectors.
    codebook: "vectors" [K, e]; where they are moving averages also "counts" [K] and "sums" [K, e].
  """

  encode: Callable[[Array], Array]
  decode: Callable[[Array], Array]
  codebook: Mapping[str, Array]


class Status(NamedTuple):
  """How a solve went, example by example; `jaxdiff.raise_if_failed` turns it into an error on the host.

  Attributes:
    code: 0 where all is well, else one of the codes of `jaxdiff.status`.
    accepted: steps taken.
    rejected: steps tried and refused by the error control.
  """

  code: Int[Array, " b"]
  accepted: Int[Array, " b"]
  rejected: Int[Array, " b"]


class Sample(NamedTuple):
  """What a sampler returns.

  Attributes:
    x: the samples.
    nfe: network evaluations spent on each example.
    path: the states from x_T to the sample, every k-th as `path=k` asked, or None where it was not asked for.
    status: how the solve went.
  """

  x: Float[Array, "b *d"]
  nfe: Int[Array, " b"]
  path: Float[Array, "n b *d"] | None
  status: Status


class LogProb(NamedTuple):
  """What a log-density returns.

  Attributes:
    value: log p(x), in nats.
    latent: where the flow carries x at the prior's end.
    nfe: network evaluations (each with its Jacobian-vector products) spent on each example.
    status: how the solve went.
    standard_error: of `value`, over the probes of the trace estimator: 0 for the exact trace, NaN for one probe.
  """

  value: Float[Array, " b"]
  latent: Float[Array, "b *d"]
  nfe: Int[Array, " b"]
  status: Status
  standard_error: Float[Array, " b"]
