"""Guidance of trained networks: samples are of the label that they are guided to, judged by the exact posterior."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from oracles import LabelledMixture, compiled

import jaxdiff as jd
from jaxdiff import models

NUMBER, STEPS, SCALE = 600, 20, 2.0
# Three labels of overlapping components: samples of a label are not always told apart from those of another.
DATA = LabelledMixture(np.array([0.4, 0.3, 0.3]), np.array([[1.0, 0.0], [-0.6, 0.8], [-0.6, -0.8]]), 0.6, np.arange(3))
SDE = jd.VP()


def trained(loss, params, x0, label):
  """The parameters after 1500 steps of Adam; one program."""
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
  of = lambda params, key, rows: jnp.mean(loss(key, x0[rows], params, {"label": label[rows]})[0])

  def step(carry, key):
    params, state = carry
    pick, noise = jax.random.split(key)
    gradient = jax.grad(of)(params, noise, jax.random.randint(pick, (256,), 0, len(x0)))
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 1500))[0][0]


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_guided_samples_are_of_their_label():
  """The exact posterior finds the label of guided samples more often than of samples that are only told it.

  Measured: 0.87 of exact samples, 0.87 told, 1.00 classifier-free, 0.33 with no label, 1.00 classifier.
  """
  random = np.random.default_rng(0)
  labels = random.choice(3, size=20_000, p=DATA.weights).astype(np.int32)
  x0 = (DATA.means[labels] + DATA.std * random.normal(size=(20_000, 2))).astype(np.float32)
  conditions = {"label": models.conditioning.Label(3)}
  network, null = models.MLP(64, 2, conditions=conditions), models.conditioning.null(conditions)
  judge = models.MLP(64, 2)
  wide = lambda x: jnp.pad(x, ((0, 0), (0, 1)))  # as many inputs as logits
  logits = lambda params, x, t: judge.apply(params, wide(x), t)
  denoising = jd.losses.drop_conditions(jd.losses.denoising(SDE, jd.predictions.edm(1.0)), null, 0.2)
  classification = jd.losses.classification(SDE)
  t, few = np.ones(2, np.float32), {"label": labels[:2]}
  starts = networks.moved(network, x0[:2], t, **few), networks.moved(judge, np.ones((2, 3), np.float32), t)

  def fit(starts, x0, labels):
    of_score = lambda key, x, params, cond: denoising(key, x, jax.tree_util.Partial(network.apply, params), cond)
    of_label = lambda key, x, params, cond: classification(key, x, jax.tree_util.Partial(logits, params), cond)
    return trained(of_score, starts[0], x0, labels), trained(of_label, starts[1], x0, labels)

  params, noisy = compiled(fit, starts, x0, labels)
  label = np.arange(NUMBER, dtype=np.int32) % 3
  score = jd.score_fn(network.apply, params, SDE, jd.predictions.edm(1.0))
  untold_apply = lambda params, x, t: network.apply(params, x, t, label=jnp.full(len(x), null["label"]))
  nothing = jd.guidance.without(jd.score_fn(untold_apply, params, SDE, jd.predictions.edm(1.0)), "label")
  kinds = {
    "told": score,
    "free": jd.guidance.classifier_free(score, null, SCALE),
    "nothing": nothing,
    "classifier": jd.guidance.classifier(nothing, jd.guidance.log_probability(logits, noisy), SCALE),
  }

  def sample(key, x_T, label):
    sampler = jd.samplers.dpm_solver_pp(SDE, jd.time_grid(SDE, STEPS))
    return {name: sampler(key, x_T, guided, {"label": label}).x for name, guided in kinds.items()}

  found = compiled(sample, jax.random.key(1), random.normal(size=(NUMBER, 2)).astype(np.float32), label)

  def share(x):
    away = np.sum((x[:, None] - DATA.means[None]) ** 2, axis=-1)
    return np.mean(np.argmax(np.log(DATA.weights) - 0.5 * away / DATA.std**2, axis=1) == label)

  shares = {name: share(x) for name, x in found.items()}
  exact = share(DATA.means[label] + DATA.std * random.normal(size=(NUMBER, 2)))
  assert abs(shares["told"] - exact) < 4.5 * (2 * exact * (1 - exact) / NUMBER) ** 0.5 + 0.02
  assert abs(shares["nothing"] - 1 / 3) < 0.1
  assert shares["free"] > shares["told"] + 0.05
  assert shares["classifier"] > shares["told"] + 0.05
