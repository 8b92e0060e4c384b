"""Critically-damped Langevin diffusion: data are positions, moved by velocities, and only velocities are noised.

    u, noise = cld.perturb(key, x0, t, sde)            state u: [b, *d, 2], position and velocity on the last axis
    score = cld.score_fn(apply, params, sde)           score(u, t) -> [b, *d, 2], for samplers and flows of any process
    x0 = score.denoised(u, t)                          the end of sampling: positions alone

`losses.hybrid` trains the network, `samplers.sscs` and `samplers.reverse_sde` sample on `cld.time_grid`, and
`likelihood.augmented` bounds the density of positions.
"""

from jaxdiff.cld.network import on_channels as on_channels
from jaxdiff.cld.network import score_fn as score_fn
from jaxdiff.cld.network import velocity_noise as velocity_noise
from jaxdiff.cld.process import CLD as CLD
from jaxdiff.cld.process import AugmentedSDE as AugmentedSDE
from jaxdiff.cld.process import join as join
from jaxdiff.cld.process import perturb as perturb
from jaxdiff.cld.process import split as split
from jaxdiff.cld.process import start_time as start_time
from jaxdiff.cld.process import time_grid as time_grid
