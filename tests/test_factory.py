import copy
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import components, factory, objectives, options, schema, systems
from jaxdiff.data import sources
from jaxdiff.data.examples import from_arrays
from jaxdiff.factory import ConfigError
from jaxdiff.models import conditioning

pytestmark = pytest.mark.standard_promotion
OTHER_KINDS = ("vae", "vq", "gumbel", "latent", "lsgm", "ddgan", "cld")  # see test_systems
CONFIGS = sorted(
  path
  for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
  if path.stem.split("_")[0] not in OTHER_KINDS
)
ON_DISK = ("fashion_mnist", "cifar10_vp", "imagenet64")  # and all of emoji


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return factory.normalize(module.get_config())


def changed(config, path, value):
  config = copy.deepcopy(config)
  *parents, last = path.split(".")
  section = config
  for name in parents:
    section = section[name]
  section[last] = value
  return config


NARROW = {"type": "MLP", "width": 8, "depth": 1}
IMAGES = {"type": "UNet", "channels": 4, "channel_multipliers": (1,), "blocks": 1, "groups": 2, "attention_levels": ()}


def filled(config, source, value=0.1):
  """Parameters that are all alike: an initial network is zero, and costs a program."""
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), shapes)


@pytest.fixture(scope="module")
def toy():
  return load(next(path for path in CONFIGS if path.stem == "toy2d"))


@pytest.mark.parametrize(
  "path", [path for path in CONFIGS if not path.stem.startswith(("emoji", *ON_DISK))], ids=lambda path: path.stem
)
def test_every_shipped_config_builds(path):
  """Nothing is computed: their networks fit their data, be they of as many blocks as they may."""
  config = load(path)
  systems.check(config)
  config["network"] |= {"blocks": 1} if "blocks" in config["network"] else {}
  source = factory.make_source(config, "train")
  params = jax.eval_shape(lambda: factory.init_params(config, source))
  x, t = jax.ShapeDtypeStruct((2, *source.shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
  network = factory.make_network(config)
  cond = jax.eval_shape(lambda x: conditioning.nothing(getattr(network, "conditions", {}), x), x)
  if schema.is_classifier(config):
    apply, shape = network.apply, (2, network.classes)
  else:
    score_of, shape = factory.make_score(config), x.shape
    apply = lambda params, x, t, **cond: score_of(params)(x, t, **cond)
  assert jax.eval_shape(lambda params, x, t, cond: apply(params, x, t, **cond), params, x, t, cond).shape == shape
  assert f"jaxdiff train --config=configs/{path.name}" in path.read_text()


def test_config_survives_json(toy, tmp_path):
  config = changed(toy, "network.channel_multipliers", (1, 2))
  factory.write(config, tmp_path / "config.json")
  assert factory.read(tmp_path / "config.json") == config


def test_identity_is_what_changes_the_training_and_nothing_else(toy):
  train = {"batch_size": 8, "steps": 7, "ema_decay": 0.5, "ema_lengths": (0.1,), "random_flip": True}
  train |= {"drop_conditions": 0.1}
  deciding = {"seed": 1, "optimizer.learning_rate": 1.0, "loss.weight": {"type": "noise"}, "data.noise": 0.5}
  deciding |= {"network.width": 7, "sde.beta_max": 9.0, "prediction.sigma_data": 0.3}
  for path, value in (deciding | {f"train.{name}": value for name, value in train.items()}).items():
    assert factory.identity(changed(toy, path, value)) != factory.identity(toy), path
  free = {"log_every": 3, "checkpoint_every": 9, "keep": 1, "launcher": "pmap", "fsdp": 2, "microbatches": 2}
  free |= {"steps_per_dispatch": 2, "validate_every": 5, "sample_every": 5, "max_skipped": 3}
  other = functools.reduce(lambda config, item: changed(config, f"train.{item[0]}", item[1]), free.items(), toy)
  other |= {"sampler": {"type": "ddim"}, "sample": {"num": 7}, "likelihood": {}, "evaluate": {"num": 9}}
  assert factory.identity(other) == factory.identity(toy)


@pytest.mark.parametrize(
  "prediction", sorted(components.PREDICTIONS.keys() - {"vector_field", "classes", "mixed_noise", "velocity_noise"})
)
def test_every_prediction_by_name_is_that_of_the_library(toy, prediction):
  config = changed(changed(toy, "prediction", {"type": prediction}), "network", NARROW)
  systems.check(config)
  network, params = factory.make_network(config), filled(config, from_arrays(np.zeros((4, 2), np.float32)))

  @jax.jit
  def scores(params, x, t):
    own = jd.score_fn(network.apply, params, jd.VP(), getattr(jd.predictions, prediction)())
    return factory.make_score(config)(params)(x, t), own(x, t)

  score, expected = scores(params, np.ones((2, 2), np.float32), np.full(2, 0.3, np.float32))
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(score, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("sde.type", "VPP", r"config.sde.type is 'VPP'; did you mean 'VP'\? valid: CLD, CNF, CosineVP, DDPM, EDM, NCSN"),
    ("sde.beta_mim", 0.1, r"config.sde.beta_mim does not exist; did you mean 'beta_min'\?"),
    ("sde.beta_max", -9.0, r"config.sde: VP needs .* 0 <= beta_min <= beta_max"),
    ("sampel", {}, r"config.sampel does not exist; did you mean 'sample'\?"),
    ("seed", -1, "config.seed must be an integer from 0"),
    ("seed", 0.5, "config.seed must be an integer, got 0.5"),
    ("sde.beta_min", -0.001, "config.sde: VP needs .* 0 <= beta_min <= beta_max"),
    ("sde", {"type": "VE", "sigma_min": 50.0, "sigma_max": 0.01}, "config.sde: "),
    ("sde", {"type": "VE", "sigma_min": 1.0, "sigma_max": 1.0}, "config.sde: "),
    ("sde", {"type": "EDM", "sigma_max": -1.0}, "config.sde: "),
    ("sde", None, "config.sde must be a section, a ConfigDict or dict of fields; got None"),
    ("sde.beta_max", "twenty", "config.sde.beta_max must be a number, got 'twenty'"),
    ("train.steps", 2.5, "config.train.steps must be an integer, got 2.5"),
    ("train.steps", None, "config.train.steps must be an integer, got None"),
    ("train.random_flip", 1, "config.train.random_flip must be True or False, got 1"),
    ("train.steps", 100, "config.train.steps = 100 must exceed config.optimizer.warmup_steps = 100"),
    ("optimizer.algorithm", "sgd", "config.optimizer.algorithm must be 'adam' or 'muon', got 'sgd'"),
    (
      "loss.wieght",
      {"type": "edm"},
      r"config.loss.wieght does not exist; did you mean 'weight'\? valid: t0, time, weight",
    ),
    ("likelihood.split", "tset", r"config.likelihood: split: got 'tset'.*did you mean 'test'"),
    ("likelihood.seed", -1, "config.likelihood.seed must be an integer from 0"),
    ("sample.trajectories", 0, "config.sample.trajectories must be at least 1"),
    ("data.path", "x", "config.data.path does not exist; .*valid: name, noise, seed, size"),
    ("prediction.sigma_data", 0.0, "config.prediction: sigma_data must be positive"),
    ("loss.weight.type", "likelyhood", r"config.loss.weight.type is 'likelyhood'; did you mean 'likelihood'\?"),
    (
      "loss.time",
      {"type": "uniform", "strata": 1},
      r"config.loss.time.strata does not exist; did you mean 'stratified'",
    ),
    ("network.widht", 3, r"config.network.widht does not exist; did you mean 'width'\?"),
    ("optimizer.learning_rate", -1.0, "config.optimizer: learning_rate=-1.0: must be > 0"),
    ("optimizer", {"warmup_steps": 1}, "config.optimizer needs a value for learning_rate"),
    ("train.batch_size", 0, "config.train.batch_size must be at least 1, got 0"),
    ("train.ema_decay", 1.0, r"config.train.ema_decay must be in \[0, 1\), got 1.0"),
    ("sample.num", 0, "config.sample.num must be at least 1"),
    ("sampler", {"type": "reverse_sde", "grid": {"steps": 0}}, "config.sampler.grid: steps must be at least 1"),
    ("sampler.grid", {"steps": 5}, "config.sampler.grid does not exist"),
    ("likelihood.rtol", 0.0, "config.likelihood: rtol must be positive"),
    ("likelihood.divergence.type", "hutchinso", r"did you mean 'hutchinson'\?"),
    ("likelihood.limit", -1, "config.likelihood.limit must be at least 1"),
    ("evaluate", {"num": 5}, "config.evaluate.num must be at least 6, got 5"),
    ("evaluate", {"nun": 5}, r"config.evaluate.nun does not exist; did you mean 'num'\?"),
    ("evaluate", {"coverage_k": 0}, "config.evaluate.coverage_k must be at least 1, got 0"),
    ("evaluate", {"reference": -1}, "config.evaluate.reference must be at least 0, got -1"),
    ("evaluate", {"seed": -1}, "config.evaluate.seed must be an integer from 0"),
    ("evaluate", {"split": "tset"}, r"config.evaluate: split: got 'tset'.*did you mean 'test'"),
  ],
)
def test_mistakes_are_named_with_their_path(toy, path, value, message, untyped):
  with pytest.raises(ConfigError, match=message):
    systems.check(changed(toy, path, value))


@pytest.mark.parametrize("kind", [kind for kind in components.PROCESSES if kind != "CLD"])
def test_every_process_by_name_reaches_its_prior(toy, kind, recwarn):
  config = changed(changed(toy, "sde", {"type": kind}), "network", NARROW)
  process = factory.make_process(config)
  assert not recwarn
  if kind != "CNF":
    systems.check(config)
    score_of = factory.make_score(config)
    x, t = jax.ShapeDtypeStruct((2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    params = jax.eval_shape(lambda: factory.init_params(config, from_arrays(np.zeros((4, 2), np.float32))))
    assert jax.eval_shape(lambda params, x, t: score_of(params)(x, t), params, x, t).shape == (2, 2)
    assert type(score_of(params).sde) is type(process)


def test_a_prior_that_does_not_match_is_warned_of(toy):
  with pytest.warns(UserWarning, match=r"config.sde: alpha / sigma is 0\.\d+ at t1"):
    factory.make_process(changed(toy, "sde.beta_max", 2.0))


def test_normalize_names_what_no_config_can_hold():
  assert factory.normalize({"a": [1, (2,)], "b": np.float32(0.5)}) == {"a": (1, (2,)), "b": 0.5}
  with pytest.raises(ConfigError, match=r"config.a.b holds <function .*; give a number"):
    factory.normalize({"a": {"b": changed}})


def test_identity_knows_data_by_content_not_by_place(toy):
  here, there = ({"type": "npz", "path": path, "levels": 4} for path in ("/here/x.npz", "/there/x.npz"))
  assert factory.identity(changed(toy, "data", here)) == factory.identity(changed(toy, "data", there))


def test_missing_sections_are_named(toy):
  config = copy.deepcopy(toy)
  del config["sampler"], config["loss"]
  with pytest.raises(ConfigError, match="config needs loss, sampler"):
    systems.check(config)


def test_a_config_may_leave_out_how_to_evaluate(toy):
  assert "evaluate" not in toy
  assert options.evaluate(toy) == schema.EvaluateSettings()
  assert options.evaluate(changed(toy, "evaluate", {"num": 7})).num == 7


def test_network_that_does_not_fit_the_data_is_refused(toy, untyped):
  config = changed(toy, "network", {"type": "UNet", "channels": 8, "channel_multipliers": (1, 1, 1, 1, 1)})
  source = sources.digits("train")
  with pytest.raises(ConfigError, match=r"config.network does not fit data of shape \(8, 8, 1\).*height of x"):
    factory.init_params(config, source)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("dtype", "float99", "config.network does not fit .*float99"),
    ("width", 0, r"config.network (has no parameters in \['params'\].*must be positive|does not fit)"),
  ],
)
def test_networks_that_cannot_be_are_refused(toy, field, value, message, untyped):
  with pytest.raises(ConfigError, match=message):
    factory.init_params(changed(toy, f"network.{field}", value), from_arrays(np.zeros((4, 2), np.float32)))


def test_data_mistakes_are_named(toy, tmp_path):
  with pytest.raises(ConfigError, match=r"config.data: .*moons"):
    factory.make_source(changed(toy, "data.name", "moon"), "train")
  np.savez(tmp_path / "x.npz", x=np.full((20, 2), np.nan, np.float32))
  with pytest.raises(ConfigError, match=r"config.data: .*(NaN|finite)"):
    factory.make_source(changed(toy, "data", {"type": "npz", "path": str(tmp_path / "x.npz")}), "train")


def objective_of(config, source):
  """What the train step would compute of the first eight examples, in one program: (loss, aux)."""
  objective = objectives.make_objective(config, source)

  def values(params, x, u):
    return objective(params, jd.example_keys(jax.random.key(0), 0, len(x)), {"x": x, "u": u})

  return values, source.gather(np.arange(8))["x"], np.linspace(0.0, 1.0, 8, endpoint=False, dtype=np.float32)


def test_objective_flips_and_drops(toy):
  digits = sources.digits("train")
  config = changed(toy, "network", IMAGES)
  params, (_, *arguments) = filled(config, digits), objective_of(config, digits)
  others = [config, changed(config, "train.random_flip", True), changed(config, "network.dropout", 0.5)]
  objectives_of = [objective_of(other, digits)[0] for other in others]
  together = jax.jit(lambda *arguments: [values(*arguments)[0] for values in objectives_of])
  plain, flipped, dropped = (np.asarray(value) for value in together(params, *arguments))
  assert 0 < np.count_nonzero(plain == flipped) < 8
  assert np.all(plain != dropped)
  with pytest.raises(ConfigError, match="random_flip mirrors images"):
    objectives.make_objective(changed(toy, "train.random_flip", True), from_arrays(np.zeros((4, 2), np.float32)))


LOSSES = {
  "denoising": ("VP", {}),
  "implicit": ("VP", {}),
  "sliced": ("VE", {"probes": 2, "reduced": True}),
  "bound": ("EDM", {}),
  "vdm": ("VariancePreserving", {"steps": 8}),
  "ncsn": ("NCSN", {}),
  "ddpm_simple": ("DDPM", {"first": 2}),
  "ddpm_hybrid": ("DDPM", {}),
  "ddpm_elbo": ("DDPM", {"variance": "beta_tilde"}),
  "ffjord": ("CNF", {"solver": "heun", "num_steps": 2}),
}


def with_loss(toy, kind):
  process, fields = LOSSES[kind]
  config = changed(changed(toy, "sde", {"type": process}), "network", NARROW)
  config["loss"] = {"type": kind, **fields}
  config["prediction"] = {"type": "noise", "log_snr_time": True}
  if process == "CNF":
    config |= {"prediction": {"type": "vector_field"}, "sampler": {"type": "cnf"}}
  return config


def test_every_loss_of_the_tables_is_tried():
  elsewhere = {"classification", "lsgm", "denoising_gan", "hybrid", *components.AUTOENCODING}  # and test_systems
  assert LOSSES.keys() | elsewhere == components.LOSSES.keys()


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_by_name(toy, kind):
  """On continuous and on integer data; losses that know levels are given the integers, others dequantized data."""
  config = with_loss(toy, kind)
  if kind == "ddpm_hybrid":
    config["network"] = IMAGES | {"parts": 2}
  systems.check(config)
  shape = (4, 4, 1) if kind == "ddpm_hybrid" else (2,)
  rng = np.random.default_rng(0)
  examples = [
    from_arrays(rng.normal(size=(8, *shape)).astype(np.float32)),
    from_arrays(rng.integers(0, 5, (8, *shape)).astype(np.uint8), levels=5),
  ]
  params = [filled(config, source) for source in examples]
  programs, *arguments = zip(*(objective_of(config, source) for source in examples), strict=True)
  run = jax.jit(lambda *arguments: [values(*given) for values, *given in zip(programs, *arguments, strict=True)])
  for values, aux in run(params, *arguments):
    assert values.shape == (8,)
    assert np.all(np.isfinite(values))
    np.testing.assert_allclose(aux["loss_per_dim"], values / np.prod(shape), rtol=1e-6)
    assert np.std(values) > 0
  score_of, x = factory.make_score(config), jax.ShapeDtypeStruct((8, *shape), jnp.float32)
  t = jax.ShapeDtypeStruct((8,), jnp.float32)
  assert jax.eval_shape(lambda params, x, t: score_of(params)(x, t), params[0], x, t).shape == x.shape


@pytest.mark.slow
def test_a_learned_schedule_is_trained_and_used(toy):
  """Its leaves have gradients; the process, the score and the bound are those of the trained schedule."""
  config = with_loss(toy, "vdm")
  config["sde"] |= {"interior": "learned", "learn_ends": True, "gamma_min": -6.0}
  config["likelihood"] |= {"rtol": 0.3, "atol": 0.3}
  config["network"] |= NARROW
  systems.check(config)
  source = from_arrays(np.random.default_rng(0).integers(0, 5, (8, 2)).astype(np.uint8), levels=5)
  params = factory.init_params(config, source)
  assert params.keys() == {"network", "gamma"}
  objective, keys = objectives.make_objective(config, source), jd.example_keys(jax.random.key(0), 0, 8)
  batch = {"x": jnp.asarray(source.gather(np.arange(8))["x"]), "u": jnp.linspace(0.0, 0.99, 8)}
  gradient = jax.jit(jax.grad(lambda params: objective(params, keys, batch)[0].mean()))(params)
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient["gamma"]))
  moved = params | {"gamma": jax.tree.map(lambda leaf: leaf + 0.5, params["gamma"])}
  assert factory.make_process(config, moved).gamma.minimum == -5.5
  assert factory.make_process(config).gamma.minimum == -6.0
  example, x = jd.example_keys(jax.random.key(0), 0, 4), batch["x"][:4]
  bound = functools.partial(objectives.make_bound, draws=4)
  for name, make in {"value": objectives.make_log_likelihood, "bound": bound}.items():
    values = [jax.jit(make(config, p, source))(p, example, {"x": x})[name] for p in (params, moved)]
    assert jnp.all(jnp.isfinite(values[0]) & (values[0] != values[1]))


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("sde", {"type": "VP"}, r"config.loss.type = 'vdm' needs config.sde.type = 'VariancePreserving', got 'VP'"),
    ("prediction", {"type": "noise"}, "config.prediction.log_snr_time must be True"),
    ("sde.gamma_min", 7.0, "config.sde: minimum must be below maximum, got gamma from 7.0 to 6.0"),
    ("loss.steps", 0, "config.loss: steps must be at least 1"),
  ],
)
def test_losses_name_what_they_need(toy, path, value, message):
  with pytest.raises(ConfigError, match=message):
    systems.check(changed(with_loss(toy, "vdm"), path, value))


def test_learned_variances_need_twice_the_channels(toy):
  with pytest.raises(ConfigError, match="config.network.parts must be 2 for config.loss.type = 'ddpm_hybrid'"):
    systems.check(with_loss(toy, "ddpm_hybrid"))


def test_a_learned_schedule_needs_the_loss_that_trains_it(toy):
  config = changed(with_loss(toy, "vdm"), "sde.interior", "learned")
  config["loss"] = {"type": "denoising"}
  with pytest.raises(ConfigError, match="learned parts, which config.loss.type = 'denoising' does not train"):
    systems.check(config)


def test_the_bound_and_the_likelihood_of_integers_agree(toy):
  """The exact score of N(0, I) makes the bound tight: in the mean the same bits per dimension, within 4 s.e."""
  source = from_arrays(np.random.default_rng(0).integers(0, 4, (64, 2)).astype(np.uint8), levels=4)
  config = changed(toy, "prediction", {"type": "score"})
  config["network"] |= {"width": 8, "depth": 1}
  params = factory.init_params(config, source)
  example, x = jd.example_keys(jax.random.key(1), 0, 64), jnp.asarray(source.gather(np.arange(64))["x"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(factory, "make_apply", lambda config: lambda params, x, t: -x)
    flow = objectives.make_log_likelihood(config, params, source)
    bound = objectives.make_bound(config, params, source, draws=256)
    exact, estimate = (jax.jit(f)(params, example, {"x": x}) for f in (flow, bound))
  difference = estimate["bound"] - exact["value"]
  assert abs(difference.mean()) < 4 * difference.std() / 8
  assert difference.std() / 8 < 0.2
