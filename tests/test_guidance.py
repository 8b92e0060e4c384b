"""Guided scores against exact ones: mixtures of Gaussians with labels, under every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, labelled_mixture

import jaxdiff as jd

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
NULL = {"label": 3}
LABEL = jnp.asarray([0, 1, 2, 0, 2, 1] * 3)


def points(sde):
  """States `[18, 2]` spread about the mixture, each six at a time of their own, and the times, in float64."""
  t = jnp.repeat(jnp.asarray([0.02, 0.3, 0.9]) * sde.t1, 6)
  alpha, sigma = (v[:, None] for v in sde.marginal(t))
  x0 = labelled_mixture().sample(jax.random.key(0), 18)
  return alpha * x0 + 1.5 * sigma * jax.random.normal(jax.random.key(1), x0.shape), t


def same(found, exact, tolerance=1e-6):
  """Close, in units of the largest exact value of the example."""
  size = jnp.max(jnp.abs(exact), axis=1, keepdims=True)
  np.testing.assert_allclose(found / size, exact / size, rtol=0, atol=tolerance)


def noise_model(sde):
  """A network that predicts the noise exactly under every label, as a score."""
  score = labelled_mixture().conditional_score(sde)
  noise = lambda params, x, t, label: -sde.marginal(t)[1][:, None] * score(x, t, label)
  return jd.score_fn(noise, None, sde, jd.predictions.noise())


def unconditional(sde):
  return jd.guidance.without(lambda x, t: noise_model(sde)(x, t, label=jnp.full(len(x), 3)), "label")


@EACH_SDE
def test_classifier_guidance_at_scale_1_is_the_conditional_score(sde, x64):
  data, (x, t) = labelled_mixture(), points(sde)
  everything = jax.tree_util.Partial(lambda params, x, t: noise_model(sde).apply(None, x, t, jnp.full(len(x), 3)))
  model = jd.guidance.without(jd.score_fn(everything, None, sde, jd.predictions.noise()), "label")
  guided = jd.guidance.classifier(model, data.log_posterior(sde), scale=1.0)
  same(jax.jit(guided.__call__)(x, t, label=LABEL), data.conditional_score(sde)(x, t, LABEL))
  same(jax.jit(guided.denoised)(x, t, label=LABEL), data.conditional_denoised(sde, x, t, LABEL))


@EACH_SDE
def test_classifier_free_guidance_is_the_score_of_the_tilted_density_at_every_time(sde, x64):
  data, gamma, (x, t) = labelled_mixture(), 2.5, points(sde)
  guided = jd.guidance.classifier_free(noise_model(sde), NULL, scale=gamma)
  tilted = lambda x: jnp.sum(data.log_prob(x, sde, t) + gamma * data.log_posterior(sde)(x, t, LABEL))
  same(jax.jit(guided.__call__)(x, t, label=LABEL), jax.grad(tilted)(x))
  each = [data.conditional_denoised(sde, x, t, label) for label in (LABEL, jnp.full_like(LABEL, 3))]
  same(jax.jit(guided.denoised)(x, t, label=LABEL), gamma * each[0] + (1 - gamma) * each[1])
