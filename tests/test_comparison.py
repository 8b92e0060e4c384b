"""`jaxdiff likelihood --compare`: runs on paired examples, and the estimates behind the tables."""

import json

import numpy as np
import pytest
from scipy import stats

from jaxdiff import cli
from jaxdiff.evaluation import comparison, densities


def fails(code, capsys, *arguments):
  with pytest.raises(SystemExit) as exit:
    cli.main(["likelihood", *arguments])
  assert exit.value.code == code
  return capsys.readouterr().err


def written(folder, name, value, **changes):
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
  folders = [written(tmp_path, "a", a), written(tmp_path, "b", b[order], index=order)]
  folders.append(written(tmp_path, "c", c, seed=1))
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
  wide = written(tmp_path, "wide", a, dtype="float64")
  assert comparison.shared([comparison.read(folders[0]), comparison.read(wide)])["probes"] is True
  exact = [written(tmp_path, name, a, divergence={"type": "exact"}) for name in ("e", "f")]
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
  a, b = written(tmp_path, "a", np.arange(5.0)), written(tmp_path, "b", np.arange(5.0), **changes)
  assert message in fails(2, capsys, f"--compare={a},{b}")


def test_mistakes_in_a_comparison(tmp_path, capsys):
  a = written(tmp_path, "a", np.arange(5.0))
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
