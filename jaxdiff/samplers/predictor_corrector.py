"""Predictor-corrector sampling: after each step of a sampler, Markov steps at the time where it arrived.

    x_s = predictor(x_t);      x_s <- corrector(x_s, s)                                                         (1)

The Langevin corrector steps by the score at time s, with the noise of a signal-to-noise ratio r:

    x <- x + eta / 2 score(x, s) + sqrt(eta) z,      eta / 2 = 2 alpha_s^2 (r |z| / |score|)^2                  (2)
    with |z| = sqrt(d) and |score| = sqrt(d) / sigma_s:      eta = 4 (r alpha_s sigma_s)^2                      (3)

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, Algorithms 2-5 and Appendix G.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from jaxdiff import checks, keys
from jaxdiff.samplers.fixed_grid import Field, FixedGrid, Method, check_noise
from jaxdiff.sde import ScalarSDE, expand
from jaxdiff.typing import Scalar, State

# Data folded into a step's key for its corrector: a count that no draw of the predictor from that key reaches.
_CORRECTOR = 2**31 - 1


class Corrector(NamedTuple):
  """A Markov kernel that leaves p_t as it is, or nearly so.

  Attributes:
    step: `(field, x: [b, *d], t: [], keys: [b]) -> [b, *d]`, with `field.score(x, t)` for the network.
    nfe: network evaluations of one call.
  """

  step: Callable[[Field, State, Array, Key[Array, " b"]], State]
  nfe: int


def langevin_corrector(snr: Scalar = 0.16, steps: int = 1) -> Corrector:
  """Langevin steps by signal-to-noise ratio, eq. (3), for any process with scalar marginals.

  Norms of single examples in eq. (2) would give steps that depend on the state, whose stationary law is not p_t (and
  which are infinite where the score is 0); norms over a batch would tie an example to the others. So |z| becomes its
  root mean square, and |score| the largest root mean square that it can have, that of -eps / sigma, which data without
  spread reach: one step size for a time, stable for every snr below 1. For data with spread the steps are shorter than
  the paper's, by |score|^2 sigma^2 / d; for images at small noise, thin in most directions, they are about the same.
  alpha^2 is the cumulative alpha-bar of a DDPM chain, as in the paper, and 1 for VE and EDM. The paper's published code
  has 1 - beta_i in its place for VP, so that its steps are far longer at large noise: values of snr do not carry over.

  Args:
    snr: signal-to-noise ratio r.
    steps: Langevin steps, and network evaluations, after each step of the predictor.

  Returns:
    A `Corrector`.

  Raises:
    ValueError: for an snr that is not positive, negative steps.
    TypeError: for steps that are no integer.
  """
  if not isinstance(snr, jax.core.Tracer) and not 0 < float(snr) < float("inf"):
    raise ValueError(f"snr must be positive, the signal-to-noise ratio of a step such as 0.16; got {snr}")
  checks.whole("steps", steps, 0, "the Langevin steps after each step of the predictor")

  def correct(field: Field, x: State, t: Array, noise: Key[Array, " b"]) -> State:
    alpha, sigma = field.sde.marginal(t)
    root = expand(2 * snr * alpha * sigma, x)

    def step(i: Array, x: State) -> State:
      z = keys.normal(keys.fold_in(noise, i), x.shape, x.dtype)
      return x + 0.5 * root**2 * field.score(x, t) + root * z

    return jax.lax.fori_loop(0, int(steps), step, x)

  return Corrector(correct, int(steps))


def predictor_corrector(predictor: FixedGrid, corrector: Corrector, denoise: bool = False, path: int = 0) -> FixedGrid:
  """Sampler by the steps of another one, each followed by a corrector at the time where it arrived, eq. (1).

  Args:
    predictor: a sampler on a grid that steps from one state alone, made without `denoise` and `path`.
    corrector: `langevin_corrector(...)`, or a `Corrector` of yours; `langevin_corrector(steps=0)` does nothing.
    denoise: whether the last state becomes E[x_0 | x], at one more evaluation.
    path: 0 for no path, k to return every k-th state from x_T to the last; k divides the number of steps.

  Returns:
    sampler(key, x_T: [b, *d], score, cond={}) -> Sample, at the predictor's evaluations and `corrector.nfe` a step.

  Raises:
    ValueError: for a multistep predictor, one with `denoise` or `path`, a grid that ends without noise.
    TypeError: for a predictor that is no sampler on a grid, a corrector that is none, or a factory for either; for a
      process without scalar marginals.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VE(sigma_max=10.0)
    >>> predictor = jd.samplers.reverse_diffusion(sde, jd.time_grid(sde, 100))
    >>> sampler = jd.samplers.predictor_corrector(predictor, jd.samplers.langevin_corrector(snr=0.16))
    >>> sample = sampler(jax.random.key(1), sde.prior_sample(jax.random.key(0), (4, 2)), lambda x, t: -x)
    >>> sample.nfe.tolist()
    [200, 200, 200, 200]
  """
  checks.made("predictor", predictor, FixedGrid)
  checks.made("corrector", corrector, Corrector)
  sde, ts, method = predictor.sde, predictor.ts, predictor.method
  checks.made("the predictor's sde", sde, ScalarSDE)
  if predictor.denoise or predictor.path:
    raise ValueError("predictor must be made without denoise and path: give them to predictor_corrector instead")
  if jax.tree.leaves(jax.eval_shape(method.memory, jax.ShapeDtypeStruct((1, 1), jnp.result_type(float)))):
    raise ValueError(
      "predictor must step from one state alone, but this one remembers earlier steps, which a corrector makes untrue: "
      "take a one-step method such as reverse_diffusion"
    )
  check_noise(sde, ts[-1], "predictor_corrector")
  if method.to_data:
    raise ValueError("predictor must not end at the data of its chain, where there is no score: end its ts at 1")

  def step(field: Field, x: State, memory: Any, node: tuple[Array, Any], noise: Key[Array, " b"]) -> Any:
    t_next, interval = node
    x, memory = method.step(field, x, memory, interval, noise)
    return corrector.step(field, x, t_next, keys.fold_in(noise, _CORRECTOR)), memory

  calls = jnp.concatenate([method.calls, jnp.repeat(ts[1:], corrector.nfe)])
  return FixedGrid(sde, ts, Method(step, (ts[1:], method.nodes), calls, others=method.others), denoise, path)
