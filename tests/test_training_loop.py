"""The training loop: what it logs, saves, counts, stops at and refuses; its hooks, metrics and progress."""

import io
import itertools
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import BATCH, INDEX, noisy, quadratic

from jaxdiff.parallel import jit_launcher, make_mesh
from jaxdiff.training import (
  Checkpoints,
  DivergedError,
  NonFiniteError,
  abstract_state,
  cost,
  hooks,
  init_state,
  load_params,
  make_train_step,
  train,
)
from jaxdiff.training.metrics import MetricsWriter, read_metrics
from jaxdiff.training.progress import Progress


def batches(seed=0, bad_steps=()):
  """Endless batches; those of `bad_steps` hold a NaN."""
  rng = np.random.default_rng(seed)
  for step in itertools.count(1):
    x = rng.normal(size=BATCH).astype(np.float32)
    yield {"x": np.where(np.arange(BATCH) == 3, np.nan, x).astype(np.float32) if step in bad_steps else x}


class Positioned:
  """Batches as an iterator with the methods of a grain iterator that checkpoints need."""

  def __init__(self, **options):
    self._batches, self._count = batches(**options), 0

  def __iter__(self):
    return self

  def __next__(self):
    self._count += 1
    return next(self._batches)

  def get_state(self):
    return {"count": self._count}

  def set_state(self, state):
    self._count = state["count"]


def setup(devices=1, objective=noisy, per_dispatch=1):
  launcher, optimizer = jit_launcher(make_mesh(jax.local_devices()[:devices])), optax.sgd(0.1)
  step_fn = launcher.compile(make_train_step(objective, optimizer, 0.9, BATCH), per_dispatch)
  state = launcher.create(lambda: init_state({"w": jnp.ones(())}, optimizer, jax.random.key(0)))
  return state, step_fn, {"launcher": launcher, "global_batch": BATCH, "steps_per_dispatch": per_dispatch}


@pytest.mark.parametrize("per_dispatch", [1, 5])
def test_loop_equals_plain_steps_and_logs_their_means(tmp_path, per_dispatch):
  state, step_fn, where = setup(per_dispatch=per_dispatch)
  with MetricsWriter(tmp_path, 0) as writer:
    final = train(state, step_fn, batches(), **where, total_steps=25, log_every=10, writer=writer)

  state, step_fn, where = setup()
  losses = []
  for batch in itertools.islice(batches(), 25):
    state, metrics = step_fn(state, *map(where["launcher"].put, (batch, INDEX)))
    losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(final.params["w"], state.params["w"], rtol=1e-6)
  records = read_metrics(tmp_path / "metrics.jsonl")
  assert [record["step"] for record in records] == [10, 20, 25]
  means = [np.mean(losses[:10]), np.mean(losses[10:20]), np.mean(losses[20:])]
  np.testing.assert_allclose([record["loss"] for record in records], means, rtol=1e-6)
  for record in records:
    assert record["examples_per_second"] == record["steps_per_second"] * BATCH > 0
    assert 0 <= record["input_wait"] < 1
  assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_diagnostic_that_is_infinite_stops_nothing(tmp_path):
  def objective(params, keys, batch):
    return noisy(params, keys, batch)[0], {"log": jnp.where(batch["x"][0] > 0, jnp.inf, -jnp.inf) + 0 * batch["x"]}

  state, step_fn, where = setup(objective=objective)
  with MetricsWriter(tmp_path, 0) as writer:
    train(state, step_fn, batches(), **where, total_steps=8, writer=writer)
  (record,) = read_metrics(tmp_path / "metrics.jsonl")
  assert np.isnan(record["log"])
  assert np.isfinite(record["loss"])
  assert record["skipped"] == 0


def test_loop_compiles_once_and_stops_where_it_should(eight_devices):
  traces = []

  def objective(params, keys, batch):
    traces.append(1)
    return noisy(params, keys, batch)

  state, step_fn, where = setup(8, objective)
  state = train(state, step_fn, batches(), **where, total_steps=5, log_every=2)
  assert len(traces) == 1
  assert int(state.step) == 5
  again = train(state, step_fn, iter(()), **where, total_steps=5)
  assert again is state


def test_loop_stops_when_told_and_saves_that_step(tmp_path):
  state, step_fn, where = setup()
  with Checkpoints(tmp_path / "ckpt", {}) as checkpoints, MetricsWriter(tmp_path, 0) as writer:
    where |= {"checkpoints": checkpoints, "writer": writer, "should_stop": lambda step: step == 3}
    state = train(state, step_fn, Positioned(), **where, total_steps=9)
    assert checkpoints.latest_step() == int(state.step) == 3
    iterator = Positioned()
    checkpoints.restore_latest(abstract_state(state), iterator)
  assert iterator.get_state() == {"count": 3}
  assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_loop_fetches_metrics_only_when_it_logs(monkeypatch):
  state, step_fn, where = setup()
  fetched, get = [], jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or get(tree))
  train(state, step_fn, batches(), **where, total_steps=12, log_every=5)
  assert fetched == [5, 5, 2]


def test_loop_reads_one_batch_ahead_and_measures_the_wait(tmp_path):
  """The batch of the next step is read before the loop waits for this one; a slow iterator shows."""
  order = []

  def slow():
    for k, batch in enumerate(batches()):
      order.append(f"read {k + 1}")
      time.sleep(0.02)
      yield batch

  state, step_fn, where = setup()

  def noted(*arguments):
    order.append("step")
    return step_fn(*arguments)

  with MetricsWriter(tmp_path, 0) as writer:
    train(state, noted, slow(), **where, total_steps=4, writer=writer, hooks=[lambda step, state: order.append("end")])
  assert order == ["read 1", "step", "read 2", "end", "step", "read 3", "end", "step", "read 4", "end", "step", "end"]
  (record,) = read_metrics(tmp_path / "metrics.jsonl")
  assert record["input_wait"] * 3 / record["steps_per_second"] >= 0.04  # after the first step, which compiles


def test_loop_does_not_count_the_time_of_hooks(tmp_path):
  state, step_fn, where = setup()
  with MetricsWriter(tmp_path, 0) as writer:
    slow = lambda step, state: time.sleep(0.3) if step in (2, 3) else None
    train(state, step_fn, batches(), **where, total_steps=4, log_every=2, writer=writer, hooks=[slow])
  assert read_metrics(tmp_path / "metrics.jsonl")[1]["steps_per_second"] > 2 / 0.3


@pytest.mark.parametrize("name", ["log_every", "checkpoint_every", "global_batch", "max_skipped", "steps_per_dispatch"])
def test_loop_arguments_out_of_range(name):
  state, step_fn, where = setup()
  with pytest.raises(ValueError, match=f"{name}=0"):
    train(state, step_fn, batches(), **{**where, "total_steps": 3, name: 0})


@pytest.mark.parametrize(("name", "value"), [("total_steps", 26), ("log_every", 7), ("checkpoint_every", 9)])
def test_dispatches_divide_all_steps(name, value):
  state, step_fn, where = setup(per_dispatch=5)
  steps = {"total_steps": 25, "log_every": 5, "checkpoint_every": 5, name: value}
  with pytest.raises(ValueError, match=f"steps_per_dispatch=5 does not divide {name}, {value}"):
    train(state, step_fn, batches(), **where, **steps)


def test_iterator_that_ends_is_named():
  state, step_fn, where = setup()
  with pytest.raises(ValueError, match="before the batch of step 4"):
    train(state, step_fn, itertools.islice(batches(), 3), **where, total_steps=9)


def test_nonfinite_steps_are_left_out_of_the_means_and_counted(tmp_path):
  state, step_fn, where = setup()
  with MetricsWriter(tmp_path, 0) as writer:
    state = train(state, step_fn, batches(bad_steps=(2, 3)), **where, total_steps=6, log_every=3, writer=writer)
  first, second = read_metrics(tmp_path / "metrics.jsonl")
  assert (first["skipped"], second["skipped"]) == (2, 0)
  assert np.isfinite(first["loss"])
  assert (int(state.step), int(state.skipped)) == (6, 2)


def test_too_many_nonfinite_steps_stop_and_keep_the_last_good_checkpoint(tmp_path):
  state, step_fn, where = setup()
  with Checkpoints(tmp_path / "ckpt", {}) as checkpoints:
    where |= {"checkpoints": checkpoints, "checkpoint_every": 4, "log_every": 3, "max_skipped": 2}
    with pytest.raises(NonFiniteError) as error:
      train(state, step_fn, Positioned(bad_steps=(9, 10, 11)), **where, total_steps=40)
  message = str(error.value)
  assert "at step 11, the last of 3 steps in a row that were not finite and were skipped (max_skipped=2)" in message
  assert f"the last good checkpoint, of step 8, is kept in {tmp_path / 'ckpt'}" in message
  params, step = load_params(tmp_path / "ckpt", {"w": jax.ShapeDtypeStruct((), jnp.float32)})
  assert step == 8
  assert np.isfinite(params["w"])


@pytest.mark.parametrize("growth", [1.0, np.inf])
def test_losses_beyond_their_limits_stop_the_run_by_name(tmp_path, growth):
  """Two players: one of them grows, to a number or beyond all; both are told."""
  _, _, where = setup()
  optimizer = optax.sgd(0.0)

  def objective(params, keys, batch):
    grown = 10.0 ** batch["step"].astype(jnp.float32) * jnp.where(batch["step"] > 5, growth, 1.0)
    return params["w"] * batch["x"] + grown - grown, {"critic_loss": grown, "maker_loss": jnp.full(BATCH, 0.5)}

  step_fn = where["launcher"].compile(make_train_step(objective, optimizer, 0.9, BATCH))
  state = where["launcher"].create(lambda: init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0)))
  kind, told = (DivergedError, "critic_loss 100000, maker_loss 0.5")
  limits = {"critic_loss": 2e4, "maker_loss": 1e3}
  if not np.isfinite(growth):
    kind, told, limits = NonFiniteError, "critic_loss inf, maker_loss 0.5 at step 8", dict.fromkeys(limits, np.inf)
  with Checkpoints(tmp_path, {}) as checkpoints:
    where |= {"checkpoints": checkpoints, "checkpoint_every": 2, "log_every": 1, "max_skipped": 1}
    with pytest.raises(kind) as error:
      train(state, step_fn, Positioned(), **where, total_steps=9, limits=limits)
  assert told in str(error.value)
  assert "the last good checkpoint, of step " in str(error.value)


def test_nonfinite_parameters_are_never_saved(tmp_path):
  # The loss and the gradient of step 4 are finite; the update overflows.
  state, _, where = setup()
  step = make_train_step(noisy, optax.sgd(0.1), 0.9, BATCH)

  def overflow(state, batch, index):
    state, metrics = step(state, batch, index)
    return state._replace(params={"w": jnp.where(state.step == 4, jnp.inf, state.params["w"])}), metrics

  step_fn = where["launcher"].compile(overflow)
  with (
    Checkpoints(tmp_path, {}) as checkpoints,
    pytest.raises(NonFiniteError, match=r"at step 4; .* of step 2, is kept"),
  ):
    train(state, step_fn, Positioned(), **where, total_steps=9, checkpoints=checkpoints, checkpoint_every=2)


def test_hooks_every_few_steps_and_at_the_end():
  seen = []
  state, step_fn, where = setup()
  hook = hooks.every(3, lambda step, state: seen.append((step, int(state.step))), last=7)
  train(state, step_fn, batches(), **where, total_steps=7, hooks=[hook])
  assert seen == [(3, 3), (6, 6), (7, 7)]


def test_profile_traces_the_steps_between(tmp_path):
  state, step_fn, where = setup()
  profile = hooks.Profile(tmp_path / "profile", 2, 4)
  train(state, step_fn, batches(), **where, total_steps=5, hooks=[profile])
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  with pytest.raises(ValueError, match="profile=4:4"):
    hooks.Profile(tmp_path, 4, 4)


def test_flops_and_the_share_of_the_peak(monkeypatch):
  state, _, where = setup()
  flops = cost.step_flops(make_train_step(quadratic, optax.sgd(0.1), 0.9, BATCH), state, next(batches()), INDEX)
  assert flops > 0
  matrix = jnp.ones((16, 16))
  assert cost.step_flops(lambda a: a @ a, matrix) == 2 * 16**3
  assert cost.rates(1e12)(2.0) == {"teraflops_per_second": 2.0}
  monkeypatch.setitem(cost._PEAK_TERAFLOPS, jax.local_devices()[0].device_kind, 4.0)
  values = cost.rates(1e12)(2.0)
  assert values["model_flops_utilization"] == pytest.approx(2.0 / (4.0 * jax.device_count()))


@pytest.mark.parametrize(
  ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("TPU v5 lite", 197), ("TPU v5", 459)]
)
def test_the_peak_is_that_of_the_device(monkeypatch, kind, peak):
  device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: None)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  share = cost.rates(1e12)(1.0)["model_flops_utilization"]
  assert share == pytest.approx(1 / (peak * jax.device_count()))


def test_metrics_beyond_the_restored_step_are_dropped(tmp_path):
  with MetricsWriter(tmp_path, 0) as writer:
    for step in (2, 4, 6):
      writer.write(step, {"loss": 1.0})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "lo')
  with MetricsWriter(tmp_path, 4) as writer:
    writer.write(6, {"loss": 2.0})
  assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(2, 1.0), (4, 1.0), (6, 2.0)]


def test_wandb_gets_records_and_pictures_under_one_id(tmp_path, monkeypatch):
  calls = []
  fake = types.SimpleNamespace(
    util=types.SimpleNamespace(generate_id=lambda: f"id{len(calls)}"),
    Image=lambda image: image.shape,
    init=lambda **options: calls.append(options) or fake,
    log=lambda values, step: calls.append((values, step)),
    finish=lambda: calls.append("finished"),
  )
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for start in (0, 4):
    with MetricsWriter(tmp_path, start, wandb="mine") as writer:
      writer.write(start + 1, {"loss": 1.0})
      writer.picture(start + 1, "samples", np.zeros((4, 5, 3), np.uint8))
  options = {"project": "mine", "id": "id0", "resume": "allow", "dir": str(tmp_path)}
  assert calls[:4] == [options, ({"loss": 1.0}, 1), ({"samples": (4, 5, 3)}, 1), "finished"]
  assert calls[4] == options
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="wandb='mine' needs the package wandb"):
    MetricsWriter(tmp_path, 0, wandb="mine")


def test_progress_prints_plain_lines_where_there_is_no_terminal():
  out = io.StringIO()
  with Progress(total=100, start=0, out=out, every=1e9) as progress:
    for step in range(1, 101):
      progress.advance()
      if step % 10 == 0:
        progress.report(step, {"loss": 1 / step})
  first, last = out.getvalue().splitlines()
  assert first.startswith("step 10/100, loss 0.1, ")
  assert "steps/s" in first
  assert last.startswith("step 100/100, loss 0.01, ")


def test_progress_shows_the_loss_per_dimension_where_there_is_one():
  out = io.StringIO()
  with Progress(total=1, start=0, out=out) as progress:
    progress.report(1, {"loss": 8.0, "loss_per_dim": 0.125})
  assert out.getvalue().startswith("step 1/1, loss/dim 0.125, ")


def test_progress_is_a_bar_on_a_terminal():
  out = io.StringIO()
  out.isatty = lambda: True
  with Progress(total=10, start=4, out=out) as progress:
    for _ in range(6):
      progress.advance()
    progress.report(10, {"loss": 0.5})
  assert "10/10" in out.getvalue()
  assert "loss 0.5" in out.getvalue()
