"""Convolutions with gradients of their own: those of `jax.lax`, of every order, in both modes, mapped and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff.models import convolution as module
from jaxdiff.models.convolution import convolution

X = jax.random.normal(jax.random.key(0), (8, 7, 5, 3))
W = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))
TANGENTS = 0.3 * X, 0.2 * W
ORDER = ("NHWC", "HWIO", "NHWC")


def of_lax(x, w, strides, padding):
  return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=ORDER)


def loss(conv, x, w, padding="SAME", strides=(1, 1)):
  return jnp.sum(jnp.sin(conv(x, w, strides, padding)))


@pytest.fixture(params=[1, 4, 2**18], ids=["bands of one row", "bands with a rest", "one band"])
def band(request, monkeypatch):
  """The numbers in a band: of one row, of 4 of the 7 rows, and of all."""
  monkeypatch.setattr(module, "_BAND", request.param * len(X) * 5 * 2)
  jax.clear_caches()
  yield
  jax.clear_caches()


def compare(derivative, *arguments):
  ours, theirs = (jax.jit(functools.partial(derivative, conv))(*arguments) for conv in (convolution, of_lax))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.usefixtures("band")
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))])
def test_gradients_are_those_of_lax(padding):
  compare(lambda conv, x, w: jax.value_and_grad(loss, (1, 2))(conv, x, w, padding), X, W)


def test_both_modes_of_every_order():
  gradient = lambda conv: lambda x, w: jax.grad(loss, (1, 2))(conv, x, w)
  slope = lambda conv: lambda x, w: jax.jvp(functools.partial(loss, conv), (x, w), TANGENTS)[1]
  compare(lambda conv, x, w: slope(conv)(x, w), X, W)
  compare(lambda conv, x, w: jax.jvp(gradient(conv), (x, w), TANGENTS)[1], X, W)
  compare(lambda conv, x, w: jax.grad(slope(conv), (0, 1))(x, w), X, W)
  norm = lambda conv: lambda x, w: sum(jnp.sum(g**2) for g in gradient(conv)(x, w))
  compare(lambda conv, x, w: jax.grad(norm(conv), (0, 1))(x, w), X, W)


def test_mapped_looped_and_rematerialized():
  gradient = lambda conv: lambda x, w: jax.grad(loss, (1, 2))(conv, x, w)
  images, kernels = jnp.stack([X, 2 * X], 1), jnp.stack([W, 1 + W])
  compare(lambda conv, x, w: jax.vmap(gradient(conv), (1, None))(x, w), images, W)
  compare(lambda conv, x, w: jax.vmap(gradient(conv), (None, 0))(x, w), X, kernels)
  step = lambda conv: lambda w, _: (w - 0.01 * gradient(conv)(X, w)[1], None)
  compare(lambda conv, w: jax.lax.scan(step(conv), w, None, length=3)[0], W)
  compare(lambda conv, x, w: jax.grad(jax.checkpoint(functools.partial(loss, conv)), (0, 1))(x, w), X, W)


def test_sharded_by_jit_and_by_shard_map():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  images = jax.device_put(X, jax.sharding.NamedSharding(mesh, P("data")))
  compare(lambda conv, x, w: jax.grad(loss, (1, 2))(conv, x, w), images, W)
  whole = lambda conv, x, w: jax.lax.psum(loss(conv, x, w), "data")
  split = lambda conv: jax.shard_map(
    functools.partial(whole, conv), mesh=mesh, in_specs=(P("data"), P()), out_specs=P()
  )
  compare(lambda conv, x, w: jax.grad(split(conv), (0, 1))(x, w), images, W)


def test_on_accelerators_the_programs_are_those_of_lax():
  for platform in ("cuda", "tpu"):
    gradient = [jax.jit(jax.grad(functools.partial(loss, conv), (0, 1))) for conv in (convolution, of_lax)]
    texts = [jax.export.export(f, platforms=(platform,))(X, W).mlir_module() for f in gradient]
    lines = [
      [line.split("=", 1)[1].split(" loc(")[0] for line in t.splitlines() if ".convolution" in line] for t in texts
    ]
    shapes = [sorted(line[line.index("dim_numbers") :] for line in each) for each in lines]
    assert shapes[0] == shapes[1]
    assert "while" not in texts[0]


def test_within_loops_of_the_cpu_all_convolutions_have_the_fast_order():
  body = lambda w, _: (w - jax.grad(loss, 2)(convolution, jnp.sin(X * w.sum()), w), None)
  text = jax.jit(lambda w: jax.lax.scan(body, w, None, length=3)[0]).lower(W).compile().as_text()
  orders = {line.split("dim_labels=")[1].split(",")[0] for line in text.splitlines() if " convolution(" in line}
  assert orders == {"b01f_01io->b01f"}


def test_strides_dilations_groups_and_types_are_left_to_lax():
  compare(lambda conv, x, w: jax.grad(loss, (1, 2))(conv, x, w, "SAME", (2, 2)), X, W)
  dilated = convolution(X, W, (1, 1), "SAME", rhs_dilation=(2, 2))
  np.testing.assert_array_equal(
    dilated, jax.lax.conv_general_dilated(X, W, (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=ORDER)
  )
  grouped = convolution(X, jnp.concatenate([W, W[..., :1]], axis=3)[:, :, :1], (1, 1), "SAME", feature_group_count=3)
  assert grouped.shape == X.shape


def test_bands_of_bfloat16_are_summed_in_float32(monkeypatch):
  monkeypatch.setattr(module, "_BAND", 1)
  x, g = (1 + 0.1 * jax.random.normal(jax.random.key(k), (1, 96, 4, c)) for k, c in ((0, 3), (1, 2)))
  half = lambda a: a.astype(jnp.bfloat16)
  ours = jax.vjp(lambda w: convolution(half(x), w, (1, 1), "SAME"), half(W))[1](half(g))[0]
  exact = jax.vjp(lambda w: of_lax(x, w, (1, 1), "SAME"), W)[1](g)[0]
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0.006)  # bfloat16 rounds by 0.004
