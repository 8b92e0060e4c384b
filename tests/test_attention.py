"""Attention against a naive one in numpy; masks, precision, both modes of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from oracles import compiled

from jaxdiff.models.attention import CrossAttention, attention

pytestmark = pytest.mark.standard_promotion  # the softmax is wider than bfloat16
HEADS, DEPTH = 2, 4


def normal(seed, *shape, dtype=np.float64):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def naive(query, key, value, mask):
  """One head of one example after the other, over the tokens that are there alone."""
  y = np.zeros(query.shape)
  for b, h in np.ndindex(len(query), query.shape[2]):
    there = np.flatnonzero(mask[b])
    logits = query[b, :, h] @ key[b, there, h].T / np.sqrt(query.shape[-1])
    y[b, :, h] = scipy.special.softmax(logits, axis=-1) @ value[b, there, h]
  return y


@pytest.fixture(scope="module")
def arrays():
  query, key, value = normal(0, 3, 5, HEADS, DEPTH), normal(1, 3, 7, HEADS, DEPTH), normal(2, 3, 7, HEADS, DEPTH)
  mask = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0]], bool)
  return query, key, value, mask


def test_attention_is_the_naive_one_in_float64(arrays, x64):
  """To rounding: a softmax in float32 would be off by 1e-7."""
  *tensors, mask = arrays
  full, run = np.ones_like(mask), lambda q, k, v, mask: (attention(q, k, v, mask), attention(q, k, v))
  y, unmasked = compiled(run, *arrays)
  np.testing.assert_allclose(y, naive(*arrays), rtol=1e-13, atol=1e-14)
  np.testing.assert_allclose(unmasked, naive(*tensors, full), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_that_of_jax(arrays, dtype):
  *tensors, mask = (array if array.dtype == bool else array.astype(jnp.dtype(dtype)) for array in arrays)
  of_jax = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  run = lambda q, k, v, mask: (attention(q, k, v, mask), of_jax(q, k, v, mask=mask[:, None, None, :]))
  ours, theirs = compiled(run, *tensors, mask)
  assert ours.dtype == theirs.dtype
  tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
  np.testing.assert_allclose(ours.astype("float32"), theirs.astype("float32"), rtol=tolerance, atol=tolerance)


def test_masked_tokens_have_no_influence_on_any_bit(arrays):
  query, key, value = (array.astype(np.float32) for array in arrays[:3])
  mask = arrays[3]

  @jax.jit
  def run(key, value):
    masked = lambda key, value: jnp.sum(attention(query, key, value, mask) ** 3)
    return *jax.value_and_grad(masked, (0, 1))(key, value), attention(query, key, value)

  other = np.where(mask[:, :, None, None], np.float32(0), 1e3 * normal(3, *key.shape, dtype=np.float32))
  plain, before, unmasked = jax.device_get(run(key, value))
  changed, gradients, unmasked_changed = jax.device_get(run(key + other, value - other))
  np.testing.assert_array_equal(changed, plain)
  for gradient, same in zip(gradients, before, strict=True):
    np.testing.assert_array_equal(gradient, same)
    reached = np.all(np.any(gradient != 0, axis=-1), axis=-1)
    np.testing.assert_array_equal(reached[:2], mask[:2])  # one token alone has the weight 1 whatever its key
  assert np.abs(unmasked_changed - unmasked).max() > 1


def test_both_modes_of_differentiation_agree_with_differences(arrays, x64):
  *tensors, mask = arrays
  directions = [normal(seed, *tensor.shape) for seed, tensor in enumerate(tensors, start=4)]
  cotangent, step = normal(8, *tensors[0].shape), 1e-6

  def run(tensors, directions):
    f = lambda *tensors: attention(*tensors, mask)
    moved = lambda s: f(*(x + s * d for x, d in zip(tensors, directions, strict=True)))
    return jax.jvp(f, tensors, directions)[1], moved(step), moved(-step), jax.vjp(f, *tensors)[1](cotangent)

  tangent, plus, minus, gradients = compiled(run, tensors, directions)
  np.testing.assert_allclose(tangent, (plus - minus) / (2 * step), rtol=1e-7, atol=1e-8)
  pairs = zip(gradients, directions, strict=True)
  np.testing.assert_allclose(sum(np.vdot(g, d) for g, d in pairs), np.vdot(cotangent, tangent), rtol=1e-12)


@pytest.mark.parametrize("biases", [False, True])
def test_cross_attention_equals_the_textbook_formula(biases, x64):
  layer = CrossAttention(HEADS, 2, jnp.float64, jnp.float64, 1e-5, biases, skip_rescale=biases)
  x, tokens = normal(9, 3, 2, 4, 8), normal(10, 3, 5, 6)
  mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, tokens, mask)
  leaves, tree = jax.tree.flatten(shapes)
  p = tree.unflatten([normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])["params"]
  groups = x.reshape(3, 8, 2, 4)
  mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  y = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(3, 8, 8) * p["GroupNorm_0"]["scale"] + p["GroupNorm_0"][
    "bias"
  ]
  product = lambda y, p: y @ p["kernel"] + (p["bias"] if biases else 0.0)
  assert ("bias" in p["query"]) == ("bias" in p["key_value"]) == biases
  query = product(y, p["query"]).reshape(3, 8, 2, 4)
  key, value = (a.reshape(3, 5, 2, 4) for a in np.split(product(tokens, p["key_value"]), 2, axis=-1))
  y = naive(query, key, value, mask).reshape(3, 8, 8) @ p["output"]["kernel"] + p["output"]["bias"]
  expected = (x + y.reshape(x.shape)) / np.sqrt(2.0 if biases else 1.0)
  z = compiled(layer.apply, {"params": p}, x, tokens, mask)
  np.testing.assert_allclose(z, expected, rtol=1e-12, atol=1e-12)
