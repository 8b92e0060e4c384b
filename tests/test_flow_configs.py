"""Normalizing flows from configs: the sections make the library's flow; what does not go together is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import components, factory, objectives, options, systems, training
from jaxdiff.data.examples import from_arrays
from jaxdiff.evaluation import runs
from jaxdiff.factory import ConfigError
from jaxdiff.parallel import make_mesh

pytestmark = pytest.mark.standard_promotion
KEY = jax.random.key(0)
TOLERANCES = {"rtol": 1e-3, "atol": 1e-3}
CONFIG = {
  "seed": 0,
  "data": {"type": "toy2d", "size": 64},
  "sde": {"type": "CNF", "t1": 0.5},
  "prediction": {"type": "vector_field"},
  "loss": {"type": "ffjord", "solver": "heun", "num_steps": 2, "kinetic": 0.1, "jacobian": 0.2},
  "network": {"type": "MLP", "width": 8, "depth": 1, "max_frequency": 10.0},
  "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
  "train": {"batch_size": 16, "steps": 3},
  "sampler": {"type": "cnf", **TOLERANCES},
  "sample": {},
  "likelihood": {"divergence": {"type": "exact"}, **TOLERANCES},
}
RNG = np.random.default_rng(0)
POINTS = from_arrays((3 + RNG.normal(size=(16, 2))).astype(np.float32))
INTEGERS = from_arrays(RNG.integers(0, 4, (16, 2)).astype(np.uint8), levels=4)


@pytest.fixture(scope="module")
def params():
  """Away from zero, where the flow would be the identity."""
  made = factory.init_params(CONFIG, POINTS)
  keys = jax.random.split(KEY, len(jax.tree.leaves(made)))
  leaves, tree = jax.tree.flatten(made)
  return tree.unflatten([p + 0.3 * jax.random.normal(key, p.shape) for key, p in zip(keys, leaves, strict=True)])


def field_of(params):
  network = factory.make_network(CONFIG)
  return lambda x, t: network.apply(params, x, t)


def test_the_loss_is_that_of_the_library(params):
  """Its time, probes, solver and weights are those of the sections."""
  keys = jd.example_keys(KEY, 0, 16)
  fields = {"solver": "heun", "num_steps": 2, "kinetic": 0.1, "jacobian": 0.2}
  loss = jd.losses.ffjord(divergence=jd.divergence.hutchinson(), t1=0.5, **fields)
  x = jnp.asarray(POINTS.gather(np.arange(16))["x"])
  objective = objectives.make_objective(CONFIG, POINTS)
  value, aux = jax.jit(lambda p: objective(p, keys, {"x": x, "u": jnp.zeros(16)}))(params)
  loss_key = jd.keys.split(keys, 4)[3]
  expected, _ = jax.jit(lambda p: loss(loss_key, x, field_of(p)))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(value, aux["nats"] + 0.1 * aux["kinetic"] + 0.2 * aux["jacobian"], rtol=1e-5)


def test_two_steps_of_training_lower_the_loss():
  """Data far from the base, so that the first steps of Adam cannot miss the way."""
  optimizer = factory.make_optimizer_of(CONFIG)
  step = jax.jit(training.make_train_step(objectives.make_objective(CONFIG, POINTS), optimizer, 0.9, 16))
  state = training.init_state(factory.init_params(CONFIG, POINTS), optimizer, KEY)
  batch, losses = POINTS.gather(np.arange(16)), []
  for _ in range(3):
    state, metrics = step(state, {"x": jnp.asarray(batch["x"])}, jnp.arange(16))
    losses.append(float(metrics["loss"]))
  assert losses[0] > losses[1] > losses[2]


def test_samples_and_densities_are_those_of_the_flow(params):
  """To the tolerance of the solves: their step sizes follow the rounding, which depends on the layout of a batch."""
  flow = jd.flow.cnf(divergence=jd.divergence.exact(), t1=0.5, **TOLERANCES)
  process = factory.make_process(CONFIG)
  drawn = runs.draw(
    factory.make_score(CONFIG), params, process, factory.make_sampler(CONFIG, process), (2,), 16, 16, 0, make_mesh()
  )
  prior_key, _ = jd.keys.split(jd.example_keys(jax.random.fold_in(KEY, 2), 0, 16))
  sample = jax.jit(lambda p: flow.sample(prior_key, (16, 2), field_of(p)))(params)
  np.testing.assert_allclose(drawn["x"], sample.x, atol=1e-3)
  keys, x = jd.example_keys(KEY, 0, 16), jnp.asarray(drawn["x"])
  got = jax.jit(objectives.make_log_likelihood(CONFIG, params, POINTS))(params, keys, {"x": x})
  expected = jax.jit(lambda p: flow.log_prob(keys, x, field_of(p)))(params)
  np.testing.assert_allclose(got["value"], expected.value, rtol=1e-5)
  assert jnp.std(got["value"]) > 0.1
  assert not got["code"].any()


def test_bits_per_dim_of_integers(params):
  """-log p of uniformly dequantized values, in bits, with cells of width 1/2 in [-1, 1]."""
  keys, x = jd.example_keys(KEY, 0, 16), jnp.asarray(INTEGERS.gather(np.arange(16))["x"])
  got = jax.jit(objectives.make_log_likelihood(CONFIG, params, INTEGERS))(params, keys, {"x": x})
  draw_key, probe_key = jd.keys.split(jd.keys.fold_in(keys, 0))
  z = jd.likelihood.dequantize(draw_key, x, 4)
  flow = jd.flow.cnf(divergence=jd.divergence.exact(), t1=0.5, **TOLERANCES)
  nats = -jax.jit(lambda p: flow.log_prob(probe_key, z, field_of(p)))(params).value
  np.testing.assert_allclose(got["value"], (nats / 2 + np.log(2)) / np.log(2), rtol=1e-5)


def test_noise_of_a_process_is_refused_for_a_flow():
  noise = jd.likelihood.dequantization.truncated_normal(jd.VP())
  with pytest.raises(ValueError, match="dequantization knows the noise of a process, and a normalizing flow has none"):
    jd.likelihood.bits_per_dim(jd.flow.cnf().log_prob, 4, dequantization=noise)


def test_a_flow_has_no_variational_bound():
  assert options.likelihood(CONFIG).bound_draws == 0


@pytest.mark.parametrize(
  ("path", "fields", "message"),
  [
    ("loss", {"type": "denoising"}, "config.loss.type must be 'ffjord' for config.sde.type = 'CNF', got 'denoising'"),
    ("prediction", {"type": "edm"}, "config.prediction.type must be 'vector_field' for config.sde.type = 'CNF'"),
    ("sampler", {"type": "ddim"}, "config.sampler.type must be 'cnf' for config.sde.type = 'CNF', got 'ddim'"),
    ("sde", {"type": "VP"}, "config.prediction.type = 'vector_field' needs config.sde.type = 'CNF', got 'VP'"),
    ("sde", {"type": "CNF", "t1": 0.0}, "config.sde: CNF needs 0 < t1, got 0.0"),
    ("sample", {"threshold": "static"}, "config.sample.threshold must be 'none' for config.sde.type = 'CNF'"),
    ("likelihood", {"t0": 1e-3}, "config.likelihood.t0 is of processes with noise; leave it out for a CNF"),
    ("likelihood", {"variable": "log_snr"}, "config.likelihood.variable is of processes with noise"),
    ("loss", {"type": "ffjord", "kinetic": -1.0}, "config.loss: kinetic must be at least 0"),
    ("loss", {"type": "ffjord", "solver": "rk4"}, "config.loss: solver 'rk4' has no error control"),
    ("loss", {"type": "ffjord", "divergence": {"type": "hutchinso"}}, "did you mean 'hutchinson'"),
  ],
)
def test_what_does_not_go_together_is_refused(path, fields, message, untyped):
  with pytest.raises(ConfigError, match=message):
    systems.check(CONFIG | {path: fields if "type" in fields else CONFIG[path] | fields})


@pytest.mark.parametrize(("path", "kind"), components.WITH_CNF.items())
def test_the_parts_of_a_flow_need_a_flow(path, kind, untyped):
  other = {"prediction": {"type": "noise"}, "loss": {"type": "denoising"}, "sampler": {"type": "probability_flow"}}
  config = CONFIG | {"sde": {"type": "VP"}} | other
  systems.check(config)
  with pytest.raises(ConfigError, match=f"config.{path}.type = '{kind}' needs config.sde.type = 'CNF', got 'VP'"):
    systems.check(config | {path: {"type": kind}})
