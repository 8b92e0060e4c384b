"""Samples and likelihoods of a whole run: in batches of one shape, sharded over the devices of a mesh.

Sample k and the likelihood of example k depend on their own key only: batch size and number of devices do not matter.
The mesh may span several processes, which then all call the same and all get the same.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdiff import keys, parallel
from jaxdiff.data.examples import Source
from jaxdiff.typing import Cond, Keys, Params, ScoreFn, State

Batch = Mapping[str, Any]
Decode = Callable[[Params, State], State]

_SAMPLING, _LIKELIHOOD = 2, 3  # streams of a seed; training takes 1


@runtime_checkable
class Prior(Protocol):
  """What has a prior, as every process does."""

  def prior_sample(self, key: Keys, shape: tuple[int, ...]) -> State: ...


class Given(NamedTuple):
  """What samples are told: sample k what example k is, and after the last again the first; or what is stated.

  Attributes:
    source: the examples; None where everything is stated.
    cond: from a batch of them and of what is stated to the conditions of the score.
    stated: arrays by name, in the place of those of the examples; sample k has entry k mod n of n.
  """

  source: Source | None
  cond: Callable[[Batch], Cond]
  stated: Mapping[str, np.ndarray] = MappingProxyType({})

  def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """What samples of these numbers are told of."""
    examples = {} if self.source is None else self.source.gather(numbers % len(self.source))
    return examples | {name: values[numbers % len(values)] for name, values in self.stated.items()}


def _sampling_key(seed: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), _SAMPLING)


def sampling(
  score: Callable[[Params], ScoreFn],
  sde: Prior,
  sampler: Callable[..., Any],
  shape: tuple[int, ...],
  batch_size: int,
  seed: int,
  mesh: Mesh,
  given: Given | None = None,
  decode: Decode | None = None,
) -> Callable[[Params, int], dict[str, np.ndarray]]:
  """What draws a batch of samples: from parameters, replicated over the mesh, and the first of the samples to the
  arrays of `draw` for `batch_size`.

  It is compiled once for all parameters.
  """

  def one_batch(params: Params, example: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    prior_key, path_key = keys.split(example)
    x_T = sde.prior_sample(prior_key, (len(example), *shape))
    sample = sampler(path_key, x_T, score(params), {} if given is None else given.cond(batch))
    x = sample.x if decode is None else decode(params, sample.x)
    return {"x": x, "nfe": sample.nfe, "code": sample.status.code, "accepted": sample.status.accepted}

  sharded = parallel.shard_examples(one_batch, mesh)
  run = jax.jit(
    lambda params, start, batch: sharded(params, keys.example_keys(_sampling_key(seed), start, batch_size), batch),
    out_shardings=parallel.batch_sharding(mesh),
  )

  def draw(params: Params, start: int) -> dict[str, np.ndarray]:
    batch = {} if given is None else given.rows(start + np.arange(batch_size))
    return parallel.to_host(run(params, np.int32(start), _placed(batch, mesh)))

  return draw


def _placed(batch: Batch, mesh: Mesh) -> dict[str, Array]:
  """The rows of a batch on the devices of all processes."""
  split = parallel.batch_sharding(mesh)
  place = lambda host: jax.make_array_from_callback(host.shape, split, lambda index: host[index])
  return {name: place(host) for name, host in batch.items()}


def drawer(
  score: Callable[[Params], ScoreFn],
  params: Params,
  sde: Prior,
  sampler: Callable[..., Any],
  shape: tuple[int, ...],
  batch_size: int,
  seed: int,
  mesh: Mesh,
  given: Given | None = None,
  decode: Decode | None = None,
) -> Callable[[int], dict[str, np.ndarray]]:
  """`sampling` of one model: from the first of the samples to the arrays."""
  run = sampling(score, sde, sampler, shape, batch_size, seed, mesh, given, decode)
  params = parallel.replicate(mesh, params)
  return lambda start: run(params, start)


def draw(
  score: Callable[[Params], ScoreFn],
  params: Params,
  sde: Prior,
  sampler: Callable[..., Any],
  shape: tuple[int, ...],
  num: int,
  batch_size: int,
  seed: int,
  mesh: Mesh,
  given: Given | None = None,
  decode: Decode | None = None,
) -> dict[str, np.ndarray]:
  """Draw `num` samples.

  Args:
    score: makes the score, or the vector field, of parameters.
    params: the parameters.
    sde: the process, or what else has a prior.
    sampler: from `jaxdiff.samplers`, without path.
    shape: of one state of the process.
    num: how many samples.
    batch_size: how many at a time, divisible by the number of devices.
    seed: of the samples.
    mesh: the devices.
    given: the conditions, where the model has some.
    decode: `(params, x) -> x`, from states of the process to data; None where they are the data.

  Returns:
    Arrays `x [num, *shape]`, `nfe [num]`, `code [num]` (0 where the solve succeeded) and `accepted [num]`.
  """
  batch = drawer(score, params, sde, sampler, shape, batch_size, seed, mesh, given, decode)
  parts = []
  with tqdm(total=num, unit="sample", desc="sampling", disable=None if jax.process_index() == 0 else True) as bar:
    for start in range(0, num, batch_size):
      parts.append(batch(start))
      bar.update(min(batch_size, num - start))
  return {name: np.concatenate([part[name] for part in parts])[:num] for name in parts[0]}


def trajectories(
  score: Callable[[Params], ScoreFn],
  params: Params,
  sde: Prior,
  sampler: Callable[..., Any],
  shape: tuple[int, ...],
  num: int,
  seed: int,
  given: Given | None = None,
  decode: Decode | None = None,
) -> np.ndarray:
  """The paths `[n, num, *shape]` of the first `num` samples of `draw`, by the same sampler with its path."""

  @jax.jit
  def run(params: Params, batch: Batch) -> jax.Array:
    prior_key, path_key = keys.split(keys.example_keys(_sampling_key(seed), 0, num))
    cond = {} if given is None else given.cond(batch)
    path = sampler(path_key, sde.prior_sample(prior_key, (num, *shape)), score(params), cond).path
    return path if decode is None else jax.lax.map(lambda x: decode(params, x), path)

  return np.asarray(run(params, {} if given is None else given.rows(np.arange(num))))


def evaluation(
  one_batch: Callable[[Params, Array, Batch], dict[str, Array]], source: Source, batch_size: int, seed: int, mesh: Mesh
) -> Callable[[Params, int], dict[str, np.ndarray]]:
  """What evaluates a batch of a source: from parameters, replicated over the mesh, and the first of the examples to
  arrays `[batch_size]`.

  It is compiled once for all parameters.

  Args:
    one_batch: `(params, keys [b], batch) -> arrays [b]`, example by example.
    source: the examples; a batch beyond their end is filled up by the last one.
    batch_size: how many at a time, divisible by the number of devices.
    seed: of the noise of the evaluation.
    mesh: the devices.

  Returns:
    `(params, start) -> arrays [batch_size]`, named as those of `one_batch`, and `index`: which examples they are.
  """
  key, sharded = jax.random.fold_in(jax.random.key(seed), _LIKELIHOOD), parallel.shard_examples(one_batch, mesh)
  run = jax.jit(
    lambda params, start, batch: sharded(params, keys.example_keys(key, start, batch_size), batch),
    out_shardings=parallel.batch_sharding(mesh),
  )

  def batch(params: Params, start: int) -> dict[str, np.ndarray]:
    rows = start + np.arange(batch_size)
    batch = _placed(source.gather(np.minimum(rows, len(source) - 1)), mesh)
    return {**parallel.to_host(run(params, np.int32(start), batch)), "index": rows}

  return batch


def evaluator(
  one_batch: Callable[[Params, Array, Batch], dict[str, Array]],
  params: Params,
  source: Source,
  batch_size: int,
  seed: int,
  mesh: Mesh,
) -> Callable[[int], dict[str, np.ndarray]]:
  """`evaluation` of one model: from the first of the examples to the arrays."""
  run, params = evaluation(one_batch, source, batch_size, seed, mesh), parallel.replicate(mesh, params)
  return lambda start: run(params, start)
