"""Exponential integration in half the log-SNR, lambda = log(alpha / sigma), for any process with scalar marginals.

Over a step of length h = lambda_next - lambda > 0 the flow and, for noise eta > 0, the reverse SDE are solved exactly

    x_next = sigma_next / sigma exp(-eta^2 h) x + alpha_next int_0^1 H exp(-H (1 - theta)) D(theta) dtheta
             + sigma_next sqrt(1 - exp(-2 eta^2 h)) z,     H = (1 + eta^2) h                                     (1)

with the denoiser D at lambda + theta h. For D = theta^k the integral is the moment

    J_k(H) = H k! phi_{k+1}(-H),     J_0 = 1 - exp(-H),     J_k = 1 - k J_{k-1} / H                               (2)

with phi_1(z) = (exp(z) - 1) / z, phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z. A method puts a polynomial through values of D
at nodes theta_j, <= 0 for the past, 1 for the end of the step; its integral weights them by

    w_j = sum_k c_jk J_k,     prod_{i != j} (theta - theta_i) / (theta_j - theta_i) = sum_k c_jk theta^k          (3)

References:
  Lu et al. 2022, DPM-Solver, eq. 3.4 and Appendix B; Lu et al. 2022, DPM-Solver++, eq. 9 and Appendix A (the SDE);
  Hochbruck & Ostermann 2010, Exponential Integrators, Section 2.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxdiff import checks
from jaxdiff.samplers.fixed_grid import Intervals
from jaxdiff.sde import expand
from jaxdiff.typing import State

_ENDLESS = 80.0
_SERIES = 20


def log_snr_steps(ends: Intervals) -> Float[Array, " steps"]:
  """h of every step. To sigma = 0 it is endless: a number so large that exp(-h) adds nothing to 1 stands for it."""
  silent = ends.sigma_next <= 0
  noise_ratio = jnp.where(silent, 1.0, ends.sigma_next / ends.sigma)
  return jnp.where(silent, _ENDLESS, jnp.log(ends.alpha_next / ends.alpha) - jnp.log(noise_ratio))


def moments(H: Float[Array, "..."], count: int) -> list[Float[Array, "..."]]:
  """J_0 .. J_{count - 1} of eq. (2), for H of either sign.

  The recursion loses digits upwards where |H| < 1 and none downwards, from any start that is far enough up.
  """
  near, far = jnp.clip(H, -1.0, 1.0), jnp.where(jnp.abs(H) > 1, H, 1.0)
  series = [near / (_SERIES + 1)]
  for k in range(_SERIES, 1, -1):
    series.append(near * (1 - series[-1]) / k)
  found = [-jnp.expm1(-H)]
  for k in range(1, count):
    found.append(jnp.where(jnp.abs(H) > 1, 1 - k * found[-1] / far, series[-k]))
  return found


def interpolation_weights(nodes: Sequence[Array], integrals: Sequence[Array]) -> list[Float[Array, " steps"]]:
  """w_j of eq. (3) for the values at `nodes`; `integrals[k]` is the part of theta^k, J_k where exact."""
  weights = []
  for j, node in enumerate(nodes):
    polynomial = [jnp.ones_like(node)]
    for other in [*nodes[:j], *nodes[j + 1 :]]:
      raised, lowered = [jnp.zeros_like(node), *polynomial], [*polynomial, jnp.zeros_like(node)]
      polynomial = [(up - other * same) / (node - other) for up, same in zip(raised, lowered, strict=True)]
    weights.append(sum((c * J for c, J in zip(polynomial, integrals, strict=True)), jnp.zeros_like(node)))
  return weights


def past_nodes(h: Float[Array, " steps"], count: int) -> list[Float[Array, " steps"]]:
  """theta of the `count` last grid points of every step, from its start back; made up where the grid has not begun."""
  nodes, before = [jnp.zeros_like(h)], h
  for _ in range(1, count):
    before = jnp.concatenate([before[:1], before[:-1]])
    nodes.append(nodes[-1] - before / h)
  return nodes


def step_orders(order: int, sigma_next: Float[Array, " steps"], lower_order_final: bool) -> Int[Array, " steps"]:
  """Order of every step of a multistep method: what the past allows, .. 2, 1 at the end if so told, 1 to sigma = 0."""
  i, steps = np.arange(len(sigma_next)), len(sigma_next)
  orders = np.minimum(order, i + 1)
  if lower_order_final:
    orders = np.minimum(orders, steps - i)
  return jnp.where(sigma_next > 0, orders, 1)


def check_multistep_order(order: int, steps: int) -> None:
  """Refuse an order that is no integer in 1 .. 3, or above the number of steps."""
  check_order(order, 3)
  if order > steps:
    raise ValueError(f"order must be at most the number of steps of ts: got order = {order} and {steps} steps")


def check_order(order: int, most: int) -> None:
  """Refuse what is no integer in 1 .. most."""
  checks.whole("order", order, 1)
  if order > most:
    raise ValueError(f"order must be at most {most}, got {order}")


def by_order(
  orders: Int[Array, " steps"], weights: Sequence[Sequence[Array]], columns: int
) -> Float[Array, "steps columns"]:
  """Of the weights for orders 1, 2, .. those of every step's order; what they have no use for has weight 0."""
  table = jnp.zeros((len(orders), columns), weights[0][0].dtype)
  for order, row in enumerate(weights, start=1):
    chosen = orders == order
    padded = jnp.stack([*row, *[jnp.zeros_like(row[0])] * (columns - len(row))], axis=1)
    table = jnp.where(chosen[:, None], padded, table)
  return table


def weighted(weights: Float[Array, " k"], values: Sequence[State]) -> State:
  """sum_j weights[j] values[j]."""
  total = expand(weights[0], values[0]) * values[0]
  for weight, value in zip(weights[1:], values[1:], strict=True):
    total = total + expand(weight, value) * value
  return total
