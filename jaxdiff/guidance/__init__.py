"""Guidance: functions from scores to a score, for every sampler and every process.

    classifier(score, log_prob, scale)           s + gamma grad log p(y | x_t): Dhariwal & Nichol 2021
      log_probability(apply, params)             log p(y | x_t) of a classifier network
      without(score, "label")                    the score, not told the label
      mean_shift(log_prob, scale)                the same on the mean: samplers.ancestral(..., shift=mean_shift(...))
    classifier_free(score, null, scale)          gamma s(x | y) + (1 - gamma) s(x): 1 is the conditional model
    classifier_free(score, null, extra=omega)    (1 + omega) s(x | y) - omega s(x): Ho & Salimans 2022
      interval(sde, scale, low, high)            a scale for some noise levels alone: Kynkaanniemi et al. 2024
    autoguidance(score, weak, scale)             gamma s + (1 - gamma) s_weak: Karras et al. 2024
    composed(score, null, scales)                s(x) + sum_i w_i (s(x | c_i) - s(x)): Liu et al. 2022

What they return is a score: it can be guided again, thresholded, and says how many network evaluations it takes. What
belongs to an example (labels, texts) is in `cond`; scales are one number for all. The formulas are in the module of
each, such as jaxdiff/guidance/classifier_free.py.
"""

from jaxdiff.guidance.autoguidance import autoguidance as autoguidance
from jaxdiff.guidance.classifier import classifier as classifier
from jaxdiff.guidance.classifier import log_probability as log_probability
from jaxdiff.guidance.classifier import mean_shift as mean_shift
from jaxdiff.guidance.classifier_free import classifier_free as classifier_free
from jaxdiff.guidance.composition import composed as composed
from jaxdiff.guidance.guided import Guided as Guided
from jaxdiff.guidance.interval import interval as interval
from jaxdiff.guidance.unconditional import without as without
