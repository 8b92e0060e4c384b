"""The command `evaluate` of a classifier: how often it is right at which noise."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff import factory, objectives, options, parallel, rundir, schedules, sde
from jaxdiff.commands import console
from jaxdiff.evaluation import pictures, runs
from jaxdiff.schema import Config

_LEVELS = 12  # noise levels, evenly over the log-SNR


def accuracy(config: Config, workdir: Path) -> None:
  """Write and print how often the classifier is right at several noises, and its cross-entropy, of held-out data."""
  settings, mesh = options.evaluate(config), parallel.make_mesh(jax.devices())
  _, params, step = rundir.load(workdir, config, settings.ema_length)
  held_out = factory.make_source(config, settings.split)
  count = min(settings.num or len(held_out), len(held_out))
  size = console.batch_size(settings.batch_size, count, mesh.size)
  console.check_batch("evaluate.batch_size", size, mesh.size)
  process = factory.make_process(config)
  times = schedules.time_grid(process, _LEVELS - 1)[::-1]
  console.say(f"evaluating step {step} on {count} examples")
  evaluate = runs.evaluator(
    objectives.make_accuracy(config, held_out, times), params, held_out, size, settings.seed, mesh
  )
  parts = [evaluate(start) for start in range(0, count, size)]
  right, nats = (np.concatenate([part[name] for part in parts])[:count] for name in ("accuracy", "nats"))
  label = held_out.gather(np.arange(count))["label"]
  rows = _rows(np.asarray(times), np.asarray(sde.log_snr(process, times)), right, nats)
  chance = float(np.bincount(label).max() / count)
  report = {
    "data": {"name": held_out.name, "content": held_out.content_hash, "split": settings.split, "examples": count},
    "model": {name: config[name] for name in ("sde", "network")},
    "checkpoint_step": step,
    "seed": settings.seed,
    "commonest_class": chance,
    "levels": rows,
  }
  (workdir / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
  title = f"{held_out.name}, {settings.split}: {count} examples"
  levels, means = (np.asarray([row[name] for row in rows]) for name in ("log_snr", "accuracy"))
  pictures.save_accuracy(workdir / "accuracy.png", levels, means, chance, title)
  print("\n".join([title, *_lines(rows), f"the commonest class: {chance:.4f}"]))
  console.list_files(workdir, "accuracy.json", "accuracy.png")


def _rows(times: np.ndarray, log_snr: np.ndarray, right: np.ndarray, nats: np.ndarray) -> list[dict[str, Any]]:
  error = lambda values: float(values.std(ddof=1) / np.sqrt(len(values)))
  return [
    {
      "t": float(times[k]),
      "log_snr": float(log_snr[k]),
      "accuracy": float(right[:, k].mean()),
      "accuracy_standard_error": error(right[:, k]),
      "nats": float(nats[:, k].mean()),
      "nats_standard_error": error(nats[:, k]),
    }
    for k in range(len(times))
  ]


def _lines(rows: list[dict[str, Any]]) -> list[str]:
  of = lambda row, name: f"{row[name]:7.4f} +- {row[f'{name}_standard_error']:.4f}"
  head = "       t  log-SNR  accuracy           nats"
  return [head, *(f"{r['t']:8.4f} {r['log_snr']:8.2f}  {of(r, 'accuracy')}  {of(r, 'nats')}" for r in rows)]
