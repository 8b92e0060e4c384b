"""Conditions: how networks read them, and how they are dropped."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.models import Text, conditioning
from jaxdiff.models.conditioning import Embedding, Encoded, Image, Label, Scalar

X = np.zeros((3, 4, 4, 2), np.float32)


def root():
  return jax.random.key(0)


def encoder(conditions, features=8):
  """From conditions to what a network of this many features is told, with random parameters."""

  class Net(nn.Module):
    conditions: Mapping[str, Any]

    @nn.compact
    def __call__(self, cond):
      return conditioning.encode(self.conditions, cond, X, features)

  def run(cond):
    noise = lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape)
    return Net(conditions).apply(jax.tree.map(noise, Net(conditions).init(root(), cond)), cond)

  return jax.jit(run)


def encode(conditions, cond):
  return encoder(conditions)(cond)


def test_a_label_has_its_vector_and_beyond_the_classes_there_is_none():
  encode_label = encoder({"label": Label(4)})
  vector_of = lambda *label: np.asarray(encode_label({"label": np.array(label)}).vector)
  vector = vector_of(1, 4, 1)
  assert vector.shape == (3, 8)
  np.testing.assert_array_equal(vector[0], vector[2])
  assert np.abs(vector[0] - vector[1]).max() > 0.1
  for wrong in ([5, 3, -9], [-1, 3, -2]):  # negative numbers do not count from the end
    vector = vector_of(*wrong)
    assert np.isnan(vector[[0, 2]]).all()
    assert np.isfinite(vector[1]).all()
  always = encode({"label": Label(4, droppable=False)}, {"label": np.array([4, 0, 0])})
  assert np.isnan(always.vector[0]).all()
  with pytest.raises(ValueError, match="Label has droppable=False, so nothing stands for no label"):
    conditioning.null({"label": Label(4, droppable=False)})


def test_an_unknown_scalar_has_a_vector_of_its_own():
  encode_level = encoder({"level": Scalar()})
  level = lambda *values: np.asarray(encode_level({"level": np.array(values, np.float32)}).vector)
  vector, other = level(0.0, np.nan, 0.3), level(0.0, np.nan, 0.31)
  assert np.isfinite(vector).all()
  np.testing.assert_array_equal(vector[:2], other[:2])
  assert 0 < np.abs(vector[2] - other[2]).max() < 1  # smooth
  assert np.abs(vector[0] - vector[1]).max() > 0.1


def test_a_small_image_is_enlarged_by_linear_interpolation():
  small = np.arange(3 * 2 * 2 * 1, dtype=np.float32).reshape(3, 2, 2, 1)
  whole = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
  conditions = {"small": Image(1), "whole": Image(2)}
  channels = encode(conditions, {"small": small, "whole": whole}).channels
  axis = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # centres of pixels, the border repeated
  expected = np.einsum("yi,xj,bij->byx", axis, axis, small[..., 0])
  np.testing.assert_allclose(channels[..., 0], expected, rtol=1e-6)
  np.testing.assert_array_equal(channels[..., 1:], whole)


def test_vectors_of_zeros_fill_up_a_sequence_and_are_not_there():
  words = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
  words[1], words[2, 1] = 0.0, 0.0
  run = encoder({"words": Embedding(5, sequence=True)})
  short, long = (jax.device_get(run({"words": np.pad(words, ((0, 0), (0, more), (0, 0)))})) for more in (0, 3))
  assert short.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
  np.testing.assert_allclose(long.vector, short.vector, rtol=1e-5)
  np.testing.assert_array_equal(long.mask[:, :3], short.mask)
  np.testing.assert_allclose(long.tokens[:, :3], short.tokens, rtol=1e-5, atol=1e-6)
  assert not long.mask[:, 3:].any()
  assert not short.vector[1].any()  # the null condition


def test_all_conditions_together_are_their_sum_or_side_by_side():
  conditions = {"b": Label(3), "a": Scalar(), "small": Image(3), "image": Image(1), "words": Embedding(5, True)}
  ones = lambda *shape: np.ones(shape, np.float32)
  cond = {"a": ones(3), "b": np.arange(3), "image": ones(3, 4, 4, 1), "small": 2 * ones(3, 2, 2, 3)}
  cond["words"] = ones(3, 2, 5)
  encoded = encode(conditions, cond)
  np.testing.assert_array_equal(encoded.channels[0, 0, 0], [1.0, 2.0, 2.0, 2.0])
  assert encoded.tokens.shape == (3, 3, 8)
  alone = [encode({name: conditions[name]}, {name: cond[name]}).vector for name in ("a", "b", "words")]
  np.testing.assert_allclose(encoded.vector, sum(np.asarray(vector) for vector in alone), rtol=1e-4, atol=1e-5)
  assert encode({}, {}) == Encoded()


def test_nothing_is_full_of_null():
  conditions = {"label": Label(7), "level": Scalar(), "image": Image(2), "words": Embedding(5, True)}
  nothing, null = conditioning.nothing(conditions, X), conditioning.null(conditions)
  for name, value in nothing.items():
    np.testing.assert_array_equal(value, np.full(value.shape, null[name], value.dtype))
    conditions[name].check(name, value, X)


@pytest.mark.parametrize(
  ("conditions", "cond", "error", "message"),
  [
    (
      {"t": Scalar()},
      {"t": np.zeros(3, np.float32)},
      ValueError,
      "conditions has the name 't', which is that of another argument",
    ),
    ({"label": Label(3)}, {"lable": np.zeros(3, int)}, ValueError, "cond has 'lable', .* it has label"),
    ({}, {"label": np.zeros(3, int)}, ValueError, "cond has 'label', .* it has none: give it `conditions`"),
    (
      {"label": Label(3), "a": Scalar()},
      {"a": np.zeros(3, np.float32)},
      ValueError,
      "cond lacks 'label': pass all of a, label",
    ),
    (
      {"label": Label(3)},
      {"label": np.zeros(3, np.float32)},
      TypeError,
      r"cond\['label'\] has dtype float32: pass integers",
    ),
    ({"label": Label(3)}, {"label": np.zeros((3, 1), int)}, ValueError, r"has shape \(3, 1\) beside x .* from 0 to 2"),
    ({"a": Scalar()}, {"a": np.zeros(2, np.float32)}, ValueError, r"cond\['a'\] has shape \(2,\)"),
    ({"i": Image(3)}, {"i": np.zeros((3, 4, 4, 1))}, ValueError, r"floats \[b, h, w, 3\]"),
    ({"i": Image(1)}, {"i": np.zeros((3, 3, 3, 1))}, ValueError, "smaller by a whole factor"),
    ({"w": Embedding(5)}, {"w": np.zeros((3, 2, 5))}, ValueError, r"pass floats \[b, 5\], null 0"),
  ],
)
def test_wrong_conditions_are_named_with_the_remedy(conditions, cond, error, message):
  with pytest.raises(error, match=message):
    encode(conditions, cond)


def told(x, t, label, level):
  """A network that says what it was told."""
  return jnp.broadcast_to((label + 100 * level)[:, None], x.shape).astype(x.dtype)


def dropping(probability, null, keys=None, count=64):
  """(what each example was told, aux) of a loss that is the output of the network itself."""
  inner = lambda key, x0, network, cond, u: (network(x0, x0[:, 0], **cond)[:, 0], {})
  cond = {"label": np.arange(count, dtype=np.float32), "level": np.full(count, 1.0, np.float32)}
  loss = jd.losses.drop_conditions(inner, null, probability)
  run = jax.jit(lambda key, cond: loss(key, jnp.zeros((count, 2)), told, cond))
  return jax.device_get(run(root() if keys is None else keys, cond))


def test_dropped_conditions_equal_the_null_condition_exactly():
  value, aux = dropping(1.0, {"label": -1.0, "level": np.nan})
  assert np.isnan(value).all()
  assert aux["dropped"].all()
  value, aux = dropping(1.0, {"label": -1.0})
  np.testing.assert_array_equal(value, np.full(64, 99.0))  # what null does not name stays
  value, aux = dropping(0.0, {"label": -1.0})
  np.testing.assert_array_equal(value, 100 + np.arange(64.0))
  assert not aux["dropped"].any()


def test_conditions_are_dropped_together_and_as_often_as_asked():
  value, aux = dropping(0.3, {"label": -1.0, "level": 0.0}, count=4096)
  np.testing.assert_array_equal(value, np.where(aux["dropped"], -1.0, 100 + np.arange(4096)))
  assert abs(aux["dropped"].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4096)
  keys = jd.example_keys(root(), 0, 64)
  whole, half = dropping(0.3, {"label": -1.0}, keys)[1], dropping(0.3, {"label": -1.0}, keys[:32], 32)[1]
  np.testing.assert_array_equal(whole["dropped"][:32], half["dropped"])  # each example by its own key


def test_the_loss_with_dropping_is_the_loss_of_what_it_tells():
  loss = jd.losses.denoising(jd.VP(), jd.predictions.noise())

  @jax.jit
  def both(u):
    key, x0, cond = jd.example_keys(root(), 0, 8), jnp.ones((8, 2)), {"label": jnp.ones(8), "level": jnp.ones(8)}
    value, aux = jd.losses.drop_conditions(loss, {"label": -1.0}, 0.5)(key, x0, told, cond, u)
    cond["label"] = jnp.where(aux["dropped"] == 1, -1.0, 1.0)
    return value, aux["dropped"], loss(jd.keys.split(key)[1], x0, told, cond, u)[0]

  value, dropped, expected = both(np.linspace(0.0, 0.9, 8, dtype=np.float32))
  assert 0 < dropped.sum() < 8
  np.testing.assert_array_equal(value, expected)


def test_networks_are_told_the_null_condition_for_dropped_examples():
  """To the last bit, by labels, images and sequences."""
  conditions = {"label": Label(4), "image": Image(2), "words": Embedding(5, sequence=True)}
  cond = {"label": np.arange(3), "image": np.ones((3, 4, 4, 2), np.float32), "words": np.ones((3, 1, 5), np.float32)}
  seen = []
  inner = lambda key, x0, network, cond, u: (seen.append(cond), (jnp.zeros(len(x0)), {}))[1]
  jd.losses.drop_conditions(inner, conditioning.null(conditions), 1.0)(root(), X, told, cond)
  run = encoder(conditions)
  jax.tree.map(np.testing.assert_array_equal, run(seen[0]), run(conditioning.nothing(conditions, X)))


@pytest.mark.standard_promotion
def test_parameters_of_conditions_are_of_the_type_asked_for():
  types = {"param_dtype": jnp.bfloat16}
  for module in (Label(4, **types), Scalar(**types), Embedding(5, True, **types), Text(3, 8, 1, 2, **types)):
    shapes = jax.eval_shape(lambda value, module=module: module.init(root(), value, X, 8), module.nothing(X))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_wrong_dropping_is_refused():
  loss = jd.losses.denoising(jd.VP(), jd.predictions.noise())
  with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 10"):
    jd.losses.drop_conditions(loss, {"label": 3}, 10)
  with pytest.raises(ValueError, match="cond lacks 'text', which null says how to drop"):
    jd.losses.drop_conditions(loss, {"text": 0}, 0.1)(
      root(), np.zeros((2, 2), np.float32), told, {"label": np.zeros(2, np.float32)}
    )
  for null, dtype in ((256, jnp.uint8), (float("nan"), jnp.int32)):
    with pytest.raises(ValueError, match=f"dtype {np.dtype(dtype)}, which cannot hold its null {null}"):
      jd.losses.drop_conditions(loss, {"label": null}, 0.1)(root(), X, told, {"label": np.zeros(3, dtype)})


def test_tokens_without_a_mask_are_all_there():
  class Mine(nn.Module):
    def nothing(self, x):
      return jnp.zeros(len(x))

    def check(self, name, value, x):
      pass

    @nn.compact
    def __call__(self, value, x, features):
      return Encoded(tokens=jnp.broadcast_to(value[:, None, None], (len(x), 2, features)))

  cond = {"mine": np.ones(3, np.float32), "words": np.zeros((3, 1, 5), np.float32)}
  mask = encode({"mine": Mine(), "words": Embedding(5, sequence=True)}, cond).mask
  assert mask.tolist() == [[True, True, True, False]] * 3
