"""Training objectives: factories of `loss(key, x0, network, cond={}, u=None) -> (per-example [b], aux)`.

score matching     denoising, explicit, implicit, sliced          of a process, or of data as they are
                   hybrid                                         of velocities that move the data
discrete chains    ncsn, ddpm_simple, ddpm_hybrid, ddpm_elbo      of `ncsn.Chain` and `ddpm.Chain`
bounds on -log p   bound, vdm, ddpm_elbo                          in nats; their costs in bits per dimension
                   lsgm                                          of an autoencoder and a diffusion of its latents
-log p itself      ffjord                                         of a continuous normalizing flow, without u
-log p(y | x_t)    classification                                 of a classifier of noised data, for guidance
autoencoders       vae, vq, gumbel                                bounds on -log p, in nats, without u
adversarial        denoising_gan, patch_adversarial               of `Players`: a generator and a discriminator

`averaged(loss, draws)` evaluates a loss, `drop_conditions(loss, null, probability)` trains with and without them,
`noised_condition(loss, image, level, most)` on noised images; `weights` and `times` say where a loss looks; `decoders`
are for integers, `observations` for what an autoencoder puts out.
"""

from jaxdiff.losses import decoders as decoders
from jaxdiff.losses import observations as observations
from jaxdiff.losses import times as times
from jaxdiff.losses import weights as weights
from jaxdiff.losses.adversarial import Players as Players
from jaxdiff.losses.adversarial import denoising_gan as denoising_gan
from jaxdiff.losses.adversarial import patch_adversarial as patch_adversarial
from jaxdiff.losses.autoencoding import gumbel as gumbel
from jaxdiff.losses.autoencoding import vae as vae
from jaxdiff.losses.bounds import averaged as averaged
from jaxdiff.losses.bounds import bound as bound
from jaxdiff.losses.classification import classification as classification
from jaxdiff.losses.ddpm import ddpm_elbo as ddpm_elbo
from jaxdiff.losses.ddpm import ddpm_hybrid as ddpm_hybrid
from jaxdiff.losses.ddpm import ddpm_simple as ddpm_simple
from jaxdiff.losses.dropping import drop_conditions as drop_conditions
from jaxdiff.losses.ffjord import ffjord as ffjord
from jaxdiff.losses.hybrid import hybrid as hybrid
from jaxdiff.losses.lsgm import LatentModel as LatentModel
from jaxdiff.losses.lsgm import lsgm as lsgm
from jaxdiff.losses.ncsn import ncsn as ncsn
from jaxdiff.losses.noising import noised_condition as noised_condition
from jaxdiff.losses.score_matching import Loss as Loss
from jaxdiff.losses.score_matching import denoising as denoising
from jaxdiff.losses.score_matching import explicit as explicit
from jaxdiff.losses.score_matching import implicit as implicit
from jaxdiff.losses.score_matching import sliced as sliced
from jaxdiff.losses.vdm import vdm as vdm
from jaxdiff.losses.vector_quantization import vq as vq
