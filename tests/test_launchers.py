"""Launchers do not change results: one train step on one device, 8-way, 2x4 data x fsdp and by pmap."""

import collections
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel import fsdp_shardings, jit_launcher, make_mesh, pmap_launcher, preempted, replicated
from jaxdiff.parallel.sharding import SMALLEST
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step, noise_keys, stratified_uniforms

pytestmark = pytest.mark.standard_promotion  # Optax and the norms of linen
BATCH, STEPS = 16, 5
INDEX = np.arange(BATCH, dtype=np.int32)


class Net(nn.Module):
  """Convolutions and norms; three of the kernels are large enough to be split."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(32, (3, 3), param_dtype=x.dtype)(x)
    x = nn.silu(nn.GroupNorm(4, param_dtype=x.dtype)(x))
    x = nn.Conv(64, (3, 3), param_dtype=x.dtype)(x)
    x = nn.silu(nn.GroupNorm(4, param_dtype=x.dtype)(x))
    x = nn.Dense(64, param_dtype=x.dtype)(x)
    return nn.Conv(2, (3, 3), param_dtype=x.dtype)(x)


def objective(params, keys, batch):
  noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 2), jnp.float32))(keys).astype(batch["x"].dtype)
  u = batch["u"][:, None, None, None].astype(noise.dtype)
  losses = jnp.mean((Net().apply(params, (1 - u) * batch["x"] + u * noise) - noise) ** 2, (1, 2, 3))
  return losses, {"noise": noise[:, 0, 0, 0]}


def init(optimizer, dtype=jnp.float32):
  return lambda: init_state(Net().init(jax.random.key(1), jnp.zeros((1, 4, 4, 2), dtype)), optimizer, jax.random.key(0))


def data(steps=None, dtype=np.float32):
  shape = (BATCH, 4, 4, 2) if steps is None else (steps, BATCH, 4, 4, 2)
  return {"x": np.random.default_rng(0).normal(size=shape).astype(dtype)}


def launchers():
  devices = jax.local_devices()
  assert len(devices) == 8
  return {
    "one": jit_launcher(make_mesh(devices[:1])),
    "data": jit_launcher(make_mesh(devices)),
    "fsdp": jit_launcher(make_mesh(devices, fsdp=4)),
    "pmap": pmap_launcher(devices),
  }


LAYOUTS = ("data", "fsdp", "pmap")


def run(launcher, optimizer, steps, dtype=np.float32):
  step_fn = launcher.compile(make_train_step(objective, optimizer, 0.9, BATCH))
  state, index = launcher.create(init(optimizer, dtype)), launcher.put(INDEX)
  for _ in range(steps):
    state, metrics = step_fn(state, launcher.put(data(dtype=dtype)), index)
  return jax.device_get((state.params, state.ema_params)), jax.device_get(metrics)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def start(optimizer, dtype=jnp.float32):
  return jax.device_get(jax.jit(init(optimizer, dtype))().params)


@pytest.fixture(scope="module")
def gradients():
  """SGD with rate 1: the update is minus the gradient."""
  with jax.numpy_dtype_promotion("standard"):
    sgd = optax.sgd(1.0)
    first = flat(start(sgd))
    return {name: first - flat(run(launcher, sgd, 1)[0][0]) for name, launcher in launchers().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_equal_on_any_layout(gradients, layout):
  norm = np.linalg.norm(gradients["one"])
  assert norm > 0.1
  assert np.linalg.norm(gradients[layout] - gradients["one"]) < 1e-5 * norm


@pytest.fixture(scope="module")
def trained():
  with jax.numpy_dtype_promotion("standard"):
    return {name: run(launcher, optax.sgd(0.1), STEPS) for name, launcher in launchers().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_five_steps_are_equal_on_any_layout(trained, layout):
  (params, metrics), (expected, expected_metrics) = trained[layout], trained["one"]
  assert np.linalg.norm(flat(expected[0]) - flat(start(optax.sgd(0.1)))) > 1e-2
  # An entry near zero keeps the rounding of its leaf: 1e-5 of the entry, or 1e-6 of one.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
  for name in expected_metrics:
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)


@pytest.mark.slow
def test_adam_in_double_precision_is_equal_on_any_layout(x64):
  optimizer = optax.adam(1e-2)
  results = {name: run(launcher, optimizer, 3, np.float64)[0][0] for name, launcher in launchers().items()}
  one, gradient = results["one"], gradient_of(np.float64)
  for layout in LAYOUTS:
    for path, leaf in jax.tree_util.tree_leaves_with_path(results[layout]):
      name = jax.tree_util.keystr(path)
      if np.abs(gradient[name]).min() > 1e-9:  # Adam divides the rounding of a zero gradient by itself
        np.testing.assert_allclose(leaf, leaf_of(one, name), atol=1e-8, rtol=1e-8)
      else:
        assert name.endswith("['bias']")  # before a norm


def gradient_of(dtype):
  sgd = optax.sgd(1.0)
  difference = jax.tree.map(np.subtract, start(sgd, dtype), run(launchers()["one"], sgd, 1, dtype)[0][0])
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(difference)}


def leaf_of(tree, name):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}[name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_bitwise_equal_on_any_layout(layout):
  def draw(state, batch, index, axis_name=None):
    noise = jax.vmap(jax.random.normal)(noise_keys(state["key"], jnp.int32(3), index))
    noise = jnp.stack([noise, stratified_uniforms(state["key"], jnp.int32(3), index, BATCH)])
    if axis_name is not None:
      noise = jnp.swapaxes(jax.lax.all_gather(noise, axis_name), 0, 1).reshape(2, BATCH)
    return state, noise

  def drawn(launcher):
    state, index = launcher.create(lambda: {"key": jax.random.key(5), "w": jnp.ones(8)}), launcher.put(INDEX)
    return np.asarray(launcher.compile(draw)(state, index, index)[1])

  everything = launchers()
  np.testing.assert_array_equal(drawn(everything[layout]), drawn(everything["one"]))


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def compiled(launcher):
  state, batch, index = launcher.create(init(ADAM)), launcher.put(data()), launcher.put(INDEX)
  step_fn = launcher.compile(make_train_step(objective, ADAM, 0.9, BATCH))
  return step_fn.lower(state, batch, index).compile().as_text(), state


def collectives(text):
  """{kind: the shapes of what it gives} of a compiled program; all arrays have 4 bytes."""
  found = collections.defaultdict(list)
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
  for result, kind in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text):
    for shape in re.findall(r"[a-z]+[0-9]+\[([0-9,]*)\]", result):
      found[kind].append(tuple(int(n) for n in shape.split(",") if n))
  return found


def elements(shapes):
  return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("layout", ["data", "pmap"])
def test_data_parallel_step_sums_gradients_and_metrics_alone(layout):
  text, state = compiled(launchers()[layout])
  found = collectives(text)
  assert set(found) == {"all-reduce"}
  parameters = elements(leaf.shape for leaf in jax.tree.leaves(state.params))
  metrics = 2  # loss and noise; the norm of the gradient is that of the sum
  assert parameters < elements(found["all-reduce"]) <= parameters + metrics


def test_fsdp_gathers_parameters_and_never_optimizer_state():
  text, state = compiled(launchers()["fsdp"])
  found = collectives(text)
  split = [leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.size >= SMALLEST]
  assert len(split) == 2
  # Each parameter once: its two moments and its average have the same shape.
  assert sorted(found.pop("all-gather")) == sorted(split)
  parameters, metrics = elements(leaf.shape for leaf in jax.tree.leaves(state.params)), 4
  # XLA's CPU backend sums whole gradients and then takes a part.
  assert set(found) <= {"all-reduce"} | ({"reduce-scatter"} if jax.default_backend() != "cpu" else set())
  assert elements(shape for shapes in found.values() for shape in shapes) <= parameters + metrics


def test_state_is_created_in_parts():
  launcher = launchers()["fsdp"]
  state = launcher.create(init(ADAM))
  parts = 0
  for leaf in jax.tree.leaves((state.params, state.ema_params, state.opt_state)):
    expected = list(leaf.shape)
    if leaf.size >= SMALLEST:
      expected[-1] //= 4
      parts += 1
    assert {shard.data.shape for shard in leaf.addressable_shards} == {tuple(expected)}
  assert parts == 2 * 4  # parameters, average and two moments
  abstract = launcher.abstract(init(ADAM))
  assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract) == jax.tree.map(
    lambda a: (a.shape, a.dtype, a.sharding), state
  )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_neither_compile_again_nor_copy_between_host_and_devices(layout):
  launcher, traces, compilations = launchers()[layout], [], []
  listener = lambda name, seconds, **_: compilations.append(1) if name.endswith("/backend_compile_duration") else None

  def counted(params, keys, batch):
    traces.append(1)
    return objective(params, keys, batch)

  step_fn = launcher.compile(make_train_step(counted, ADAM, 0.9, BATCH))
  state, index = launcher.create(init(ADAM)), launcher.put(INDEX)
  before = jax.tree.map(lambda leaf: (leaf.sharding, leaf.shape), launcher.abstract(init(ADAM)))
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for _ in range(4):
      batch, previous = launcher.put(data()), state
      with jax.transfer_guard("disallow"):
        state, _ = step_fn(state, batch, index)
      assert (len(traces), len(compilations)) == (1, 1)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous.params))
  same = lambda leaf, then: leaf.sharding.is_equivalent_to(then[0], leaf.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, state, before)))


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_several_steps_in_one_call_are_the_single_steps(layout):
  launcher, optimizer = launchers()[layout], optax.sgd(0.1)
  step = make_train_step(objective, optimizer, 0.9, BATCH)
  state, index, batches, single = launcher.create(init(optimizer)), launcher.put(INDEX), data(3), []
  step_fn = launcher.compile(step)
  for k in range(3):
    state, metrics = step_fn(state, launcher.put({"x": batches["x"][k]}), index)
    single.append(float(metrics["loss"]))
  several, losses = launcher.compile(step, steps=3)(
    launcher.create(init(optimizer)), launcher.put(batches, steps=3), index
  )
  assert losses["loss"].shape == (3,)
  np.testing.assert_allclose(losses["loss"], single, rtol=1e-6)
  assert int(several.step) == 3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), several.params, state.params)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((3, 3, 64, 128), (None, None, None, "fsdp")),
    ((128, 64), ("fsdp",)),
    ((64, 64), (None, "fsdp")),
    ((4096, 6), ("fsdp",)),
    ((2, 6000, 9), (None, "fsdp")),
    ((63, 65), ()),
    ((4095,), ()),
    ((), ()),
  ],
)
def test_the_largest_dimension_that_divides_is_split(shape, spec):
  tree = {"x": jax.ShapeDtypeStruct(shape, np.float32), "other": jax.ShapeDtypeStruct((8, 8), np.float32)}
  mesh = make_mesh(jax.local_devices(), fsdp=4)
  assert tuple(fsdp_shardings(mesh, tree)["x"].spec) == spec
  assert fsdp_shardings(mesh, tree)["other"] == replicated(mesh)
  assert fsdp_shardings(make_mesh(), tree)["x"] == replicated(make_mesh())


def test_fsdp_that_fits_nothing_is_refused():
  launcher = jit_launcher(make_mesh(jax.local_devices(), fsdp=8))
  with pytest.raises(ValueError, match=r"fsdp=8: divides no dimension .* largest is 6; take fsdp=2"):
    launcher.create(lambda: {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"fsdp=8: divides no dimension .* largest is 3; take fsdp=1, which"):
    launcher.abstract(lambda: {"w": jnp.zeros((3, 3))})


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_that_does_not_divide_the_devices_is_refused(fsdp):
  with pytest.raises(ValueError, match=rf"fsdp={fsdp}: 8 devices .* valid values are 1, 2, 4, 8$"):
    make_mesh(jax.local_devices(), fsdp=fsdp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_batches_are_refused(layout):
  launcher = launchers()[layout]
  with pytest.raises(ValueError, match="batch: 12 examples cannot be split over 8 devices; the nearest .* is 16"):
    launcher.put({"x": np.zeros((12, 2))})
  with pytest.raises(ValueError, match=r"same leading.*'x'.*\(8, 2\).*'y'.*\(16,\)"):
    launcher.put({"x": np.zeros((8, 2)), "y": np.zeros(16)})
  with pytest.raises(ValueError, match=r"leading axis of steps=3 batches.*\(2, 8\)"):
    launcher.put({"x": np.zeros((2, 8))}, steps=3)
  with pytest.raises(ValueError, match="batch: 4 examples"):
    launcher.put({"x": np.zeros((8, 4))}, steps=8)
  with pytest.raises(ValueError, match="steps=0: must be at least 1"):
    launcher.compile(lambda state, batch, index: (state, {}), steps=0)


def test_a_process_alone_is_not_preempted():
  assert not preempted(1)
