"""The samplers against those of diffusers, where it is installed: the same chain, network, x_T and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")

S = jd.samplers
SHAPE = (2, 4, 4, 3)
STEPS = pytest.mark.parametrize("steps", [10, 50])


def network(x, t, module):
  """A nonlinear function of x and their step t, 0 .. 999; for jax and torch alike."""
  return module.tanh(0.7 * x) + 0.3 * module.sin(2.0 * x + 0.004 * t) * (t / 1000)


def ours(chain, timesteps, x_T, make, key):
  """Our sampler over their timesteps (theirs count from 0) and then the data."""
  ts = chain.time(jnp.asarray([*(np.asarray(timesteps).round().astype(int) + 1), 0]))
  apply = lambda params, x, t: network(x, (chain.index(t) - 1).astype(x.dtype).reshape(-1, 1, 1, 1), jnp)
  score = jd.score_fn(apply, None, chain.sde(), jd.predictions.noise())
  return make(chain.sde(), ts)(key, x_T, score).x


def scheduler_of(kind, chain, **options):
  return kind(trained_betas=np.asarray(chain.betas), **options)


def theirs(scheduler, x, noises=None):
  """Their loop; noises [steps, *shape] for those that take any."""
  for i, t in enumerate(scheduler.timesteps):
    output = network(scheduler.scale_model_input(x, t), float(t), torch)
    options = {} if noises is None else {"variance_noise": torch.tensor(np.asarray(noises[i]))}
    x = scheduler.step(output, t, x, **options).prev_sample
  return x.numpy()


def difference(found, expected):
  return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


def problem():
  chain, key = jd.ddpm.Chain(jd.ddpm.linear_betas()), jax.random.key(0)
  return chain, key, chain.sde().prior_sample(jax.random.key(1), SHAPE)


CASES = {
  "2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, lambda s, t, low: S.dpm_solver_pp(s, t, 2)),
  "2m_lower_order_final": (
    "DPMSolverMultistepScheduler",
    {"solver_order": 2, "lower_order_final": True},
    lambda s, t, low: S.dpm_solver_pp(s, t, 2, lower_order_final=low),
  ),
  "3m": (
    "DPMSolverMultistepScheduler",
    {"solver_order": 3},
    lambda s, t, low: S.dpm_solver_pp(s, t, 3, coefficients="diffusers"),
  ),
  "unipc": (
    "UniPCMultistepScheduler",
    {"solver_order": 2, "lower_order_final": True},
    lambda s, t, low: S.unipc(s, t, 2, lower_order_final=True),
  ),
  "unipc_3": (
    "UniPCMultistepScheduler",
    {"solver_order": 3, "lower_order_final": True},
    lambda s, t, low: S.unipc(s, t, 3, lower_order_final=True),
  ),
}


@STEPS
@pytest.mark.parametrize("case", CASES)
def test_multistep(case, steps):
  kind, options, make = CASES[case]
  chain, key, x_T = problem()
  scheduler = scheduler_of(getattr(diffusers, kind), chain, **{"lower_order_final": False, **options})
  scheduler.set_timesteps(steps)
  expected = theirs(scheduler, torch.tensor(np.asarray(x_T)))
  found = ours(chain, scheduler.timesteps, x_T, lambda s, t: make(s, t, steps < 15), key)
  assert difference(found, expected) <= 1e-5


@STEPS
def test_stochastic_2m(steps):
  """Their noise is ours: that of step i belongs to the example's key, folded with i."""
  chain, key, x_T = problem()
  options = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": False}
  scheduler = scheduler_of(diffusers.DPMSolverMultistepScheduler, chain, **options)
  scheduler.set_timesteps(steps)
  example = jd.keys.per_example(key, len(x_T))
  noises = [jd.keys.normal(jd.keys.fold_in(example, i), SHAPE) for i in range(steps)]
  expected = theirs(scheduler, torch.tensor(np.asarray(x_T)), noises)
  found = ours(chain, scheduler.timesteps, x_T, lambda s, t: S.dpm_solver_pp(s, t, 2, 1.0), key)
  assert difference(found, expected) <= 1e-5


@STEPS
@pytest.mark.parametrize(("kind", "order"), [("HeunDiscreteScheduler", 2), ("EulerDiscreteScheduler", 1)])
def test_in_the_noise_level(kind, order, steps):
  """Theirs carry x / alpha."""
  chain, key, x_T = problem()
  scheduler = scheduler_of(getattr(diffusers, kind), chain, timestep_spacing="trailing")
  scheduler.set_timesteps(steps)
  timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))
  scaled = x_T / chain.marginal(round(timesteps[0]) + 1)[0]
  expected = theirs(scheduler, torch.tensor(np.asarray(scaled)))
  found = ours(chain, timesteps, x_T, lambda s, t: S.edm(s, t, order=order), key)
  assert difference(found, expected) <= 1e-5
