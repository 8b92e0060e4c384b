"""Networks of autoencoders: shapes, which parameters there are, gradients, batch mates, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

from jaxdiff.models import VQVAE, AutoencoderKL, GumbelVAE

KEY = jax.random.key(0)
SMALL = {"channels": 4, "channel_multipliers": (1, 2), "blocks": 1, "groups": 2, "image_channels": 2}
NETS = {
  "kl": AutoencoderKL(**SMALL, latent_channels=3, output_channels=5),
  "vq": VQVAE(**SMALL, codes=7, code_channels=3, output_channels=5, attention=False),
  "gumbel": GumbelVAE(**SMALL, codes=3, code_channels=4, output_channels=5, attention=False),
}
X = np.random.default_rng(1).normal(size=(2, 4, 6, 2)).astype(np.float32)


@functools.cache
def variables(kind):
  """Random ones, so that no zero initialization hides a path."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(NETS[kind].init, jax.random.key(1), X))
  rng = np.random.default_rng(0)
  return tree.unflatten([(0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in leaves])


@functools.cache
def passes(kind):
  """(values, x) -> (latents, output, gradients of the sum of its squares by the parameters), compiled."""
  net = NETS[kind]

  def total(params, values, x):
    latents = net.apply(values | {"params": params}, x, method="encode")
    z = latents[0] + jnp.exp(0.5 * latents[1]) if kind == "kl" else latents
    output = net.apply(values | {"params": params}, z, method="decode")
    return jnp.sum(output**2), (latents, output)

  def run(values, x):
    gradients, found = jax.grad(total, has_aux=True)(values["params"], values, x)
    return *found, gradients

  run = jax.jit(run)
  return lambda *given: jax.device_get(run(*given))


@pytest.mark.parametrize("kind", NETS)
def test_latents_are_smaller_outputs_have_their_channels_and_gradients_reach_all_parameters(kind):
  latents, output, gradients = passes(kind)(variables(kind), X)
  assert jax.tree.map(np.shape, latents) == (((2, 2, 3, 3),) * 2 if kind == "kl" else (2, 2, 3, 3))
  assert output.shape == (2, 4, 6, 5)
  silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradients) if not np.any(g != 0)]
  assert not silent
  # Examples know nothing of each other.
  turned, turned_output, _ = passes(kind)(variables(kind), X[::-1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, atol=1e-4), turned, latents)
  np.testing.assert_allclose(turned_output[::-1], output, atol=1e-4)
  assert np.abs(output[0] - output[1]).max() > 1e-3


def test_the_codebook_is_a_group_of_its_own_that_starts_without_counts():
  assert set(variables("vq")) == {"params", "codebook"}
  net = VQVAE(**SMALL, codes=2000, code_channels=3)
  codebook = compiled(lambda key: net.init(key, method=lambda module: module.encoder.outputs)["codebook"], KEY)
  assert jax.tree.map(np.shape, codebook) == {"vectors": (2000, 3), "counts": (2000,), "sums": (2000, 3)}
  np.testing.assert_array_equal(codebook["counts"], 0)
  np.testing.assert_array_equal(codebook["sums"], 0)
  # Of 6000 numbers of variance 1/3 the variance has a relative standard error of 1.8%.
  assert abs(3 * float(np.var(codebook["vectors"])) - 1) < 0.08


def test_published_names_have_no_part_in_the_options():
  names = lambda **options: {
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      jax.eval_shape(AutoencoderKL(**SMALL, **options).init, jax.random.key(0), X)
    )
  }
  whole, cheap = names(), names(attention=False)
  assert whole == names(output_channels=7)
  assert {name for name in whole if "attention" not in name} == cheap != whole


def test_codes_are_known_by_their_vectors_alone():
  """Exchanged codes with exchanged vectors give the same output."""
  values, p = variables("gumbel"), np.random.default_rng(3).dirichlet(np.ones(3), (2, 2, 3)).astype(np.float32)
  decode = jax.jit(lambda values, p: NETS["gumbel"].apply(values, p, method="decode"))
  kernel = values["params"]["vectors"]["kernel"]
  assert kernel.shape == (3, 4)
  exchanged = values | {"params": values["params"] | {"vectors": {"kernel": kernel[::-1]}}}
  np.testing.assert_allclose(decode(values, p), decode(exchanged, p[..., ::-1]), rtol=1e-4, atol=1e-4)
  assert np.abs(np.asarray(decode(values, p)) - decode(exchanged, p)).max() > 1e-3


@pytest.mark.parametrize("kind", NETS)
def test_wrong_input_is_named(kind):
  net, moved = NETS[kind], variables(kind)
  what, name = {"kl": ("latents", "z"), "vq": ("vectors", "z"), "gumbel": ("probabilities", "p")}[kind]
  for method, wrong, text in (
    ("encode", X[..., :1], r"x has shape \(2, 4, 6, 1\): pass images \[b, h, w, 2\]"),
    ("encode", X[:, :3], "height of x=3 is not divisible by"),
    ("decode", X, rf"{name} has shape \(2, 4, 6, 2\): pass {what} \[b, h, w, 3\]"),
  ):
    with pytest.raises(ValueError, match=text):
      jax.eval_shape(lambda values: net.apply(values, wrong, method=method), moved)
  with pytest.raises(ValueError, match="channels at level 0=4 is not divisible by groups=3"):
    jax.eval_shape(lambda values: net.clone(groups=3).apply(values, X), moved)


@pytest.mark.parametrize("net", [VQVAE, GumbelVAE])
@pytest.mark.parametrize("codes", [1, 0])
def test_less_than_two_codes_are_refused(net, codes):
  with pytest.raises(ValueError, match=f"codes={codes}: a codebook needs at least 2 codes"):
    jax.eval_shape(net(**SMALL, codes=codes).init, jax.random.key(0), X)
