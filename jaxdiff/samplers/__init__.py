"""Samplers: factories of `sampler(key, x_T, score, cond={}) -> Sample(x, nfe, path, status)`.

    reverse SDE      reverse_sde, reverse_diffusion, stochastic_heun, adaptive_sde, predictor_corrector, sscs
    ancestral        ancestral (DDPM, SMLD), ddim, ddim_encode
    adversarial      denoising_gan
    exponential      dpm_solver, dpm_solver_pp, unipc
    flow             edm, probability_flow, probability_flow_encode, interpolate
    Langevin         langevin, mala, annealed_langevin, langevin_corrector
    your own         FixedGrid(sde, ts, Method(step, nodes, calls)), Corrector(step, nfe); thresholded(sde, score)

The formulas are in the module of each family, such as jaxdiff/samplers/ancestral.py.
"""

from jaxdiff.samplers.adaptive_sde import adaptive_sde as adaptive_sde
from jaxdiff.samplers.ancestral import ancestral as ancestral
from jaxdiff.samplers.ddim import ddim as ddim
from jaxdiff.samplers.ddim import ddim_encode as ddim_encode
from jaxdiff.samplers.denoising_gan import denoising_gan as denoising_gan
from jaxdiff.samplers.dpm_solver import dpm_solver as dpm_solver
from jaxdiff.samplers.dpm_solver_pp import dpm_solver_pp as dpm_solver_pp
from jaxdiff.samplers.edm import edm as edm
from jaxdiff.samplers.fixed_grid import Field as Field
from jaxdiff.samplers.fixed_grid import FixedGrid as FixedGrid
from jaxdiff.samplers.fixed_grid import Method as Method
from jaxdiff.samplers.langevin import annealed_langevin as annealed_langevin
from jaxdiff.samplers.langevin import langevin as langevin
from jaxdiff.samplers.langevin import mala as mala
from jaxdiff.samplers.predictor_corrector import Corrector as Corrector
from jaxdiff.samplers.predictor_corrector import langevin_corrector as langevin_corrector
from jaxdiff.samplers.predictor_corrector import predictor_corrector as predictor_corrector
from jaxdiff.samplers.probability_flow import interpolate as interpolate
from jaxdiff.samplers.probability_flow import probability_flow as probability_flow
from jaxdiff.samplers.probability_flow import probability_flow_encode as probability_flow_encode
from jaxdiff.samplers.reverse_sde import reverse_diffusion as reverse_diffusion
from jaxdiff.samplers.reverse_sde import reverse_sde as reverse_sde
from jaxdiff.samplers.reverse_sde import stochastic_heun as stochastic_heun
from jaxdiff.samplers.sscs import sscs as sscs
from jaxdiff.samplers.thresholding import thresholded as thresholded
from jaxdiff.samplers.unipc import unipc as unipc
