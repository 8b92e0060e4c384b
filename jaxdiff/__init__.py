"""jaxdiff: functional score-based diffusion in JAX. One noun (SDE), one adapter (score_fn), three verbs.

train      loss    = jd.losses.denoising(sde, prediction)       loss(key, x0, network, cond) -> per-example, aux
sample     sampler = jd.samplers.reverse_sde(sde, ts)           sampler(key, x_T, score, cond) -> Sample
evaluate   logp    = jd.likelihood.log_prob(sde)                logp(key, x0, score, cond) -> LogProb
"""

from jaxdiff import cld as cld
from jaxdiff import ddpm as ddpm
from jaxdiff import divergence as divergence
from jaxdiff import editing as editing
from jaxdiff import flow as flow
from jaxdiff import guidance as guidance
from jaxdiff import inverse as inverse
from jaxdiff import latents as latents
from jaxdiff import likelihood as likelihood
from jaxdiff import losses as losses
from jaxdiff import ncsn as ncsn
from jaxdiff import ode as ode
from jaxdiff import parallel as parallel
from jaxdiff import predictions as predictions
from jaxdiff import quantization as quantization
from jaxdiff import samplers as samplers
from jaxdiff import schedules as schedules
from jaxdiff import typing as typing
from jaxdiff.cld import CLD as CLD
from jaxdiff.keys import example_keys as example_keys
from jaxdiff.linear_sde import LinearSDE as LinearSDE
from jaxdiff.mixing import MixedScore as MixedScore
from jaxdiff.mixing import mixed_score as mixed_score
from jaxdiff.predictions import Prediction as Prediction
from jaxdiff.predictions import denoised as denoised
from jaxdiff.predictions import score_fn as score_fn
from jaxdiff.predictions import score_of as score_of
from jaxdiff.schedules import time_grid as time_grid
from jaxdiff.sde import EDM as EDM
from jaxdiff.sde import SDE as SDE
from jaxdiff.sde import VE as VE
from jaxdiff.sde import VP as VP
from jaxdiff.sde import CosineVP as CosineVP
from jaxdiff.sde import ScalarSDE as ScalarSDE
from jaxdiff.sde import SubVP as SubVP
from jaxdiff.sde import VariancePreserving as VariancePreserving
from jaxdiff.sde import log_snr as log_snr
from jaxdiff.sde import perturb as perturb
from jaxdiff.sde import reverse as reverse
from jaxdiff.status import SolveError as SolveError
from jaxdiff.status import raise_if_failed as raise_if_failed
