"""The train step against hand-written recursions, its randomness, its optimizer and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import compiled

from jaxdiff.parallel import make_mesh
from jaxdiff.training import init_state, make_optimizer, make_train_step
from jaxdiff.training.step import noise_keys, stratified_uniforms

BATCH = 8
INDEX = np.arange(BATCH, dtype=np.int32)


def quadratic(params, keys, batch):
  """Mean over examples of (w - x)^2: the gradient is 2 (w - mean x)."""
  return (params["w"] - batch["x"]) ** 2, {"x": batch["x"]}


def noisy(params, keys, batch):
  noise = jax.vmap(jax.random.normal)(keys)
  return (params["w"] * batch["u"] - batch["x"] - noise) ** 2, {}


def test_sgd_and_average_follow_the_numpy_recursion():
  rate, decay, steps = 0.3, 0.35, 12
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(steps, BATCH)).astype(np.float32)
  optimizer = optax.sgd(rate)
  step = jax.jit(make_train_step(quadratic, optimizer, decay, BATCH))
  state = init_state({"w": jnp.float32(2.0)}, optimizer, jax.random.key(0))
  w = ema = np.float64(2.0)
  decays = []
  for s, x in enumerate(batches):
    state, metrics = step(state, {"x": x}, INDEX)
    np.testing.assert_allclose(metrics["loss"], np.mean((w - x) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["x"], np.mean(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], abs(2 * (w - np.mean(x))), rtol=1e-5, atol=1e-6)
    w = w - rate * 2 * (w - np.mean(x))
    decays.append(min(decay, (1 + s) / (10 + s)))
    ema = decays[-1] * ema + (1 - decays[-1]) * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema_params["w"], ema, rtol=1e-5)
  assert decays[0] == 0.1 and decays[-1] == decay  # noqa: PT018
  assert int(state.step) == steps


def test_average_of_bfloat16_parameters_is_float32():
  optimizer = optax.sgd(0.0)
  state = init_state({"w": jnp.ones((), jnp.bfloat16)}, optimizer, jax.random.key(0))
  with jax.numpy_dtype_promotion("standard"):
    state, _ = make_train_step(quadratic, optimizer, 0.999, BATCH)(state, {"x": jnp.zeros(BATCH)}, jnp.asarray(INDEX))
  assert state.params["w"].dtype == jnp.bfloat16
  assert state.ema_params["w"].dtype == jnp.float32


def test_init_state_copies_what_it_is_given():
  params, key = {"w": jnp.ones(())}, jax.random.key(0)
  optimizer = optax.adam(1e-3)
  step = jax.jit(make_train_step(quadratic, optimizer, 0.9, BATCH), donate_argnums=0)
  step(init_state(params, optimizer, key), {"x": np.zeros(BATCH, np.float32)}, INDEX)
  assert float(params["w"]) == 1.0
  jax.random.uniform(key)


def test_weak_types_do_not_compile_the_second_step_again():
  """A weak type of a parameter, as of `1.0 * jnp.ones`, or of the optimizer's state becomes strong in a step."""
  scale = optax.GradientTransformation(lambda params: jnp.array(1.0), lambda updates, state, params: (updates, state))
  params = jax.tree.map(lambda p: p * 2, {"w": jnp.asarray(1.0)})
  assert params["w"].weak_type
  state = init_state(params, scale, jax.random.key(0))
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(state._replace(key=0)) if isinstance(leaf, jax.Array))


@pytest.mark.parametrize("global_batch", [8, 12, 128])
def test_one_uniform_in_every_cell(global_batch):
  index = jnp.arange(global_batch)
  firsts = []
  for step in range(5):
    u = np.asarray(stratified_uniforms(jax.random.key(0), jnp.int32(step), index, global_batch))
    assert u.dtype == np.float32
    assert sorted(np.floor(u * global_batch)) == list(range(global_batch))
    np.testing.assert_allclose(np.diff(np.sort(u)), 1 / global_batch, atol=1e-6)
    firsts.append(float(u[0]))
  assert len(set(firsts)) == 5


def test_uniforms_are_uniform_and_independent_of_the_noise():
  # 4000 steps: the mean of u has standard error 1 / sqrt(12 * 4000) = 0.0046, the correlation 1 / sqrt(4000) = 0.016.
  def draw(key, step):
    index = jnp.zeros((1,), jnp.int32)
    return stratified_uniforms(key, step, index, 8)[0], jax.random.uniform(noise_keys(key, step, index)[0])

  u, z = compiled(jax.vmap(draw, in_axes=(None, 0)), jax.random.key(1), np.arange(4000))
  assert abs(u.mean() - 0.5) < 4 * 0.0046
  assert abs(np.corrcoef(u, z)[0, 1]) < 4 * 0.016


def test_noise_keys_are_the_documented_ones():
  key, step = jax.random.key(4), jnp.int32(9)
  keys = noise_keys(key, step, jnp.array([3, 700_000], jnp.int32))
  for got, i in zip(keys, (3, 700_000), strict=True):
    want = jax.random.fold_in(jax.random.fold_in(key, 9), i)
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(want))


def test_permuting_examples_with_their_indices_changes_nothing():
  optimizer = optax.sgd(0.1)
  step = make_train_step(noisy, optimizer, 0.9, BATCH)
  x, order = np.random.default_rng(2).normal(size=BATCH).astype(np.float32), np.random.default_rng(3).permutation(BATCH)
  state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
  plain, metrics = step(state, {"x": x}, jnp.asarray(INDEX))
  permuted, permuted_metrics = step(state, {"x": x[order]}, jnp.asarray(INDEX[order]))
  np.testing.assert_allclose(permuted_metrics["loss"], metrics["loss"], rtol=1e-6)
  np.testing.assert_allclose(permuted.params["w"], plain.params["w"], rtol=1e-6)
  _, other = step(state, {"x": x[order]}, jnp.asarray(INDEX))
  assert abs(float(other["loss"] - metrics["loss"])) > 1e-3


@pytest.mark.parametrize(
  ("objective", "batch", "message"),
  [
    (lambda p, k, b: (jnp.mean(p["w"] * b["x"]), {}), {"x": np.zeros(8)}, r"loss has shape \(\).*\(8,\)"),
    (lambda p, k, b: (p["w"] * b["x"], {"a": b["x"][:2]}), {"x": np.zeros(8)}, r"aux\['a'\] has shape \(2,\)"),
    (lambda p, k, b: (p["w"] * b["x"], {"loss": b["x"]}), {"x": np.zeros(8)}, "'loss'.*taken"),
    (quadratic, {"x": np.zeros(8), "u": np.zeros(8)}, '"u" is taken'),
    (quadratic, {"x": np.zeros(8), "step": np.zeros(8)}, '"step" is taken by the number of steps done'),
    (quadratic, {"x": np.zeros(8), "index": np.zeros(8)}, '"index" is taken by the global indices'),
  ],
)
def test_wrong_objectives_are_refused(objective, batch, message):
  optimizer = optax.sgd(0.1)
  state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
  batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}
  with pytest.raises(ValueError, match=message):
    make_train_step(objective, optimizer, 0.9, BATCH)(state, batch, jnp.asarray(INDEX))


def test_wrong_arguments_are_refused():
  optimizer = optax.sgd(0.1)
  with pytest.raises(ValueError, match=r"ema_decay=1\.0"):
    make_train_step(quadratic, optimizer, 1.0, BATCH)
  with pytest.raises(ValueError, match="global_batch=0"):
    make_train_step(quadratic, optimizer, 0.9, 0)
  state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
  with pytest.raises(ValueError, match="global_batch=16"):
    make_train_step(quadratic, optimizer, 0.9, 16)(state, {"x": jnp.zeros(8)}, jnp.asarray(INDEX))
  with pytest.raises(ValueError, match="threefry"):
    init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0, impl="rbg"))
  with pytest.raises(TypeError, match=r"params\['w'\].*int32"):
    init_state({"w": jnp.ones((), jnp.int32)}, optimizer, jax.random.key(0))


def learning_rates(steps, **options):
  """The learning rate of each step, read off a parameter: Adam on a constant gradient moves by the rate."""
  optimizer = make_optimizer(1e-2, clip_norm=None, b1=0.0, b2=0.0, **options)
  with jax.numpy_dtype_promotion("standard"):
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(steps):
      update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
      moves.append(-float(update))
  return np.array(moves)


def test_learning_rate_schedules():
  # b1 = b2 = 0: the update is rate * g / (|g| + 1e-8).
  rise = 1e-2 * (1 / 4 + np.arange(4) / 4 * 3 / 4)
  constant = learning_rates(12, warmup_steps=4, total_steps=20, schedule="constant")
  np.testing.assert_allclose(constant, np.concatenate([rise, np.full(8, 1e-2)]), rtol=1e-4)
  cosine = learning_rates(21, warmup_steps=4, total_steps=20)
  fall = 1e-2 * 0.5 * (1 + np.cos(np.pi * np.arange(17) / 16))
  np.testing.assert_allclose(cosine, np.concatenate([rise, fall]), rtol=1e-4, atol=1e-8)
  np.testing.assert_allclose(learning_rates(3, warmup_steps=0, total_steps=9, schedule="constant"), 1e-2, rtol=1e-4)


def test_weight_decay_and_clipping():
  with jax.numpy_dtype_promotion("standard"):
    optimizer = make_optimizer(0.1, 0, 10, weight_decay=0.5, schedule="constant")
    update, _ = optimizer.update(jnp.zeros(()), optimizer.init(jnp.float32(3.0)), jnp.float32(3.0))
    np.testing.assert_allclose(update, -0.1 * 0.5 * 3.0, rtol=1e-5)
    # Adam is blind to the scale of all gradients, not to one clipped gradient after a small one.
    moves = {}
    for clip in (None, 1.0):
      optimizer = make_optimizer(0.1, 0, 10, clip_norm=clip, schedule="constant")
      state = optimizer.init(jnp.zeros(()))
      for gradient in (0.5, 100.0):
        update, state = optimizer.update(jnp.float32(gradient), state, jnp.zeros(()))
      moves[clip] = float(update)
  by_hand = {}
  for clip, second in {None: 100.0, 1.0: 1.0}.items():
    m, v = 0.9 * 0.1 * 0.5 + 0.1 * second, 0.999 * 0.001 * 0.25 + 0.001 * second**2
    by_hand[clip] = -0.1 * (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
  assert moves == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(
  "wrong",
  [
    {"learning_rate": 0.0},
    {"warmup_steps": 10},
    {"clip_norm": -1.0},
    {"weight_decay": -1.0},
    {"b1": 1.0},
    {"b2": -0.1},
  ],
)
def test_optimizer_arguments_out_of_range(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
    make_optimizer(**{"learning_rate": 1e-3, "warmup_steps": 1, "total_steps": 10, **wrong})


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_gives_the_gradient_of_jit(check_vma):
  """With check_vma=True autodiff sums over devices by itself: the sum must not be taken twice."""
  optimizer = optax.sgd(0.1)
  step = make_train_step(quadratic, optimizer, 0.9, BATCH)
  state = init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0))
  batch, index = {"x": jnp.arange(float(BATCH))}, jnp.asarray(INDEX)
  mesh, whole, split = (
    make_mesh(jax.local_devices()[:4]),
    jax.sharding.PartitionSpec(),
    jax.sharding.PartitionSpec("data"),
  )
  mapped = jax.shard_map(
    lambda s, b, i: step(s, b, i, axis_name="data"),
    mesh=mesh,
    in_specs=(whole, split, split),
    out_specs=(whole, whole),
    check_vma=check_vma,
  )
  expected, metrics = jax.jit(step)(state, batch, index)
  result, other = jax.jit(mapped)(state, batch, index)
  np.testing.assert_allclose(result.params["w"], expected.params["w"], rtol=1e-6)
  np.testing.assert_allclose(other["grad_norm"], metrics["grad_norm"], rtol=1e-6)
