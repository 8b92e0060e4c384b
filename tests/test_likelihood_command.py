"""`jaxdiff likelihood`: in this process, on its eight devices, on tiny runs; two processes on the loopback once."""

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
from PIL import Image
from scipy import stats

from jaxdiff import arguments, cli, factory, keys, objectives, options, rundir, systems
from jaxdiff.data.examples import from_arrays
from jaxdiff.evaluation import chunks, comparison, densities, runs

pytestmark = pytest.mark.standard_promotion
ROOT = pathlib.Path(__file__).parents[1]
TOY = ROOT / "configs" / "toy2d.py"
FLAGS = [
  "--config.network.width=16",
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


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("continuous") / "run"
  cli.main(["train", f"--workdir={workdir}", f"--config={TOY}", "--config.data.size=200", *FLAGS])
  return workdir


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
  """Points on a 5 x 5 lattice."""
  folder = tmp_path_factory.mktemp("integers")
  rng = np.random.default_rng(0)
  np.savez(folder / "x.npz", x_train=rng.binomial(4, 0.5, (200, 2)), x_test=rng.binomial(4, 0.5, (40, 2)))
  np.savez(folder / "far.npz", x_train=np.zeros((9, 2), int), x_test=rng.choice([0, 4], (16, 2)))
  (folder / "config.py").write_text(
    f"import runpy\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
    f"  config = runpy.run_path({str(TOY)!r})['get_config']()\n"
    f"  config.data = ConfigDict({{'type': 'npz', 'path': {str(folder / 'x.npz')!r}, 'levels': 5}})\n"
    "  return config\n"
  )
  cli.main(["train", f"--workdir={folder / 'run'}", f"--config={folder / 'config.py'}", *FLAGS])
  return folder / "run"


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


def test_importance_weights_tighten_the_bound_of_the_same_draws(integers):
  """By Jensen's inequality, example by example; and the draws have an error of their own."""
  flags = ["--limit=8", "--dequantization=truncated_normal", "--draws=3", "--probes=exact"]
  run(integers, *flags)
  averaged = result(integers)
  run(integers, *flags, "--importance")
  weighted = result(integers)
  assert np.all(weighted[1]["value"] < averaged[1]["value"])
  assert np.all(averaged[1]["value"] < averaged[1]["dequantization_error"] * 6 + weighted[1]["value"])
  assert averaged[0]["errors"]["rms_standard_error_over_dequantization"] > 0
  assert averaged[0]["errors"]["rms_standard_error_over_probes"] == 0
  assert "truncated normal, 3 draws averaged; probability flow" in averaged[0]["bound"]
  assert "truncated normal, 3 draws importance-weighted; probability flow" in weighted[0]["bound"]
  assert "exact trace" in weighted[0]["bound"]


def test_stopped_and_started_again_it_ends_at_the_same_bits(continuous, tmp_path, capsys, monkeypatch):
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
  alone = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  joined = {**alone, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  start = lambda folder, environment: subprocess.Popen(
    [sys.executable, "-m", "jaxdiff.cli", "likelihood", f"--workdir={tmp_path / folder}"],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  processes = [start("two", {**joined, "JAX_PROCESS_ID": str(k)}) for k in (0, 1)]
  try:
    processes.append(start("one", alone))
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0, 0], outputs
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


@pytest.mark.parametrize("kind", ["MLP", "UNet"])
def test_in_float64_all_of_the_network_and_the_process_is_float64(kind):
  config = arguments.load(TOY if kind == "MLP" else ROOT / "configs" / "digits.py")
  config["network"] |= {"width": 8, "depth": 1} if kind == "MLP" else {"channels": 8, "channel_multipliers": (1,)}
  x = np.zeros((2, 2)) if kind == "MLP" else np.zeros((2, 8, 8, 1), np.uint8)
  source = from_arrays(x, levels=None if kind == "MLP" else 17)
  params = factory.init_params(config, source)

  def program(dtype):
    chosen = config | {"likelihood": config["likelihood"] | {"dtype": dtype}}
    with options.precision(chosen):
      chosen, wide = options.in_precision(chosen, params)
      one_batch = objectives.make_log_likelihood(chosen, wide, source)
      return jax.make_jaxpr(one_batch)(wide, keys.example_keys(jax.random.key(0), 0, 2), source.gather([0, 1]))

  assert types_of_sums(program("float64").jaxpr) == {"float64"}
  if kind == "MLP":
    assert types_of_sums(program("float32").jaxpr) == {"float32"}


@pytest.mark.parametrize("kind", ["continuous", "integers"])
def test_float64_agrees_with_float32(kind, tmp_path, request):
  """On the same draws of the dequantization, within what float32 leaves at these tolerances."""
  workdir = request.getfixturevalue(kind)
  tolerances = ["--limit=8", "--rtol=1e-5", "--atol=1e-5"]
  run(workdir, *tolerances)
  single = result(workdir)[1]
  run(workdir, *tolerances, "--dtype=float64")
  report, double = result(workdir)
  assert double["value"].dtype == np.float64
  np.testing.assert_allclose(double["value"], single["value"], atol=3e-4)  # the steps differ, each good to 1e-5
  assert np.any(double["value"] != single["value"])
  assert "dtype" not in report["model"]["network"]
  assert "float64" in report["bound"]
  assert not jax.config.jax_enable_x64


def test_other_data_are_set_beside_the_held_out_ones(integers, capsys):
  run(integers, "--other.type=npz", f"--other.path={integers.parent / 'far.npz'}", "--other.levels=5")
  ours, other = result(integers), result(integers, "likelihood_other")
  area = np.mean(other[1]["value"][:, None] > ours[1]["value"])
  assert other[0]["auroc"] == pytest.approx(area, abs=1e-6)
  assert area > 0.6, "corners are less likely than the middle"
  assert (ours[0]["examples"], other[0]["examples"]) == (24, 16)
  assert other[0]["data"]["name"] == "npz/far.npz"
  assert other[0]["against"]["name"] == ours[0]["data"]["name"] == "npz/x.npz"
  assert f"AUROC {area:.4f}" in capsys.readouterr().out
  assert np.asarray(Image.open(integers / "likelihood_other.png")).std() > 5


def test_of_log_densities_the_lower_is_the_less_likely(continuous):
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


def test_failed_examples_are_counted_and_in_no_mean(continuous, capsys):
  run(continuous)
  whole = result(continuous)[1]
  enough = int((whole["nfe"].max() - 1) // 6) - 1
  error = fails(1, capsys, f"--workdir={continuous}", f"--config.likelihood.max_steps={enough}")
  report, values = result(continuous)
  count = int(np.count_nonzero(values["code"]))
  assert 0 < count == report["failed"] < 24
  assert f"{count} of 24 examples" in error
  assert "raise max_steps" in error
  assert list(report["results"]) == [f"model, without the {count} that failed"]
  assert report["results"][f"model, without the {count} that failed"]["mean"] == pytest.approx(
    whole["value"][values["code"] == 0].mean(), abs=1e-5
  )
  fails(1, capsys, f"--workdir={continuous}", "--config.likelihood.max_steps=2")
  report, values = result(continuous)
  assert (report["failed"], report["results"]) == (24, {})
  assert report["errors"]["standard_error_over_examples"] is None


def test_a_value_that_is_not_finite_has_failed(continuous, capsys, monkeypatch):
  def broken(config, params, source, seen):
    zeros = lambda batch: jnp.zeros(len(batch["x"]))
    names = ("standard_error", "dequantization_error", "nfe", "code", "accepted")
    return lambda params, key, batch: {"value": zeros(batch) / zeros(batch), **{name: zeros(batch) for name in names}}

  system = systems.diffusion.SYSTEM._replace(log_likelihood=broken)
  monkeypatch.setattr(systems, "of", lambda config: system)
  assert "is not finite" in fails(1, capsys, f"--workdir={continuous}", "--seed=9")
  assert result(continuous)[0]["failed"] == 24


def test_short_flags_stand_for_fields(integers):
  flags = "--split=train --limit=7 --seed=3 --solver=dopri8 --rtol=1e-3 --atol=1e-2 --variable=log_snr --steps=shared"
  more = ["--dequantization=uniform", "--draws", "4", "--importance", "--dtype=float64", "--probes=exact"]
  config, _ = arguments.parse("likelihood", [f"--workdir={integers}", *flags.split(), *more])
  expected = {"split": "train", "limit": 7, "seed": 3, "solver": "dopri8", "rtol": 1e-3, "atol": 1e-2}
  expected |= {"variable": "log_snr", "steps": "shared", "dequantization": "uniform", "draws": 4, "importance": True}
  assert expected.items() <= config["likelihood"].items()
  assert config["likelihood"]["dtype"] == "float64"
  assert config["likelihood"]["divergence"] == {"type": "exact"}
  parse = lambda *flags: arguments.parse("likelihood", [f"--workdir={integers}", *flags])[0]["likelihood"]["divergence"]
  assert parse("--probes=16") == {"type": "hutchinson", "probes": 16}
  gaussian = "--config.likelihood.divergence.noise=gaussian"
  named = "--config.likelihood.divergence.type=hutchinson"
  assert parse(named, gaussian, "--probes=2") == {"type": "hutchinson", "probes": 2, "noise": "gaussian"}
  sampling, _ = arguments.parse("sample", [f"--workdir={integers}", "--sampler=ddim", "--steps=7", "--seed=5"])
  assert sampling["sampler"]["grid"]["steps"] == 7
  assert sampling["sample"]["seed"] == 5


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--split=tset", "config.likelihood: split: got 'tset'; choose from 'train', 'test' (did you mean 'test'?)"),
    ("--limit=-1", "config.likelihood.limit must be at least 1, or 0 for all; got -1"),
    ("--limit=3", "3 examples cannot be split over 8 devices"),
    ("--draws=0", "config.likelihood.draws must be at least 1, got 0"),
    ("--solver=rk45", "config.likelihood.solver must be"),
    ("--rtol=0", "config.likelihood: rtol must be positive"),
    ("--dtype=float16", "config.likelihood.dtype must be 'float32' or 'float64', got 'float16'"),
    ("--probes=many", "--probes must be a whole number, or exact; got 'many'"),
    ("--probes=0", "config.likelihood.divergence: probes must be at least 1"),
    ("--dequantization=normal", "config.likelihood.dequantization must be 'auto' or 'uniform'"),
    ("--dequantization=uniform", "belong to integers; these data are continuous"),
    ("--draws=2", "belong to integers; these data are continuous"),
    ("--solvr=dopri8", "unexpected argument '--solvr=dopri8'"),
    ("--solvr=dopri8", "did you mean '--solver'?"),
    ("--num=8", "unexpected argument '--num=8'"),
    ("--config.network.type=UNet", "was trained otherwise: config.network.depth was 1, is None"),
    ("--config.likelihood.adjoint=direct", "config.likelihood.adjoint does not exist"),
    ("--other.type=npz", "config.other needs a value for path"),
    ("--other.typ=npz", "config.other needs a type: "),
  ],
)
def test_mistakes(continuous, flags, message, capsys, untyped):
  assert message in fails(2, capsys, f"--workdir={continuous}", flags)


def test_importance_with_probes_and_other_levels_are_refused(integers, capsys):
  error = fails(2, capsys, f"--workdir={integers}", "--importance", "--probes=4")
  assert "config.likelihood.importance needs the exact trace, got hutchinson" in error
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
  assert "checkpoint 3 holds another model" in error


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


def evaluated(folder, name, value, **changes):
  """What `jaxdiff likelihood` would have written into a directory."""
  (folder / name).mkdir()
  values = {"value": value, "index": np.arange(len(value)), "code": np.zeros(len(value), int)}
  values |= {"standard_error": 0 * value, "dequantization_error": 0 * value}
  values |= {key: np.asarray(changes.pop(key)) for key in ("index", "code") if key in changes}
  settings = {"seed": 0, "dtype": "float32", "dequantization": "uniform", "draws": 1, "importance": False}
  settings["divergence"] = {"type": "hutchinson", "probes": 4, "noise": "rademacher"}
  report = {"unit": "bits/dim", "bound": "text", "data": {"name": "digits", "content": "abc"}, "split": "test"}
  report |= {key: changes.pop(key) for key in ("unit", "data", "split") if key in changes}
  report |= {"examples": len(value), "settings": settings | changes}
  np.savez(folder / name / "likelihood.npz", **values)
  (folder / name / "likelihood.json").write_text(json.dumps(report))
  return folder / name


def test_runs_are_compared_on_paired_examples(tmp_path, capsys):
  """The intervals are those of SciPy's paired t test, also where the rows have another order."""
  rng = np.random.default_rng(0)
  a = rng.normal(2.0, 1.0, 30)
  b, c = a + rng.normal(0.05, 0.1, 30), a - 0.5
  order = rng.permutation(30)
  folders = [evaluated(tmp_path, "a", a), evaluated(tmp_path, "b", b[order], index=order)]
  folders.append(evaluated(tmp_path, "c", c, seed=1))
  cli.main(["likelihood", f"--compare={','.join(map(str, folders))}"])
  out = capsys.readouterr().out
  interval = stats.ttest_rel(b, a).confidence_interval(0.95)
  assert f"{a.mean():8.4f}\n" in out
  assert f"{b.mean():8.4f}  {(b - a).mean():+8.4f}  [{interval.low:+.4f}, {interval.high:+.4f}]" in out
  assert "-0.5000  [-0.5000, -0.5000]" in out
  assert "the same 30 examples, bits/dim, uniform dequantization" in out
  assert "dequantization: not the same\nprobes: not the same" in out
  cli.main(["likelihood", "--compare", ",".join(map(str, folders[:2]))])
  assert "dequantization: the same\nprobes: the same" in capsys.readouterr().out
  wide = evaluated(tmp_path, "wide", a, dtype="float64")
  assert comparison.shared([comparison.read(folders[0]), comparison.read(wide)])["probes"] is True
  exact = [evaluated(tmp_path, name, a, divergence={"type": "exact"}) for name in ("e", "f")]
  assert comparison.shared([comparison.read(folder) for folder in exact]) == {"dequantization": True, "probes": None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": {"name": "digits", "content": "xyz"}}, "differ in data: digits test (abc) and digits test (xyz)"),
    ({"split": "train"}, "differ in data: digits test (abc) and digits train (abc)"),
    ({"unit": "log-density, nats"}, "differ in unit: bits/dim and log-density, nats"),
    ({"dequantization": "gaussian"}, "differ in bound: uniform dequantization and gaussian dequantization"),
    ({"importance": True, "draws": 8}, "uniform dequantization, 8 importance-weighted draws"),
    ({"index": np.arange(1, 6)}, "hold different examples (5 and 5, 4 of them in both)"),
    ({"code": [0, 1, 0, 0, 0]}, "1 of 5 examples of"),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, message, tmp_path, capsys):
  a, b = evaluated(tmp_path, "a", np.arange(5.0)), evaluated(tmp_path, "b", np.arange(5.0), **changes)
  assert message in fails(2, capsys, f"--compare={a},{b}")


def test_mistakes_in_a_comparison(tmp_path, capsys):
  a = evaluated(tmp_path, "a", np.arange(5.0))
  (tmp_path / "empty").mkdir()
  for argument, message in {
    f"--compare={a}": "--compare needs at least two directories",
    f"--compare={a},{tmp_path / 'none'}": "none is not a directory",
    f"--compare={a},{tmp_path / 'empty'}": "has no likelihood.json: make it by jaxdiff likelihood --workdir=",
  }.items():
    assert message in fails(2, capsys, argument)
  assert "it takes no other flags" in fails(2, capsys, f"--compare={a},{a}", "--limit=3")
  (a / "likelihood.npz").write_bytes(b"PK")
  assert f"the likelihoods in {a} cannot be read" in fails(2, capsys, f"--compare={a},{a}")


def test_estimates_leave_failures_out_and_the_area_is_that_of_all_pairs():
  values = {"value": np.array([1.0, 2.0, np.nan, 4.0, 9.0]), "code": np.array([0, 0, 0, 0, 2])}
  values |= {"standard_error": np.array([3.0, 4.0, 0.0, 5.0, 0.0]), "dequantization_error": np.full(5, np.nan)}
  estimate = densities.estimate(values)
  assert (estimate.examples, estimate.failed) == (5, 2)
  assert estimate.mean == pytest.approx(7 / 3)
  assert estimate.standard_error_over_examples == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
  assert estimate.rms_standard_error_over_probes == pytest.approx(np.sqrt(50 / 3))
  assert np.isnan(estimate.rms_standard_error_over_dequantization)
  low, high = (np.random.default_rng(k).integers(0, 9, n).astype(float) for k, n in ((0, 40), (1, 30)))
  pairs = (high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean()
  assert densities.auroc(low, high) == pytest.approx(pairs)
  assert densities.difference(np.ones(1), np.zeros(1)) == (-1.0, -np.inf, np.inf)
