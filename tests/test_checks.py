"""Mistakes that are easily made are named, with what to do instead."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from oracles import PREDICTIONS, SDES

import jaxdiff as jd
from jaxdiff import losses, predictions
from jaxdiff.losses import times, weights
from jaxdiff.schedules import start_time

pytestmark = pytest.mark.usefixtures("untyped")
SDE, NOISE, KEY = jd.VP(), PREDICTIONS["noise"], jax.random.key(0)
X = jnp.ones((4, 2))


def apply(params, x, t, **cond):
  return x


def score(x, t, **cond):
  return -x


@pytest.mark.parametrize(
  ("make", "call"),
  [
    (lambda: jd.score_fn(apply, None, SDE, predictions.noise), r"prediction is a factory.*: predictions.noise\(\)"),
    (lambda: jd.score_fn(apply, None, SDE, predictions.edm), r"prediction is a factory.*: predictions.edm\(\)"),
    (lambda: jd.score_fn(apply, None, jd.VP, NOISE), r"sde is a class.*: VP\(\)"),
    (lambda: losses.denoising(jd.LinearSDE, NOISE), r"sde is a class.*: LinearSDE\(\)"),
    (lambda: losses.denoising(SDE, predictions.data), r"prediction is a factory.*: predictions.data\(\)"),
    (lambda: losses.denoising(SDE, NOISE, weights.likelihood), r"weight is a factory.*: weights.likelihood\(\)"),
    (lambda: losses.denoising(SDE, NOISE, time=times.importance), r"time is a factory.*: times.importance\(\)"),
    (lambda: jd.likelihood.log_prob(jd.EDM), r"sde is a class.*: EDM\(\)"),
    (lambda: jd.likelihood.log_prob(SDE, jd.divergence.exact), r"divergence is a factory.*: divergence.exact\(\)"),
    (
      lambda: jd.likelihood.bits_per_dim(jd.likelihood.log_prob, 2),
      r"log_prob is a factory.*: likelihood.log_prob\(\)",
    ),
    (lambda: jd.samplers.reverse_sde(jd.VE, jnp.ones(2)), r"sde is a class.*: VE\(\)"),
    (lambda: jd.samplers.probability_flow(jd.VE), r"sde is a class.*: VE\(\)"),
    (lambda: jd.time_grid(jd.VP, 10), r"sde is a class.*: VP\(\)"),
  ],
)
def test_what_was_not_called_is_named(make, call):
  with pytest.raises(TypeError, match=call):
    make()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: losses.denoising(NOISE, SDE), "sde must be a ScalarSDE, got Prediction, which lacks diffuse"),
    (lambda: losses.denoising(SDE, "noise"), "prediction must be a Prediction, got str"),
    (lambda: losses.denoising(SDE, NOISE, times.uniform()), "weight must be a function of .sde, t., got Times"),
    (lambda: jd.likelihood.log_prob(SDE, "exact"), "divergence must be a Divergence, got str"),
  ],
)
def test_another_kind_of_thing_is_refused(make, message):
  with pytest.raises(TypeError, match=message):
    make()


def test_what_a_user_made_passes():
  prediction = predictions.Prediction(*NOISE)
  weight = lambda sde, t: t
  losses.denoising(SDE, prediction, weight, times.Times(times.uniform().place, False))
  assert jd.score_fn(apply, None, SDE, prediction)(X, 0.5).shape == X.shape


@pytest.mark.parametrize(
  "make",
  [
    lambda: jd.VP(beta_min=-0.1),
    lambda: jd.VP(beta_min=2.0, beta_max=1.0),
    lambda: jd.VP(0.0, 0.0),
    lambda: jd.SubVP(beta_max=float("nan")),
    lambda: jd.CosineVP(log_snr_min=0.0),
    lambda: jd.VE(sigma_min=0.0),
    lambda: jd.VE(sigma_min=1.0, sigma_max=1.0),
    lambda: jd.EDM(sigma_max=0),
    lambda: jd.EDM(sigma_max=float("inf")),
  ],
)
def test_numbers_of_no_process_are_refused(make):
  with pytest.raises(ValueError, match=r"(VP|SubVP|CosineVP|VE|EDM) needs finite numbers with .*, got \w+\("):
    make()


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_a_process_as_a_pytree_may_hold_anything(sde):
  for leaf in (None, 0, -1.0, object(), (), jnp.zeros(3)):
    assert isinstance(jax.tree.map(lambda _, leaf=leaf: leaf, sde), type(sde))
  jax.eval_shape(lambda sde: sde, sde)
  jax.vmap(lambda sde, x: x, in_axes=(None, 0))(sde, X)
  jax.grad(lambda sde: 0.0)(sde)
  again = jax.tree.unflatten(jax.tree.structure(sde), jax.tree.leaves(sde))
  assert again == sde
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(sde)]
  assert paths == [f".{name}" for name in vars(sde)]


@dataclass(frozen=True)
class Own:
  """A user's VP: a class whose parts are lent by another process."""

  inverse: object = SDE.time_of_log_snr
  t1 = 1.0
  drift, diffuse, diffusion = SDE.drift, SDE.diffuse, SDE.diffusion
  marginal, prior_sample, prior_log_prob = SDE.marginal, SDE.prior_sample, SDE.prior_log_prob

  def time_of_log_snr(self, log_snr):
    return self.inverse(log_snr)


def test_a_process_that_is_no_pytree_is_refused_by_score_fn():
  with pytest.raises(TypeError, match=r"Own is none: put @jax.tree_util.register_dataclass and @dataclass"):
    jd.score_fn(apply, None, Own(), NOISE)


@pytest.mark.parametrize("t0", [None, 0.1])
def test_a_wrong_inverse_is_refused(t0):
  assert start_time(Own(), t0, 1e-3) == start_time(SDE, t0, 1e-3)
  with pytest.raises(ValueError, match=r"Own.time_of_log_snr must be the inverse of log\(alpha\^2 / sigma\^2\)"):
    start_time(Own(lambda log_snr: SDE.time_of_log_snr(0.5 * log_snr)), t0, 1e-3)
  clipped = Own(lambda log_snr: jnp.maximum(SDE.time_of_log_snr(log_snr), 1e-3))
  assert start_time(clipped, None, 1e-3) == jnp.float32(1e-3)


@pytest.mark.parametrize(
  "make", [jd.likelihood.log_prob, jd.samplers.probability_flow, lambda sde: jd.time_grid(sde, 5)]
)
def test_noise_that_a_process_never_gets_to_is_named(make):
  with pytest.raises(ValueError, match=r"never gets to sigma / alpha = 0.00[12] before its last time, t1 = 0.0001"):
    make(jd.EDM(sigma_max=1e-4))


VERBS = {  # one call of each, of a state and its condition
  "x0": lambda x, cond: losses.denoising(SDE, NOISE)(KEY, x, score, cond),
  "x0 of log_prob": lambda x, cond: jd.likelihood.log_prob(SDE)(KEY, x, score, cond),
  "x_T": lambda x, cond: jd.samplers.reverse_sde(SDE, jd.time_grid(SDE, 2))(KEY, x, score, cond),
  "x_T of the flow": lambda x, cond: jd.samplers.probability_flow(SDE)(KEY, x, score, cond),
}


@pytest.mark.parametrize("name", VERBS)
def test_states_and_conditions_of_no_batch_are_refused(name):
  call, argument = VERBS[name], name.split()[0]
  with pytest.raises(TypeError, match=f"{argument} must be floating point, got uint8: .*likelihood"):
    call(X.astype(jnp.uint8), {})
  with pytest.raises(TypeError, match=rf"{argument} must be an array \[b, \*d\], got tuple"):
    call((X, X), {})
  with pytest.raises(ValueError, match=f"{argument} must have a leading batch axis"):
    call(jnp.ones(()), {})
  with pytest.raises(
    ValueError, match=r"cond\['label'\] must have one entry per example, \[4, ...\]; got shape \(3,\)"
  ):
    call(X, {"label": jnp.arange(3)})
  with pytest.raises(ValueError, match=r"cond\['scale'\] must have .* got shape \(\): what is the same .* network"):
    call(X, {"scale": 2.0})
  with pytest.raises(TypeError, match="cond must be a dict of arrays .*, got ArrayImpl"):
    call(X, jnp.arange(4))


def test_lengths_of_u_and_t_are_checked():
  with pytest.raises(ValueError, match=r"u must be one number per example, \[4\]; got shape \(3,\)"):
    losses.denoising(SDE, NOISE)(KEY, X, score, u=jnp.zeros(3))
  for call in (lambda t: jd.perturb(KEY, X, t, SDE), lambda t: jd.score_fn(apply, None, SDE, NOISE)(X, t)):
    with pytest.raises(ValueError, match=r"t must be a scalar or one time per example, \[4\]; got shape \(3,\)"):
      call(jnp.full(3, 0.5))
  with pytest.raises(TypeError, match="x0 must be floating point, got int32"):
    jd.perturb(KEY, jnp.ones((4, 2), jnp.int32), 0.5, SDE)


def test_arguments_of_samplers_and_grids_are_checked():
  for eta in (-0.5, jnp.float32(-1.0), float("nan")):
    with pytest.raises(ValueError, match="eta must be at least 0"):
      jd.samplers.reverse_sde(SDE, jd.time_grid(SDE, 2), eta=eta)
    with pytest.raises(ValueError, match="eta must be at least 0"):
      jd.reverse(SDE, score, eta)
  jax.jit(lambda eta: jd.samplers.reverse_sde(SDE, jd.time_grid(SDE, 2), eta)(KEY, X, score).x)(0.5)
  with pytest.raises(TypeError, match="steps must be an integer, got 10.0"):
    jd.time_grid(SDE, 10.0)
  with pytest.raises(ValueError, match=r"kind must be .* got 'logsnr'; did you mean 'log_snr'\?"):
    jd.time_grid(SDE, 10, "logsnr")
