"""Operators against their definitions; guided scores against the exact posteriors of Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxdiff as jd
from jaxdiff import conditions, inverse
from jaxdiff.inverse.operators import pseudo_inverse

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
KERNEL = np.array([[0.1, 0.2, 0.0], [0.3, 1.0, 0.1], [0.0, 0.05, 0.15]])
MASK = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
OPERATORS = {
  "mask": lambda: inverse.mask(MASK),
  "mask of channels": lambda: inverse.mask(np.stack([MASK, 1 - MASK, MASK], -1)),
  "mask per image": inverse.mask,
  "crop": lambda: inverse.crop(1, 2, 2, 3, (4, 6)),
  "downsample": lambda: inverse.downsample(2),
  "greyscale": inverse.greyscale,
  "blur": lambda: inverse.blur(KERNEL),
  "function": lambda: inverse.operator(lambda x: x[:, 1:] - 0.5 * x[:, :-1], (4, 6, 3)),
}
EACH = pytest.mark.parametrize("name", OPERATORS)
OWN = {"mask": np.stack([MASK, MASK[::-1]]) == 1}


def own(name):
  return {key: jnp.asarray(value) for key, value in OWN.items()} if name == "mask per image" else {}


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@EACH
def test_adjoint_solve_and_pseudo_inverse(name, x64):
  """<A x, y> = <x, A^T y>, (A A^T + ratio I) u = r, A A^+ = I on the range, A A^T = gain I there."""
  operator, mine = OPERATORS[name](), own(name)
  apply, adjoint = (functools.partial(part, **mine) for part in (operator.apply, operator.adjoint))
  x = normal(2, 4, 6, 3)
  y = apply(x)
  other = normal(*y.shape, seed=1)
  np.testing.assert_allclose(jnp.vdot(y, other), jnp.vdot(x, adjoint(other)), rtol=1e-12)
  ratio = jnp.asarray([0.3, 2.0])
  u = operator.solve(y, ratio, **mine)
  atol = 1e-5 if name == "function" else 1e-12
  np.testing.assert_allclose(apply(adjoint(u)) + ratio[:, None, None, None] * u, y, atol=atol)
  np.testing.assert_allclose(operator.solve(y, 0.3, **mine)[0], u[0], atol=1e-12)
  back = pseudo_inverse(operator, y, mine)
  np.testing.assert_allclose(apply(back), y, atol=atol)
  np.testing.assert_allclose(operator.restrict(y, **mine), y)
  if operator.gain is not None:
    np.testing.assert_allclose(apply(adjoint(y)), operator.gain * y, atol=1e-12)


def test_operators_are_what_they_are_called():
  """Against loops, and the conditions of the same name; a mask per image is that of each."""
  x = np.asarray(normal(2, 4, 6, 3))
  np.testing.assert_array_equal(OPERATORS["mask"]().apply(jnp.asarray(x)), x * MASK[None, :, :, None])
  per_image = inverse.mask().apply(jnp.asarray(x), mask=jnp.asarray(OWN["mask"]))
  np.testing.assert_array_equal(per_image, x * OWN["mask"][..., None])
  np.testing.assert_array_equal(OPERATORS["crop"]().apply(jnp.asarray(x)), x[:, 1:3, 2:5])
  for operator, condition in (
    (inverse.downsample(2), conditions.downsampled(2)),
    (inverse.greyscale(), conditions.greyscale()),
  ):
    np.testing.assert_allclose(operator.apply(jnp.asarray(x)), condition.of(jnp.asarray(x)), rtol=1e-5, atol=1e-6)
  blurred = sum(KERNEL[i, j] * np.roll(x, (i - 1, j - 1), axis=(1, 2)) for i in range(3) for j in range(3))
  np.testing.assert_allclose(inverse.blur(KERNEL).apply(jnp.asarray(x)), blurred, atol=1e-5)
  flat = inverse.mask(jnp.asarray([True, False]))
  assert flat.apply(jnp.ones((1, 2))).tolist() == [[1, 0]]


def test_what_a_blur_loses_is_not_amplified(x64):
  """Of a mean of three neighbours the highest frequency of an even row has a gain of 1e-4."""
  operator = inverse.blur(np.array([[0.25, 0.5001, 0.25]]))
  noise = normal(1, 1, 8, 1)
  checkers = jnp.asarray((-1.0) ** np.arange(8)).reshape(1, 1, 8, 1)
  assert jnp.max(jnp.abs(operator.apply(checkers))) < 1.1e-4
  back = pseudo_inverse(operator, noise, {})
  np.testing.assert_allclose(jnp.vdot(back, checkers), 0, atol=1e-12)
  assert jnp.max(jnp.abs(back)) < 20


@pytest.mark.parametrize("rows", ["more than columns", "one twice"])
def test_what_an_operator_cannot_reach_is_left_out_of_the_pseudo_inverse(rows):
  """As numpy's; sampling then ends at the least squares solution."""
  matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  if rows == "one twice":
    matrix = matrix[[0, 1, 1]]
  y = matrix @ np.ones(4, np.float32) + 0.01 * np.arange(len(matrix), dtype=np.float32)
  operator = inverse.operator(lambda x: x @ jnp.asarray(matrix.T), (4,))
  exact = np.linalg.pinv(matrix) @ y
  np.testing.assert_allclose(operator.adjoint(operator.solve(jnp.asarray(y[None]), 0.0))[0], exact, atol=2e-4)
  sde = jd.VP()
  sampler = inverse.restoration(sde, jd.samplers.ddim(sde, jd.time_grid(sde, 10)), operator)
  sample = sampler(jax.random.key(0), jnp.ones((1, 4)), lambda x, t: -x, {"measurement": jnp.asarray(y[None])})
  np.testing.assert_allclose(matrix @ np.asarray(sample.x[0]), matrix @ exact, atol=2e-4)


def test_functions_that_are_not_linear_are_refused():
  for wrong, message in ((lambda x: x + 2, "A 0 is not 0: it has values up to 2"), (jnp.tanh, "must be a linear")):
    with pytest.raises(TypeError, match=message):
      inverse.operator(wrong, (4,))
  with pytest.raises(TypeError, match=r"linear function of images \(3,\)"):
    inverse.operator(lambda x: x @ jnp.ones((4, 2)), (3,))


def test_a_sampler_that_runs_away_fails():
  """Reconstruction with a gain of 11 in few steps: what is left after the projection is rounding."""
  sde, operator = jd.VP(), inverse.operator(lambda x: 3.3 * x[:, ::2], (8,))
  sampler = lambda method: inverse.restoration(
    sde, jd.samplers.ancestral(sde, jd.time_grid(sde, 20)), operator, method=method
  )
  run = lambda method: sampler(method)(
    jax.random.key(0), jnp.ones((2, 8)), lambda x, t: -x, {"measurement": jnp.full((2, 4), 0.3)}
  )
  assert run("reconstruction").status.code.tolist() == [2, 2]
  found = run("pigdm")
  assert found.status.code.tolist() == [0, 0]
  np.testing.assert_allclose(3.3 * found.x[:, ::2], 0.3, rtol=1e-5)


def test_conjugate_gradients_that_do_not_arrive_give_nan():
  scales = jnp.asarray(np.logspace(0, -6, 400), jnp.float32)
  operator = inverse.operator(lambda x: x * scales[None], (400,))
  assert jnp.all(jnp.isnan(operator.solve(jax.random.normal(jax.random.key(0), (1, 400)), 0.0)))


def test_operators_pass_through_jit_as_arguments():
  traces = []

  @jax.jit
  def known(operator, x):
    traces.append(1)
    return operator.apply(x)

  x = jnp.ones((1, 4, 6, 1))
  for mask in (MASK, 1 - MASK):
    assert known(inverse.mask(mask), x).sum() == float(mask.sum())
  assert len(traces) == 1
  pair = inverse.Operator(lambda x: 2 * x, lambda y: 2 * y, lambda r, ratio: r / (4 + ratio))
  assert jax.jit(lambda operator, x: operator.apply(x))(pair, x).sum() == 48


def test_a_traced_mask_that_is_not_binary_is_nan():
  grey = jnp.full((1, 2, 2), 0.5).at[0, 0, 0].set(1.0)
  x = jax.jit(lambda mask: inverse.mask().apply(jnp.ones((1, 2, 2, 1)), mask=mask))(grey)
  assert jnp.isnan(x.ravel()).tolist() == [False, True, True, True]


class Gaussian:
  """Data N(mean, covariance) of images `shape`, with the exact score as a score of the library."""

  def __init__(self, covariance, mean, shape):
    self.covariance, self.mean, self.shape = np.asarray(covariance, float), np.asarray(mean, float), shape

  def score_at(self, sde, x, t):
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    variances, axes = np.linalg.eigh(self.covariance)
    away = x.reshape(len(x), -1) - alpha * jnp.asarray(self.mean)[None]
    return -(away @ axes / (alpha**2 * jnp.asarray(variances)[None] + sigma**2) @ axes.T).reshape(x.shape)

  def score(self, sde):
    return jd.score_fn(lambda params, x, t: self.score_at(sde, x, t), (), sde, jd.predictions.score())

  def given(self, operator, y, noise_std, own=()):
    """The posterior p(x | y) of one image's measurement, by the matrix of A."""
    image = jnp.zeros((1, *self.shape))
    matrix = np.asarray(jax.jacobian(lambda x: operator.apply(x, **dict(own)).ravel())(image)).reshape(
      -1, len(self.mean)
    )
    gram = matrix @ self.covariance @ matrix.T + noise_std**2 * np.eye(len(matrix))
    gain = self.covariance @ matrix.T @ np.linalg.pinv(gram, 1e-10)
    mean = self.mean + gain @ (np.asarray(y).ravel() - matrix @ self.mean)
    return Gaussian(self.covariance - gain @ matrix @ self.covariance, mean, self.shape)


def isotropic(variance=0.4, shape=(2, 4, 3)):
  size = int(np.prod(shape))
  return Gaussian(variance * np.eye(size), np.linspace(-1, 1, size), shape)


SMALL = {
  "mask": lambda: inverse.mask(np.array([[1, 0, 0, 1], [1, 1, 1, 0]])),
  "greyscale": inverse.greyscale,
  "blur": lambda: inverse.blur(np.array([[0.2, 0.7, 0.1]])),
}


@pytest.mark.parametrize("sde", oracles.SDES.values(), ids=oracles.SDES)
def test_pigdm_is_exact_for_isotropic_data(sde, x64):
  """The score of p_t(x | y) itself, and its denoiser, for several operators, with and without noise, at all times."""
  data, times = isotropic(), jd.time_grid(sde, 4).astype(float)
  alpha, sigma = (v[:, None, None, None] for v in sde.marginal(times))
  x = alpha * data.mean.reshape(1, 2, 4, 3) + jnp.sqrt(0.4 * alpha**2 + sigma**2) * normal(5, 2, 4, 3)
  for make in SMALL.values():
    operator = make()
    y = operator.apply(normal(1, 2, 4, 3, seed=2))
    for noise_std in (0.0, 0.3):
      exact = data.given(operator, y, noise_std)
      score = inverse.pigdm(data.score(sde), operator, noise_std, data_variance=0.4)
      cond = {"measurement": jnp.repeat(y, 5, 0)}
      expected = exact.score_at(sde, x, times)
      np.testing.assert_allclose(sigma * score(x, times, **cond), sigma * expected, atol=1e-6)
      denoised = (x + sigma**2 * expected) / alpha
      np.testing.assert_allclose(score.denoised(x, times, **cond), denoised, atol=1e-6)
