"""Conditions of the residual perceptron."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from jaxdiff.models import MLP, conditioning

X = np.random.default_rng(1).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = np.array([0.1, 0.9], np.float32)
COND = {"label": np.array([0, 2]), "small": np.random.default_rng(2).normal(size=(2, 2, 2, 3)).astype(np.float32)}


def test_every_condition_acts():
  net = MLP(width=8, depth=1, conditions={"label": conditioning.Label(2), "small": conditioning.Image(3)})
  params = networks.moved(net, X, T, **COND)
  assert params["params"]["Dense_0"]["kernel"].shape == (16 + 48, 8)
  apply = jax.jit(net.apply)
  y = np.asarray(apply(params, X, T, **COND))
  small = COND["small"].copy()
  small[0] += 1.0
  for name, value in {"label": np.array([1, 2]), "small": small}.items():
    z = np.asarray(apply(params, X, T, **(COND | {name: value})))
    assert np.abs(z[0] - y[0]).max() > 1e-3
    assert (z[1] == y[1]).all()


def test_parameters_are_of_their_own_type():
  params = jax.eval_shape(MLP(width=8, param_dtype=jnp.bfloat16).init, jax.random.key(0), X, T)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_sequences_are_refused_by_name():
  conditions = {"label": conditioning.Label(2), "words": conditioning.Embedding(5, sequence=True)}
  with pytest.raises(ValueError, match="condition 'words' is a sequence of tokens, which MLP cannot read"):
    jax.eval_shape(
      MLP(width=8, conditions=conditions).init,
      jax.random.key(0),
      X,
      T,
      label=COND["label"],
      words=np.ones((2, 4, 5), np.float32),
    )
