import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled, gaussian
from switch import EACH_SDE

import jaxdiff as jd

X = 3 * np.random.default_rng(0).standard_normal((4, 3))


@functools.cache
def bounded(quantile):
  def run(sde, x):
    t, score = 0.3 * sde.t1, gaussian().score(sde)
    near, wide = (jd.samplers.thresholded(sde, score, limit=limit, quantile=quantile) for limit in (0.2, 1e6))
    return near(x, t), near.denoised(x, t), wide(x, t), score(x, jnp.full(4, t)), sde.marginal(t)

  return jax.jit(run)


@EACH_SDE
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_score_and_denoiser_agree_and_nothing_changes_within_the_range(sde, quantile, x64):
  score, denoised, wide, plain, (alpha, sigma) = jax.device_get(bounded(quantile)(sde, X))
  np.testing.assert_allclose((X + sigma**2 * score) / alpha, denoised, rtol=1e-9, atol=1e-9)
  assert np.max(np.abs(denoised)) <= 0.2 + 1e-12
  np.testing.assert_allclose(wide, plain, rtol=1e-9, atol=1e-12)


def test_dynamic_limit_is_the_quantile_of_the_example():
  """Values 1..4 of one example: at the quantile of 3, they are clipped to 3 and divided by it."""
  data = np.asarray([[1.0, 2.0, 3.0, -4.0], [0.1, 0.2, 0.3, 0.4]], np.float32)

  model = jd.score_fn(lambda params, x, t: jnp.asarray(data), None, jd.VP(), jd.predictions.data())
  score = jd.samplers.thresholded(jd.VP(), model, quantile=2 / 3)
  bounded = compiled(lambda x: score.denoised(x, 0.5), np.zeros((2, 4), np.float32))
  np.testing.assert_allclose(bounded, [[1 / 3, 2 / 3, 1.0, -1.0], [0.1, 0.2, 0.3, 0.4]], rtol=1e-6)


def test_a_thresholded_model_passes_through_jit_at_one_evaluation_a_step():
  sde, traces = jd.VP(), []

  def apply(params, x, t):
    traces.append(1)
    return params * x

  sampler = jax.jit(jd.samplers.reverse_sde(sde, np.linspace(1, 0.1, 6, dtype=np.float32)))
  for scale in (2.0, 3.0):
    model = jd.score_fn(apply, jnp.float32(scale), sde, jd.predictions.data())
    sample = sampler(jax.random.key(0), X.astype(np.float32), jd.samplers.thresholded(sde, model))
  assert len(traces) == 1
  assert sample.nfe.tolist() == [5] * 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"limit": 0.0}, "limit must be positive, the largest size of the data; got 0.0"),
    ({"quantile": 99.5}, r"quantile must lie in \(0, 1\], or be None for clipping; got 99.5"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    jd.samplers.thresholded(jd.VP(), lambda x, t: -x, **options)
