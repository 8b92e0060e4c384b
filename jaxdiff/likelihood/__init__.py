"""Likelihoods: `log_prob(sde, ...) -> fn(key, x0, score, cond={}) -> LogProb`, bits per dimension of integers, bounds
of latent diffusion and of models of positions and velocities, and which trace estimator to take."""

from jaxdiff.flow import LogDensity as LogDensity
from jaxdiff.likelihood import dequantization as dequantization
from jaxdiff.likelihood.augmented import PositionBound as PositionBound
from jaxdiff.likelihood.augmented import augmented as augmented
from jaxdiff.likelihood.augmented import position_bound as position_bound
from jaxdiff.likelihood.bits import BitsPerDim as BitsPerDim
from jaxdiff.likelihood.bits import bits_per_dim as bits_per_dim
from jaxdiff.likelihood.bits import nats_to_bits_per_dim as nats_to_bits_per_dim
from jaxdiff.likelihood.conditional import EachCondition as EachCondition
from jaxdiff.likelihood.conditional import each_condition as each_condition
from jaxdiff.likelihood.density import log_prob as log_prob
from jaxdiff.likelihood.dequantization import Dequantization as Dequantization
from jaxdiff.likelihood.dequantization import dequantize as dequantize
from jaxdiff.likelihood.dequantization import dequantized as dequantized
from jaxdiff.likelihood.latent import LatentBound as LatentBound
from jaxdiff.likelihood.latent import latent_elbo as latent_elbo
from jaxdiff.likelihood.latent import latent_ode as latent_ode
from jaxdiff.likelihood.pilot import PCA_UP_TO as PCA_UP_TO
from jaxdiff.likelihood.pilot import Pilot as Pilot
from jaxdiff.likelihood.pilot import candidates as candidates
from jaxdiff.likelihood.pilot import pilot as pilot
