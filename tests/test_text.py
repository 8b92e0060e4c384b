"""Texts: bytes and back, the encoder and its padding, captions in the data."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from jaxdiff import arguments, factory, objectives
from jaxdiff.data import manifest as manifests
from jaxdiff.data import pipeline, prepared, sources
from jaxdiff.data.text import decode_text, encode_text
from jaxdiff.models import conditioning
from jaxdiff.models.text import Text

LENGTH, FEATURES = 8, 6
X = np.zeros((4, 2, 2, 1), np.float32)
TEXTS = ["", "a", "stressed", "über"]


# ---- bytes


def characters(rng):
  """A character of 1, 2, 3 or 4 bytes of UTF-8."""
  start, stop = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)][rng.integers(4)]
  return chr(rng.integers(start, stop))


def test_texts_come_back_whole_or_cut_at_a_character():
  rng = np.random.default_rng(0)
  texts = ["".join(characters(rng) for _ in range(rng.integers(9))) for _ in range(300)]
  whole = encode_text(texts, 32)
  assert whole.dtype == np.uint8
  assert decode_text(whole) == texts
  for length in (1, 3, 10):
    with pytest.warns(UserWarning, match=f"cut to {length} bytes") as warned:
      cut = encode_text(texts, length)
    long = sum(len(text.encode()) > length for text in texts)
    assert f"length: {long} of 300 texts are cut" in str(warned[0].message)
    for text, kept in zip(texts, decode_text(cut), strict=True):
      assert text.startswith(kept)
      assert len(kept.encode()) <= length
      assert kept == text or len(text[: len(kept) + 1].encode()) > length  # no character less than fits


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("texts", "length", "error", "message"),
  [
    (["a"], 0, ValueError, "length: got 0"),
    (["a", "b\0c"], 4, ValueError, "texts: number 1, 'b\\\\x00c', holds a NUL character"),
    (["\ud800"], 4, ValueError, "texts: number 0, .* has no UTF-8"),
    ("abc", 4, TypeError, "pass a list of texts"),
    (["a", 3], 4, TypeError, "number 1 is 3"),
  ],
)
def test_what_is_no_text_is_refused(texts, length, error, message):
  with pytest.raises(error, match=message):
    encode_text(texts, length)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (np.array([[0xC3, 0]], np.uint8), "rows: number 0 is no UTF-8"),
    (np.zeros(3, np.uint8), r"rows: got uint8\[3\]"),
    (np.zeros((1, 3)), r"rows: got float64\[1, 3\]"),
    (np.array([[-1]]), "rows: number 0 is no UTF-8"),
  ],
)
def test_what_are_no_bytes_of_texts_is_refused(rows, message):
  with pytest.raises(ValueError, match=message):
    decode_text(rows)


# ---- encoder


@pytest.fixture(scope="module")
def encoder():
  """Module, jitted `apply` and parameters, all of them moved away from their initial values."""
  text = Text(LENGTH, width=8, layers=2, heads=2)
  shapes = jax.eval_shape(lambda key: text.init(key, encode_text(TEXTS, LENGTH), X, FEATURES), jax.random.key(0))
  return text, jax.jit(text.apply, static_argnums=3), networks.filled(shapes)


def test_a_text_has_a_vector_and_a_token_for_every_byte_and_one_more(encoder):
  _, apply, params = encoder
  encoded = apply(params, encode_text(TEXTS, LENGTH), X, FEATURES)
  assert encoded.vector.shape == (4, FEATURES)
  assert encoded.tokens.shape == (4, 1 + LENGTH, FEATURES)
  assert encoded.channels is None
  assert encoded.mask.sum(axis=1).tolist() == [1, 2, 9, 6]
  assert encoded.mask[:, 0].all()
  np.testing.assert_array_equal(encoded.tokens[~encoded.mask], 0.0)
  assert (jnp.abs(encoded.tokens[encoded.mask]).max(axis=-1) > 0).all()


def test_padding_has_no_influence(encoder):
  text, apply, params = encoder
  rows = encode_text(TEXTS, LENGTH)
  encoded = apply(params, rows, X, FEATURES)
  positions = np.pad(params["params"]["positions"], ((0, 5), (0, 0)), constant_values=3.0)
  longer = {"params": {**params["params"], "positions": positions}}
  apply = jax.jit(text.clone(length=LENGTH + 5).apply, static_argnums=3)
  padded = apply(longer, np.pad(rows, ((0, 0), (0, 5))), X, FEATURES)
  # The same sums, of more zeros: float32 rounding of values of order 1.
  np.testing.assert_allclose(padded.vector, encoded.vector, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(padded.tokens[:, : 1 + LENGTH], encoded.tokens, rtol=1e-5, atol=1e-5)
  assert not padded.mask[:, 1 + LENGTH :].any()


def test_what_is_masked_has_no_influence_to_the_last_bit(encoder):
  _, apply, params = encoder
  rows = encode_text(["ab", "cde"] * 2, LENGTH)
  encoded = apply(params, rows, X, FEATURES)
  other = {**params["params"]}
  other |= {name: other[name].copy() for name in ("table", "positions")}
  other["table"][0] = 1e3
  other["positions"][3:] = -1e3
  for one, two in zip(encoded, apply({"params": other}, rows, X, FEATURES), strict=True):
    assert one is two is None or np.array_equal(one, two)
  other["positions"][2] = 0.0
  changed = apply({"params": other}, rows, X, FEATURES)
  assert np.array_equal(changed.vector[0], encoded.vector[0])
  assert not np.array_equal(changed.vector[1], encoded.vector[1])


def test_the_null_condition_is_the_empty_text(encoder):
  text, _, _ = encoder
  null = conditioning.null({"text": text})["text"]
  np.testing.assert_array_equal(encode_text([""], LENGTH), np.full((1, LENGTH), null))
  np.testing.assert_array_equal(conditioning.nothing({"text": text}, X)["text"], encode_text([""] * 4, LENGTH))


def test_letters_and_their_order_matter(encoder):
  _, apply, params = encoder
  vectors = apply(params, encode_text(["stressed", "desserts", "stresses", "s"], LENGTH), X, FEATURES).vector
  gaps = jnp.abs(vectors[:, None] - vectors[None]).max(axis=-1) + jnp.eye(4)
  assert gaps.min() > 1e-2


def test_examples_do_not_see_their_batch_mates(encoder):
  _, apply, params = encoder
  rows = encode_text(TEXTS, LENGTH)
  encoded, turned = apply(params, rows, X, FEATURES), apply(params, rows[::-1], X, FEATURES)
  np.testing.assert_allclose(turned.tokens[::-1], encoded.tokens, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(turned.vector[::-1], encoded.vector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["vector", "tokens"])
def test_gradient_reaches_every_parameter(encoder, form):
  _, apply, params = encoder
  rows = encode_text(TEXTS, LENGTH)
  loss = lambda p: jnp.sum(jnp.sin(getattr(apply(p, rows, X, FEATURES), form)))
  gradients = jax.jit(jax.grad(loss))(params)["params"]
  del gradients["vector" if form == "tokens" else "tokens"]
  assert not networks.silent(gradients)


def test_a_byte_beyond_255_is_nan_not_another_letter(encoder):
  _, apply, params = encoder
  rows = encode_text(TEXTS, LENGTH).astype(np.int32)
  rows[1, 1] = 256
  vector = apply(params, rows, X, FEATURES).vector
  assert jnp.isnan(vector).all(axis=1).tolist() == [False, True, False, False]


@pytest.mark.standard_promotion
def test_bfloat16_computes_near_float32(encoder):
  text, apply, params = encoder
  rows = encode_text(TEXTS, LENGTH)
  half = jax.jit(text.clone(dtype=jnp.bfloat16).apply, static_argnums=3)(params, rows, X, FEATURES)
  encoded = apply(params, rows, X, FEATURES)
  assert half.vector.dtype == half.tokens.dtype == jnp.bfloat16
  error = jnp.linalg.norm(half.tokens.astype(jnp.float32) - encoded.tokens) / jnp.linalg.norm(encoded.tokens)
  assert 0 < error < 0.05  # 8 bits in each of some ten layers
  narrow = text.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  shapes = jax.eval_shape(lambda key: narrow.init(key, jnp.asarray(rows), X, FEATURES), jax.random.key(0))
  assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("text", "value", "error", "message"),
  [
    (Text(LENGTH), np.zeros((4, 9), np.uint8), ValueError, r"cond\['text'\] has shape \(4, 9\) .* pass bytes \[b, 8\]"),
    (Text(LENGTH), np.zeros((3, 8), np.uint8), ValueError, r"cond\['text'\] has shape \(3, 8\)"),
    (Text(LENGTH), np.zeros((4, 8), np.float32), TypeError, r"cond\['text'\] has dtype float32: pass bytes"),
    (Text(LENGTH, width=6), np.zeros((4, 8), np.uint8), ValueError, "width of the text encoder=6 .* heads=4"),
  ],
)
def test_wrong_texts_are_refused_by_name(text, value, error, message):
  class Net(nn.Module):
    conditions: dict

    def __call__(self, x, **cond):
      return conditioning.encode(self.conditions, cond, x, FEATURES).vector

  with pytest.raises(error, match=message):
    jax.eval_shape(Net({"text": text}).init, jax.random.key(0), X, text=jnp.asarray(value))


# ---- data

CAPTIONS = ["red", "élan vital", "", "four", "line\nbreak \u2028"]


def write_captioned(folder, captions=CAPTIONS):
  """Prepared data of five images, whose pixels are their numbers."""
  x = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 2, 1), np.uint8)
  texts = None if captions is None else [{"name": str(i), "text": text} for i, text in enumerate(captions)]
  part = prepared.Part(5, ((image, None) for image in x), texts)
  about = manifests.Manifest("tiny", (2, 2, 1), "uint8", 256, False, None, {}, "jaxdiff data --output=DIR")
  prepared.write(folder, about, {"train": part})
  return folder


def reads_captions(source):
  batch = source.gather([4, 1, 1])
  assert batch["text"].dtype == np.uint8
  assert decode_text(batch["text"]) == [CAPTIONS[4], CAPTIONS[1], CAPTIONS[1]]
  assert batch["x"][:, 0, 0, 0].tolist() == [4, 1, 1]
  np.testing.assert_array_equal(source.examples[1]["text"], batch["text"][1])
  for batch in [next(pipeline.train_batches(source, 5, seed=0)), next(pipeline.eval_batches(source, 5))[0]]:
    assert decode_text(batch["text"]) == [CAPTIONS[i] for i in batch["x"][:, 0, 0, 0]]
  return True


def test_prepared_data_hand_out_their_captions(tmp_path):
  source = sources.array_record("train", write_captioned(tmp_path / "a"), text_length=16)
  assert reads_captions(source)
  assert "text" not in sources.array_record("train", tmp_path / "a").gather([0])
  with pytest.warns(UserWarning, match="length: 2 of 5 texts are cut to 4 bytes; the longest has 14"):
    assert decode_text(sources.array_record("train", tmp_path / "a", text_length=4).gather([1])["text"]) == ["éla"]


def test_changed_captions_are_noticed(tmp_path):
  folder = write_captioned(tmp_path / "a")
  content = {length: sources.array_record("train", folder, length).content_hash for length in (0, 16, 17)}
  assert len(set(content.values())) == 3
  other = write_captioned(tmp_path / "b", [*CAPTIONS[:-1], "other"])
  assert sources.array_record("train", other).content_hash == content[0]
  assert sources.array_record("train", other, 16).content_hash != content[16]
  path = folder / "train.jsonl"
  path.write_text(path.read_text().replace("red", "rad"))
  with pytest.raises(ValueError, match=r"train\.jsonl is corrupted"):
    sources.array_record("train", folder, 16)


def test_data_without_captions_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"has no captions of 'train'; set text_length=0"):
    sources.array_record("train", write_captioned(tmp_path / "a", None), 16)
  with pytest.raises(ValueError, match="length: got -1"):
    sources.array_record("train", write_captioned(tmp_path / "b"), -1)
  with pytest.raises(ValueError, match=r"train\.jsonl has 4 lines for 5 examples"):
    sources.array_record("train", write_captioned(tmp_path / "c", CAPTIONS[:4]), 16)
  with pytest.raises(ValueError, match=r"train\.jsonl has no text in line 2 \(TypeError"):
    sources.array_record("train", write_captioned(tmp_path / "d", ["a", 3, "b", "c", "d"]), 16)


def test_npz_hands_out_captions(tmp_path):
  x = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 2, 1), np.uint8)
  both = {"x_train": x, "x_test": x[:2]}
  np.savez(tmp_path / "strings.npz", **both, text_train=CAPTIONS, text_test=CAPTIONS[:2])
  np.savez(tmp_path / "bytes.npz", **both, text_train=encode_text(CAPTIONS, 16))
  one = sources.npz("train", tmp_path / "strings.npz", 256, text_length=16)
  two = sources.npz("train", tmp_path / "bytes.npz", 256, text_length=16)
  assert reads_captions(one)
  assert reads_captions(two)
  without = sources.npz("train", tmp_path / "strings.npz", 256)
  assert "text" not in without.gather([0])
  assert one.content_hash == two.content_hash != without.content_hash
  np.savez(tmp_path / "whole.npz", x=x, text=CAPTIONS)
  for split in ("train", "test"):
    batch = sources.npz(split, tmp_path / "whole.npz", 256, 0.4, text_length=16).gather([0, 1])
    assert decode_text(batch["text"]) == [CAPTIONS[i] for i in batch["x"][:, 0, 0, 0]]
  np.savez(tmp_path / "short.npz", x=x, text=CAPTIONS[:3])
  for file, length, message in [
    ("bytes.npz", 8, r"has text_train uint8\[5, 16\]; expected strings \[n\], or bytes \[n, text_length=8\]"),
    ("short.npz", 16, r"needs x \[n, ...\], label \[n\], text \[n\] and others"),
  ]:
    with pytest.raises(ValueError, match=message):
      sources.npz("train", tmp_path / file, 256, text_length=length)
  with pytest.raises(ValueError, match="has no captions text_test; set text_length=0"):
    sources.npz("test", tmp_path / "bytes.npz", 256, text_length=16)
  with pytest.raises(ValueError, match=r"text: 'arrays' has texts uint8\[4, 3\]; expected uint8 \[5, length\]"):
    sources.from_arrays(x, text=np.zeros((4, 3), np.uint8), levels=256)


# ---- configs


def captioned_config(text_length):
  """The shipped config, small, for images of 4 by 4 pixels with captions of 16 bytes."""
  config = arguments.load(pathlib.Path(__file__).parents[1] / "configs" / "emoji64_text.py")
  network = {"channels": 8, "channel_multipliers": (1, 1), "groups": 4, "attention_levels": (1,), "heads": 2}
  network |= {"conditions": {"text": {"type": "text", "length": text_length, "width": 8, "layers": 1, "heads": 2}}}
  return config | {"network": config["network"] | network}


def test_a_config_tells_the_network_the_captions():
  x = np.zeros((5, 4, 4, 3), np.uint8)
  source = sources.from_arrays(x, text=encode_text(CAPTIONS, 16), levels=256)
  config = captioned_config(16)
  batch = {name: jnp.asarray(value) for name, value in source.gather(np.arange(5)).items()}
  assert np.array_equal(factory.make_cond(config, source)(batch)["text"], batch["text"])
  params = jax.eval_shape(lambda: factory.init_params(config, source))
  assert "conditions_text" in params["params"]
  keys, u = jax.random.split(jax.random.key(0), 5), jnp.linspace(0, 0.9, 5)
  objective = objectives.make_objective(config, source)
  assert jax.eval_shape(objective, params, keys, batch | {"u": u})[0].shape == (5,)
  with pytest.raises(ValueError, match=r"cond\['text'\] has shape \(1, 16\) .* pass bytes \[b, 12\]"):
    jax.eval_shape(objectives.make_objective(captioned_config(12), source), params, keys, batch | {"u": u})
  with pytest.raises(factory.ConfigError, match=r"config\.network\.conditions\.text needs data with 'text'"):
    objectives.make_objective(config, sources.from_arrays(x, levels=256))
