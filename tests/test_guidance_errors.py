"""What guidance refuses, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

guidance = jd.guidance
X = np.ones((2, 3), np.float32)
LABEL = np.array([0, 1], np.int32)


def score(x, t, **cond):
  return -x


def log_prob(x, t, **cond):
  return -jnp.sum(x**2, axis=1)


MADE = [
  (lambda: guidance.classifier(score, log_prob, -1.0), ValueError, "scale must be at least 0, got -1.0"),
  (lambda: guidance.classifier(score, log_prob, float("nan")), ValueError, "scale must be at least 0, got nan"),
  (
    lambda: guidance.classifier(score, log_prob, np.ones(2)),
    ValueError,
    r"scale must be one number .* got shape \(2,\)",
  ),
  (
    lambda: guidance.classifier(score, log_prob, lambda t: t),
    TypeError,
    "scale must be one number here, got a function",
  ),
  (lambda: guidance.mean_shift(log_prob, -1.0), ValueError, "scale must be at least 0"),
  (lambda: guidance.classifier(3, log_prob, 1.0), TypeError, "score must be a score, .* got int"),
  (lambda: guidance.classifier(jd.score_fn, log_prob, 1.0), TypeError, "score is a factory"),
  (lambda: guidance.classifier(score, None, 1.0), TypeError, "log_prob must be a function .* got NoneType"),
  (lambda: guidance.log_probability(None, None), TypeError, r"apply must be a function .* got NoneType"),
  (lambda: guidance.without(score), ValueError, "names is empty"),
  (lambda: guidance.without(score, LABEL), TypeError, "names must be words"),
  (
    lambda: guidance.classifier_free(score, {"label": 3}),
    ValueError,
    "give either scale .* got scale=None, extra=None",
  ),
  (lambda: guidance.classifier_free(score, {"label": 3}, 2.0, extra=1.0), ValueError, "got scale=2.0, extra=1.0"),
  (lambda: guidance.classifier_free(score, {"label": 3}, extra=-0.5), ValueError, "extra must be at least 0, got -0.5"),
  (lambda: guidance.classifier_free(score, {"label": 3}, -0.5), ValueError, "scale must be at least 0, got -0.5"),
  (lambda: guidance.classifier_free(score, {}, 2.0), ValueError, "null is empty"),
  (lambda: guidance.classifier_free(score, 3, 2.0), TypeError, "null must be a dict .* got int"),
  (lambda: guidance.classifier_free(score, {"label": 3}, guidance.interval), TypeError, "scale is a factory"),
  (
    lambda: guidance.classifier_free(score, {"label": 3}, 2.0, rescale=1.5),
    ValueError,
    r"rescale must lie in \[0, 1\]",
  ),
  (
    lambda: guidance.classifier_free(score, {"label": 3}, 2.0, rescale=0.7),
    TypeError,
    "needs the process of the score",
  ),
  (lambda: guidance.autoguidance(score, None, 2.0), TypeError, "weak must be a score"),
  (lambda: guidance.autoguidance(score, score, -2.0), ValueError, "scale must be at least 0"),
  (lambda: guidance.composed(score, {}, [1.0]), ValueError, "null is empty"),
  (lambda: guidance.composed(score, {"label": 3}, []), ValueError, r"scales must be \[k\], .* got shape \(0,\)"),
  (lambda: guidance.composed(score, {"label": 3}, 2.0), ValueError, r"scales must be \[k\], .* got shape \(\)"),
  (lambda: guidance.interval(jd.VP(), 2.0, 3.0, 3.0), ValueError, "0 <= low < high; got 3.0 and 3.0"),
  (lambda: guidance.interval(jd.VP(), 2.0, -1.0, 3.0), ValueError, "0 <= low < high; got -1.0 and 3.0"),
  (lambda: guidance.interval(jd.VP(), -2.0, 1.0, 3.0), ValueError, "scale must be at least 0"),
  (lambda: guidance.interval(jd.VP, 2.0, 1.0, 3.0), TypeError, "sde is a class"),
  (
    lambda: jd.samplers.ancestral(jd.VP(), [1.0, 0.5], shift=3),
    TypeError,
    r"shift must be a function \(mean, variance, t_next, \*\*cond\) .* got int",
  ),
]
CALLED = [
  (lambda: guidance.classifier(score, lambda x, t: x, 1.0)(X, 0.5), "log_prob must be one number per example"),
  (
    lambda: guidance.classifier_free(score, {"label": 3}, 2.0)(X, 0.5),
    "cond lacks 'label', which null names; it has none",
  ),
  (
    lambda: guidance.classifier_free(score, {"label": 3}, 2.0)(X, 0.5, labels=LABEL),
    r"cond lacks 'label', which null names; it has \['labels'\]",
  ),
  (
    lambda: guidance.classifier_free(score, {"text": np.zeros(4)}, 2.0)(X, 0.5, text=np.ones((2, 5), np.float32)),
    r"null\['text'\] must be a number, or an array of the shape .* \(5,\); got shape \(4,\)",
  ),
  (
    lambda: guidance.classifier_free(score, {"label": 0.5}, 2.0)(X, 0.5, label=LABEL),
    r"cond\['label'\] has dtype int32, which cannot hold its null 0.5",
  ),
  (
    lambda: guidance.classifier_free(score, {"label": 3}, lambda t: t[:1])(X, 0.5, label=LABEL),
    r"scale\(t\) must be one number per example, \[2\]; got shape \(1,\)",
  ),
  (
    lambda: guidance.composed(score, {"label": 3}, [1.0, 1.0])(X, 0.5, label=LABEL),
    r"cond\['label'\] must be \[b, 2, ...\], a condition .* got shape \(2,\)",
  ),
  (
    lambda: guidance.composed(score, {"label": 3}, [1.0, 1.0])(X, 0.5, label=np.stack([LABEL] * 3, 1)),
    r"cond\['label'\] must be \[b, 2, ...\], a condition .* got shape \(2, 3\)",
  ),
  (lambda: guidance.log_probability(lambda p, x, t: x, None)(X, 0.5), "cond lacks 'label', integers"),
  (
    lambda: guidance.log_probability(lambda p, x, t: x[0], None)(X, 0.5, label=LABEL),
    r"must return logits \[b, classes\]",
  ),
  (
    lambda: jd.samplers.ancestral(jd.VP(), [1.0, 0.5], shift=lambda mean, variance, t: mean[:, :1])(
      jax.random.key(0), X, score
    ),
    r"shift must return an array of the shape of x, \(2, 3\); got \(2, 1\)",
  ),
]


@pytest.mark.parametrize(("make", "error", "message"), MADE)
def test_bad_arguments_are_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize(("call", "message"), CALLED)
def test_bad_conditions_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_labels_must_be_integers():
  with pytest.raises(TypeError, match=r"cond\['label'\] must be integers \[b\], got float32"):
    guidance.log_probability(lambda params, x, t: x, None)(X, 0.5, label=np.ones(2, np.float32))


def test_traced_scales_pass():
  guided = jax.jit(lambda gamma: guidance.classifier_free(score, {"label": 3}, gamma)(X, 0.5, label=LABEL))
  assert guided(2.0).shape == X.shape
