"""Editing: changing images, and making larger ones, with a model of images.

sdedit(sampler, repeats)         (key, x0, score, cond) -> Sample: noised in part, sampled from there
lower_part(ts, strength)         the part of a grid that `sdedit` takes
exchange(encode, decode)         (key, x, score, cond, new_cond) -> Sample: the image under another condition
interpolation(encode, decode)    (key, first, last, fractions, score, cond) -> Sample: images between two
panorama(score, canvas, ...)     a score in, the score of a large canvas out
cascade(stages)                  (key, x_T, scores, cond) -> Sample: small images, then larger ones given them
upsampler(sde, sampler, ...)     (key, small, score, cond) -> Sample: a stage of it

Each of `jaxdiff.samplers` and of `jaxdiff.guidance` goes with them. The formulas are in the module of each.
"""

from jaxdiff.editing.cascade import cascade as cascade
from jaxdiff.editing.cascade import upsampler as upsampler
from jaxdiff.editing.exchange import exchange as exchange
from jaxdiff.editing.interpolation import interpolation as interpolation
from jaxdiff.editing.panorama import panorama as panorama
from jaxdiff.editing.sdedit import lower_part as lower_part
from jaxdiff.editing.sdedit import sdedit as sdedit
