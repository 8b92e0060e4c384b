"""Networks of autoencoders: shapes, which parameters there are, gradients, batch mates, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import VQVAE, AutoencoderKL, GumbelVAE

SMALL = {"channels": 4, "channel_multipliers": (1, 2), "blocks": 1, "groups": 2, "image_channels": 2}
NETS = {
  "kl": AutoencoderKL(**SMALL, latent_channels=3, output_channels=5),
  "vq": VQVAE(**SMALL, codes=7, code_channels=3, output_channels=5, attention=False),
  "gumbel": GumbelVAE(**SMALL, codes=3, code_channels=4, output_channels=5, attention=False),
}
X = jax.random.normal(jax.random.key(0), (2, 4, 6, 2))


@functools.cache
def variables(kind):
  """Random ones, so that no zero initialization hides a path."""
  leaves, tree = jax.tree.flatten(jax.eval_shape(NETS[kind].init, jax.random.key(1), X))
  rng = np.random.default_rng(0)
  return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


@functools.cache
def halves(kind):
  """(encode, decode), compiled."""
  return tuple(
    jax.jit(lambda values, x, name=name: NETS[kind].apply(values, x, method=name)) for name in ("encode", "decode")
  )


@pytest.mark.parametrize("kind", NETS)
def test_latents_are_smaller_and_outputs_have_their_channels(kind):
  (encode, decode), values = halves(kind), variables(kind)
  latents = encode(values, X)
  assert jax.tree.map(jnp.shape, latents) == (((2, 2, 3, 3),) * 2 if kind == "kl" else (2, 2, 3, 3))
  z = latents[0] if kind == "kl" else latents
  output = decode(values, z)
  assert output.shape == (2, 4, 6, 5)
  # Examples know nothing of each other.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, atol=1e-4), encode(values, X[::-1]), latents)
  np.testing.assert_allclose(decode(values, z[::-1]), output[::-1], atol=1e-4)
  assert jnp.abs(output[0] - output[1]).max() > 1e-3


@pytest.mark.parametrize("kind", NETS)
def test_gradients_reach_all_parameters_of_the_network(kind):
  net, values = NETS[kind], variables(kind)

  def loss(params):
    latents = net.apply(values | {"params": params}, X, method="encode")
    z = latents[0] + jnp.exp(0.5 * latents[1]) if kind == "kl" else latents
    return jnp.sum(net.apply(values | {"params": params}, z, method="decode") ** 2)

  gradients = jax.jit(jax.grad(loss))(values["params"])
  silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradients) if not jnp.any(g != 0)]
  assert not silent


def test_the_codebook_is_a_group_of_its_own_that_starts_without_counts():
  assert set(variables("vq")) == {"params", "codebook"}
  net = VQVAE(**SMALL, codes=2000, code_channels=3)
  codebook = net.init(jax.random.key(0), method=lambda module: module.encoder.outputs)["codebook"]
  assert jax.tree.map(jnp.shape, codebook) == {"vectors": (2000, 3), "counts": (2000,), "sums": (2000, 3)}
  np.testing.assert_array_equal(codebook["counts"], 0)
  np.testing.assert_array_equal(codebook["sums"], 0)
  # Of 6000 numbers of variance 1/3 the variance has a relative standard error of 1.8%.
  assert abs(3 * float(jnp.var(codebook["vectors"])) - 1) < 0.08


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
  values, decode = variables("gumbel"), halves("gumbel")[1]
  kernel = values["params"]["vectors"]["kernel"]
  assert kernel.shape == (3, 4)
  exchanged = values | {"params": values["params"] | {"vectors": {"kernel": kernel[::-1]}}}
  p = jax.nn.softmax(jax.random.normal(jax.random.key(3), (2, 2, 3, 3)))
  np.testing.assert_allclose(decode(values, p), decode(exchanged, p[..., ::-1]), rtol=1e-4, atol=1e-4)
  assert jnp.abs(decode(values, p) - decode(exchanged, p)).max() > 1e-3


@pytest.mark.usefixtures("untyped")
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
      net.apply(moved, wrong, method=method)
  with pytest.raises(ValueError, match="channels at level 0=4 is not divisible by groups=3"):
    net.clone(groups=3).apply(moved, X)


@pytest.mark.parametrize("net", [VQVAE, GumbelVAE])
@pytest.mark.parametrize("codes", [1, 0])
def test_less_than_two_codes_are_refused(net, codes):
  with pytest.raises(ValueError, match=f"codes={codes}: a codebook needs at least 2 codes"):
    jax.eval_shape(net(**SMALL, codes=codes).init, jax.random.key(0), X)
