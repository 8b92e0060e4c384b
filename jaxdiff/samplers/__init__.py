"""Samplers: factories of `sampler(key, x_T, score, cond={}) -> Sample(x, nfe, path, status)`."""

from jaxdiff.samplers.probability_flow import interpolate as interpolate
from jaxdiff.samplers.probability_flow import probability_flow as probability_flow
from jaxdiff.samplers.probability_flow import probability_flow_encode as probability_flow_encode
from jaxdiff.samplers.reverse_sde import reverse_sde as reverse_sde
from jaxdiff.samplers.thresholding import thresholded as thresholded
