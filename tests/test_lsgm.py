"""The joint bound of autoencoder and prior: against closed forms of Gaussians, its gradients part by part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_gaussian import LATENTS, MODEL, X, gap
from oracles import SDES, compiled

import jaxdiff as jd
from jaxdiff import latents
from jaxdiff.losses import LatentModel, observations, times, weights
from jaxdiff.schedules import start_time

SHORT = jd.VP(0.1, 3.0)  # far from its prior at t1
CASES = {name: SDES[name] for name in ("vp", "edm")} | {"short": SHORT}  # vp and short share their programs
MEAN, VARIANCE = np.array([1.1, -0.2]), np.array([0.3, 0.1])
ONE_BY_ONE = times.importance(stratified=False)
KEY = jax.random.key(0)
NOTHING = MODEL.observation._replace(log_prob=lambda x, output: jnp.zeros(len(x), output.dtype))


def smallest(name):
  """t0: where half of the cross-entropy of the short process is the prior's cost."""
  return 0.4 if name == "short" else float(compiled(lambda: start_time(SDES[name], None, 1e-3)))


def cross_entropy_at(sde, t0, mean, variance):
  """(3) of the module: of N(mean, variance) under LATENTS, with the step from t0 to 0."""
  alpha, sigma = sde.marginal(t0)
  center, spread = (jnp.asarray(v, alpha.dtype) for v in (LATENTS.mean, LATENTS.std**2))
  wide = alpha**2 * spread + sigma**2
  away = alpha**2 * ((mean - center) ** 2 + variance) + sigma**2
  return jnp.sum(0.5 * (jnp.log(2 * jnp.pi * wide) + away / wide) - jnp.log(alpha))


def cross_entropy_loss(sde, time=ONE_BY_ONE, **options):
  """`(key, mean: [n, 2], log_variance: [n, 2]) -> [n]`, the cross-entropy term with the exact score."""
  loss = jd.losses.lsgm(
    sde,
    NOTHING,
    jd.predictions.score(),
    time=time,
    prior_log_prob=lambda z: LATENTS.log_prob(z, sde, sde.t1),
    **options,
  )

  def run(key, mean, log_variance):
    autoencoder = jd.typing.Autoencoder(lambda x: (mean, log_variance), lambda z: z)
    return loss(key, mean, LatentModel(autoencoder, LATENTS.score(sde)))[1]["cross_entropy"]

  return run


def repeated(n):
  return [np.broadcast_to(v, (n, 2)) for v in (MEAN, np.log(VARIANCE))]


def within(values, expected, slack=0.0):
  """Whether the mean is that, within 4 standard errors."""
  error = 4 * values.std(axis=0) / np.sqrt(len(values)) + slack
  np.testing.assert_array_less(np.abs(values.mean(axis=0) - expected), error)


@jax.jit
def cross_entropy(sde, t0, key, mean, log_variance):
  """(of the draws, in closed form)."""
  expected = cross_entropy_at(sde, t0, jnp.asarray(MEAN), jnp.asarray(VARIANCE))
  return cross_entropy_loss(sde, t0=t0)(key, mean, log_variance), expected


@pytest.mark.parametrize("name", CASES)
def test_the_cross_entropy_is_the_closed_form(name, x64):
  """Of a Gaussian encoder and prior: 4 s.e. of 0.06 nats, of 0.01 where half of it is the prior's cost."""
  short, n = name == "short", 200_000
  value, expected = jax.device_get(cross_entropy(CASES[name], smallest(name), KEY, *repeated(n)))
  assert value.std() / np.sqrt(n) < (0.01 if short else 0.06)
  within(value, expected)
  away = (MEAN - LATENTS.mean) ** 2 + VARIANCE
  cost = expected - 0.5 * np.sum(np.log(2 * np.pi * LATENTS.std**2) + away / LATENTS.std**2)
  assert 0.1 < cost < 0.5 if short else 0 < cost < 1e-3  # what t0 costs


@jax.jit
def encoder_gradient(sde, t0, key, mean, log_variance):
  """(of the draws, in closed form), by mean and log variance."""
  loss = cross_entropy_loss(sde, t0=t0, prior_weight=weights.noise())
  closed = lambda mean, log_variance: cross_entropy_at(sde, t0, mean, jnp.exp(log_variance))
  expected = jax.grad(closed, (0, 1))(jnp.asarray(MEAN), jnp.log(jnp.asarray(VARIANCE)))
  return jax.grad(lambda *q: jnp.sum(loss(key, *q)), (0, 1))(mean, log_variance), expected


@pytest.mark.parametrize("name", CASES)
def test_the_encoder_s_gradient_is_that_of_the_closed_form(name, x64):
  """By mean and log variance, with another weight for the prior: within 4 standard errors."""
  sde, n = CASES[name], 40_000
  for value, due in zip(*jax.device_get(encoder_gradient(sde, 0.02 * sde.t1, KEY, *repeated(n))), strict=True):
    assert value.std() / np.sqrt(n) < 0.03
    within(value, due)


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_importance_sampling_lowers_the_variance(name, x64):
  """Of the cross-entropy at one time, against uniform times. (VE's uniform times are uniform in log-SNR already.)"""
  each = [ONE_BY_ONE, times.uniform(stratified=False)]
  run = lambda key, *q: [cross_entropy_loss(SDES[name], time)(key, *q) for time in each]
  importance, uniform = compiled(run, KEY, *repeated(40_000))
  assert importance.var() < 0.1 * uniform.var()


@jax.jit
def bound_of(sde, t0, key, x, shift, widen):
  loss = jd.losses.lsgm(
    sde,
    MODEL.observation,
    jd.predictions.score(),
    time=ONE_BY_ONE,
    t0=t0,
    prior_log_prob=lambda z: LATENTS.log_prob(z, sde, sde.t1),
  )
  return loss(key, x, LatentModel(MODEL.autoencoder(shift, widen), LATENTS.score(sde)))


@pytest.mark.parametrize("name", ["vp", "ve", "short"])
def test_the_bound_is_the_exact_likelihood_but_for_the_posterior(name, x64):
  """-log p(x) for the exact posterior, within 4 s.e. and 1e-3 nats of t0; KL(q || posterior) above it for another."""
  sde, n = SDES.get(name, SHORT), 200_000
  t0 = float(compiled(lambda: start_time(sde, None, 1e-3)))
  run = lambda *off: jax.device_get(bound_of(sde, t0, KEY, np.broadcast_to(X, (n, 3)), *off))
  (exact, aux), (wrong, _) = run(0.0, 0.0), run(0.5, -0.7)
  assert exact.std() / np.sqrt(n) < 0.06
  within(exact, -MODEL.log_prob(X), slack=1e-3)
  assert (wrong - exact).std() / np.sqrt(n) < 0.01
  within(wrong - exact, gap(0.5, -0.7), slack=1e-3)
  np.testing.assert_allclose(exact, aux["reconstruction"] + aux["cross_entropy"] - aux["entropy"], rtol=1e-10)


def network(params, z, t):
  h = jnp.concatenate([z, t[:, None].astype(z.dtype)], axis=1)
  return jnp.tanh(h @ params["in"]) @ params["out"]


def parts():
  """Parameters of encoder, decoder and network, all small random matrices."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: 0.5 * rng.normal(size=shape)
  return {"encoder": draw(3, 4), "decoder": draw(2, 3), "network": {"in": draw(3, 8), "out": draw(8, 2)}}


EXAMPLES = np.random.default_rng(1).normal(size=(16, 3))


def bind(params):
  encode = lambda w, x: tuple(jnp.split(x @ w, 2, axis=1))
  autoencoder = jd.typing.Autoencoder(
    jax.tree_util.Partial(encode, params["encoder"]),
    jax.tree_util.Partial(lambda w, z: jnp.tanh(z) @ w, params["decoder"]),
  )
  return LatentModel(autoencoder, jax.tree_util.Partial(network, params["network"]))


OPTIONS = {
  "plain": {},
  "uniform": {"time": times.uniform()},
  "noise": {"prior_weight": weights.noise()},
  "min_snr": {"prior_weight": weights.min_snr(1.0)},
}


@functools.cache
def gradients(name):
  """(value [b], aux, the gradients of the means of value, prior loss and reconstruction), with the same noise."""

  def run(params):
    def outputs(params):
      loss = jd.losses.lsgm(jd.VP(), MODEL.observation, jd.predictions.noise(), **OPTIONS[name])
      value, aux = loss(jax.random.key(7), jnp.asarray(EXAMPLES), bind(params))
      wanted = [value.mean(), aux["prior_loss"].mean(), aux["reconstruction"].mean()]
      return jnp.stack(wanted), (value, aux)

    _, pull, found = jax.vjp(outputs, params, has_aux=True)
    return *found, [pull(row)[0] for row in jnp.eye(3)]

  with jax.enable_x64(True):
    return compiled(run, parts())


def close(a, b, rtol=1e-9):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), a, b)


@pytest.mark.parametrize("name", ["noise", "min_snr"])
def test_the_prior_s_weight_moves_the_network_alone(name):
  """Encoder and decoder keep the gradient of the bound, and the bound its value; the network follows `prior_loss`."""
  (value, _, (bound, *_)), (other, _, (gradient, of_prior, _)) = gradients("plain"), gradients(name)
  np.testing.assert_allclose(other, value, rtol=1e-9)
  for part in ("encoder", "decoder"):
    assert np.abs(gradient[part]).max() > 1e-3
    close(gradient[part], bound[part])
  assert np.abs(gradient["network"]["in"] - bound["network"]["in"]).max() > 1e-3
  close(gradient["network"], of_prior["network"])


@pytest.mark.parametrize(
  ("name", "weight", "time"),
  [("uniform", weights.likelihood(), times.uniform()), ("noise", weights.noise(), times.importance())],
  ids=["likelihood", "noise"],
)
def test_the_prior_loss_is_denoising_score_matching_of_the_latents(name, weight, time, x64):
  """Value and gradient by the network: of `denoising` with that weight, on the same latents, noise and times."""
  sde, (_, aux, (gradient, *_)) = jd.VP(), gradients(name)

  def expected(net, key):
    sample_key, time_key, prior_key = jd.keys.split(jd.example_keys(key, 0, 16), 3)
    z = latents.sample(sample_key, latents.posterior(bind(parts()).autoencoder, jnp.asarray(EXAMPLES)))
    u = times.draw(time, key, time_key, z.dtype)
    match = jd.losses.denoising(sde, jd.predictions.noise(), weight, time)
    error, _ = match(jd.keys.split(prior_key)[0], z, jax.tree_util.Partial(network, net), u=u)
    loss = (sde.t1 - start_time(sde, None, 1e-3)) * error
    return loss.mean(), loss

  (_, value), due = compiled(jax.value_and_grad(expected, has_aux=True), parts()["network"], jax.random.key(7))
  np.testing.assert_allclose(aux["prior_loss"], value, rtol=1e-9)
  close(gradient["network"], due)


def test_the_decoder_learns_from_the_reconstruction_alone():
  gradient, _, of_reconstruction = gradients("noise")[2]
  close(gradient["decoder"], of_reconstruction["decoder"])


def test_one_evaluation_of_the_network_serves_both_weights():
  calls = []

  def counted(z, t):
    calls.append(1)
    return 0.5 * z

  loss = jd.losses.lsgm(jd.VP(), MODEL.observation, prior_weight=weights.noise())
  run = lambda key, x: loss(key, x, LatentModel(MODEL.autoencoder(), counted))
  jax.eval_shape(run, KEY, np.zeros((4, 3), np.float32))
  assert len(calls) == 1


def test_examples_keep_their_bound_in_any_batch():
  """With their keys and times: float32 rounding of another batch size."""
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation, jd.predictions.score(), prior_weight=weights.noise())
  model = LatentModel(MODEL.autoencoder(), lambda z, t, c: -z * c[:, None])

  def run(key, x, c, u):
    keys = jd.example_keys(key, 0, 5)
    values = lambda part: (
      loss(keys[part], x[part], model, {"c": c[part]}, u[part])[0],
      jd.losses.averaged(loss, 3)(keys[part], x[part], model, {"c": c[part]}),
    )
    return values(slice(5)), values(slice(3, 5))

  given = EXAMPLES[:5].astype(np.float32), *(np.linspace(*ends, 5, dtype=np.float32) for ends in ((0.5, 1), (0, 0.9)))
  (whole, (average, aux)), (alone, (average_alone, _)) = compiled(run, jax.random.key(2), *given)
  np.testing.assert_allclose(whole[3:], alone, rtol=1e-5)
  np.testing.assert_allclose(average[3:], average_alone, rtol=1e-5)
  assert np.all(aux["standard_error"] > 0)


def test_integers_and_images_pass():
  """Integer x [b, h, w, c] with spatial latents, in one jitted step."""
  encode = lambda x: (
    jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True) / 8,
    jnp.full((len(x), 1, 1, 3), -1.0),
  )
  decode = lambda z: jnp.tile(jnp.concatenate([z, jnp.full_like(z, -1.0)], axis=-1), (1, 4, 4, 1))
  loss = jd.losses.lsgm(jd.VP(), observations.discretized(17), prior_weight=weights.noise())
  x = np.random.default_rng(0).integers(0, 17, (4, 4, 4, 3)).astype(np.uint8)
  model = LatentModel(jd.typing.Autoencoder(encode, decode), lambda z, t: 0.5 * z)
  value, aux = compiled(lambda key, x: loss(key, x, model), jax.random.key(1), x)
  assert value.shape == (4,)
  assert np.isfinite(value).all()
  assert sorted(aux) == ["cross_entropy", "entropy", "noise_error", "prior_loss", "reconstruction"]


def test_bad_input_is_named():
  x, autoencoder = np.zeros((4, 3), np.float32), MODEL.autoencoder()
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation)
  run = lambda loss, model: jax.eval_shape(lambda x: loss(KEY, x, model), x)
  with pytest.raises(TypeError, match="model must be a LatentModel, got tuple, which lacks autoencoder, network"):
    run(loss, (autoencoder, lambda z, t: z))
  wide = autoencoder._replace(decode=lambda z: jnp.zeros((4, 6)))
  with pytest.raises(ValueError, match=r"decode must return 1 outputs a channel of x \(4, 3\)"):
    run(loss, LatentModel(wide, lambda z, t: z))
  with pytest.raises(ValueError, match=r"network must return an array of the shape of x, \(4, 2\); got \(4, 1\)"):
    run(loss, LatentModel(autoencoder, lambda z, t: z[:, :1]))
  with pytest.raises(ValueError, match=r"time must be times.importance\(\) or uniform\(\)"):
    jd.losses.lsgm(jd.VP(), MODEL.observation, time=times.log_normal())
  with pytest.raises(TypeError, match=r"weight is a factory: did you forget to call it: weights.noise\(\)"):
    jd.losses.lsgm(jd.VP(), MODEL.observation, prior_weight=weights.noise)
  with pytest.raises(TypeError, match="observation must be a Observation, got function, which lacks"):
    jd.losses.lsgm(jd.VP(), MODEL.observation.log_prob)
  with pytest.raises(ValueError, match="t0"):
    jd.losses.lsgm(jd.VP(), MODEL.observation, t0=2.0)
