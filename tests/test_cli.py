"""The command line end to end, on small data; commands run in this process, on one device, unless they say more."""

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
from jaxdiff.evaluation import classifier, runs
from jaxdiff.schema import ConfigError
from jaxdiff.training import load_params
from jaxdiff.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.standard_promotion
ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
  f"--config.{section}.{name}={value}"
  for section, fields in {
    "network": {"width": 16, "depth": 1},
    "data": {"size": 400},
    "train": {"batch_size": 64, "steps": 40, "log_every": 10, "checkpoint_every": 10},
    "sample": {"num": 24, "batch_size": 16},
    "sampler": {"rtol": 0.1, "atol": 0.1},
    "likelihood": {"rtol": 0.1, "atol": 0.1, "limit": 20, "batch_size": 16},
    "optimizer": {"warmup_steps": 5},
    "evaluate": {"num": 40, "batch_size": 16},
  }.items()
  for name, value in fields.items()
]
TOY = [f"--config={ROOT / 'configs' / 'toy2d.py'}", *SMALL]


def run(command, workdir, *arguments):
  cli.main([command, f"--workdir={workdir}", *arguments])


def fails(code, capsys, command, workdir, *arguments):
  with pytest.raises(SystemExit) as exit:
    run(command, workdir, *arguments)
  assert exit.value.code == code
  return capsys.readouterr().err


def loaded(command, workdir, *argv):
  """What a command begins with: (source, parameters, step) of the run."""
  config, workdir = arguments.parse(command, [f"--workdir={workdir}", *argv])
  return rundir.load(workdir, systems.resolve(config))


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
  flags = ["--sampler=ddim", "--steps=5"]
  run("evaluate", trained, *flags)
  report, out = evaluation(trained), capsys.readouterr().out
  assert [(c["of"], c["examples"]) for c in report["columns"]] == [("samples", 40), ("held-out", 40)]
  assert (report["training_examples"], report["checkpoint_step"], report["seed"]) == (400, 40, 0)
  assert report["features"] == {"name": "raw", "count": 2}
  samples, floor = (column["results"] for column in report["columns"])
  assert samples.keys() == floor.keys() > {"FD-raw", "KD-raw", "precision", "recall", "density", "coverage"}
  # after 40 steps the model knows little: held-out data are nearer to the training data
  assert samples["FD-raw"]["value"] > 1.2 * floor["FD-raw"]["value"]
  assert samples["coverage"]["value"] < floor["coverage"]["value"]
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
  assert "interrupted" in fails(130, capsys, "evaluate", tmp_path / "run", *flags)
  starts.append("again")
  run("evaluate", tmp_path / "run", *flags)
  assert starts == [0, 16, "again", 32]
  assert evaluation(tmp_path / "run") == report
  run("evaluate", tmp_path / "run", *flags, "--config.evaluate.num=20", "--config.evaluate.seed=1")
  assert starts[4:] == [0, 16]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["digits", "vdm_digits"])
def test_images_from_raw_digits_to_bits(config, tmp_path, capsys, monkeypatch):
  """A digits config with a tiny network and few steps: PNG grids, and the table with its baselines."""
  arguments = [
    f"--config={ROOT / 'configs' / config}.py",
    "--config.network.channels=8",
    "--config.network.channel_multipliers=(1,)",
    "--config.network.blocks=1",
    "--config.network.attention_levels=()",
    "--config.network.middle_attention=False",
    "--config.train.steps=3",
    "--config.train.batch_size=32",
    "--config.optimizer.warmup_steps=1",
    "--config.sampler.grid.steps=4",
    "--config.sample.num=9",
    "--config.sample.batch_size=16",
    "--config.likelihood.rtol=0.3",
    "--config.likelihood.atol=0.3",
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


def test_a_process_loads_what_it_needs_and_names_damaged_checkpoints_without_tracebacks(trained, tmp_path):
  """Help waits for no network, optimizer or checkpoint library."""
  shutil.copytree(trained, tmp_path / "run")
  for file in (tmp_path / "run" / "checkpoints").rglob("manifest.ocdbt"):
    file.write_bytes(file.read_bytes()[:20])
  code = """if True:
    import sys
    from jaxdiff import cli

    cli.main(["train", "--help"])
    print({"flax", "optax", "orbax"} & sys.modules.keys())
    cli.main()
  """
  command = [sys.executable, "-c", code, "sample", f"--workdir={tmp_path / 'run'}"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.stdout.startswith("usage: jaxdiff")
  assert result.stdout.endswith("\nset()\n")
  assert result.returncode == 1
  assert result.stderr.startswith("jaxdiff: none of the checkpoints in")
  assert "Traceback" not in result.stderr


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


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
  ("command", "flags", "message"),
  [
    ("train", "--config.train.batch_size=60", "config.train.batch_size = 60 cannot be split over 8 devices; take 64"),
    ("train", "--config.train.microbatches=3", "cannot be split over 8 devices in 3 microbatches each; take 72"),
    ("train", "--fsdp=3", "config.train.fsdp: fsdp=3: 8 devices cannot be laid out as data x 3"),
    ("train", "--config.network.width=15 --fsdp=8", "config.train.fsdp: fsdp=8: divides no dimension"),
    ("train", "--launcher=pmap --fsdp=2", "config.train.fsdp = 2 needs config.train.launcher = 'jit'"),
    ("train", "--config.train.batch_size=800", "config.train.batch_size = 800 exceeds the 400 training examples"),
    ("train", "--config.data.name=moon", "did you mean 'moons'?"),
    ("sample", "--config.sample.batch_size=12", "config.sample.batch_size = 12 cannot be split over 8 devices"),
    ("evaluate", "--config.evaluate.batch_size=12", "config.evaluate.batch_size = 12 cannot be split over 8 devices"),
    ("sample", "", "holds no checkpoint: train first"),
  ],
)
def test_mistakes_that_devices_and_data_show_end_at_once(command, flags, message, tmp_path, capsys):
  """Those that the config alone shows: see test_arguments."""
  assert message in fails(2, capsys, command, tmp_path / "run", *TOY, *flags.split())
  assert not (tmp_path / "run").exists()


def test_evaluations_that_the_data_do_not_allow_are_refused(trained, capsys):
  for argument, message in {
    "features=cnn": "config.evaluate: features 'cnn' are those of a classifier and need images",
    "reference=5": "need 6 examples a side; there are 5 to train and 40 held out",
  }.items():
    assert message in fails(2, capsys, "evaluate", trained, f"--config.evaluate.{argument}")


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
def test_another_model_or_other_data_are_refused(trained, argument, message):
  with pytest.raises(ConfigError, match=f"was trained otherwise: .*{message}.*Leave these settings as they were"):
    loaded("sample", trained, f"--config.{argument}")


@pytest.mark.parametrize("command", ["sample", "likelihood", "evaluate"])
def test_all_commands_refuse_another_model(trained, command, capsys):
  assert "config.network.width was 16, is 17" in fails(2, capsys, command, trained, "--config.network.width=17")


def test_settings_of_the_training_have_no_effect_on_samples_and_that_is_said(trained, capsys):
  loaded("sample", trained, "--config.seed=7")
  assert "the run is trained, so without effect: config.seed was 0, is 7" in capsys.readouterr().err


def npz_config(folder, x):
  """A config file for the arrays, beside them, and the flags that go with it."""
  np.savez(folder / "x.npz", x=x)
  (folder / "config.py").write_text(
    f"import runpy\nfrom ml_collections import ConfigDict\n\n"
    f"def get_config():\n  config = runpy.run_path({str(ROOT / 'configs' / 'toy2d.py')!r})['get_config']()\n"
    f"  config.data = ConfigDict({{'type': 'npz', 'path': 'x.npz', 'levels': None}})\n"
    "  return config\n"
  )
  return ["--config=config.py", *(a for a in SMALL if "data.size" not in a)]


def test_data_are_found_from_elsewhere_and_must_be_those_of_the_training(tmp_path, monkeypatch, capsys):
  x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
  monkeypatch.chdir(tmp_path)
  run("train", "run", *npz_config(tmp_path, x), "--config.train.steps=6")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  assert loaded("sample", "../run")[0].name == "npz/x.npz"
  (tmp_path / "x.npz").rename(tmp_path / "elsewhere" / "x.npz")
  assert "x.npz is not a file" in fails(2, capsys, "likelihood", "../run")
  run("sample", "../run", "--config.data.path=x.npz", "--sampler=ddim", "--steps=5")
  assert (tmp_path / "run" / "samples.npz").exists()
  np.savez(tmp_path / "elsewhere" / "x.npz", x=x + 1)
  for command in ("sample", "likelihood"):
    error = fails(2, capsys, command, "../run", "--config.data.path=x.npz")
    assert "was trained otherwise: data.content was" in error
  assert "data.content was" in fails(2, capsys, "train", "../run", "--config.data.path=x.npz")
  assert factory.read(tmp_path / "run" / "config.json")["data"]["path"] == str(tmp_path / "x.npz")


def test_one_trainer_at_a_time(trained, capsys):
  with rundir.claimed(trained, factory.read(trained / "config.json")):
    assert f"is being trained in by process {os.getpid()}" in fails(2, capsys, "train", trained)


def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(trained, tmp_path, capsys, monkeypatch):
  write = MetricsWriter.write

  def write_and_signal(self, step, values):
    write(self, step, values)
    if step == 20:
      os.kill(os.getpid(), signal.SIGTERM)

  usual = signal.getsignal(signal.SIGTERM)
  arguments = [*TOY, "--config.train.checkpoint_every=40"]
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "write", write_and_signal)
    error = fails(143, capsys, "train", tmp_path / "run", *arguments)
  assert "stopped at step 21, which is saved; the same command continues" in error
  assert signal.getsignal(signal.SIGTERM) is usual
  run("train", tmp_path / "run", *arguments)
  assert "continuing from step 21" in capsys.readouterr().err
  assert_same(trained, tmp_path / "run")
