"""The diffusion transformer: published sizes, the identity at first, patches, one loop or many blocks, precision."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import scipy.special

from jaxdiff.models import DiT, conditioning, dit

CONDITIONS = {
  "label": conditioning.Label(3),
  "small": conditioning.Image(2),
  "words": conditioning.Embedding(5, sequence=True),
}
NET = DiT(width=8, depth=2, heads=2, conditions=CONDITIONS)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, T = normal(1, 3, 4, 6, 2), np.array([1e-3, 0.4, 1.0], np.float32)
WORDS = normal(3, 3, 4, 5)
WORDS[0, 2:] = 0.0
COND = {"label": np.array([0, 3, 2]), "small": normal(2, 3, 2, 3, 2), "words": WORDS}
COTANGENT = normal(4, *X.shape)


@functools.cache
def moved():
  return networks.moved(NET, X, T, **COND)


@functools.cache
def program(**fields):
  return networks.program(NET.clone(**fields))


def applied(t=T, cond=COND, **fields):
  """The output with moved parameters, and the gradient of its product with an array."""
  params = dit.stacked(moved()) if fields.get("scan") else moved()
  return jax.device_get(program(**fields)(params, X, t, cond, COTANGENT)[:2])


@pytest.mark.parametrize(
  ("make", "counts", "millions"),
  [
    (dit.dit_s, (32_865_056, 32_920_448, 33_142_016), (33, 33, 33)),
    (dit.dit_b, (130_315_808, 130_426_496, 130_869_248), (130, 130, 131)),
    (dit.dit_l, (457_840_672, 457_988_224, 458_578_432), (458, 458, 459)),
    (dit.dit_xl, (674_834_720, 675_000_704, 675_664_640), (675, 675, 676)),
  ],
)
def test_sizes_are_the_published_ones(make, counts, millions):
  """Table 4 of the paper."""
  x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
  t, label = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
  for patch, count, million in zip((2, 4, 8), counts, millions, strict=True):
    params = jax.eval_shape(make(patch).clone(scan=True).init, jax.random.key(0), x, t, label=label)
    found = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found == count
    assert round(found / 1e6) == million
    assert f"{count:,} ({million} M)" in dit.__doc__


def test_the_network_is_zero_and_its_blocks_the_identity_at_first():
  """Its last layer is zero, and so are those that blocks end with, whatever the others are."""
  net = NET.clone(parts=2)
  params = networks.at_first(net, networks.moved(net, X, T, **COND), ["output"], X, T, **COND)
  block, h, e, tokens = dit.Block(heads=2), normal(5, 2, 6, 8), normal(6, 2, 8), normal(7, 2, 3, 8)
  full = networks.filled(jax.eval_shape(block.init, jax.random.key(0), h, e, tokens))
  first = networks.at_first(block, full, ["modulation", "cross_output"], h, e, tokens)
  run = lambda params, blocks: (net.apply(params, X, T, **COND), [block.apply(p, h, e, tokens) for p in blocks])
  y, (same, other) = jax.device_get(jax.jit(run)(params, [first, full]))
  assert y.shape == (3, 4, 6, 4)
  assert y.dtype == X.dtype
  np.testing.assert_array_equal(y, 0.0)
  np.testing.assert_array_equal(same, h)
  assert np.abs(other - h).max() > 1e-2


def test_patches_are_squares_of_the_image_row_after_row():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
  patches, back = jax.jit(lambda x: (y := dit.patchify(x, 2), dit.unpatchify(y, 4, 6, 2)))(x)
  assert patches.shape == (2, 6, 12)
  np.testing.assert_array_equal(np.asarray(patches)[1, 4], x[1, 2:4, 2:4].reshape(-1))
  np.testing.assert_array_equal(back, x)


def test_positions_are_waves_of_column_and_row():
  found = dit.position_embedding(2, 3, 8)
  for row in range(2):
    for column in range(3):
      waves = [wave(place * w) for place in (column, row) for wave in (np.sin, np.cos) for w in (1.0, 0.01)]
      np.testing.assert_allclose(found[3 * row + column], waves, atol=1e-12)


def test_a_block_equals_the_textbook_formula():
  block = dit.Block(heads=2, mlp_ratio=2.0)
  h, e, tokens = normal(0, 2, 3, 8), normal(1, 2, 8), normal(2, 2, 4, 8)
  mask = np.array([[True, True, False, True], [True] * 4])
  params = networks.filled(jax.eval_shape(block.init, jax.random.key(0), h, e, tokens, mask))
  found = jax.jit(block.apply)(params, h, e, tokens, mask)
  weights = jax.tree.map(np.float64, params["params"])
  dense = lambda name, y: y @ weights[name]["kernel"] + weights[name]["bias"]
  norm = lambda y: (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)

  def attend(query, key, value, there):
    query, key, value = (y.reshape(*y.shape[:2], 2, 4) for y in (query, key, value))
    logits = np.where(there[:, None, None, :], np.einsum("bqhd,bkhd->bhqk", query, key) / 2, -np.inf)
    return np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(logits, -1), value).reshape(2, 3, 8)

  y, all_of_them = np.float64(h), np.ones((2, 3), bool)
  b1, s1, g1, b2, s2, g2 = np.split(dense("modulation", np.float64(e) * scipy.special.expit(e)), 6, axis=-1)
  each = np.split(dense("query_key_value", norm(y) * (1 + s1[:, None]) + b1[:, None]), 3, axis=-1)
  y = y + g1[:, None] * dense("attention_output", attend(*each, all_of_them))
  pair = np.split(dense("cross_key_value", np.float64(tokens)), 2, axis=-1)
  y = y + dense("cross_output", attend(dense("cross_query", norm(y)), *pair, np.asarray(mask)))
  hidden = dense("perceptron_1", norm(y) * (1 + s2[:, None]) + b2[:, None])
  gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  y = y + g2[:, None] * dense("perceptron_2", gelu)
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"remat": "dots"}, {"scan": True, "remat": "full"}])
def test_one_loop_and_recomputation_change_neither_outputs_nor_gradients(fields):
  (y, gradient), (plain_y, plain) = applied(**fields), applied()
  plain = dit.stacked(plain) if "scan" in fields else plain
  assert jax.tree.structure(gradient) == jax.tree.structure(plain)
  np.testing.assert_allclose(y, plain_y, rtol=1e-5, atol=1e-5 * np.abs(plain_y).max())
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
  assert norm(jax.tree.map(np.subtract, gradient, plain)) <= 1e-5 * norm(plain)  # float32 sums in another order


def test_the_loop_initializes_every_block_by_itself_and_alike():
  shape = lambda leaf: leaf.shape
  scan = NET.clone(scan=True)
  params = jax.eval_shape(scan.init, jax.random.key(0), X, T, **COND)
  assert jax.tree.map(shape, params) == jax.tree.map(shape, dit.stacked(moved()))
  kernel = lambda block: block["query_key_value"]["kernel"]

  @jax.jit
  def kernels(key):
    loop, plain = (net.init(key, X, T, **COND)["params"] for net in (scan, NET))
    return kernel(loop["blocks"]), jnp.stack([kernel(plain[f"block_{i}"]) for i in range(2)])

  loop, plain = jax.device_get(kernels(jax.random.key(0)))
  assert np.abs(loop[0] - loop[1]).max() > 1e-2
  np.testing.assert_allclose(loop.std(), plain.std(), rtol=0.15)  # 384 uniform numbers each: 2 % by chance


def test_what_is_kept_is_what_the_policy_says():
  def kept(**fields):
    net = DiT(width=16, depth=4, heads=2, **fields)
    x, t = jax.ShapeDtypeStruct((32, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    backward = jax.eval_shape(lambda p, x, t: jax.vjp(lambda p: net.apply(p, x, t), p)[1], params, x, t)
    return sum(leaf.size for leaf in jax.tree.leaves(backward) if 32 in leaf.shape[:2])

  for scan in (False, True):
    none, dots, full = (kept(scan=scan, remat=remat) for remat in ("none", "dots", "full"))
    assert full < dots / 2 < none / 4, (none, dots, full)


def test_a_gradient_reaches_every_parameter():
  assert not networks.silent(applied()[1])


@pytest.mark.standard_promotion
def test_bfloat16_computes_near_float32():
  y, _ = applied()
  z = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)(moved(), X, T, **COND)
  assert z.dtype == X.dtype
  assert 0 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.02


def test_parameters_are_of_their_own_type():
  net = DiT(width=8, depth=1, heads=2, param_dtype=jnp.bfloat16)
  params = jax.eval_shape(net.init, jax.random.key(0), X, T)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.standard_promotion
def test_float64_is_kept_in_forward_mode(x64):
  """Central differences agree with the tangent to 1e-6; rounded to float32 anywhere they would to 1e-2."""
  net = DiT(width=8, depth=2, heads=2, scan=True, remat="full", dtype=jnp.float64, param_dtype=jnp.float64)
  x, v = np.random.default_rng(1).normal(size=(2, 1, 4, 4, 1))
  params = networks.moved(net, x, np.ones(1))
  apply = lambda x: net.apply(params, x, jnp.full(len(x), 0.1, jnp.float64))
  run = jax.jit(lambda x, v: (jax.jvp(apply, (x,), (v,))[1], apply(jnp.concatenate([x + 1e-5 * v, x - 1e-5 * v]))))
  tangent, (after, before) = jax.device_get(run(x, v))
  assert tangent.dtype == np.float64
  np.testing.assert_allclose((after - before) / 2e-5, tangent[0], atol=1e-6 * np.abs(tangent).max())


def test_every_condition_acts_and_batch_mates_do_not():
  y, _ = applied()
  others = {name: value.copy() for name, value in COND.items()}
  others["label"][0] = 1
  others["small"][0] += 1.0
  others["words"][0, 0] += 1.0
  for name, value in others.items():
    z, _ = applied(cond=COND | {name: value})
    assert np.abs(z[0] - y[0]).max() > 1e-3, name
    np.testing.assert_array_equal(z[1:], y[1:])
  assert np.abs(applied(t=np.array([0.1, 0.4, 1.0], np.float32))[0][0] - y[0]).max() > 1e-3


def test_without_positions_patches_are_a_set(monkeypatch):
  net, x = DiT(width=8, depth=1, heads=2), X[:, :, :4]
  params = networks.moved(net, x, T)
  swap = lambda y: np.concatenate([y[:, :2, 2:], y[:, :2, :2]], axis=2)
  mix = lambda y: np.concatenate([swap(y), y[:, 2:]], axis=1)
  placed = jax.jit(lambda x: net.apply(params, x, T))
  assert np.abs(placed(mix(x)) - mix(np.asarray(placed(x)))).max() > 1e-3
  monkeypatch.setattr(dit, "position_embedding", lambda rows, columns, width: np.zeros((rows * columns, width)))
  free = jax.jit(lambda x: net.apply(params, x, T))
  np.testing.assert_allclose(free(mix(x)), mix(np.asarray(free(x))), atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "shape", "message"),
  [
    ({"patch": 4}, (2, 8, 6, 1), "width of x=6 is not divisible by patch=4"),
    ({"patch": 4}, (2, 6, 8, 1), "height of x=6 is not divisible by patch=4"),
    ({"width": 18}, (2, 4, 4, 1), "width=18 is not divisible by the four waves of the positions=4"),
    ({"heads": 3}, (2, 4, 4, 1), "width=16 is not divisible by heads=3"),
    ({"depth": 0}, (2, 4, 4, 1), "depth=0 must be positive"),
    ({"remat": "half"}, (2, 4, 4, 1), "remat='half': must be 'none', 'dots' or 'full'"),
    ({}, (4, 4, 1), "x has shape"),
  ],
)
def test_wrong_arguments_are_named(fields, shape, message):
  net = DiT(**({"width": 16, "depth": 1, "heads": 2} | fields))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(net.init, jax.random.key(0), np.zeros(shape, np.float32), np.zeros(shape[0], np.float32))


def test_missing_conditions_are_named():
  with pytest.raises(ValueError, match="cond lacks 'label', 'small', 'words'"):
    jax.eval_shape(NET.init, jax.random.key(0), X, T)
