"""Training objectives: factories of `loss(key, x0, network, cond) -> (per-example [b], aux)`."""

from jaxdiff.losses import times as times
from jaxdiff.losses import weights as weights
from jaxdiff.losses.score_matching import denoising as denoising
