"""Guided scores against exact ones: mixtures of Gaussians with labels, under every process."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from oracles import SDES, Gaussian, compiled, labelled_mixture

import jaxdiff as jd
from jaxdiff import guidance
from jaxdiff.models import MLP, conditioning

EACH_SDE = pytest.mark.parametrize("kind", SDES)
DATA = labelled_mixture()
NULL = {"label": 3}
LABEL = np.array([0, 1, 2, 0, 2, 1] * 3)
ALL = np.full_like(LABEL, 3)


def points(sde):
  """States `[18, 2]` spread about the mixture, six at each of three times, and the times, in float64."""
  random = np.random.default_rng(0)
  x0 = DATA.means[random.integers(4, size=18)] + DATA.std * random.normal(size=(18, 2))
  t = jnp.repeat(jnp.asarray([0.02, 0.3, 0.9]) * sde.t1, 6)
  alpha, sigma = (v[:, None] for v in sde.marginal(t))
  return alpha * x0 + 1.5 * sigma * random.normal(size=(18, 2)), t


def same(found, exact, tolerance=1e-6):
  """Close, in units of the largest exact value of the example."""
  size = np.max(np.abs(exact), axis=1, keepdims=True)
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


@functools.cache
def exact_and_guided(kind):
  """What the two tests below compare, by one program for each process; only under x64."""
  sde = SDES[kind]
  model, log_prob, labelled = unconditional(sde), DATA.log_posterior(sde), {"label": LABEL}

  def corrected(params, x, t, label):
    sigma = sde.marginal(t)[1][:, None]
    return model.score.apply(params, x, t) - 1.7 * sigma * jax.grad(lambda x: jnp.sum(log_prob(x, t, label)))(x)

  def run():
    x, t = points(sde)
    tilted = lambda x: jnp.sum(DATA.log_prob(x, sde, t) + 2.5 * log_prob(x, t, LABEL))
    scores = {
      "one": jd.guidance.classifier(model, log_prob, 1.0),
      "more": jd.guidance.classifier(model, log_prob, 1.7),
      "noise": jd.score_fn(corrected, None, sde, jd.predictions.noise()),
      "free": jd.guidance.classifier_free(noise_model(sde), NULL, scale=2.5),
    }
    return {name: read(score, x, t, **labelled) for name, score in scores.items()} | {
      "score": DATA.conditional_score(sde)(x, t, LABEL),
      "told": DATA.conditional_denoised(sde, x, t, LABEL),
      "untold": DATA.conditional_denoised(sde, x, t, ALL),
      "tilted": jax.grad(tilted)(x),
    }

  return compiled(run)


@EACH_SDE
def test_classifier_guidance_is_exact_in_the_score_and_the_noise_form(kind, x64):
  """At scale 1 the conditional score; eps - gamma sigma g, read as a noise prediction, is s + gamma g."""
  found = exact_and_guided(kind)
  score, data, tweedie = found["one"]
  same(score, found["score"])
  same(data, found["told"])
  same(tweedie, found["told"])
  for value, expected in zip(found["more"], found["noise"], strict=True):
    same(value, expected, 1e-9)


@EACH_SDE
def test_classifier_free_guidance_is_the_score_of_the_tilted_density_at_every_time(kind, x64):
  found = exact_and_guided(kind)
  score, data, tweedie = found["free"]
  same(score, found["tilted"])
  same(data, 2.5 * found["told"] - 1.5 * found["untold"])
  same(tweedie, data)


def test_both_conventions_agree_and_end_at_the_branches(x64):
  """scale = 1 + extra to the last bit; 1 is the conditional model and 0 the unconditional one."""
  model = noise_model(SDES["vp"])
  scales = {"2.5": (2.5,), "1": (1.0,), "0": (0.0,)}

  def run():
    x, t = points(SDES["vp"])
    guided = lambda *scale, **extra: jd.guidance.classifier_free(model, NULL, *scale, **extra)(x, t, label=LABEL)
    found = {name: guided(*scale) for name, scale in scales.items()}
    found |= {f"extra {extra}": guided(extra=extra) for extra in (1.5, 0.0)}
    return found | {"told": model(x, t, label=LABEL), "untold": model(x, t, label=ALL)}

  found = compiled(run)
  np.testing.assert_array_equal(found["2.5"], found["extra 1.5"])
  same(found["extra 1.5"], 2.5 * found["told"] - 1.5 * found["untold"], 1e-12)
  same(found["1"], found["told"], 1e-12)
  same(found["extra 0.0"], found["told"], 1e-12)
  same(found["0"], found["untold"], 1e-12)


def test_any_null_is_a_negative_condition_and_what_it_does_not_name_stays(x64):
  """Null values are a number, or the array of one example; here the score is linear in three conditions."""
  score = lambda x, t, a, b, c: a * x + b[:, None].astype(x.dtype) + c[:, None]
  x, t, less = np.ones((2, 3)), np.full(2, 0.5), np.array([0.5, 0.0, -1.0])
  a, b, c = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([1, -1]), np.array([5.0, 7.0])
  guided = jd.guidance.classifier_free(score, {"a": less, "b": 2}, scale=3.0)
  found = compiled(lambda x, t, a, b, c: guided(x, t, a=a, b=b, c=c), x, t, a, b, c)
  expected = 3 * score(x, t, a, b, c) - 2 * score(x, t, less[None], np.full(2, 2), c)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_negative_condition_is_rounded_to_the_type_of_the_condition():
  guided = guidance.classifier_free(lambda x, t, c: c[:, None] - x, {"c": 0.1}, scale=2.0)
  x = np.zeros((1, 2), np.float32)
  found = compiled(lambda c: guided(x, 0.5, c=c), np.ones(1, np.float32))
  np.testing.assert_allclose(found, 2 * 1 - 0.1, rtol=1e-6)
  guided = guidance.classifier_free(lambda x, t, c: x, {"c": np.float32(2.7)}, scale=2.0)
  with pytest.raises(ValueError, match="cannot hold its null"):
    jax.eval_shape(lambda c: guided(x, 0.5, c=c), np.ones(1, np.int32))


def test_autoguidance_is_the_score_of_a_ratio_of_densities(x64):
  """Of two Gaussians; the weak one is a plain function, whose data prediction is Tweedie's."""
  sde, gamma = SDES["edm"], 1.8
  good, bad = (
    Gaussian(np.array([1.0, -0.5]), np.array([0.3, 0.5])),
    Gaussian(np.array([0.8, 0.0]), np.array([0.6, 0.8])),
  )
  model = jd.score_fn(lambda params, x, t: good.score(sde)(x, t), None, sde, jd.predictions.score())

  def run():
    x, t = points(sde)
    ratio = lambda x: jnp.sum(gamma * good.log_prob(x, sde, t) + (1 - gamma) * bad.log_prob(x, sde, t))
    return read(jd.guidance.autoguidance(model, bad.score(sde), gamma), x, t), jax.grad(ratio)(x)

  (score, data, tweedie), exact = compiled(run)
  same(score, exact, 1e-9)
  same(data, tweedie, 1e-9)


def test_composition_is_the_score_of_a_product_of_densities(x64):
  """One condition twice as strong as itself, and away from another; of one condition it is classifier-free guidance."""
  sde = SDES["vp"]
  labels, scales = np.stack([LABEL, (LABEL + 1) % 3], axis=1), [2.0, -0.5]

  def run():
    x, t = points(sde)
    ratio = lambda x, i: DATA.log_posterior(sde)(x, t, labels[:, i])
    exact = jax.grad(lambda x: jnp.sum(DATA.log_prob(x, sde, t) + 2 * ratio(x, 0) - 0.5 * ratio(x, 1)))(x)
    one = jd.guidance.composed(noise_model(sde), NULL, [2.5])(x, t, label=labels[:, :1])
    free = jd.guidance.classifier_free(noise_model(sde), NULL, 2.5)(x, t, label=LABEL)
    return read(jd.guidance.composed(noise_model(sde), NULL, scales), x, t, label=labels), exact, one, free

  (score, data, tweedie), exact, one, free = compiled(run)
  same(score, exact)
  same(data, tweedie, 1e-9)
  same(one, free, 1e-9)


def test_rescaling_gives_the_spread_of_the_conditional_data_prediction(x64):
  sde = SDES["vp"]

  def run():
    x, t = points(sde)
    free = lambda rescale: jd.guidance.classifier_free(noise_model(sde), NULL, 3.0, rescale=rescale)
    told = noise_model(sde).denoised(x, t, label=LABEL)
    return told, {rescale: read(free(rescale), x, t, label=LABEL) for rescale in (0.0, 0.6, 1.0)}

  told, found = compiled(run)
  plain, spread = found[0.0][1], lambda value: np.std(value, axis=1)
  for rescale, (_, data, tweedie) in found.items():
    np.testing.assert_allclose(spread(data), rescale * spread(told) + (1 - rescale) * spread(plain), rtol=1e-9)
    same(data / spread(data)[:, None], plain / spread(plain)[:, None], 1e-9)
    same(tweedie, data, 1e-9)


def test_rescaling_leaves_data_of_no_spread_as_they_are(x64):
  """One value an example has no spread; its gradient is finite."""
  model = jd.score_fn(lambda params, x, t, label: label[:, None] * x, None, jd.VP(), jd.predictions.data())
  label = np.array([2.0, 3.0])
  guided = jd.guidance.classifier_free(model, {"label": 1.0}, 3.0, rescale=1.0)
  of = lambda x: jnp.sum(guided.denoised(x, 0.5, label=jnp.asarray(label)))
  value, slope = compiled(jax.value_and_grad(of), np.array([[0.5], [0.7]]))
  np.testing.assert_allclose(value, 0.5 * (3 * 2 - 2) + 0.7 * (3 * 3 - 2), rtol=1e-9)
  np.testing.assert_allclose(slope, [[4.0], [7.0]], rtol=1e-9)


def test_an_interval_is_open_below_and_closed_above():
  """Of levels sigma / alpha, which are times under EDM."""
  scale = jd.guidance.interval(jd.EDM(), 3.0, 0.5, 2.0)
  assert scale(np.array([0.49, 0.5, 0.51, 2.0, 2.02], np.float32)).tolist() == [1.0, 1.0, 3.0, 3.0, 1.0]


@EACH_SDE
def test_an_interval_is_of_the_levels_of_its_process(kind, x64):
  sde = SDES[kind]

  def run():
    low, high = (sde.time_of_log_snr(jnp.asarray(-2 * np.log(level))) for level in (0.5, 2.0))
    return jd.guidance.interval(sde, 3.0, 0.5, 2.0)(jnp.stack([0.99 * low, 1.01 * low, 0.99 * high, 1.01 * high]))

  assert compiled(run).tolist() == [1.0, 3.0, 3.0, 1.0]


def test_outside_its_interval_guidance_leaves_the_conditional_score(x64):
  """Also where other examples of the batch are inside."""
  sde, model = SDES["edm"], noise_model(SDES["edm"])

  def run():
    x, t = points(sde)
    guided = lambda scale: jd.guidance.classifier_free(model, NULL, scale)(x, t, label=LABEL)
    told = model(x, t, label=LABEL)
    return guided(jd.guidance.interval(sde, 3.0, 10.0, 30.0)), guided(3.0), told, t == 0.3 * sde.t1

  found, guided, told, inside = compiled(run)
  assert inside.sum() == 6
  same(found, np.where(inside[:, None], guided, told), 1e-12)


def test_no_example_hears_of_the_interval_of_another():
  """A null branch or a weak score of NaN reaches the examples inside alone."""
  scale, x, t = guidance.interval(jd.EDM(), 2.0, 0.2, 5.0), np.ones((2, 3), np.float32), np.array([0.1, 1.0])
  score = lambda x, t, c: jnp.where(c[:, None] > 0, -x, jnp.nan)
  for guided in (
    guidance.classifier_free(score, {"c": 0.0}, scale),
    guidance.autoguidance(score, lambda x, t, c: jnp.full_like(x, jnp.nan), scale),
  ):
    found = compiled(lambda t, c, guided=guided: guided(x, t, c=c), t.astype(np.float32), np.ones(2, np.float32))
    assert np.isfinite(found).all(axis=1).tolist() == [True, False]


def test_guided_scores_are_guided_and_thresholded_in_any_order(x64):
  sde = SDES["vp"]
  model, log_prob = noise_model(sde), DATA.log_posterior(sde)
  free = jd.guidance.classifier_free(model, NULL, 3.0)
  led = jd.guidance.classifier(free, log_prob, 0.5)
  bounded = jd.samplers.thresholded(sde, free, limit=0.8)
  within = jd.guidance.classifier_free(jd.samplers.thresholded(sde, model, limit=0.8), NULL, 3.0)

  def run():
    x, t = points(sde)
    slope = (sde.marginal(t)[1] ** 2 / sde.marginal(t)[0])[:, None]
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t, LABEL)))(x)
    scores = {"free": free, "bounded": bounded, "within": within}
    found = {name: score.denoised(x, t, label=LABEL) for name, score in scores.items()}
    found |= {"told": model.denoised(x, t, label=LABEL), "untold": model.denoised(x, t, label=ALL)}
    return found | {"led": read(led, x, t, label=LABEL), "led by": 0.5 * slope * gradient}

  found = compiled(run)
  _, data, tweedie = found["led"]
  same(data, found["free"] + found["led by"], 1e-9)
  same(tweedie, data, 1e-9)
  np.testing.assert_allclose(found["bounded"], np.clip(found["free"], -0.8, 0.8), rtol=1e-9)
  told, untold = (np.clip(found[name], -0.8, 0.8) for name in ("told", "untold"))
  same(found["within"], 3 * told - 2 * untold, 1e-9)
  assert [jd.predictions.evaluations(score) for score in (free, led, bounded, within)] == [2, 3, 2, 2]
  assert jd.predictions.evaluations(jd.guidance.classifier_free(led, NULL, 2.0)) == 6
  assert jd.predictions.evaluations(jd.guidance.composed(free, NULL, [1.0, 1.0])) == 6

  def evaluations(times):
    scale = jd.guidance.interval(sde, 2.0, 0.5, 2.0)
    scores = jd.guidance.autoguidance(led, free, scale), jd.guidance.classifier_free(led, NULL, scale)
    return [jd.predictions.evaluations(score, times) for score in scores]

  auto, free_of_led = compiled(lambda: evaluations(jnp.stack([0.9, sde.time_of_log_snr(jnp.asarray(0.0)), 0.01])))
  assert auto.tolist() == [3, 5, 3]
  assert free_of_led.tolist() == [3, 6, 3]


def test_a_learned_variance_is_that_of_the_conditional_branch(x64):
  """The network returns (label x, label) for (D, 2 v - 1)."""
  network = lambda params, x, t, label: jnp.concatenate(
    [label[:, None] * x, jnp.broadcast_to(label[:, None], x.shape)], 1
  )
  model = jd.score_fn(network, None, jd.VP(), jd.predictions.data(), learned_variance=True)
  x, label = np.ones((2, 3)), np.array([0.2, 0.6])
  v = np.broadcast_to(0.5 * (label + 1)[:, None], x.shape)
  log_prob = lambda x, t, label: jnp.sum(x, axis=1)
  led = jd.guidance.classifier(model, log_prob, 2.0)
  guided = (
    jd.guidance.classifier_free(model, {"label": -1.0}, 2.0, rescale=0.5),
    jd.guidance.classifier_free(model, {"label": -1.0}, jd.guidance.interval(jd.VP(), 2.0, 0.0, 100.0)),
    jd.guidance.autoguidance(model, jd.guidance.without(lambda x, t: -x, "label"), 2.0),
    led,
    jd.samplers.thresholded(jd.VP(), led, limit=100.0),
  )
  composed = jd.guidance.composed(model, {"label": -0.4}, [1.0, 2.0])

  def run(x, label):
    each = [
      (jd.predictions.denoised_and_v(score, x, 0.5, label=label), score.denoised(x, 0.5, label=label))
      for score in guided
    ]
    return each, composed.denoised_and_v(x, 0.5, label=jnp.stack([label, label], 1))[1]

  each, of_composed = compiled(run, x, label)
  for (data, found), alone in each:
    same(data, alone, 1e-12)
    np.testing.assert_allclose(found, v, rtol=1e-12)
  np.testing.assert_allclose(of_composed, np.full_like(x, 0.3), rtol=1e-12)
  silent = jd.guidance.classifier_free(noise_model(jd.VP()), NULL, 2.0)
  with pytest.raises(TypeError, match="says nothing of the variance"):
    jax.eval_shape(lambda x: jd.predictions.denoised_and_v(silent, x, 0.5, label=jnp.asarray(LABEL[:2])), x)


def test_a_plain_function_has_no_data_prediction_of_its_own(x64):
  """Then it is Tweedie's, with the process of the sampler; nor has a score that does not say its process."""

  class Unknown:
    def __call__(self, x, t, label):
      return -x * label[:, None]

    def denoised(self, x, t, label):
      raise AssertionError

  x, label = np.ones((2, 3)), np.array([1.0, 2.0])
  alpha, sigma = compiled(lambda: jd.VP().marginal(jnp.asarray(0.5)))
  for score in (Unknown(), Unknown().__call__):
    guided = jd.guidance.classifier_free(score, {"label": 0.0}, 3.0)
    assert guided.denoised is None
    assert guided.denoised_and_v is None
    found = compiled(lambda x, label, guided=guided: jd.denoised(jd.VP(), guided, x, 0.5, label=label), x, label)
    same(found, (x - 3 * sigma**2 * label[:, None]) / alpha, 1e-9)


def test_log_probability_is_that_of_the_softmax_at_the_label():
  """NaN for labels that are none; other conditions are told to the network."""
  network = lambda params, x, t, shift: (params * x + shift[:, None] + t[:, None]).astype(jnp.bfloat16)
  log_prob = jd.guidance.log_probability(network, np.float32(2.0))
  x = np.array([[0.0, 1.0, 2.0]] * 4, np.float32)
  run = lambda log_prob, label: log_prob(x, 0.5, label=label, shift=jnp.ones(4))
  found = compiled(run, log_prob, np.array([0, 2, 3, -1]))
  np.testing.assert_allclose(found[:2], np.array([0.0, 4.0]) - np.log(1 + np.exp(2) + np.exp(4)), rtol=1e-5)
  assert np.isnan(found).tolist() == [False, False, True, True]


def test_samples_of_labels_beyond_the_classes_fail():
  """Not only log p is NaN but its gradient, which is all that guidance sees."""
  log_prob = jd.guidance.log_probability(lambda params, x, t: x, None)
  guided = jd.guidance.classifier(jd.guidance.without(lambda x, t: -x, "label"), log_prob, 1.0)
  x = np.ones((3, 2), np.float32)
  found = compiled(lambda label: guided(x, 0.5, label=label), np.array([0, 2, -1]))
  assert np.isnan(found).tolist() == [[False, False], [True, True], [True, True]]


def test_a_score_is_not_told_what_it_is_without():
  model = jd.guidance.without(noise_model(jd.VP()), "caption", "mask")
  x, label = np.ones((2, 2), np.float32), LABEL[:2]
  with_more = lambda x, label: model.denoised(x, 0.5, label=label, caption=jnp.ones(2))
  plain = lambda x, label: noise_model(jd.VP()).denoised(x, 0.5, label=label)
  np.testing.assert_array_equal(*compiled(lambda x, label: (with_more(x, label), plain(x, label)), x, label))
  assert model.sde is model.score.sde
  assert jd.guidance.without(lambda x, t: x, "label").denoised is None


@pytest.mark.standard_promotion
def test_both_branches_of_a_linen_network_with_its_own_null():
  """One call of batch 2 b gives what two calls of batch b give; a label beyond its classes is NaN."""
  conditions = {"label": conditioning.Label(3), "size": conditioning.Scalar()}
  network, sde = MLP(16, 1, conditions=conditions), jd.VP()
  x, label = np.ones((4, 2), np.float32), np.array([0, 1, 2, 4])
  size = np.array([0.1, 0.2, np.nan, 0.4], np.float32)
  params, null = (
    networks.moved(network, x, np.ones(4, np.float32), label=label, size=size),
    conditioning.null(conditions),
  )
  score = jd.score_fn(network.apply, params, sde, jd.predictions.noise())

  def run(label, size):
    guided = jd.guidance.classifier_free(score, null, 2.0)(x, 0.5, label=label, size=size)
    nothing = {"label": jnp.full(4, 3), "size": jnp.full(4, jnp.nan)}
    return guided, score(x, 0.5, label=label, size=size), score(x, 0.5, **nothing)

  found, told, untold = compiled(run, label, size)
  np.testing.assert_allclose(found[:3], (2 * told - untold)[:3], rtol=1e-4, atol=1e-5)
  assert np.all(np.isnan(found[3]))
