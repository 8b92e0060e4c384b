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

from jaxdiff import (
  cld,
  ddpm,
  divergence,
  flow,
  losses,
  ncsn,
  ode,
  predictions,
  quantization,
  samplers,
  schedules,
  sde,
)
from jaxdiff.data import sources
from jaxdiff.models import (
  MLP,
  VQVAE,
  AutoencoderKL,
  Classifier,
  DiT,
  GumbelVAE,
  PatchDiscriminator,
  RefineNet,
  StepDiscriminator,
  UNet,
  VDMNet,
  VectorDiscriminator,
)
from jaxdiff.typing import Keys, Sample, State

Constructor = Callable[..., Any]
Table = Mapping[str, Constructor]


def ddpm_chain(steps: int = 1000, schedule: Literal["linear", "cosine", "vp"] = "linear") -> ddpm.Chain:
  """The chain of DDPM; the linear betas of 1000 steps, or so many times larger as there are fewer; "vp" for few."""
  betas: Table = {"linear": ddpm.linear_betas, "cosine": ddpm.cosine_betas, "vp": ddpm.vp_betas}
  return ddpm.Chain(betas[schedule](steps))


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


def time_grid(
  sde: Any,
  steps: int,
  kind: Literal["log_snr", "uniform", "karras", "quadratic"] | None = None,
  t0: float | None = None,
  rho: float | None = None,
) -> Float[Array, " n"]:
  """The grid of a process: evenly spaced in log-SNR unless it is said otherwise, with velocities in sqrt t."""
  given: dict[str, Any] = {"kind": kind, "t0": t0, "rho": rho}
  given = {name: value for name, value in given.items() if value is not None}
  return (cld.time_grid if hasattr(sde, "given_position") else schedules.time_grid)(sde, steps, **given)


@dataclasses.dataclass(frozen=True)
class VelocityNoise:
  """The network predicts the noise of velocities or, mixed, what it lacks to that of N(0, I) data: `cld.score_fn`."""

  mixed: bool = True


@dataclasses.dataclass(frozen=True)
class MixedNoise:
  """The network of latents predicts the noise, mixed with that of a normal of a `std`, at first by a `share`:
  `jd.mixed_score`.
  """

  std: float = 1.0
  share: float = 0.01


class Autoencoding(NamedTuple):
  """How an autoencoder is trained.

  Attributes:
    loss: of `jaxdiff.losses`.
    observation: what its outputs say of data.
    patch_weight: of passing before a discriminator of patches, where there is one.
    patch_start: the step from which that counts.
  """

  loss: Callable[..., Any]
  observation: losses.observations.Observation
  patch_weight: float = 0.0
  patch_start: int = 0


Observed = Literal["categorical", "discretized", "gaussian"]


def _observation(kind: Observed, levels: int | None, std: float) -> losses.observations.Observation:
  if kind == "gaussian":
    if levels is not None:
      raise ValueError(
        "observation = 'gaussian' is of continuous data; of integers take 'categorical' or 'discretized'"
      )
    return losses.observations.gaussian(std)
  if levels is None:
    raise ValueError(f"observation = {kind!r} is of integers; of continuous data take 'gaussian'")
  return getattr(losses.observations, kind)(levels)


def vae(
  levels: int | None,
  observation: Observed = "discretized",
  std: float = 0.1,
  beta: float = 1.0,
  patch_weight: float = 0.1,
  patch_start: int = 0,
) -> Autoencoding:
  """Gaussian latents; `std` is of Gaussian observations, `patch_weight` and `patch_start` of a discriminator."""
  observed = _observation(observation, levels, std)
  return Autoencoding(losses.vae(observed, beta), observed, patch_weight, patch_start)


def vq(
  levels: int | None,
  observation: Observed = "discretized",
  std: float = 0.1,
  beta: float = 0.25,
  codebook: Literal["ema", "loss"] = "ema",
  decay: float = 0.99,
  revive_below: float = 0.0,
  patch_weight: float = 0.1,
  patch_start: int = 0,
) -> Autoencoding:
  """Vector quantization; `decay` and `revive_below` are of codes that are moving averages, the rest as in `vae`."""
  observed = _observation(observation, levels, std)
  return Autoencoding(losses.vq(observed, beta, codebook), observed, patch_weight, patch_start)


def gumbel(
  levels: int | None,
  observation: Observed = "discretized",
  std: float = 0.1,
  beta: float = 1.0,
  first_temperature: float = 1.0,
  last_temperature: float = 0.5,
  annealing_steps: int = 10_000,
  straight_through: bool = False,
) -> Autoencoding:
  """Categorical latents, relaxed at a temperature that falls."""
  observed = _observation(observation, levels, std)
  temperature = quantization.annealed(first_temperature, last_temperature, annealing_steps)
  return Autoencoding(losses.gumbel(observed, temperature, beta, straight_through), observed)


def lsgm(
  sde: sde.ScalarSDE,
  autoencoding: Autoencoding,
  prediction: predictions.Prediction,
  prior_weight: losses.weights.Weight | None = None,
  time: losses.times.Times = losses.times.importance(),
  t0: float | None = None,
) -> Callable[..., Any]:
  """An autoencoder and the diffusion of its latents together; of the loss of the first the observation counts alone."""
  return losses.lsgm(sde, autoencoding.observation, prediction, prior_weight, time, t0)


def denoising_gan(chain: ddpm.Chain, latent_dim: int = 16, path: int = 0) -> samplers.FixedGrid:
  """The steps of a generator."""
  return samplers.denoising_gan(chain, latent_dim, path)


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
  "CLD": cld.CLD,
}
PREDICTIONS: Table = {
  "noise": predictions.noise,
  "data": predictions.data,
  "velocity": predictions.velocity,
  "score": predictions.score,
  "edm": predictions.edm,
  "vector_field": vector_field,
  "classes": classes,
  "mixed_noise": MixedNoise,
  "velocity_noise": VelocityNoise,
}
AUTOENCODING: Table = {"vae": vae, "vq": vq, "gumbel": gumbel}
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
  "lsgm": lsgm,
  "denoising_gan": losses.denoising_gan,
  "hybrid": losses.hybrid,
  **AUTOENCODING,
}
PROCESS_OF_LOSS: Mapping[str, str] = {
  "vdm": "VariancePreserving",
  "ncsn": "NCSN",
  "ddpm_simple": "DDPM",
  "ddpm_hybrid": "DDPM",
  "ddpm_elbo": "DDPM",
  "denoising_gan": "DDPM",
  "hybrid": "CLD",
}
WITH_CNF: Mapping[str, str] = {"prediction": "vector_field", "loss": "ffjord", "sampler": "cnf"}
WITH_CLASSIFIER: Mapping[str, str] = {"prediction": "classes", "loss": "classification"}
WEIGHTS: Table = {
  "noise": losses.weights.noise,
  "likelihood": losses.weights.likelihood,
  "edm": losses.weights.edm,
  "min_snr": losses.weights.min_snr,
  "velocity_likelihood": losses.weights.velocity_likelihood,
}
TIMES: Table = {
  "uniform": losses.times.uniform,
  "importance": losses.times.importance,
  "log_normal": losses.times.log_normal,
  "fixed": losses.times.fixed,
}
AUTOENCODERS: Table = {"AutoencoderKL": AutoencoderKL, "VQVAE": VQVAE, "GumbelVAE": GumbelVAE}
NETWORKS: Table = {
  "UNet": UNet,
  "MLP": MLP,
  "RefineNet": RefineNet,
  "VDMNet": VDMNet,
  "DiT": DiT,
  "Classifier": Classifier,
  **AUTOENCODERS,
}
DISCRIMINATORS: Table = {
  "StepDiscriminator": StepDiscriminator,
  "VectorDiscriminator": VectorDiscriminator,
  "PatchDiscriminator": PatchDiscriminator,
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
  "denoising_gan": denoising_gan,
  "sscs": samplers.sscs,
}
DIVERGENCES: Table = {"exact": divergence.exact, "hutchinson": hutchinson, "hutchpp": divergence.hutchpp}
