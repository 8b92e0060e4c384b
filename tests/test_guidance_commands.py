"""Labels, prompts and guidance on the command line, with exact networks of classes that are normal distributions.

Where the networks are exact, guidance by conditions, by a classifier and by a weaker model are one formula, and the
samples of the commands must be the same, whichever way they go.
"""

import json
import math

import exact_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import LABEL, MEANS, SPREAD, TEXT, classifier_config, config_of, make_run, write_data

import jaxdiff as jd
from jaxdiff import cli, factory, systems
from jaxdiff.commands import guiding
from jaxdiff.evaluation import runs

pytestmark = pytest.mark.standard_promotion
SHAPE = 4, 2, 2  # no picture: two channels


@pytest.fixture(scope="module", autouse=True)
def networks():
  with exact_runs.networks():
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Runs of one data set: told labels, told nothing, a classifier, told texts; and some that do not go with them."""
  folder = tmp_path_factory.mktemp("runs")
  data = write_data(folder / "data.npz", SHAPE)
  make_run(folder / "labels", config_of(data, LABEL))
  make_run(folder / "plain", config_of(data))
  make_run(folder / "classifier", classifier_config(data))
  make_run(folder / "text", config_of(None, TEXT) | {"data": {"type": "absent", "shape": (4, 4, 1), "levels": 16}})
  return folder


def sample(workdir, *arguments):
  cli.main(["sample", f"--workdir={workdir}", *arguments])
  with np.load(workdir / "samples.npz", allow_pickle=False) as drawn:
    return dict(drawn)


def fails(capsys, command, workdir, *arguments):
  with pytest.raises(SystemExit) as exit:
    cli.main([command, f"--workdir={workdir}", *arguments])
  assert exit.value.code == 2
  return capsys.readouterr().err


def test_samples_are_of_the_label_that_is_given(folder, capsys):
  """Of several labels number k mod n is that of sample k; by default they are those of the examples."""
  drawn, usual = sample(folder / "labels", "--label=2,0"), sample(folder / "labels")
  np.testing.assert_array_equal(drawn["label"], np.arange(16) % 2 * -2 + 2)
  assert "example" not in drawn
  assert set(drawn["nfe"]) == {12}
  error = SPREAD / math.sqrt(16 * 8)
  np.testing.assert_allclose(drawn["x"].reshape(8, 2, -1).mean(axis=(0, 2)), MEANS[[2, 0]], atol=4 * error)
  np.testing.assert_array_equal(usual["example"], np.arange(16))
  assert "label" not in usual
  one = sample(folder / "labels", "--label=2")
  np.testing.assert_array_equal(one["x"][::2], drawn["x"][::2])  # by the same noise
  np.testing.assert_array_equal(one["x"][2::3], usual["x"][2::3])


def test_samples_are_of_the_prompt_that_is_given_without_any_data(folder):
  drawn = sample(folder / "text", "--prompt=('@at', 'é')")
  assert drawn["prompt"].tolist() == ["@at", "é"] * 8
  means = np.array([ord("@"), "é".encode()[0]]) / 128 - 1
  np.testing.assert_allclose(drawn["x"].reshape(8, 2, -1).mean(axis=(0, 2)), means, atol=4 * SPREAD / math.sqrt(128))
  assert sample(folder / "text", "--prompt=3")["prompt"].tolist() == ["3"] * 16
  assert {"samples.png", "denoising.png"} <= {path.name for path in (folder / "text").iterdir()}


BAD_TOLD = [
  (["labels", "--label=3"], "config.sample.label = 3 is no class of the model: take 0 to 2"),
  (["labels", "--label=0,-1"], "config.sample.label = -1 is no class"),
  (["labels", "--label=two"], "config.sample.label must be an integer or a tuple of an integer, got 'two'"),
  (["plain", "--label=1"], "config.sample.label = 1 is for models that are told a class"),
  (["labels", "--prompt=cat"], "config.sample.prompt = 'cat' is for models that are told a text"),
  (["text", "--prompt=a long cat"], "has 10 bytes in UTF-8, of which the model reads 6: shorten it"),
  (["text", f"--prompt={'cat' * 50}"], f"config.sample.prompt = '{'cat' * 13}... has 150 bytes"),
  (["text", "--prompt='a\\x00'"], "holds a NUL character"),
  (["text", "--label=1"], "none of the type 'label': leave it out, or guide by a classifier"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_TOLD, ids=lambda value: " ".join(value)[:30])
def test_what_the_model_cannot_be_told_is_refused(folder, capsys, arguments, message):
  run, *flags = arguments
  assert message in fails(capsys, "sample", folder / run, *flags)


def by_hand(config, params, cond, guide, **fields):
  """What the command should have drawn: the library's own sampler with the keys of samples 0 to 15."""
  process, score = factory.make_process(config), factory.make_score(config)
  sampler = factory.make_sampler(config, process)
  path_keys = lambda pair: sampler(pair[1], process.prior_sample(pair[0], (16, *SHAPE)), guide(score(params)), cond)
  key = jax.random.fold_in(jax.random.key(0), 2)  # the stream of samples
  return jax.jit(lambda key: path_keys(jd.keys.split(jd.example_keys(key, 0, 16))))(key)


def test_guidance_of_one_is_the_conditional_model_bit_for_bit(folder):
  plain, one = sample(folder / "labels", "--label=1"), sample(folder / "labels", "--label=1", "--guidance=1")
  np.testing.assert_array_equal(plain["x"], one["x"])
  np.testing.assert_array_equal(plain["nfe"], one["nfe"])


def test_all_ways_of_guidance_are_one_where_the_networks_are_exact(folder, capsys):
  """2 s(x|y) - s(x), by conditions, by a weaker model and, s(x|y) + grad log p(y|x), by a classifier."""
  flags = ["--label=2,1"]
  free = sample(folder / "labels", *flags, "--guidance=2")
  weak = sample(folder / "labels", *flags, "--guidance=2", f"--weak={folder / 'plain'}")
  led = sample(folder / "labels", *flags, f"--classifier={folder / 'classifier'}")
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("guided: ")]
  assert lines == [
    "guided: classifier-free, scale 2",
    f"guided: by the weaker model {folder / 'plain'}, scale 2",
    f"guided: by the classifier {folder / 'classifier'}, scale 1",
  ]
  settings = json.loads(str(weak["settings"]))
  assert settings["label"] == [2, 1]
  assert settings["guidance"]["weak"] == str(folder / "plain")
  params = {"params": {"means": jnp.asarray(MEANS)}}
  config = factory.read(folder / "labels" / "config.json")
  cond = {"label": jnp.asarray(free["label"])}
  alone = by_hand(config, params, cond, lambda score: jd.guidance.classifier_free(score, {"label": 3}, 2.0))
  for drawn in (free, weak, led):
    np.testing.assert_allclose(drawn["x"], alone.x, rtol=1e-3, atol=2e-4)
    assert set(drawn["nfe"]) == {24}
  assert np.abs(free["x"] - sample(folder / "labels", *flags)["x"]).max() > 0.05


def test_a_classifier_leads_an_unconditional_model_to_its_classes(folder):
  """At scale 1 as the conditional model draws them, all classes one after the other; at 3 further from the others."""
  flag = f"--classifier={folder / 'classifier'}"
  drawn = sample(folder / "plain", flag)
  np.testing.assert_array_equal(drawn["label"], np.arange(16) % 3)
  conditional = sample(folder / "labels", "--label=0,1,2")
  np.testing.assert_allclose(drawn["x"], conditional["x"], rtol=1e-3, atol=2e-4)
  assert set(drawn["nfe"]) == {24}
  strong = sample(folder / "plain", flag, "--label=2", "--guidance=3")
  assert strong["x"].mean() > sample(folder / "labels", "--label=2")["x"].mean() + 0.02


def test_an_interval_guides_there_alone(folder):
  """At the cost of one evaluation elsewhere; within it rescaling changes the samples."""
  usual = sample(folder / "labels", "--label=0", "--guidance=2")
  part = sample(folder / "labels", "--label=0", "--guidance=2", "--interval=0.3,2")
  config = factory.read(folder / "labels" / "config.json")
  process = factory.make_process(config)
  alpha, sigma = process.marginal(factory.make_sampler(config, process).ts[:-1])
  inside = int(((sigma / alpha > 0.3) & (sigma / alpha <= 2)).sum())
  assert 0 < inside < 12
  assert set(part["nfe"]) == {12 + inside}
  assert np.abs(part["x"] - usual["x"]).max() > 1e-3
  rescaled = sample(folder / "labels", "--label=0", "--guidance=2", "--rescale=0.7")
  assert np.abs(rescaled["x"] - usual["x"]).max() > 1e-3


@pytest.fixture(scope="module")
def strangers(folder):
  """Other runs in the same folder, which do not go with the model."""
  data, other = folder / "data.npz", write_data(folder / "other.npz", SHAPE, shift=1)
  make_run(folder / "cosine", classifier_config(data, sde={"type": "CosineVP"}))
  make_run(folder / "elsewhere", classifier_config(other))
  make_run(folder / "weak_elsewhere", config_of(other))
  two = {"label": {"type": "label", "classes": 4}}
  make_run(folder / "four", config_of(data, two))
  make_run(folder / "steadfast", config_of(data, LABEL, drop=0.0))
  return folder


BAD_GUIDANCE = [
  ("plain", "--guidance=2", "config.guidance.scale = 2.0 leads to the conditions of the model, and config.network"),
  ("steadfast", "--guidance=2", "config.train.drop_conditions = 0: train one with 0.1, or guide by another run"),
  ("labels", "--guidance=-1", "config.guidance.scale must be at least 0, got -1.0"),
  ("labels", "--guidance=strong", "config.guidance.scale must be a number or None, got 'strong'"),
  ("labels", "--guidance=nan", "config.guidance.scale must be"),
  ("labels", "--guidance=2 --interval=5,0.2", "must be LOW,HIGH, two values of sigma / alpha with 0 <= LOW < HIGH"),
  ("labels", "--guidance=2 --interval=5", "config.guidance.interval must be LOW,HIGH, two values"),
  ("labels", "--guidance=2 --interval=1,2,3", "must be LOW,HIGH"),
  ("labels", "--interval=1,2", "config.guidance.interval needs a scale, such as --guidance=2"),
  ("labels", "--weak=.", "config.guidance.weak needs a scale"),
  ("labels", "--guidance=2 --rescale=2", "config.guidance.rescale must be in [0, 1], got 2"),
  ("labels", "--classifier={}/nothing", "nothing is no directory of a run: it has no config.json"),
  ("labels", "--classifier={}/plain", "holds a Exact, which is no classifier"),
  ("labels", "--classifier={}/cosine", "of another process: config.sde.type was 'CosineVP', is 'VP' in the model"),
  ("labels", "--classifier={}/elsewhere", "was trained on other data: data.name was"),
  ("labels", "--classifier={}/classifier --label=3", "config.sample.label = 3 is no class of the model: take 0 to 2"),
  ("labels", "--classifier={}/classifier --interval=1,2 --guidance=2", "are of guidance without a classifier"),
  ("labels", "--classifier={0}/classifier --weak={0}/plain --guidance=2", "are two ways of guidance"),
  ("labels", "--weak={}/weak_elsewhere --guidance=2", "was trained on other data: data.name was"),
  ("labels", "--weak={}/classifier --guidance=2", "holds a classifier: take a run of a weaker model"),
  ("labels", "--weak={}/four --guidance=2", "is told label as {'type': 'label', 'classes': 4}, the model"),
  ("plain", "--weak={}/labels --guidance=2", "the model is not: take a run with the same config.network.conditions"),
  ("labels", "--guidance=2 --weak={}/plain --rescale=0.5", "config.guidance.rescale is of guidance by the model's own"),
  ("classifier", "--label=1", "sample is for models that generate, and config.network.type = 'Classifier'"),
]


@pytest.mark.parametrize(("run", "flags", "message"), BAD_GUIDANCE, ids=lambda value: str(value)[:40])
def test_guidance_that_cannot_be_is_refused(strangers, capsys, run, flags, message):
  error = fails(capsys, "sample", strangers / run, *flags.format(strangers).split())
  assert message in error
  assert error.startswith("jaxdiff: ")
  assert "sampling" not in error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:16 examples for 16 features")
def test_what_evaluate_draws_is_told_and_led(folder, capsys, monkeypatch):
  """Chunks of samples belong to their guidance; those of another are drawn anew."""
  drawn, drawer = [], runs.drawer

  def noting(*arguments):
    draw = drawer(*arguments)
    return lambda start: drawn.append(draw(start)) or drawn[-1]

  monkeypatch.setattr(runs, "drawer", noting)
  flags = ["--label=2", "--guidance=2", "--config.evaluate.num=16"]
  for more in ([], [], ["--guidance=3"], ["--label=1"], ["--config.sample.threshold=static"]):
    cli.main(["evaluate", f"--workdir={folder / 'labels'}", *flags, *more])
  assert len(drawn) == 4
  assert "samples of these labels are measured against data of all labels" in capsys.readouterr().err
  np.testing.assert_array_equal(drawn[0]["x"], sample(folder / "labels", "--label=2", "--guidance=2")["x"])
  report = json.loads((folder / "labels" / "evaluation.json").read_text())
  assert report["label"] == [2]
  assert report["threshold"] == "static"
  assert report["guidance"]["scale"] == 2.0
  assert report["nfe"] == 24
  assert np.abs(drawn[3]["x"]).max() < np.abs(drawn[0]["x"]).max()


def test_a_likelihood_is_without_guidance(folder, capsys, monkeypatch):
  assert "config.guidance is of samples" in fails(capsys, "likelihood", folder / "labels", "--config.guidance.scale=2")
  config = factory.read(folder / "labels" / "config.json") | {"guidance": {"scale": 2.0}}
  file = folder / "guided.py"
  file.write_text(f"def get_config():\n  return {config!r}\n")

  def stop(*arguments):
    raise KeyboardInterrupt

  system = systems.of(config)._replace(log_likelihood=stop)
  monkeypatch.setattr(systems, "of", lambda config: system)
  with pytest.raises(SystemExit):
    cli.main(["likelihood", f"--workdir={folder / 'labels'}", f"--config={file}"])
  assert "config.guidance is of samples: the likelihood is that of the model without it" in capsys.readouterr().err


def test_parameters_of_both_runs_are_arguments(folder):
  """Of the jitted function: no constant of the compiled program holds them."""
  config = arguments_of(folder / "labels", guidance={"classifier": str(folder / "classifier"), "scale": 2.0})
  plan = guiding.plan(config)
  guided = guiding.guided(config, plan, factory.make_source(config, "train"), {"params": {"means": jnp.asarray(MEANS)}})
  x, t, cond = jnp.ones((2, *SHAPE)), jnp.full(2, 0.5), {"label": jnp.arange(2)}
  value = lambda params: guided.score(params)(x, t, **cond)
  doubled = jax.tree.map(lambda leaf: 2 * leaf, guided.params)
  for name in ("model", "other"):
    changed = guided.params | {name: doubled[name]}
    assert jnp.abs(jax.jit(value)(changed) - jax.jit(value)(guided.params)).max() > 0.01


def arguments_of(workdir, **sections):
  return factory.read(workdir / "config.json") | sections


@pytest.mark.slow
def test_a_trained_model_is_led_to_its_classes(tmp_path, capsys):
  """Two moons by a small network, from the command line alone: more guidance, more of the class."""
  config = {
    "seed": 0,
    "data": {"type": "toy2d", "name": "moons", "size": 2000},
    "sde": {"type": "VP"},
    "prediction": {"type": "edm", "sigma_data": 1.0},
    "loss": {"type": "denoising"},
    "network": {"type": "MLP", "width": 64, "depth": 2, "conditions": {"label": {"type": "label", "classes": 2}}},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 10},
    "train": {"batch_size": 256, "steps": 600, "drop_conditions": 0.2, "ema_decay": 0.98, "sample_every": 600},
    "sampler": {"type": "dpm_solver_pp", "grid": {"steps": 20}},
    "sample": {"num": 256, "batch_size": 256, "label": 1},
    "likelihood": {"rtol": 0.1, "atol": 0.1},
  }
  file, workdir = tmp_path / "moons.py", tmp_path / "run"
  file.write_text(f"def get_config():\n  return {config!r}\n")
  cli.main(["train", f"--config={file}", f"--workdir={workdir}"])
  source = factory.make_source(config, "test")
  batch = source.gather(np.arange(len(source)))
  means = np.stack([batch["x"][batch["label"] == label].mean(axis=0) for label in (0, 1)])
  along = lambda x: float(
    ((x - means.mean(axis=0)) @ (means[1] - means[0])).mean() / np.sum((means[1] - means[0]) ** 2)
  )
  draw = lambda *flags: sample(workdir, *flags)
  plain, strong = draw("--guidance=1"), draw("--guidance=3")
  assert along(plain["x"]) == pytest.approx(0.5, abs=0.1)
  assert along(strong["x"]) > along(plain["x"]) + 0.1
  assert along(draw("--label=0")["x"]) == pytest.approx(-0.5, abs=0.1)
  assert set(plain["nfe"]) == {20}
  assert set(strong["nfe"]) == {40}
  assert (workdir / "samples" / "00000600.png").exists()
