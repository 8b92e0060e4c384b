"""Editing: changing images, and making larger ones, with a model of images.

sdedit(sampler, repeats)        (key, x0, score, cond) -> Sample: noised in part, sampled from there
lower_part(ts, strength)        the part of a grid that `sdedit` takes
"""

from jaxdiff.editing.sdedit import lower_part as lower_part
from jaxdiff.editing.sdedit import sdedit as sdedit
