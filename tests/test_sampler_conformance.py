"""Every sampler that a config can name keeps the promises that all of them make.

Those of generators and of velocities take no score of such states: test_adversarial and test_sscs.
"""

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


def config(kind, steps=4):
  section = {"type": kind, **FIELDS.get(kind, {})}
  if "grid" in schema.subsections("sampler", section):
    section["grid"] = {"steps": steps}
  process = {"annealed_langevin": {"type": "NCSN", "levels": 4}, "cnf": {"type": "CNF"}}.get(kind, {"type": "VP"})
  return {"sde": process, "sampler": section}


def build(kind, **options):
  """The sampler and its process; the last time is far from 0, where few steps are good enough."""
  made = config(kind)
  process = factory.make_process(made)
  return factory.make_sampler(made, process, **options), process


def score(x, t, center, broken, scale=1.0):
  """Towards a center; broken examples have no score below a time that every sampler passes."""
  value = scale * (center - x) / (0.1 + t[:, None] ** 2)
  return jnp.where(((t < 0.9) & broken)[:, None], jnp.nan, value)


def compiled(kind):
  """The jitted sampler, with its path where it has one, its process, and the number of times it was traced."""
  sampler, process = build(kind, **({"path": True} if factory.has_path(config(kind)) else {}))
  traces = []

  def run(keys, x, scale, cond):
    traces.append(1)
    return sampler(keys, x, functools.partial(score, scale=scale), cond)

  return jax.jit(run), process, traces


def inputs(process, size=4):
  cond = {"center": jnp.linspace(-1.0, 1.0, 2 * size).reshape(size, 2), "broken": jnp.arange(size) == 1}
  return process.prior_sample(KEY, (size, 2)), cond


@EACH
def test_one_program_for_examples_of_their_own(kind):
  """A broken example is named, the path is that of the others, order and parameters need no other program."""
  run, process, traces = compiled(kind)
  x_T, cond = inputs(process)
  keys, whole = jd.example_keys(KEY, 0, 4), jnp.asarray([0, 2, 3])
  sample = run(keys, x_T, 1.0, cond)
  assert sample.status.code.tolist() == [0, 2, 0, 0]
  assert jnp.all(jnp.isfinite(sample.x), axis=1).tolist() == [True, False, True, True]
  if kind not in ADAPTIVE:
    assert sample.status.accepted[1] < sample.status.accepted[0]
  with pytest.raises(jd.SolveError, match=r"1 of 4 examples \(index 1; .*not finite"):
    jd.raise_if_failed(sample)
  if factory.has_path(config(kind)):
    assert len(sample.path) == {"probability_flow": 33, "annealed_langevin": 9}.get(kind, 5)
    np.testing.assert_array_equal(sample.path[0][whole], x_T[whole])
    np.testing.assert_array_equal(sample.path[-1][whole], sample.x[whole])
  else:
    assert sample.path is None
  order = jnp.asarray([2, 3, 0, 0])
  other = run(keys[order], x_T[order], 1.0, {name: value[order] for name, value in cond.items()})
  np.testing.assert_allclose(other.x, sample.x[order], rtol=1e-5, atol=1e-5)
  assert other.nfe.tolist() == sample.nfe[order].tolist()
  changed = run(jd.example_keys(KEY, 4, 4), x_T, 1.1, cond)
  assert jnp.all(changed.x[2] != sample.x[2])
  assert len(traces) == 1


@EACH
def test_every_evaluation_is_counted(kind):
  sampler, process = build(kind)
  calls = []

  def counted(x, t, **cond):
    jax.debug.callback(lambda _: calls.append(1), t)
    return score(x, t, **cond)

  x_T, cond = inputs(process, 1)
  sample = sampler(KEY, x_T, counted, cond | {"broken": jnp.zeros(1, bool)})
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]


@EACH
def test_a_score_of_several_evaluations_is_counted_by_their_number(kind):
  """Three of the network above half the time of the process and one below, known of the grid; three where it is not."""
  sampler, process = build(kind)
  calls = []

  class Several:
    def __call__(self, x, t, **cond):
      jax.debug.callback(lambda t: calls.extend([1] * (3 if t[0] > 0.5 * process.t1 or kind in ADAPTIVE else 1)), t)
      return score(x, t, **cond)

    def evaluations(self, times):
      return 3 if times is None else jnp.where(times > 0.5 * process.t1, 3, 1)

  x_T, cond = inputs(process, 1)
  sample = sampler(KEY, x_T, Several(), cond | {"broken": jnp.zeros(1, bool)})
  jax.effects_barrier()
  assert sample.nfe.tolist() == [len(calls)]


@EACH
def test_half_precision_vmap_and_gradients_trace(kind):
  """A bfloat16 score leaves the state float32; an outer vmap maps; reverse mode where the number of steps is fixed."""
  sampler, process = build(kind)
  x_T, cond = inputs(process)
  half = lambda x, t, **cond: score(x, t, **cond).astype(jnp.bfloat16)
  assert jax.eval_shape(lambda x: sampler(KEY, x, half, cond).x, x_T).dtype == jnp.float32
  outer = jax.eval_shape(jax.vmap(lambda x: sampler(KEY, x, score, cond)), jnp.stack([x_T] * 3))
  assert outer.x.shape == (3, 4, 2)
  if kind != "adaptive_sde":
    total = lambda x: jnp.sum(sampler(KEY, x, score, cond).x)
    assert jax.eval_shape(jax.grad(total), x_T).shape == x_T.shape


@EACH
def test_old_keys_are_refused(kind, untyped):
  sampler, process = build(kind)
  x_T, cond = inputs(process)
  with pytest.raises(TypeError, match=r"key must be a typed key made by jax.random.key\(seed\), got uint32"):
    sampler(jax.random.PRNGKey(0), x_T, score, cond)


@pytest.mark.parametrize("kind", ["ancestral", "unipc", "adaptive_sde"])
def test_sharded_samples_are_the_same(kind):
  """Eight devices by jit with sharded inputs, by shard_map and by pmap, against one."""
  run, process, _ = compiled(kind)
  x_T, cond = inputs(process, 16)
  examples = jd.example_keys(KEY, 0, 16), x_T, cond
  fn = lambda scale, keys, x, cond: run(keys, x, scale, cond).x
  expected = np.asarray(fn(1.0, *examples))
  mesh = make_mesh()
  for sharded in (
    jax.jit(fn)(replicate(mesh, jnp.float32(1.0)), *shard_batch(mesh, examples)),
    jax.jit(shard_examples(fn, mesh))(1.0, *examples),
    pmap_examples(fn)(1.0, *examples),
  ):
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["reverse_sde", "unipc"])
def test_memory_does_not_grow_with_the_steps(kind):
  def needed(steps):
    made = config(kind, steps)
    sampler = factory.make_sampler(made, jd.VP())
    x_T, cond = inputs(jd.VP(), 64)
    program = jax.jit(lambda x: sampler(KEY, x, score, cond)).lower(x_T).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert needed(400) <= 1.1 * needed(40) + 4 * 400 * 16


@pytest.mark.parametrize(
  ("path", "error", "message"),
  [(3, ValueError, "path must divide the number of steps, 4; got 3"), (-1, ValueError, "path must be at least 0")],
)
def test_bad_paths_are_refused(path, error, message):
  with pytest.raises(error, match=message):
    build("ddim", path=path)


def test_a_path_of_every_second_state():
  sde, x_T = jd.VP(), jnp.ones((2, 3))
  every, second = (
    jd.samplers.reverse_sde(sde, jd.time_grid(sde, 6), denoise=True, path=k)(KEY, x_T, lambda x, t: -x) for k in (1, 2)
  )
  np.testing.assert_allclose(second.path, every.path[::2], rtol=1e-6)
  np.testing.assert_array_equal(second.path[-1], second.x)
  assert second.nfe.tolist() == [7, 7]


def test_denoising_needs_noise_at_the_end():
  with pytest.raises(ValueError, match="denoise=True needs noise at its last time, but sigma is 0 at t = 0"):
    jd.samplers.reverse_sde(jd.VP(), jnp.asarray([1.0, 0.5, 0.0]), denoise=True)


@pytest.mark.parametrize(
  ("process", "steps"), [({"type": "DDPM", "steps": 50}, 10), ({"type": "NCSN", "levels": 20}, 11)]
)
def test_ancestral_of_a_config_walks_its_chain_to_the_data(process, steps):
  """Of NCSN the first level and the data are two nodes, so that there is one step more than the grid has."""
  made = {"sde": process, "sampler": {"type": "ancestral", "grid": {"steps": 10, "kind": "uniform"}}}
  continuous, chain = factory.make_process(made), factory.make_forward(made)
  sampler = factory.make_sampler(made, continuous)
  nodes = np.unique([0, *np.asarray(chain.index(jd.time_grid(continuous, 10, "uniform"))).tolist()])[::-1]
  direct = jd.samplers.ancestral(chain, nodes)
  x_T = continuous.prior_sample(KEY, (2, 2))
  plain = lambda x, t: -x / (1 + t[:, None])
  sample = sampler(KEY, x_T, plain)
  np.testing.assert_array_equal(sample.x, direct(KEY, x_T, plain).x)
  assert sample.nfe.tolist() == [steps] * 2
  assert sampler.method.to_data
