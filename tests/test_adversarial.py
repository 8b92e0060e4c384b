"""The game of a denoising GAN: its pairs, gradients, penalty and optimum, and what is refused.

`Partial(f, params)` of small functions stand for the networks; gradients are compared with central differences of the
losses that are reported, in float64, and the optimum with densities on a grid.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from oracles import compiled

import jaxdiff as jd
from jaxdiff.losses import Players, denoising_gan, patch_adversarial

KEY = jax.random.key(0)
Partial = jax.tree_util.Partial
LATENT = 3


def chain(steps=4):
  return jd.ddpm.Chain(jd.ddpm.vp_betas(steps))


def generator(params, x, t, latent):
  return jnp.tanh(params["a"]) * x + latent @ params["b"] + t[:, None] * params["c"]


def discriminator(params, x, t, x_t):
  return jnp.sum(jnp.tanh(x @ params["w"] + x_t @ params["v"] + t[:, None]), axis=1)


def parameters(dtype=np.float64):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {
    "generator": {"a": draw(), "b": draw(LATENT, 2), "c": draw(1, 2)},
    "discriminator": {"w": draw(2, 4), "v": draw(2, 4)},
  }


def players(params):
  return Players(Partial(generator, params["generator"]), Partial(discriminator, params["discriminator"]))


def data(count, dtype=np.float64):
  return np.random.default_rng(7).normal(size=(count, 2)).astype(dtype)


def moved(params, name, size):
  """The parameters with those of one player moved along a direction, and that direction."""
  rng = np.random.default_rng(3)
  direction = jax.tree.map(lambda p: rng.normal(size=np.shape(p)), params[name])
  return params | {name: jax.tree.map(lambda p, d: p + size * d, params[name], direction)}, direction


def test_each_player_has_the_gradient_of_its_own_loss(x64):
  """Along a random direction, by central differences of what is reported: no stop-gradient can hide in them."""
  loss, params, x0 = denoising_gan(chain(), LATENT, r1=0.7), parameters(), data(6)

  @jax.jit
  def run(params):
    total = lambda params: (lambda found: (found[0].sum(), found))(loss(KEY, x0, players(params)))
    return jax.grad(total, has_aux=True)(params)

  gradient, whole = run(params)
  for name, parts in (("generator", ["generator_loss"]), ("discriminator", ["discriminator_loss", "r1"])):
    (up, direction), (down, _) = (moved(params, name, size) for size in (1e-5, -1e-5))
    reported = lambda params, parts=parts: sum(run(params)[1][1][part].sum() for part in parts)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), jax.device_get(gradient[name]), direction)))
    np.testing.assert_allclose(slope, (reported(up) - reported(down)) / 2e-5, rtol=1e-7)
    assert abs(slope) > 0.1
  parts = jax.device_get(whole[1])
  np.testing.assert_allclose(whole[0], sum(parts[part] for part in ("generator_loss", "discriminator_loss", "r1")))


def test_pairs_are_those_of_the_chain(x64):
  """Moments of q(x_{t-1}, x_t | x_0), and of q(x_{t-1} | x_t, c) for a generator that says c; noises are independent.

  Of 20,000 draws a mean is within 4 / sqrt(20,000) standard deviations, that of a product of two unit normals as well.
  """
  count, x0, c = 20_000, np.array([[0.8, -1.2]]), np.array([[2.0, 1.0]])

  @jax.jit
  def watch(four, u):
    seen, latents = [], []
    constant = Partial(lambda x, time, latent: (latents.append(latent), jnp.broadcast_to(c, x.shape))[1])
    network = Partial(lambda p, x, t, x_t: (seen.append((x, x_t, t)), jnp.sum(x * p, axis=1))[1], jnp.ones((1, 2)))
    denoising_gan(four, 2, r1=0.0)(KEY, jnp.broadcast_to(x0, (count, 2)), Players(constant, network), u=u)
    given = jnp.broadcast_to(c, (count, 2))
    t = 1 + jnp.floor(4 * u).astype(jnp.int32)
    numbers = four.marginal(t[0] - 1), four.marginal(t[0]), four.variance("beta", t[0])
    return seen[:3], latents, four.posterior(given, seen[0][1], t), numbers

  for t in (1, 3):
    found = jax.device_get(watch(chain(), np.full(count, (t - 0.5) / 4)))
    ((real, x_t, time), (fake, _, _), (again, _, _)), latents, (mean, variance), numbers = found
    (alpha, sigma), (alpha_t, sigma_t), beta = numbers
    np.testing.assert_array_equal(time, t / 4)
    np.testing.assert_array_equal(fake, again)
    noise = (x_t - alpha_t * x0) / sigma_t
    if t == 1:
      np.testing.assert_allclose(real, np.broadcast_to(x0, real.shape), rtol=1e-12)
      np.testing.assert_allclose(fake, np.broadcast_to(c, real.shape), rtol=1e-12)
      continue
    within = 4 / np.sqrt(count)
    before = (real - alpha * x0) / sigma
    of_fake = (fake - mean) / np.sqrt(variance)[:, None]
    for unit in (noise, before, of_fake, latents[0]):
      assert np.abs(unit.mean(0)).max() < within
      assert np.abs(unit.var(0) - 1).max() < within * np.sqrt(2)
    correlation = np.sqrt(1 - beta) * sigma / sigma_t
    np.testing.assert_allclose((before * noise).mean(0), correlation, atol=within * np.sqrt(1 + correlation**2))
    of_real = (before - correlation * noise) / np.sqrt(1 - correlation**2)
    for one, other in itertools.combinations((noise, of_real, of_fake, latents[0]), 2):
      assert np.abs((one * other).mean(0)).max() < within


def test_networks_are_told_the_time_of_scores_and_their_conditions():
  u, label = np.array([0.0, 0.3, 0.5, 0.99], np.float32), np.arange(4)

  def run(four):
    told, seen = {"generator": [], "discriminator": []}, []

    def network(name, x, t, **cond):
      told[name].append((t, cond))
      return jnp.zeros_like(x) if name == "generator" else jnp.zeros(len(x))

    both = Players(*(Partial(functools.partial(network, name)) for name in told))
    denoising_gan(four, LATENT)(KEY, jnp.ones((4, 2)), both, {"label": label}, u)
    sampler = jd.samplers.denoising_gan(four, LATENT)
    with jax.disable_jit():
      told["sampler"] = seen
      sampler(KEY, jnp.ones((1, 2)), lambda x, t, latent: (seen.append((t, {})), x)[1])
    return {name: calls[:4] for name, calls in told.items()}

  told = compiled(run, chain())
  for name, other in (("generator", "latent"), ("discriminator", "x_t")):
    t, given = told[name][0]
    np.testing.assert_array_equal(t, np.arange(1, 5) / 4)
    assert set(given) == {"label", other}
  assert told["generator"][0][1]["latent"].shape == (4, LATENT)
  np.testing.assert_array_equal([t[0] for t, _ in told["sampler"]], np.arange(4, 0, -1) / 4)


def test_the_penalty_of_a_quadratic_discriminator_is_in_closed_form(x64):
  """D = x A x / 2 + w x has the gradient A x + w; with one step x_0 itself is what is real."""
  a, w, x0 = np.array([[1.0, 0.4], [0.4, -2.0]]), np.array([0.3, -0.7]), data(5)
  still = Partial(lambda x, t, latent: x)
  quadratic = Partial(lambda p, x, t, x_t: 0.5 * jnp.einsum("bi,ij,bj->b", x, p, x) + x @ w, a)
  linear = Partial(lambda p, x, t, x_t: x @ p, w)

  def run(one, four, x0):
    penalty = lambda chain, judge: denoising_gan(chain, LATENT, r1=0.3)(KEY, x0, Players(still, judge))[1]["r1"]
    return penalty(one, quadratic), penalty(four, linear)

  curved, flat = compiled(run, chain(1), chain(4), x0)
  np.testing.assert_allclose(curved, 0.5 * 0.3 * np.sum((x0 @ a + w) ** 2, axis=1), rtol=1e-9)
  np.testing.assert_allclose(flat, 0.5 * 0.3 * 0.58, rtol=1e-9)


def test_maps_of_logits_are_averaged():
  """Four discriminators in one map: the losses are the means of theirs, the penalty that of the mean logit."""
  scales, still = np.array([1.0, -2.0, 0.5, 3.0], np.float32), Partial(lambda x, t, latent: 0.5 * x)
  one = lambda p, x, t, x_t: p * jnp.sum(x, axis=1)
  square = lambda p, x, t, x_t: (p[None] * jnp.sum(x, axis=1)[:, None]).reshape(-1, 2, 2)

  def run(four, x0):
    play = lambda judge, p: denoising_gan(four, LATENT, r1=1.0)(KEY, x0, Players(still, Partial(judge, p)))[1]
    return jax.vmap(functools.partial(play, one))(scales), play(square, scales)

  each, aux = compiled(run, chain(), data(3, np.float32))
  for name in ("generator_loss", "discriminator_loss", "real_logit", "fake_logit"):
    np.testing.assert_allclose(aux[name], np.mean(each[name], axis=0), rtol=1e-5)
  np.testing.assert_allclose(aux["r1"], 0.5 * 2 * 0.625**2, rtol=1e-6)


def test_the_lazy_penalty_is_on_average_the_whole_one(x64):
  """Values and gradients over a period, the same examples at every step."""
  x0 = data(4)

  @functools.partial(jax.jit, static_argnums=0)
  def run(every, params, step):
    loss = denoising_gan(chain(), LATENT, r1=0.7, r1_every=every)
    total = lambda params: (lambda found: (found[0].sum(), found[1]["r1"]))(loss(KEY, x0, players(params), step=step))
    return jax.grad(total, has_aux=True)(params)

  found = [jax.device_get(run(3, parameters(), np.int32(step))) for step in range(6)]
  penalties = [penalty for _, penalty in found]
  assert [bool(np.all(penalty > 0)) for penalty in penalties] == [True, False, False] * 2
  assert all(np.all(penalty == 0) for k, penalty in enumerate(penalties) if k % 3)
  mean = jax.tree.map(lambda *g: sum(g) / 6, *(gradient for gradient, _ in found))
  for every, step in ((3, None), (1, np.int32(5))):  # without a step, and every time
    expected, penalty = jax.device_get(run(every, parameters(), step))
    np.testing.assert_allclose(np.mean(penalties, axis=0), penalty, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), mean, expected)


def normal_log_density(x, mean, variance):
  return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)


def test_at_the_best_discriminator_the_loss_is_the_jensen_shannon_divergence(x64):
  """Data N(0, c), G = a x_t + s z: both denoising distributions are normal, so D is known, and JSD an integral.

  The generator is the exact one (JSD = 0) or off, too narrow or too wide; the mean of 40,000 losses is within 4
  standard errors of 2 log 2 - 2 JSD, and any other discriminator has a higher one on the same examples.
  """
  c, count = 0.5, 40_000
  x0, betas = np.sqrt(c) * np.random.default_rng(3).normal(size=(count, 1)), np.asarray(jd.ddpm.vp_betas(2))
  alphas = np.sqrt(np.concatenate([[1.0], np.cumprod(1 - betas)]))

  def kernel(t):
    """x_{t-1} = k x_0 + m x_t + noise of variance v."""
    alpha, sigma2, beta = alphas[t - 1], 1 - alphas[t] ** 2, betas[t - 1]
    before = 1 - alpha**2
    return np.array([alpha * beta / sigma2, np.sqrt(1 - beta) * before / sigma2, beta * before / sigma2])

  def denoising(how, numbers, x_t):
    """Mean and variance of x_{t-1} given x_t for x_0 = a x_t + s z."""
    (a, s), (k, m, v) = how, numbers
    return (k * a + m) * x_t, k**2 * s**2 + v

  @jax.jit
  def run(two, numbers, data, model, scale, offset, u):
    def judge(p, x, time, x_t):
      ratio = [normal_log_density(x, *denoising(how, numbers, x_t)) for how in (data, model)]
      return p * (ratio[0] - ratio[1])[:, 0] + offset

    players = Players(Partial(lambda x, time, latent: model[0] * x + model[1] * latent), Partial(judge, scale))
    u = jnp.broadcast_to(u, count)
    return denoising_gan(two, 1, r1=0.0)(KEY, x0, players, u=u)[1]["discriminator_loss"]

  for t in (1, 2):
    alpha, sigma2 = alphas[t], 1 - alphas[t] ** 2
    total = alpha**2 * c + sigma2
    exact = np.array([alpha * c / total, np.sqrt(c * sigma2 / total)])
    for off in ([1.0, 1.0], [0.8, 0.4] if t == 1 else [0.5, 5.0]):
      numbers, model = kernel(t), exact * off
      losses = lambda scale, offset, model=model, t=t: np.asarray(
        run(chain(2), kernel(t), exact, model, scale, offset, (t - 0.5) / 2)
      )
      found = losses(1.0, 0.0)
      x_t, x = np.linspace(-6, 6, 121)[:, None] * np.sqrt(total), np.linspace(-7, 7, 4001)[None]
      logs = [
        -0.5 * (x - m) ** 2 / v - 0.5 * np.log(2 * np.pi * v)
        for m, v in (denoising(h, numbers, x_t) for h in (exact, model))
      ]
      q, p = np.exp(logs)
      middle = 0.5 * (q + p)
      relative = lambda r: np.sum(scipy.special.rel_entr(r, middle), axis=1)
      jsd = 0.5 * (relative(q) + relative(p)) * (x[0, 1] - x[0, 0])
      weight = scipy.special.softmax(-0.5 * x_t[:, 0] ** 2 / total)
      expected = 2 * np.log(2) - 2 * np.sum(weight * jsd)
      error = found.std() / np.sqrt(count)
      assert abs(found.mean() - expected) <= 4 * error + 1e-9, (t, off)
      if off[0] == 1.0:
        np.testing.assert_allclose(expected, 2 * np.log(2), rtol=1e-6)
        continue
      assert expected < 2 * np.log(2) - 20 * error
      for scale, offset in ((0.5, 0.0), (1.5, 0.0), (1.0, 0.4), (1.0, -0.4)):
        worse = losses(scale, offset) - found
        assert worse.mean() > 4 * worse.std() / np.sqrt(count)


def test_examples_depend_on_their_own_keys_alone():
  """In the loss, and in the sampler, whose latents and noises differ between examples."""
  params, x0 = parameters(np.float32), data(8, np.float32)

  def run(params, key, x0):
    loss, keys = denoising_gan(chain(), LATENT, r1=0.5, stratified=False), jd.example_keys(key, 0, 8)
    one = lambda key, x: loss(key[None], x[None], players(params))[0][0]
    singly = jax.vmap(one)(keys, x0)
    sampler = lambda key, x: jd.samplers.denoising_gan(chain(), LATENT)(key, x, players(params).generator).x
    drawn = sampler(key, jnp.ones((8, 2))), jax.vmap(lambda key: sampler(key[None], jnp.ones((1, 2)))[0])(keys)
    return loss(keys, x0, players(params)), loss(key, x0, players(params))[0], singly, drawn

  (value, aux), same, singly, (together, alone) = compiled(run, params, KEY, x0)
  np.testing.assert_allclose(singly, value, rtol=1e-5)
  np.testing.assert_array_equal(value, same)
  np.testing.assert_allclose(alone, together, rtol=1e-5)
  assert len(np.unique(np.round(aux["real_logit"], 6))) == 8
  assert len(np.unique(np.round(together[:, 0], 6))) == 8


def squares(key, x, auto):
  reconstruction = auto(x)
  return jnp.sum((x - reconstruction) ** 2, axis=1), {"squares": jnp.mean(reconstruction, axis=1)}


# ----- what is refused


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


def test_wrong_players_are_refused():
  game, x, still = denoising_gan(chain(), 1), np.ones((4, 2), np.float32), Partial(lambda x, t, latent: x)
  judge = Partial(lambda x, t, x_t: x[:, 0])
  loss = lambda players, cond={}: jax.eval_shape(lambda x: game(KEY, x, players, cond), x)
  with pytest.raises(
    TypeError, match=r"discriminator must be a function and a pytree, got function: pass jax.tree_util"
  ):
    loss(Players(still, lambda x, t, x_t: x[:, 0]))
  with pytest.raises(TypeError, match="players must be a Players, got Partial, which lacks"):
    loss(judge)
  with pytest.raises(
    ValueError, match=r"discriminator must return logits \[b\] or \[b, ...\] for x \(4, 2\); got \(\)"
  ):
    loss(Players(still, Partial(lambda x, t, x_t: x.sum())))
  with pytest.raises(TypeError, match="discriminator must return floats, got int32"):
    loss(Players(still, Partial(lambda x, t, x_t: jnp.zeros(4, jnp.int32))))
  with pytest.raises(ValueError, match=r"generator must return an array of the shape of x, \(4, 2\); got \(4, 1\)"):
    loss(Players(Partial(lambda x, t, latent: latent), judge))
  for name in ("latent", "x_t"):
    with pytest.raises(ValueError, match=f"cond has '{name}', by which the networks are told something else"):
      loss(Players(still, judge), {name: np.ones(4, np.float32)})
  sampler = jd.samplers.denoising_gan(chain(), 1)
  with pytest.raises(ValueError, match="cond has 'latent'"):
    jax.eval_shape(lambda x: sampler(KEY, x, still, {"latent": jnp.ones((4, 1))}), x)
  patch = patch_adversarial(squares, lambda key, x, auto: x[:, :1], 1.0)
  with pytest.raises(ValueError, match=r"reconstruct must return an array of the shape of x, \(4, 2\); got \(4, 1\)"):
    jax.eval_shape(lambda x: patch(KEY, x, Players(lambda x: x, Partial(lambda x: x[:, 0]))), x)
