"""The command line end to end, on small data; commands run in this process, on its eight devices, unless killed."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff import arguments, cli, factory, rundir, systems
from jaxdiff.commands import training as commands
from jaxdiff.evaluation import classifier, runs
from jaxdiff.training import cost, load_params
from jaxdiff.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.standard_promotion
ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
  "--config.network.width=16",
  "--config.network.depth=1",
  "--config.data.size=400",
  "--config.train.batch_size=64",
  "--config.train.steps=40",
  "--config.train.log_every=10",
  "--config.train.checkpoint_every=10",
  "--config.sample.num=24",
  "--config.sample.batch_size=16",
  "--config.sampler.rtol=0.1",
  "--config.sampler.atol=0.1",
  "--config.likelihood.rtol=0.1",
  "--config.likelihood.atol=0.1",
  "--config.likelihood.limit=20",
  "--config.likelihood.batch_size=16",
  "--config.optimizer.warmup_steps=5",
  "--config.evaluate.num=40",
  "--config.evaluate.batch_size=16",
]
TOY = [f"--config={ROOT / 'configs' / 'toy2d.py'}", *SMALL]


def run(command, workdir, *arguments):
  cli.main([command, f"--workdir={workdir}", *arguments])


def fails(code, capsys, command, workdir, *arguments):
  with pytest.raises(SystemExit) as exit:
    run(command, workdir, *arguments)
  assert exit.value.code == code
  return capsys.readouterr().err


def params_of(workdir):
  config = factory.read(pathlib.Path(workdir) / "config.json")
  source = factory.make_source(config, "train")
  shapes = jax.eval_shape(lambda: factory.init_params(config, source))
  return [load_params(pathlib.Path(workdir) / "checkpoints", shapes, ema=ema) for ema in (False, True)]


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(params_of(a)), jax.tree.leaves(params_of(b)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "toy"
  run("train", workdir, *TOY)
  return workdir


def test_train_writes_a_run(trained):
  assert {"config.json", "checkpoints", "metrics.jsonl", "loss.png", "tensorboard"} <= {
    p.name for p in trained.iterdir()
  }
  records = read_metrics(trained / "metrics.jsonl")
  assert [record["step"] for record in records] == [10, 20, 30, 40]
  assert factory.read(trained / "config.json")["train"]["steps"] == 40
  assert params_of(trained)[0][1] == 40


def test_training_again_adds_nothing(trained, capsys):
  before = [p[0] for p in params_of(trained)]
  run("train", trained)
  assert "this run is finished: 40 of 40 steps are done" in capsys.readouterr().err
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves([p[0] for p in params_of(trained)]), strict=True):
    np.testing.assert_array_equal(x, y)


def test_sample_finds_the_run_s_own_config(trained, capsys):
  run("sample", trained)
  out, err = capsys.readouterr()
  assert str(trained / "samples.png") in out
  assert re.fullmatch(r"sampling from step 40 by probability_flow\n\d+ network evaluations a sample\n", err), err
  drawn = np.load(trained / "samples.npz", allow_pickle=False)
  assert drawn["x"].shape == (24, 2)
  assert drawn["nfe"].min() > 0
  for name in ("samples.png", "denoising.png"):
    assert np.asarray(Image.open(trained / name)).std() > 5


def test_short_flags_choose_the_sampler_its_steps_and_an_animation(trained, capsys):
  run("sample", trained, "--sampler=unipc", "--steps=6", "--num=16", "--gif", "--config.sample.threshold=static")
  out, err = capsys.readouterr()
  assert "by unipc\n6 network evaluations a sample" in err
  assert str(trained / "denoising.gif") in out
  drawn = np.load(trained / "samples.npz", allow_pickle=False)
  assert drawn["x"].shape == (16, 2)
  assert set(drawn["nfe"]) == {6}
  with Image.open(trained / "denoising.gif") as animation:
    assert animation.n_frames == 7
    first = np.asarray(animation.convert("L"))
    animation.seek(6)
    assert np.abs(first - np.asarray(animation.convert("L")).astype(float)).max() > 50


def test_likelihood_reports_mean_error_and_settings(trained, capsys):
  run("likelihood", trained)
  report = json.loads((trained / "likelihood.json").read_text())
  values = np.load(trained / "likelihood.npz", allow_pickle=False)["value"]
  assert values.shape == (20,)
  result = report["results"]["model"]
  assert result["mean"] == pytest.approx(values.mean(), rel=1e-6)
  assert result["standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(20), rel=1e-5)
  assert report["nfe"]["min"] <= report["nfe"]["mean"] <= report["nfe"]["max"]
  assert (report["examples"], report["failed"], report["checkpoint_step"]) == (20, 0, 40)
  assert report["settings"]["rtol"] == 0.1
  assert report["model"]["sde"] == {"type": "VP", "beta_min": 0.1, "beta_max": 20.0}
  assert set(report["model"]) == {"sde", "prediction", "network"}
  out = capsys.readouterr().out
  assert "toy2d/moons, test: 20 examples, log-density, nats" in out
  assert f"{result['mean']:8.4f}" in out


def evaluation(workdir):
  return json.loads((workdir / "evaluation.json").read_text())


def test_evaluate_measures_samples_and_goes_on_where_it_stopped(trained, tmp_path, capsys, monkeypatch):
  """Stopped after two of three batches, and run again, it reports what a run without a stop does."""
  shutil.copytree(trained, tmp_path / "run")
  run("evaluate", trained)
  report, out = evaluation(trained), capsys.readouterr().out
  assert [(c["of"], c["examples"]) for c in report["columns"]] == [("samples", 40), ("held-out", 40)]
  assert (report["training_examples"], report["checkpoint_step"], report["seed"]) == (400, 40, 0)
  assert report["features"] == {"name": "raw", "count": 2}
  samples, floor = (column["results"] for column in report["columns"])
  assert samples.keys() == floor.keys() > {"FD-raw", "KD-raw", "precision", "recall", "density", "coverage"}
  # after 40 steps the model knows little: held-out data are nearer to the training data
  assert samples["FD-raw"]["value"] > 2 * floor["FD-raw"]["value"]
  assert samples["precision"]["value"] < floor["precision"]["value"]
  assert "toy2d/moons, against 400 training examples, 2 features, seed 0" in out
  assert f"{samples['FD-raw']['value']:.4f}" in out
  assert str(trained / "evaluation.json") in out
  drawer, starts = runs.drawer, []

  def stopping(*args):
    draw = drawer(*args)

    def one(start):
      if start == 32 and len(starts) == 2:
        raise KeyboardInterrupt
      starts.append(start)
      return draw(start)

    return one

  monkeypatch.setattr(runs, "drawer", stopping)
  assert "interrupted" in fails(130, capsys, "evaluate", tmp_path / "run")
  starts.append("again")
  run("evaluate", tmp_path / "run")
  assert starts == [0, 16, "again", 32]
  assert evaluation(tmp_path / "run") == report
  run("evaluate", tmp_path / "run", "--config.evaluate.num=20", "--config.evaluate.seed=1")
  assert starts[4:] == [0, 16]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["digits", "vdm_digits"])
def test_images_from_raw_digits_to_bits(config, tmp_path, capsys, monkeypatch):
  """A digits config with a tiny network and few steps: PNG grids, and the table with its baselines."""
  arguments = [
    f"--config={ROOT / 'configs' / config}.py",
    "--config.network.channels=8",
    "--config.network.channel_multipliers=(1,)",
    "--config.train.steps=3",
    "--config.train.batch_size=32",
    "--config.optimizer.warmup_steps=1",
    "--config.sampler.grid.steps=4",
    "--config.sample.num=9",
    "--config.sample.batch_size=16",
    "--config.likelihood.rtol=0.1",
    "--config.likelihood.atol=0.1",
    "--config.likelihood.batch_size=24",
    "--config.likelihood.bound_draws=4",
    "--config.data.held_out=24",
    "--config.evaluate.num=32",
    "--config.evaluate.batch_size=16",
  ]
  monkeypatch.setattr(classifier, "_STEPS", 5)
  run("train", tmp_path, *arguments)
  run("sample", tmp_path)
  run("likelihood", tmp_path)
  if config == "digits":
    with pytest.warns(UserWarning, match="24 examples for 64 features"):
      run("evaluate", tmp_path)
    assert [c["of"] for c in evaluation(tmp_path)["columns"]] == ["samples", "held-out", "samples"]
    assert evaluation(tmp_path)["features"] == {"name": "cnn", "count": 64}
    width, height = Image.open(tmp_path / "neighbours.png").size
    assert width / height == pytest.approx(8 / 10, rel=0.02)
  assert Image.open(tmp_path / "samples.png").size == Image.open(tmp_path / "samples.png").size[::-1]
  results = json.loads((tmp_path / "likelihood.json").read_text())["results"]
  models = ["model", "model, variational bound"]
  assert list(results) == ["uniform", "per-pixel histogram", "full-covariance Gaussian", *models]
  assert all(np.isfinite(results[name]["mean"]) for name in models)
  assert results["uniform"]["mean"] == pytest.approx(np.log2(17))
  out = capsys.readouterr().out
  for name in (
    "checkpoints",
    "samples.png",
    "denoising.png",
    "loss.png",
    "likelihood.json",
    "config.json",
    *(["evaluation.json"] if config == "digits" else []),
  ):
    assert str(tmp_path / name) in out


def test_another_config_s_workdir_is_refused(trained, capsys):
  error = fails(2, capsys, "train", trained, *TOY, "--config.optimizer.learning_rate=0.5", "--config.seed=3")
  assert "holds another run: config.optimizer.learning_rate was 0.002, is 0.5; config.seed was 0, is 3" in error
  assert factory.read(trained / "config.json")["seed"] == 0


def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path, capsys):
  shutil.copytree(trained, tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "40" / "state"
  for file in newest.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.warns(UserWarning, match=r"checkpoint 40 in .* cannot be read .*using checkpoint 30"):
    run("train", tmp_path / "run")
  assert "continuing from step 30" in capsys.readouterr().err
  assert_same(trained, tmp_path / "run")


def test_damaged_checkpoints_are_named_without_tracebacks(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  for file in (tmp_path / "run" / "checkpoints").rglob("manifest.ocdbt"):
    file.write_bytes(file.read_bytes()[:20])
  command = [sys.executable, "-m", "jaxdiff.cli", "sample", f"--workdir={tmp_path / 'run'}"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 1
  assert result.stderr.startswith("jaxdiff: none of the checkpoints in")
  assert "Traceback" not in result.stderr


def test_non_finite_loss_stops_with_the_steps_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
  arguments = [*TOY, "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=12"]
  error = fails(1, capsys, "train", tmp_path / "run", *arguments)
  assert "steps in a row that were not finite and were skipped (max_skipped=10)" in error
  assert "Lower the learning rate" in error


def test_flops_do_not_count_what_rematerialization_repeats(tmp_path, monkeypatch):
  """The share of the peak is that of the model's FLOPs, whatever the memory allows."""

  class CountedError(Exception):
    pass

  def counted(*arguments):
    flops.append(step_flops(*arguments))
    raise CountedError

  flops, step_flops = [], cost.step_flops
  monkeypatch.setattr(cost, "step_flops", counted)
  config = arguments.load(ROOT / "configs" / "digits.py")
  network = {"channels": 8, "channel_multipliers": (1,), "blocks": 1, "attention_levels": (), "groups": 4}
  for remat in ("none", "full"):
    changed = config | {"network": {**config["network"], **network, "remat": remat}}
    with pytest.raises(CountedError):
      commands.train(changed, tmp_path / remat)
  assert flops[0] == flops[1] > 0


@pytest.mark.slow
def test_training_validates_draws_traces_and_keeps_averages(trained, tmp_path, capsys):
  """Hooks, gradient accumulation and several steps a dispatch change no run; averages of any length follow."""
  every = [f"--config.train.{name}_every=20" for name in ("validate", "sample", "snapshot", "keep")]
  spread = ["--config.train.microbatches=2", "--config.train.steps_per_dispatch=2", "--config.train.keep=1"]
  lengths = ["--config.train.ema_lengths=(0.05,0.1)", "--config.train.validate_examples=40"]
  workdir = tmp_path / "run"
  run("train", workdir, *TOY, *every, *spread, *lengths, "--profile=4:6")
  for x, y in zip(jax.tree.leaves(params_of(trained)), jax.tree.leaves(params_of(workdir)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  records = read_metrics(workdir / "metrics.jsonl")
  checks = [record for record in records if "validation_bound" in record]
  assert [record["step"] for record in checks] == [20, 40]
  assert checks[0]["validation_loss"] == pytest.approx(2 * checks[0]["validation_loss_per_dim"])
  assert all(record["teraflops_per_second"] > 0 for record in records if "loss" in record)
  assert sorted(p.name for p in (workdir / "samples").iterdir()) == ["00000020.png", "00000040.png"]
  assert np.asarray(Image.open(workdir / "samples" / "00000040.png")).std() > 5
  assert list((workdir / "profile").rglob("*.xplane.pb"))
  assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == [20, 40]
  capsys.readouterr()
  run("sample", workdir, "--config.sample.ema_length=0.1", "--num=16")
  assert "average of length 0.1, reconstructed to 0.00%" in capsys.readouterr().err
  assert "holds no snapshot" in fails(2, capsys, "sample", trained, "--config.sample.ema_length=0.1")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([*TOY, "--config.train.batch_size=60"], "config.train.batch_size = 60 cannot be split over 8 devices; take 64"),
    ([*TOY, "--config.train.batch_size=800"], "config.train.batch_size = 800 exceeds the 400 training examples"),
    ([*TOY, "--config.sde.type=VPP"], "config.sde.type is 'VPP'; did you mean 'VP'?"),
    ([*TOY, "--config.sde.beta_mix=1"], "config.sde.beta_mix does not exist; did you mean 'beta_min'?"),
    ([*TOY, "--config.sde.type=VE", "--config.sde.beta_min=1"], "config.sde.beta_min does not exist"),
    ([*TOY, "--config.sde=VE"], "config.sde is a section: set its fields"),
    ([*TOY, "--config.sde.beta_min.x=1"], "config.sde.beta_min is a value and has no fields"),
    ([*TOY, "--config.type=VE"], "config.type does not exist"),
    ([*TOY, "--config.seed.x=1"], "config.seed is a value and has no fields"),
    ([*TOY, "--config.seed="], "--config.seed needs a value"),
    ([*TOY, "--config.modle.x=1"], "config.modle does not exist; "),
    ([*TOY, "--config.loss.wieght.type=edm"], "did you mean 'weight'? valid: t0, time, weight"),
    (
      [*TOY, "--config.train.steps=5"],
      "must exceed config.optimizer.warmup_steps",
    ),
    ([*TOY, "--config.likelihood.split=tset"], "did you mean 'test'"),
    ([*TOY, "--config.train.random_flip", "--config.seed=1"], "--config.train.random_flip needs a value"),
    ([*TOY, "--config.data.name=moon"], "did you mean 'moons'?"),
    ([*TOY, "--config.train.steps=many"], "config.train.steps must be an integer, got 'many'"),
    ([*TOY, "steps=3"], "unexpected argument 'steps=3'"),
    ([*TOY, "--launcher=pamp"], "config.train.launcher must be 'jit' or 'pmap', got 'pamp'"),
    ([*TOY, "--launcher=pmap", "--fsdp=2"], "config.train.fsdp = 2 needs config.train.launcher = 'jit'"),
    ([*TOY, "--fsdp=3"], "config.train.fsdp: fsdp=3: 8 devices cannot be laid out as data x 3"),
    ([*TOY, "--config.network.width=15", "--fsdp=8"], "config.train.fsdp: fsdp=8: divides no dimension"),
    ([*TOY, "--config.train.microbatches=3"], "cannot be split over 8 devices in 3 microbatches each; take 72"),
    (
      [*TOY, "--config.train.steps_per_dispatch=3"],
      "config.train.steps_per_dispatch = 3 must divide config.train.steps",
    ),
    ([*TOY, "--config.train.wandb=mine"], "needs the package wandb"),
    ([*TOY, "--profile=8:5"], "--profile must be START:STOP"),
    ([*TOY, "--process=1"], "--processes and --process need --coordinator=HOST:PORT"),
    ([*TOY, "--coordinator=here"], "--coordinator must be HOST:PORT"),
    ([*TOY, "--coordinator=a:1", "--distributed"], "--distributed is for processes that JAX finds by itself"),
    ([*TOY, "--gif"], "unexpected argument '--gif'"),
    ([*TOY, "--config.train.ema_lengths=(0.5,)"], "config.train.ema_lengths: length=0.5"),
    ([*TOY, "--config.sample.ema_length=0.5"], "config.sample.ema_length: length=0.5"),
    ([*TOY, "--processes=two", "--coordinator=a:1"], "--processes must be a whole number, got 'two'"),
    (["--config=nowhere.py"], "--config=nowhere.py is not a file"),
    ([], "config.json does not exist: train first, or give --config=FILE"),
  ],
)
def test_mistakes_end_at_once_with_a_message(arguments, message, tmp_path, capsys):
  assert message in fails(2, capsys, "train", tmp_path / "run", *arguments)
  assert not (tmp_path / "run").exists()


def test_sampling_and_evaluation_mistakes(trained, tmp_path, capsys):
  assert "config.sample.batch_size = 12 cannot be split over 8 devices" in fails(
    2, capsys, "sample", trained, "--config.sample.batch_size=12"
  )
  for flags, message in {
    ("--steps=5",): "--steps: probability_flow chooses its steps by itself; set its tolerances, --config.sampler.rtol",
    ("--sampler=unipcc",): "config.sampler.type is 'unipcc'; did you mean 'unipc'?",
    ("--sampler=ddim", "--steps=5", "--config.sampler.eta=2"): "config.sampler: eta must lie in [0, 1]",
    ("--sampler=unipc", "--steps=1"): "config.sampler: order must be at most the number of steps",
    ("--sampler=annealed_langevin",): "annealed_langevin walks down the levels of a chain: it needs",
    ("--sampler=ancestral", "--steps=5", "--config.sampler.variance=learned"): "config.network.parts = 2, trained by",
    ("--num=x",): "config.sample.num must be an integer, got 'x'",
  }.items():
    assert message in fails(2, capsys, "sample", trained, *flags)
  assert "did you mean 'test'" in fails(2, capsys, "likelihood", trained, "--config.likelihood.split=tests")
  for argument, message in {
    "batch_size=12": "config.evaluate.batch_size = 12 cannot be split over 8 devices",
    "features=cnn": "config.evaluate: features 'cnn' are those of a classifier and need images",
    "features=fid": "must be 'auto' or 'cnn' or 'raw' or 'mobilenet' or 'inception', got 'fid'",
    "reference=5": "need 6 examples a side; there are 5 to train and 40 held out",
  }.items():
    assert message in fails(2, capsys, "evaluate", trained, f"--config.evaluate.{argument}")
  assert "holds no checkpoint: train first" in fails(2, capsys, "sample", tmp_path / "none", *TOY)
  with pytest.raises(SystemExit):
    cli.main(["trian", "--workdir=x"])
  assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(["train"])
  assert "--workdir=DIR is needed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "likelihood"])
@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("sde.beta_max=10", "config.sde.beta_max was 20.0, is 10"),
    ("sde.type=SubVP", "config.sde.type was 'VP', is 'SubVP'"),
    ("prediction.type=noise", "config.prediction.type was 'edm', is 'noise'"),
    ("network.width=17", "config.network.width was 16, is 17"),
    ("data.name=circles", "config.data.name was 'moons', is 'circles'"),
  ],
)
def test_another_model_or_other_data_are_refused(trained, command, argument, message, capsys):
  error = fails(2, capsys, command, trained, f"--config.{argument}")
  assert "was trained otherwise: " in error
  assert message in error
  assert "Leave these settings as they were" in error


def test_settings_of_the_training_have_no_effect_on_samples_and_that_is_said(trained, capsys):
  run("sample", trained, "--config.seed=7", "--config.sample.num=8", "--config.sample.batch_size=8")
  assert "the run is trained, so without effect: config.seed was 0, is 7" in capsys.readouterr().err
  assert np.load(trained / "samples.npz")["x"].shape == (8, 2)


def npz_config(folder, x, levels=None):
  """A config file for the arrays, beside them, and the flags that go with it."""
  np.savez(folder / "x.npz", x=x)
  (folder / "config.py").write_text(
    f"import runpy\nfrom ml_collections import ConfigDict\n\n"
    f"def get_config():\n  config = runpy.run_path({str(ROOT / 'configs' / 'toy2d.py')!r})['get_config']()\n"
    f"  config.data = ConfigDict({{'type': 'npz', 'path': 'x.npz', 'levels': {levels}}})\n"
    "  return config\n"
  )
  return ["--config=config.py", *(a for a in SMALL if "data.size" not in a)]


def test_data_are_found_from_elsewhere_and_must_be_those_of_the_training(tmp_path, monkeypatch, capsys):
  x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
  monkeypatch.chdir(tmp_path)
  run("train", "run", *npz_config(tmp_path, x), "--config.train.steps=6")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  run("likelihood", "../run")
  report = json.loads((tmp_path / "run" / "likelihood.json").read_text())
  assert report["data"]["name"] == "npz/x.npz"
  (tmp_path / "x.npz").rename(tmp_path / "elsewhere" / "x.npz")
  assert "x.npz is not a file" in fails(2, capsys, "likelihood", "../run")
  run("likelihood", "../run", "--config.data.path=x.npz")
  np.savez(tmp_path / "elsewhere" / "x.npz", x=x + 1)
  for command in ("sample", "likelihood"):
    error = fails(2, capsys, command, "../run", "--config.data.path=x.npz")
    assert "was trained otherwise: data.content was" in error
  assert "data.content was" in fails(2, capsys, "train", "../run", "--config.data.path=x.npz")
  assert factory.read(tmp_path / "run" / "config.json")["data"]["path"] == str(tmp_path / "x.npz")


@pytest.mark.parametrize(
  ("x", "levels", "message"),
  [
    (np.full((40, 4), np.nan, np.float32), None, "NaN"),
    (np.full((40, 2, 2, 1), 9, np.uint8), 4, "9"),
    (np.ones((40, 2, 2, 1), np.float32), 4, "integer"),
  ],
)
def test_bad_data_are_named_before_any_training(x, levels, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  arguments = npz_config(tmp_path, x, levels)
  assert message in fails(2, capsys, "train", tmp_path / "run", *arguments)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", "config.py cannot be run: SyntaxError"),
    ("import missing_module\n", "ModuleNotFoundError: No module named 'missing_module' (line 1)"),
    ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError: division by zero (line 2)"),
    ("config = {}\n", "config.py has no function get_config()"),
    (
      "from ml_collections import ConfigDict, config_dict\n"
      "def get_config():\n  return ConfigDict({'seed': config_dict.required_placeholder(int)})\n",
      "cannot be run: RequiredValueError",
    ),
    ("def get_config():\n  pass\n", "get_config() must return a ConfigDict, got None"),
    ("def get_config():\n  return {'sde': print}\n", "config.sde holds <built-in function print>"),
    ("def get_config():\n  return {'sde': {}}\n", "config needs seed, data"),
  ],
)
def test_mistakes_in_a_config_file_take_one_line(text, message, tmp_path, capsys):
  (tmp_path / "config.py").write_text(text)
  error = fails(2, capsys, "train", tmp_path / "run", f"--config={tmp_path / 'config.py'}")
  assert message in error
  assert len(error.splitlines()) == 1


def test_fields_of_the_schema_and_other_types_by_flag(capsys):
  flags = ["optimizer.weight_decay=0.1", "optimizer.clip_norm=none", "sampler.type=reverse_sde", "sampler.grid.steps=9"]
  flags += ["sde.type=VE", "sde.sigma_max=20", "network.dtype=bfloat16", "loss.weight.type=min_snr"]
  config, _ = arguments.parse("train", [TOY[0], "--workdir", "x", *(f"--config.{flag}" for flag in flags)])
  systems.check(config)
  assert config["optimizer"]["weight_decay"] == 0.1
  assert config["optimizer"]["clip_norm"] is None
  assert config["sampler"] == {"type": "reverse_sde", "grid": {"steps": 9}}
  assert config["sde"] == {"type": "VE", "sigma_max": 20}
  assert config["network"]["dtype"] == "bfloat16"
  notes = capsys.readouterr().err
  assert "config.sde.type=VE drops beta_max, beta_min of VP" in notes
  assert "config.sampler.type=reverse_sde drops atol, rtol of probability_flow" in notes


def test_workdirs_that_hold_no_run(trained, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert f"--workdir={tmp_path / 'file'} is a file" in fails(2, capsys, "train", tmp_path / "file", *TOY)
  shutil.copytree(trained, tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text('{"seed": ')
  assert "config.json cannot be read as the config of a run" in fails(2, capsys, "sample", tmp_path / "run")


def test_one_trainer_at_a_time(trained, capsys):
  with rundir.claimed(trained, factory.read(trained / "config.json")):
    assert f"is being trained in by process {os.getpid()}" in fails(2, capsys, "train", trained)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(
  trained, tmp_path, capsys, monkeypatch, number, code
):
  write = MetricsWriter.write

  def write_and_signal(self, step, values):
    write(self, step, values)
    if step == 20:
      os.kill(os.getpid(), number)

  usual = signal.getsignal(number)
  arguments = [*TOY, "--config.train.checkpoint_every=40"]
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "write", write_and_signal)
    error = fails(code, capsys, "train", tmp_path / "run", *arguments)
  assert "stopped at step 21, which is saved; the same command continues" in error
  assert signal.getsignal(number) is usual
  run("train", tmp_path / "run", *arguments)
  assert "continuing from step 21" in capsys.readouterr().err
  assert_same(trained, tmp_path / "run")


def test_help_waits_for_no_network_or_checkpoint_library():
  code = "import sys; from jaxdiff import cli; cli.main(['train', '--help']); print('flax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert out.startswith("usage: jaxdiff")
  assert out.endswith("False\n")


def test_missing_packages_of_the_command_line_are_named():
  code = "import sys; sys.modules['optax'] = None; from jaxdiff import cli; cli.main(['train', '--workdir=x'])"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 2
  assert result.stderr == "jaxdiff: the module 'optax' is missing; the command line needs pip install '.[train]'\n"


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["sample", "-h"], []])
def test_help_lists_the_commands(argv, capsys):
  cli.main(argv)
  out = capsys.readouterr().out
  for command in cli.COMMANDS:
    assert command in out
