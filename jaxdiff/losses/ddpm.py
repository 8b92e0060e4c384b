"""The objectives of DDPM: the evidence lower bound of a discrete chain, and its simplification.

    -log p(x_0) <=  KL(q(x_T | x_0) || p(x_T))                                                      prior           (1)
                    + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                  kl              (2)
                    - E log p(x_0 | x_1)                                                            reconstruction  (3)

with p(x_{t-1} | x_t) = N(mean(x_t, eps_hat), s_t^2). Coordinate by coordinate, with q = log(s_t^2 / beta~_t),

    KL_t = 1/2 [ q + exp(-q) - 1 + exp(-q) w_t (eps_hat - eps)^2 ],   w_t = beta_t / ((1 - beta_t) sigma_{t-1}^2)    (4)

References:
  Ho et al. 2020, Denoising Diffusion Probabilistic Models, eq. 5 for (1) to (3), eq. 8 and 12 for (4), eq. 14; Nichol &
  Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, Section 3.1; Bao et al. 2022, Analytic-DPM.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxdiff import checks, keys, predictions
from jaxdiff.ddpm import Chain
from jaxdiff.losses import chain as chains
from jaxdiff.losses import decoders
from jaxdiff.losses.chain import Evaluation, sum_dims
from jaxdiff.losses.score_matching import Loss
from jaxdiff.predictions import Prediction
from jaxdiff.sde import expand
from jaxdiff.typing import NO_COND, Cond, Keys, Network, State

Variance = Literal["beta", "beta_tilde", "optimal", "learned"]
Aux = dict[str, Float[Array, " b"]]


def ddpm_simple(
  chain: Chain, prediction: Prediction = predictions.noise(), first: int = 1, stratified: bool = True
) -> Loss:
  """L_simple: half the squared error of the noise, summed over dimensions, at a step drawn uniformly from first..T.

  The paper's has no half. The value is that of `losses.denoising(chain.sde(), prediction)` at times t / T.

  Args:
    chain: the chain.
    prediction: what the network outputs; the error is that of the noise it implies.
    first: 1, or 2 to leave out the step next to the data.
    stratified: whether the steps of a batch are spread evenly rather than drawn one by one.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux), as `losses.denoising`; x0 is scaled data, such as
    [-1, 1], and the network is called at time t / T: `chain.index` gives the step. aux: "t", the time, and
    "noise_error", the mean squared error of the noise per dimension.

  Raises:
    ValueError: for another `first`; when called, for stratified steps without a batch to stratify.
    TypeError: when called, for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.ddpm_simple(jd.ddpm.Chain(jd.ddpm.linear_betas()))
    >>> network = jax.tree_util.Partial(lambda x, t: jnp.zeros_like(x))
    >>> value, aux = jax.eval_shape(loss, jax.random.key(0), jnp.zeros((8, 2)), network)
    >>> value.shape
    (8,)

  References:
    Ho et al. 2020, eq. 14.
  """
  chains.check_made(chain, Chain, prediction)
  if first not in (1, 2) or first > chain.steps:
    raise ValueError(f"first must be 1 or 2 and a step of the chain, which has {chain.steps}; got {first}")
  return chains.denoising(chain, prediction, first, stratified)


class _Bound(NamedTuple):
  """The numbers and options of a bound; its methods are the three parts of it, each `[b]` in nats."""

  chain: Chain
  prediction: Prediction
  variance: Variance
  data_variance: ArrayLike
  levels: int | None
  data_range: tuple[float, float]
  prior: tuple[ArrayLike, ArrayLike] | None
  decoder: Callable[[Array, State], Float[Array, " b"]] | None

  @property
  def parts(self) -> int:
    return 2 if self.variance == "learned" else 1

  def scaled(self, x: Array) -> State:
    if self.levels is not None:
      return decoders.integer_values(x, self.levels, self.data_range).astype(self.chain.betas.dtype)
    chains.check_floating(x)
    return x

  def evaluate(self, key: Keys, x0: State, t: Int[Array, " b"], network: Network, cond: Cond) -> Evaluation:
    return chains.evaluate(self.chain, self.prediction, key, x0, t, network, cond, self.parts)

  def log_variance(self, found: Evaluation, t: Int[Array, " b"]) -> State:
    """log s_t^2, with as many axes as the data."""
    if self.variance == "learned":
      return self.chain.interpolated_log_variance(0.5 * (found.rest[0] + 1), t)
    if self.variance == "optimal":
      return expand(jnp.log(self.chain.optimal_variance(t, self.data_variance)), found.x_t)
    v = jnp.full(t.shape, float(self.variance == "beta"), self.chain.betas.dtype)
    return expand(self.chain.interpolated_log_variance(v, t), found.x_t)

  def prior_kl(self, x0: State) -> Float[Array, " b"]:
    """(1)."""
    alpha, sigma = self.chain.marginal(self.chain.steps)
    mean, variance = (0.0, 1.0) if self.prior is None else self.prior
    mean, variance = (jnp.broadcast_to(jnp.asarray(v, sigma.dtype), x0.shape) for v in (mean, variance))
    q = jnp.log(variance) - 2 * jnp.log(sigma)
    return 0.5 * sum_dims(q + jnp.expm1(-q) + (alpha * x0.astype(sigma.dtype) - mean) ** 2 / variance)

  def step_kl(self, found: Evaluation, t: Int[Array, " b"]) -> Float[Array, " b"]:
    """(4), 0 at t = 1."""
    beta, before = self.chain.variance("beta", t), jnp.where(t > 1, self.chain.marginal(t - 1)[1], 1.0)
    weight = beta / ((1 - beta) * before**2)
    tilde = self.chain.interpolated_log_variance(jnp.zeros_like(beta), t)
    q = self.log_variance(found, t) - expand(tilde, found.x_t)
    kl = 0.5 * sum_dims(q + jnp.expm1(-q) + jnp.exp(-q) * expand(weight, found.x_t) * found.error**2)
    return jnp.where(t > 1, kl, 0.0)

  def reconstruction(self, x: Array, found: Evaluation, t: Int[Array, " b"]) -> Float[Array, " b"]:
    """(3); at other steps than t = 1 a number to be thrown away."""
    if self.decoder is not None:
      return -self.decoder(x, found.x_t)
    mean = self.chain.reverse_mean(found.x_t, found.noise, t)
    log_std = 0.5 * self.log_variance(found, t)
    if self.levels is None:
      return -decoders.gaussian_log_prob(x.astype(mean.dtype), mean, jnp.exp(log_std))
    return -decoders.discretized_gaussian_log_prob(x, mean, log_std, self.levels, self.data_range)

  def drawn(self, x: Array, found: Evaluation, t: Int[Array, " b"]) -> tuple[Array, Array]:
    """(2) and (3), estimated from one step t uniform on 1..T."""
    reconstruction = jnp.where(t == 1, self.reconstruction(x, found, t), 0.0)
    return self.chain.steps * self.step_kl(found, t), self.chain.steps * reconstruction

  def summed(self, key: Keys, x: Array, x0: State, network: Network, cond: Cond) -> tuple[Array, Array]:
    """(2) and (3), from all steps, each with noise of its own."""

    def at(step: Array) -> tuple[Evaluation, Array]:
      t = jnp.broadcast_to(step, x0.shape[:1])
      return self.evaluate(keys.fold_in(key, step), x0, t, network, cond), t

    def add(total: Array, step: Array) -> tuple[Array, None]:
      return total + self.step_kl(*at(step)), None

    start = jnp.zeros(len(x0), self.chain.betas.dtype)
    kl, _ = jax.lax.scan(add, start, jnp.arange(2, self.chain.steps + 1))
    return kl, self.reconstruction(x, *at(jnp.int32(1)))

  def total(self, prior: Array, kl: Array, reconstruction: Array, dimension: int) -> tuple[Array, Aux]:
    total = prior + kl + reconstruction
    parts = {"prior": prior, "kl": kl, "reconstruction": reconstruction, "bits_per_dim": total}
    return total, {name: value / (dimension * math.log(2)) for name, value in parts.items()}


def ddpm_elbo(
  chain: Chain,
  prediction: Prediction = predictions.noise(),
  variance: Variance = "beta",
  data_variance: ArrayLike | None = None,
  levels: int | None = None,
  data_range: tuple[float, float] = (-1.0, 1.0),
  prior: tuple[ArrayLike, ArrayLike] | None = None,
  reconstruction: Callable[[Array, State], Float[Array, " b"]] | None = None,
  every_step: bool = False,
  stratified: bool = True,
) -> Loss:
  """The evidence lower bound: an upper bound on -log p(x_0), in nats, of the chain run backwards.

  With `levels` the data are integers and the bound is on their probability; x_0 is then `decoders.level_values[x]`.
  Without, it is on a density, and p(x_0 | x_1) is a Gaussian.

  Args:
    chain: the chain.
    prediction: what the network outputs.
    variance: s_t^2 of the reverse steps: "beta"; "beta_tilde", whose s_1^2 is beta~_2 (beta~_1 is 0; beta_1 if T = 1);
      "optimal" (`Chain.optimal_variance`, needs `data_variance`); or "learned": the network returns twice the channels
      in the last axis, the second half 2 v - 1 for `Chain.interpolated_log_variance`, not limited to [-1, 1].
    data_variance: eigenvalues `[k]` of the covariance of the data, or one for all; for "optimal" alone.
    levels: how many values an integer of the data can take; None for continuous data.
    data_range: (low, high), where the integers go.
    prior: mean and variance of p(x_T), numbers or arrays that broadcast to x_0; None for N(0, I).
    reconstruction: `(x, x_1) -> [b]`, log p(x | x_1) in nats, x as the loss is given it; None for a Gaussian (with
      `levels`, its integral over the cell of the integer) of the mean and variance of the reverse step at t = 1.
    every_step: sum all T steps, with T network evaluations, instead of T times one step drawn uniformly from 1..T. The
      one step is unbiased, at a large variance: the sum is for evaluation.
    stratified: whether the steps of a batch are spread evenly rather than drawn one by one.

  Returns:
    loss(key, x, network, cond={}, u=None) -> (bound [b] in nats, aux), as `losses.denoising`. aux, in bits per
    dimension: "prior", "kl" and "reconstruction" of the module docstring, and their sum "bits_per_dim".

  Raises:
    ValueError: for an unknown variance, "optimal" without data_variance or the reverse; when called, for a network
      with another number of channels, a u with every_step, or stratified steps without a batch to stratify.
    TypeError: when called, for integers without `levels`, or the reverse.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> chain = jd.ddpm.Chain(jd.ddpm.cosine_betas(20))
    >>> exact = lambda x, t: chain.sde().marginal(t)[1][:, None] * x  # the noise to expect in data N(0, I)
    >>> loss = jd.losses.ddpm_elbo(chain, every_step=True)
    >>> bound, aux = jax.eval_shape(lambda x: loss(jax.random.key(0), x, exact), jnp.zeros((1, 1)))
    >>> bound.shape, sorted(aux)
    ((1,), ['bits_per_dim', 'kl', 'prior', 'reconstruction'])

  References:
    Ho et al. 2020, eq. 5 and 13; Nichol & Dhariwal 2021, eq. 15; Bao et al. 2022, Theorem 1.
  """
  chains.check_made(chain, Chain, prediction)
  if levels is not None:
    checks.levels(levels, data_range)
  if variance not in ("beta", "beta_tilde", "optimal", "learned"):
    raise ValueError(f"variance must be 'beta', 'beta_tilde', 'optimal' or 'learned', got {variance!r}")
  if (variance == "optimal") != (data_variance is not None):
    raise ValueError(f"variance='optimal', and no other, needs data_variance; got {variance!r} and {data_variance}")
  bound = _Bound(
    chain,
    prediction,
    variance,
    1.0 if data_variance is None else data_variance,
    levels,
    data_range,
    prior,
    reconstruction,
  )

  def loss(
    key: Keys, x0: Array, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], Aux]:
    scaled = bound.scaled(x0)
    noise_key, step_key = keys.split(keys.per_example(key, len(x0)))
    if every_step:
      if u is not None:
        raise ValueError("u places one step per example, but every_step=True sums all: pass u=None")
      terms = bound.summed(noise_key, x0, scaled, network, cond)
    else:
      t = chains.draw_steps(chain, key, step_key, u, 1, stratified)
      terms = bound.drawn(x0, bound.evaluate(noise_key, scaled, t, network, cond), t)
    return bound.total(bound.prior_kl(scaled), *terms, dimension=x0[0].size)

  return loss


def ddpm_hybrid(
  chain: Chain,
  prediction: Prediction = predictions.noise(),
  levels: int | None = None,
  weight: float = 5e-4,
  data_range: tuple[float, float] = (-1.0, 1.0),
  stratified: bool = True,
) -> Loss:
  """L_simple + weight * L_vlb, for a network that learns its variance: the bound moves the variance alone.

  The means enter the bound behind a stop-gradient, so they are trained by L_simple; both parts share one step and one
  network evaluation. L_simple is half of the paper's, so its lambda = 1e-3 is weight = 5e-4. To sample, give
  `score_fn` the first half of the output: `lambda params, x, t: apply(params, x, t)[..., :channels]`.

  Args:
    chain: the chain.
    prediction: what the first half of the network's output means; the second half is 2 v - 1, as in `ddpm_elbo`.
    levels: how many values an integer of the data can take; None for continuous data.
    weight: of the bound, in nats summed over the dimensions, T times the term of one step.
    data_range: (low, high), where the integers go.
    stratified: whether the steps of a batch are spread evenly rather than drawn one by one.

  Returns:
    loss(key, x, network, cond={}, u=None) -> (loss [b], aux), as `losses.denoising`. aux: "t" and "noise_error" of
    `ddpm_simple`, and "prior", "kl", "reconstruction" and "bits_per_dim" of `ddpm_elbo`.

  Raises:
    ValueError: for a weight that is not positive; when called, for a network without twice the channels.
    TypeError: when called, for integers without `levels`, or the reverse.

  References:
    Nichol & Dhariwal 2021, eq. 15 and 16.
  """
  chains.check_made(chain, Chain, prediction)
  if levels is not None:
    checks.levels(levels, data_range)
  if not weight > 0:
    raise ValueError(f"weight must be positive, or the variance is not trained; got {weight}")
  bound = _Bound(chain, prediction, "learned", 1.0, levels, data_range, None, None)

  def loss(
    key: Keys, x0: Array, network: Network, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], Aux]:
    scaled = bound.scaled(x0)
    noise_key, step_key = keys.split(keys.per_example(key, len(x0)))
    t = chains.draw_steps(chain, key, step_key, u, 1, stratified)
    found = bound.evaluate(noise_key, scaled, t, network, cond)
    frozen = found._replace(noise=jax.lax.stop_gradient(found.noise), error=jax.lax.stop_gradient(found.error))
    vlb, aux = bound.total(bound.prior_kl(scaled), *bound.drawn(x0, frozen, t), dimension=x0[0].size)
    squared = sum_dims(found.error**2)
    aux |= {"t": chain.time(t), "noise_error": squared / x0[0].size}
    return 0.5 * squared + weight * vlb, aux

  return loss
