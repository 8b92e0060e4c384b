"""Denoising GANs: the game has the right gradients, penalty and optimum, the sampler is DDPM's, training is sharded.

`Partial(f, params)` of small functions stand for the networks; gradients are compared with central differences of the
losses that are reported, in float64, and the optimum with densities on a grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdiff as jd
from jaxdiff.losses import Players, denoising_gan, patch_adversarial
from jaxdiff.models import MLP, PatchDiscriminator, StepDiscriminator, UNet, VectorDiscriminator, conditioning
from jaxdiff.parallel import jit_launcher, make_mesh, pmap_launcher
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

KEY = jax.random.key(0)
Partial = jax.tree_util.Partial
LATENT = 3


def chain(steps=4):
  return jd.ddpm.Chain(jd.ddpm.vp_betas(steps))


def generator(params, x, t, latent):
  return jnp.tanh(params["a"]) * x + latent @ params["b"] + t[:, None] * params["c"]


def discriminator(params, x, t, x_t):
  return jnp.sum(jnp.tanh(x @ params["w"] + x_t @ params["v"] + t[:, None]), axis=1)


def parameters(dtype=jnp.float64):
  draw = lambda k, *shape: jax.random.normal(jax.random.key(k), shape, dtype)
  return {
    "generator": {"a": draw(1), "b": draw(2, LATENT, 2), "c": draw(3, 2)[None]},
    "discriminator": {"w": draw(4, 2, 4), "v": draw(5, 2, 4)},
  }


def players(params):
  return Players(Partial(generator, params["generator"]), Partial(discriminator, params["discriminator"]))


def data(count, dtype=jnp.float64):
  return jax.random.normal(jax.random.key(7), (count, 2), dtype)


# ----- the loss


@pytest.mark.parametrize(
  ("name", "parts"), [("generator", ["generator_loss"]), ("discriminator", ["discriminator_loss", "r1"])]
)
def test_each_player_has_the_gradient_of_its_own_loss(name, parts, x64):
  """Along a random direction, by central differences of what is reported: no stop-gradient can hide in them."""
  loss, params, x0 = denoising_gan(chain(), LATENT, r1=0.7), parameters(), data(6)
  run = jax.jit(lambda params: loss(KEY, x0, players(params)))
  gradient = jax.grad(lambda params: run(params)[0].sum())(params)[name]
  direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params[name])
  size = 1e-5

  def reported(sign):
    moved = params | {name: jax.tree.map(lambda p, d: p + sign * size * d, params[name], direction)}
    return sum(run(moved)[1][part].sum() for part in parts)

  slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
  np.testing.assert_allclose(slope, (reported(1) - reported(-1)) / (2 * size), rtol=1e-7)
  assert abs(slope) > 0.1
  whole = run(params)
  np.testing.assert_allclose(whole[0], sum(whole[1][part] for part in ("generator_loss", "discriminator_loss", "r1")))


def watched(seen):
  def network(params, x, t, x_t):
    seen.append((x, x_t, t))
    return jnp.sum(x * params, axis=1)

  return Partial(network, jnp.ones((1, 2)))


def test_pairs_are_those_of_the_chain(x64):
  """Moments of q(x_{t-1}, x_t | x_0), and of q(x_{t-1} | x_t, c) for a generator that says c; noises are independent.

  Of 20,000 draws a mean is within 4 / sqrt(20,000) standard deviations, that of a product of two unit normals as well.
  """
  count, x0, c = 20_000, jnp.asarray([[0.8, -1.2]]), jnp.asarray([[2.0, 1.0]])
  four = chain()
  for t in (1, 3):
    seen, latents = [], []
    constant = Partial(lambda x, time, latent: (latents.append(latent), jnp.broadcast_to(c, x.shape))[1])
    u, network = jnp.full(count, (t - 0.5) / 4), watched(seen)
    denoising_gan(four, 2, r1=0.0)(KEY, jnp.broadcast_to(x0, (count, 2)), Players(constant, network), u=u)
    (real, x_t, time), (fake, _, _), (again, _, _) = seen[:3]
    np.testing.assert_array_equal(time, four.time(t))
    np.testing.assert_array_equal(fake, again)
    (alpha, sigma), (alpha_t, sigma_t), beta = four.marginal(t - 1), four.marginal(t), four.variance("beta", t)
    noise = (x_t - alpha_t * x0) / sigma_t
    mean, variance = four.posterior(jnp.broadcast_to(c, x_t.shape), x_t, jnp.full(count, t))
    if t == 1:
      np.testing.assert_allclose(real, jnp.broadcast_to(x0, real.shape), rtol=1e-12)
      np.testing.assert_allclose(fake, jnp.broadcast_to(c, real.shape), rtol=1e-12)
      continue
    within = 4 / np.sqrt(count)
    before = (real - alpha * x0) / sigma
    of_fake = (fake - mean) / jnp.sqrt(variance)[:, None]
    for unit in (noise, before, of_fake, latents[0]):
      assert jnp.abs(unit.mean(0)).max() < within
      assert jnp.abs(unit.var(0) - 1).max() < within * np.sqrt(2)
    correlation = jnp.sqrt(1 - beta) * sigma / sigma_t
    np.testing.assert_allclose((before * noise).mean(0), correlation, atol=within * np.sqrt(1 + correlation**2))
    of_real = (before - correlation * noise) / jnp.sqrt(1 - correlation**2)
    for one, other in itertools.combinations((noise, of_real, of_fake, latents[0]), 2):
      assert jnp.abs((one * other).mean(0)).max() < within


def test_networks_are_told_the_time_of_scores_and_their_conditions():
  four, told = chain(), {"generator": [], "discriminator": []}

  def network(name, x, t, **cond):
    told[name].append((t, cond))
    return jnp.zeros_like(x) if name == "generator" else jnp.zeros(len(x))

  both = Players(*(Partial(functools.partial(network, name)) for name in told))
  u, cond = jnp.asarray([0.0, 0.3, 0.5, 0.99]), {"label": jnp.arange(4)}
  denoising_gan(four, LATENT)(KEY, jnp.ones((4, 2)), both, cond, u)
  for name, other in (("generator", "latent"), ("discriminator", "x_t")):
    t, given = told[name][0]
    np.testing.assert_array_equal(t, four.time(jnp.arange(1, 5)))
    assert set(given) == {"label", other}
  assert told["generator"][0][1]["latent"].shape == (4, LATENT)
  seen = []
  jd.samplers.denoising_gan(four, LATENT)(
    KEY,
    jnp.ones((1, 2)),
    lambda x, t, latent: (jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True), x)[1],
  )
  jax.effects_barrier()
  np.testing.assert_array_equal(np.float32(seen), four.time(jnp.arange(4, 0, -1)))


def test_the_penalty_of_a_quadratic_discriminator_is_in_closed_form(x64):
  """D = x A x / 2 + w x has the gradient A x + w; with one step x_0 itself is what is real."""
  a = jnp.asarray([[1.0, 0.4], [0.4, -2.0]])
  w = jnp.asarray([0.3, -0.7])
  quadratic = Partial(lambda p, x, t, x_t: 0.5 * jnp.einsum("bi,ij,bj->b", x, p, x) + x @ w, a)
  x0, still = data(5), Partial(lambda x, t, latent: x)
  expected = 0.5 * 0.3 * jnp.sum((x0 @ a + w[None]) ** 2, axis=1)
  _, aux = denoising_gan(chain(1), LATENT, r1=0.3)(KEY, x0, Players(still, quadratic))
  np.testing.assert_allclose(aux["r1"], expected, rtol=1e-9)
  linear = Partial(lambda p, x, t, x_t: x @ p, w)
  _, aux = denoising_gan(chain(4), LATENT, r1=0.3)(KEY, x0, Players(still, linear))
  np.testing.assert_allclose(aux["r1"], 0.5 * 0.3 * 0.58, rtol=1e-9)


def test_maps_of_logits_are_averaged():
  """Four discriminators in one map: the losses are the means of theirs, the penalty that of the mean logit."""
  x0, still, scales = data(3, jnp.float32), Partial(lambda x, t, latent: 0.5 * x), jnp.asarray([1.0, -2.0, 0.5, 3.0])
  loss = denoising_gan(chain(), LATENT, r1=1.0)
  one = lambda p, x, t, x_t: p * jnp.sum(x, axis=1)
  each = [loss(KEY, x0, Players(still, Partial(one, p)))[1] for p in scales]
  square = lambda p, x, t, x_t: (p[None] * jnp.sum(x, axis=1)[:, None]).reshape(-1, 2, 2)
  _, aux = loss(KEY, x0, Players(still, Partial(square, scales)))
  for name in ("generator_loss", "discriminator_loss", "real_logit", "fake_logit"):
    np.testing.assert_allclose(aux[name], np.mean([a[name] for a in each], axis=0), rtol=1e-5)
  np.testing.assert_allclose(aux["r1"], 0.5 * 2 * 0.625**2, rtol=1e-6)


def test_the_lazy_penalty_is_on_average_the_whole_one(x64):
  """Values and gradients over a period, the same examples at every step."""
  params, x0 = parameters(), data(4)
  lazy, whole = (denoising_gan(chain(), LATENT, r1=0.7, r1_every=every) for every in (3, 1))
  run = jax.jit(lambda params, step: lazy(KEY, x0, players(params), step=step))
  gradient = jax.jit(jax.grad(lambda params, step: lazy(KEY, x0, players(params), step=step)[0].sum()))
  steps = [jnp.int32(step) for step in range(6)]
  penalties = [run(params, step)[1]["r1"] for step in steps]
  assert [bool(jnp.all(penalty > 0)) for penalty in penalties] == [True, False, False] * 2
  assert all(jnp.all(penalty == 0) for k, penalty in enumerate(penalties) if k % 3)
  for step in (None, jnp.int32(5)):  # without a step, and every time
    loss = lazy if step is None else whole
    np.testing.assert_allclose(
      np.mean(penalties, axis=0), loss(KEY, x0, players(params), step=step)[1]["r1"], rtol=1e-12
    )
  mean = jax.tree.map(lambda *g: sum(g) / 6, *(gradient(params, step) for step in steps))
  expected = jax.grad(lambda params: whole(KEY, x0, players(params))[0].sum())(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), mean, expected)


def normal_log_density(x, mean, variance):
  return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def test_at_the_best_discriminator_the_loss_is_the_jensen_shannon_divergence(x64):
  """Data N(0, c), G = a x_t + s z: both denoising distributions are normal, so D is known, and JSD an integral.

  The generator is the exact one (JSD = 0) or off, too narrow or too wide; the mean of 40,000 losses is within 4
  standard errors of 2 log 2 - 2 JSD, and any other discriminator has a higher one on the same examples.
  """
  c, count, two = 0.5, 40_000, chain(2)
  x0 = jnp.sqrt(c) * jax.random.normal(jax.random.key(3), (count, 1))

  def exact(t):
    alpha, sigma = two.marginal(t)
    total = alpha**2 * c + sigma**2
    return alpha * c / total, jnp.sqrt(c * sigma**2 / total)

  def denoising(t, a, s, x_t):
    """Mean and variance of x_{t-1} given x_t for x_0 = a x_t + s z."""
    mean, variance = two.posterior(a * x_t, x_t, t)
    of_data = two.posterior(jnp.ones_like(x_t), jnp.zeros_like(x_t), t)[0]
    return mean, of_data**2 * s**2 + variance

  for t in (1, 2):
    a, s = exact(t)
    for off, narrow in ((1.0, 1.0), (0.8, 0.4) if t == 1 else (0.5, 5.0)):
      make = lambda x, time, latent: off * a * x + narrow * s * latent

      def log_ratio(x, x_t):
        q, p = denoising(t, a, s, x_t), denoising(t, off * a, narrow * s, x_t)
        return normal_log_density(x, *q) - normal_log_density(x, *p)

      def best(scale, x, time, x_t):
        return scale * log_ratio(x, x_t)[:, 0]

      run = jax.jit(
        lambda scale, offset: denoising_gan(two, 1, r1=0.0)(
          KEY,
          x0,
          Players(Partial(make), Partial(lambda p, *x, x_t: best(p, *x, x_t) + offset, scale)),
          u=jnp.full(count, (t - 0.5) / 2),
        )[1]["discriminator_loss"]
      )
      found = run(1.0, 0.0)
      total = two.marginal(t)[0] ** 2 * c + two.marginal(t)[1] ** 2
      x_t, x = jnp.linspace(-6, 6, 121)[:, None] * jnp.sqrt(total), jnp.linspace(-7, 7, 4001)[None]
      q, p = (jnp.exp(normal_log_density(x, *denoising(t, *how, x_t))) for how in ((a, s), (off * a, narrow * s)))
      middle = 0.5 * (q + p)
      relative = lambda r: jnp.sum(
        jnp.where(r > 0, r * jnp.log(jnp.where(r > 0, r, 1.0) / jnp.where(r > 0, middle, 1.0)), 0.0), axis=1
      )
      jsd = 0.5 * (relative(q) + relative(p)) * (x[0, 1] - x[0, 0])
      weight = jax.nn.softmax(-0.5 * x_t[:, 0] ** 2 / total)
      expected = 2 * jnp.log(2) - 2 * jnp.sum(weight * jsd)
      error = found.std() / np.sqrt(count)
      assert abs(found.mean() - expected) <= 4 * error + 1e-9, (t, off)
      if off == 1.0:
        np.testing.assert_allclose(expected, 2 * jnp.log(2), rtol=1e-6)
        continue
      assert expected < 2 * jnp.log(2) - 20 * error
      for scale, offset in ((0.5, 0.0), (1.5, 0.0), (1.0, 0.4), (1.0, -0.4)):
        worse = run(scale, offset) - found
        assert worse.mean() > 4 * worse.std() / np.sqrt(count)


def test_examples_depend_on_their_own_keys_alone():
  params, x0 = parameters(jnp.float32), data(8, jnp.float32)
  loss = denoising_gan(chain(), LATENT, r1=0.5, stratified=False)
  keys = jd.example_keys(KEY, 0, 8)
  value, aux = loss(keys, x0, players(params))
  part, _ = loss(keys[3:6], x0[3:6], players(params))
  np.testing.assert_allclose(part, value[3:6], rtol=1e-5)
  assert len(np.unique(np.round(aux["real_logit"], 6))) == 8
  np.testing.assert_array_equal(value, loss(KEY, x0, players(params))[0])


# ----- the sampler


def test_a_step_of_the_sampler_is_that_of_ddpm(x64):
  """x -> A x + std z with a linear denoiser and no latent: A and std are those of `samplers.ancestral`, std^2 beta~."""
  eight, c = chain(8), 0.3
  sde = eight.sde()

  def score(x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    return -x / (alpha**2 * c + sigma**2)

  def steps(sampler, network):
    same = jnp.stack([jd.example_keys(KEY, 0, 1)[0]] * 2)
    path = np.asarray(jax.jit(lambda x: sampler(same, x, network).path)(jnp.asarray([[0.0], [1.0]]))[..., 0])
    maps = np.diff(path, axis=1)[1:, 0] / np.diff(path, axis=1)[:-1, 0]
    return maps, path[1:, 0] - maps * path[:-1, 0]

  denoiser = lambda x, t, latent: jd.denoised(sde, score, x, t)
  maps, noise = steps(jd.samplers.denoising_gan(eight, LATENT, path=1), denoiser)
  expected, _ = steps(jd.samplers.ancestral(eight, path=1), score)
  np.testing.assert_allclose(maps, expected, rtol=1e-9)
  example = jd.example_keys(KEY, 0, 1)
  own = [jd.keys.split(jd.keys.fold_in(example, i))[1] for i in range(8)]
  z = np.asarray([jd.keys.normal(jd.keys.per_example(key, 1), (1, 1), jnp.float64)[0, 0] for key in own])
  np.testing.assert_allclose(
    (noise / z) ** 2, eight.variance("beta_tilde", jnp.arange(8, 0, -1)), rtol=1e-8, atol=1e-20
  )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_generator_samples_the_data_in_any_number_of_steps(steps):
  """G draws from q(x_0 | x_t) for data N(m, c): mean and variance of 20,000 samples and of all steps before."""
  m, c, count, few = 0.6, 0.25, 20_000, chain(steps)
  sde = few.sde()

  def exact(x, t, latent):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    total = alpha**2 * c + sigma**2
    return m + alpha * c / total * (x - alpha * m) + jnp.sqrt(c * sigma**2 / total) * latent

  start, key = jax.random.split(KEY)
  alpha, sigma = few.marginal(jnp.arange(steps, -1, -1))
  mean, variance = alpha * m, alpha**2 * c + sigma**2
  x_T = mean[0] + jnp.sqrt(variance[0]) * sde.prior_sample(start, (count, 1))
  sample = jax.jit(lambda x: jd.samplers.denoising_gan(few, 1, path=1)(key, x, exact))(x_T)
  path = sample.path[..., 0]
  assert jnp.all(jnp.abs(path.mean(1) - mean) < 4 * jnp.sqrt(variance / count))
  assert jnp.all(jnp.abs(path.var(1) / variance - 1) < 4 * np.sqrt(2 / count))
  assert sample.nfe.tolist() == [steps] * count
  assert jnp.all(sample.status.code == 0)


def test_samples_do_not_depend_on_their_batch():
  params, x = parameters(jnp.float32)["generator"], data(5, jnp.float32)
  sampler = jd.samplers.denoising_gan(chain(), LATENT)
  whole = sampler(KEY, x, Partial(generator, params)).x
  alone = sampler(jd.example_keys(KEY, 3, 1), x[3:4], Partial(generator, params)).x
  np.testing.assert_allclose(alone, whole[3:4], rtol=1e-6)
  assert len(np.unique(np.round(sampler(KEY, jnp.ones((5, 2)), Partial(generator, params)).x[:, 0], 6))) == 5


# ----- autoencoders


def squares(key, x, auto):
  reconstruction = auto(x)
  return jnp.sum((x - reconstruction) ** 2, axis=1), {"squares": jnp.mean(reconstruction, axis=1)}


def patches(params, x):
  return jnp.tanh(x[:, :, None] * params[None, None])


def patch_players(params):
  auto = Partial(lambda p, x: jnp.tanh(x @ p), params["generator"])
  return Players(auto, Partial(patches, params["discriminator"]))


def test_the_patch_loss_has_the_gradients_of_both_sides(x64):
  draw = lambda k, *shape: jax.random.normal(jax.random.key(k), shape)
  params = {"generator": draw(1, 2, 2), "discriminator": draw(2, 3)}
  x, weight = data(6), 0.3
  loss = patch_adversarial(squares, lambda key, x, auto: auto(x), weight, start=10)
  run = lambda params, **more: loss(KEY, x, patch_players(params), **more)
  gradient = jax.grad(lambda params: run(params)[0].sum())(params)
  direction = jax.tree.map(lambda p: draw(p.size + 3, *p.shape), params)

  own = lambda value, aux: {
    "generator": squares(KEY, x, patch_players(value).generator)[0] + weight * aux["generator_loss"],
    "discriminator": aux["discriminator_loss"],
  }
  for name in params:
    moved = [params | {name: params[name] + sign * 1e-5 * direction[name]} for sign in (1, -1)]
    up, down = (own(value, run(value)[1])[name].sum() for value in moved)
    np.testing.assert_allclose(jnp.sum(gradient[name] * direction[name]), (up - down) / 2e-5, rtol=1e-7)

  value, aux = run(params)
  logits = {
    name: patches(params["discriminator"], v) for name, v in (("real", x), ("fake", jnp.tanh(x @ params["generator"])))
  }
  hand = np.log1p(np.exp(-np.asarray(logits["real"]))).mean((1, 2)) + np.log1p(np.exp(np.asarray(logits["fake"]))).mean(
    (1, 2)
  )
  fooled = np.log1p(np.exp(-np.asarray(logits["fake"]))).mean((1, 2))
  np.testing.assert_allclose(aux["generator_loss"], fooled, rtol=1e-9)
  np.testing.assert_allclose(aux["discriminator_loss"], hand, rtol=1e-9)
  np.testing.assert_allclose(
    value, squares(KEY, x, patch_players(params).generator)[0] + 0.3 * aux["generator_loss"] + hand
  )
  assert set(aux) == {"squares", "generator_loss", "discriminator_loss", "real_logit", "fake_logit"}
  before = jax.grad(lambda params: run(params, step=jnp.int32(9))[0].sum())(params)
  assert jnp.all(before["discriminator"] == 0)
  plain = jax.grad(lambda p: squares(KEY, x, patch_players({**params, "generator": p}).generator)[0].sum())
  np.testing.assert_allclose(before["generator"], plain(params["generator"]), rtol=1e-12)
  np.testing.assert_allclose(run(params, step=jnp.int32(10))[0], value)


# ----- training


@pytest.mark.standard_promotion
def test_one_gradient_trains_both_on_any_layout():
  """Two optimizers, the penalty every other step, 3 steps: 8 devices by jit and by pmap as on one."""
  fields = {"width": 16, "depth": 1}
  make = MLP(**fields, conditions={"latent": conditioning.Embedding(LATENT)})
  judge = VectorDiscriminator(**fields)
  loss = denoising_gan(chain(), LATENT, r1=0.5, r1_every=2)
  optimizer = optax.partition(
    {"generator": optax.sgd(0.1), "discriminator": optax.sgd(0.3)},
    lambda params: {name: jax.tree.map(lambda _: name, group) for name, group in params.items()},
  )

  def objective(params, keys, batch):
    both = Players(Partial(make.apply, params["generator"]), Partial(judge.apply, params["discriminator"]))
    return loss(keys, batch["x"], both, u=batch["u"], step=batch["step"][0])

  def init():
    x, t = jnp.zeros((1, 2)), jnp.zeros(1)
    params = {
      "generator": make.init(jax.random.key(1), x, t, latent=jnp.zeros((1, LATENT))),
      "discriminator": judge.init(jax.random.key(2), x, t, x_t=x),
    }
    return init_state(params, optimizer, KEY)

  devices, x, index = jax.local_devices(), np.asarray(data(16, jnp.float32)), np.arange(16, dtype=np.int32)
  launchers = {
    "one": jit_launcher(make_mesh(devices[:1])),
    "jit": jit_launcher(make_mesh(devices)),
    "pmap": pmap_launcher(devices),
  }
  found = {}
  for name, launcher in launchers.items():
    step = launcher.compile(make_train_step(objective, optimizer, 0.9, 16))
    state, where = launcher.create(init), launcher.put(index)
    penalties = []
    for _ in range(3):
      state, metrics = step(state, launcher.put({"x": x}), where)
      penalties.append(float(metrics["r1"]))
    assert [penalty > 0 for penalty in penalties] == [True, False, True]
    found[name] = jax.device_get(state.params), penalties
  start = jax.device_get(jax.jit(init)().params)
  for group in ("generator", "discriminator"):
    assert (
      max(
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start[group], found["one"][0][group])), strict=True)
      )
      > 1e-3
    )
  for name in ("jit", "pmap"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[name], found["one"])


def test_shipped_networks_play():
  """A U-Net told z as an embedding and the discriminator of images; a reconstruction before patches."""
  make = UNet(
    channels=8, channel_multipliers=(1, 2), blocks=1, groups=4, conditions={"latent": conditioning.Embedding(LATENT)}
  )
  judge, x = StepDiscriminator(channels=4, channel_multipliers=(1, 2)), jnp.ones((2, 8, 8, 1))
  patch = PatchDiscriminator(channels=4, channel_multipliers=(1, 2))

  def run(key):
    t, z = jnp.ones(2), jnp.ones((2, LATENT))
    both = Players(
      Partial(make.apply, make.init(key, x, t, latent=z)), Partial(judge.apply, judge.init(key, x, t, x_t=x))
    )
    sample = jd.samplers.denoising_gan(chain(), LATENT)(key, x, both.generator)
    halves = Players(Partial(lambda p, x: p * x, jnp.float32(0.5)), Partial(patch.apply, patch.init(key, x)))
    loss = lambda key, x, auto: (jnp.sum((auto(x) - x) ** 2, axis=(1, 2, 3)), {})
    return (
      denoising_gan(chain(), LATENT)(key, x, both),
      sample.x,
      patch_adversarial(loss, lambda key, x, auto: auto(x), 0.1)(key, x, halves),
    )

  (value, _), sample, (patched, _) = jax.eval_shape(run, KEY)
  assert value.shape == patched.shape == (2,)
  assert sample.shape == x.shape


# ----- what is refused


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
  ("call", "kind", "message"),
  [
    (lambda: denoising_gan(chain(), 0), ValueError, "latent_dim must be at least 1, the size of z; got 0"),
    (lambda: jd.samplers.denoising_gan(chain(), 0), ValueError, "latent_dim must be at least 1"),
    (lambda: denoising_gan(chain(), 1, r1=-1.0), ValueError, "r1 must not be negative, got -1.0"),
    (lambda: denoising_gan(chain(), 1, r1_every=0), ValueError, "r1_every must be at least 1, got 0"),
    (lambda: denoising_gan(jd.VP(), 1), TypeError, "chain must be a Chain, got VP"),
    (lambda: denoising_gan(jd.ddpm.Chain, 1), TypeError, "chain is a class: did you forget to call it"),
    (lambda: jd.samplers.denoising_gan(chain(), 1, path=3), ValueError, "path must divide the number of steps, 4"),
    (lambda: patch_adversarial(squares, squares, 0.0), ValueError, "weight must be positive, got 0.0"),
    (lambda: patch_adversarial(squares, squares, 1.0, start=-1), ValueError, "start must be at least 0, got -1"),
  ],
)
def test_wrong_options_are_refused(call, kind, message):
  with pytest.raises(kind, match=message):
    call()


@pytest.mark.usefixtures("untyped")
def test_wrong_players_are_refused():
  loss, x, still = denoising_gan(chain(), 1), jnp.ones((4, 2)), Partial(lambda x, t, latent: x)
  judge = Partial(lambda x, t, x_t: x[:, 0])
  with pytest.raises(
    TypeError, match=r"discriminator must be a function and a pytree, got function: pass jax.tree_util"
  ):
    loss(KEY, x, Players(still, lambda x, t, x_t: x[:, 0]))
  with pytest.raises(TypeError, match="players must be a Players, got Partial, which lacks"):
    loss(KEY, x, judge)
  with pytest.raises(
    ValueError, match=r"discriminator must return logits \[b\] or \[b, ...\] for x \(4, 2\); got \(\)"
  ):
    loss(KEY, x, Players(still, Partial(lambda x, t, x_t: x.sum())))
  with pytest.raises(TypeError, match="discriminator must return floats, got int32"):
    loss(KEY, x, Players(still, Partial(lambda x, t, x_t: jnp.zeros(4, jnp.int32))))
  with pytest.raises(ValueError, match=r"generator must return an array of the shape of x, \(4, 2\); got \(4, 1\)"):
    loss(KEY, x, Players(Partial(lambda x, t, latent: latent), judge))
  for name in ("latent", "x_t"):
    with pytest.raises(ValueError, match=f"cond has '{name}', by which the networks are told something else"):
      loss(KEY, x, Players(still, judge), {name: jnp.ones(4)})
  with pytest.raises(ValueError, match="cond has 'latent'"):
    jd.samplers.denoising_gan(chain(), 1)(KEY, x, still, {"latent": jnp.ones((4, 1))})
  with pytest.raises(ValueError, match=r"reconstruct must return an array of the shape of x, \(4, 2\); got \(4, 1\)"):
    patch_adversarial(squares, lambda key, x, auto: x[:, :1], 1.0)(
      KEY, x, Players(lambda x: x, Partial(lambda x: x[:, 0]))
    )
