"""Cascades: a small image is sampled, then a larger one given it, and a larger one given that.

    x_1 ~ p(x_1),    x_{k+1} ~ p(x_{k+1} | z, s),    z = sqrt(1 - s^2) x_k + s eps                                   (1)

The noise of level s hides in what x_k of a model differs from x_k of the data; `losses.noised_condition` trains the
larger models on such z and tells them s. With exact models the last image has the density of the data for every s.

References:
  Ho et al. 2022, Cascaded Diffusion Models for High Fidelity Image Generation, Section 3, non-truncated conditioning
  augmentation; Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models, Section 2.4.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdiff import checks, keys
from jaxdiff.editing.solves import Solve, check_downwards, joined
from jaxdiff.losses.noising import noised
from jaxdiff.sde import SDE
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State


def upsampler(
  sde: SDE, sampler: Solve, shape: tuple[int, ...], image: str, level: str | None = None, augmentation: Scalar = 0.0
) -> Solve:
  """A stage of a cascade, eq. (1): larger images of a model that is told smaller ones.

  Args:
    sde: the process, whose prior the sampler starts from.
    sampler: any sampler, from `sde.t1`.
    shape: of one image that it makes, such as (64, 64, 3).
    image: name of the condition by which the network is told the small image.
    level: name of the condition `[b]` by which it is told s; None where it knows none.
    augmentation: the level s of noise on the small image, in [0, 1).

  Returns:
    upsample(key, small: [b, *d], score, cond={}) -> Sample of x [b, *shape], at the evaluations of the sampler; the
    network is told `cond`, the image and the level.

  Raises:
    ValueError: for an augmentation outside [0, 1), or one without a level by which the network is told it; when called,
      for a cond that has the image or the level already.
    TypeError: for a chain or factory given as process, what is no sampler.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.ddim(sde, jd.time_grid(sde, 10))
    >>> upsample = jd.editing.upsampler(sde, sampler, (8, 8, 1), "small", "level", augmentation=0.2)
    >>> score = lambda x, t, small, level: jax.image.resize(small, x.shape, "linear") - x
    >>> jax.eval_shape(lambda x: upsample(jax.random.key(0), x, score), jnp.zeros((2, 4, 4, 1))).x.shape
    (2, 8, 8, 1)
  """
  checks.made("sde", sde, SDE)
  check_downwards("sampler", sampler)
  if not isinstance(augmentation, jax.core.Tracer) and not 0 <= augmentation < 1:
    raise ValueError(f"augmentation must lie in [0, 1), the level of noise on the small image; got {augmentation}")
  told_level = {} if level is None else {level: augmentation}
  if level is None and (isinstance(augmentation, jax.core.Tracer) or augmentation > 0):
    raise ValueError(f"augmentation={augmentation} needs level, the name of the condition by which the network is told")

  def upsample(key: Keys, small: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("small", small, cond)
    if taken := sorted({image, *told_level} & cond.keys()):
      raise ValueError(f"cond has {', '.join(map(repr, taken))}, which this stage makes itself: leave it out")
    noise_key, prior_key, path_key = keys.split(keys.per_example(key, len(small)), 3)
    levels = {name: jnp.full(len(small), s, small.dtype) for name, s in told_level.items()}
    z = noised(noise_key, small, levels[level]) if level is not None else small
    x_T = sde.prior_sample(prior_key, (len(small), *shape))
    return sampler(path_key, x_T, score, {**cond, image: z, **levels})

  return upsample


def cascade(stages: Sequence[Solve]) -> Callable[..., Sample]:
  """Stages in a row, eq. (1): each starts from what the one before it made.

  Args:
    stages: first a sampler, then `upsampler(...)`s; anything `(key, x, score, cond) -> Sample` is a stage.

  Returns:
    sample(key, x_T: [b, *d], scores, cond={}) -> Sample of the last stage, at the evaluations of all, from the prior
    x_T of the first. `scores` has one score a stage; all are told `cond`. Stage i of an example has the key
    `fold_in(key of the example, i)`. The path, where there is one, is that of the last stage.

  Raises:
    ValueError: for no stages; when called, for another number of scores.
    TypeError: for a stage that is no function, one score where a sequence is due.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde, key = jd.VP(), jax.random.key(0)
    >>> sampler = jd.samplers.ddim(sde, jd.time_grid(sde, 10))
    >>> larger = jd.editing.upsampler(sde, sampler, (8, 8, 1), "small")
    >>> scores = lambda x, t: -x, lambda x, t, small: jax.image.resize(small, x.shape, "linear") - x
    >>> draw = jax.jit(lambda key, x_T: jd.editing.cascade([sampler, larger])(key, x_T, scores))
    >>> sample = draw(key, sde.prior_sample(key, (2, 4, 4, 1)))
    >>> sample.x.shape, sample.nfe.tolist()
    ((2, 8, 8, 1), [20, 20])
  """
  stages = tuple(stages)
  if not stages:
    raise ValueError("stages must hold at least one sampler, got none")
  for i, stage in enumerate(stages):
    check_downwards(f"stages[{i}]", stage)

  def sample(key: Keys, x_T: State, scores: Sequence[ScoreFn], cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    if not isinstance(scores, tuple | list):
      raise TypeError(f"scores must be a list or tuple of one score a stage, got {type(scores).__name__}")
    if len(scores) != len(stages):
      raise ValueError(f"scores must hold one score a stage, {len(stages)}; got {len(scores)}")
    example = keys.per_example(key, len(x_T))
    made = stages[0](keys.fold_in(example, 0), x_T, scores[0], cond)
    for i in range(1, len(stages)):
      made = joined(made, stages[i](keys.fold_in(example, i), made.x, scores[i], cond))
    return made

  return sample
