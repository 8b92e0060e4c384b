"""Conditions of the residual perceptron."""

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.models import MLP, conditioning

X, T = jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.array([0.1, 0.9])
COND = {"label": jnp.array([0, 2]), "small": jax.random.normal(jax.random.key(2), (2, 2, 2, 3))}


def test_every_condition_acts():
  net = MLP(width=8, depth=1, conditions={"label": conditioning.Label(2), "small": conditioning.Image(3)})
  params = net.init(jax.random.key(0), X, T, **COND)
  assert params["params"]["Dense_0"]["kernel"].shape == (16 + 48, 8)
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  apply = jax.jit(net.apply)
  y = apply(params, X, T, **COND)
  for name, value in {"label": jnp.array([1, 2]), "small": COND["small"].at[0].add(1.0)}.items():
    z = apply(params, X, T, **(COND | {name: value}))
    assert jnp.abs(z[0] - y[0]).max() > 1e-3
    assert (z[1] == y[1]).all()


def test_parameters_are_of_their_own_type():
  params = jax.eval_shape(MLP(width=8, param_dtype=jnp.bfloat16).init, jax.random.key(0), X, T)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.usefixtures("untyped")
def test_sequences_are_refused_by_name():
  conditions = {"label": conditioning.Label(2), "words": conditioning.Embedding(5, sequence=True)}
  with pytest.raises(ValueError, match="condition 'words' is a sequence of tokens, which MLP cannot read"):
    jax.eval_shape(
      MLP(width=8, conditions=conditions).init, jax.random.key(0), X, T, label=COND["label"], words=jnp.ones((2, 4, 5))
    )
