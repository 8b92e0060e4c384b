"""Kinds of runs from configs: what a config is of, what of it is trained, and what does not go together."""

import copy
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import arguments, cld, factory, schema, systems
from jaxdiff.data.examples import from_arrays
from jaxdiff.schema import ConfigError
from jaxdiff.training import init_state, make_train_step

pytestmark = pytest.mark.standard_promotion
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
KINDS = {
  "digits": "diffusion",
  "ffjord_digits": "diffusion",
  "digits_classifier": "classifier",
  "vae_digits": "autoencoder",
  "vq_digits": "autoencoder",
  "gumbel_digits": "autoencoder",
  "latent_digits": "latent",
  "lsgm_digits": "latent",
  "ddgan_digits": "gan",
  "cld_digits": "augmented",
}
NEW = [name for name, kind in KINDS.items() if kind not in ("diffusion", "classifier")]
BATCH = 8
SMALL = {"channels": 8, "blocks": 1, "groups": 4}
ZERO = ("['counts']", "['sums']")
RNG = np.random.default_rng(0)
IMAGES = from_arrays(RNG.integers(0, 17, (BATCH, 8, 8, 1)).astype(np.uint8), levels=17)


def config_of(name, **changes):
  """A config of the folder with smaller networks, and sections or fields changed by their path with underscores."""
  config = arguments.load(CONFIGS / f"{name}.py")
  for path in ("network", "autoencoder.network"):
    section = functools.reduce(lambda part, key: (part or {}).get(key), path.split("."), config)
    if section:
      section.update(SMALL | ({"channel_multipliers": (1,)} if section["type"] == "UNet" else {}))
  if "workdir" in config.get("autoencoder", {}):
    vae = config_of("vae_digits")
    config["autoencoder"] |= {"network": vae["network"], "loss": vae["loss"], "fingerprint": "0" * 32}
  if "discriminator" in config:
    config["discriminator"] |= {"channels": 8, "channel_multipliers": (1, 2)}
  config["train"] |= {"batch_size": BATCH}
  return changed(config, changes)


def changed(config, changes):
  config = copy.deepcopy(config)
  for path, value in changes.items():
    *parents, name = path.split("__")
    section = functools.reduce(lambda part, key: part.setdefault(key, {}), parents, config)
    if value is None:
      section.pop(name)
    else:
      section[name] = value
  return config


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_config(name):
  config = config_of(name) if name in NEW else arguments.load(CONFIGS / f"{name}.py")
  assert schema.kind(config) == KINDS[name]
  systems.check(config)


@pytest.mark.parametrize("name", NEW)
def test_shapes_of_states_and_samples(name):
  """Nothing is computed: from the prior through the sampler and the decoder to images."""
  config = config_of(name)
  system = systems.of(config)
  params = jax.eval_shape(lambda: system.init_params(config, IMAGES))
  process, shape, decode = system.process(config, None), system.shape(config, IMAGES), system.decode(config)
  sampler, score = system.sampler(config, process), system.score(config)

  def draw(params, key):
    state = sampler(key, process.prior_sample(key, (3, *shape)), score(params), {}).x
    return state if decode is None else decode(params, state)

  assert jax.eval_shape(draw, params, jax.random.key(0)).shape == (3, 8, 8, 1)


def batch_of(source):
  return source.gather(np.arange(BATCH))


def tiny(config):
  """The same kind of run of the smallest networks, which compile in a second."""
  least = {"channels": 4, "channel_multipliers": (1,), "blocks": 1, "groups": 2}
  own = least if schema.kind(config) == "autoencoder" else {"type": "MLP", "width": 8, "depth": 1}
  config = config | {"network": {**config["network"], **own} if own is least else own}
  if "network" in config.get("autoencoder", {}):
    config |= {"autoencoder": config["autoencoder"] | {"network": config["autoencoder"]["network"] | least}}
  if "discriminator" in config:
    config |= {"discriminator": config["discriminator"] | {"channels": 4, "channel_multipliers": (1,)}}
  return config


def params_of(config, system):
  """Normal numbers in the place of initial parameters, which cost a program; averages of codes begin at zero."""
  rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: system.init_params(config, IMAGES))
  fill = lambda path, leaf: rng.normal(scale=0.3 * (jax.tree_util.keystr(path[-1:]) not in ZERO), size=leaf.shape)
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fill(path, leaf).astype(leaf.dtype), shapes)


def step_of(config, system):
  """(parameters before a train step, those after it, metrics), on the host."""
  step = make_train_step(system.objective(config, IMAGES), system.optimizer(config), 0.9, BATCH)
  before = params_of(config, system)
  run = jax.jit(lambda params, *rest: step(init_state(params, system.optimizer(config), jax.random.key(0)), *rest))
  after, metrics = run(before, batch_of(IMAGES), np.arange(BATCH))
  return jax.device_get((before, after.params, metrics))


def moved(before, after):
  """Groups of parameters that a step changed: by their names."""
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
  return {name for name in before if not same(before[name], after[name])}


@pytest.mark.parametrize(
  ("name", "groups", "metrics"),
  [
    ("latent_digits", {"prior"}, {"loss_per_dim"}),
    ("lsgm_digits", {"autoencoder", "prior"}, {"reconstruction", "cross_entropy", "entropy", "bits_per_dim"}),
    ("ddgan_digits", {"generator", "discriminator"}, {"generator_loss", "discriminator_loss", "r1"}),
  ],
)
def test_what_a_step_trains(name, groups, metrics):
  config = tiny(config_of(name))
  system = systems.of(config)
  before, after, seen = step_of(config, system)
  assert moved(before, after) == groups
  assert metrics <= seen.keys()
  assert all(np.isfinite(seen[metric]) for metric in metrics)
  assert system.limits(config, IMAGES).keys() <= seen.keys()


def test_codes_that_are_averages_follow_the_encoder():
  """After one step of k-means every code that is used is the mean of its vectors: of the batch, not of a gradient."""
  config = tiny(config_of("vq_digits", loss__revive_below=0.0))
  system = systems.of(config)
  before, after, seen = step_of(config, system)
  assert moved(before, after) == {"autoencoder"}
  metrics = {"reconstruction", "commitment", "perplexity", *system.limits(config, IMAGES)}
  assert metrics <= seen.keys()
  assert all(np.isfinite(seen[metric]) for metric in metrics)
  start, end = (side["autoencoder"]["codebook"] for side in (before, after))
  used = end["counts"] > 0
  assert 0 < used.sum() < len(used)
  means = end["sums"][used] / end["counts"][used, None]
  np.testing.assert_allclose(end["vectors"][used], means, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(end["vectors"][~used], start["vectors"][~used])
  np.testing.assert_allclose(end["counts"].sum(), 0.01 * 64, rtol=1e-5)  # 1 - decay of the 8 x 8 positions


def test_patches_are_judged_where_there_is_a_discriminator():
  judge = {"type": "PatchDiscriminator", "channels": 8, "channel_multipliers": (1, 2)}
  config = tiny(config_of("vae_digits", discriminator=judge, loss__patch_weight=0.5))
  systems.check(config)
  before, after, seen = step_of(config, systems.of(config))
  assert moved(before, after) == {"autoencoder", "discriminator"}
  assert {"reconstruction", "kl", "bits_per_dim"} <= seen.keys()
  parts = seen["nats"] + 0.5 * seen["generator_loss"] + seen["discriminator_loss"]
  np.testing.assert_allclose(seen["loss"], parts, rtol=1e-5)


def test_the_latent_objective_is_the_library_loss_of_posterior_draws():
  config = tiny(config_of("latent_digits"))
  system = systems.of(config)
  network, module = factory.make_network(config), systems.latent.coding.make(config["autoencoder"], IMAGES).module
  loss = jd.losses.denoising(
    jd.VP(), jd.predictions.edm(1.0), jd.losses.weights.likelihood(), jd.losses.times.importance()
  )

  @jax.jit
  def both(params, batch, u):
    keys = jd.example_keys(jax.random.key(1), 0, BATCH)
    value, _ = system.objective(config, IMAGES)(params, keys, {**batch, "u": u})
    _, sample_key, loss_key = jd.keys.split(keys, 3)
    x = jd.losses.decoders.integer_values(batch["x"], 17)
    z = jd.latents.sample(sample_key, jd.latents.Posterior(*module.apply(params["autoencoder"], x, method="encode")))
    return value, loss(loss_key, z, functools.partial(network.apply, params["prior"]), u=u)[0]

  u = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
  value, expected = both(params_of(config, system), batch_of(IMAGES), u)
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_samples_of_a_diffusion_with_velocities_are_denoised_positions():
  """The exact score of N(0, I): the last state ends at E[x_0 | u], counted as one more evaluation."""
  config = config_of("cld_digits")
  system = systems.of(config)
  process = system.process(config)
  score = cld.score_fn(lambda params, u, t: 0.3 * u[..., 1], None, process)
  sampler = system.sampler(config, process)

  @jax.jit
  def both(key):
    u = process.prior_sample(key, (4, 3, 2))
    plain, sample = sampler.sampler(key, u, score), sampler(key, u, score, {})
    denoised = score.denoised(plain.x, sampler.ts[-1])
    return system.decode(config)(None, sample.x), denoised, sample.nfe - plain.nfe

  x, denoised, more = both(jax.random.key(0))
  np.testing.assert_allclose(x, denoised, rtol=1e-6)
  assert more.tolist() == [1] * 4


def test_a_process_with_velocities_that_keeps_the_data_is_told():
  with pytest.warns(UserWarning, match="data over noise is 1.3 at t1, so noised data do not match the prior"):
    systems.check(config_of("cld_digits", sde__beta=0.5))


FLOATS = from_arrays(RNG.normal(size=(BATCH, 8, 8, 1)).astype(np.float32))
CONTINUOUS = {
  "vae_digits": {"loss": {"type": "vae", "observation": "gaussian", "std": 1.0}, "likelihood__draws": 2},
  "lsgm_digits": {"autoencoder__loss": {"type": "vae", "observation": "gaussian", "std": 1.0}},
  "cld_digits": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUOUS)
def test_bounds_of_continuous_data_are_lower_bounds_in_nats(name):
  """Of data N(0, I): below their true log p but by chance, and not far, for networks that start as normals."""
  config = tiny(config_of(name, **CONTINUOUS[name]))
  config["likelihood"] |= {} if name == "vae_digits" else {"rtol": 1e-2, "atol": 1e-2}
  system = systems.of(config)
  params = jax.jit(lambda: system.init_params(config, FLOATS))()
  batch = {n: jnp.asarray(value) for n, value in FLOATS.gather(np.arange(BATCH)).items()}
  values = system.log_likelihood(config, params, FLOATS)(params, jd.example_keys(jax.random.key(0), 0, BATCH), batch)
  exact = -0.5 * np.sum(np.asarray(batch["x"]) ** 2, axis=(1, 2, 3)) - 32 * np.log(2 * np.pi)
  gap = exact - np.asarray(values["value"])
  statement, facts = system.statement(config, params, FLOATS)
  assert statement.startswith("nats, lower bound on log p(x)")
  assert facts["dequantization"] is None
  assert -2 < gap.mean() < {"vae_digits": 100, "lsgm_digits": 100, "cld_digits": 150}[name]


def test_statements_name_the_trace_that_is_taken():
  """Of 64 positions it is exact, though a state has 128 numbers."""
  config = config_of("cld_digits", likelihood__divergence=None)
  statement, _ = systems.of(config).statement(config, None, IMAGES)
  assert "exact trace" in statement


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("vq_digits", {"network__codes": 1}, "config.network.codes must be at least 2, got 1"),
    ("gumbel_digits", {"network__codes": 0}, "config.network.codes must be at least 2, got 0"),
    ("vq_digits", {"loss__revive_below": 0.5}, "config.loss.revive_below = 0.5: must be below 1 / 32"),
    ("vae_digits", {"loss": {"type": "vq"}}, "config.loss.type must be 'vae' for AutoencoderKL, got 'vq'"),
    ("vae_digits", {"sde": {"type": "VP"}}, "config.sde is no part of an autoencoder: leave it out"),
    ("vae_digits", {"likelihood__rtol": 1e-3}, "config.likelihood.rtol is of diffusions"),
    ("vq_digits", {"likelihood__importance": True}, "config.likelihood.importance is of config.loss.type = 'vae'"),
    ("vae_digits", {"network__output_channels": 3}, "config.network.output_channels does not exist"),
    (
      "vae_digits",
      {"discriminator_optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}},
      "needs config.discriminator",
    ),
    ("vae_digits", {"discriminator": {"type": "StepDiscriminator"}}, "must be 'PatchDiscriminator'"),
    ("latent_digits", {"autoencoder": {}}, "config.autoencoder.network is missing: give config.autoencoder.workdir"),
    (
      "latent_digits",
      {"autoencoder__network": {"type": "VQVAE"}},
      "must be 'AutoencoderKL', whose latents are Gaussian",
    ),
    (
      "lsgm_digits",
      {"autoencoder__workdir": "runs/vae"},
      "'lsgm' trains the autoencoder of config.autoencoder.network",
    ),
    ("latent_digits", {"sample__threshold": "static"}, "config.sample.threshold is of diffusions of the data"),
    ("latent_digits", {"network__dropout": 0.1}, "config.network.dropout = 0.1 is of diffusions of the data"),
    ("ddgan_digits", {"sde__steps": 0}, "steps must be at least 1, got 0"),
    ("ddgan_digits", {"discriminator": None}, "'denoising_gan' needs config.discriminator"),
    ("ddgan_digits", {"prediction__type": "noise"}, "config.prediction.type must be 'data'"),
    ("ddgan_digits", {"likelihood": {}}, "config.likelihood is no part of a denoising diffusion GAN"),
    ("ddgan_digits", {"discriminator__type": "PatchDiscriminator"}, "'PatchDiscriminator' knows no steps"),
    ("cld_digits", {"sde__mass": -1.0}, "config.sde: CLD needs positive, finite numbers"),
    ("cld_digits", {"loss__weight": {"type": "likelihood"}}, "config.loss.weight does not go with CLD"),
    ("cld_digits", {"loss__time": {"type": "importance"}}, "config.loss.time does not go with CLD"),
    (
      "lsgm_digits",
      {"loss__prior_weight": {"type": "velocity_likelihood"}},
      "config.loss.prior_weight does not go with VP",
    ),
    (
      "lsgm_digits",
      {"autoencoder__loss__beta": 0.1},
      "config.loss.beta is no setting of an autoencoder that is trained by",
    ),
    ("vae_digits", {"loss__patch_start": 1}, "config.loss.patch_start is no setting of an autoencoder without"),
    ("vq_digits", {"loss__codebook": "loss"}, "config.loss.decay is no setting of codes that are trained by the loss"),
    ("vae_digits", {"likelihood__bound_draws": 4}, "config.likelihood.bound_draws is no setting of an autoencoder"),
    ("ddgan_digits", {"prediction__log_snr_time": True}, "config.prediction.log_snr_time is no setting of a denoising"),
    ("cld_digits", {"prediction": {"type": "noise"}}, "config.prediction.type must be 'velocity_noise'"),
    ("cld_digits", {"sampler__type": "dpm_solver_pp"}, "config.sampler.type must be 'sscs' or 'reverse_sde'"),
    (
      "cld_digits",
      {"likelihood__variable": "log_snr"},
      "config.likelihood.variable is of processes without velocities",
    ),
    (
      "digits",
      {"discriminator": {"type": "StepDiscriminator"}},
      "config.discriminator is no part of a diffusion model",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(name, changes, message):
  config = config_of(name) if name in NEW else arguments.load(CONFIGS / f"{name}.py")
  with pytest.raises(ConfigError, match=message):
    systems.check(changed(config, changes))
