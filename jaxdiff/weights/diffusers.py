"""Networks that diffusers saved, as ours: configuration and parameters, from safetensors and the config.json beside.

| there | here |
|---|---|
| `UNet2DModel` | `UNet`: see `unet2d` |
| `DiTTransformer2DModel`, `Transformer2DModel` | `DiT`: see `dit` |
| `AutoencoderKL` | `AutoencoderKL`: see `autoencoder_kl` |
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.models import UNet, autoencoder
from jaxdiff.models.conditioning import Label
from jaxdiff.models.dit import DiT
from jaxdiff.weights import autoencoder_kl, dit, files, names, unet2d
from jaxdiff.weights.files import Found, Tensors, WeightsError

_SCHEDULERS = ("scheduler_config.json", "scheduler/scheduler_config.json")
_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


class Chain(NamedTuple):
  """What a published network was trained with.

  Attributes:
    steps: T.
    schedule: of the betas, "linear" or "cosine", as `components.ddpm_chain` has them.
    prediction: what it outputs: "noise", "data" or "velocity".
  """

  steps: int = 1000
  schedule: str = "linear"
  prediction: str = "noise"


class Published(NamedTuple):
  """A published network as one of ours.

  Attributes:
    type: of the network, as configs name it: "UNet", "DiT", "AutoencoderKL".
    fields: of the network, but for its conditions.
    network: the linen module.
    params: its parameters, `{"params": {...}}`.
    shape: of what it denoises or encodes, (h, w, c).
    chain: what it was trained with; None for an autoencoder.
    classes: how many classes it was told; 0 for none.
  """

  type: str
  fields: dict[str, Any]
  network: nn.Module
  params: dict[str, Any]
  shape: tuple[int, ...]
  chain: Chain | None
  classes: int = 0


def load(path: str | Path) -> Published:
  """A network that diffusers' `save_pretrained` wrote.

  A `UNet` or `DiT` takes the time t = (n + 1) / T of `ddpm.Chain.sde()` where the published one takes the step n.

  Args:
    path: the safetensors file, its folder, or that of a pipeline.

  Raises:
    WeightsError: a pickle, a damaged file, a configuration that there is no network for, or parameters that do not fit
      it, all of which are listed.

  Example:
    >>> published = load("ddpm-cifar10-32")  # doctest: +SKIP
    >>> published.network.apply(published.params, x, jnp.full(len(x), (n + 1) / 1000))  # doctest: +SKIP
  """
  found = files.find(path)
  config = files.read_json(found.config)
  kind = str(config.get("_class_name"))
  if kind not in _KINDS:
    raise WeightsError(f"{found.config} describes a {kind!r}; what can be read is {', '.join(_KINDS)}")
  try:
    return _KINDS[kind](found, config, files.read(found.weights))
  except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, AttributeError) as error:
    if isinstance(error, WeightsError):
      raise
    raise WeightsError(f"{found.config} holds values that no network can have: {error}") from error


def chain(folder: Path) -> Chain:
  """What the scheduler says that lies in a folder of a model or of its pipeline; without one, the chain of DDPM.

  Raises:
    WeightsError: betas or predictions that there are none for.
  """
  places = [place for name in _SCHEDULERS for place in (folder / name, folder.parent / name) if place.is_file()]
  if not places:
    return Chain()
  config, wrong = files.read_json(places[0]), []
  steps, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
  prediction = config.get("prediction_type", "epsilon")
  wrong += [f"beta_schedule = {kind!r}; can be {' or '.join(_SCHEDULES)}"] if kind not in _SCHEDULES else []
  wrong += [f"prediction_type = {prediction!r}"] if prediction not in _PREDICTIONS else []
  if kind == "linear":
    for key, usual in (("beta_start", 0.1 / steps), ("beta_end", 20 / steps)):
      if abs(config.get(key, usual) - usual) > 1e-9:
        wrong.append(f"{key} = {config[key]!r}; must be {usual:g} for {steps} steps")
  for key in ("trained_betas", "rescale_betas_zero_snr"):
    wrong += [f"{key} = {config[key]!r}"] if config.get(key) not in (None, False) else []
  if wrong:
    raise WeightsError(f"{places[0]} describes a chain that there is none for here: {'; '.join(wrong)}")
  return Chain(steps, _SCHEDULES[kind], _PREDICTIONS[prediction])


def _unet2d(found: Found, config: Mapping[str, Any], tensors: Tensors) -> Published:
  trained = chain(found.folder)
  fields, shape = unet2d.fields(config, trained.steps, str(found.config))
  network = UNet(**fields)
  shapes = _shapes(network, str(found.config), jnp.zeros((1, *shape)), jnp.ones(1))
  params = names.assemble(unet2d.parameters(fields, config), unet2d.renamed(tensors), shapes, str(found.weights))
  return Published("UNet", fields, network, params, shape, trained)


def _dit(found: Found, config: Mapping[str, Any], tensors: Tensors) -> Published:
  trained = chain(found.folder)
  fields, classes, shape = dit.fields(config, trained.steps, str(found.config))
  network = DiT(**fields, conditions={"label": Label(classes)})
  x, label = jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32)
  shapes = _shapes(network, str(found.config), x, jnp.ones(1), label=label)
  kept = dit.one_embedding(tensors, str(found.weights))
  params = names.assemble(dit.parameters(fields), kept, shapes, str(found.weights))
  return Published("DiT", fields, network, params, shape, trained, classes)


def _autoencoder(found: Found, config: Mapping[str, Any], tensors: Tensors) -> Published:
  fields, shape = autoencoder_kl.fields(config, str(found.config))
  network = autoencoder.AutoencoderKL(**fields)
  shapes = _shapes(network, str(found.config), jnp.zeros((1, *shape)))
  made = autoencoder_kl.parameters(fields)
  params = names.assemble(made, autoencoder_kl.renamed(tensors), shapes, str(found.weights))
  return Published("AutoencoderKL", fields, network, params, shape, None)


def _shapes(network: nn.Module, what: str, *inputs: jax.Array, **cond: jax.Array) -> Any:
  try:
    return jax.eval_shape(network.init, jax.random.key(0), *inputs, **cond)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise WeightsError(f"{what} describes a network that cannot be made: {error}") from error


_KINDS: Mapping[str, Callable[[Found, Mapping[str, Any], Tensors], Published]] = {
  "UNet2DModel": _unet2d,
  "DiTTransformer2DModel": _dit,
  "Transformer2DModel": _dit,
  "AutoencoderKL": _autoencoder,
}
