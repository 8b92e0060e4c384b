"""FFJORD against torchdiffeq, where it is installed: the same network, weights, points and exact trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd

torch = pytest.importorskip("torch", reason="parity with torchdiffeq needs torch")
torchdiffeq = pytest.importorskip("torchdiffeq", reason="parity with torchdiffeq needs torchdiffeq")

TOLERANCE = 1e-9
_rng = np.random.default_rng(0)
WEIGHTS = [_rng.normal(size=(3, 16)) * 0.6, _rng.normal(size=16) * 0.1, _rng.normal(size=(16, 2)) * 0.4]
X = _rng.normal(size=(6, 2))


def ours(adjoint):
  flow = jd.flow.cnf(solver="dopri5", rtol=TOLERANCE, atol=TOLERANCE, adjoint=adjoint, steps="shared")

  def field(weights, x, t):
    w1, b1, w2 = weights
    return jnp.tanh(jnp.concatenate([x, t[:, None]], axis=1) @ w1 + b1[None]) @ w2

  def loss(weights, x):
    value = flow.log_prob(jax.random.key(0), x, lambda x, t: field(weights, x, t)).value
    return jnp.sum(value), value

  (_, value), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
    [jnp.asarray(w) for w in WEIGHTS], jnp.asarray(X)
  )
  return value, [*gradient[0], gradient[1]]


def theirs(solve):
  x, *weights = (torch.tensor(value, requires_grad=True) for value in (X, *WEIGHTS))

  class Augmented(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.weights = torch.nn.ParameterList([torch.nn.Parameter(w.detach().clone()) for w in weights])

    def forward(self, t, state):
      w1, b1, w2 = self.weights
      hidden = torch.tanh(torch.cat([state[0], t.expand(len(X), 1)], dim=1) @ w1 + b1)
      slope, trace = hidden @ w2, ((1 - hidden**2) * (w1[:2] * w2.T).sum(0)).sum(1)
      return slope, trace

  field = Augmented()
  ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
  z, change = solve(
    field, (x, torch.zeros(len(x), dtype=torch.float64)), ends, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5"
  )
  value = -0.5 * (z[-1] ** 2).sum(1) - np.log(2 * np.pi) + change[-1]
  value.sum().backward()
  return value.detach().numpy(), [*(w.grad.numpy() for w in field.weights), x.grad.numpy()]


@pytest.mark.parametrize(("adjoint", "solve"), [("checkpoint", "odeint"), ("continuous", "odeint_adjoint")])
def test_log_density_and_its_gradient(adjoint, solve, x64):
  """Both at tolerance 1e-9, in float64: 1e-6."""
  (value, gradient), (value_torch, gradient_torch) = ours(adjoint), theirs(getattr(torchdiffeq, solve))
  np.testing.assert_allclose(value, value_torch, atol=1e-6)
  for got, wanted in zip(gradient, gradient_torch, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
