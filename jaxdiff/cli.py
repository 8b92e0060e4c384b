"""The command line: `jaxdiff COMMAND --config=FILE --workdir=DIR [--config.field=value ...]`, one of `COMMANDS`.

A run lives in its workdir: config.json, checkpoints/, metrics.jsonl, and what the others write beside them.
All commands find the run's own config there when --config is not given. What they need is imported when they run.
"""

import difflib
import importlib.metadata
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

USAGE = """usage: jaxdiff COMMAND --workdir=DIR [--config=FILE] [--config.field=value ...]

  train        train, or continue from the newest checkpoint in DIR; short flags: --launcher=jit (or pmap) --fsdp=4
               (so many devices share one copy of the state) --profile=100:110 (trace these steps into DIR/profile)
  sample       draw samples: samples.png, samples.npz, denoising.png; short flags: --sampler=dpm_solver_pp --steps=20
               --num=64 --seed=1 --gif (denoising.gif); of models that are told something: --label=3, --label=0,1,2
               (sample k has label k mod 3), --prompt="a red car"; else what the examples of the split are told.
               --guidance=2: gamma s(x|y) + (1 - gamma) s(x), 1 is the conditional model without guidance; with
               --classifier=DIR, another run, gamma times the gradient of its log p(y|x), 1 by default; with --weak=DIR,
               a weaker model, gamma s + (1 - gamma) s_weak; --interval=0.2,5: where sigma / alpha is above the first
               and up to the second alone; --rescale=0.7: as much of the spread of the conditional prediction
  edit         what the model makes of images: edit.png, a row for each; edit.npz, x [image, result, h, w, c]; needs
               --input=PATH, an image, a folder of them or an .npz file with x [n, h, w, c], floats in [-1, 1] or
               integers of the model's levels, and --task; --num=4 --seed=1, and those of sample but --gif.
               --task=inpaint --mask=PATH: white is painted anew, and of the size of the input before --resize;
               =colorize: of what is grey; =superres: of smaller images; =deblur: what a Gaussian of --blur=1 pixels has
               blurred; =sdedit: noised and sampled again, --strength=0.6 of the steps.
               --degrade: the images are clean, to be degraded first (--factor=2 for superres); --noise=0.1 of what is
               known, in [-1, 1]; --method=pigdm, reconstruction, dps, projection or repaint; --resize: images are
               cropped around the centre and resized by area averages, masks by the nearest pixel
  likelihood   evaluate held-out data: likelihood.json, likelihood.npz, likelihood.png, a table; stopped and started
               again it goes on after its last batch; short flags: --split=test --limit=100 --batch_size=24
               --solver=tsit5 --rtol=1e-5 --atol=1e-5 --probes=16 (or exact) --basis=auto --dequantization=uniform
               --draws=8 --importance --dtype=float64 --variable=log_snr --steps=shared --seed=1;
               --other.type=npz --other.path=FILE: other data under the model, beside them (likelihood_other.*)
  likelihood --compare=DIR,DIR   what was evaluated in these runs, paired on the same examples: one table
  evaluate     measure samples against the data: evaluation.json, neighbours.png, a table; the flags of sample for
               what they are told and led by; of a classifier, how often it is right at which noise: accuracy.json,
               accuracy.png, a table
  import PATH  a run directory of a published network, in which sample and likelihood work: of the safetensors and
               config.json of diffusers' UNet2DModel (a file, a folder or a pipeline), of an export, or of a checkpoint
               of score-SDE in JAX (--preset=ncsnpp_cifar10_ve); the data are named now or when they are needed, by
               --config.data.type=tfds --config.data.name=cifar10
  export PATH  the averaged parameters as safetensors, with config.json, into the folder PATH
  data         prepare data sets that need not fit in memory: jaxdiff data --help

--config is a Python file with get_config(), such as configs/digits.py; without it the run's own config in DIR is used.
The other commands take other settings only of their own sections, sampler, sample, guidance, edit, likelihood,
evaluate and other.
Several processes that all see DIR share a training, samples or a likelihood: start the same command on each with
--distributed (on a TPU pod, GKE, Slurm or under Open MPI, where JAX finds them by itself), or with
--coordinator=HOST:PORT --processes=N --process=I [--timeout=300] (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID in the environment). Launch files: experiments/tpu_pod, experiments/slurm, experiments/gpu_node.
"""
COMMANDS = ("train", "sample", "edit", "likelihood", "evaluate", "import", "export", "data")


def _avoid_miscompiled_reductions() -> None:
  """The CPU backend of jaxlib 0.10.2 to 0.12.0 gives wrong numbers for some large sums: turn that path off."""
  version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:3])
  flag = "--xla_cpu_experimental_ynn_fusion_type"
  if (0, 10, 2) <= version <= (0, 12, 0) and flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=-reduce".strip()


_avoid_miscompiled_reductions()  # XLA reads its flags once


def _keep_compiled_programs() -> None:
  """Share one cache of compiled programs between a user's runs, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  folder = os.path.join(home, "jaxdiff", "xla")
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:
    return  # a cache saves time only; a run needs none
  if os.access(folder, os.W_OK):
    import jax  # the package has imported it, so its environment variables were read

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _leave(code: int, message: object) -> NoReturn:
  print(f"jaxdiff: {message}", file=sys.stderr, flush=True)
  sys.exit(code)


def _quieten() -> None:
  """For a damaged checkpoint or a full disk our own message is enough, without the tracebacks of what met it."""

  def show(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      sys.__unraisablehook__(unraisable)

  for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = show


def _warn_plainly() -> None:
  """A warning is one line on standard error, and said once."""
  said: set[str] = set()

  def show(message: Warning | str, *where: Any, **more: Any) -> None:
    if str(message) not in said:
      said.add(str(message))
      print(f"jaxdiff: warning: {message}", file=sys.stderr, flush=True)

  warnings.showwarning = show


def main(argv: list[str] | None = None) -> None:
  """Run a command.

  Exits with 2 for a mistake in the input, 1 for a run that failed, 128 + n for a training that signal n stopped.
  """
  if argv is None:
    argv = sys.argv[1:]
    _quieten()
    _warn_plainly()
    _keep_compiled_programs()
  if not argv or argv[0] == "help" or (argv[0] != "data" and {"-h", "--help"} & set(argv)):
    print(USAGE)
    return
  command = argv[0]
  if command not in COMMANDS:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    _leave(2, f"unknown command {command!r}{f'; did you mean {close[0]!r}?' if close else ''}\n\n{USAGE}")
  try:
    _run(command, argv[1:])
  except ModuleNotFoundError as error:
    _leave(2, f"the module {error.name!r} is missing; the command line needs pip install '.[train]'")
  except KeyboardInterrupt:
    _leave(130, "interrupted")


def _join(command: str, launch: Any) -> None:
  """Make this one of several processes, if it is."""
  import jax

  from jaxdiff import parallel

  if not (launch.distributed or launch.coordinator or "JAX_COORDINATOR_ADDRESS" in os.environ):
    return
  if command == "evaluate":
    _leave(2, "evaluate runs on one process; start it without --distributed, --coordinator and JAX_COORDINATOR_ADDRESS")
  if command != "train":
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM ends it: there is no step to save
  try:
    parallel.join(launch.coordinator, launch.processes, launch.process, launch.timeout)
  except (ValueError, RuntimeError, TimeoutError) as error:
    _leave(2 if isinstance(error, ValueError) else 1, f"the processes do not find each other: {error}")
  if not jax.distributed.is_initialized():
    _leave(
      2,
      "--distributed: JAX finds no TPU pod, GKE, Slurm or Open MPI here; give --coordinator, --processes and --process",
    )


def _run(command: str, argv: list[str]) -> None:
  from jaxdiff import arguments, commands, factory, rundir, status, systems, training

  try:
    if command == "data":
      from jaxdiff.commands.data import data

      return data(argv)
    if command in ("import", "export"):
      from jaxdiff.commands import transfer

      return getattr(transfer, f"{command}_model")(*arguments.transfer(command, argv))
    if command == "likelihood" and argv and argv[0].split("=")[0] == "--compare":
      return commands.compare(arguments.directories(argv))
    launch, argv = arguments.launch(command, argv)
    config, workdir = arguments.parse(command, argv)
    _join(command, launch)
    config = systems.resolve(config)
    systems.check(config)
    traced = {"profile": launch.profile} if command == "train" else {}
    getattr(commands, command)(config, workdir, **traced)
  except (factory.ConfigError, training.FingerprintError) as error:
    _leave(2, error)
  except (training.CheckpointError, training.NonFiniteError, training.DivergedError, status.SolveError) as error:
    _leave(1, error)
  except rundir.Stopped as stopped:
    _leave(128 + stopped.signum, stopped)


if __name__ == "__main__":
  main()
