"""Discriminators: all they are told counts, examples stand alone, a patch is as large as stated, types and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled

from jaxdiff.models import PatchDiscriminator, StepDiscriminator, VectorDiscriminator, conditioning

SHAPES = {"images": (3, 8, 8, 2), "vectors": (3, 5)}
CONDITIONS = {"label": conditioning.Label(3)}
T = np.array([0.25, 0.5, 1.0], np.float32)


def network(kind, **fields):
  if kind == "images":
    return StepDiscriminator(channels=4, channel_multipliers=(1, 2), conditions=CONDITIONS, **fields)
  return VectorDiscriminator(width=8, depth=1, conditions=CONDITIONS, **fields)


def told(kind):
  x, x_t = np.random.default_rng(1).normal(size=(2, *SHAPES[kind])).astype(np.float32)
  return {"x": x, "t": T, "x_t": x_t, "label": np.array([0, 1, 2])}


@functools.cache
def made(kind):
  """Random parameters, so that no zero initialization hides a path, and `apply`, compiled."""
  net, rng = network(kind), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: net.init(key, **told(kind)), jax.random.key(0))
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
  return params, jax.jit(lambda params, x, t, **rest: net.apply(params, x, t, **rest))


@pytest.mark.parametrize("kind", SHAPES)
def test_everything_told_counts_for_its_own_example_alone(kind):
  params, apply = made(kind)
  given = told(kind)
  call = lambda **changed: np.asarray(apply(params, **(given | changed)))
  logits = call()
  assert logits.shape == (3,)
  others = {"x": given["x"] + 1.0, "t": 0.5 * T, "x_t": given["x_t"] + 1.0, "label": np.array([1, 2, 0])}
  for name, value in others.items():
    changed = given[name].copy()
    changed[1] = value[1]
    found = call(**{name: changed})
    assert abs(found[1] - logits[1]) > 1e-3, name
    np.testing.assert_allclose(found[[0, 2]], logits[[0, 2]], rtol=1e-5)
  assert np.abs(call(x=given["x_t"], x_t=given["x"]) - logits).min() > 1e-3


@pytest.mark.parametrize("kind", SHAPES)
def test_every_parameter_has_a_gradient_and_second_derivatives_exist(kind):
  """As the penalty needs: the square of the gradient in x, differentiated by the parameters."""
  params, apply = made(kind)
  given = told(kind)

  def penalty(params):
    gradient = jax.grad(lambda x: apply(params, **(given | {"x": x})).sum())(jnp.asarray(given["x"]))
    return jnp.sum(gradient**2) + jnp.sum(apply(params, **given))

  sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(compiled(jax.grad(penalty), params))]
  assert all(0 < size < np.inf for size in sizes)


@pytest.mark.parametrize(("multipliers", "side"), [((1,), 9), ((1, 1), 20), ((1, 2, 2), 42)])
def test_a_patch_is_as_large_as_stated(multipliers, side):
  """11 f - 2 pixels: where the gradient of the middle logit is not zero."""
  net, x = PatchDiscriminator(channels=2, channel_multipliers=multipliers), np.ones((1, 64, 64, 1), np.float32)
  factor = 2 ** (len(multipliers) - 1)
  assert side == 11 * factor - 2
  middle = 32 // factor

  # With positive weights no two ways cancel, and no leaky ReLU does more than scale.
  shapes = jax.eval_shape(lambda key: net.init(key, x), jax.random.key(0))
  rng = np.random.default_rng(0)
  positive = jax.tree.map(lambda leaf: rng.uniform(0.1, 1.0, leaf.shape).astype(leaf.dtype), shapes)

  def logit(x):
    logits = net.apply(positive, x)
    return logits[0, middle, middle], logits

  gradient, logits = compiled(jax.grad(logit, has_aux=True), x)
  gradient = gradient[0, ..., 0]
  assert logits.shape == (1, 64 // factor, 64 // factor)
  rows, columns = np.nonzero(gradient)
  for where in (rows, columns):
    first, last = int(where.min()), int(where.max())
    assert last - first + 1 == side
    assert first == middle * factor - (5 * factor - 1)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("kind", SHAPES)
def test_types_of_parameters_and_logits(kind):
  given = told(kind)
  for param_dtype in (jnp.float32, jnp.bfloat16):
    net = network(kind, dtype=jnp.bfloat16, param_dtype=param_dtype)
    logits, params = jax.eval_shape(functools.partial(net.init_with_output, jax.random.key(0)), **given)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params["params"])} >= {jnp.dtype(param_dtype)}
  patch = PatchDiscriminator(channels=4, dtype=jnp.bfloat16)
  logits, _ = jax.eval_shape(patch.init_with_output, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  assert (logits.shape, logits.dtype) == ((1, 2, 2), jnp.float32)


def test_wrong_inputs_are_refused():
  images, vectors = network("images"), network("vectors")
  x, v = np.ones((3, 8, 8, 2), np.float32), np.ones((3, 5), np.float32)
  label = {"label": np.zeros(3, np.int32)}
  run = lambda net, *args, **cond: jax.eval_shape(net.init, jax.random.key(0), *args, **cond)
  for net, value in ((images, x), (vectors, v)):
    with pytest.raises(ValueError, match=r"x_t has shape \(2, .*pass what the step started from, of the shape of x"):
      run(net, value, T, x_t=value[:2], **label)
    with pytest.raises(ValueError, match="cond lacks 'label'"):
      run(net, value, T, x_t=value)
    with pytest.raises(ValueError, match="pass one time per example"):
      run(net, value, T[:2], x_t=value, **label)
  with pytest.raises(ValueError, match=r"pass images \[b, h, w, c\]"):
    run(images, v, T, x_t=v, **label)
  with pytest.raises(ValueError, match=r"pass vectors \[b, d\]"):
    run(vectors, x, T, x_t=x, **label)
  odd = np.ones((3, 7, 8, 2), np.float32)
  with pytest.raises(ValueError, match=r"height of x=7 is not divisible by 2\^\(levels - 1\)=2"):
    run(images, odd, T, x_t=odd, **label)
  with pytest.raises(ValueError, match="width of x=6 is not divisible"):
    run(PatchDiscriminator(), np.ones((1, 8, 6, 1), np.float32))
  with pytest.raises(ValueError, match=r"pass images \[b, h, w, c\]"):
    run(PatchDiscriminator(), v)
  with pytest.raises(TypeError, match="x has dtype int32: pass floats"):
    run(PatchDiscriminator(), x.astype(np.int32))
  words = StepDiscriminator(conditions={"words": conditioning.Embedding(4, sequence=True)})
  with pytest.raises(ValueError, match="StepDiscriminator has no cross-attention"):
    run(words, x[..., :4, :4, :], T, x_t=x[..., :4, :4, :], words=np.ones((3, 2, 4), np.float32))
