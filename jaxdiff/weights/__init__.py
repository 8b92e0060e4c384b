"""Weights in files: those of published networks as ours, and ours as safetensors."""

from jaxdiff.weights.diffusers import Chain as Chain
from jaxdiff.weights.diffusers import Published as Published
from jaxdiff.weights.diffusers import load as load
from jaxdiff.weights.files import WeightsError as WeightsError
from jaxdiff.weights.saved import restore as restore
from jaxdiff.weights.saved import save as save
