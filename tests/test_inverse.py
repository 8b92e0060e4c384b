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
FLAT = np.array([True, False])
OWN = {"mask": np.stack([MASK, MASK[::-1]]) == 1}


def own(name):
  return OWN if name == "mask per image" else {}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@EACH
def test_adjoint_solve_and_pseudo_inverse(name, x64):
  """<A x, y> = <x, A^T y>, (A A^T + ratio I) u = r, A A^+ = I on the range, A A^T = gain I there."""
  operator, x, ratio = OPERATORS[name](), normal(2, 4, 6, 3), np.array([0.3, 2.0])
  other = normal(*jax.eval_shape(lambda x: operator.apply(x, **own(name)), x).shape, seed=1)

  def run(x, other, own):
    apply, adjoint = (functools.partial(part, **own) for part in (operator.apply, operator.adjoint))
    y = apply(x)
    u, back = operator.solve(y, ratio, **own), pseudo_inverse(operator, y, own)
    found = {"y": y, "adjoint": adjoint(other), "u": u, "u of one": operator.solve(y, 0.3, **own)[0]}
    found |= {"of u": apply(adjoint(u)), "of back": apply(back), "restricted": operator.restrict(y, **own)}
    return found | {"of y": apply(adjoint(y))}

  found = oracles.compiled(run, x, other, own(name))
  y, u = found["y"], found["u"]
  np.testing.assert_allclose(np.vdot(y, other), np.vdot(x, found["adjoint"]), rtol=1e-12)
  atol = 1e-5 if name == "function" else 1e-12
  np.testing.assert_allclose(found["of u"] + ratio[:, None, None, None] * u, y, atol=atol)
  np.testing.assert_allclose(found["u of one"], u[0], atol=1e-12)
  np.testing.assert_allclose(found["of back"], y, atol=atol)
  np.testing.assert_allclose(found["restricted"], y)
  if operator.gain is not None:
    np.testing.assert_allclose(found["of y"], operator.gain * y, atol=1e-12)


def test_operators_are_what_they_are_called():
  """Against loops, and the conditions of the same name; a mask per image is that of each."""
  x = normal(2, 4, 6, 3).astype(np.float32)
  pairs = (inverse.downsample(2), conditions.downsampled(2)), (inverse.greyscale(), conditions.greyscale())

  def run(x, mask):
    found = {name: OPERATORS[name]().apply(x) for name in ("mask", "crop", "blur")}
    found |= {"own": inverse.mask().apply(x, mask=mask), "flat": inverse.mask(FLAT).apply(jnp.ones((1, 2)))}
    return found, [(operator.apply(x), condition.of(x)) for operator, condition in pairs]

  found, alike = oracles.compiled(run, x, OWN["mask"])
  np.testing.assert_array_equal(found["mask"], x * MASK[None, :, :, None])
  np.testing.assert_array_equal(found["own"], x * OWN["mask"][..., None])
  np.testing.assert_array_equal(found["crop"], x[:, 1:3, 2:5])
  for operator, condition in alike:
    np.testing.assert_allclose(operator, condition, rtol=1e-5, atol=1e-6)
  blurred = sum(KERNEL[i, j] * np.roll(x, (i - 1, j - 1), axis=(1, 2)) for i in range(3) for j in range(3))
  np.testing.assert_allclose(found["blur"], blurred, atol=1e-5)
  assert found["flat"].tolist() == [[1, 0]]


def test_what_a_blur_loses_is_not_amplified(x64):
  """Of a mean of three neighbours the highest frequency of an even row has a gain of 1e-4."""
  operator = inverse.blur(np.array([[0.25, 0.5001, 0.25]]))
  noise, checkers = normal(1, 1, 8, 1), ((-1.0) ** np.arange(8)).reshape(1, 1, 8, 1)
  run = lambda noise, checkers: (operator.apply(checkers), pseudo_inverse(operator, noise, {}))
  left, back = oracles.compiled(run, noise, checkers)
  assert np.max(np.abs(left)) < 1.1e-4
  np.testing.assert_allclose(np.vdot(back, checkers), 0, atol=1e-12)
  assert np.max(np.abs(back)) < 20


@pytest.mark.parametrize("rows", ["more than columns", "one twice"])
def test_what_an_operator_cannot_reach_is_left_out_of_the_pseudo_inverse(rows):
  """As numpy's; sampling then ends at the least squares solution."""
  matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  if rows == "one twice":
    matrix = matrix[[0, 1, 1]]
  y = matrix @ np.ones(4, np.float32) + 0.01 * np.arange(len(matrix), dtype=np.float32)
  exact = np.linalg.pinv(matrix) @ y
  sde = jd.VP()
  ts = jd.time_grid(sde, 10)

  def run(key, y):
    operator = inverse.operator(lambda x: x @ jnp.asarray(matrix.T), (4,))
    sampler = inverse.restoration(sde, jd.samplers.ddim(sde, ts), operator)
    sample = sampler(key, jnp.ones((1, 4)), lambda x, t: -x, {"measurement": y})
    return operator.adjoint(operator.solve(y, 0.0))[0], sample.x[0]

  inverted, x = oracles.compiled(run, jax.random.key(0), y[None])
  np.testing.assert_allclose(inverted, exact, atol=2e-4)
  np.testing.assert_allclose(matrix @ x, matrix @ exact, atol=2e-4)


def test_functions_that_are_not_linear_are_refused():
  for wrong, message in ((lambda x: x + 2, "A 0 is not 0: it has values up to 2"), (jnp.tanh, "must be a linear")):
    with pytest.raises(TypeError, match=message):
      inverse.operator(wrong, (4,))
  with pytest.raises(TypeError, match=r"linear function of images \(3,\)"):
    inverse.operator(lambda x: x @ jnp.ones((4, 2)), (3,))


def test_a_sampler_that_runs_away_fails():
  """Reconstruction with a gain of 11 in few steps: what is left after the projection is rounding."""
  sde, operator = jd.VP(), inverse.operator(lambda x: 3.3 * x[:, ::2], (8,))
  base = jd.samplers.ancestral(sde, jd.time_grid(sde, 20))
  samplers = [inverse.restoration(sde, base, operator, method=method) for method in ("reconstruction", "pigdm")]
  x_T, cond = np.ones((2, 8), np.float32), {"measurement": np.full((2, 4), 0.3, np.float32)}
  run = lambda key, x_T, cond: [sampler(key, x_T, lambda x, t: -x, cond) for sampler in samplers]
  away, found = oracles.compiled(run, jax.random.key(0), x_T, cond)
  assert away.status.code.tolist() == [2, 2]
  assert found.status.code.tolist() == [0, 0]
  np.testing.assert_allclose(3.3 * found.x[:, ::2], 0.3, rtol=1e-5)


def test_conjugate_gradients_that_do_not_arrive_give_nan():
  scales = np.logspace(0, -6, 400).astype(np.float32)
  solve = lambda r: inverse.operator(lambda x: x * scales[None], (400,)).solve(r, 0.0)
  assert np.all(np.isnan(oracles.compiled(solve, normal(1, 400).astype(np.float32))))


def test_operators_pass_through_jit_as_arguments():
  traces = []

  @jax.jit
  def known(operator, x):
    traces.append(1)
    return operator.apply(x)

  x = np.ones((1, 4, 6, 1), np.float32)
  for mask in (MASK, 1 - MASK):
    assert float(np.sum(known(inverse.mask(mask), x))) == mask.sum()
  assert len(traces) == 1
  pair = inverse.Operator(lambda x: 2 * x, lambda y: 2 * y, lambda r, ratio: r / (4 + ratio))
  assert float(np.sum(known(pair, x))) == 48
  assert len(traces) == 2


def test_a_traced_mask_that_is_not_binary_is_nan():
  grey = np.array([[[1.0, 0.5], [0.5, 0.5]]], np.float32)
  x = oracles.compiled(lambda mask: inverse.mask().apply(jnp.ones((1, 2, 2, 1)), mask=mask), grey)
  assert np.isnan(x.ravel()).tolist() == [False, True, True, True]


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
    size = len(self.mean)
    units = np.eye(size).reshape(size, *self.shape)
    matrix = oracles.compiled(lambda x: operator.apply(x, **dict(own)), units).reshape(size, -1).T
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


@pytest.mark.parametrize("kind", oracles.SDES)
def test_pigdm_is_exact_for_isotropic_data(kind, x64):
  """The score of p_t(x | y) itself, and its denoiser, for several operators, with and without noise, at all times."""
  sde, data = oracles.SDES[kind], isotropic()
  names = SMALL if kind == "vp" else ["greyscale"]
  y_of = {name: np.asarray(SMALL[name]().apply(normal(1, 2, 4, 3, seed=2))) for name in names}
  cases = [(name, noise_std) for name in names for noise_std in (0.0, 0.3)]
  exact = [data.given(SMALL[name](), y_of[name], noise_std) for name, noise_std in cases]

  def run(z):
    times = jd.time_grid(sde, 4).astype(float)
    alpha, sigma = (v[:, None, None, None] for v in sde.marginal(times))
    x = alpha * data.mean.reshape(1, 2, 4, 3) + jnp.sqrt(0.4 * alpha**2 + sigma**2) * z
    found = []
    for (name, noise_std), posterior in zip(cases, exact, strict=True):
      score = inverse.pigdm(data.score(sde), SMALL[name](), noise_std, data_variance=0.4)
      cond, expected = {"measurement": jnp.repeat(y_of[name], 5, 0)}, posterior.score_at(sde, x, times)
      found.append((sigma * score(x, times, **cond), sigma * expected))
      found.append((score.denoised(x, times, **cond), (x + sigma**2 * expected) / alpha))
    return found

  for found, expected in oracles.compiled(run, normal(5, 2, 4, 3)):
    np.testing.assert_allclose(found, expected, atol=1e-6)
