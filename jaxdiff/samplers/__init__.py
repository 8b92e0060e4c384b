"""Samplers: factories of `sampler(key, x_T, score, cond={}) -> Sample(x, nfe, path, status)`."""

from jaxdiff.samplers.ancestral import ancestral as ancestral
from jaxdiff.samplers.ddim import ddim as ddim
from jaxdiff.samplers.ddim import ddim_encode as ddim_encode
from jaxdiff.samplers.probability_flow import probability_flow as probability_flow
from jaxdiff.samplers.reverse_sde import reverse_sde as reverse_sde
