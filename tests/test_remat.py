"""Rematerialization and bfloat16: the same network and the same training, with less memory."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import jaxdiff as jd
from jaxdiff.models import UNet, VDMNet
from jaxdiff.models.conditioning import Embedding, Label
from jaxdiff.training import init_state, make_train_step

POLICIES = "none", "dots", "full"
NET = UNet(channels=4, channel_multipliers=(1,), blocks=1, attention_levels=(0,), heads=2, groups=2, dropout=0.5)
CONDITIONS = {"label": Label(3), "text": Embedding(2, sequence=True)}
NETS = {
  "default": (NET, {}),
  "conditional": (
    UNet(
      channels=4,
      blocks=1,
      groups=2,
      dropout=0.5,
      modulation="add",
      resampling="fir",
      resample_in_blocks=True,
      progressive_input="residual",
      conditions=CONDITIONS,
    ),
    {"label": np.array([0, 2]), "text": np.array([[[1.0, 2.0], [3.0, 0.5]], [[0.5, 1.0], [0.0, 0.0]]], np.float32)},
  ),
}
X = np.random.default_rng(1).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = np.array([0.1, 0.9], np.float32)


@functools.cache
def trained(remat, name):
  """The shapes of the parameters, then the value and gradient of a sum of squares, with dropout."""
  net, cond = NETS[name]
  net = net.clone(remat=remat, dtype=np.float64, param_dtype=np.float64)
  params = networks.moved(net, X, T, **cond)
  loss = lambda p: jnp.sum(net.apply(p, X, T, train=True, rngs={"dropout": jax.random.key(3)}, **cond) ** 2)
  shapes = jax.eval_shape(net.init, jax.random.key(0), X, T, **cond)
  return shapes, *jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize(("remat", "name"), [("dots", "default"), ("full", "conditional")])
def test_parameters_outputs_and_gradients_are_those_without(remat, name, x64):
  (shapes, value, grads), (plain_shapes, plain_value, plain_grads) = trained(remat, name), trained("none", name)
  assert shapes == plain_shapes
  np.testing.assert_allclose(value, plain_value, rtol=1e-6)
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
  difference = norm(jax.tree.map(np.subtract, grads, plain_grads))
  assert difference <= 1e-6 * norm(plain_grads)  # float32 sums in another order


def _network(remat):
  """A network of two levels and a batch whose activations outweigh its parameters, both abstract."""
  net = UNet(channels=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, groups=4, remat=remat)
  return net, *_abstract(net)


def _abstract(net):
  x, t = jax.ShapeDtypeStruct((32, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.float32)
  return jax.eval_shape(net.init, jax.random.key(0), x, t), x, t


def _kept(remat):
  """What the forward pass leaves for the backward pass, of shapes [b, ...]."""
  net, params, x, t = _network(remat)
  backward = jax.eval_shape(lambda p, x, t: jax.vjp(lambda p: net.apply(p, x, t), p)[1], params, x, t)
  return [leaf for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (32,)]


def test_what_is_kept_is_what_the_policy_says():
  kept = {remat: _kept(remat) for remat in POLICIES}
  size = {remat: sum(leaf.size for leaf in kept[remat]) for remat in POLICIES}
  assert size["full"] < size["dots"] < size["none"] / 4, size
  of_attention = {remat: [leaf.shape for leaf in kept[remat] if leaf.shape[-2:] == (64, 64)] for remat in POLICIES}
  assert of_attention["none"]
  assert not of_attention["dots"]
  # "dots" keeps two convolutions of each of the eight residual blocks, whose inputs are all that "full" keeps.
  maps = {remat: sum(leaf.ndim == 4 for leaf in kept[remat]) for remat in POLICIES}
  assert maps["dots"] - maps["full"] >= 8, maps


def test_the_compiled_gradient_needs_less_memory():
  """By the scheduler that spares memory: the default of the CPU runs at once whatever is independent."""
  temporary = {}
  for remat in ("none", "full"):
    net = VDMNet(depth=6, channels=4, groups=2, remat=remat)
    gradient = jax.jit(jax.grad(lambda p, x, t, net=net: jnp.sum(net.apply(p, x, t) ** 2)))
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    temporary[remat] = gradient.lower(*_abstract(net)).compile(options).memory_analysis().temp_size_in_bytes
  assert temporary["full"] < 0.8 * temporary["none"], temporary


def test_unknown_policies_are_refused():
  with pytest.raises(ValueError, match="remat='half': must be 'none', 'dots' or 'full'"):
    jax.eval_shape(NET.clone(remat="half").init, jax.random.key(0), X, T)


@pytest.mark.standard_promotion
def test_bfloat16_trains_float32_parameters():
  """Five steps of Adam go down as those in float32 do, and nothing in the state is bfloat16."""
  optimizer, losses = optax.adam(1e-2), {}
  denoising = jd.losses.denoising(jd.VP(), jd.predictions.noise())
  for dtype, remat in (("float32", "none"), ("bfloat16", "full")):
    net = NET.clone(dtype=dtype, remat=remat, dropout=0.0, blocks=0, attention_levels=())
    objective = lambda params, keys, batch, net=net: denoising(
      keys, batch["x"], functools.partial(net.apply, params), u=batch["u"]
    )
    step, params = make_train_step(objective, optimizer, 0.9, global_batch=2), networks.moved(net, X, T)

    @jax.jit
    def train(params, step=step):
      state = init_state(params, optimizer, jax.random.key(1))
      return jax.lax.scan(lambda state, _: step(state, {"x": X}, jnp.arange(2)), state, length=5)

    state, metrics = train(params)
    losses[dtype] = np.asarray(metrics["loss"])
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
  assert losses["float32"][-1] < losses["float32"][0]
  np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
  assert np.any(losses["bfloat16"] != losses["float32"])
