"""What a config can name: constructors by the `type` of their section.

The signature of a constructor is the schema of its section. Where those of the library take other objects than numbers
and words, the functions here stand in for them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import ddpm, divergence, flow, losses, ncsn, ode, predictions, samplers, schedules, sde
from jaxdiff.data import sources
from jaxdiff.models import MLP, AutoencoderKL, Classifier, DiT, RefineNet, UNet, VDMNet, conditioning
from jaxdiff.models.text import Text
from jaxdiff.typing import Keys, Sample, State

Constructor = Callable[..., Any]
Table = Mapping[str, Constructor]


def ddpm_chain(steps: int = 1000, schedule: Literal["linear", "cosine"] = "linear") -> ddpm.Chain:
  """The chain of DDPM; the linear betas of 1000 steps, or so many times larger as there are fewer."""
  if schedule == "cosine":
    return ddpm.Chain(ddpm.cosine_betas(steps))
  return ddpm.Chain(ddpm.linear_betas(steps))


def ncsn_chain(levels: int = 10, sigma_min: float = 0.01, sigma_max: float = 50.0) -> ncsn.Chain:
  """The chain of NCSN with geometric noise levels."""
  return ncsn.Chain(ncsn.geometric_sigmas(levels, sigma_min, sigma_max))


def variance_preserving(
  gamma_min: float = -13.3,
  gamma_max: float = 6.0,
  interior: Literal["straight", "learned"] = "straight",
  learn_ends: bool = False,
  width: int = 32,
) -> sde.VariancePreserving:
  """The process of a -log-SNR between two ends; what of it is learned is so by the loss `vdm`."""
  between = {"interior": schedules.monotone_network(width)} if interior == "learned" else {}
  return sde.VariancePreserving(schedules.Gamma(gamma_min, gamma_max, **between))


@dataclasses.dataclass(frozen=True)
class CNF:
  """A continuous normalizing flow in the place of a process: data at t = 0, N(0, I) at t1, the network between them."""

  t1: float = 1.0

  def __post_init__(self):
    if not self.t1 > 0:
      raise ValueError(f"CNF needs 0 < t1, got {self.t1}")

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State:
    """Samples of the base, `shape = (b, *d)`."""
    return flow.standard_normal().sample(key, shape)


def vector_field() -> Callable[..., Callable[..., Array]]:
  """The network is the vector field of a flow: from `(apply, params)` to `field(x, t)`, a pytree."""
  return jax.tree_util.Partial


def classes() -> Callable[..., Callable[..., Array]]:
  """The network is a classifier: from `(apply, params)` to `logits(x, t)`, a pytree."""
  return jax.tree_util.Partial


def cnf(
  sde: CNF, rtol: float = 1e-5, atol: float = 1e-5, solver: ode.Method = "tsit5", max_steps: int = ode.MAX_STEPS
) -> Callable[..., Sample]:
  """A flow from its base to the data."""
  return flow.cnf(t1=sde.t1, solver=solver, rtol=rtol, atol=atol, max_steps=max_steps).inverse


def ancestral(
  forward: Any,
  ts: Float[Array, " n"],
  variance: Literal["beta", "beta_tilde", "learned"] = "beta_tilde",
  denoise: bool = False,
  path: int = 0,
) -> samplers.FixedGrid:
  """Ancestral sampling; of a chain over the steps nearest to the grid and on to the data, which are without noise."""
  if hasattr(forward, "sde"):
    denoise = False
    ts = jnp.asarray(np.unique([0, *np.asarray(forward.index(ts)).tolist()])[::-1])
  return samplers.ancestral(forward, ts, variance, denoise=denoise, path=path)


def annealed_langevin(
  forward: Any, step_size: float = 2e-5, steps: int = 5, denoise: bool = True, path: int = 0
) -> samplers.FixedGrid:
  """Annealed Langevin dynamics over the levels of an NCSN chain."""
  if not hasattr(forward, "sigmas"):
    raise ValueError("annealed_langevin walks down the levels of a chain: it needs --config.sde.type=NCSN")
  return samplers.annealed_langevin(forward, step_size, steps, denoise=denoise, path=path)


def predictor_corrector(
  sde: sde.ScalarSDE,
  ts: Float[Array, " n"],
  predictor: Literal["reverse_sde", "reverse_diffusion", "stochastic_heun", "ddim"] = "reverse_diffusion",
  snr: float = 0.16,
  corrector_steps: int = 1,
  denoise: bool = True,
  path: int = 0,
) -> samplers.FixedGrid:
  """A predictor with Langevin steps of a signal-to-noise ratio after each of its steps."""
  corrector = samplers.langevin_corrector(snr, corrector_steps)
  return samplers.predictor_corrector(SAMPLERS[predictor](sde, ts), corrector, denoise=denoise, path=path)


def hutchinson(
  probes: int = 1,
  noise: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
  basis: Literal["identity", "dct", "color_dct", "pca", "auto"] = "identity",
  control: Literal["none", "pca", "dct", "color_dct"] = "none",
  seen: Float[Array, "n *d"] | None = None,
) -> divergence.Divergence:
  """Random probes; principal components and control variates are those of training data that the model has seen."""
  if seen is None:
    return divergence.hutchinson(probes, noise)
  q: Any = divergence.pca_basis(seen) if basis == "pca" else basis
  made = None if control == "none" else divergence.gaussian_control(seen, control)
  return divergence.hutchinson(probes, noise, q, made)


class Condition(NamedTuple):
  """What a network is told of an example.

  Attributes:
    module: how the network reads it.
    of: makes it of the values of the example; None where it is a field of the example, of the condition's name.
    noises: None; of a level of noise, the name of the condition that training noises by it, and the largest level.
  """

  module: Any
  of: Callable[[Float[Array, "b *d"]], Array] | None = None
  noises: tuple[str, float] | None = None


def label(classes: int, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """A class of the example, dropped to one more."""
  return Condition(conditioning.Label(classes, dtype=dtype, param_dtype=param_dtype))


def scalar(max_frequency: float = 10.0, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """A number of the example; NaN where it is unknown."""
  return Condition(conditioning.Scalar(max_frequency, dtype=dtype, param_dtype=param_dtype))


def image(channels: int = 3, dtype: str = "float32") -> Condition:
  """Another image of the example; 8-bit images are scaled to [-1, 1]."""
  return Condition(conditioning.Image(channels, dtype=dtype))


def embedding(features: int, sequence: bool = False, dtype: str = "float32", param_dtype: str = "float32") -> Condition:
  """What another model made of the example: a vector, or a sequence of vectors."""
  return Condition(conditioning.Embedding(features, sequence, dtype=dtype, param_dtype=param_dtype))


def text(
  length: int, width: int = 128, layers: int = 2, heads: int = 4, dtype: str = "float32", param_dtype: str = "float32"
) -> Condition:
  """The caption of the example, of data with as large a `text_length`."""
  return Condition(Text(length, width, layers, heads, dtype=dtype, param_dtype=param_dtype))


def downsampled(factor: int = 2, channels: int = 3, dtype: str = "float32") -> Condition:
  """The image itself, smaller by a factor: super-resolution."""

  if factor < 1:
    raise ValueError(f"factor must be at least 1, got {factor}")

  def smaller(x: Array) -> Array:
    b, h, w, c = x.shape
    if h % factor or w % factor:
      raise ValueError(f"factor={factor} does not divide the {h}x{w} pixels of the images: take one that does")
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))

  return Condition(conditioning.Image(channels, dtype=dtype), smaller)


def noise_level(
  image: str, most: float = 0.5, max_frequency: float = 10.0, dtype: str = "float32", param_dtype: str = "float32"
) -> Condition:
  """How much noise is on an image of the conditions: in training a random level up to the most, else none.

  It makes the large model of a cascade, which bears the faults of the small one's images: `losses.noised_condition`.
  """
  if not 0 < most < 1:
    raise ValueError(f"most must lie in (0, 1), the largest level of noise; got {most}")
  module = conditioning.Scalar(max_frequency, dtype=dtype, param_dtype=param_dtype)
  return Condition(module, lambda x: jnp.zeros(len(x), x.dtype), (image, most))


def noises(conditions: Mapping[str, Condition]) -> dict[str, tuple[str, float]]:
  """By name of a level of noise the image that training noises by it, and the largest level."""
  images = sorted(name for name, made in conditions.items() if isinstance(made.module, conditioning.Image))
  found = {name: made.noises for name, made in conditions.items() if made.noises is not None}
  for name, (image, _) in found.items():
    if image not in images:
      known = ", ".join(images) or "none"
      raise ValueError(f"{name}.image must name one of the images among them ({known}), got {image!r}")
  return found


def greyscale(dtype: str = "float32") -> Condition:
  """The brightness of the RGB image itself (ITU-R 601 luma): colorization."""

  def brightness(x: Array) -> Array:
    if x.shape[-1] != 3:
      raise ValueError(f"a greyscale condition is made of RGB images, of 3 channels; these have {x.shape[-1]}")
    return x @ jnp.array([[0.299], [0.587], [0.114]], x.dtype)

  return Condition(conditioning.Image(1, dtype=dtype), brightness)


SOURCES: Table = {
  "digits": sources.digits,
  "toy2d": sources.toy2d,
  "npz": sources.npz,
  "image_folder": sources.image_folder,
  "array_record": sources.array_record,
  "tfds": sources.tfds_source,
  "absent": sources.absent,
}
PROCESSES: Table = {
  "VP": sde.VP,
  "SubVP": sde.SubVP,
  "CosineVP": sde.CosineVP,
  "VE": sde.VE,
  "EDM": sde.EDM,
  "VariancePreserving": variance_preserving,
  "DDPM": ddpm_chain,
  "NCSN": ncsn_chain,
  "CNF": CNF,
}
PREDICTIONS: Table = {
  "noise": predictions.noise,
  "data": predictions.data,
  "velocity": predictions.velocity,
  "score": predictions.score,
  "edm": predictions.edm,
  "vector_field": vector_field,
  "classes": classes,
}
LOSSES: Table = {
  "denoising": losses.denoising,
  "implicit": losses.implicit,
  "sliced": losses.sliced,
  "bound": losses.bound,
  "vdm": losses.vdm,
  "ncsn": losses.ncsn,
  "ddpm_simple": losses.ddpm_simple,
  "ddpm_hybrid": losses.ddpm_hybrid,
  "ddpm_elbo": losses.ddpm_elbo,
  "ffjord": losses.ffjord,
  "classification": losses.classification,
}
PROCESS_OF_LOSS: Mapping[str, str] = {
  "vdm": "VariancePreserving",
  "ncsn": "NCSN",
  "ddpm_simple": "DDPM",
  "ddpm_hybrid": "DDPM",
  "ddpm_elbo": "DDPM",
}
AUTOENCODING: Table = {}
WITH_CNF: Mapping[str, str] = {"prediction": "vector_field", "loss": "ffjord", "sampler": "cnf"}
WITH_CLASSIFIER: Mapping[str, str] = {"prediction": "classes", "loss": "classification"}
WEIGHTS: Table = {
  "noise": losses.weights.noise,
  "likelihood": losses.weights.likelihood,
  "edm": losses.weights.edm,
  "min_snr": losses.weights.min_snr,
}
TIMES: Table = {
  "uniform": losses.times.uniform,
  "importance": losses.times.importance,
  "log_normal": losses.times.log_normal,
  "fixed": losses.times.fixed,
}
AUTOENCODERS: Table = {"AutoencoderKL": AutoencoderKL}
NETWORKS: Table = {
  "UNet": UNet,
  "MLP": MLP,
  "RefineNet": RefineNet,
  "VDMNet": VDMNet,
  "DiT": DiT,
  "Classifier": Classifier,
  **AUTOENCODERS,
}
DISCRIMINATORS: Table = {}
CONDITIONS: Table = {
  "label": label,
  "scalar": scalar,
  "image": image,
  "embedding": embedding,
  "text": text,
  "downsampled": downsampled,
  "noise_level": noise_level,
  "greyscale": greyscale,
}
SAMPLERS: Table = {
  "reverse_sde": samplers.reverse_sde,
  "reverse_diffusion": samplers.reverse_diffusion,
  "stochastic_heun": samplers.stochastic_heun,
  "adaptive_sde": samplers.adaptive_sde,
  "predictor_corrector": predictor_corrector,
  "annealed_langevin": annealed_langevin,
  "ancestral": ancestral,
  "ddim": samplers.ddim,
  "dpm_solver": samplers.dpm_solver,
  "dpm_solver_pp": samplers.dpm_solver_pp,
  "unipc": samplers.unipc,
  "edm": samplers.edm,
  "probability_flow": samplers.probability_flow,
  "cnf": cnf,
}
DIVERGENCES: Table = {"exact": divergence.exact, "hutchinson": hutchinson, "hutchpp": divergence.hutchpp}
