"""Projection: after every step of a sampler, what was measured is replaced by the measurement, noised to that time.

    x_s <- x_s + A^+ (alpha y + sigma A z - A x_s),                                      z ~ N(0, I)                 (1)
    x_s <- x_s + A^+ (alpha y + sqrt(sigma^2 - alpha^2 noise_std^2 / g) A z - A x_s)     while that root is real     (2)

at (alpha, sigma) of the step's end. A mask makes (1) the imputation of the known pixels. (2) counts the noise that y
has already, which is noise_std^2 / g along every measured direction, A A^T = g I; below that level of noise y is
nothing but a noisy x_s, and the sampler denoises it with the rest. At the end all is denoised, and without noise y is
put in:

    x_0 <- x_0 + A^+ (y - A x_0)                                                                                     (3)

Known bias. The unknown values hear of y through states whose noise z is new at every step, and too late: for two values
of variance 1 and correlation 0.8, of which the first is measured as y without noise, the second has the posterior
N(0.8 y, 0.36), and its samples N(0.50 y, 0.49) however many the steps. `repaint` mends it.

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, Appendix I.2 and I.3, for (1); (2) is its extension to
  noise, for a mask the marginal of q(x_s | x_0).
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxdiff import checks, keys
from jaxdiff.inverse.operators import Operator, check_noise_std, measured, pseudo_inverse
from jaxdiff.samplers.fixed_grid import FixedGrid, intervals, replace_last
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import NO_COND, Cond, Keys, Sample, Scalar, ScoreFn, State

# Data folded into a step's key for the noise of (1): a count that no draw of a sampler from that key reaches.
KNOWN_NOISE = 2**31 - 2
# By which share of its size what was measured may differ from the measurement at the end.
_OFF = 1e-2


class Projection:
  """Eqs. (1) to (3) for the measurement of one call of a sampler."""

  def __init__(self, operator: Operator, noise_std: Scalar, y: Array, own: Cond) -> None:
    self.operator, self.y, self.own = operator, y, own
    self.level = noise_level(operator, noise_std)

  def __call__(self, x: State, z: State | None, alpha: Scalar, sigma: Scalar) -> State:
    """x with what was measured replaced, at (alpha, sigma); z: noise `[b, *d]`, None at the data."""
    apply = lambda x: self.operator.apply(x, **self.own)
    alpha, sigma, level = (jnp.asarray(value, x.dtype) for value in (alpha, sigma, self.level))
    room = sigma**2 - (alpha * level) ** 2
    known = expand(alpha, self.y) * self.y
    if z is not None:
      known = known + expand(jnp.sqrt(jnp.maximum(room, 0.0)), self.y) * apply(z)
    # In this order, so that what a mask knows is exactly that; compared, because x - x need not be 0 where a compiler
    # fuses the difference with the product that x is (a multiply-add does not round the product).
    back = pseudo_inverse(self.operator, apply(x), self.own)
    rest = jnp.where(back == x, 0.0, x - back)
    return jnp.where(room >= 0, rest + pseudo_inverse(self.operator, known, self.own), x)

  def at_data(self, x: State) -> State:
    """Eq. (3); NaN where it fails: by rounding, if the sampler has left all bounds."""
    put = self(x, None, 1.0, 0.0)
    size = lambda x: jnp.sqrt(jnp.sum(self.operator.apply(x, **self.own) ** 2, axis=range(1, self.y.ndim)))
    known = pseudo_inverse(self.operator, self.y, self.own)
    obeys = (size(put - known) <= _OFF * (size(known) + size(jnp.abs(put)))) | (self.level > 0)
    return jnp.where(obeys.reshape(-1, *(1,) * (x.ndim - 1)), put, jnp.nan)


def projected(sampler: FixedGrid, operator: Operator, noise_std: Scalar = 0.0) -> Any:
  """Sampler by the steps of another one, each followed by the projection (1) or (2).

  Args:
    sampler: on a grid, each step from one state alone. Whether it denoises at the end does not matter: if its grid ends
      with noise, this does, at one more evaluation.
    operator: A, such as `jd.inverse.mask()`.
    noise_std: standard deviation of the measurement's noise.

  Returns:
    sampler(key, x_T: [b, *d], score, cond) -> Sample, where cond holds the measurement and what belongs to the
    operator. With noise_std = 0 A x = y, bit for bit where A is a mask or a crop.

  Raises:
    ValueError: for a multistep sampler, a negative noise_std, or one above 0 for an operator without a gain, such as a
      blur; when called, for cond without the measurement, or one of another shape than A x.
    TypeError: for a sampler that is not on a grid.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.inverse.projected(
    ...   jd.samplers.ancestral(sde, jd.time_grid(sde, 20)), jd.inverse.mask(jnp.asarray([1, 0]))
    ... )
    >>> cond, score = {"measurement": jnp.asarray([[0.5, jnp.nan]])}, jax.tree_util.Partial(lambda x, t: -x)
    >>> float(jax.jit(sampler)(jax.random.key(0), jnp.ones((1, 2)), score, cond).x[0, 0])
    0.5
  """
  check_sampler(sampler)
  check_noise(operator, noise_std)
  sde, method = sampler.sde, sampler.method
  alpha, sigma = marginals(sampler)
  nodes = method.nodes, alpha[1:], sigma[1:]

  def run(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    y, own, told = measured(operator, x_T, cond)
    project = Projection(operator, noise_std, y, own)

    def step(field: Any, x: State, memory: Any, node: Any, noise: Array) -> Any:
      interval, alpha, sigma = node
      x, memory = method.step(field, x, memory, interval, noise)
      return project(x, noise_of(noise, KNOWN_NOISE, x), alpha, sigma), memory

    steps = method._replace(step=step, nodes=nodes)
    sample = FixedGrid(sde, sampler.ts, steps, ends_noisy(sampler), sampler.path)(key, x_T, score, told)
    return replace_last(sample, project.at_data(sample.x), 0)

  return run


def consistent(sampler: Any, operator: Operator) -> Any:
  """Sampler whose samples obey the measurement exactly: at the end, and only there, eq. (3).

  Args:
    sampler: any, such as one that is given a score of `pigdm`.
    operator: A.

  Returns:
    sampler(key, x_T: [b, *d], score, cond) -> Sample, at the evaluations of the sampler; A x = y, bit for bit where A
    is a mask or a crop. cond, measurement included, is passed on as it is.

  Raises:
    ValueError: when called, for cond without the measurement, or one of another shape than A x.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> sde, operator = jd.VP(), jd.inverse.mask(jnp.asarray([1, 0]))
    >>> sampler = jd.inverse.consistent(jd.samplers.ddim(sde, jd.time_grid(sde, 20)), operator)
    >>> score = jd.inverse.pigdm(lambda x, t: -x, operator, sde=sde)
    >>> restore = jax.jit(lambda key, x_T, y: sampler(key, x_T, score, {"measurement": y}))
    >>> float(restore(jax.random.key(0), jnp.ones((1, 2)), jnp.full((1, 2), 0.5)).x[0, 0])
    0.5
  """
  checks.made("sampler", sampler)
  checks.made("operator", operator, Operator)

  def run(key: Keys, x_T: State, score: ScoreFn, cond: Cond = NO_COND) -> Sample:
    checks.batch("x_T", x_T, cond)
    y, own, _ = measured(operator, x_T, cond)
    sample = sampler(key, x_T, score, cond)
    return replace_last(sample, Projection(operator, 0.0, y, own).at_data(sample.x), 0)

  return run


def check_sampler(sampler: Any) -> None:
  """Refuse a sampler that is not on a grid, or whose steps remember earlier ones."""
  checks.made("sampler", sampler, FixedGrid)
  checks.made("the sampler's sde", sampler.sde, ScalarSDE)
  if jax.tree.leaves(jax.eval_shape(sampler.method.memory, jax.ShapeDtypeStruct((1, 1), jnp.result_type(float)))):
    raise ValueError(
      "sampler must step from one state alone, but this one remembers earlier steps, which a change of the state makes "
      "untrue: take a one-step method such as samplers.ancestral or samplers.ddim"
    )


def check_noise(operator: Any, noise_std: Any) -> None:
  """Refuse a negative noise_std, and noise where A A^T = g I does not hold."""
  checks.made("operator", operator, Operator)
  check_noise_std(noise_std)
  if operator.gain is None and (isinstance(noise_std, jax.core.Tracer) or noise_std != 0):
    raise ValueError(
      f"noise_std={noise_std} needs an operator with a gain, A A^T = g I, which a blur does not have: take pigdm or dps"
    )


def noise_level(operator: Operator, noise_std: Scalar) -> Scalar:
  """Standard deviation of the noise of A^+ y along a measured direction."""
  return 0.0 if operator.gain is None else noise_std / operator.gain**0.5


def marginals(sampler: FixedGrid) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
  """(alpha, sigma) at the times of a sampler; those of the data themselves, (1, 0), where its last step ends there."""
  at = intervals(cast(ScalarSDE, sampler.sde), sampler.ts)
  with jax.ensure_compile_time_eval():
    alpha = jnp.append(at.alpha, 1.0 if sampler.method.to_data else at.alpha_next[-1])
    sigma = jnp.append(at.sigma, 0.0 if sampler.method.to_data else at.sigma_next[-1])
    return alpha, sigma


def ends_noisy(sampler: FixedGrid) -> bool:
  """Whether there is noise left to be denoised at the end of the grid; True where that is not known yet."""
  with jax.ensure_compile_time_eval():
    silent = cast(ScalarSDE, sampler.sde).marginal(sampler.ts[-1])[1] <= 0
  return not sampler.method.to_data and (isinstance(silent, jax.core.Tracer) or not bool(silent))


def noise_of(noise: Array, use: int, x: State) -> State:
  """Noise `[b, *d]` of a step's keys, for a use of its own."""
  return keys.normal(keys.fold_in(noise, use), x.shape, x.dtype)
