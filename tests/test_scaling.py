"""The study of scaling: what is read from compiled programs, what a ring sends, and the small transformer."""

import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parallel

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "scaling"
HLO = """
HloModule step
%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[8,32] {
  %r.1 = bf16[64,32]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
ENTRY %main {
  %r.2 = (f32[10]{0}, /*index=1*/f32[]) all-reduce(%a, %b), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  %r.3 = f32[6]{0} all-reduce(%c), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %g.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%d), replica_groups=[2,4]<=[8], dimensions={0}
  %g.2 = bf16[16,8]{1,0} all-gather-done(%g.1)
  %g.3 = f32[8]{0} all-gather(%e), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %s.1 = f32[5]{0} reduce-scatter(%f), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  %p.1 = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%h), source_target_pairs={{0,1},{1,0}}
  %n.1 = f32[7]{0} add(%all-reduce.9, %all-gather.9)
}
"""


@pytest.fixture(scope="module")
def study():
  """The modules of the study by name."""
  sys.path.insert(0, str(FOLDER))
  yield {name: importlib.import_module(name) for name in ("collectives", "dit", "scaling")}
  sys.path.remove(str(FOLDER))


def test_collectives_are_read_from_the_text(study):
  assert [tuple(found) for found in study["collectives"].collectives(HLO, 8)] == [
    ("reduce-scatter", 64 * 32 * 2, 4, True),
    ("all-reduce", 10 * 4 + 4, 8, True),
    ("all-reduce", 6 * 4, 2, False),
    ("all-gather", 16 * 8 * 2, 4, True),
    ("all-gather", 8 * 4, 4, True),
    ("reduce-scatter", 2 * 5 * 4, 2, False),
    ("collective-permute", 3 * 4, 8, True),
  ]


@pytest.mark.parametrize(
  ("kind", "sent"),
  [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("collective-permute", 100.0)],
)
def test_what_a_ring_of_four_sends(study, kind, sent):
  assert study["collectives"].ring_bytes(kind, 100, 4) == sent
  assert study["collectives"].ring_bytes(kind, 100, 1) == 0


def test_compiled_gradients_have_the_all_reduces_of_data_parallelism(study, eight_devices):
  """8 devices, parameters of 4 x 3 and 3 floats: their gradients are all that is summed, and the loss."""
  mesh = parallel.make_mesh()
  place = lambda sharding, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"][None]) ** 2)
  whole = parallel.replicated(mesh)
  compiled = (
    jax.jit(jax.value_and_grad(loss), out_shardings=whole)
    .lower({"w": place(whole, 4, 3), "b": place(whole, 3)}, place(parallel.batch_sharding(mesh), 16, 4))
    .compile()
  )
  found = list(study["collectives"].collectives(compiled.as_text(), 8))
  assert {(f.kind, f.group) for f in found} == {("all-reduce", 8)}
  assert sum(f.size for f in found) == 4 * (12 + 3 + 1)
  assert compiled.memory_analysis().argument_size_in_bytes == 4 * (12 + 3 + 2 * 4)


def test_time_across_nodes_is_that_of_the_slow_links(study):
  """A sum over 4 nodes of 8: within nodes 7/8 of the array at the near rate, then 3/4 of an eighth at the far one."""
  scaling, collectives = study["scaling"], study["collectives"]
  everywhere = collectives.Collective("all-reduce", 8e9, 32, True)
  rate = scaling.UTILIZATION
  expected = 2 * 7e9 / (450e9 * rate) + 2 * 0.75e9 / (50e9 * rate)
  assert scaling.seconds(scaling.H100, everywhere) == pytest.approx(expected)
  assert scaling.seconds(scaling.H100, collectives.Collective("all-reduce", 8e9, 1, True)) == 0


def test_measurements_are_linear_in_the_depth(study):
  """Which the extrapolation rests on; three depths were measured."""
  records = [json.loads(line) for line in (FOLDER / "measurements.jsonl").read_text().splitlines()]
  wanted = {"net": "dit", "devices": 1, "remat": "none", "platform": "tpu"}
  depths = {r["depth"]: r for r in records if all(r[name] == value for name, value in wanted.items())}
  for name, tolerance in {"parameters": 0, "flops": 1e-5, "bytes": 1e-3, "arguments": 1e-3, "temporary": 0.02}.items():
    one, two, three = (depths[depth][name] for depth in (1, 2, 3))
    np.testing.assert_allclose(study["scaling"].at_depth(one, two, 3), three, rtol=tolerance)


def test_the_transformer_has_the_size_of_xl(study):
  x, t = np.zeros((1, 32, 32, 4), np.float32), np.zeros(1, np.float32)
  counts = []
  for depth in (1, 2):
    net = study["dit"].DiT(depth=depth)
    with jax.numpy_dtype_promotion("standard"):
      params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    counts.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
  # 675 M with the embedding of 1001 classes (Peebles and Xie 2023, table 1).
  assert round((study["scaling"].at_depth(*counts, 28) + 1001 * 1152) / 1e6) == 675
