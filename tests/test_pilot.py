"""The choice of a trace estimator, on data of known covariance with the exact score, where every spread is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import likelihood
from jaxdiff.divergence import bases
from jaxdiff.schedules import start_time

SDE = jd.VP()


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coarse_images(n):
  """4 x 4 images whose DCT coefficients are independent and fall with the frequency; their variances."""
  frequency = np.add.outer(np.arange(4), np.arange(4))
  deviation = np.float32(2.0**-frequency)[None, :, :, None]
  noise = normal(0, (n, 4, 4, 1))
  return jax.jit(bases.DCT.synthesize)(deviation * noise), deviation.ravel() ** 2


def vectors():
  """The rows of Q^T, flat."""
  return np.asarray(jax.jit(bases.DCT.synthesize)(np.eye(16, dtype=np.float32).reshape(16, 4, 4, 1))).reshape(16, 16)


def score_of(variance):
  rows = vectors()

  def score(x, t):
    alpha, sigma = (v[:, None] for v in SDE.marginal(t))
    coordinates = x.reshape(-1, 16) @ rows.T / (alpha**2 * variance[None] + sigma**2)
    return -(coordinates @ rows).reshape(x.shape)

  return score


def test_the_spreads_of_a_gaussian_model_are_those_of_the_formula():
  """Of pixels: 2 sum of the squares off the diagonal of Q diag(growth) Q^T, 10% for 64 examples of 4 probes. The DCT
  has none but the solver's error."""
  x, variance = coarse_images(64)
  log_prob_of = lambda divergence: likelihood.log_prob(SDE, divergence, 1e-3, 1e-3)
  usual = likelihood.candidates(x, probes=4)
  kept = {name: usual[name] for name in ("pixels", "dct")}
  result = likelihood.pilot(jax.random.key(1), x, score_of(variance), log_prob_of, kept)
  alpha, sigma = SDE.marginal(jnp.stack([start_time(SDE, None, 1e-3), jnp.float32(1.0)]))
  growth = (
    0.5 * np.diff(np.log(np.outer(np.asarray(alpha) ** 2, variance) + np.asarray(sigma)[:, None] ** 2), axis=0)[0]
  )
  q = vectors().T
  jacobian = q @ np.diag(growth) @ q.T
  expected = np.sqrt(2 * (np.sum(jacobian**2) - np.sum(np.diag(jacobian) ** 2))) / 16
  np.testing.assert_allclose(result.spread["pixels"], expected, rtol=0.1)
  assert result.spread["dct"] < 0.01 * expected
  assert result.best == "dct"


def test_candidates_fit_the_data():
  x = normal(0, (20, 6))
  assert list(likelihood.candidates(x)) == ["pixels", "pixels+control", "pca"]
  names = ["pixels", "pixels+control", "dct", "dct+control", "color_dct", "color_dct+control", "pca"]
  assert list(likelihood.candidates(normal(0, (9, 2, 2, 3)))) == names
  large = np.zeros((2, 4, 5000), np.float32)
  assert list(likelihood.candidates(large)) == ["pixels", "pixels+control", "dct"]
  assert list(likelihood.candidates(large.reshape(2, -1))) == ["pixels"]
  draw = likelihood.candidates(x, 5)["pca"].draw
  assert jax.eval_shape(draw, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 20)), x).shape == (20, 5, 6)


def test_bad_candidates_are_refused():
  x, log_prob_of = jnp.ones((2, 3)), lambda divergence: likelihood.log_prob(SDE, divergence, max_steps=1)
  run = lambda candidates: likelihood.pilot(jax.random.key(0), x, lambda x, t: -x, log_prob_of, candidates)
  with pytest.raises(ValueError, match="candidates must hold at least one"):
    run({})
  with pytest.raises(ValueError, match=r"candidates\['one'\] has one probe.*give it 2"):
    run({"one": jd.divergence.hutchinson()})
  with pytest.raises(jd.SolveError, match="2 of 2 examples"):
    run({"two": jd.divergence.hutchinson(2)})
