"""How tests run: strict types and ranks, one of eight simulated devices unless a test asks for all, fast compilation.

`--types` executes the shape annotations of the files in `TYPED`, `--costs` prints the CPU time by file.
"""

import gc
import importlib.metadata
import os
import pathlib

import jax
import jaxtyping
import pytest

pytest_plugins = ["costs"]
TYPED = ("test_conformance.py", "test_ema.py", "test_mlp.py", "test_parallel.py")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxdiff" / "xla"
_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_traceback_in_locations_limit": 0}
if os.access(next(folder for folder in (_CACHE, *_CACHE.parents) if folder.exists()), os.W_OK):
  _SETTINGS["jax_compilation_cache_dir"] = str(_CACHE)
for _name, _value in _SETTINGS.items():
  if _name.upper() not in os.environ:
    os.environ[_name.upper()] = str(_value)  # for the processes that tests start
    jax.config.update(_name, _value)

_FLAGS = ["--xla_backend_optimization_level=0"]  # compilation takes most of the time
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # The first halves what is left; newer releases lack it. The second is what `jaxdiff.cli` sets.
  _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_experimental_ynn_fusion_type=-reduce"]
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()  # read at the first program

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
_DEVICES = {name: getattr(jax, name) for name in ("devices", "local_devices")}
for _name, _all in _DEVICES.items():
  setattr(jax, _name, lambda *args, _all=_all, **options: _all(*args, **options)[:1])


def pytest_addoption(parser):
  parser.addoption("--types", action="store_true", help="run the files in TYPED with their annotations executed")


def pytest_configure(config):
  if config.getoption("--types"):
    jaxtyping.install_import_hook("jaxdiff", "beartype.beartype")


def pytest_ignore_collect(collection_path, config):
  if config.getoption("--types") and collection_path.suffix == ".py":
    return collection_path.name not in TYPED or None
  return None


def pytest_collection_finish(session):
  gc.freeze()  # what was imported stays; collections of garbage need not walk it again


@pytest.fixture(autouse=True)
def _strict(request):
  """The core mixes no types and no ranks; Optax and bf16 linen do (marker `standard_promotion`)."""
  if request.node.get_closest_marker("standard_promotion"):
    yield
  else:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
      yield


@pytest.fixture
def eight_devices(monkeypatch):
  """`jax.devices()` are all eight, for tests whose subject they are."""
  for name, every in _DEVICES.items():
    monkeypatch.setattr(jax, name, every)


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
