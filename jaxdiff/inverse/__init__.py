"""Inverse problems: samples of p(x | y) for y = A x + noise_std n, with a model of p(x) alone.

    operators        mask, crop, downsample, greyscale, blur, operator (of a function); Operator
    guided scores    pigdm, reconstruction: for any sampler, in fixed or adaptive steps
    wrapped samplers dps, projected, repaint: of a sampler on a grid; consistent: of any
    in one line      inpainting, colorization, super_resolution, deblurring, restoration (any operator)

The measurement is `cond["measurement"]`; what belongs to the operator of each image, such as its mask, is in cond too.
The score is told of neither. Formulas, and what is known of the bias of each method, are in the modules.
"""

from jaxdiff.inverse.dps import dps as dps
from jaxdiff.inverse.guided import pigdm as pigdm
from jaxdiff.inverse.guided import reconstruction as reconstruction
from jaxdiff.inverse.operators import Operator as Operator
from jaxdiff.inverse.operators import blur as blur
from jaxdiff.inverse.operators import crop as crop
from jaxdiff.inverse.operators import downsample as downsample
from jaxdiff.inverse.operators import greyscale as greyscale
from jaxdiff.inverse.operators import mask as mask
from jaxdiff.inverse.operators import operator as operator
from jaxdiff.inverse.projection import consistent as consistent
from jaxdiff.inverse.projection import projected as projected
from jaxdiff.inverse.repaint import repaint as repaint
from jaxdiff.inverse.restoration import colorization as colorization
from jaxdiff.inverse.restoration import deblurring as deblurring
from jaxdiff.inverse.restoration import inpainting as inpainting
from jaxdiff.inverse.restoration import restoration as restoration
from jaxdiff.inverse.restoration import super_resolution as super_resolution
