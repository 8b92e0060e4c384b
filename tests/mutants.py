"""Mutants: one-line mistakes in the library, and for each the test that must notice it. `make mutants` tries them all.

Every mutant is applied in a copy of the tree, where only its own test is run; it dies when that test fails. The table
of the last run is tests/mutants.md.

    python tests/mutants.py                  # all, two at a time; writes tests/mutants.md
    python tests/mutants.py "sub-VP" "EMA"   # those whose names contain one of these words
"""

import concurrent.futures
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("jaxdiff", "tests", "configs", "experiments", "pyproject.toml", "README.md", "Makefile")
WORKERS = 2


class Mutant(NamedTuple):
  name: str
  file: str
  old: str
  new: str
  test: str


MUTANTS: list[Mutant] = []


def copy_of_the_tree(folder: pathlib.Path) -> pathlib.Path:
  for name in COPIED:
    path = ROOT / name
    if path.is_dir():
      shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(path, folder / name)
  return folder


def run(tree: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
  command = [
    sys.executable,
    "-B",
    "-m",
    "pytest",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "-m",
    "slow or not slow",
    *tests,
  ]
  return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def try_one(tree: pathlib.Path, mutant: Mutant) -> str:
  """Apply a mutant, run its test, take the mutant back; return what happened to it."""
  file = tree / mutant.file
  text = file.read_text(encoding="utf-8")
  if text.count(mutant.old) != 1:
    return f"out of date: the old text occurs {text.count(mutant.old)} times"
  file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
  try:
    code = run(tree, [mutant.test]).returncode
  finally:
    file.write_text(text, encoding="utf-8")
  return {0: "SURVIVED", 1: "died"}.get(code, f"the test cannot run: pytest ended with {code}")


def try_all(mutants: list[Mutant]) -> list[str]:
  trees: queue.Queue[pathlib.Path] = queue.Queue()
  done = iter(range(1, len(mutants) + 1))

  def one(mutant: Mutant) -> str:
    tree = trees.get()
    try:
      result = try_one(tree, mutant)
    finally:
      trees.put(tree)
    print(f"{next(done)}/{len(mutants)}  {mutant.name}: {result}", flush=True)
    return result

  with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    for number in range(WORKERS):
      trees.put(copy_of_the_tree(pathlib.Path(folder) / str(number)))
    return list(pool.map(one, mutants))


def table(mutants: list[Mutant], results: list[str]) -> str:
  rows = [f"| {m.name} | `{m.file}` | `{m.test}` | {result} |" for m, result in zip(mutants, results, strict=True)]
  died = results.count("died")
  head = f"# Mutants\n\n`make mutants` writes this file. {died} of {len(mutants)} mutants died.\n"
  return "\n".join([head, "| mutant | in | its test | result |", "|---|---|---|---|", *rows, ""])


def main(words: list[str]) -> None:
  chosen = [m for m in MUTANTS if not words or any(word.lower() in m.name.lower() for word in words)]
  if not chosen:
    sys.exit(f"no mutant has any of {words} in its name")
  with tempfile.TemporaryDirectory() as folder:
    clean = run(copy_of_the_tree(pathlib.Path(folder) / "tree"), sorted({m.test for m in chosen}))
  if clean.returncode:
    sys.exit(f"the tests fail without any mutant:\n{clean.stdout[-3000:]}")
  results = try_all(chosen)
  if not words:
    (ROOT / "tests" / "mutants.md").write_text(table(chosen, results), encoding="utf-8")
  survivors = [m.name for m, result in zip(chosen, results, strict=True) if result != "died"]
  print(f"{len(chosen) - len(survivors)} of {len(chosen)} died")
  if survivors:
    sys.exit(f"not killed: {survivors}")


if __name__ == "__main__":
  main(sys.argv[1:])
