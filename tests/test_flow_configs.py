"""Normalizing flows from configs: the sections make the library's flow; what does not go together is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import components, factory, objectives, options, systems
from jaxdiff.data.examples import from_arrays
from jaxdiff.evaluation import runs
from jaxdiff.factory import ConfigError
from jaxdiff.parallel import make_mesh

pytestmark = pytest.mark.standard_promotion
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


RATE = 0.7


class Linear(nn.Module):
  """The field of f(x, t) = RATE x, which grows what it carries by exp(RATE t)."""

  @nn.compact
  def __call__(self, x, t, *, train=False):
    return x * self.param("rate", nn.initializers.zeros, ())


@pytest.fixture
def linear(monkeypatch):
  """(the config of the flow that carries data to the base exactly, its parameters)."""
  monkeypatch.setitem(components.NETWORKS, "Linear", Linear)
  return CONFIG | {"network": {"type": "Linear"}}, {"params": {"rate": np.float32(RATE)}}


def test_the_loss_is_that_of_the_library():
  """Its time, probes, solver and weights are those of the sections."""
  shapes, rng = jax.eval_shape(lambda: factory.init_params(CONFIG, POINTS)), np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype), shapes)
  fields = {"solver": "heun", "num_steps": 2, "kinetic": 0.1, "jacobian": 0.2}
  loss = jd.losses.ffjord(divergence=jd.divergence.hutchinson(), t1=0.5, **fields)
  objective, network = objectives.make_objective(CONFIG, POINTS), factory.make_network(CONFIG)

  @jax.jit
  def both(params, x):
    keys = jd.example_keys(jax.random.key(0), 0, 16)
    value, aux = objective(params, keys, {"x": x, "u": jnp.zeros(16)})
    return value, aux, loss(jd.keys.split(keys, 4)[3], x, lambda x, t: network.apply(params, x, t))[0]

  value, aux, expected = both(params, POINTS.gather(np.arange(16))["x"])
  assert np.std(value) > 0.1
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  parts = [np.asarray(aux[name]) for name in ("nats", "kinetic", "jacobian")]
  np.testing.assert_allclose(value, parts[0] + 0.1 * parts[1] + 0.2 * parts[2], rtol=1e-5)


def test_samples_and_densities_are_those_of_the_flow(linear):
  """Data are exp(-RATE t1) times the base; their log-density is that of the base and RATE t1 a dimension."""
  config, params = linear
  process = factory.make_process(config)
  sampler, score = factory.make_sampler(config, process), factory.make_score(config)
  drawn = runs.draw(score, params, process, sampler, (2,), 16, 16, 0, make_mesh())["x"]
  prior_key, _ = jd.keys.split(jd.example_keys(jax.random.fold_in(jax.random.key(0), 2), 0, 16))
  z = np.asarray(jd.flow.standard_normal().sample(prior_key, (16, 2)))
  np.testing.assert_allclose(drawn, z * np.exp(-RATE * 0.5), atol=1e-3)
  keys = jd.example_keys(jax.random.key(0), 0, 16)
  got = jax.jit(objectives.make_log_likelihood(config, params, POINTS))(params, keys, {"x": drawn})
  np.testing.assert_allclose(got["value"], log_prob(drawn), rtol=1e-3)
  assert not got["code"].any()


def log_prob(x):
  carried = np.asarray(x, float) * np.exp(RATE * 0.5)
  return -0.5 * np.sum(carried**2, axis=1) - np.log(2 * np.pi) + 2 * RATE * 0.5


def test_bits_per_dim_of_integers(linear):
  """-log p of uniformly dequantized values, in bits, with cells of width 1/2 in [-1, 1]."""
  config, params = linear
  keys, x = jd.example_keys(jax.random.key(0), 0, 16), INTEGERS.gather(np.arange(16))["x"]
  got = jax.jit(objectives.make_log_likelihood(config, params, INTEGERS))(params, keys, {"x": x})
  draw_key, _ = jd.keys.split(jd.keys.fold_in(keys, 0))
  z = jax.jit(lambda key, x: jd.likelihood.dequantize(key, x, 4))(draw_key, x)
  np.testing.assert_allclose(got["value"], (-log_prob(z) / 2 + np.log(2)) / np.log(2), rtol=1e-3)


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
