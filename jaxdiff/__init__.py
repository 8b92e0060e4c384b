"""jaxdiff: functional score-based diffusion in JAX. One noun (SDE), one adapter (score_fn), three verbs.

train      loss    = jd.losses.denoising(sde, prediction)       loss(key, x0, network, cond) -> per-example, aux
sample     sampler = jd.samplers.reverse_sde(sde, ts)           sampler(key, x_T, score, cond) -> Sample
evaluate   logp    = jd.likelihood.log_prob(sde)                logp(key, x0, score, cond) -> LogProb

Names are imported when they are first used, so that `jaxdiff --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxdiff import divergence as divergence
  from jaxdiff import flow as flow
  from jaxdiff import likelihood as likelihood
  from jaxdiff import losses as losses
  from jaxdiff import predictions as predictions
  from jaxdiff import samplers as samplers
  from jaxdiff import schedules as schedules
  from jaxdiff import typing as typing
  from jaxdiff.keys import example_keys as example_keys
  from jaxdiff.predictions import Prediction as Prediction
  from jaxdiff.predictions import denoised as denoised
  from jaxdiff.predictions import score_fn as score_fn
  from jaxdiff.schedules import time_grid as time_grid
  from jaxdiff.sde import EDM as EDM
  from jaxdiff.sde import SDE as SDE
  from jaxdiff.sde import VE as VE
  from jaxdiff.sde import VP as VP
  from jaxdiff.sde import CosineVP as CosineVP
  from jaxdiff.sde import ScalarSDE as ScalarSDE
  from jaxdiff.sde import SubVP as SubVP
  from jaxdiff.sde import log_snr as log_snr
  from jaxdiff.sde import perturb as perturb
  from jaxdiff.sde import reverse as reverse
  from jaxdiff.status import SolveError as SolveError
  from jaxdiff.status import raise_if_failed as raise_if_failed

_MODULES = ("divergence", "flow", "likelihood", "losses", "predictions", "samplers", "schedules", "typing")
_NAMES = {
  "keys": ("example_keys",),
  "predictions": ("Prediction", "denoised", "score_fn"),
  "schedules": ("time_grid",),
  "sde": ("EDM", "SDE", "VE", "VP", "CosineVP", "ScalarSDE", "SubVP", "log_snr", "perturb", "reverse"),
  "status": ("SolveError", "raise_if_failed"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
  if name in _MODULES or name in _NAMES:
    return importlib.import_module(f"jaxdiff.{name}")
  if name in _HOME:
    return getattr(importlib.import_module(f"jaxdiff.{_HOME[name]}"), name)
  raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES, *_HOME})
