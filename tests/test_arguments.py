"""From a command line to a checked config: what is read, and what is refused before any work; no command runs."""

import pathlib

import numpy as np
import pytest

from jaxdiff import arguments, factory, systems
from jaxdiff.commands import console
from jaxdiff.schema import ConfigError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TOY = f"--config={CONFIGS / 'toy2d.py'}"
RUN = ["--config.optimizer.warmup_steps=5", "--config.train.steps=40", "--config.train.log_every=10"]


def parsed(command, *argv):
  """The config of a command line, checked as the command line does it."""
  _, rest = arguments.launch(command, list(argv))
  config, _ = arguments.parse(command, rest)
  config = systems.resolve(config)
  systems.check(config)
  return config


def refused(command, *argv):
  with pytest.raises(ConfigError) as error:
    parsed(command, *argv)
  return str(error.value)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--config.sde.type=VPP", "config.sde.type is 'VPP'; did you mean 'VP'?"),
    ("--config.sde.beta_mix=1", "config.sde.beta_mix does not exist; did you mean 'beta_min'?"),
    ("--config.sde.type=VE --config.sde.beta_min=1", "config.sde.beta_min does not exist"),
    ("--config.sde=VE", "config.sde is a section: set its fields"),
    ("--config.sde.beta_min.x=1", "config.sde.beta_min is a value and has no fields"),
    ("--config.type=VE", "config.type does not exist"),
    ("--config.seed.x=1", "config.seed is a value and has no fields"),
    ("--config.seed=", "--config.seed needs a value"),
    ("--config.modle.x=1", "config.modle does not exist; "),
    ("--config.loss.wieght.type=edm", "did you mean 'weight'? valid: t0, time, weight"),
    ("--config.train.steps=5", "must exceed config.optimizer.warmup_steps"),
    ("--config.likelihood.split=tset", "did you mean 'test'"),
    ("--config.train.random_flip --config.seed=1", "--config.train.random_flip needs a value"),
    ("--config.train.steps=many", "config.train.steps must be an integer, got 'many'"),
    ("steps=3", "unexpected argument 'steps=3'"),
    ("--launcher=pamp", "config.train.launcher must be 'jit' or 'pmap', got 'pamp'"),
    ("--config.train.steps_per_dispatch=3", "config.train.steps_per_dispatch = 3 must divide config.train.steps"),
    ("--config.train.wandb=mine", "needs the package wandb"),
    ("--profile=8:5", "--profile must be START:STOP"),
    ("--process=1", "--processes and --process need --coordinator=HOST:PORT"),
    ("--coordinator=here", "--coordinator must be HOST:PORT"),
    ("--coordinator=a:1 --distributed", "--distributed is for processes that JAX finds by itself"),
    ("--processes=two --coordinator=a:1", "--processes must be a whole number, got 'two'"),
    ("--gif", "unexpected argument '--gif'"),
    ("--config.train.ema_lengths=(0.5,)", "config.train.ema_lengths: length=0.5"),
    ("--config.sample.ema_length=0.5", "config.sample.ema_length: length=0.5"),
    ("--config=nowhere.py", "--config=nowhere.py is not a file"),
  ],
)
def test_mistakes_of_a_training(flags, message, tmp_path):
  assert message in refused("train", f"--workdir={tmp_path / 'run'}", TOY, *RUN, *flags.split())
  assert not (tmp_path / "run").exists()


def test_a_command_needs_the_directory_of_a_run(tmp_path):
  assert refused("train", TOY).startswith("--workdir=DIR is needed")
  missing = f"{tmp_path / 'run' / 'config.json'} does not exist: train first, or give --config=FILE"
  assert refused("sample", f"--workdir={tmp_path / 'run'}") == missing
  (tmp_path / "file").write_text("")
  assert refused("train", f"--workdir={tmp_path / 'file'}", TOY).startswith(f"--workdir={tmp_path / 'file'} is a file")
  (tmp_path / "config.json").write_text('{"seed": ')
  assert "config.json cannot be read as the config of a run" in refused("sample", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
  ("command", "flags", "message"),
  [
    ("sample", "--steps=5", "--steps: probability_flow chooses its steps by itself; set its tolerances, --config.sam"),
    ("sample", "--sampler=unipcc", "config.sampler.type is 'unipcc'; did you mean 'unipc'?"),
    ("sample", "--sampler=ddim --steps=5 --config.sampler.eta=2", "config.sampler: eta must lie in [0, 1]"),
    ("sample", "--sampler=unipc --steps=1", "config.sampler: order must be at most the number of steps"),
    ("sample", "--sampler=annealed_langevin", "annealed_langevin walks down the levels of a chain: it needs"),
    ("sample", "--sampler=ancestral --steps=5 --config.sampler.variance=learned", "network.parts = 2, trained by"),
    ("sample", "--num=x", "config.sample.num must be an integer, got 'x'"),
    ("likelihood", "--config.likelihood.split=tests", "did you mean 'test'"),
    ("evaluate", "--config.evaluate.features=fid", "'auto' or 'cnn' or 'raw' or 'mobilenet' or 'inception', got 'fid'"),
    ("likelihood", "--split=tset", "config.likelihood: split: got 'tset'; choose from 'train', 'test' (did you mean"),
    ("likelihood", "--limit=-1", "config.likelihood.limit must be at least 1, or 0 for all; got -1"),
    ("likelihood", "--draws=0", "config.likelihood.draws must be at least 1, got 0"),
    ("likelihood", "--solver=rk45", "config.likelihood.solver must be"),
    ("likelihood", "--rtol=0", "config.likelihood: rtol must be positive"),
    ("likelihood", "--dtype=float16", "config.likelihood.dtype must be 'float32' or 'float64', got 'float16'"),
    ("likelihood", "--probes=many", "--probes must be a whole number, or exact; got 'many'"),
    ("likelihood", "--probes=0", "config.likelihood.divergence: probes must be at least 1"),
    ("likelihood", "--dequantization=normal", "config.likelihood.dequantization must be 'auto' or 'uniform'"),
    ("likelihood", "--importance --probes=4", "config.likelihood.importance needs the exact trace, got hutchinson"),
    ("likelihood", "--solvr=dopri8", "unexpected argument '--solvr=dopri8'"),
    ("likelihood", "--solvr=dopri8", "did you mean '--solver'?"),
    ("likelihood", "--num=8", "unexpected argument '--num=8'"),
    ("likelihood", "--config.likelihood.adjoint=direct", "config.likelihood.adjoint does not exist"),
    ("likelihood", "--other.type=npz", "config.other needs a value for path"),
    ("likelihood", "--other.typ=npz", "config.other needs a type: "),
  ],
)
def test_mistakes_of_the_other_commands(command, flags, message, tmp_path):
  assert message in refused(command, f"--workdir={tmp_path}", TOY, *flags.split())


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
def test_mistakes_in_a_config_file_take_one_line(text, message, tmp_path):
  (tmp_path / "config.py").write_text(text)
  error = refused("train", f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'config.py'}")
  assert message in error
  assert len(error.splitlines()) == 1


def test_fields_of_the_schema_and_other_types_by_flag(capsys):
  """A section of another type keeps no field that only the former one has, and that is said."""
  flags = ["optimizer.weight_decay=0.1", "optimizer.clip_norm=none", "sampler.type=reverse_sde", "sampler.grid.steps=9"]
  flags += ["sde.type=VE", "sde.sigma_max=20", "network.dtype=bfloat16", "loss.weight.type=min_snr"]
  config = parsed("train", TOY, "--workdir", "x", *(f"--config.{flag}" for flag in flags))
  assert config["optimizer"]["weight_decay"] == 0.1
  assert config["optimizer"]["clip_norm"] is None
  assert config["sampler"] == {"type": "reverse_sde", "grid": {"steps": 9}}
  assert config["sde"] == {"type": "VE", "sigma_max": 20}
  assert config["network"]["dtype"] == "bfloat16"
  notes = capsys.readouterr().err
  assert "config.sde.type=VE drops beta_max, beta_min of VP" in notes
  assert "config.sampler.type=reverse_sde drops atol, rtol of probability_flow" in notes


def test_how_a_command_is_started_is_no_part_of_its_config():
  flags = ["--coordinator=a:1", "--processes=2", "--process", "1", "--timeout=9", "--profile=3:5"]
  launch, rest = arguments.launch("train", [TOY, *flags, "--fsdp=2"])
  assert launch == arguments.Launch(False, "a:1", 2, 1, 9, (3, 5))
  assert rest == [TOY, "--fsdp=2"]
  assert arguments.launch("train", ["--distributed"])[0] == arguments.Launch(distributed=True)


def test_short_flags_stand_for_fields():
  workdir = ["--workdir=x", TOY]
  flags = "--split=train --limit=7 --seed=3 --solver=dopri8 --rtol=1e-3 --atol=1e-2 --variable=log_snr --steps=shared"
  more = ["--dequantization=uniform", "--draws", "4", "--importance", "--dtype=float64", "--probes=exact"]
  config, _ = arguments.parse("likelihood", [*workdir, *flags.split(), *more])
  expected = {"split": "train", "limit": 7, "seed": 3, "solver": "dopri8", "rtol": 1e-3, "atol": 1e-2}
  expected |= {"variable": "log_snr", "steps": "shared", "dequantization": "uniform", "draws": 4, "importance": True}
  assert expected.items() <= config["likelihood"].items()
  assert config["likelihood"]["dtype"] == "float64"
  assert config["likelihood"]["divergence"] == {"type": "exact"}
  parse = lambda *flags: arguments.parse("likelihood", [*workdir, *flags])[0]["likelihood"]["divergence"]
  assert parse("--probes=16") == {"type": "hutchinson", "probes": 16}
  gaussian = "--config.likelihood.divergence.noise=gaussian"
  named = "--config.likelihood.divergence.type=hutchinson"
  assert parse(named, gaussian, "--probes=2") == {"type": "hutchinson", "probes": 2, "noise": "gaussian"}
  sampling, _ = arguments.parse("sample", [*workdir, "--sampler=ddim", "--steps=7", "--seed=5"])
  assert sampling["sampler"]["grid"]["steps"] == 7
  assert sampling["sample"]["seed"] == 5
  training, _ = arguments.parse("train", [*workdir, "--launcher=pmap", "--fsdp=4"])
  assert (training["train"]["launcher"], training["train"]["fsdp"]) == ("pmap", 4)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((60, 8), "config.train.batch_size = 60 cannot be split over 8 devices; take 64"),
    ((3, 8), "config.train.batch_size = 3 cannot be split over 8 devices; take 8"),
    ((64, 8, 3), "= 64 cannot be split over 8 devices in 3 microbatches each; take 72"),
  ],
)
def test_batches_that_the_devices_cannot_share_are_refused(sizes, message):
  with pytest.raises(ConfigError) as error:
    console.check_batch("train.batch_size", *sizes)
  assert message in str(error.value)
  console.check_batch("train.batch_size", 48, 8, 3)


def test_batches_of_an_evaluation_are_those_the_examples_fill():
  with pytest.raises(ConfigError, match="3 examples cannot be split over 8 devices: evaluate more, or use fewer"):
    console.batch_size(16, 3, 8)
  assert [console.batch_size(16, count, 8) for count in (8, 15, 100)] == [8, 8, 16]


@pytest.mark.parametrize(
  ("x", "levels", "message"),
  [
    (np.full((40, 4), np.nan, np.float32), None, "NaN"),
    (np.full((40, 2, 2, 1), 9, np.uint8), 4, "9"),
    (np.ones((40, 2, 2, 1), np.float32), 4, "integer"),
  ],
)
def test_bad_data_are_named(x, levels, message, tmp_path):
  np.savez(tmp_path / "x.npz", x=x)
  data = ["--config.data.type=npz", f"--config.data.path={tmp_path / 'x.npz'}", f"--config.data.levels={levels}"]
  with pytest.raises(ConfigError, match=f"config.data: .*{message}"):
    factory.make_source(parsed("train", f"--workdir={tmp_path}", TOY, *data), "train")
