"""Score networks in flax.linen.

jaxdiff takes any callable (x, t, **cond) -> array; these are the ones it ships, the autoencoders of `losses.vae`,
`losses.vq` and `losses.gumbel`, and the flow `Dequantizer` of `likelihood.dequantization.variational`.
"""

from jaxdiff.models import conditioning as conditioning
from jaxdiff.models import presets as presets
from jaxdiff.models.autoencoder import AutoencoderKL as AutoencoderKL
from jaxdiff.models.classifier import Classifier as Classifier
from jaxdiff.models.dequantizer import Dequantizer as Dequantizer
from jaxdiff.models.discriminator import PatchDiscriminator as PatchDiscriminator
from jaxdiff.models.discriminator import StepDiscriminator as StepDiscriminator
from jaxdiff.models.discriminator import VectorDiscriminator as VectorDiscriminator
from jaxdiff.models.dit import DiT as DiT
from jaxdiff.models.mlp import MLP as MLP
from jaxdiff.models.ncsn import RefineNet as RefineNet
from jaxdiff.models.quantized import VQVAE as VQVAE
from jaxdiff.models.quantized import GumbelVAE as GumbelVAE
from jaxdiff.models.text import Text as Text
from jaxdiff.models.unet import UNet as UNet
from jaxdiff.models.vdm import VDMNet as VDMNet
