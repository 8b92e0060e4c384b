"""Convolutions with gradients of their own: those of `jax.lax`, of every order, in both modes, mapped and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdiff.models import convolution as module
from jaxdiff.models.convolution import convolution

X = np.random.default_rng(0).normal(size=(8, 7, 5, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 3, 3, 2)).astype(np.float32)
TANGENTS = np.float32(0.3) * X, np.float32(0.2) * W
PADDINGS = "SAME", "VALID", ((2, 0), (0, 1))
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


def at_paddings(conv, x, w):
  return [jax.value_and_grad(loss, (1, 2))(conv, x, w, padding) for padding in PADDINGS]


@functools.cache
def expected_at_paddings():
  return jax.device_get(jax.jit(functools.partial(at_paddings, of_lax))(X, W))


@pytest.mark.usefixtures("band")
def test_gradients_are_those_of_lax():
  found = jax.jit(functools.partial(at_paddings, convolution))(X, W)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, jax.device_get(found), expected_at_paddings())


def test_both_modes_of_every_order():
  def every(conv, x, w):
    gradient = lambda x, w: jax.grad(loss, (1, 2))(conv, x, w)
    slope = lambda x, w: jax.jvp(functools.partial(loss, conv), (x, w), TANGENTS)[1]
    norm = lambda x, w: sum(jnp.sum(g**2) for g in gradient(x, w))
    second = jax.jvp(gradient, (x, w), TANGENTS)[1]
    return slope(x, w), second, jax.grad(slope, (0, 1))(x, w), jax.grad(norm, (0, 1))(x, w)

  compare(every, X, W)


def test_mapped_looped_and_rematerialized():
  images, kernels = np.stack([X, 2 * X], 1), np.stack([W, 1 + W])

  def every(conv, x, w, images, kernels):
    gradient = lambda x, w: jax.grad(loss, (1, 2))(conv, x, w)
    step = lambda w, _: (w - 0.01 * gradient(x, w)[1], None)
    return (
      jax.vmap(gradient, (1, None))(images, w),
      jax.vmap(gradient, (None, 0))(x, kernels),
      jax.lax.scan(step, w, None, length=3)[0],
      jax.grad(jax.checkpoint(functools.partial(loss, conv)), (0, 1))(x, w),
    )

  compare(every, X, W, images, kernels)


@pytest.mark.usefixtures("eight_devices")
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
  lax = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=ORDER)
  grouped = np.concatenate([W, W[..., :1]], axis=3)[:, :, :1]
  run = lambda conv: (
    conv(X, W, (1, 1), "SAME", rhs_dilation=(2, 2)),
    conv(X, grouped, (1, 1), "SAME", feature_group_count=3),
  )
  jax.tree.map(np.testing.assert_array_equal, *jax.jit(lambda: (run(convolution), run(lax)))())


def test_bands_of_bfloat16_are_summed_in_float32(monkeypatch):
  monkeypatch.setattr(module, "_BAND", 1)
  x, g = (1 + 0.1 * np.random.default_rng(c).normal(size=(1, 96, 4, c)).astype(np.float32) for c in (3, 2))
  half = lambda a: a.astype(jnp.bfloat16)

  @jax.jit
  def both(x, w, g):
    ours = jax.vjp(lambda w: convolution(half(x), w, (1, 1), "SAME"), half(w))[1](half(g))[0]
    return ours, jax.vjp(lambda w: of_lax(x, w, (1, 1), "SAME"), w)[1](g)[0]

  ours, exact = jax.device_get(both(x, W, g))
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=0.006)  # bfloat16 rounds by 0.004
