"""Autoencoders of configs: from the sections `network` and `loss` to encoders, decoders and what is between them.

| network | latents | prior of the latents | its state |
|---|---|---|---|
| `AutoencoderKL` | Gaussian | N(0, I) | the latents |
| `VQVAE` | vectors of a codebook | uniform codes | codes, as floats |
| `GumbelVAE` | probabilities of codes | uniform codes | codes, as floats |
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import components, keys, quantization, schema
from jaxdiff.data.examples import Source
from jaxdiff.schema import Config, ConfigError
from jaxdiff.typing import Autoencoder, DiscreteAutoencoder, Keys, QuantizedAutoencoder, State

LOSS_OF: Mapping[str, str] = {"AutoencoderKL": "vae", "VQVAE": "vq", "GumbelVAE": "gumbel"}


class Coding(NamedTuple):
  """An autoencoder as its config has it.

  Attributes:
    module: the linen module.
    made: its loss and its observation.
    network: from its variables to the functions that the loss is given, pytrees.
    reconstruct: `(network, state) -> output`, the likeliest latents decoded.
    prior_shape: of the state that its prior draws, from variables and the shape of a state of the data.
    draw: `(key, shape) -> state`, of the prior.
    decode: `(network, state) -> output`, of such a state.
  """

  module: Any
  made: components.Autoencoding
  network: Callable[[Any], Any]
  reconstruct: Callable[[Any, State], jax.Array]
  prior_shape: Callable[[Any, tuple[int, ...]], tuple[int, ...]]
  draw: Callable[[Keys, tuple[int, ...]], State]
  decode: Callable[[Any, State], jax.Array]


def make(config: Config, source: Source, path: str = "") -> Coding:
  """The autoencoder of the sections `network` and `loss` of the section at `path`, for the data of a source.

  Raises:
    ConfigError: for data that are no images.
  """
  if len(source.shape) != 3:
    raise ConfigError(f"config.{path}network encodes images [h, w, c]; the data have the shape {source.shape}")
  made = schema.component(f"{path}loss", config["loss"], levels=source.levels)
  channels = source.shape[-1]
  sizes = {"image_channels": channels, "output_channels": channels * made.observation.outputs}
  module = schema.component(f"{path}network", config["network"], parent=None, name=None, **sizes)
  return _MAKERS[config["network"]["type"]](module, made)


def check(config: Config, path: str = "") -> None:
  """Refuse the loss of another network, and less than two codes."""
  kind, loss = config["network"]["type"], config["loss"]["type"]
  if loss != LOSS_OF[kind]:
    raise ConfigError(f"config.{path}loss.type must be {LOSS_OF[kind]!r} for {kind}, got {loss!r}")
  if config["network"].get("codes", 2) < 2:
    raise ConfigError(f"config.{path}network.codes must be at least 2, got {config['network']['codes']}")


def init(coding: Coding, shape: tuple[int, ...], seed: int, path: str = "") -> Any:
  """Initial variables, for data of a shape."""
  try:
    return jax.jit(coding.module.init)(jax.random.key(seed), jnp.zeros((1, *shape)))
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ConfigError(f"config.{path}network does not fit data of shape {shape}: {error}") from error


def _methods(module: Any, variables: Any) -> tuple[Any, Any]:
  of = lambda method: jax.tree_util.Partial(functools.partial(module.apply, method=method), variables)
  return of("encode"), of("decode")


def _gaussian(module: Any, made: components.Autoencoding) -> Coding:
  def shape(variables: Any, data: tuple[int, ...]) -> tuple[int, ...]:
    x = jax.ShapeDtypeStruct((1, *data), jnp.float32)
    mean, _ = jax.eval_shape(lambda v, x: module.apply(v, x, method="encode"), variables, x)
    return mean.shape[1:]

  return Coding(
    module,
    made,
    network=lambda variables: Autoencoder(*_methods(module, variables)),
    reconstruct=lambda network, state: network.decode(network.encode(state)[0]),
    prior_shape=shape,
    draw=lambda key, shape: keys.normal(keys.per_example(key, shape[0]), shape),
    decode=lambda network, state: network.decode(state),
  )


def _of_codes(module: Any, made: components.Autoencoding, network: Any, reconstruct: Any, decode: Any) -> Coding:
  def shape(variables: Any, data: tuple[int, ...]) -> tuple[int, ...]:
    x = jax.ShapeDtypeStruct((1, *data), jnp.float32)
    return jax.eval_shape(lambda v, x: module.apply(v, x, method="encode"), variables, x).shape[1:-1]

  def draw(key: Keys, shape: tuple[int, ...]) -> State:
    return jnp.floor(module.codes * keys.uniform(keys.per_example(key, shape[0]), shape))

  by_code = lambda made, state: decode(made, state.astype(jnp.int32))
  return Coding(module, made, network, reconstruct, shape, draw, by_code)


def _quantized(module: Any, made: components.Autoencoding) -> Coding:
  decode = lambda network, codes: network.decode(network.codebook["vectors"][codes])
  return _of_codes(
    *(module, made),
    network=lambda variables: QuantizedAutoencoder(*_methods(module, variables), variables["codebook"]),
    reconstruct=lambda network, state: decode(
      network, quantization.nearest(network.encode(state), network.codebook["vectors"])
    ),
    decode=decode,
  )


def _discrete(module: Any, made: components.Autoencoding) -> Coding:
  decode = lambda network, codes: network.decode(jax.nn.one_hot(codes, module.codes))
  return _of_codes(
    *(module, made),
    network=lambda variables: DiscreteAutoencoder(*_methods(module, variables)),
    reconstruct=lambda network, state: decode(network, jnp.argmax(network.encode(state), axis=-1)),
    decode=decode,
  )


_MAKERS = {"AutoencoderKL": _gaussian, "VQVAE": _quantized, "GumbelVAE": _discrete}


def bits_per_dim(source: Source) -> float:
  """What nats of an example are in bits per dimension."""
  return 1 / (math.prod(source.shape) * math.log(2))
