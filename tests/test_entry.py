"""The entry point: help, exit codes, signals, and the cache of compiled programs."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from jaxdiff import cli, commands, rundir, status, training
from jaxdiff.schema import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
TOY = f"--config={ROOT / 'configs' / 'toy2d.py'}"

SMALL = ["--config.train.steps=2", "--config.optimizer.warmup_steps=1", "--config.network.width=16"]


def fails(code, capsys, *argv):
  with pytest.raises(SystemExit) as exit:
    cli.main(list(argv))
  assert exit.value.code == code
  return capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["sample", "-h"], []])
def test_help_lists_the_commands(argv, capsys):
  cli.main(argv)
  out = capsys.readouterr().out
  for command in cli.COMMANDS:
    assert command in out


def test_unknown_commands_are_refused(capsys):
  assert "unknown command 'trian'; did you mean 'train'?" in fails(2, capsys, "trian", "--workdir=x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_of_two_signals_is_noted_and_the_second_goes_where_it_went(number, capfd):
  usual = signal.getsignal(number)
  with rundir.StopSignal() as stop:
    assert not stop.agreed(1)
    os.kill(os.getpid(), number)
    assert stop.agreed(2)
    assert stop.signum == number
    assert signal.getsignal(number) is usual
  assert signal.getsignal(number) is usual
  assert "saving a checkpoint after this step; once more to end at once" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("error", "code", "message"),
  [
    (ConfigError("a mistake"), 2, "a mistake"),
    (training.FingerprintError("another run"), 2, "another run"),
    (training.CheckpointError("damaged"), 1, "damaged"),
    (training.NonFiniteError("not finite"), 1, "not finite"),
    (training.DivergedError("diverged"), 1, "diverged"),
    (status.SolveError("no solution"), 1, "no solution"),
    (rundir.Stopped(signal.SIGTERM, 3), 143, "stopped at step 3, which is saved"),
    (rundir.Stopped(signal.SIGINT, 3), 130, "stopped at step 3, which is saved"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (ModuleNotFoundError("no", name="optax"), 2, "the module 'optax' is missing; the command line needs pip install"),
  ],
)
def test_exit_codes_say_what_ended_a_command(error, code, message, tmp_path, capsys, monkeypatch):
  def ended(*arguments, **more):
    raise error

  monkeypatch.setattr(commands, "sample", ended)
  assert fails(code, capsys, "sample", f"--workdir={tmp_path}", TOY).startswith(f"jaxdiff: {message}")


@pytest.fixture
def configured(monkeypatch, tmp_path):
  """What `_keep_compiled_programs` sets, in the place of JAX's own settings; the user's cache is in tmp_path."""
  updates = {}
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(jax.config, "update", updates.__setitem__)
  return updates


def test_compiled_programs_are_kept_in_the_cache_of_the_user(configured, tmp_path, monkeypatch):
  cli._keep_compiled_programs()
  assert configured.pop("jax_compilation_cache_dir") == str(tmp_path / "jaxdiff" / "xla")
  assert configured == {"jax_persistent_cache_min_compile_time_secs": 0}
  assert (tmp_path / "jaxdiff" / "xla").is_dir()
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  cli._keep_compiled_programs()
  assert configured["jax_compilation_cache_dir"] == str(tmp_path / "home" / ".cache" / "jaxdiff" / "xla")


@pytest.mark.parametrize("folder", ["mine", ""])
def test_the_cache_that_the_user_names_or_turns_off_wins(folder, configured, tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
  cli._keep_compiled_programs()
  assert configured == {}
  assert not (tmp_path / "jaxdiff").exists()


def test_a_cache_that_cannot_be_written_is_no_error(configured, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(os, "access", lambda path, mode: False)  # of the superuser all can be written
    cli._keep_compiled_programs()
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  cli._keep_compiled_programs()
  assert configured == {}


@pytest.mark.slow
def test_a_second_process_compiles_nothing_that_the_first_has_kept(tmp_path):
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
  environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
  kept = []
  for name in ("first", "second"):
    command = [sys.executable, "-m", "jaxdiff.cli", "train", f"--workdir={tmp_path / name}", TOY, *SMALL]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    kept.append({path.name for path in (tmp_path / "jaxdiff" / "xla").iterdir() if not path.name.endswith("-atime")})
  assert len(kept[0]) > 10
  assert kept[1] == kept[0]
