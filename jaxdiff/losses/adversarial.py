"""Adversarial training of few steps: a generator and a discriminator of the steps of a denoising chain.

For t uniform on 1..T, x_t ~ q(x_t | x_0) and q(x_{t-1} | x_t, x_0) the posterior of `ddpm.Chain`,

    real   x_{t-1} ~ q(x_{t-1} | x_t, x_0)                                                                          (1)
    fake   x'_{t-1} ~ q(x_{t-1} | x_t, G(x_t, z, t)),   z ~ N(0, I)                                                 (2)
    L_D    softplus(-D(x_{t-1}, x_t, t)) + softplus(D(x'_{t-1}, x_t, t)) + R_1                                      (3)
    R_1    r1 / 2 |grad_{x_{t-1}} D(x_{t-1}, x_t, t)|^2                                                             (4)
    L_G    softplus(-D(x'_{t-1}, x_t, t))                                                                           (5)

The best D is log q(x_{t-1} | x_t) - log p(x_{t-1} | x_t), where (3) without R_1 is 2 log 2 - 2 JSD(q, p): with it G
brings p, which needs not be Gaussian, to the true denoising distribution. z is what makes p more than one point.

The loss of an example is L_D + L_G: each network is a constant in the term of the other, so that one gradient, taken
once, is that of L_G for the generator and of L_D for the discriminator. Both are therefore updated at the same time,
on the same x_t and fakes; the paper takes turns, at two evaluations of the generator and two draws a step. That the
simultaneous updates converge, where R_1 is there, is as true as of turns (Mescheder et al. 2018, Section 4).

References:
  Xiao et al. 2022, Tackling the Generative Learning Trilemma with Denoising Diffusion GANs, Section 3; Goodfellow et
  al. 2014, Generative Adversarial Nets, Theorem 1, for the best D, and Section 3 for (5); Mescheder et al. 2018, Which
  Training Methods for GANs do actually Converge?, Section 4, for (4); Karras et al. 2020, Analyzing and Improving the
  Image Quality of StyleGAN, Section 3.1, for leaving it out most of the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxdiff import checks, keys
from jaxdiff.ddpm import Chain
from jaxdiff.losses import chain as chains
from jaxdiff.sde import batch_time
from jaxdiff.typing import NO_COND, Cond, Keys, Scalar, State, Step

Aux = dict[str, Float[Array, " b"]]
Logits = Callable[[Any, State], Float[Array, "b ..."]]


class Players(NamedTuple):
  """Two networks that are trained against each other, each `jax.tree_util.Partial(apply, params)`.

  Attributes:
    generator: what makes the fakes.
    discriminator: what tells them from the real ones: its logits are positive for what it takes for real.
  """

  generator: Any
  discriminator: Any


@runtime_checkable
class AdversarialLoss(Protocol):
  """`loss(key, x0: [b, *d], players, cond={}, u=None, step=None) -> (per-example [b], aux)`."""

  def __call__(
    self,
    key: Keys,
    x0: Array,
    players: Players,
    /,
    cond: Cond = NO_COND,
    u: Float[Array, " b"] | None = None,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, " b"], Aux]: ...


def denoising_gan(
  chain: Chain, latent_dim: int, r1: Scalar = 0.05, r1_every: int = 16, stratified: bool = True
) -> AdversarialLoss:
  """The two losses of a denoising diffusion GAN, one number per example: (3) + (5).

  Args:
    chain: a chain of few steps, such as `Chain(vp_betas(4))`.
    latent_dim: size of z.
    r1: weight of R_1, in units of 1 over the square of those of the data.
    r1_every: R_1 is there at every so-manieth step alone, that many times as heavy; needs the step.
    stratified: whether the steps t of a batch are spread evenly rather than drawn one by one.

  Returns:
    loss(key, x0: [b, *d], players, cond={}, u=None, step=None) -> (loss [b], aux). `players` are `Players` of
    a generator (x_t, time, latent=z: [b, latent_dim], **cond) -> x_0, of the shape of x_t, and
    a discriminator (x_{t-1}, time, x_t=x_t, **cond) -> logits [b], or a map of them [b, ...], over which all is a mean.
    Both are told the time of x_t, `chain.time(t)`, as networks of scores are. `key` and `u` as in `denoising`; `step`
    is the training step, None for R_1 at its own weight. aux: "generator_loss" (5); "discriminator_loss", (3) without
    R_1; "r1", what R_1 adds; "real_logit" and "fake_logit".

  Raises:
    ValueError: for a latent_dim or r1_every below 1, a negative r1; when called, for cond with the names "latent" or
      "x_t", a network that returns another shape, or stratified steps without a batch to stratify.
    TypeError: when called, for a discriminator that is no pytree, such as a closure, whose parameters the generator's
      term would move, too; for integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.denoising_gan(jd.ddpm.Chain(jd.ddpm.vp_betas(4)), latent_dim=2)
    >>> generator = jax.tree_util.Partial(lambda params, x, t, latent: params * latent, jnp.float32(0.5))
    >>> discriminator = jax.tree_util.Partial(lambda params, x, t, x_t: params * jnp.sum(x - x_t, 1), jnp.float32(0.0))
    >>> value, aux = jax.jit(loss)(jax.random.key(0), jnp.ones((8, 2)), jd.losses.Players(generator, discriminator))
    >>> round(float(value[0]), 4)  # three times log 2: undecided
    2.0794
  """
  checks.made("chain", chain, Chain)
  checks.whole("latent_dim", latent_dim, 1, "the size of z")
  checks.whole("r1_every", r1_every, 1)
  if not isinstance(r1, jax.core.Tracer) and not r1 >= 0:
    raise ValueError(f"r1 must not be negative, got {r1}")

  def loss(
    key: Keys,
    x0: Array,
    players: Players,
    /,
    cond: Cond = NO_COND,
    u: Float[Array, " b"] | None = None,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, " b"], Aux]:
    checks.batch("x0", x0, cond, u)
    _check_players(players)
    noising, latent, real_key, fake_key, step_key = keys.split(keys.per_example(key, len(x0)), 5)
    t = chains.draw_steps(chain, key, step_key, u, 1, stratified)
    x_t, _ = chain.perturb(noising, x0, t)
    real = chain.sample_posterior(real_key, x0, x_t, t)
    data = generated(chain, players.generator, latent, latent_dim, x_t, t, cond)
    fake = chain.sample_posterior(fake_key, data, x_t, t)

    def logits(discriminator: Callable[..., Array], x: State) -> Float[Array, "b ..."]:
      return checked_logits(x, discriminator(x, chain.time(t), x_t=x_t, **cond))

    aux = opposed(logits, players.discriminator, real, fake)
    penalty = every(r1_every, step, lambda: r1 * half_squared_gradient(logits, players.discriminator, real), x0)
    return aux["generator_loss"] + aux["discriminator_loss"] + penalty, {**aux, "r1": penalty}

  return loss


def patch_adversarial(
  loss: Callable[..., tuple[Float[Array, " b"], Aux]],
  reconstruct: Callable[[Keys, State, Any], State],
  weight: Scalar,
  start: int = 0,
) -> Callable[..., tuple[Float[Array, " b"], Aux]]:
  """The loss of an autoencoder whose reconstructions are to pass for real before a discriminator of patches.

      loss + weight L_G + L_D,   real = x,   fake = its reconstruction

  with (3), without R_1, and (5), both a mean over the logits of all patches.

  Args:
    loss: `(key, x, autoencoder, **more) -> ([b], aux)`.
    reconstruct: `(key, x: [b, *d], autoencoder) -> [b, *d]`, of the same key as the loss: what both compute alike is
      computed once.
    weight: of L_G, in units of the loss.
    start: the training step before which neither L_G nor L_D acts.

  Returns:
    adversarial(key, x, players, step=None, **more) -> (loss [b], aux). `players` are `Players` of the autoencoder and a
    discriminator x -> logits [b, ...]; whatever else is given is handed to the loss. Without a step all acts. aux:
    that of the loss, "generator_loss", "discriminator_loss", "real_logit" and "fake_logit".

  Raises:
    ValueError: for a weight that is not positive, a negative start; when called, for a reconstruction of another shape.
    TypeError: when called, for a discriminator that is no pytree, or integer data.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> squares = lambda key, x, halve: (jnp.sum((x - halve(x)) ** 2, axis=1), {})
    >>> loss = jd.losses.patch_adversarial(squares, lambda key, x, halve: halve(x), weight=0.1)
    >>> halve, undecided = (jax.tree_util.Partial(lambda p, x: p * x, jnp.float32(p)) for p in (0.5, 0.0))
    >>> value, aux = loss(jax.random.key(0), jnp.ones((3, 4)), jd.losses.Players(halve, undecided))
    >>> round(float(value[0]), 4)  # 1 + 2.1 log 2
    2.4556

  References:
    Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis, Section 3.1; Isola et al. 2017,
    Image-to-Image Translation with Conditional Adversarial Networks, Section 3.2, for patches.
  """
  checks.made("loss", loss)
  checks.whole("start", start, 0)
  if not isinstance(weight, jax.core.Tracer) and not weight > 0:
    raise ValueError(f"weight must be positive, got {weight}")

  def adversarial(
    key: Keys, x: State, players: Players, /, step: Int[Array, ""] | None = None, **more: Any
  ) -> tuple[Float[Array, " b"], Aux]:
    checks.batch("x", x)
    _check_players(players)
    value, aux = loss(key, x, players.generator, **more)
    fake = checks.score(x, reconstruct(key, x, players.generator), "reconstruct")
    game = opposed(lambda discriminator, x: checked_logits(x, discriminator(x)), players.discriminator, x, fake)
    added = weight * game["generator_loss"] + game["discriminator_loss"]
    return value + (added if step is None else jnp.where(step >= start, added, 0.0)), {**aux, **game}

  return adversarial


def generated(
  chain: Chain, generator: Callable[..., Array], key: Keys, latent_dim: int, x_t: State, t: Step, cond: Cond
) -> State:
  """G(x_t, z, t) with z ~ N(0, I) `[b, latent_dim]` of each example's key, told the time of x_t."""
  if taken := sorted({"latent", "x_t"} & cond.keys()):
    raise ValueError(f"cond has {taken[0]!r}, by which the networks are told something else: take another name")
  z = keys.normal(keys.per_example(key, len(x_t)), (len(x_t), latent_dim), x_t.dtype)
  return checks.score(x_t, generator(x_t, batch_time(chain.time(t), x_t), latent=z, **cond), "generator")


def opposed(logits: Logits, discriminator: Any, real: State, fake: State) -> Aux:
  """(3) without R_1 and (5), whose gradients go to the discriminator alone and to the fakes alone, and mean logits."""
  of_real, of_fake = logits(discriminator, real), logits(discriminator, jax.lax.stop_gradient(fake))
  fooled = logits(jax.lax.stop_gradient(discriminator), fake)
  return {
    "generator_loss": _mean(jax.nn.softplus(-fooled)),
    "discriminator_loss": _mean(jax.nn.softplus(-of_real)) + _mean(jax.nn.softplus(of_fake)),
    "real_logit": _mean(of_real),
    "fake_logit": _mean(of_fake),
  }


def half_squared_gradient(logits: Logits, discriminator: Any, real: State) -> Float[Array, " b"]:
  """(4) over r1, of the mean of a map of logits."""
  gradient = jax.grad(lambda x: jnp.sum(_mean(logits(discriminator, x))))(jax.lax.stop_gradient(real))
  return 0.5 * jnp.sum(gradient**2, axis=range(1, gradient.ndim))


def every(
  period: int, step: Int[Array, ""] | None, value: Callable[[], Float[Array, " b"]], x: State
) -> Float[Array, " b"]:
  """The value, or period times it at every period-th step and 0, without its cost, at the others."""
  if step is None or period == 1:
    return value()
  return jax.lax.cond(step % period == 0, lambda: period * value(), lambda: jnp.zeros(len(x), x.dtype))


def checked_logits(x: State, value: Array) -> Float[Array, "b ..."]:
  """What a discriminator returns for x, in the type of x; refused unless it has an entry per example."""
  if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f"discriminator must return floats, got {getattr(value, 'dtype', type(value).__name__)}")
  if value.shape[:1] != x.shape[:1]:
    raise ValueError(f"discriminator must return logits [b] or [b, ...] for x {x.shape}; got {value.shape}")
  return value.astype(x.dtype)


def _mean(values: Float[Array, "b ..."]) -> Float[Array, " b"]:
  return jnp.mean(values, axis=range(1, values.ndim))


def _check_players(players: Any) -> None:
  checks.made("players", players, Players)
  if not callable(players.discriminator) or jax.tree_util.all_leaves([players.discriminator]):
    raise TypeError(
      f"discriminator must be a function and a pytree, got {type(players.discriminator).__name__}: pass "
      "jax.tree_util.Partial(apply, params), so that gradients can spare its parameters"
    )
