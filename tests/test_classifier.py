"""Classifiers of noised data: the loss has its minimum at the posterior, the network, configs and commands."""

import functools
import json
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import compiled, mixture

import jaxdiff as jd
from jaxdiff import arguments, cli, factory, objectives, systems
from jaxdiff.data.examples import from_arrays
from jaxdiff.models import Classifier, conditioning
from jaxdiff.models.classifier import AttentionPool
from jaxdiff.training.metrics import read_metrics

KEY = jax.random.key(0)
MIXTURE = mixture()
COUNT = 20_000


def components(seed, count=COUNT):
  """Examples of the mixture and which component each is of."""
  rng = np.random.default_rng(seed)
  label = rng.choice(3, size=count, p=MIXTURE.weights)
  x = MIXTURE.means[label] + MIXTURE.std * rng.normal(size=(count, 2))
  return x.astype(np.float32), label.astype(np.int32)


def posterior(x, t, temperature=1.0, bias=(0.0, 0.0, 0.0)):
  """Logits of the exact p(component | x_t)."""
  alpha, sigma = jd.VP().marginal(t)
  variance = (alpha**2 * MIXTURE.std**2 + sigma**2)[:, None]
  away = x[:, None] - alpha[:, None, None] * jnp.asarray(MIXTURE.means, x.dtype)[None]
  prior = jnp.asarray(np.log(MIXTURE.weights), x.dtype) + jnp.asarray(bias, x.dtype)
  return (prior[None] - 0.5 * jnp.sum(away**2, axis=-1) / variance) / temperature


def test_the_posterior_has_the_least_loss_and_it_is_the_conditional_entropy():
  loss = jd.losses.classification(jd.VP())

  @jax.jit
  def evaluate(key, x0, label, temperature, bias):
    return loss(key, x0, lambda x, t: posterior(x, t, temperature, bias), {"label": label})

  def exact(key, x0, t):
    log_prob = jax.nn.log_softmax(posterior(jd.perturb(key, x0, t, jd.VP())[0], t), axis=-1)
    return -jnp.sum(jnp.exp(log_prob) * log_prob, axis=1), jnp.max(jnp.exp(log_prob), axis=1)

  losses = lambda temperature, *bias: jax.device_get(
    evaluate(KEY, *components(1), np.float32(temperature), np.array(bias, np.float32))
  )
  value, aux = losses(1.0, 0.0, 0.0, 0.0)
  entropy, right = compiled(exact, jax.random.key(3), components(2)[0], aux["t"])
  error = np.sqrt((np.var(value) + np.var(entropy)) / COUNT)
  assert abs(value.mean() - entropy.mean()) < 4 * error
  assert abs(aux["accuracy"].mean() - right.mean()) < 4 * np.sqrt((right.var() + aux["accuracy"].var()) / COUNT)

  for fields in ((0.7, 0.0, 0.0, 0.0), (1.5, 0.0, 0.0, 0.0), (1.0, 0.5, 0.0, 0.0), (1.0, 0.0, -0.5, 0.0)):
    worse = losses(*fields)[0] - value  # of the same noised examples
    assert worse.mean() > 4 * worse.std() / COUNT**0.5, fields


def test_examples_depend_on_their_own_keys():
  loss = jd.losses.classification(jd.VP(), time=jd.losses.times.uniform(stratified=False))

  def run(key, x0, label):
    keys = jd.example_keys(key, 0, 8)
    part = loss(keys[2:5], x0[2:5], posterior, {"label": label[2:5]})[0]
    return loss(keys, x0, posterior, {"label": label}), part

  (value, aux), part = compiled(run, KEY, *components(1, 8))
  np.testing.assert_allclose(part, value[2:5], rtol=1e-6)
  assert len(np.unique(aux["t"])) == 8


def test_the_network_is_told_all_but_the_label():
  told = {}

  def network(x, t, **cond):
    told.update(cond)
    return jnp.zeros((len(x), 3))

  cond = {"label": np.array([0, 2]), "age": np.ones(2, np.float32)}
  run = lambda key, cond, u: jd.losses.classification(jd.VP())(key, jnp.zeros((2, 3)), network, cond, u=u)
  value, aux = compiled(run, KEY, cond, np.array([0.1, 0.5], np.float32))
  assert set(told) == {"age"}
  np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
  np.testing.assert_array_equal(aux["accuracy"], [1.0, 0.0])  # of equal logits the first is the largest


def test_labels_beyond_the_classes_give_nan():
  network = lambda x, t: jnp.zeros((len(x), 3))
  loss = jd.losses.classification(jd.VP())
  run = lambda key, label: loss(key, jnp.zeros((3, 2)), network, {"label": label})[0]
  np.testing.assert_array_equal(np.isnan(compiled(run, KEY, np.array([-1, 3, 2]))), [True, True, False])


@pytest.mark.parametrize(
  ("cond", "kind", "message"),
  [
    ({}, ValueError, "cond lacks 'label', integers"),
    ({"label": np.zeros(2, np.float32)}, TypeError, r"cond\['label'\] must be integers \[b\], got float32"),
    (
      {"label": np.zeros((2, 1), np.int32)},
      ValueError,
      r"cond\['label'\] must be integers \[b\], got shape \(2, 1\)",
    ),
  ],
)
def test_wrong_labels_are_refused(cond, kind, message):
  with pytest.raises(kind, match=message):
    jd.losses.classification(jd.VP())(KEY, np.zeros((2, 2), np.float32), lambda x, t: x, cond)


def test_a_network_of_scores_is_refused():
  loss, label = jd.losses.classification(jd.VP()), np.zeros(2, np.int32)
  with pytest.raises(ValueError, match=r"must return logits \[b, classes\] for x \(2, 4, 4, 1\); got \(2, 4, 4, 1\)"):
    jax.eval_shape(lambda x: loss(KEY, x, lambda x, t: x, {"label": label}), np.zeros((2, 4, 4, 1), np.float32))


NET = Classifier(
  classes=3,
  channels=4,
  attention_levels=(0,),
  blocks=1,
  groups=2,
  heads=2,
  conditions={
    "small": conditioning.Image(1),
    "age": conditioning.Scalar(),
    "words": conditioning.Embedding(3, sequence=True),
  },
)
RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32), np.array([0.1, 0.9], np.float32)
COND = {
  "small": RNG.normal(size=(2, 2, 2, 1)).astype(np.float32),
  "age": np.array([0.1, np.nan], np.float32),
  "words": RNG.normal(size=(2, 2, 3)).astype(np.float32),
}


@functools.cache
def moved():
  """Random parameters, so that no zero initialization hides a path."""
  rng = np.random.default_rng(4)
  draw = lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype)
  return jax.tree.map(draw, jax.eval_shape(lambda key: NET.init(key, X, T, **COND), KEY))


def test_attention_pooling_is_the_mean_asking_all_positions_and_itself():
  """softmax(q k / sqrt d) v in float64, head by head."""
  pool, rng = AttentionPool(heads=2), np.random.default_rng(0)
  x = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  params = jax.tree.map(
    lambda p: rng.normal(size=p.shape).astype(np.float32), jax.eval_shape(lambda key: pool.init(key, x), KEY)
  )
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["params"]
  expected = np.zeros((2, 4))
  for b, image in enumerate(np.asarray(x, np.float64)):
    seen = np.concatenate([image.mean((0, 1))[None], image.reshape(-1, 4)]) + p["positions"]
    query = seen[0] @ p["query"]["kernel"] + p["query"]["bias"]
    key, value = np.split(seen @ p["key_value"]["kernel"] + p["key_value"]["bias"], 2, axis=1)
    for head in (slice(0, 2), slice(2, 4)):
      weights = np.exp(key[:, head] @ query[head] / np.sqrt(2))
      expected[b, head] = weights @ value[:, head] / weights.sum()
  np.testing.assert_allclose(compiled(pool.apply, params, x), expected, rtol=1e-4, atol=1e-5)


def test_the_network_is_undecided_at_first():
  """The last layer, which alone makes the logits, is zero."""
  logits, variables = jax.eval_shape(lambda key: NET.init_with_output(key, X, T, **COND), KEY)
  assert logits.shape == (2, 3)
  assert variables["params"]["output"]["kernel"].shape == (4 * 2, 3)
  output = compiled(lambda key: NET.init(key, X, T, **COND)["params"]["output"], KEY)
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), output)


def test_gradients_reach_every_parameter_and_the_image():
  def loss(params, x):
    return -jax.nn.log_softmax(NET.clone(remat="full").apply(params, x, T, **COND))[:, 1].sum()

  gradient, of_image = compiled(jax.grad(loss, argnums=(0, 1)), moved(), X)
  silent = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g != 0)]
  assert not silent
  assert (np.abs(of_image) > 0).all()


@pytest.mark.standard_promotion
def test_bfloat16_computes_near_float32():
  run = lambda dtype: compiled(lambda values: NET.clone(dtype=dtype).apply(values, X, T, **COND), moved())
  exact, near = run(jnp.float32), run(jnp.bfloat16)
  assert near.dtype == X.dtype
  assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.parametrize(
  ("fields", "shape", "message"),
  [
    ({"classes": 1}, (2, 4, 4, 1), "classes=1: a classifier needs two or more"),
    ({"channels": 12}, (2, 4, 4, 1), "channels at level 0=12 is not divisible by groups=8"),
    ({"heads": 3}, (2, 4, 4, 1), "channels at level 1=16 is not divisible by heads=3"),
    ({"attention_levels": (2,)}, (2, 4, 4, 1), "there is no level 2, take 0..1"),
    ({}, (2, 4, 5, 1), "width of x=5 is not divisible by"),
    ({"remat": "half"}, (2, 4, 4, 1), "remat='half'"),
  ],
)
def test_wrong_arguments_are_named(fields, shape, message):
  net = Classifier(**({"classes": 3, "channels": 8} | fields))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(net.init, KEY, np.zeros(shape, np.float32), np.zeros(shape[0], np.float32))


CONFIG = {
  "seed": 0,
  "data": {"type": "digits"},
  "sde": {"type": "VP"},
  "prediction": {"type": "classes"},
  "loss": {"type": "classification"},
  "network": {"type": "Classifier", "classes": 10, "channels": 8, "blocks": 1, "groups": 4},
  "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
  "train": {"batch_size": 16, "steps": 3},
}
DIGITS = from_arrays(RNG.integers(0, 17, (32, 8, 8, 1)).astype(np.uint8), RNG.integers(0, 10, 32), levels=17)


class Fixed:
  """What stands in for a network: a function without parameters."""

  conditions: ClassVar[dict] = {}

  def __init__(self, logits, classes):
    self.classes = classes
    self.apply = lambda params, x, t: logits(x, t)


def test_the_objective_hands_the_labels_to_the_loss(monkeypatch):
  systems.check(CONFIG)
  monkeypatch.setattr(factory, "make_network", lambda config: Fixed(lambda x, t: jnp.zeros((len(x), 10)), 10))
  batch = DIGITS.gather(np.arange(8)) | {"u": np.linspace(0.1, 0.9, 8, dtype=np.float32)}
  objective = objectives.make_objective(CONFIG, DIGITS)
  value, aux = compiled(lambda key, batch: objective({}, jd.example_keys(key, 0, 8), batch), KEY, batch)
  np.testing.assert_allclose(value, np.log(10), rtol=1e-6)
  assert set(aux) == {"accuracy", "t"}
  np.testing.assert_array_equal(aux["accuracy"], batch["label"] == 0)


def test_accuracy_at_each_noise_level_is_that_of_the_loss(monkeypatch):
  """With the exact posterior in the place of the network: nearly sure without noise, a guess at the end."""
  monkeypatch.setattr(factory, "make_network", lambda config: Fixed(posterior, 3))
  source = from_arrays(*components(1, 4000))
  objective = objectives.make_accuracy(CONFIG, source, np.array([1e-3, 1.0], np.float32))
  run = lambda key, batch: objective({}, jd.example_keys(key, 0, 4000), batch)
  found = compiled(run, KEY, source.gather(np.arange(4000)))
  assert found["nats"].shape == found["accuracy"].shape == (4000, 2)
  assert found["accuracy"][:, 0].mean() > 0.99
  weights = MIXTURE.weights
  np.testing.assert_allclose(found["accuracy"][:, 1].mean(), weights.max(), atol=0.04)  # standard error 0.008
  np.testing.assert_allclose(found["nats"][:, 1].mean(), -(weights * np.log(weights)).sum(), atol=0.04)


@pytest.mark.parametrize(
  ("path", "fields", "message"),
  [
    ("loss", {"type": "denoising"}, "config.loss.type must be 'classification' for config.network.type = 'Classifier'"),
    ("prediction", {"type": "noise"}, "config.prediction.type must be 'classes' for config.network.type"),
    ("sde", {"type": "CNF"}, "config.sde.type = 'CNF' has no noise"),
    ("sampler", {"type": "ddim"}, "config.sampler is no part of a classifier: leave it out"),
    ("train", {"sample_every": 2}, "config.train.sample_every must be 0"),
    ("network", {"type": "MLP"}, "config needs sample, sampler, likelihood"),
    ("loss", {"type": "classification", "weight": {"type": "noise"}}, "config.loss.weight does not exist"),
  ],
)
def test_what_does_not_go_together_is_refused(path, fields, message):
  with pytest.raises(factory.ConfigError, match=message):
    systems.check(CONFIG | {path: fields})


def test_a_classifier_needs_its_network():
  generative = {"network": {"type": "MLP"}, "sampler": {"type": "ddim"}, "sample": {}, "likelihood": {}}
  message = "config.prediction.type = 'classes' needs config.network.type = 'Classifier', got 'MLP'"
  with pytest.raises(factory.ConfigError, match=message):
    systems.check(CONFIG | generative)


def test_labels_of_the_data_are_checked_before_training():
  few = CONFIG | {"network": CONFIG["network"] | {"classes": 9}}
  with pytest.raises(
    factory.ConfigError, match="config.network.classes = 9, but .* has labels from 0 to 9.*classes=10"
  ):
    objectives.make_objective(few, DIGITS)
  nameless = from_arrays(np.zeros((4, 8, 8, 1), np.uint8), levels=17)
  with pytest.raises(factory.ConfigError, match="config.network needs data with 'label'; .* has x"):
    objectives.make_objective(CONFIG, nameless)


def test_the_config_of_fashion_mnist_builds_without_its_data():
  file = pathlib.Path(__file__).parents[1] / "configs" / "fashion_mnist_classifier.py"
  config = arguments.load(file)
  systems.check(config)
  source = from_arrays(np.zeros((2, 28, 28, 1), np.uint8), np.array([0, 9]), levels=256)
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 323_530
  assert "Measured on" in file.read_text()


def refused(capsys, *argv):
  with pytest.raises(SystemExit) as exit:
    cli.main(list(argv))
  assert exit.value.code == 2
  return capsys.readouterr().err


def test_commands_of_generative_models_are_refused(tmp_path, capsys):
  factory.write(CONFIG, tmp_path / "config.json")
  for argv in (["sample"], ["sample", "--num=4"], ["likelihood", "--limit=4"]):
    error = refused(capsys, *argv, f"--workdir={tmp_path}")
    assert f"{argv[0]} is for models that generate, and config.network.type = 'Classifier'" in error


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_classifier_learns_digits_through_the_command_line(tmp_path, capsys):
  config = tmp_path / "digits.py"
  settings = {"batch_size": 64, "steps": 400, "log_every": 100, "validate_every": 200, "ema_decay": 0.95}
  made = CONFIG | {"train": settings, "evaluate": {"batch_size": 64, "num": 0}}
  config.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({made!r})\n")
  run = tmp_path / "run"
  cli.main(["train", f"--config={config}", f"--workdir={run}"])
  records = read_metrics(run / "metrics.jsonl")
  held_out = [record for record in records if "validation_accuracy" in record]
  assert [record["step"] for record in held_out] == [200, 400]
  assert records[0]["loss"] > held_out[-1]["validation_loss"]
  assert held_out[-1]["validation_accuracy"] > 0.25  # a tenth by chance; half of the times are all but noise
  cli.main(["evaluate", f"--workdir={run}"])
  report = json.loads((run / "accuracy.json").read_text())
  first, last = report["levels"][0], report["levels"][-1]
  assert first["log_snr"] > last["log_snr"]
  assert first["accuracy"] > 2 * last["accuracy"]
  assert abs(last["accuracy"] - report["commonest_class"]) < 0.1
  assert (run / "accuracy.png").exists()
  assert f"{first['accuracy']:7.4f} +-" in capsys.readouterr().out
