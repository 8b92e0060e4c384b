"""Bounds of autoencoders against exact likelihoods, of probabilistic PCA and of few codes; gradients of the VQ-VAE."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from oracles import compiled

from jaxdiff import keys, latents, losses, quantization
from jaxdiff.losses import autoencoding, observations
from jaxdiff.typing import Autoencoder, DiscreteAutoencoder, QuantizedAutoencoder

STD, LATENTS, DIMENSION = 0.6, 2, 4


def linear_gaussian(shift=0.0, narrower=1.0):
  """x = W z + m + 0.6 eps with orthogonal columns in W, for which the posterior of z has no correlations.

  Returns the autoencoder, whose posterior is the exact one but for a shift and a narrower std, and the exact
  log-density of x.
  """
  rng = np.random.default_rng(0)
  w = np.linalg.qr(rng.normal(size=(DIMENSION, LATENTS)))[0] * np.array([2.0, 0.5])
  m = rng.normal(size=DIMENSION)
  precision = (np.sum(w**2, 0) + STD**2) / STD**2
  to_mean = w / STD**2 / precision

  def encode(x):
    mean = (x - m[None]) @ to_mean + shift
    return mean, jnp.broadcast_to(-jnp.log(precision) + 2 * math.log(narrower), mean.shape)

  exact = scipy.stats.multivariate_normal(m, w @ w.T + STD**2 * np.eye(DIMENSION))
  return Autoencoder(encode, lambda z: z @ w.T + m[None]), exact, precision


DATA = np.random.default_rng(1).normal(size=(3, DIMENSION))


def expected(monkeypatch, network, beta=1.0):
  """The exact mean of the loss: that of a quadratic in the noise, which is its mean over +- sqrt(k) e_i."""
  points = math.sqrt(LATENTS) * np.concatenate([np.eye(LATENTS), -np.eye(LATENTS)])
  noise = np.tile(points, (len(DATA), 1))
  monkeypatch.setattr(keys, "normal", lambda key, shape, dtype: jnp.asarray(noise, dtype).reshape(shape))
  x = np.repeat(DATA, 2 * LATENTS, axis=0)
  value, aux = compiled(
    lambda key, x: losses.vae(observations.gaussian(STD), beta)(key, x, network), jax.random.key(0), x
  )
  mean = lambda v: np.asarray(v).reshape(len(DATA), -1).mean(1)
  return mean(value), jax.tree.map(mean, aux)


def test_the_vae_bound_of_the_exact_posterior_is_the_likelihood_of_probabilistic_pca(x64, monkeypatch):
  network, exact, _ = linear_gaussian()
  value, aux = expected(monkeypatch, network)
  np.testing.assert_allclose(value, -exact.logpdf(DATA), rtol=1e-12)
  np.testing.assert_allclose(aux["reconstruction"] + aux["kl"], aux["nats"], rtol=1e-12)
  assert (aux["kl"] > 0.5).all()


def test_the_gap_of_another_posterior_is_its_divergence_from_the_exact_one(x64, monkeypatch):
  shift, narrower = 0.3, 0.8
  network, exact, precision = linear_gaussian(shift, narrower)
  ratio = narrower**2
  gap = 0.5 * np.sum(shift**2 * precision + ratio - 1 - np.log(ratio))
  value, _ = expected(monkeypatch, network)
  np.testing.assert_allclose(value + exact.logpdf(DATA), gap, rtol=1e-11)


def test_beta_weighs_the_divergence_and_leaves_the_bound(x64, monkeypatch):
  network, exact, _ = linear_gaussian()
  value, aux = expected(monkeypatch, network, beta=0.25)
  np.testing.assert_allclose(value, aux["reconstruction"] + 0.25 * aux["kl"], rtol=1e-12)
  np.testing.assert_allclose(aux["nats"], -exact.logpdf(DATA), rtol=1e-12)


def test_the_vae_draws_its_latents_from_the_posterior():
  """The mean over keys is the exact likelihood within four standard errors; keys belong to examples."""
  network, exact, _ = linear_gaussian()
  loss = jax.jit(lambda key, x: losses.vae(observations.gaussian(STD))(key, x, network)[0])
  x = np.broadcast_to(DATA[:1].astype(np.float32), (20_000, DIMENSION))
  with jax.numpy_dtype_promotion("standard"):
    values = np.asarray(loss(jax.random.key(0), x), np.float64)
    some = loss(keys.example_keys(jax.random.key(0), 7, 3), x[:3])
  assert abs(values.mean() + exact.logpdf(DATA[0])) < 4 * values.std() / math.sqrt(len(values))
  np.testing.assert_allclose(some, values[7:10], rtol=1e-5)


def test_closed_forms_of_the_divergences(x64):
  rng = np.random.default_rng(2)
  mean, log_variance = rng.normal(size=(2, 3, 4))
  normal = lambda m, s: scipy.stats.norm(m, s)
  nodes, weights = np.polynomial.hermite_e.hermegauss(40)
  z = mean[..., None] + np.exp(0.5 * log_variance)[..., None] * nodes
  ratio = normal(mean[..., None], np.exp(0.5 * log_variance)[..., None]).logpdf(z) - normal(0, 1).logpdf(z)
  kl = (ratio @ weights / math.sqrt(2 * math.pi)).sum(1)
  logits = rng.normal(size=(3, 2, 5))
  q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  entropy = scipy.stats.entropy(q, axis=-1).sum(1)
  of_normal, of_codes, of_even = compiled(
    lambda *q: (latents.kl(latents.Posterior(*q[:2])), *map(autoencoding.categorical_kl, q[2:])),
    *(mean, log_variance, logits, np.zeros((1, 2, 5))),
  )
  np.testing.assert_allclose(of_normal, kl, rtol=1e-10)
  np.testing.assert_allclose(of_codes, 2 * math.log(5) - entropy, rtol=1e-12)
  np.testing.assert_allclose(of_even, 0, atol=1e-12)


CODES, POSITIONS, LEVELS = 3, 2, 4


@functools.cache
def mixture():
  """A model of two integers with two codes of three values each: its output, and every log p(x, codes)."""
  table = np.random.default_rng(0).normal(scale=2.0, size=(POSITIONS, CODES, 2 * LEVELS)).astype(np.float32)
  decode = lambda p: jnp.einsum("bpk,pkc->bc", p, table)
  pairs, x = np.array(list(itertools.product(range(CODES), repeat=POSITIONS))), np.array([[1, 3]])
  log_prob = lambda p: observations.categorical(LEVELS).log_prob(jnp.broadcast_to(x, pairs.shape), decode(p))
  conditional = compiled(log_prob, np.eye(CODES, dtype=np.float32)[pairs])
  return x, decode, pairs, np.asarray(conditional, np.float64) - POSITIONS * math.log(CODES)


@pytest.mark.parametrize("right", [True, False])
def test_the_gumbel_bound_is_that_of_all_codes(right):
  """Evaluated by one-hot samples; the exact mean is a sum over all pairs of codes."""
  x, decode, pairs, joint = mixture()
  marginal = scipy.special.logsumexp(joint)
  # The best independent codes come near the posterior, which has none; others are worse.
  logits = np.zeros((POSITIONS, CODES))
  if right:
    for _ in range(50):  # coordinate ascent of the mean field
      for p in range(POSITIONS):
        other = scipy.special.softmax(logits[1 - p])
        table = joint.reshape(CODES, CODES) if p == 0 else joint.reshape(CODES, CODES).T
        logits[p] = table @ other
  q = scipy.special.softmax(logits, axis=-1)
  weights = np.prod(q[np.arange(POSITIONS), np.asarray(pairs)], axis=1)
  bound = -np.sum(weights * (joint - np.log(weights)))
  assert bound + marginal > 0
  assert (bound + marginal < 0.2) == right
  network = DiscreteAutoencoder(
    lambda s: jnp.broadcast_to(jnp.asarray(logits, s.dtype), (len(s), *logits.shape)), decode
  )
  loss = losses.gumbel(observations.categorical(LEVELS))
  value, aux = compiled(lambda key, x: loss(key, x, network), jax.random.key(1), np.broadcast_to(x, (20_000, 2)))
  value = np.asarray(value, np.float64)
  assert abs(value.mean() - bound) < 4 * value.std() / math.sqrt(len(value))
  assert sorted(aux) == ["kl", "nats", "reconstruction"]


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_in_training_relaxes_at_the_temperature_of_the_step(hard):
  x, decode, _, _ = mixture()
  temperature = quantization.annealed(1.0, 0.1, steps=10)
  loss = losses.gumbel(observations.categorical(LEVELS), temperature, 0.5, hard)

  def run(key, logits, step):
    value = lambda logits: loss(key, jnp.asarray(x), DiscreteAutoencoder(lambda s: logits, decode), step=step)
    sample = quantization.gumbel_softmax(key, logits, math.sqrt(0.1), hard)
    reconstruction = -observations.categorical(LEVELS).log_prob(jnp.asarray(x), decode(sample))
    kl = autoencoding.categorical_kl(logits)
    return value(logits), reconstruction, kl, jax.grad(lambda logits: value(logits)[0][0])(logits)

  logits = np.random.default_rng(2).normal(size=(1, POSITIONS, CODES)).astype(np.float32)
  (value, aux), reconstruction, kl, gradient = compiled(run, jax.random.key(3), logits, np.int32(5))
  np.testing.assert_allclose(aux["reconstruction"], reconstruction, rtol=1e-5)
  np.testing.assert_allclose(value, reconstruction + 0.5 * kl, rtol=1e-5)
  np.testing.assert_allclose(aux["temperature"], [math.sqrt(0.1)], rtol=1e-6)
  assert np.abs(gradient).min() > 1e-5


def vq_network(z, codebook, decode=lambda z: z[..., 0]):
  return QuantizedAutoencoder(lambda x: z, decode, jax.tree.map(jnp.asarray, codebook))


def vq_case():
  rng = np.random.default_rng(3)
  x, z, vectors = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), (4, 6, 2), (5, 2)))
  return x, z, vectors, lambda z: jnp.sin(z[..., 0]) + z[..., 1] ** 2


def squared_distances(z, vectors):
  return np.sum((z[:, :, None] - vectors[None, None]) ** 2, -1)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_vq_gradients_are_those_of_their_definition(codebook):
  """For z the gradient of -log p at z_q and of the commitment; for codes 2 sum (e_k - z), or none."""
  x, z, vectors, decode = vq_case()
  loss = losses.vq(observations.gaussian(STD), beta=0.7, codebook=codebook)
  total = lambda z, vectors: loss(jax.random.key(0), jnp.asarray(x), vq_network(z, {"vectors": vectors}, decode))[
    0
  ].sum()
  for_z, for_vectors = compiled(jax.grad(total, (0, 1)), z, vectors)
  codes = squared_distances(z, vectors).argmin(-1)
  quantized = vectors[codes]
  inner = np.sin(quantized[..., 0]) + quantized[..., 1] ** 2 - x
  slope = inner[..., None] / STD**2 * np.stack([np.cos(quantized[..., 0]), 2 * quantized[..., 1]], axis=-1)
  np.testing.assert_allclose(for_z, slope + 2 * 0.7 * (z - quantized), rtol=1e-4, atol=1e-4)
  due = np.zeros((5, 2))
  np.add.at(due, codes, 2 * (quantized - z))
  np.testing.assert_allclose(for_vectors, due if codebook == "loss" else 0, rtol=1e-4, atol=1e-5)
  assert np.abs(due).max() > 1


def test_the_vq_bound_is_above_the_likelihood_of_all_codes():
  """The model has 5^2 equally probable pairs of codes at two positions, which can be summed over."""
  x, z, vectors, decode = vq_case()
  x, z = x[:, :2], z[:, :2]
  loss = losses.vq(observations.gaussian(STD), beta=0.7)
  value, aux = compiled(lambda z: loss(jax.random.key(0), x, vq_network(z, {"vectors": vectors}, decode)), z)
  out = np.sin(vectors[:, 0]) + vectors[:, 1] ** 2
  every = [scipy.stats.norm.logpdf(x, out[list(pair)], STD).sum(1) for pair in itertools.product(range(5), repeat=2)]
  terms = -np.stack(every) + 2 * math.log(5)  # each is the bound of a posterior that is sure of its pair
  assert np.all(aux["nats"] > -scipy.special.logsumexp(-terms, axis=0))
  distances = squared_distances(z, vectors)
  np.testing.assert_allclose(aux["nats"], terms[distances.argmin(-1) @ [5, 1], np.arange(4)], rtol=1e-5)
  np.testing.assert_allclose(aux["nats"] - aux["reconstruction"], 2 * math.log(5), rtol=1e-5)
  np.testing.assert_allclose(aux["commitment"], distances.min(-1).sum(1), rtol=1e-5)
  np.testing.assert_allclose(value, aux["nats"] + 0.7 * distances.min(-1).sum(1), rtol=1e-5)


def test_statistics_add_exactly_nothing_to_the_loss_nor_to_the_gradient_of_the_encoder():
  x, z, vectors, decode = vq_case()
  codebook = {"vectors": vectors, "counts": vectors[:, 0], "sums": 3 * vectors}
  loss = losses.vq(observations.gaussian(STD))
  training = {"step": np.int32(3), "index": np.arange(4, dtype=np.int32), "global_batch": 4}

  def total(z, given):
    value, aux = loss(jax.random.key(0), jnp.asarray(x), vq_network(z, codebook, decode), **given)
    return value.sum(), (value, aux)

  run = lambda z: [jax.value_and_grad(total, has_aux=True)(z, given) for given in ({}, training)]
  jax.tree.map(np.testing.assert_array_equal, *compiled(run, z))


def test_wrong_use_is_refused():
  gaussian, key, x = observations.gaussian(1.0), jax.random.key(0), np.zeros((2, 3), np.float32)
  same = Autoencoder(lambda x: (x, x), lambda z: z)
  refused = lambda loss, x, network, *more, **given: jax.eval_shape(lambda x: loss(key, x, network, *more, **given), x)
  one = {"vectors": np.zeros((1, 1), np.float32)}
  for factory in (losses.vae, losses.gumbel, losses.vq):
    with pytest.raises(TypeError, match=r"did you forget to call it: .*gaussian\(\)"):
      factory(observations.gaussian)
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
      factory(gaussian, beta=-1)
  with pytest.raises(ValueError, match=r"cond has \['label'\]: autoencoders take no conditions"):
    refused(losses.vae(gaussian), x, same, {"label": np.zeros(2, np.int32)})
  with pytest.raises(ValueError, match=r"decode must return 2 outputs a channel of x \(2, 3\), \(2, 6\)"):
    refused(losses.vae(observations.discretized(3)), np.zeros((2, 3), np.int32), same)
  with pytest.raises(TypeError, match="x must be floating point for observations.gaussian, got int32"):
    refused(losses.vae(gaussian), np.zeros((2, 3), np.int32), same)
  with pytest.raises(ValueError, match="codes must be at least 2"):
    refused(losses.vq(gaussian), x, vq_network(x[..., None], one))
  with pytest.raises(ValueError, match="codes must be at least 2"):
    refused(losses.gumbel(gaussian), x, DiscreteAutoencoder(lambda x: x[..., None], lambda p: p[..., 0]))
  with pytest.raises(ValueError, match="codebook must be one of 'ema', 'loss', got 'adam'"):
    losses.vq(gaussian, codebook="adam")
  with pytest.raises(TypeError, match="temperature must be a function of the step, got 0.5: for one that stays take"):
    losses.gumbel(gaussian, temperature=0.5)
  two = vq_network(x[..., None], {"vectors": np.zeros((2, 1), np.float32)})
  with pytest.raises(ValueError, match="step, index and global_batch belong together"):
    refused(losses.vq(gaussian), x, two, step=np.int32(0))
