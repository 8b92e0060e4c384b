"""How each step of the work is done: the fields of the sections of a config that make no component."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How to train. Steps count updates; every n-th step of 0 means never.

  `random_flip` mirrors half of the images left to right. `ema_decay` is that of the usual moving average, `ema_lengths`
  are relative widths of power-function averages, of which snapshots allow any other width afterwards.

  On the devices: `launcher` is what spreads a step over them; `fsdp` how many share one copy of the state (jit alone);
  `microbatches` the parts that a batch is worked through in; `steps_per_dispatch` the steps of one call.

  `drop_conditions` is the probability with which an example is trained without its conditions.

  `keep` of the newest checkpoints stay and every `keep_every`-th step. `max_skipped` steps in a row may be without
  finite loss and gradient. `wandb` is a project to report to.
  """

  batch_size: int = 128
  steps: int = 1000
  ema_decay: float = 0.999
  ema_lengths: tuple[float, ...] = ()
  random_flip: bool = False
  launcher: Literal["jit", "pmap"] = "jit"
  fsdp: int = 1
  microbatches: int = 1
  steps_per_dispatch: int = 1
  max_skipped: int = 10
  drop_conditions: float = 0.0
  log_every: int = 50
  checkpoint_every: int = 500
  keep: int = 3
  keep_every: int | None = None
  snapshot_every: int = 500
  sample_every: int = 0
  validate_every: int = 0
  validate_examples: int = 1024
  wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
  """What the latents of a diffusion are of: the run of an autoencoder, or one that is trained together with the prior.

  `workdir` is that run. What it was, the sections `network` and `loss` and the `fingerprint` of its parameters, is
  written into the config of the diffusion, whose checkpoints hold the parameters themselves: it needs the directory no
  more, and refuses another autoencoder in it. Without `workdir`, `network` and `loss` are trained by the loss "lsgm".
  """

  network: Mapping[str, Any] | None = None
  loss: Mapping[str, Any] | None = None
  workdir: str | Path | None = None
  fingerprint: str | None = None


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """How many samples to draw, how many at a time, how many trajectories to show, and whether to animate them.

  Where the model has conditions, sample k is given those of example k of the `split`; but for the class `label`, or of
  several labels number k mod n, and the text `prompt`, where they are given.
  `threshold` keeps the data prediction within [-1, 1]: "static" by clipping, "dynamic" by the quantile 0.995.
  `ema_length` is the relative width of a power-function average, made of the snapshots of the run; None for the usual
  average.
  """

  num: int = 100
  batch_size: int = 100
  split: str = "test"
  label: int | tuple[int, ...] = ()
  prompt: str | tuple[str, ...] = ()
  trajectories: int = 6
  seed: int = 0
  threshold: Literal["none", "static", "dynamic"] = "none"
  gif: bool = False
  ema_length: float | None = None


@dataclasses.dataclass(frozen=True)
class GuidanceSettings:
  """What the samples of a trained model are guided by; of likelihoods it is no part.

  `scale` is gamma in gamma s(x | y) + (1 - gamma) s(x): 1 is the conditional model without guidance. With the directory
  of a run of a `classifier` it is the factor of the gradient of log p(y | x), 1 if it is left out; with that of a
  `weak` model the one in gamma s + (1 - gamma) s_weak. Outside of `interval`, low < sigma / alpha <= high, there is no
  guidance. `rescale` is the share in which the guided data prediction is given the spread of the conditional one.
  """

  scale: float | None = None
  classifier: str | Path | None = None
  weak: str | Path | None = None
  interval: tuple[float, ...] = ()
  rescale: float = 0.0


@dataclasses.dataclass(frozen=True)
class EditSettings:
  """What to do with which images: of `num` results each, in a file, a folder or the array `x` of an .npz file.

  "inpaint" paints anew where the image `mask` is white; "colorize" colours what is grey; "superres" enlarges; "deblur"
  undoes a Gaussian `blur` of so many pixels, periodic at the borders; "sdedit" noises and samples again, so much of
  the steps as `strength` says. With `degrade` the images are clean ones, degraded first, made smaller by `factor` (2).
  The measurement has noise of a standard deviation `noise` in [-1, 1]: 0 but for "deblur", 1/255. `method` is that of
  the restoration. Images of another size are cropped and resized by area averages where `resize` says so.
  """

  task: Literal["inpaint", "colorize", "superres", "deblur", "sdedit"]
  input: str | Path
  mask: str | Path | None = None
  method: Literal["pigdm", "reconstruction", "dps", "projection", "repaint"] = "pigdm"
  strength: float = 0.6
  blur: float = 1.0
  factor: int = 2
  noise: float | None = None
  degrade: bool = False
  resize: bool = False
  num: int = 4
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
  """What to evaluate: a split, or its first `limit` examples (0 for all); how many at a time.

  The variational bound is averaged over `bound_draws` evaluations of the network an example; 0 leaves it out. Integers
  are dequantized `draws` times, "auto" as the loss had them: uniformly, or by the noise of the process where it took
  the integers themselves. `importance` averages probabilities over the draws instead of their logarithms. In float64
  the parameters, the data, the process and the network are so. `ema_length` as in `SampleSettings`.
  """

  split: str = "test"
  limit: int = 0
  bound_draws: int = 32
  batch_size: int = 120
  seed: int = 0
  dequantization: Literal["auto", "uniform", "truncated_normal", "gaussian"] = "auto"
  draws: int = 1
  importance: bool = False
  dtype: Literal["float32", "float64"] = "float32"
  ema_length: float | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """How to measure samples: how many, how many at a time, against which held-out split and up to how many training
  examples (0 for all), by which features, and k of the neighbours of precision and recall, density and coverage.

  `weights` is the path of the file that the features "mobilenet" and "inception" need. `ema_length` as in
  `SampleSettings`. Of a classifier: how many held-out examples (0 for all), of which split, how many at a time.
  """

  num: int = 1000
  batch_size: int = 120
  split: str = "test"
  reference: int = 50_000
  features: Literal["auto", "cnn", "raw", "mobilenet", "inception"] = "auto"
  weights: str | None = None
  manifold_k: int = 3
  coverage_k: int = 5
  seed: int = 0
  ema_length: float | None = None
