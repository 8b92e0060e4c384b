"""The command `edit`: images painted in, coloured, enlarged, deblurred or changed by a trained model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import editing, factory, inverse, options, parallel, rundir, schema, sde, status
from jaxdiff.commands import console, guiding, problems
from jaxdiff.evaluation import pictures, runs
from jaxdiff.models import conditioning
from jaxdiff.schema import Config, ConfigError
from jaxdiff.settings import EditSettings

_NAMES = ("input", "measurement", "mask")  # what a sampler is told and no score
_WRITTEN = {"mask": "known"}  # True there; of the images of --mask the contrary


def edit(config: Config, workdir: Path) -> None:
  """Draw several results for each of the images, on the devices of all processes; the first process writes them."""
  settings, sampling, mesh = options.edit(config), options.sample(config), parallel.make_mesh(jax.devices())
  console.check_batch("sample.batch_size", sampling.batch_size, mesh.size)
  if options.is_flow(config):
    raise ConfigError("edit needs a process with noise, and config.sde.type = 'CNF' has none: take another run")
  plan = guiding.plan(config)
  _check_told(config, plan)
  source, params, step = rundir.load(workdir, config, sampling.ema_length)
  if len(source.shape) != 3 or source.shape[2] not in (1, 3):
    raise ConfigError(
      f"edit is for models of images [h, w, 1 or 3]; the data of this run have the shape {source.shape}"
    )
  problem = problems.read(settings, source.shape, source.levels)
  process, guided = factory.make_process(config, params), guiding.guided(config, plan, source, params)
  sampler = _sampler(config, settings, process, problem)
  count = len(problem.columns[0])
  rows = count * settings.num
  size = min(sampling.batch_size, -(-rows // mesh.size) * mesh.size)
  console.say(f"{settings.task} of {count} images from step {step} by {config['sampler']['type']}")
  guiding.say(plan)
  drawn = runs.draw(
    *(guided.score, guided.params, process, sampler, source.shape, rows, size, settings.seed, mesh),
    _given(config, plan, problem, settings.num, source.shape),
  )
  status.check(drawn["code"], drawn["accepted"])
  if not console.first_process():
    return
  console.say(f"{drawn['nfe'].mean():.0f} network evaluations a result")
  console.warn_far(source, drawn["x"], _remedy(settings, plan))
  x, nfe = (drawn[name].reshape(count, settings.num, *drawn[name].shape[1:]) for name in ("x", "nfe"))
  told = {name: value[np.arange(settings.num) % len(value)] for name, value in plan.told.written.items()}
  cond = {_WRITTEN.get(name, name): value for name, value in problem.cond.items()}
  how = {"checkpoint_step": step, "sampler": config["sampler"], **_used(settings, problem), **plan.written()}
  arrays = {"input": problem.columns[0], **cond, "x": x, "nfe": nfe, **told, "settings": console.as_text(how)}
  np.savez_compressed(workdir / "edit.npz", allow_pickle=False, **arrays)
  shown = np.concatenate([np.stack(problem.columns, axis=1), x], axis=1)
  pictures.save_grid(workdir / "edit.png", shown.reshape(-1, *source.shape), columns=shown.shape[1])
  known = "what is known, " if len(problem.columns) > 1 else ""
  results = f"{settings.num} result{'s' if settings.num > 1 else ''}"
  console.say(f"edit.png, a row for each image: input, {known}{results}")
  console.list_files(workdir, "edit.png", "edit.npz")


def _used(settings: EditSettings, problem: problems.Problem) -> dict[str, Any]:
  """The settings of the task, without those of others."""
  unused = {name for name, task in options.OF_TASK.items() if task != settings.task}
  unused |= {"method", "noise", "degrade"} if settings.task == "sdedit" else set()
  unused |= set() if settings.degrade else {"factor"}
  fields = dataclasses.asdict(settings) | {"noise": problem.noise}
  return {name: value for name, value in fields.items() if name not in unused}


def _remedy(settings: EditSettings, plan: guiding.Plan) -> str:
  """What is likely to help where results lie far outside of the range of images."""
  if settings.task == "deblur" and not settings.degrade:
    return (
      f"the input is probably not blurred by so much; try a lower --blur than {settings.blur:g}, a larger --noise, or "
      "--degrade, which blurs it first"
    )
  return "try a lower --guidance" if plan.line() else "try more --steps, or another --method or --sampler"


def _check_told(config: Config, plan: guiding.Plan) -> None:
  """Refuse a model that must be told what these images do not come with, and guidance to nothing."""
  conditions = config["network"].get("conditions", {})
  if taken := sorted(conditions.keys() & set(_NAMES)):
    raise ConfigError(f"config.network.conditions.{taken[0]} has a name that edit uses: take another model")
  missing = conditions.keys() - plan.told.stated.keys()
  if missing and not options.train(config).drop_conditions:
    raise ConfigError(
      f"the model is always told {', '.join(sorted(missing))} (config.train.drop_conditions = 0), which images come "
      "without: give --label or --prompt where it is one of them, or take another model"
    )
  if missing == conditions.keys() and plan.settings.scale is not None and plan.other is None:
    raise ConfigError(
      "config.guidance.scale leads to what the model is told: give --label or --prompt, or leave it out"
    )


def _sampler(config: Config, settings: EditSettings, process: Any, problem: problems.Problem) -> Callable[..., Any]:
  """The sampler of the run, made to keep to what is known, or to start in its middle."""
  sampler: Any = factory.make_sampler(config, process)
  if problem.operator is not None:
    _check_method(config, settings, problem, hasattr(sampler, "ts"))
    given = {"sampler": sampler, "operator": problem.operator, "noise_std": problem.noise, "method": settings.method}
    return schema.construct(inverse.restoration, {}, "edit", sde=process, **given)
  section = config["sampler"]
  if "grid" not in schema.subsections("sampler", section):
    raise ConfigError(
      f"config.sampler.type = {section['type']!r} has no grid of steps, in the middle of which sdedit starts: take "
      "another one, such as --sampler=dpm_solver_pp --steps=50"
    )
  grid = schema.component("sampler.grid", section.get("grid", {}), sde=process)
  _check_strength(settings.strength, len(grid) - 1)
  ts = editing.lower_part(grid, settings.strength)
  sampler = factory.make_sampler(config, process, ts=ts)
  editor = schema.construct(editing.sdedit, {}, "edit", sampler=sampler)
  level = float(np.exp(-0.5 * sde.log_snr(process, sampler.ts[0])))
  console.say(f"noised to sigma / alpha = {level:.3g}, {len(sampler.ts) - 1} steps from there")

  def run(key: Any, x_T: Any, score: Any, cond: Any) -> Any:
    return editor(key, cond["input"], score, {name: value for name, value in cond.items() if name != "input"})

  return run


def _check_method(config: Config, settings: EditSettings, problem: problems.Problem, on_grid: bool) -> None:
  """Refuse a method that does not go with the sampler or with noise."""
  section, method = config["sampler"], settings.method
  if method in ("dps", "projection", "repaint") and not on_grid:
    raise ConfigError(
      f"--method={method} needs a sampler on a grid of steps, which config.sampler.type = {section['type']!r} has not: "
      "take --sampler=ancestral or ddim"
    )
  if settings.task == "deblur" and method in ("projection", "repaint") and problem.noise:
    usual = "1/255 where it is not given" if settings.noise is None else f"{settings.noise:g}"
    raise ConfigError(
      f"--method={method} with --task=deblur takes no noise, and --noise is {usual}: add --noise=0, or take "
      "--method=pigdm or dps"
    )


def _check_strength(strength: float, steps: int) -> None:
  if strength * steps < 1 - 1e-6:
    least = math.ceil(1e4 / steps) / 1e4
    raise ConfigError(
      f"config.edit.strength = {strength:g} of {steps} steps is less than one: take at least {least:g}, or more --steps"
    )


def _given(
  config: Config, plan: guiding.Plan, problem: problems.Problem, num: int, shape: tuple[int, ...]
) -> runs.Given:
  """What each result is told: label k mod n that of result k of an image; nothing of what is not stated."""
  rows = np.arange(len(problem.columns[0]) * num)
  modules = getattr(factory.make_network(config), "conditions", {})
  nothing = conditioning.nothing(modules, jnp.zeros((1, *shape)))
  stated = {name: np.asarray(value) for name, value in nothing.items()}
  stated |= {name: value[rows % num % len(value)] for name, value in plan.told.stated.items()}
  stated |= {name: value[rows // num] for name, value in problem.cond.items()}
  return runs.Given(None, lambda batch: {name: batch[name] for name in stated}, stated)
