"""Launchers do not change results: one train step on one device, 8-way, 2x4 data x fsdp and by pmap."""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

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
FETCHED = (1, 2, STEPS)
INDEX = np.arange(BATCH, dtype=np.int32)


class Net(nn.Module):
  """Dense layers, a norm and a convolution; two of the kernels are large enough to be split."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(64, param_dtype=x.dtype)(x)
    x = nn.silu(nn.GroupNorm(4, param_dtype=x.dtype)(x))
    x = nn.silu(nn.Dense(128, param_dtype=x.dtype)(x))
    x = nn.silu(nn.Dense(64, param_dtype=x.dtype)(x))
    return nn.Conv(2, (3, 3), param_dtype=x.dtype)(x)


def objective(params, keys, batch):
  noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 2), jnp.float32))(keys).astype(batch["x"].dtype)
  u = batch["u"][:, None, None, None].astype(noise.dtype)
  losses = jnp.mean((Net().apply(params, (1 - u) * batch["x"] + u * noise) - noise) ** 2, (1, 2, 3))
  return losses, {"noise": noise[:, 0, 0, 0]}


def init(optimizer, dtype=jnp.float32):
  return lambda: init_state(Net().init(jax.random.key(1), jnp.zeros((1, 4, 4, 2), dtype)), optimizer, jax.random.key(0))


def data(dtype=np.float32):
  return np.random.default_rng(0).normal(size=(STEPS, BATCH, 4, 4, 2)).astype(dtype)


@functools.cache
def devices():
  """All eight: `jax.devices()` is one in tests, and the runs here belong to the whole file."""
  return jax.make_mesh((8,), ("all",)).devices.tolist()


@functools.cache
def launchers():
  return {
    "one": jit_launcher(make_mesh(devices()[:1])),
    "data": jit_launcher(make_mesh(devices())),
    "fsdp": jit_launcher(make_mesh(devices(), fsdp=4)),
    "pmap": pmap_launcher(devices()),
  }


LAYOUTS = ("data", "fsdp", "pmap")


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class Run(NamedTuple):
  """What a launcher did in `STEPS` steps, each on its own batch.

  Attributes:
    states: (parameters, average) on the host, after so many steps.
    metrics: of each step.
    counts: (traces, compilations) so far, after each step.
    created: (shape, dtype, sharding, shapes of the shards) of every leaf before the first step.
    deleted: whether the state before the last step is.
    state: the last one, on the devices.
    lower: of the step, for the compiled program.
  """

  states: dict
  metrics: list
  counts: list
  created: Any
  deleted: bool
  state: Any
  lower: Any


def facts(leaf):
  return leaf.shape, leaf.dtype, leaf.sharding, {shard.data.shape for shard in leaf.addressable_shards}


def optimizer():
  """The first update is minus the gradient, the next ones a tenth of it and with momentum; the clip changes nothing."""
  rate = lambda count: jnp.where(count == 0, 1.0, 0.1)
  return optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(rate, momentum=0.9))


@functools.cache
def run(layout):
  launcher, traces, compilations = launchers()[layout], [], []
  listener = lambda name, seconds, **_: compilations.append(1) if name.endswith("/backend_compile_duration") else None

  def counted(params, keys, batch):
    traces.append(1)
    return objective(params, keys, batch)

  step_fn = launcher.compile(make_train_step(counted, optimizer(), 0.9, BATCH))
  state, index = launcher.create(init(optimizer())), launcher.put(INDEX)
  created, states = jax.tree.map(facts, state), {0: jax.device_get((state.params, state.ema_params))}
  metrics, counts = [], []
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for x in data():
      batch, previous = launcher.put({"x": x}), state
      with jax.transfer_guard("disallow"):
        state, values = step_fn(state, batch, index)
      counts.append((len(traces), len(compilations)))
      if len(counts) in FETCHED:  # what the host holds a view of is not donated
        states[len(counts)] = jax.device_get((state.params, state.ema_params))
      metrics.append(jax.device_get(values))
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  deleted = all(leaf.is_deleted() for leaf in jax.tree.leaves(previous.params))
  return Run(states, metrics, counts, created, deleted, state, lambda: step_fn.lower(state, batch, index))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_equal_on_any_layout(layout):
  gradients = [flat(run(name).states[0][0]) - flat(run(name).states[1][0]) for name in ("one", layout)]
  norm = np.linalg.norm(gradients[0])
  assert 0.1 < norm < 10.0
  assert np.linalg.norm(gradients[1] - gradients[0]) < 1e-5 * norm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_five_steps_are_equal_on_any_layout(layout):
  result, expected = run(layout), run("one")
  assert np.linalg.norm(flat(expected.states[STEPS][0]) - flat(expected.states[1][0])) > 1e-2
  # An entry near zero keeps the rounding of its leaf: 1e-5 of the entry, or 1e-6 of one.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result.states[STEPS], expected.states[STEPS]
  )
  for name, value in expected.metrics[-1].items():
    np.testing.assert_allclose(result.metrics[-1][name], value, rtol=1e-5)


@pytest.mark.slow
def test_adam_in_double_precision_is_equal_on_any_layout(x64):
  optimizer = optax.adam(1e-2)
  results = {name: trained(launcher, optimizer, 3) for name, launcher in launchers().items()}
  one, gradients = results["one"], gradient()
  for layout in LAYOUTS:
    for path, leaf in jax.tree_util.tree_leaves_with_path(results[layout]):
      name = jax.tree_util.keystr(path)
      if np.abs(gradients[name]).min() > 1e-9:  # Adam divides the rounding of a zero gradient by itself
        np.testing.assert_allclose(leaf, leaf_of(one, name), atol=1e-8, rtol=1e-8)
      else:
        assert name.endswith("['bias']")  # before a norm


def trained(launcher, optimizer, steps):
  """The parameters after steps in double precision."""
  step_fn = launcher.compile(make_train_step(objective, optimizer, 0.9, BATCH))
  state, index = launcher.create(init(optimizer, np.float64)), launcher.put(INDEX)
  for _ in range(steps):
    state, _ = step_fn(state, launcher.put({"x": data(np.float64)[0]}), index)
  return jax.device_get(state.params)


def gradient():
  sgd = optax.sgd(1.0)
  start = jax.device_get(jax.jit(init(sgd, np.float64))().params)
  difference = jax.tree.map(np.subtract, start, trained(launchers()["one"], sgd, 1))
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(difference)}


def leaf_of(tree, name):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}[name]


def test_noise_is_bitwise_equal_on_any_layout():
  def draw(state, batch, index, axis_name=None):
    noise = jax.vmap(jax.random.normal)(noise_keys(state["key"], jnp.int32(3), index))
    noise = jnp.stack([noise, stratified_uniforms(state["key"], jnp.int32(3), index, BATCH)])
    if axis_name is not None:
      noise = jnp.swapaxes(jax.lax.all_gather(noise, axis_name), 0, 1).reshape(2, BATCH)
    return state, noise

  def drawn(launcher):
    state, index = launcher.create(lambda: {"key": jax.random.key(5), "w": jnp.ones(8)}), launcher.put(INDEX)
    return np.asarray(launcher.compile(draw)(state, index, index)[1])

  one, *others = (drawn(launcher) for launcher in launchers().values())
  assert len(np.unique(one)) == 2 * BATCH
  for other in others:
    np.testing.assert_array_equal(other, one)


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
  found = collectives(run(layout).lower().compile().as_text())
  assert set(found) == {"all-reduce"}
  parameters = elements(leaf.shape for leaf in jax.tree.leaves(run(layout).state.params))
  metrics = 2  # loss and noise; the norm of the gradient is that of the sum
  assert parameters < elements(found["all-reduce"]) <= parameters + metrics


def test_fsdp_gathers_parameters_and_never_optimizer_state():
  found = collectives(run("fsdp").lower().compile().as_text())
  leaves = jax.tree.leaves(run("fsdp").state.params)
  split = [leaf.shape for leaf in leaves if leaf.size >= SMALLEST]
  assert len(split) == 2
  # Each parameter once: its momentum and its average have the same shape.
  assert sorted(found.pop("all-gather")) == sorted(split)
  parameters, metrics = elements(leaf.shape for leaf in leaves), 4
  # XLA's CPU backend sums whole gradients and then takes a part.
  assert set(found) <= {"all-reduce"} | ({"reduce-scatter"} if jax.default_backend() != "cpu" else set())
  assert elements(shape for shapes in found.values() for shape in shapes) <= parameters + metrics


def test_state_is_created_in_parts():
  created, parts = run("fsdp").created, 0
  is_facts = lambda leaf: isinstance(leaf, tuple) and len(leaf) == 4 and isinstance(leaf[3], set)
  for shape, *_, shards in jax.tree.leaves((created.params, created.ema_params, created.opt_state), is_leaf=is_facts):
    expected = list(shape)
    if math.prod(shape) >= SMALLEST:
      expected[expected.index(max(expected))] //= 4
      parts += 1
    assert shards == {tuple(expected)}
  assert parts == 2 * 3  # parameters, average and momentum
  abstract = launchers()["fsdp"].abstract(init(optimizer()))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == b[:3], abstract, created)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_neither_compile_again_nor_copy_between_host_and_devices(layout):
  """Copies would have raised an error under the guard of `run`."""
  result = run(layout)
  assert result.counts == [(1, 1)] * STEPS
  assert result.deleted
  same = lambda leaf, created: leaf.shape == created[0] and leaf.sharding.is_equivalent_to(created[2], leaf.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, result.state, result.created)))


@pytest.mark.parametrize("layout", ["fsdp", "pmap"])
def test_several_steps_in_one_call_are_the_single_steps(layout):
  launcher, single = launchers()[layout], run(layout)
  several, losses = launcher.compile(make_train_step(objective, optimizer(), 0.9, BATCH), steps=2)(
    launcher.create(init(optimizer())), launcher.put({"x": data()[:2]}, steps=2), launcher.put(INDEX)
  )
  assert losses["loss"].shape == (2,)
  np.testing.assert_allclose(losses["loss"], [metrics["loss"] for metrics in single.metrics[:2]], rtol=1e-6)
  assert int(several.step) == 2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), several.params, single.states[2][0])


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
  mesh = make_mesh(devices(), fsdp=4)
  assert tuple(fsdp_shardings(mesh, tree)["x"].spec) == spec
  assert fsdp_shardings(mesh, tree)["other"] == replicated(mesh)
  assert fsdp_shardings(make_mesh(), tree)["x"] == replicated(make_mesh())


def test_fsdp_that_fits_nothing_is_refused():
  launcher = jit_launcher(make_mesh(devices(), fsdp=8))
  with pytest.raises(ValueError, match=r"fsdp=8: divides no dimension .* largest is 6; take fsdp=2"):
    launcher.create(lambda: {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"fsdp=8: divides no dimension .* largest is 3; take fsdp=1, which"):
    launcher.abstract(lambda: {"w": jnp.zeros((3, 3))})


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_that_does_not_divide_the_devices_is_refused(fsdp):
  with pytest.raises(ValueError, match=rf"fsdp={fsdp}: 8 devices .* valid values are 1, 2, 4, 8$"):
    make_mesh(devices(), fsdp=fsdp)


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
