"""Training objectives: factories of `loss(key, x0, network, cond) -> (per-example [b], aux)`."""

from jaxdiff.losses import decoders as decoders
from jaxdiff.losses import times as times
from jaxdiff.losses import weights as weights
from jaxdiff.losses.ddpm import ddpm_elbo as ddpm_elbo
from jaxdiff.losses.ddpm import ddpm_hybrid as ddpm_hybrid
from jaxdiff.losses.ddpm import ddpm_simple as ddpm_simple
from jaxdiff.losses.ncsn import ncsn as ncsn
from jaxdiff.losses.score_matching import denoising as denoising
