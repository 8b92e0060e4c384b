import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, gaussian

import jaxdiff as jd

X = 3 * jax.random.normal(jax.random.key(0), (4, 3))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_score_and_denoiser_agree_and_nothing_changes_within_the_range(sde, quantile, x64):
  t, x, score = 0.3 * sde.t1, X.astype(jnp.float64), gaussian().score(sde)
  alpha, sigma = sde.marginal(t)
  bounded = jd.samplers.thresholded(sde, score, limit=0.2, quantile=quantile)
  tweedie = (x + sigma**2 * bounded(x, t)) / alpha
  np.testing.assert_allclose(tweedie, bounded.denoised(x, t), rtol=1e-9, atol=1e-9)
  assert float(jnp.max(jnp.abs(bounded.denoised(x, t)))) <= 0.2 + 1e-12
  wide = jd.samplers.thresholded(sde, score, limit=1e6, quantile=quantile)
  batched = jnp.full(len(x), t)
  np.testing.assert_allclose(wide(x, t), score(x, batched), rtol=1e-9, atol=1e-12)


def test_dynamic_limit_is_the_quantile_of_the_example():
  """Values 1..4 of one example: at the quantile of 3, they are clipped to 3 and divided by it."""
  data = jnp.asarray([[1.0, 2.0, 3.0, -4.0], [0.1, 0.2, 0.3, 0.4]])

  model = jd.score_fn(lambda params, x, t: data, None, jd.VP(), jd.predictions.data())
  bounded = jd.samplers.thresholded(jd.VP(), model, quantile=2 / 3).denoised(jnp.zeros((2, 4)), 0.5)
  np.testing.assert_allclose(bounded, [[1 / 3, 2 / 3, 1.0, -1.0], [0.1, 0.2, 0.3, 0.4]], rtol=1e-6)


def test_a_thresholded_model_passes_through_jit_at_one_evaluation_a_step():
  sde, traces = jd.VP(), []

  def apply(params, x, t):
    traces.append(1)
    return params * x

  sampler = jax.jit(jd.samplers.reverse_sde(sde, jd.time_grid(sde, 5)))
  for scale in (2.0, 3.0):
    model = jd.score_fn(apply, jnp.float32(scale), sde, jd.predictions.data())
    sample = sampler(jax.random.key(0), X, jd.samplers.thresholded(sde, model))
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
