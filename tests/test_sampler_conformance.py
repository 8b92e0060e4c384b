"""Every sampler that a config can name keeps the promises that all of them make.

Those of generators and of velocities take no score of such states: test_adversarial and test_sscs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import components, factory, schema
from jaxdiff.parallel import make_mesh, pmap_examples, replicate, shard_batch, shard_examples

KEY = jax.random.key(0)
FIELDS = {
  "adaptive_sde": {"rtol": 0.1, "atol": 0.1},
  "probability_flow": {"rtol": 1e-2, "atol": 1e-2},
  "cnf": {"rtol": 1e-2, "atol": 1e-2},
  "predictor_corrector": {"denoise": False},
  "annealed_langevin": {"steps": 2, "step_size": 0.01, "denoise": False},
}
KINDS = [kind for kind in components.SAMPLERS if kind not in ("denoising_gan", "sscs")]
ADAPTIVE = ("adaptive_sde", "probability_flow", "cnf")
EACH = pytest.mark.parametrize("kind", KINDS)
X = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)


def config(kind, steps=4):
  section = {"type": kind, **FIELDS.get(kind, {})}
  if "grid" in schema.subsections("sampler", section):
    section["grid"] = {"steps": steps}
  process = {"annealed_langevin": {"type": "NCSN", "levels": 4}, "cnf": {"type": "CNF"}}.get(kind, {"type": "VP"})
  return {"sde": process, "sampler": section}


@functools.cache
def build(kind, **options):
  """The sampler, with its path where it has one, and its process; the last time is where few steps are enough."""
  given = config(kind)
  process, sampler = factory.make_process(given), given["sampler"] | options
  path = {"path": True} if factory.has_path(given) else {}
  return factory.make_sampler(given | {"sampler": sampler}, process, **path), process


def score(x, t, center, broken, scale=1.0):
  """Towards a center; broken examples have no score below a time that every sampler passes."""
  value = scale * (center - x) / (0.1 + t[:, None] ** 2)
  return jnp.where(((t < 0.9) & broken)[:, None], jnp.nan, value)


def inputs(size=4):
  center = np.linspace(-1.0, 1.0, 2 * size, dtype=np.float32).reshape(size, 2)
  return X[:size], {"center": center, "broken": np.arange(size) == 1}


class Several:
  """Three evaluations of a network above half the time of the process and one below, known of the grid; or three."""

  def __init__(self, kind, scale, calls):
    self.half, self.adaptive, self.scale, self.calls = 0.5 * build(kind)[1].t1, kind in ADAPTIVE, scale, calls

  def __call__(self, x, t, **cond):
    jax.debug.callback(lambda t: self.calls.extend([1] * (3 if t[0] > self.half or self.adaptive else 1)), t)
    return score(x, t, scale=self.scale, **cond)

  def evaluations(self, times):
    return 3 if times is None else jnp.where(times > self.half, 3, 1)


@functools.cache
def program(kind):
  """The jitted sampler, the number of times it was traced, and the evaluations made."""
  sampler, traces, calls = build(kind)[0], [], []

  def run(keys, x, scale, cond):
    traces.append(1)
    return sampler(keys, x, Several(kind, scale, calls), cond)

  return jax.jit(run), traces, calls


@functools.cache
def drawn(kind):
  """Samples of four examples, one of them broken, and the evaluations that were made."""
  run, _, calls = program(kind)
  sample = jax.device_get(run(jd.example_keys(KEY, 0, 4), inputs()[0], 1.0, inputs()[1]))
  jax.effects_barrier()
  return sample, len(calls)


@EACH
def test_a_broken_example_is_named_and_has_no_part_in_the_others(kind):
  """Its path is that of the others up to there; an adaptive solve gives it up."""
  (x_T, _), (sample, _) = inputs(), drawn(kind)
  whole = np.asarray([0, 2, 3])
  assert sample.status.code.tolist() == [0, 2, 0, 0]
  assert np.all(np.isfinite(sample.x), axis=1).tolist() == [True, False, True, True]
  if kind in ADAPTIVE:
    assert sample.nfe[1] < 3000
  else:
    assert sample.status.accepted[1] < sample.status.accepted[0]
  with pytest.raises(jd.SolveError, match=r"1 of 4 examples \(index 1; .*not finite"):
    jd.raise_if_failed(sample)
  if factory.has_path(config(kind)):
    assert len(sample.path) == {"probability_flow": 33, "annealed_langevin": 9}.get(kind, 5)
    np.testing.assert_array_equal(sample.path[0][whole], x_T[whole])
    np.testing.assert_array_equal(sample.path[-1][whole], sample.x[whole])
  else:
    assert sample.path is None


@EACH
def test_one_program_for_examples_of_their_own(kind):
  """Order, mates, keys, conditions and parameters need no other program, and reach their own examples alone."""
  (run, traces, _), (x_T, cond), (sample, _) = program(kind), inputs(), drawn(kind)
  keys, order = jd.example_keys(KEY, 0, 4), np.asarray([2, 3, 0, 0])
  other = run(keys[order], x_T[order], 1.0, {name: value[order] for name, value in cond.items()})
  np.testing.assert_allclose(other.x, sample.x[order], rtol=1e-5, atol=1e-5)
  assert other.nfe.tolist() == sample.nfe[order].tolist()
  moved = cond | {"center": cond["center"] + np.asarray([[0], [0], [1], [0]], np.float32)}
  moved = np.asarray(run(keys, x_T, 1.0, moved).x)
  assert np.all(moved[2] != sample.x[2])
  np.testing.assert_allclose(moved[[0, 3]], sample.x[[0, 3]], rtol=1e-5, atol=1e-5)
  changed = np.asarray(run(jd.example_keys(KEY, 4, 4), x_T, 1.1, cond).x)
  assert np.all(changed[2] != sample.x[2])
  silent = x_T.copy()
  silent[2] = np.nan
  assert run(keys, silent, 1.0, cond).status.code.tolist() == [0, 2, 2, 0]
  assert len(traces) == 1


@EACH
def test_a_score_of_several_evaluations_is_counted_by_their_number(kind):
  """All that were made: an adaptive solver calls for all examples as long as one needs it."""
  sample, calls = drawn(kind)
  if kind in ADAPTIVE:
    assert calls == sample.nfe.max() * (1 if kind == "adaptive_sde" else 4)
  else:
    assert sample.nfe.tolist() == [calls] * 4


@EACH
def test_half_precision_vmap_and_gradients_trace(kind):
  """A bfloat16 score leaves the state float32; an outer vmap maps; reverse mode where the number of steps is fixed."""
  sampler = build(kind)[0]
  x_T, cond = inputs()
  half = lambda x, t, **cond: score(x, t, **cond).astype(jnp.bfloat16)

  def total(x):
    sample = sampler(KEY, x, half, cond)
    return jnp.sum(sample.x), sample.x

  run = (lambda x: total(x)[::-1]) if kind == "adaptive_sde" else jax.grad(total, has_aux=True)
  found = jax.eval_shape(jax.vmap(run), np.stack([x_T] * 3))
  if kind != "adaptive_sde":
    assert found[0].shape == (3, 4, 2)
  state = found[0] if kind == "adaptive_sde" else found[1]
  assert (state.shape, state.dtype) == ((3, 4, 2), jnp.float32)


@EACH
def test_old_keys_are_refused(kind, untyped):
  x_T, cond = inputs()
  with pytest.raises(TypeError, match=r"key must be a typed key made by jax.random.key\(seed\), got uint32"):
    build(kind)[0](np.zeros(2, np.uint32), x_T, score, cond)


@pytest.mark.parametrize(
  ("kind", "ways"), [("ancestral", "jit shard_map pmap"), ("unipc", "shard_map"), ("adaptive_sde", "jit shard_map")]
)
def test_sharded_samples_are_the_same(kind, ways, eight_devices):
  """Eight devices by jit with sharded inputs, by shard_map and by pmap, against one: without and with a memory.

  Adaptive steps of the reverse SDE are so lax that two of them arrive: others go by the last digit of the error.
  """
  sampler, (x_T, cond) = build(kind)[0], inputs(16)
  if kind == "adaptive_sde":
    sampler = jd.samplers.adaptive_sde(jd.VP(), 1e3, 1e3)
  examples = jd.example_keys(KEY, 0, 16), x_T, cond
  fn = lambda scale, keys, x, cond: sampler(keys, x, functools.partial(score, scale=scale), cond).x
  expected, mesh = np.asarray(jax.jit(fn)(1.0, *examples)), make_mesh()
  for way in ways.split():
    if way == "jit":
      sharded = jax.jit(fn)(replicate(mesh, jnp.float32(1.0)), *shard_batch(mesh, examples))
    else:
      sharded = jax.jit(shard_examples(fn, mesh)) if way == "shard_map" else pmap_examples(fn)
      sharded = sharded(1.0, *examples)
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5, err_msg=way)


@pytest.mark.parametrize("kind", ["reverse_sde", "unipc"])
def test_memory_does_not_grow_with_the_steps(kind):
  """But for the number of the step; the coefficients are arguments here."""
  sampler, (x_T, cond) = dataclasses.replace(build(kind)[0], path=0), inputs(16)

  def needed(steps):
    def run(nodes, x):
      method = sampler.method._replace(nodes=nodes)
      return dataclasses.replace(sampler, ts=np.zeros(steps + 1), method=method)(KEY, x, score, cond).x

    nodes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((steps, *leaf.shape[1:]), leaf.dtype), sampler.method.nodes)
    return jax.jit(run).lower(nodes, x_T).compile().memory_analysis().temp_size_in_bytes

  assert needed(400) <= 1.1 * needed(40) + 4 * 400


@pytest.mark.parametrize(
  ("path", "error", "message"),
  [(3, ValueError, "path must divide the number of steps, 4; got 3"), (-1, ValueError, "path must be at least 0")],
)
def test_bad_paths_are_refused(path, error, message):
  with pytest.raises(error, match=message):
    jd.samplers.ddim(jd.VP(), np.linspace(1, 0.1, 5, dtype=np.float32), path=path)


def test_a_path_of_every_second_state():
  def run(ts, x):
    draw = lambda k: jd.samplers.reverse_sde(jd.VP(), ts, denoise=True, path=k)(KEY, x, lambda x, t: -x)
    return draw(1), draw(2)

  every, second = jax.jit(run)(np.linspace(1, 0.1, 7, dtype=np.float32), X[:2])
  np.testing.assert_allclose(second.path, every.path[::2], rtol=1e-6)
  np.testing.assert_array_equal(second.path[-1], second.x)
  assert second.nfe.tolist() == [7, 7]


def test_denoising_needs_noise_at_the_end():
  with pytest.raises(ValueError, match="denoise=True needs noise at its last time, but sigma is 0 at t = 0"):
    jd.samplers.reverse_sde(jd.VP(), np.asarray([1.0, 0.5, 0.0], np.float32), denoise=True)


@pytest.mark.parametrize(
  ("process", "steps"), [({"type": "DDPM", "steps": 50}, 10), ({"type": "NCSN", "levels": 20}, 11)]
)
def test_ancestral_of_a_config_walks_its_chain_to_the_data(process, steps):
  """Of NCSN the first level and the data are two nodes, so that there is one step more than the grid has."""
  given = {"sde": process, "sampler": {"type": "ancestral", "grid": {"steps": 10, "kind": "uniform"}}}
  continuous, chain = factory.make_process(given), factory.make_forward(given)
  sampler = factory.make_sampler(given, continuous)
  nodes = np.unique([0, *np.asarray(chain.index(jd.time_grid(continuous, 10, "uniform"))).tolist()])[::-1]
  direct = jd.samplers.ancestral(chain, nodes)
  assert len(sampler.ts) == steps + 1
  jax.tree.map(np.testing.assert_array_equal, sampler.method.nodes, direct.method.nodes)
  assert sampler.method.to_data
