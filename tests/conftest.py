"""Tests run with shape annotations executed, strict types and ranks, and eight simulated devices."""

import os
import pathlib

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("jaxdiff", "beartype.beartype")


@pytest.fixture(autouse=True)
def _strict(request):
  """The core mixes no types and no ranks; Optax and bf16 linen do (marker `standard_promotion`)."""
  if request.node.get_closest_marker("standard_promotion"):
    yield
  else:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
      yield


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def untyped():
  """As users run it: without the type hook, which would catch wrong input before our own messages."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
