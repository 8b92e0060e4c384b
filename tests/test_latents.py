"""Gaussian posteriors against scipy, their statistics against samples, scaled autoencoders."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from linear_gaussian import MODEL

import jaxdiff as jd
from jaxdiff import latents


def posteriors(n=64, shape=(2, 3), scale=2.0):
  """Means and log variances of which the last channel is inactive."""
  mean, log_variance = np.random.default_rng(0).normal(size=(2, n, *shape))
  mean = scale * mean * [1.0, 0.5, 0.0] + 0.3
  return jax.tree.map(jnp.asarray, latents.Posterior(mean, 0.5 * log_variance - 1))


def test_density_entropy_and_divergence_are_scipy_s(x64):
  q = posteriors(4)
  run = jax.jit(lambda q, z: (latents.log_prob(q, z), latents.entropy(q), latents.kl(q)))
  z = np.random.default_rng(1).normal(size=q.mean.shape)
  log_prob, entropy, divergence = run(q, z)
  each = scipy.stats.norm(np.asarray(q.mean), np.exp(0.5 * np.asarray(q.log_variance)))
  np.testing.assert_allclose(log_prob, each.logpdf(z).sum((1, 2)), rtol=1e-12)
  np.testing.assert_allclose(entropy, each.entropy().sum((1, 2)), rtol=1e-12)
  variance = np.exp(np.asarray(q.log_variance))
  kl = 0.5 * (np.asarray(q.mean) ** 2 + variance - 1 - np.log(variance)).sum((1, 2))
  np.testing.assert_allclose(divergence, kl, rtol=1e-12)


def test_samples_have_the_posterior_s_moments():
  n = 40_000
  q = jax.tree.map(lambda v: np.broadcast_to(v, (n, *v.shape[1:])), posteriors(1))
  z = np.asarray(jax.jit(latents.sample)(jd.example_keys(jax.random.key(1), 0, n), q))
  std = np.exp(0.5 * q.log_variance[0])
  np.testing.assert_array_less(np.abs(z.mean(axis=0) - q.mean[0]), 4 * std / np.sqrt(n))
  np.testing.assert_allclose(z.std(axis=0), std, rtol=4 / np.sqrt(2 * n))


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_scale_gives_samples_unit_variance(per_channel):
  """Over data, draws and units: 4 standard errors of the 64 means and their draws, by 1000 draws each."""
  q = posteriors()
  found = latents.statistics(q, per_channel)
  keys = jd.example_keys(jax.random.key(1), 0, 64)
  draws = jax.jit(jax.vmap(lambda keys, k: latents.sample(jd.keys.fold_in(keys, k), q), in_axes=(None, 0)))
  z = np.asarray(draws(keys, np.arange(1000)))
  axes = (0, 1, 2) if per_channel else None
  shape = (1, 1, 1, -1) if per_channel else (1, 1, 1, 1)
  np.testing.assert_allclose((z * np.reshape(found.scale, shape)).std(axis=axes), 1.0, rtol=4 / np.sqrt(2 * 64_000))
  np.testing.assert_allclose(found.active, 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(found.most, np.var(q.mean, axis=0).max(), rtol=1e-5)
  np.testing.assert_allclose(found.kl, latents.kl(q).mean(), rtol=1e-6)


def test_a_scaled_autoencoder_is_the_same_model_in_other_units(x64):
  """Outputs, and the density of latents up to the volume; a pytree, so that gradients reach what it wraps."""
  plain, x, scale = MODEL.autoencoder(), jnp.asarray([[0.2, -0.4, 1.0]]), jnp.asarray([3.0, 0.5])
  other = latents.scaled(plain, scale)
  q, scaled = latents.posterior(plain, x), latents.posterior(other, x)
  z = jnp.asarray([[0.7, -0.3]])
  np.testing.assert_allclose(other.decode(scale[None] * z), plain.decode(z), rtol=1e-12)
  volume = jnp.sum(jnp.log(scale))
  np.testing.assert_allclose(latents.log_prob(scaled, scale[None] * z), latents.log_prob(q, z) - volume, rtol=1e-12)
  np.testing.assert_allclose(latents.entropy(scaled), latents.entropy(q) + volume, rtol=1e-12)
  encode = jax.tree_util.Partial(lambda w, x: (w * x, jnp.zeros_like(x)), jnp.asarray(2.0))
  wrapped = latents.scaled(jd.typing.Autoencoder(encode, jax.tree_util.Partial(jnp.negative)), 5.0)
  gradient = jax.jit(jax.grad(lambda model: jnp.sum(model.encode(x)[0])))(wrapped)
  np.testing.assert_allclose(gradient.encode.args[0].args[0], 5.0 * x.sum(), rtol=1e-6)


def test_a_collapsed_encoder_is_warned_of_with_its_numbers():
  collapsed = latents.statistics(latents.Posterior(1e-3 * posteriors(shape=(3,)).mean, jnp.zeros((64, 3))))
  with pytest.warns(UserWarning, match=r"share of active units 0.*deviation of the latents is 1 to 1.*KL term"):
    latents.warn_if_collapsed(collapsed)
  nothing = latents.statistics(latents.Posterior(jnp.zeros((4, 2)), jnp.full((4, 2), -jnp.inf)))
  with pytest.warns(UserWarning, match="deviation of the latents is 0 to 0"):
    latents.warn_if_collapsed(nothing)
  broken = latents.statistics(latents.Posterior(jnp.full((4, 2), jnp.nan), jnp.zeros((4, 2))))
  with pytest.warns(UserWarning, match="nan"):
    latents.warn_if_collapsed(broken)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    latents.warn_if_collapsed(latents.statistics(posteriors()))
  with pytest.raises(ValueError, match=r"scale must be positive and finite, got inf.*collapsed encoder"):
    latents.scaled(MODEL.autoencoder(), nothing.scale)


def test_half_precision_posteriors_are_computed_in_full():
  encode = lambda x: (x.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
  q = latents.posterior(jd.typing.Autoencoder(encode, lambda z: z), jnp.ones((2, 3)))
  assert q.mean.dtype == q.log_variance.dtype == jnp.float32


def test_bad_input_is_named(untyped):
  x = jnp.zeros((4, 3))
  of = lambda encode: latents.posterior(jd.typing.Autoencoder(encode, lambda z: z), x)
  with pytest.raises(TypeError, match=r"encode must return \(mean, log_variance\), got"):
    of(lambda x: x)
  with pytest.raises(ValueError, match=r"one shape \[4, ...\], got \[\(4, 3\), \(4, 1\)\]"):
    of(lambda x: (x, x[:, :1]))
  with pytest.raises(ValueError, match=r"one shape \[4, ...\], got \[\(2, 3\), \(2, 3\)\]"):
    of(lambda x: (x[:2], x[:2]))
  with pytest.raises(TypeError, match="log_variance of encode must be floating point, got int32"):
    of(lambda x: (x, x.astype(jnp.int32)))
  with pytest.raises(TypeError, match="autoencoder must be a Autoencoder, got tuple, which lacks decode, encode"):
    latents.posterior((lambda x: x, lambda z: z), x)
