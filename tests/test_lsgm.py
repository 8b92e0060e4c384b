"""The joint bound of autoencoder and prior: against closed forms of Gaussians, its gradients part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_gaussian import LATENTS, MODEL, X, gap
from oracles import SDES

import jaxdiff as jd
from jaxdiff import latents
from jaxdiff.losses import LatentModel, observations, times, weights
from jaxdiff.schedules import start_time

SHORT = jd.VP(0.1, 3.0)  # far from its prior at t1
CASES = {name: SDES[name] for name in ("vp", "ve", "edm")} | {"short": SHORT}
EACH_SDE = pytest.mark.parametrize("sde", CASES.values(), ids=CASES.keys())
MEAN, VARIANCE = np.array([1.1, -0.2]), np.array([0.3, 0.1])
ONE_BY_ONE = times.importance(stratified=False)


NOTHING = MODEL.observation._replace(log_prob=lambda x, output: jnp.zeros(len(x), output.dtype))


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


def early(sde):
  return 0.4 if sde is SHORT else None


def repeated(n):
  return (jnp.broadcast_to(jnp.asarray(v)[None], (n, 2)) for v in (MEAN, np.log(VARIANCE)))


def within(values, expected, slack=0.0):
  """Whether the mean is that, within 4 standard errors."""
  error = 4 * values.std(axis=0) / np.sqrt(len(values)) + slack
  np.testing.assert_array_less(np.abs(values.mean(axis=0) - expected), error)


@EACH_SDE
def test_the_cross_entropy_is_the_closed_form(sde, x64):
  """Of a Gaussian encoder and prior: 4 s.e. of 0.06 nats, of 0.01 where half of it is the prior's cost."""
  t0, n = start_time(sde, early(sde), 1e-3), 200_000
  value = jax.jit(cross_entropy_loss(sde, t0=t0))(jax.random.key(0), *repeated(n))
  expected = cross_entropy_at(sde, t0, MEAN, VARIANCE)
  assert value.std() / np.sqrt(n) < (0.01 if sde is SHORT else 0.06)
  within(value, expected)
  away = (MEAN - LATENTS.mean) ** 2 + VARIANCE
  cost = expected - 0.5 * np.sum(np.log(2 * np.pi * LATENTS.std**2) + away / LATENTS.std**2)
  assert 0.1 < cost < 0.5 if sde is SHORT else 0 < cost < 1e-3  # what t0 costs


@EACH_SDE
def test_the_encoder_s_gradient_is_that_of_the_closed_form(sde, x64):
  """By mean and log variance, with another weight for the prior: within 4 standard errors."""
  n, t0 = 40_000, 0.02 * sde.t1
  loss = cross_entropy_loss(sde, t0=t0, prior_weight=weights.noise())
  total = lambda *q: jnp.sum(loss(jax.random.key(0), *q))
  found = jax.jit(jax.grad(total, (0, 1)))(*repeated(n))
  expected = jax.grad(lambda mean, log_variance: cross_entropy_at(sde, t0, mean, jnp.exp(log_variance)), (0, 1))(
    jnp.asarray(MEAN), jnp.log(jnp.asarray(VARIANCE))
  )
  for value, due in zip(found, expected, strict=True):
    assert value.std() / np.sqrt(n) < 0.03
    within(value, due)


@pytest.mark.parametrize("name", ["vp", "cosine", "edm"])
def test_importance_sampling_lowers_the_variance(name, x64):
  """Of the cross-entropy at one time, against uniform times. (VE's uniform times are uniform in log-SNR already.)"""
  sde = SDES[name]
  spread = [
    jax.jit(cross_entropy_loss(sde, time))(jax.random.key(0), *repeated(40_000)).std() ** 2
    for time in (ONE_BY_ONE, times.uniform(stratified=False))
  ]
  print(
    f"\n{name}: variance with importance sampling {spread[0]:.3g}, uniform {spread[1]:.3g}: {spread[0] / spread[1]:.3g}"
  )
  assert spread[0] < 0.1 * spread[1]


@EACH_SDE
def test_the_bound_is_the_exact_likelihood_but_for_the_posterior(sde, x64):
  """-log p(x) for the exact posterior, within 4 s.e. and 1e-3 nats of t0; KL(q || posterior) above it for another."""
  n, x = 200_000, jnp.asarray(X)[None]
  prior = lambda z: LATENTS.log_prob(z, sde, sde.t1)
  loss = jd.losses.lsgm(sde, MODEL.observation, jd.predictions.score(), time=ONE_BY_ONE, prior_log_prob=prior)

  @jax.jit
  def run(shift, widen):
    model = LatentModel(MODEL.autoencoder(shift, widen), LATENTS.score(sde))
    return loss(jax.random.key(0), jnp.broadcast_to(x, (n, 3)), model)

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
  shapes = {"encoder": (3, 4), "decoder": (2, 3), "in": (3, 8), "out": (8, 2)}
  made = {n: 0.5 * jax.random.normal(jax.random.key(i), shape) for i, (n, shape) in enumerate(shapes.items())}
  return {"encoder": made["encoder"], "decoder": made["decoder"], "network": {"in": made["in"], "out": made["out"]}}


def bind(params):
  encode = lambda w, x: tuple(jnp.split(x @ w, 2, axis=1))
  autoencoder = jd.typing.Autoencoder(
    jax.tree_util.Partial(encode, params["encoder"]),
    jax.tree_util.Partial(lambda w, z: jnp.tanh(z) @ w, params["decoder"]),
  )
  return LatentModel(autoencoder, jax.tree_util.Partial(network, params["network"]))


def gradients(x, **options):
  """(value [b], aux, gradient of the mean of the value) with the same noise for all options."""
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation, jd.predictions.noise(), **options)

  def mean(params):
    value, aux = loss(jax.random.key(7), x, bind(params))
    return value.mean(), (value, aux)

  (_, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(parts())
  return *found, gradient


def close(a, b, rtol=1e-9):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), a, b)


@pytest.mark.parametrize("weight", [weights.noise(), weights.min_snr(1.0)], ids=["noise", "min_snr"])
def test_the_prior_s_weight_moves_the_network_alone(weight, x64):
  """Encoder and decoder keep the gradient of the bound, and the bound its value; the network follows `prior_loss`."""
  x = jax.random.normal(jax.random.key(1), (16, 3))
  value, _, bound = gradients(x)
  other, _, gradient = gradients(x, prior_weight=weight)
  np.testing.assert_allclose(other, value, rtol=1e-9)
  for name in ("encoder", "decoder"):
    assert np.abs(gradient[name]).max() > 1e-3
    close(gradient[name], bound[name])
  assert np.abs(gradient["network"]["in"] - bound["network"]["in"]).max() > 1e-3

  def prior_loss(net):
    loss = jd.losses.lsgm(jd.VP(), NOTHING, jd.predictions.noise(), prior_weight=weight)
    return loss(jax.random.key(7), x, bind(parts() | {"network": net}))[1]["prior_loss"].mean()

  close(gradient["network"], jax.grad(prior_loss)(parts()["network"]))


@pytest.mark.parametrize(
  ("weight", "time"), [(None, times.uniform()), (weights.noise(), times.importance())], ids=["likelihood", "noise"]
)
def test_the_prior_loss_is_denoising_score_matching_of_the_latents(weight, time, x64):
  """Value and gradient by the network: of `denoising` with that weight, on the same latents, noise and times."""
  sde, x = jd.VP(), jax.random.normal(jax.random.key(1), (16, 3))
  _, aux, gradient = gradients(x, prior_weight=weight, time=time)
  sample_key, time_key, prior_key = jd.keys.split(jd.example_keys(jax.random.key(7), 0, 16), 3)
  z = latents.sample(sample_key, latents.posterior(bind(parts()).autoencoder, x))
  match = jd.losses.denoising(sde, jd.predictions.noise(), weight or weights.likelihood(), time)
  u = times.draw(time, jax.random.key(7), time_key, z.dtype)
  t0 = start_time(sde, None, 1e-3)

  def expected(params):
    error, _ = match(jd.keys.split(prior_key)[0], z, jax.tree_util.Partial(network, params), u=u)
    return (sde.t1 - t0) * error

  np.testing.assert_allclose(aux["prior_loss"], expected(parts()["network"]), rtol=1e-9)
  close(gradient["network"], jax.grad(lambda params: expected(params).mean())(parts()["network"]))


def test_the_decoder_learns_from_the_reconstruction_alone(x64):
  x = jax.random.normal(jax.random.key(1), (16, 3))
  _, _, gradient = gradients(x, prior_weight=weights.noise())
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation)

  def reconstruction(decoder):
    return loss(jax.random.key(7), x, bind(parts() | {"decoder": decoder}))[1]["reconstruction"].mean()

  close(gradient["decoder"], jax.grad(reconstruction)(parts()["decoder"]))


def test_one_evaluation_of_the_network_serves_both_weights():
  calls = []

  def counted(z, t):
    calls.append(1)
    return 0.5 * z

  model = LatentModel(MODEL.autoencoder(), counted)
  x = jnp.zeros((4, 3))
  jd.losses.lsgm(jd.VP(), MODEL.observation, prior_weight=weights.noise())(jax.random.key(0), x, model)
  assert len(calls) == 1


def test_examples_keep_their_bound_in_any_batch():
  """With their keys and times: float32 rounding of another batch size."""
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation, jd.predictions.score(), prior_weight=weights.noise())
  network = lambda z, t, c: -z * c[:, None]
  x = jax.random.normal(jax.random.key(1), (5, 3))
  run = jax.jit(lambda key, x, cond, u: loss(key, x, LatentModel(MODEL.autoencoder(), network), cond, u)[0])
  c, u = jnp.linspace(0.5, 1.0, 5), jnp.linspace(0.0, 0.9, 5)
  key = jd.example_keys(jax.random.key(2), 0, 5)
  np.testing.assert_allclose(run(key, x, {"c": c}, u)[3:], run(key[3:], x[3:], {"c": c[3:]}, u[3:]), rtol=1e-5)
  model = LatentModel(MODEL.autoencoder(), network)
  averaged = jax.jit(lambda key, x, cond: jd.losses.averaged(loss, 3)(key, x, model, cond))
  whole, aux = averaged(key, x, {"c": c})
  alone, _ = averaged(key[3:], x[3:], {"c": c[3:]})
  np.testing.assert_allclose(whole[3:], alone, rtol=1e-5)
  assert jnp.all(aux["standard_error"] > 0)


def test_integers_and_images_pass():
  """Integer x [b, h, w, c] with spatial latents, in one jitted step."""
  encode = lambda x: (
    jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True) / 8,
    jnp.full((len(x), 1, 1, 3), -1.0),
  )
  decode = lambda z: jnp.tile(jnp.concatenate([z, jnp.full_like(z, -1.0)], axis=-1), (1, 4, 4, 1))
  loss = jd.losses.lsgm(jd.VP(), observations.discretized(17), prior_weight=weights.noise())
  x = jax.random.randint(jax.random.key(0), (4, 4, 4, 3), 0, 17).astype(jnp.uint8)
  run = jax.jit(lambda key: loss(key, x, LatentModel(jd.typing.Autoencoder(encode, decode), lambda z, t: 0.5 * z)))
  value, aux = run(jax.random.key(1))
  assert value.shape == (4,)
  assert jnp.all(jnp.isfinite(value))
  assert sorted(aux) == ["cross_entropy", "entropy", "noise_error", "prior_loss", "reconstruction"]


def test_bad_input_is_named(untyped):
  x, autoencoder = jnp.zeros((4, 3)), MODEL.autoencoder()
  loss = jd.losses.lsgm(jd.VP(), MODEL.observation)
  run = lambda loss, model: loss(jax.random.key(0), x, model)
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
