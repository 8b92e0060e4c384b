"""DDIM and DDPM against diffusers: its schedulers where it is installed, and the sums that its tests publish.

Its time steps count from 0, ours from 1; its "leading" spacing of n of T steps is T - T/n, .., T/n, 0, and the step
below the first goes to the data. Only arithmetic is compared: the network is a fixed function of x and step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

KEY = jax.random.key(0)
SHAPE = (2, 5)


def chain_of(first=1e-4, last=0.02):
  return jd.ddpm.Chain(jd.ddpm.linear_betas(1000, first, last))


def leading(steps):
  """Our steps for its spacing, the data included."""
  return [t + 1 for t in range(1000 - 1000 // steps, -1, -(1000 // steps))] + [0]


def published(prediction, first=1e-4, steps=None):
  """Its full loop of 10 steps: x from 0 to 1, a network x t / (t + 1), D clipped to [-1, 1]; the sum of |x|."""
  chain = chain_of(first)
  x = jnp.transpose(jnp.arange(768, dtype=jnp.float32).reshape(3, 8, 8, 4) / 768, (3, 0, 1, 2))

  def apply(params, x, t):
    step = (chain.index(t) - 1).astype(x.dtype)[:, None, None, None]
    return x * step / (step + 1)

  score = jd.score_fn(apply, None, chain.sde(), prediction)

  def clipped(x, t):
    return score(x, t)

  clipped.denoised = lambda x, t: jnp.clip(score.denoised(x, t), -1, 1)
  sampler = jd.samplers.ddim(chain.sde(), chain.time(jnp.asarray(steps or leading(10))))
  return float(jnp.sum(jnp.abs(jax.jit(lambda x: sampler(KEY, x, clipped).x)(x))))


def test_published_sums():
  """Of test_full_loop_no_noise and its kin, given there to 4 digits, for schedules that end at alpha 1 or at step 1."""
  noise, velocity = jd.predictions.noise(), jd.predictions.velocity()
  assert abs(published(noise) - 172.0067) < 1e-2
  assert abs(published(velocity) - 52.5302) < 1e-2
  assert abs(published(noise, 0.01) - 149.8295) < 1e-2
  assert abs(published(noise, 0.01, leading(10)[:-1]) - 149.0784) < 1e-2


def network(x, step, tanh):
  """A fixed bounded mix of x and the step, theirs and ours."""
  return tanh(0.8 * x + 0.3 * x * x - 0.002 * step) + 0.1 * x


def ours(sampler, chain, prediction, x):
  def apply(params, x, t):
    return network(x, (chain.index(t) - 1).astype(x.dtype)[:, None], jnp.tanh)

  score = jd.score_fn(apply, None, chain.sde(), prediction)
  return np.asarray(jax.jit(lambda x: sampler(KEY, x, score).x)(x))


def start_and_noise(steps):
  example = jd.example_keys(KEY, 0, len(jnp.zeros(SHAPE)))
  noise = [jd.keys.normal(jd.keys.fold_in(example, i), SHAPE) for i in range(steps)]
  return jax.random.normal(jax.random.key(7), SHAPE), [np.asarray(z) for z in noise]


def check(found, expected):
  assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))


PREDICTIONS = {
  "epsilon": jd.predictions.noise(),
  "sample": jd.predictions.data(),
  "v_prediction": jd.predictions.velocity(),
}


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_that_of_diffusers(steps, kind):
  torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
  diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")
  x, noise = start_and_noise(steps)
  chain = chain_of()
  for eta in (0.0, 1.0):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, prediction_type=kind)
    scheduler.set_timesteps(steps)
    state = torch.from_numpy(np.array(x))
    for t, z in zip(scheduler.timesteps, noise, strict=True):
      output = network(state, float(t), torch.tanh)
      given = {"variance_noise": torch.from_numpy(np.array(z))} if eta else {}
      state = scheduler.step(output, int(t), state, eta=eta, **given).prev_sample
    nodes = leading(steps)
    assert nodes[:-1] == [int(t) + 1 for t in scheduler.timesteps]
    sampler = jd.samplers.ddim(chain.sde(), chain.time(jnp.asarray(nodes)), eta)
    check(ours(sampler, chain, PREDICTIONS[kind], x), state.numpy())


@pytest.mark.parametrize(("theirs", "variance"), [("fixed_small", "beta_tilde"), ("fixed_large", "beta")])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_is_that_of_diffusers(steps, theirs, variance, monkeypatch):
  torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
  diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")
  module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
  x, noise = start_and_noise(steps)
  given = iter(noise)
  monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: torch.from_numpy(np.array(next(given))))
  scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=theirs)
  scheduler.set_timesteps(steps)
  state = torch.from_numpy(np.array(x))
  for t in scheduler.timesteps:
    state = scheduler.step(network(state, float(t), torch.tanh), t, state).prev_sample
  chain = chain_of()
  sampler = jd.samplers.ancestral(chain, leading(steps), variance)
  check(ours(sampler, chain, PREDICTIONS["epsilon"], x), state.numpy())


@pytest.mark.parametrize("steps", [10, 50])
def test_learned_range_is_that_of_diffusers(steps, monkeypatch):
  """Its network has the variance in the second half of the channels, axis 1: here the last axis."""
  torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
  diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")
  module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
  x, noise = start_and_noise(steps)
  given = iter(noise)
  monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: torch.from_numpy(np.array(next(given))))
  scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
  scheduler.set_timesteps(steps)
  state = torch.from_numpy(np.array(x))
  for t in scheduler.timesteps:
    output = torch.cat([network(state, float(t), torch.tanh), torch.sin(state)], dim=1)
    state = scheduler.step(output, t, state).prev_sample
  chain = chain_of()

  def apply(params, x, t):
    step = (chain.index(t) - 1).astype(x.dtype)[:, None]
    return jnp.concatenate([network(x, step, jnp.tanh), jnp.sin(x)], axis=-1)

  score = jd.score_fn(apply, None, chain.sde(), jd.predictions.noise(), learned_variance=True)
  sampler = jd.samplers.ancestral(chain, leading(steps), "learned")
  check(np.asarray(jax.jit(lambda x: sampler(KEY, x, score).x)(x)), state.numpy())
