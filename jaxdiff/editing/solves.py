"""Solves in a row: what they report as one, and that they fit each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.typing import Sample, Status

Solve = Callable[..., Sample]


def joined(first: Sample, last: Sample) -> Sample:
  """The last solve, with the evaluations and steps of the first, and its trouble if it had any."""
  code = jnp.where(first.status.code == 0, last.status.code, first.status.code)
  accepted, rejected = (a + b for a, b in zip(first.status[1:], last.status[1:], strict=True))
  return Sample(last.x, first.nfe + last.nfe, last.path, Status(code, accepted, rejected))


def check_downwards(name: str, sampler: Any) -> None:
  """Refuse what is no sampler, and one whose times rise: an encoder."""
  _check_solve(name, sampler)
  if (ends := _ends(sampler)) is not None and not ends[0] > ends[1]:
    raise ValueError(f"{name} must walk from noise to the data, but its times rise from {ends[0]} to {ends[1]}")


def check_pair(encode: Any, decode: Any) -> None:
  """Refuse an encoder and a decoder that walk the wrong way, or meet at different times; as far as they have times."""
  _check_solve("encode", encode)
  check_downwards("decode", decode)
  noise = _ends(encode)
  if noise is None:
    return
  if not noise[0] < noise[1]:
    raise ValueError(f"encode must walk from the data to noise, but its times fall from {noise[0]} to {noise[1]}")
  if (ends := _ends(decode)) is not None and ends[0] != noise[1]:
    raise ValueError(f"decode must start where encode ends, at t = {noise[1]}; it starts at t = {ends[0]}")


def _check_solve(name: str, value: Any) -> None:
  checks.made(name, value)
  if not callable(value):
    raise TypeError(f"{name} must be a function (key, x, score, cond) -> Sample, got {type(value).__name__}")


def _ends(sampler: Any) -> tuple[float, float] | None:
  """The first and the last of the times of a sampler; None where it has none or they are traced."""
  ts = getattr(sampler, "ts", None)
  if ts is None or isinstance(ts, jax.core.Tracer):
    return None
  first, last = np.asarray(ts)[[0, -1]].tolist()
  return first, last
