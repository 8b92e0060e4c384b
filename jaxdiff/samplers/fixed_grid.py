"""Sampling on a fixed grid of times: one `lax.scan` over the steps of a method.

A method is a pure function that carries the state over one interval of the grid, with all it needs to know of the
interval computed once. What every sampler shares lives here: noise that belongs to an example, the path, a last
denoising, the count of network evaluations, and the step at which an example ceased to be finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from jaxdiff import checks, keys, predictions, status
from jaxdiff.sde import SDE, ScalarSDE, batch_time
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State, Status, Time


class Field(NamedTuple):
  """What a step asks the network for: the score and the denoiser of one call, its conditions bound."""

  sde: Any
  network: ScoreFn
  cond: Cond

  def score(self, x: State, t: Time) -> State:
    """The score at (x, t)."""
    return checks.score(x, self.network(x, batch_time(t, x), **self.cond))

  def denoised(self, x: State, t: Time) -> State:
    """E[x_0 | x_t = x]."""
    return checks.score(x, predictions.denoised(self.sde, self.network, x, batch_time(t, x), **self.cond))

  def denoised_and_v(self, x: State, t: Time) -> tuple[State, State]:
    """E[x_0 | x_t = x] and the v of a learned variance, of one evaluation."""
    value, v = predictions.denoised_and_v(self.network, x, batch_time(t, x), **self.cond)
    return checks.score(x, value), checks.score(x, v)


class Method(NamedTuple):
  """How a sampler steps.

  Attributes:
    step: `(field, x, memory, node, keys) -> (x, memory)`: the state [b, *d] at the end of an interval, from that at its
      start; `keys` [b] are there for the noise of this step alone.
    nodes: what each step is given as `node`: a pytree of arrays [steps, ...].
    calls: the times `[n]` of the network evaluations of all steps, in any order.
    memory: what the first step is given as `memory`, from x_T: what a multistep method remembers; () for none.
    to_data: whether the last step ends at the data themselves, without noise, so that there is no score any more.
    others: evaluations of networks other than the score, of all steps.
  """

  step: Callable[[Field, State, Any, Any, Key[Array, " b"]], tuple[State, Any]]
  nodes: Any
  calls: Float[Array, " n"]
  memory: Callable[[State], Any] = lambda x: ()
  to_data: bool = False
  others: int | Array = 0


@dataclass(frozen=True, eq=False, repr=False)
class FixedGrid:
  """A sampler on a fixed grid: `sampler(key, x_T, score, cond={}) -> Sample`.

  Attributes:
    sde: the process.
    ts: its grid, decreasing times `[steps + 1]`.
    method: how to step.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k for every k-th state from x_T to the last; k divides the number of steps.

  Raises:
    ValueError: for a path that does not divide the number of steps, a last denoising where no noise is left.
    TypeError: for a path that is no integer.
  """

  sde: SDE
  ts: Float[Array, " n"]
  method: Method
  denoise: bool = False
  path: int = 0

  def __post_init__(self) -> None:
    checks.made("sde", self.sde, SDE)
    checks.made("method", self.method, Method)
    check_path(self.path, len(self.ts) - 1)
    if self.denoise:
      checks.made("sde", self.sde, ScalarSDE)
      check_noise(self.sde, self.ts[-1], "denoise=True")

  def __repr__(self) -> str:
    return f"{self.method.step.__qualname__.split('.')[0]}({type(self.sde).__name__}, {len(self.ts) - 1} steps)"

  def __call__(self, key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    checks.made("score", score)
    field = Field(self.sde, score, dict(cond))
    run = scan_steps(field, self.method, len(self.ts) - 1, self.path, key, x_T)
    nfe = total_evaluations(score, self.method.calls) + self.method.others
    sample = report(run.x, run.path, run.good, run.good == len(self.ts) - 1, nfe)
    if not self.denoise:
      return sample
    return replace_last(sample, field.denoised(run.x, self.ts[-1]), total_evaluations(score, self.ts[-1:]))


class Run(NamedTuple):
  """What `scan_steps` returns: the last state and memory, the path or None, how many steps stayed finite `[b]`."""

  x: State
  memory: Any
  path: Array | None
  good: Array


def scan_steps(field: Any, method: Method, steps: int, path: int, key: Keys, x_T: State) -> Run:
  """Run the steps of a method; step i of an example has the key `fold_in(key of the example, i)`."""
  example = keys.per_example(key, len(x_T))

  def step(carry: tuple[Array, Any, Array], node: tuple[Array, Any]) -> tuple[tuple[Array, Any, Array], None]:
    x, memory, good = carry
    i, interval = node
    x, memory = method.step(field, x, memory, interval, keys.fold_in(example, i))
    return (x, memory, jnp.where(finite(x) & (good == i), good + 1, good)), None

  def leg(carry: Any, nodes: Any) -> tuple[Any, Array]:
    carry, _ = jax.lax.scan(step, carry, nodes)
    return carry, carry[0]

  nodes = jnp.arange(steps), method.nodes
  carry = x_T, method.memory(x_T), jnp.zeros(len(x_T), nodes[0].dtype)
  states = None
  if path:
    legs = jax.tree.map(lambda leaf: leaf.reshape(-1, int(path), *leaf.shape[1:]), nodes)
    carry, states = jax.lax.scan(leg, carry, legs)
    states = jnp.concatenate([x_T[None], states])
  else:
    carry, _ = jax.lax.scan(step, carry, nodes)
  x, memory, good = carry
  return Run(x, memory, states, good)


def total_evaluations(score: ScoreFn, times: Float[Array, " n"]) -> int | Array:
  """Network evaluations of the calls of a score at all of these times."""
  each = predictions.evaluations(score, times)
  return len(times) * each if jnp.ndim(each) == 0 else jnp.sum(each)


def report(
  x: State, path: Array | None, accepted: Array, success: Array, nfe: int | Array, rejected: Array | None = None
) -> Sample:
  """A sample whose examples without success have met a value that is not finite."""
  code = jnp.where(success & finite(x), status.SUCCESS, status.NON_FINITE)
  rejected = jnp.zeros_like(accepted) if rejected is None else rejected
  return Sample(x, jnp.full(len(x), nfe), path, Status(code, accepted, rejected))


def replace_last(sample: Sample, x: State, nfe: int | Array) -> Sample:
  """The sample with x, which took `nfe` more evaluations, for its last state."""
  code = jnp.where(finite(x), sample.status.code, status.NON_FINITE)
  path = sample.path if sample.path is None else sample.path.at[-1].set(x)
  return Sample(x, sample.nfe + nfe, path, sample.status._replace(code=code))


def finite(x: State) -> Array:
  """Which examples hold finite values only, `[b]`."""
  return jnp.all(jnp.isfinite(x), axis=range(1, x.ndim))


def check_path(path: int, steps: int) -> None:
  """Refuse a path that is no integer, or does not divide the number of steps."""
  checks.whole("path", int(path) if isinstance(path, bool) else path, 0, "every how many steps a state is kept")
  if path and steps % path:
    raise ValueError(f"path must divide the number of steps, {steps}; got {path}")


def check_noise(sde: Any, t: Time, what: str) -> None:
  """Refuse a time without noise, where there is no score; a traced one passes."""
  with jax.ensure_compile_time_eval():
    silent = sde.marginal(t)[1] <= 0
  if not isinstance(silent, jax.core.Tracer) and silent:
    raise ValueError(f"{what} needs noise at its last time, but sigma is 0 at t = {t}: end the grid before")


def check_grid(ts: Float[Array, " n"], t1: Scalar) -> Float[Array, " n"]:
  """The grid, refused unless it is a decreasing sequence of at least two times in [0, t1]; a traced one passes."""
  ts = jnp.asarray(ts)
  if ts.ndim != 1 or len(ts) < 2:
    raise ValueError(f"ts must be [steps + 1] decreasing times, got shape {ts.shape}")
  if isinstance(ts, jax.core.Tracer) or isinstance(t1, jax.core.Tracer):
    return ts
  times = np.asarray(ts)
  if not np.all(times[1:] < times[:-1]):
    raise ValueError(
      f"ts must decrease from the prior's time to the data's, got {times}: make it with jaxdiff.time_grid"
    )
  if times[-1] < 0 or times[0] > float(t1):
    raise ValueError(f"ts must lie in [0, t1] = [0, {t1}], got {times[-1]} to {times[0]}")
  return ts


class Intervals(NamedTuple):
  """The intervals of a grid of a process with scalar marginals, from the prior to the data; arrays `[steps]`.

  `t`, `alpha`, `sigma` are those of the start of a step (the noisier end), those with `_next` of its end.
  """

  t: Float[Array, " steps"]
  t_next: Float[Array, " steps"]
  alpha: Float[Array, " steps"]
  sigma: Float[Array, " steps"]
  alpha_next: Float[Array, " steps"]
  sigma_next: Float[Array, " steps"]


def intervals(sde: ScalarSDE, ts: Float[Array, " n"]) -> Intervals:
  """What steps over these times need of the process, computed once."""
  with jax.ensure_compile_time_eval():
    alpha, sigma = sde.marginal(ts)
    # Where sigma is 0 its derivative by the process is often infinite: it is 0 whatever the process is.
    silent = jax.lax.stop_gradient(sigma) <= 0
    sigma = jnp.where(silent, 0.0, sde.marginal(jnp.where(silent, ts[0], ts))[1])
    return Intervals(ts[:-1], ts[1:], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
