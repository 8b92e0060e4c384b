"""One of several processes, chosen by a number that may be traced: one compiled program serves them all."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from oracles import SDES


@functools.partial(jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["choices"])
@dataclass(frozen=True)
class Switch:
  """The process `choices[index]`; a program that takes it as an argument compiles the branches of all of them."""

  index: Any
  choices: tuple = tuple(SDES.values())

  @property
  def t1(self):
    return jnp.asarray([process.t1 for process in self.choices], float)[self.index]

  def _of(self, name, *arguments):
    return jax.lax.switch(self.index, [getattr(process, name) for process in self.choices], *arguments)

  def drift(self, x, t):
    return self._of("drift", x, t)

  def diffuse(self, t, v):
    return self._of("diffuse", t, v)

  def diffusion(self, t):
    return self._of("diffusion", t)

  def marginal(self, t):
    return self._of("marginal", t)

  def time_of_log_snr(self, log_snr):
    return self._of("time_of_log_snr", log_snr)

  def prior_sample(self, key, shape):
    return jax.lax.switch(self.index, [lambda key, p=p: p.prior_sample(key, shape) for p in self.choices], key)

  def prior_log_prob(self, z):
    return self._of("prior_log_prob", z)


NAMES = list(SDES)
EACH_SDE = pytest.mark.parametrize("sde", [Switch(i) for i in range(len(NAMES))], ids=NAMES)
VP_AND_EDM = pytest.mark.parametrize("sde", [Switch(NAMES.index(name)) for name in ("vp", "edm")], ids=["vp", "edm"])
VP = Switch(NAMES.index("vp"))
