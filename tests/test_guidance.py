"""Guided scores against exact ones: mixtures of Gaussians with labels, under every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SDES, Gaussian, labelled_mixture

import jaxdiff as jd
from jaxdiff.models import MLP, conditioning

EACH_SDE = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
DATA = labelled_mixture()
NULL = {"label": 3}
LABEL = jnp.asarray([0, 1, 2, 0, 2, 1] * 3)
ALL = jnp.full_like(LABEL, 3)


def points(sde):
  """States `[18, 2]` spread about the mixture, six at each of three times, and the times, in float64."""
  t = jnp.repeat(jnp.asarray([0.02, 0.3, 0.9]) * sde.t1, 6)
  alpha, sigma = (v[:, None] for v in sde.marginal(t))
  x0 = DATA.sample(jax.random.key(0), 18)
  return alpha * x0 + 1.5 * sigma * jax.random.normal(jax.random.key(1), x0.shape), t


def same(found, exact, tolerance=1e-6):
  """Close, in units of the largest exact value of the example."""
  size = jnp.max(jnp.abs(exact), axis=1, keepdims=True)
  np.testing.assert_allclose(found / size, exact / size, rtol=0, atol=tolerance)


def noise_model(sde):
  """A network that predicts the noise exactly under every label, 3 for none, as a score."""
  score = DATA.conditional_score(sde)
  noise = lambda params, x, t, label: -sde.marginal(t)[1][:, None] * score(x, t, label)
  return jd.score_fn(noise, None, sde, jd.predictions.noise())


def unconditional(sde):
  """One that knows no labels."""
  apply = noise_model(sde).apply
  noise = lambda params, x, t: apply(params, x, t, jnp.full(len(x), 3))
  return jd.guidance.without(jd.score_fn(noise, None, sde, jd.predictions.noise()), "label")


def read(score, x, t, **cond):
  """The score, its data prediction, and the data prediction by Tweedie's formula."""
  value = score(x, t, **cond)
  alpha, sigma = (v[:, None] for v in score.sde.marginal(t))
  return value, score.denoised(x, t, **cond), (x + sigma**2 * value) / alpha


def both(score, x, t, **cond):
  return jax.jit(lambda x, t, cond: read(score, x, t, **cond))(x, t, cond)


@EACH_SDE
def test_classifier_guidance_is_exact_in_the_score_and_the_noise_form(sde, x64):
  """At scale 1 the conditional score; eps - gamma sigma g, read as a noise prediction, is s + gamma g."""
  (x, t), gamma, model, log_prob = points(sde), 1.7, unconditional(sde), DATA.log_posterior(sde)

  def corrected(params, x, t, label):
    sigma = sde.marginal(t)[1][:, None]
    return model.score.apply(params, x, t) - gamma * sigma * jax.grad(lambda x: jnp.sum(log_prob(x, t, label)))(x)

  by_noise = jd.score_fn(corrected, None, sde, jd.predictions.noise())
  scores = jd.guidance.classifier(model, log_prob, 1.0), jd.guidance.classifier(model, log_prob, gamma), by_noise
  exact = lambda x, t: (DATA.conditional_score(sde)(x, t, LABEL), DATA.conditional_denoised(sde, x, t, LABEL))
  (one, more, noise), (score, data) = jax.jit(
    lambda x, t: ([read(score, x, t, label=LABEL) for score in scores], exact(x, t))
  )(x, t)
  same(one[0], score)
  same(one[1], data)
  same(one[2], data)
  for found, expected in zip(more, noise, strict=True):
    same(found, expected, 1e-9)


@EACH_SDE
def test_classifier_free_guidance_is_the_score_of_the_tilted_density_at_every_time(sde, x64):
  (x, t), gamma = points(sde), 2.5
  guided = jd.guidance.classifier_free(noise_model(sde), NULL, scale=gamma)
  tilted = lambda x: jnp.sum(DATA.log_prob(x, sde, t) + gamma * DATA.log_posterior(sde)(x, t, LABEL))
  exact = lambda x, t: [jax.grad(tilted)(x)] + [DATA.conditional_denoised(sde, x, t, label) for label in (LABEL, ALL)]
  (score, data, tweedie), (gradient, told, untold) = jax.jit(
    lambda x, t: (read(guided, x, t, label=LABEL), exact(x, t))
  )(x, t)
  same(score, gradient)
  same(data, gamma * told + (1 - gamma) * untold)
  same(tweedie, data)


def test_both_conventions_agree_and_end_at_the_branches(x64):
  """scale = 1 + extra to the last bit; 1 is the conditional model and 0 the unconditional one."""
  model = noise_model(SDES["vp"])
  x, t = points(SDES["vp"])
  guided = lambda *scale, **extra: jd.guidance.classifier_free(model, NULL, *scale, **extra)(x, t, label=LABEL)
  told, untold = model(x, t, label=LABEL), model(x, t, label=ALL)
  np.testing.assert_array_equal(guided(2.5), guided(extra=1.5))
  same(guided(extra=1.5), 2.5 * told - 1.5 * untold, 1e-12)
  same(guided(1.0), told, 1e-12)
  same(guided(extra=0.0), told, 1e-12)
  same(guided(0.0), untold, 1e-12)


def test_any_null_is_a_negative_condition_and_what_it_does_not_name_stays(x64):
  """Null values are a number, or the array of one example; here the score is linear in three conditions."""
  score = lambda x, t, a, b, c: a * x + b[:, None].astype(x.dtype) + c[:, None]
  x, t, less = jnp.ones((2, 3)), jnp.full(2, 0.5), np.array([0.5, 0.0, -1.0])
  a, b, c = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.asarray([1, -1]), jnp.asarray([5.0, 7.0])
  found = jd.guidance.classifier_free(score, {"a": less, "b": 2}, scale=3.0)(x, t, a=a, b=b, c=c)
  expected = 3 * score(x, t, a, b, c) - 2 * score(x, t, jnp.asarray(less)[None], jnp.full(2, 2), c)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_autoguidance_is_the_score_of_a_ratio_of_densities(x64):
  """Of two Gaussians; the weak one is a plain function, whose data prediction is Tweedie's."""
  sde, gamma = SDES["edm"], 1.8
  good, bad = (
    Gaussian(np.array([1.0, -0.5]), np.array([0.3, 0.5])),
    Gaussian(np.array([0.8, 0.0]), np.array([0.6, 0.8])),
  )
  x, t = points(sde)
  exact = jax.grad(lambda x: jnp.sum(gamma * good.log_prob(x, sde, t) + (1 - gamma) * bad.log_prob(x, sde, t)))(x)
  model = jd.score_fn(lambda params, x, t: good.score(sde)(x, t), None, sde, jd.predictions.score())
  score, data, tweedie = both(jd.guidance.autoguidance(model, bad.score(sde), gamma), x, t)
  same(score, exact, 1e-9)
  same(data, tweedie, 1e-9)


def test_composition_is_the_score_of_a_product_of_densities(x64):
  """One condition twice as strong as itself, and away from another; of one condition it is classifier-free guidance."""
  sde = SDES["vp"]
  x, t = points(sde)
  labels, scales = jnp.stack([LABEL, (LABEL + 1) % 3], axis=1), [2.0, -0.5]
  ratio = lambda x, i: DATA.log_posterior(sde)(x, t, labels[:, i])
  exact = jax.grad(lambda x: jnp.sum(DATA.log_prob(x, sde, t) + 2 * ratio(x, 0) - 0.5 * ratio(x, 1)))(x)
  score, data, tweedie = both(jd.guidance.composed(noise_model(sde), NULL, scales), x, t, label=labels)
  same(score, exact)
  same(data, tweedie, 1e-9)
  one = jd.guidance.composed(noise_model(sde), NULL, [2.5])(x, t, label=labels[:, :1])
  same(one, jd.guidance.classifier_free(noise_model(sde), NULL, 2.5)(x, t, label=LABEL), 1e-9)


@pytest.mark.parametrize("rescale", [1.0, 0.6])
def test_rescaling_gives_the_spread_of_the_conditional_data_prediction(rescale, x64):
  sde = SDES["vp"]
  x, t = points(sde)
  told = noise_model(sde).denoised(x, t, label=LABEL)
  free = jd.guidance.classifier_free(noise_model(sde), NULL, 3.0)
  score, data, tweedie = both(
    jd.guidance.classifier_free(noise_model(sde), NULL, 3.0, rescale=rescale), x, t, label=LABEL
  )
  plain = free.denoised(x, t, label=LABEL)
  spread = lambda value: np.std(value, axis=1)
  np.testing.assert_allclose(spread(data), rescale * spread(told) + (1 - rescale) * spread(plain), rtol=1e-9)
  same(data / spread(data)[:, None], plain / spread(plain)[:, None], 1e-9)
  same(tweedie, data, 1e-9)


def test_rescaling_leaves_data_of_no_spread_as_they_are(x64):
  """One value an example has no spread; its gradient is finite."""
  model = jd.score_fn(lambda params, x, t, label: label[:, None] * x, None, jd.VP(), jd.predictions.data())
  cond = {"label": jnp.asarray([2.0, 3.0])}
  guided = jd.guidance.classifier_free(model, {"label": 1.0}, 3.0, rescale=1.0)
  x = jnp.asarray([[0.5], [0.7]])
  value, slope = jax.value_and_grad(lambda x: jnp.sum(guided.denoised(x, 0.5, **cond)))(x)
  np.testing.assert_allclose(value, 0.5 * (3 * 2 - 2) + 0.7 * (3 * 3 - 2), rtol=1e-9)
  np.testing.assert_allclose(slope, [[4.0], [7.0]], rtol=1e-9)


@EACH_SDE
def test_an_interval_is_open_below_and_closed_above(sde, x64):
  low, high = (sde.time_of_log_snr(jnp.asarray(-2 * np.log(level))) for level in (0.5, 2.0))
  level = lambda t: float(np.divide(*sde.marginal(t)[::-1]))
  scale = jd.guidance.interval(sde, 3.0, level(low), level(high))
  t = jnp.stack([0.99 * low, low, 1.01 * low, high, 1.01 * high])
  assert scale(t).tolist() == [1.0, 1.0, 3.0, 3.0, 1.0]


def test_outside_its_interval_guidance_leaves_the_conditional_score(x64):
  """Also where other examples of the batch are inside."""
  sde, model = SDES["edm"], noise_model(SDES["edm"])
  x, t = points(sde)
  scale = jd.guidance.interval(sde, 3.0, 10.0, 30.0)
  found = jd.guidance.classifier_free(model, NULL, scale)(x, t, label=LABEL)
  inside = jd.guidance.classifier_free(model, NULL, 3.0)(x, t, label=LABEL)
  same(found, jnp.where((t == 0.3 * sde.t1)[:, None], inside, model(x, t, label=LABEL)), 1e-12)


def test_guided_scores_are_guided_and_thresholded_in_any_order(x64):
  sde = SDES["vp"]
  (x, t), model, log_prob = points(sde), noise_model(sde), DATA.log_posterior(sde)
  free = jd.guidance.classifier_free(model, NULL, 3.0)
  led = jd.guidance.classifier(free, log_prob, 0.5)
  slope = (sde.marginal(t)[1] ** 2 / sde.marginal(t)[0])[:, None]
  gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t, LABEL)))(x)
  _, data, tweedie = both(led, x, t, label=LABEL)
  same(data, free.denoised(x, t, label=LABEL) + 0.5 * slope * gradient, 1e-9)
  same(tweedie, data, 1e-9)
  bounded = jd.samplers.thresholded(sde, free, limit=0.8)
  np.testing.assert_allclose(
    bounded.denoised(x, t, label=LABEL), jnp.clip(free.denoised(x, t, label=LABEL), -0.8, 0.8), rtol=1e-9
  )
  within = jd.guidance.classifier_free(jd.samplers.thresholded(sde, model, limit=0.8), NULL, 3.0)
  told, untold = (jnp.clip(model.denoised(x, t, label=label), -0.8, 0.8) for label in (LABEL, ALL))
  same(within.denoised(x, t, label=LABEL), 3 * told - 2 * untold, 1e-9)
  assert [jd.predictions.evaluations(score) for score in (free, led, bounded, within)] == [2, 3, 2, 2]
  assert jd.predictions.evaluations(jd.guidance.classifier_free(led, NULL, 2.0)) == 6
  assert jd.predictions.evaluations(jd.guidance.composed(free, NULL, [1.0, 1.0])) == 6
  scale = jd.guidance.interval(sde, 2.0, 0.5, 2.0)
  times = jnp.asarray([0.9, sde.time_of_log_snr(0.0), 0.01])
  assert jd.predictions.evaluations(jd.guidance.autoguidance(led, free, scale), times).tolist() == [3, 5, 3]
  assert jd.predictions.evaluations(jd.guidance.classifier_free(led, NULL, scale), times).tolist() == [3, 6, 3]


def test_a_learned_variance_is_that_of_the_conditional_branch(x64):
  """The network returns (label x, label) for (D, 2 v - 1)."""
  network = lambda params, x, t, label: jnp.concatenate(
    [label[:, None] * x, jnp.broadcast_to(label[:, None], x.shape)], 1
  )
  model = jd.score_fn(network, None, jd.VP(), jd.predictions.data(), learned_variance=True)
  x, label = jnp.ones((2, 3)), jnp.asarray([0.2, 0.6])
  v = jnp.broadcast_to(0.5 * (label + 1)[:, None], x.shape)
  log_prob = lambda x, t, label: jnp.sum(x, axis=1)
  led = jd.guidance.classifier(model, log_prob, 2.0)
  for guided in (
    jd.guidance.classifier_free(model, {"label": -1.0}, 2.0, rescale=0.5),
    jd.guidance.classifier_free(model, {"label": -1.0}, jd.guidance.interval(jd.VP(), 2.0, 0.0, 100.0)),
    jd.guidance.autoguidance(model, jd.guidance.without(lambda x, t: -x, "label"), 2.0),
    led,
    jd.samplers.thresholded(jd.VP(), led, limit=100.0),
  ):
    data, found = jd.predictions.denoised_and_v(guided, x, 0.5, label=label)
    same(data, guided.denoised(x, 0.5, label=label), 1e-12)
    np.testing.assert_allclose(found, v, rtol=1e-12)
  composed = jd.guidance.composed(model, {"label": -0.4}, [1.0, 2.0])
  _, found = composed.denoised_and_v(x, 0.5, label=jnp.stack([label, label], 1))
  np.testing.assert_allclose(found, jnp.full_like(x, 0.3), rtol=1e-12)
  with pytest.raises(TypeError, match="says nothing of the variance"):
    jd.predictions.denoised_and_v(jd.guidance.classifier_free(noise_model(jd.VP()), NULL, 2.0), x, 0.5, label=LABEL[:2])


def test_a_plain_function_has_no_data_prediction_of_its_own(x64):
  """Then it is Tweedie's, with the process of the sampler; nor has a score that does not say its process."""

  class Unknown:
    def __call__(self, x, t, label):
      return -x * label[:, None]

    def denoised(self, x, t, label):
      raise AssertionError

  x, cond = jnp.ones((2, 3)), {"label": jnp.asarray([1.0, 2.0])}
  alpha, sigma = jd.VP().marginal(0.5)
  for score in (Unknown(), Unknown().__call__):
    guided = jd.guidance.classifier_free(score, {"label": 0.0}, 3.0)
    assert guided.denoised is None
    assert guided.denoised_and_v is None
    expected = (x - 3 * sigma**2 * cond["label"][:, None]) / alpha
    same(jd.denoised(jd.VP(), guided, x, 0.5, **cond), expected, 1e-9)


def test_log_probability_is_that_of_the_softmax_at_the_label():
  """NaN for labels that are none; other conditions are told to the network."""
  network = lambda params, x, t, shift: (params * x + shift[:, None] + t[:, None]).astype(jnp.bfloat16)
  log_prob = jd.guidance.log_probability(network, jnp.float32(2.0))
  x = jnp.asarray([[0.0, 1.0, 2.0]] * 4)
  found = jax.jit(lambda log_prob, label: log_prob(x, 0.5, label=label, shift=jnp.ones(4)))(
    log_prob, jnp.asarray([0, 2, 3, -1])
  )
  np.testing.assert_allclose(found[:2], np.asarray([0.0, 4.0]) - np.log(1 + np.exp(2) + np.exp(4)), rtol=1e-5)
  assert jnp.isnan(found).tolist() == [False, False, True, True]


def test_samples_of_labels_beyond_the_classes_fail():
  """Not only log p is NaN but its gradient, which is all that guidance sees."""
  log_prob = jd.guidance.log_probability(lambda params, x, t: x, None)
  guided = jd.guidance.classifier(jd.guidance.without(lambda x, t: -x, "label"), log_prob, 1.0)
  found = guided(jnp.ones((3, 2)), 0.5, label=jnp.asarray([0, 2, -1]))
  assert jnp.isnan(found).tolist() == [[False, False], [True, True], [True, True]]


def test_a_score_is_not_told_what_it_is_without():
  model = jd.guidance.without(noise_model(jd.VP()), "caption", "mask")
  x, cond = jnp.ones((2, 2)), {"label": LABEL[:2], "caption": jnp.ones(2)}
  np.testing.assert_array_equal(model.denoised(x, 0.5, **cond), noise_model(jd.VP()).denoised(x, 0.5, label=LABEL[:2]))
  assert model.sde is model.score.sde
  assert jd.guidance.without(lambda x, t: x, "label").denoised is None


@pytest.mark.standard_promotion
def test_both_branches_of_a_linen_network_with_its_own_null():
  """One call of batch 2 b gives what two calls of batch b give; a label beyond its classes is NaN."""
  conditions = {"label": conditioning.Label(3), "size": conditioning.Scalar()}
  network, sde = MLP(16, 1, conditions=conditions), jd.VP()
  x, cond = jnp.ones((4, 2)), {"label": jnp.asarray([0, 1, 2, 4]), "size": jnp.asarray([0.1, 0.2, jnp.nan, 0.4])}
  params = network.init(jax.random.key(0), x, jnp.ones(4), **cond)
  score = jd.score_fn(network.apply, params, sde, jd.predictions.noise())
  null = conditioning.null(conditions)
  found = jd.guidance.classifier_free(score, null, 2.0)(x, 0.5, **cond)
  untold = score(x, 0.5, label=jnp.full(4, 3), size=jnp.full(4, jnp.nan))
  np.testing.assert_allclose(found[:3], (2 * score(x, 0.5, **cond) - untold)[:3], rtol=1e-4, atol=1e-5)
  assert jnp.all(jnp.isnan(found[3]))
