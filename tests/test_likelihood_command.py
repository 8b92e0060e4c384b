"""`jaxdiff likelihood`: in this process, on tiny runs with random parameters; two processes on the loopback once."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import random_params, write_run
from PIL import Image

from jaxdiff import arguments, cli, factory, keys, objectives, options, rundir, status, systems
from jaxdiff.data.examples import from_arrays
from jaxdiff.evaluation import chunks, runs

pytestmark = pytest.mark.standard_promotion
ROOT = pathlib.Path(__file__).parents[1]
TOY = ROOT / "configs" / "toy2d.py"
FLAGS = [
  "--config.network.width=8",
  "--config.network.depth=1",
  "--config.train.batch_size=64",
  "--config.train.steps=3",
  "--config.optimizer.warmup_steps=1",
  "--config.likelihood.limit=24",
  "--config.likelihood.batch_size=8",
  "--config.likelihood.bound_draws=0",
]


def run(workdir, *arguments):
  cli.main(["likelihood", f"--workdir={workdir}", *arguments])


def fails(code, capsys, *arguments):
  with pytest.raises(SystemExit) as exit:
    cli.main(["likelihood", *arguments])
  assert exit.value.code == code
  return capsys.readouterr().err


def result(workdir, name="likelihood"):
  with np.load(workdir / f"{name}.npz", allow_pickle=False) as file:
    return json.loads((workdir / f"{name}.json").read_text()), dict(file)


def made(folder, *flags, **sections):
  """A run of the toy config with other sections, which nobody has trained."""
  config, _ = arguments.parse("train", ["--workdir=x", f"--config={TOY}", *FLAGS, *flags])
  config |= sections
  return write_run(folder, config, random_params(config))


@pytest.fixture(scope="module")
def continuous_once(tmp_path_factory):
  return made(tmp_path_factory.mktemp("continuous") / "run", "--config.data.size=200")


@pytest.fixture
def continuous(continuous_once, tmp_path):
  """Of its own, since what was evaluated is not evaluated again."""
  return pathlib.Path(shutil.copytree(continuous_once, tmp_path / "continuous"))


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
  """Points on a 5 x 5 lattice."""
  folder = tmp_path_factory.mktemp("integers")
  rng = np.random.default_rng(0)
  np.savez(folder / "x.npz", x_train=rng.binomial(4, 0.5, (200, 2)), x_test=rng.binomial(4, 0.5, (40, 2)))
  np.savez(folder / "far.npz", x_train=np.zeros((9, 2), int), x_test=rng.choice([0, 4], (16, 2)))
  return made(folder / "run", data={"type": "npz", "path": str(folder / "x.npz"), "levels": 5})


def test_a_report_of_integers_names_the_bound_and_separates_its_errors(integers, capsys):
  run(integers, "--probes=3")
  report, values = result(integers)
  assert set(values) == {"value", "standard_error", "dequantization_error", "nfe", "code", "accepted", "index"}
  assert values["index"].tolist() == list(range(24))
  assert report["bound"].startswith(
    "bits/dim, upper bound on -log2 P(x) / d, dequantization: uniform; probability flow"
  )
  assert "3 hutchinson probes (noise rademacher), tsit5, rtol 0.0001" in report["bound"]
  assert report["settings"]["dequantization"] == "uniform"
  assert 0 < report["settings"]["t0"] < 1e-3
  errors = report["errors"]
  assert errors["rms_standard_error_over_probes"] == pytest.approx(
    np.sqrt(np.mean(values["standard_error"].astype(float) ** 2))
  )
  assert errors["rms_standard_error_over_probes"] > 0
  assert errors["standard_error_over_examples"] == report["results"]["model"]["standard_error"] > 0
  assert np.asarray(Image.open(integers / "likelihood.png")).std() > 5
  assert report["bound"] in capsys.readouterr().out


DRAWS = ["--limit=8", "--dequantization=truncated_normal", "--draws=3", "--probes=exact", "--rtol=1e-5", "--atol=1e-5"]


@pytest.fixture(scope="module")
def averaged(integers):
  run(integers, *DRAWS)
  return result(integers)


def test_importance_weights_tighten_the_bound_of_the_same_draws(integers, averaged):
  """By Jensen's inequality, example by example; and the draws have an error of their own."""
  run(integers, *DRAWS, "--importance")
  weighted = result(integers)
  assert np.all(weighted[1]["value"] < averaged[1]["value"])
  assert np.all(averaged[1]["value"] < averaged[1]["dequantization_error"] * 6 + weighted[1]["value"])
  assert averaged[0]["errors"]["rms_standard_error_over_dequantization"] > 0
  assert averaged[0]["errors"]["rms_standard_error_over_probes"] == 0
  assert "truncated normal, 3 draws averaged; probability flow" in averaged[0]["bound"]
  assert "truncated normal, 3 draws importance-weighted; probability flow" in weighted[0]["bound"]
  assert "exact trace" in weighted[0]["bound"]


def test_float64_agrees_with_float32(integers, averaged):
  """On the same draws of the dequantization, within what float32 leaves at these tolerances."""
  run(integers, *DRAWS, "--dtype=float64")
  report, double = result(integers)
  assert double["value"].dtype == np.float64
  np.testing.assert_allclose(double["value"], averaged[1]["value"], atol=3e-4)  # the steps differ, each good to 1e-5
  assert np.any(double["value"] != averaged[1]["value"])
  assert "dtype" not in report["model"]["network"]
  assert "float64" in report["bound"]
  assert not jax.config.jax_enable_x64


def replace_densities(monkeypatch, evaluate):
  """For what is done with values: `evaluate(keys, x) -> {"value": [b], ...}` in the place of solves; no errors."""

  def log_likelihood(config, params, source, seen):
    rest = dict.fromkeys(("standard_error", "dequantization_error", "nfe", "accepted"), jnp.float32(0))

    def one_batch(params, key, batch):
      values = {"code": jnp.zeros(key.shape, int)} | evaluate(key, batch["x"])
      return {name: jnp.broadcast_to(value, key.shape) for name, value in (rest | values).items()}

    return one_batch

  system = systems.diffusion.SYSTEM._replace(log_likelihood=log_likelihood)
  monkeypatch.setattr(systems, "of", lambda config: system)


def quadratic(key, x):
  return {"value": -0.5 * jnp.sum(x**2, 1) + 0.1 * jax.vmap(jax.random.normal)(key)}


def test_stopped_and_started_again_it_ends_at_the_same_bits(continuous, tmp_path, capsys, monkeypatch):
  replace_densities(monkeypatch, quadratic)
  shutil.copytree(continuous, tmp_path / "run", ignore=shutil.ignore_patterns("likelihood*"))
  run(continuous)
  evaluator, starts, stops = runs.evaluator, [], [16]

  def stopping(*args):
    evaluate = evaluator(*args)

    def one(start):
      if start in stops:
        stops.remove(start)
        raise KeyboardInterrupt
      starts.append(start)
      return evaluate(start)

    return one

  monkeypatch.setattr(runs, "evaluator", stopping)
  assert "interrupted" in fails(130, capsys, f"--workdir={tmp_path / 'run'}")
  run(tmp_path / "run")
  assert starts == [0, 8, 16]
  run(tmp_path / "run", "--limit=16")
  assert starts == [0, 8, 16], "fewer examples were evaluated anew"
  assert result(tmp_path / "run")[0]["examples"] == 16
  run(tmp_path / "run")
  for whole, again in zip(result(continuous), result(tmp_path / "run"), strict=True):
    np.testing.assert_equal(again, whole)
  run(tmp_path / "run", "--seed=1", "--limit=8")
  assert starts == [0, 8, 16, 0], "another seed must not reuse a chunk"


@pytest.mark.parametrize("flags", [["--batch_size=8"], ["--batch_size=20"], ["--batch_size=100"]])
def test_every_example_has_its_value_whatever_the_batch(continuous, flags, monkeypatch):
  """The last batch is not full: none of its examples is lost, and those that fill it up are not counted."""
  replace_densities(monkeypatch, quadratic)
  config, _ = arguments.parse("likelihood", [f"--workdir={continuous}"])
  x = factory.make_source(config, "test").gather(np.arange(20))["x"]
  run(continuous, "--limit=20", *flags)
  report, values = result(continuous)
  assert values["index"].tolist() == list(range(20))
  key = keys.example_keys(jax.random.fold_in(jax.random.key(0), 3), 0, 20)  # the stream of likelihoods
  np.testing.assert_allclose(values["value"], quadratic(key, x)["value"], rtol=1e-6, atol=1e-6)
  assert report["results"]["model"]["mean"] == pytest.approx(values["value"].mean(), rel=1e-6)


def test_a_process_computes_its_share_and_waits_for_the_others(tmp_path, monkeypatch):
  """Process 1 of 2 has the chunks 1 and 3; those of process 0 come while it waits."""
  compute = lambda starts: lambda start: starts.append(start) or {"x": np.arange(start, start + 2)}
  ours, theirs = [], []
  once = lambda *args: chunks.in_chunks(tmp_path, "x", "id", 9, 2, *args)

  def other(seconds):
    with monkeypatch.context() as patch:
      patch.setattr(chunks.time, "sleep", lambda seconds: pytest.fail("both wait for each other"))
      if not theirs:
        once(compute(theirs), (0, 2))

  monkeypatch.setattr(chunks.time, "sleep", other)
  assert once(compute(ours), (1, 2))["x"].tolist() == list(range(9))
  assert (ours, theirs) == ([2, 6], [0, 4, 8])
  assert once(compute([]))["x"].tolist() == list(range(9))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(continuous, tmp_path):
  shutil.copytree(continuous, tmp_path / "two", ignore=shutil.ignore_patterns("likelihood*"))
  shutil.copytree(tmp_path / "two", tmp_path / "one")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  joined = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  joined |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  start = lambda k: subprocess.Popen(
    [sys.executable, "-m", "jaxdiff.cli", "likelihood", f"--workdir={tmp_path / 'two'}"],
    cwd=ROOT,
    env={**joined, "JAX_PROCESS_ID": str(k)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  processes = [start(k) for k in (0, 1)]
  try:
    run(tmp_path / "one")
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert "24 examples" in outputs[0][0]
  assert "24 examples" not in outputs[1][0]
  for together, one in zip(result(tmp_path / "two"), result(tmp_path / "one"), strict=True):
    np.testing.assert_equal(together, one)


def types_of_sums(jaxpr):
  """The float types of all products, convolutions and transcendental functions in a program."""
  found = set()
  for equation in jaxpr.eqns:
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        found |= types_of_sums(getattr(inner, "jaxpr", inner))
    if equation.primitive.name in ("dot_general", "conv_general_dilated", "logistic", "exp", "sin", "rsqrt", "sqrt"):
      found |= {str(value.aval.dtype) for value in equation.outvars}
  return found


SMALL_IMAGES = {"channels": 4, "channel_multipliers": (1,), "blocks": 1, "groups": 2}


@pytest.mark.parametrize("kind", ["MLP", "UNet"])
def test_in_float64_all_of_the_network_and_the_process_is_float64(kind):
  config = arguments.load(TOY if kind == "MLP" else ROOT / "configs" / "digits.py")
  config["network"] |= {"width": 8, "depth": 1} if kind == "MLP" else SMALL_IMAGES
  x = np.zeros((2, 2)) if kind == "MLP" else np.zeros((2, 8, 8, 1), np.uint8)
  source = from_arrays(x, levels=None if kind == "MLP" else 17)
  params = jax.eval_shape(lambda: factory.init_params(config, source))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)

  chosen = config | {"likelihood": config["likelihood"] | {"dtype": "float64"}}
  with options.precision(chosen):
    chosen, wide = options.in_precision(chosen, params)
    one_batch = objectives.make_log_likelihood(chosen, wide, source)
    program = jax.make_jaxpr(one_batch)(wide, keys.example_keys(jax.random.key(0), 0, 2), source.gather([0, 1]))
  assert types_of_sums(program.jaxpr) == {"float64"}


def test_other_data_are_set_beside_the_held_out_ones(integers, capsys, monkeypatch):
  """Of bits the higher is the less likely: corners of the lattice, where most are in its middle."""
  replace_densities(monkeypatch, lambda key, x: {"value": 0.1 * jnp.sum((x - 2.0) ** 2, 1)})
  other = ["--other.type=npz", f"--other.path={integers.parent / 'far.npz'}", "--other.levels=5"]
  run(integers, *other, "--seed=5")
  ours, other = result(integers), result(integers, "likelihood_other")
  pairs = other[1]["value"][:, None] - ours[1]["value"]
  area = np.mean(pairs > 0) + 0.5 * np.mean(pairs == 0)
  assert other[0]["auroc"] == pytest.approx(area, abs=1e-6)
  assert area > 0.6
  assert (ours[0]["examples"], other[0]["examples"]) == (24, 16)
  assert other[0]["data"]["name"] == "npz/far.npz"
  assert other[0]["against"]["name"] == ours[0]["data"]["name"] == "npz/x.npz"
  assert f"AUROC {area:.4f}" in capsys.readouterr().out
  assert np.asarray(Image.open(integers / "likelihood_other.png")).std() > 5


def test_of_log_densities_the_lower_is_the_less_likely(continuous, monkeypatch):
  replace_densities(monkeypatch, quadratic)
  run(continuous, "--other.type=toy2d", "--other.size=100", "--other.noise=3.0")
  ours, other = result(continuous)[1], result(continuous, "likelihood_other")
  area = np.mean(other[1]["value"][:, None] < ours["value"])
  assert other[0]["auroc"] == pytest.approx(area, abs=1e-6)
  assert abs(area - 0.5) > 0.01, "the sign could not be told"


def test_other_data_of_another_shape_or_levels_are_refused(integers, tmp_path, capsys):
  np.savez(tmp_path / "x.npz", x_train=np.zeros((9, 3), int), x_test=np.zeros((9, 3), int))
  other = [f"--workdir={integers}", "--other.type=npz"]
  error = fails(2, capsys, *other, f"--other.path={tmp_path / 'x.npz'}", "--other.levels=5")
  assert "config.other: npz/x.npz has shape (3,), the model's data have (2,)" in error
  error = fails(2, capsys, *other, f"--other.path={integers.parent / 'far.npz'}", "--other.levels=9")
  assert "config.other: npz/far.npz has levels 9, the model's data have 5" in error


def test_failed_examples_are_counted_and_in_no_mean(continuous, capsys, monkeypatch):
  code = lambda key, x: {"code": jnp.where(x[:, 0] > 0.5, status.MAX_STEPS, status.SUCCESS)}
  replace_densities(monkeypatch, lambda key, x: quadratic(key, x) | code(key, x))
  error = fails(1, capsys, f"--workdir={continuous}")
  report, values = result(continuous)
  count = int(np.count_nonzero(values["code"]))
  assert 0 < count == report["failed"] < 24
  assert f"{count} of 24 examples" in error
  assert "raise max_steps" in error
  title = f"model, without the {count} that failed"
  assert list(report["results"]) == [title]
  assert report["results"][title]["mean"] == pytest.approx(values["value"][values["code"] == 0].mean(), abs=1e-5)


def test_a_value_that_is_not_finite_has_failed(continuous, capsys, monkeypatch):
  replace_densities(monkeypatch, lambda key, x: {"value": jnp.full(len(x), jnp.nan)})
  assert "is not finite" in fails(1, capsys, f"--workdir={continuous}")
  assert result(continuous)[0]["failed"] == 24


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--dequantization=uniform", "belong to integers; these data are continuous"),
    ("--draws=2", "belong to integers; these data are continuous"),
    ("--config.network.type=UNet", "was trained otherwise: config.network.depth was 1, is None"),
  ],
)
def test_mistakes_that_the_data_show(continuous, flags, message, capsys):
  """Those that the config alone shows: see test_arguments."""
  assert message in fails(2, capsys, f"--workdir={continuous}", flags)


def test_other_levels_than_those_of_the_training_are_refused(integers, capsys):
  error = fails(2, capsys, f"--workdir={integers}", "--config.data.levels=4")
  assert "config.data.levels was 5, is 4" in error


def test_a_checkpoint_of_another_architecture_is_named(continuous, tmp_path, capsys):
  """A config that says so is refused by what it says; one that lies, by the shapes of the parameters."""
  shutil.copytree(continuous, tmp_path / "run")
  config = factory.read(tmp_path / "run" / "config.json")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rundir, "_check_same_model", lambda workdir, found: None)
    factory.write(config | {"network": config["network"] | {"width": 24}}, tmp_path / "run" / "config.json")
    error = fails(2, capsys, f"--workdir={tmp_path / 'run'}")
  assert "checkpoint 0 holds another model" in error


def test_tolerances_below_float32_are_warned_of_in_one_line_said_once(continuous, capsys, monkeypatch):
  monkeypatch.setattr(warnings, "showwarning", None)
  cli._warn_plainly()
  warnings.warn("again", stacklevel=1)
  warnings.warn("again", stacklevel=1)
  assert capsys.readouterr().err == "jaxdiff: warning: again\n"
  error = fails(1, capsys, f"--workdir={continuous}", "--rtol=1e-10", "--atol=1e-9", "--config.likelihood.max_steps=2")
  (line,) = [line for line in error.splitlines() if "warning" in line]
  assert line.startswith("jaxdiff: warning: rtol = 1e-10 and atol = 1e-09 are below what float32 delivers")
  assert "--dtype=float64" in line
  report, _ = result(continuous)
  assert (report["failed"], report["results"]) == (24, {})
  assert report["errors"]["standard_error_over_examples"] is None
