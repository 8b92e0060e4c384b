"""Denoising GANs at work: the sampler is DDPM's, patches are judged, networks are trained on any layout of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import compiled
from test_adversarial import KEY, LATENT, Partial, chain, data, squares

import jaxdiff as jd
from jaxdiff.losses import Players, denoising_gan, patch_adversarial
from jaxdiff.models import MLP, PatchDiscriminator, StepDiscriminator, UNet, VectorDiscriminator, conditioning
from jaxdiff.parallel import jit_launcher, make_mesh, pmap_launcher
from jaxdiff.training.state import init_state
from jaxdiff.training.step import make_train_step

# ----- the sampler


def test_a_step_of_the_sampler_is_that_of_ddpm(x64):
  """x -> A x + std z with a linear denoiser and no latent: A and std^2 = beta~ are those of the posterior."""
  c, betas = 0.3, np.asarray(jd.ddpm.vp_betas(8))

  def run(eight, key):
    sde, example = eight.sde(), jd.example_keys(key, 0, 1)

    def score(x, t):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      return -x / (alpha**2 * c + sigma**2)

    paths = [
      sampler(jnp.stack([example[0]] * 2), jnp.asarray([[0.0], [1.0]]), network).path[..., 0]
      for sampler, network in (
        (jd.samplers.denoising_gan(eight, LATENT, path=1), lambda x, t, latent: jd.denoised(sde, score, x, t)),
        (jd.samplers.ancestral(eight, path=1), score),
      )
    ]
    own = [jd.keys.split(jd.keys.fold_in(example, i))[1] for i in range(8)]
    z = [jd.keys.normal(jd.keys.per_example(key, 1), (1, 1), jnp.float64)[0, 0] for key in own]
    return paths, jnp.stack(z)

  paths, z = compiled(run, chain(8), KEY)
  maps, expected = (np.diff(path, axis=1)[1:, 0] / np.diff(path, axis=1)[:-1, 0] for path in paths)
  np.testing.assert_allclose(maps, expected, rtol=1e-9)
  noise = paths[0][1:, 0] - maps * paths[0][:-1, 0]
  sigma2 = 1 - np.concatenate([[1.0], np.cumprod(1 - betas)])
  tilde = betas * sigma2[:-1] / sigma2[1:]
  np.testing.assert_allclose((noise / z) ** 2, tilde[::-1], rtol=1e-8, atol=1e-20)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_generator_samples_the_data_in_any_number_of_steps(steps):
  """G draws from q(x_0 | x_t) for data N(m, c): mean and variance of 20,000 samples and of all steps before."""
  m, c, count = 0.6, 0.25, 20_000

  def run(few, key):
    sde, (start, key) = few.sde(), jax.random.split(key)

    def exact(x, t, latent):
      alpha, sigma = (v[:, None] for v in sde.marginal(t))
      total = alpha**2 * c + sigma**2
      return m + alpha * c / total * (x - alpha * m) + jnp.sqrt(c * sigma**2 / total) * latent

    alpha, sigma = few.marginal(jnp.arange(steps, -1, -1))
    mean, variance = alpha * m, alpha**2 * c + sigma**2
    x_T = mean[0] + jnp.sqrt(variance[0]) * sde.prior_sample(start, (count, 1))
    return mean, variance, jd.samplers.denoising_gan(few, 1, path=1)(key, x_T, exact)

  mean, variance, sample = compiled(run, chain(steps), KEY)
  path = sample.path[..., 0]
  assert np.all(np.abs(path.mean(1) - mean) < 4 * np.sqrt(variance / count))
  assert np.all(np.abs(path.var(1) / variance - 1) < 4 * np.sqrt(2 / count))
  assert sample.nfe.tolist() == [steps] * count
  assert np.all(sample.status.code == 0)


# ----- autoencoders


def patches(params, x):
  return jnp.tanh(x[:, :, None] * params[None, None])


def patch_players(params):
  auto = Partial(lambda p, x: jnp.tanh(x @ p), params["generator"])
  return Players(auto, Partial(patches, params["discriminator"]))


def test_the_patch_loss_has_the_gradients_of_both_sides(x64):
  rng, x, weight = np.random.default_rng(1), data(6), 0.3
  params = {"generator": rng.normal(size=(2, 2)), "discriminator": rng.normal(size=3)}
  loss = patch_adversarial(squares, lambda key, x, auto: auto(x), weight, start=10)

  @jax.jit
  def run(params, step):
    total = lambda params: (lambda found: (found[0].sum(), found))(loss(KEY, x, patch_players(params), step=step))
    return jax.grad(total, has_aux=True)(params)

  def by_hand(params):
    """(squares, how well the fakes pass, what the discriminator loses)."""
    fake, w = np.tanh(x @ params["generator"]), params["discriminator"]
    real_logits, fake_logits = (np.tanh(v[:, :, None] * w) for v in (x, fake))
    lost = np.log1p(np.exp(-real_logits)).mean((1, 2)) + np.log1p(np.exp(fake_logits)).mean((1, 2))
    return np.sum((x - fake) ** 2, axis=1), np.log1p(np.exp(-fake_logits)).mean((1, 2)), lost

  for step in (None, np.int32(10)):
    gradient, (value, aux) = jax.device_get(run(params, step))
    error, fooled, lost = by_hand(params)
    np.testing.assert_allclose(aux["generator_loss"], fooled, rtol=1e-9)
    np.testing.assert_allclose(aux["discriminator_loss"], lost, rtol=1e-9)
    np.testing.assert_allclose(value, error + weight * fooled + lost)
    assert set(aux) == {"squares", "generator_loss", "discriminator_loss", "real_logit", "fake_logit"}
  before, _ = jax.device_get(run(params, np.int32(9)))
  for name, own, early in (
    ("generator", lambda e, f, d: e + weight * f, lambda e, f, d: e),
    ("discriminator", lambda e, f, d: d, lambda e, f, d: 0 * d),
  ):
    direction = rng.normal(size=params[name].shape)
    up, down = (by_hand(params | {name: params[name] + size * direction}) for size in (1e-5, -1e-5))
    for found, part in ((gradient, own), (before, early)):
      slope = (part(*up).sum() - part(*down).sum()) / 2e-5
      np.testing.assert_allclose(np.sum(found[name] * direction), slope, rtol=1e-7, atol=1e-12)


# ----- training


@pytest.mark.standard_promotion
@pytest.mark.usefixtures("eight_devices")
def test_one_gradient_trains_both_on_any_layout():
  """Two optimizers, the penalty every other step, 3 steps: 8 devices by jit and by pmap as on one."""
  fields = {"width": 4, "depth": 1}
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

  devices, x, index = jax.local_devices(), data(16, np.float32), np.arange(16, dtype=np.int32)
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
  start = jax.device_get(launchers["one"].create(init).params)
  for group in ("generator", "discriminator"):
    pairs = zip(*map(jax.tree.leaves, (start[group], found["one"][0][group])), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3
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
