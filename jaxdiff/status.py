"""Status codes: inside jit a solver reports, on the host `raise_if_failed` turns the report into an error."""

from typing import Any

import numpy as np

SUCCESS = 0
MAX_STEPS = 1
NON_FINITE = 2
NOT_IN_LEVELS = 3

_ADVICE = {
  MAX_STEPS: "reached max_steps before the end of the solve; raise max_steps, or loosen rtol and atol",
  NON_FINITE: (
    "met a value that is not finite; check x and the network's output for NaN at every time of the solve "
    "(with adaptive steps, the field may also be so rough that they vanished: loosen rtol and atol)"
  ),
  NOT_IN_LEVELS: "holds integers outside 0..levels-1; check levels against the data",
}


class SolveError(RuntimeError):
  """A solve did not succeed for some examples."""


def raise_if_failed(result: Any) -> None:
  """Raise if a solve failed for any example; call it outside jit.

  Args:
    result: a `Sample`, `LogProb` or `BitsPerDim`: anything with a `status`.

  Raises:
    SolveError: names how many examples failed, the first of them, after how many steps, and the remedy.

  Example:
    >>> import jax, jaxdiff as jd
    >>> sde = jd.VP()
    >>> sampler = jd.samplers.reverse_sde(sde, jd.time_grid(sde, 10))
    >>> x_T = sde.prior_sample(jax.random.key(0), (4, 2))
    >>> jd.raise_if_failed(sampler(jax.random.key(1), x_T, lambda x, t: -x))
  """
  check(np.atleast_1d(result.status.code), np.atleast_1d(result.status.accepted))


def check(code: np.ndarray, accepted: np.ndarray) -> None:
  """`raise_if_failed` for the codes [b] and accepted steps [b] of a status."""
  if not code.any():
    return
  lines = []
  for value in np.unique(code[code != SUCCESS]):
    which = np.flatnonzero(code == value)
    shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    lines.append(
      f"{len(which)} of {len(code)} examples (index {shown}; the first after {accepted[which[0]]} steps): "
      f"each {_ADVICE.get(int(value), f'reports unknown code {value}')}"
    )
  raise SolveError("the solve failed: " + "; ".join(lines))
