"""SDEdit: an image is noised to a time between data and prior, and sampled from there.

    x_t = alpha_t x_0 + sigma_t z,    z ~ N(0, I),    then from t to the data by any sampler                         (1)

The noise hides what is finer than it; the sampler fills that in anew, as the data have it, and coarser structure stays.
A later t gives more of the data, an earlier one more of the image: t is that of the first node of the sampler's grid.
Once more from the result, and again, carries an image that is far from the data (a few strokes) nearer to them.

References:
  Meng et al. 2022, SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Section 3 and
  Algorithm 1, and for (1) of a process that preserves variance, repeated, their appendix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import checks, keys
from jaxdiff.editing.solves import check_downwards
from jaxdiff.samplers.fixed_grid import FixedGrid
from jaxdiff.sde import ScalarSDE, perturb
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, ScoreFn, State, Status


def lower_part(ts: Any, strength: float) -> Any:
  """The part of a grid next to the data that takes a fraction of its steps, for `sdedit`.

  `strength` is the fraction of steps, rounded to whole steps and at least one: on a grid uniform in t from the prior
  it is the time itself as a part of t1, on others (uniform in log-SNR) it is not.

  Args:
    ts: decreasing times `[steps + 1]` from `jd.time_grid`, or decreasing steps of a chain, an array or a sequence.
    strength: in (0, 1]: 1 the whole grid, near 0 its last step.

  Returns:
    The last `max(1, round(strength * steps)) + 1` of ts.

  Raises:
    ValueError: for a strength outside (0, 1], a grid of less than two times.

  Example:
    >>> import jaxdiff as jd
    >>> list(jd.editing.lower_part(range(1000, -1, -100), 0.3))
    [300, 200, 100, 0]
  """
  if not 0 < strength <= 1:
    raise ValueError(f"strength must lie in (0, 1], the fraction of the steps that are taken; got {strength}")
  if len(ts) < 2:
    raise ValueError(f"ts must hold at least two times, from noise to the data; got {len(ts)}")
  steps = len(ts) - 1
  return ts[steps - max(1, round(strength * steps)) :]


def sdedit(sampler: FixedGrid, repeats: int = 1) -> Callable[..., Sample]:
  """Editor by eq. (1): the image is noised to the first time of the sampler's grid, and sampled from there.

  Args:
    sampler: any sampler on a grid of times, `reverse_sde` in the paper, made on the lower part of a grid by
      `lower_part(ts, strength)`.
    repeats: how many times in a row it is noised and sampled.

  Returns:
    edit(key, x0: [b, *d], score, cond={}) -> Sample, at `repeats` times the evaluations of the sampler, each repetition
    with noise of its own. The path, where the sampler keeps one, is that of the last repetition.

  Raises:
    ValueError: for repeats below 1, a sampler whose times rise; when called, as the sampler does.
    TypeError: for a sampler without a grid of times or of a process without scalar marginals, repeats that are no
      integer.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde, key = jd.VP(), jax.random.key(0)
    >>> ts = jd.editing.lower_part(jd.time_grid(sde, 20), 0.5)
    >>> edit = jd.editing.sdedit(jd.samplers.ddim(sde, ts))
    >>> sample = jax.jit(edit)(key, jax.random.normal(key, (4, 8, 8, 1)), jax.tree_util.Partial(lambda x, t: -x))
    >>> sample.x.shape, sample.nfe.tolist()
    ((4, 8, 8, 1), [10, 10, 10, 10])
  """
  check_downwards("sampler", sampler)
  if not (hasattr(sampler, "ts") and hasattr(sampler, "sde")):
    raise TypeError(
      "sampler must be one on a grid of times, such as samplers.reverse_sde(sde, ts), which starts from the noise of "
      f"ts[0]; got {type(sampler).__name__}"
    )
  sde: Any = sampler.sde
  checks.made("sampler.sde", sde, ScalarSDE)
  checks.whole("repeats", repeats, 1, "how many times the image is noised and sampled")

  def edit(key: Keys, x0: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x0", x0, cond)
    example = keys.per_example(key, len(x0))

    def again(x: State, i: Array) -> tuple[State, Sample]:
      noise_key, path_key = keys.split(keys.fold_in(example, i))
      x_t, _ = perturb(noise_key, x, sampler.ts[0], sde)
      sample = sampler(path_key, x_t, score, cond)
      return sample.x, sample

    x, each = jax.lax.scan(again, x0, jnp.arange(repeats))
    path = None if each.path is None else each.path[-1]
    code, (accepted, rejected) = jnp.max(each.status.code, axis=0), (jnp.sum(n, axis=0) for n in each.status[1:])
    return Sample(x, jnp.sum(each.nfe, axis=0), path, Status(code, accepted, rejected))

  return edit
