"""Samplers: factories of `sampler(key, x_T, score, cond={}) -> Sample(x, nfe, path, status)`."""

from jaxdiff.samplers.dpm_solver import dpm_solver as dpm_solver
from jaxdiff.samplers.dpm_solver_pp import dpm_solver_pp as dpm_solver_pp
from jaxdiff.samplers.edm import edm as edm
from jaxdiff.samplers.probability_flow import probability_flow as probability_flow
from jaxdiff.samplers.reverse_sde import reverse_sde as reverse_sde
from jaxdiff.samplers.unipc import unipc as unipc
