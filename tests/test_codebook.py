"""Codebooks as moving averages: k-means without decay on any layout of devices, revival; tiny nets that learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from oracles import compiled

from jaxdiff import losses, quantization
from jaxdiff.data import sources
from jaxdiff.losses import observations
from jaxdiff.losses.vector_quantization import _places
from jaxdiff.parallel import jit_launcher, make_mesh, pmap_launcher
from jaxdiff.training import init_state, make_train_step, moving_average
from jaxdiff.typing import Autoencoder, DiscreteAutoencoder, QuantizedAutoencoder

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("eight_devices")]
BATCH, POSITIONS, CODES, CHANNELS = 16, 3, 6, 2
INDEX = np.arange(BATCH, dtype=np.int32)
X = np.random.default_rng(0).normal(size=(BATCH, POSITIONS, CHANNELS)).astype(np.float32)
# Four codes among the data, two far from all of them.
VECTORS = np.concatenate([X[::4, 0], np.full((2, CHANNELS), 50.0)]).astype(np.float32)


def objective(params, keys, batch):
  """The encoder is the identity, so that the vectors are the data."""
  network = QuantizedAutoencoder(lambda x: x * params["scale"], lambda z: z, params["codebook"])
  loss = losses.vq(observations.gaussian(1.0))
  place = {"step": batch["step"][0], "index": batch["index"], "global_batch": BATCH}
  return loss(keys, batch["x"], network, **place)


def optimizer(decay, revive_below=0.0):
  groups = {"scale": optax.sgd(0.0), "codebook": moving_average(decay, revive_below)}
  return optax.partition(groups, lambda params: {name: name for name in params})


def params():
  zeros = np.zeros((CODES, CHANNELS), np.float32)
  return {"scale": np.float32(1), "codebook": {"vectors": VECTORS, "counts": zeros[:, 0], "sums": zeros}}


LAUNCHERS = {
  "one": lambda: jit_launcher(make_mesh(jax.local_devices()[:1])),
  "data": lambda: jit_launcher(make_mesh(jax.local_devices())),
  "fsdp": lambda: jit_launcher(make_mesh(jax.local_devices(), fsdp=2)),
  "pmap": lambda: pmap_launcher(jax.local_devices()),
}


def trained(launcher, chosen, steps, microbatches=1):
  step_fn = launcher.compile(make_train_step(objective, chosen, 0.0, BATCH, microbatches=microbatches))
  state, index = launcher.create(lambda: init_state(params(), chosen, jax.random.key(0))), launcher.put(INDEX)
  for _ in range(steps):
    state, metrics = step_fn(state, launcher.put({"x": X}), index)
  return jax.device_get(state.params["codebook"]), jax.device_get(metrics)


def k_means(vectors):
  """One step in float64: (vectors, counts); codes without data keep theirs."""
  codes = ((X[:, :, None].astype(np.float64) - vectors) ** 2).sum(-1).argmin(-1)
  counts = np.bincount(codes.ravel(), minlength=CODES)
  means = [X[codes == k].mean(0, dtype=np.float64) if counts[k] else vectors[k] for k in range(CODES)]
  return np.stack(means), counts


@pytest.mark.parametrize(("layout", "microbatches"), [("one", 1), ("one", 4), ("data", 1), ("fsdp", 2), ("pmap", 2)])
def test_without_decay_three_steps_are_three_of_k_means(layout, microbatches):
  vectors = VECTORS.astype(np.float64)
  for _ in range(3):
    vectors, counts = k_means(vectors)
  codebook, _ = trained(LAUNCHERS[layout](), optimizer(0.0), 3, microbatches)
  np.testing.assert_allclose(codebook["vectors"], vectors, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(BATCH * codebook["counts"], counts, rtol=1e-6)
  assert (counts > 0).sum() == 4  # the far ones are unused and stay
  assert np.abs(vectors - VECTORS).max() > 0.1


def test_with_decay_the_first_step_is_k_means_and_the_others_are_averages():
  d, (vectors, counts) = 0.7, k_means(VECTORS.astype(np.float64))
  mass, sums = (1 - d) * counts, (1 - d) * counts[:, None] * vectors
  first, _ = trained(LAUNCHERS["one"](), optimizer(d), 1)
  np.testing.assert_allclose(first["vectors"], vectors, rtol=1e-5, atol=1e-6)
  found, counts = k_means(vectors)
  mass, sums = d * mass + (1 - d) * counts, d * sums + (1 - d) * counts[:, None] * found
  second, _ = trained(LAUNCHERS["one"](), optimizer(d), 2)
  used = counts > 0
  np.testing.assert_allclose(
    second["vectors"][used], (sums / np.maximum(mass, 1e-9)[:, None])[used], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(BATCH * second["counts"], mass, rtol=1e-5)
  np.testing.assert_array_equal(second["vectors"][~used], VECTORS[~used])


def test_codes_unused_for_long_keep_their_vectors():
  """Their counts and sums fall below the smallest float."""
  group, chosen = jax.device_get(params()["codebook"]), moving_average(0.5)
  group |= {"counts": np.ones(CODES, np.float32), "sums": group["vectors"]}
  used = np.eye(CODES, dtype=np.float32)[0]
  found = {"counts": -used, "sums": np.tile(-3 * used[:, None], CHANNELS), "vectors": 0 * VECTORS}

  @jax.jit
  def run(group):
    step = lambda _, group: optax.apply_updates(group, chosen.update(found, chosen.init(group), group)[0])
    return jax.lax.fori_loop(0, 200, step, group)

  vectors = run(group)["vectors"]
  np.testing.assert_array_equal(vectors[1:], VECTORS[1:])
  np.testing.assert_allclose(vectors[0], 3.0, rtol=1e-5)


@pytest.mark.parametrize(("layout", "microbatches"), [("one", 1), ("one", 4), ("data", 1), ("fsdp", 2), ("pmap", 2)])
def test_dead_codes_become_vectors_of_the_batch(layout, microbatches):
  """Those drawn for step and code, wherever their example is; those in use are as without revival."""
  r = 0.05
  codebook, _ = trained(LAUNCHERS[layout](), optimizer(0.0, r), 1, microbatches)
  vectors, counts = k_means(VECTORS.astype(np.float64))
  example, position = _places(jnp.int32(0), CODES, BATCH, POSITIONS)
  dead = counts < r * counts.sum()
  assert dead.sum() == 2
  # Optax adds differences, so a vector keeps the rounding of the one before it, half of 4e-6 at 50.
  np.testing.assert_allclose(codebook["vectors"][dead], X[example, position][dead], rtol=0, atol=2e-6)
  np.testing.assert_allclose(codebook["vectors"][~dead], vectors[~dead], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(codebook["counts"][dead], r * POSITIONS, rtol=1e-6)
  np.testing.assert_allclose(codebook["sums"], codebook["counts"][:, None] * codebook["vectors"], rtol=1e-5, atol=1e-6)


def test_revival_brings_all_codes_into_use():
  """A codebook of which most is far away: without revival it stays there."""
  perplexity = lambda revive: float(
    quantization.perplexity(jnp.asarray(trained(LAUNCHERS["one"](), optimizer(0.5, revive), 30)[0]["counts"]))
  )
  dead, alive = perplexity(0.0), perplexity(0.05)
  assert dead < 4.001
  assert alive > 5


def test_candidates_are_uniform_over_examples_and_positions():
  places = compiled(jax.vmap(lambda step: jnp.stack(_places(step, CODES, BATCH, POSITIONS))), np.arange(2000))
  examples, positions = places[:, 0], places[:, 1]
  counts = np.bincount((examples * POSITIONS + positions).ravel(), minlength=BATCH * POSITIONS)
  mean = counts.mean()
  # Chi-square with 47 degrees of freedom exceeds 93.2 with probability 1e-4.
  assert np.sum((counts - mean) ** 2 / mean) < 93.2
  assert (examples[:, 0] != examples[:, 1]).mean() > 0.9


def test_wrong_use_is_refused():
  for name in ("decay", "revive_below"):
    with pytest.raises(ValueError, match=rf"{name}=1.0: must be in \[0, 1\)"):
      moving_average(**{name: 1.0})
  with pytest.raises(ValueError, match="must be below 1 / 6, an equal share"):
    moving_average(revive_below=0.2).init(params()["codebook"])
  with pytest.raises(ValueError, match="a codebook must be a dict of vectors, counts and sums"):
    moving_average().init(params())


def patchwise(outputs, inputs):
  """Parameters of a net of patches of 2 x 2 pixels, each by itself; 8 codes in an autoencoder that has a codebook."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
  params = {"encode": normal(4, outputs), "decode": normal(inputs, 8), "bias": np.zeros(8, np.float32)}
  codebook = {"vectors": normal(8, 4), "counts": np.zeros(8, np.float32), "sums": np.zeros((8, 4), np.float32)}
  return {"params": params, "codebook": codebook}


def encode(params, x):
  patches = x.reshape(len(x), 4, 2, 4, 2).swapaxes(2, 3).reshape(len(x), 4, 4, 4)
  return patches @ params["encode"]


def decode(params, z):
  pixels = (z @ params["decode"] + params["bias"]).reshape(len(z), 4, 4, 2, 2, 2)
  return pixels.swapaxes(2, 3).reshape(len(z), 8, 8, 2)


def digits_case(kind):
  """(variables, objective, optimizer) of a tiny net on digits."""
  observation = observations.discretized(17)
  if kind == "vae":
    variables, loss, takes = patchwise(6, 3), losses.vae(observation), ()
    network = lambda p, _: Autoencoder(lambda x: tuple(jnp.split(encode(p, x), 2, axis=-1)), Partial(decode, p))
  elif kind == "gumbel":
    variables, takes = patchwise(8, 8), ("step",)
    loss = losses.gumbel(observation, quantization.annealed(1.0, 0.5, 100))
    network = lambda p, _: DiscreteAutoencoder(Partial(encode, p), Partial(decode, p))
  else:
    variables, takes = patchwise(4, 4), ("step", "index", "global_batch") if kind == "ema" else ()
    loss = losses.vq(observation, codebook=kind)
    network = lambda p, codebook: QuantizedAutoencoder(Partial(encode, p), Partial(decode, p), codebook)
  if kind in ("vae", "gumbel"):
    del variables["codebook"]

  def digits_objective(variables, keys, batch):
    given = {"step": batch["step"][0], "index": batch["index"], "global_batch": 32}
    net = network(variables["params"], variables.get("codebook"))
    return loss(keys, batch["x"], net, **{name: given[name] for name in takes})

  codebook = moving_average(0.9, 0.01) if kind == "ema" else optax.adam(5e-2)
  chosen = optax.partition(
    {"params": optax.adam(5e-2), "codebook": codebook}, lambda variables: {name: name for name in variables}
  )
  return variables, digits_objective, chosen


@pytest.mark.parametrize("kind", ["vae", "gumbel", "ema", "loss"])
def test_a_tiny_net_learns_digits(kind):
  variables, digits_objective, chosen = digits_case(kind)
  x = sources.digits("train").gather(np.arange(32))["x"]
  step = jax.jit(make_train_step(digits_objective, chosen, 0.0, 32))
  state, values = init_state(variables, chosen, jax.random.key(1)), []
  for _ in range(80):
    state, metrics = step(state, {"x": x}, jnp.arange(32, dtype=jnp.int32))
    values.append({name: float(value) for name, value in metrics.items()})
  assert values[-1]["skipped"] == 0
  # Of 64 pixels of 17 levels; a uniform guess costs 181 nats.
  assert values[0]["nats"] > 150
  assert values[-1]["nats"] < 0.75 * values[0]["nats"]
  assert values[-1]["reconstruction"] < 0.75 * values[0]["reconstruction"]
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, variables)
  still = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if not leaf]
  assert still == (["['codebook']['counts']", "['codebook']['sums']"] if kind == "loss" else [])
