"""Errors for the mistakes that are easily made: a factory not called, an array of another length or type.

All look at types and shapes only, so they cost nothing inside jit. `pytree` is for classes that check their own fields.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxdiff.typing import NO_COND


def made(name: str, value: Any, kind: Any = object) -> None:
  """Refuse a factory or class given where what it makes is due, and what lacks the attributes of `kind`.

  Args:
    name: the argument.
    value: what was given for it.
    kind: a protocol or a named tuple.

  Raises:
    TypeError: naming the argument, and the call that is missing.

  Example:
    >>> import jaxdiff as jd
    >>> made("prediction", jd.predictions.noise)
    Traceback (most recent call last):
      ...
    TypeError: prediction is a factory: did you forget to call it: predictions.noise()?
  """
  module, label = (str(getattr(value, attribute, "")) for attribute in ("__module__", "__qualname__"))
  is_class = isinstance(value, type)
  if is_class or (label and module.startswith("jaxdiff.") and "<" not in label):
    what, call = ("a class", label) if is_class else ("a factory", f"{_home(module, value)}.{label}")
    raise TypeError(f"{name} is {what}: did you forget to call it: {call}()?")
  lacking = [part for part in dir(kind) if not part.startswith("_") and not hasattr(value, part)]
  if lacking:
    if "drift" in lacking and hasattr(value, "sde"):
      raise TypeError(f"{name} is a discrete chain where a process is needed: pass its continuous process, chain.sde()")
    remedy = ""
    if "marginal" in lacking and "drift" not in lacking:
      remedy = (
        ": this needs scalar marginals, x_t | x_0 ~ N(alpha x_0, sigma^2 I). Any process goes with "
        "samplers.reverse_sde, and with flow.cnf, whose field is jaxdiff.reverse(sde, score, eta=0)[0]"
      )
    what = f"{name} must be a {kind.__name__}, got {type(value).__name__}, which lacks {', '.join(lacking)}"
    raise TypeError(what + remedy)


def _home(module: str, value: Any) -> str:
  """Where users find what a module of jaxdiff defines: in its package, if that has it too."""
  package = module.split(".")[1]
  public = vars(sys.modules[f"jaxdiff.{package}"]).values()
  return package if any(value is one for one in public) else module.rpartition(".")[2]


def whole(name: str, value: Any, least: int, meaning: str = "") -> None:
  """Refuse what is no integer, and integers below the least.

  Raises:
    TypeError: naming the argument, for another type.
    ValueError: for a smaller number.
  """
  what = f", {meaning};" if meaning else ","
  if not hasattr(value, "__index__") or isinstance(value, bool):
    raise TypeError(f"{name} must be an integer{what} got {value!r}")
  if value < least:
    raise ValueError(f"{name} must be at least {least}{what} got {value}")


def one_of(name: str, value: Any, choices: Any) -> None:
  """Refuse what is none of the words of a `Literal`.

  Raises:
    ValueError: naming the argument and the words.
  """
  if value not in get_args(choices):
    raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def levels(value: Any, data_range: tuple[float, float]) -> None:
  """Refuse levels that are no integer or below 2, and an empty data range."""
  whole("levels", value, 2, "the number of values an integer of the data can take")
  if not data_range[0] < data_range[1]:
    raise ValueError(f"data_range must be (low, high) with low < high, got {data_range}")


def per_example(name: str, value: Any, size: int) -> Any:
  """The value, refused unless it is one number per example."""
  if jnp.shape(value) != (size,):
    raise ValueError(f"{name} must be one number per example, [{size}]; got shape {jnp.shape(value)}")
  return value


def batch(name: str, x: Any, cond: Any = NO_COND, u: Any = None) -> None:
  """Refuse a state that is no batch of floating point numbers, and conditions or u of another batch.

  Args:
    name: the argument that holds x.
    x: the state `[b, *d]`.
    cond: the condition, arrays `[b, ...]` by name.
    u: None, or numbers `[b]`.

  Raises:
    TypeError: if x is no array of floating point numbers, or cond no mapping.
    ValueError: if shapes do not fit.
  """
  if not hasattr(x, "dtype") or not hasattr(x, "shape"):
    raise TypeError(f"{name} must be an array [b, *d], got {type(x).__name__}")
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    raise TypeError(f"{name} must be an array of numbers, got keys: the key is the first argument")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating point, got {x.dtype}: scale integers first, by likelihood.dequantize")
  if not x.shape:
    raise ValueError(f"{name} must have a leading batch axis, [b, *d]; got a scalar")
  size = x.shape[0]
  if not isinstance(cond, Mapping):
    raise TypeError(f"cond must be a dict of arrays with a leading batch axis, got {type(cond).__name__}")
  for key, value in cond.items():
    if jnp.shape(value)[:1] != (size,):
      raise ValueError(
        f"cond[{key!r}] must have one entry per example, [{size}, ...]; got shape {jnp.shape(value)}: what is the same "
        "for all examples belongs into the network"
      )
  if u is not None and jnp.shape(u) != (size,):
    raise ValueError(f"u must be one number per example, [{size}]; got shape {jnp.shape(u)}")


def vectors(name: str, x: Any) -> None:
  """Refuse a batch of bare numbers `[b]`, which one example without its batch axis looks like."""
  if x.ndim < 2:
    raise ValueError(
      f"{name} must be [b, *d] with an axis of data, got shape {x.shape}: one example is {name}[None], numbers are "
      f"{name}[:, None]"
    )


def score(x: Any, value: Any, name: str = "score") -> Any:
  """What a score (or another field) gave for x, in the type of x; refused unless it is an array of floats like x.

  Raises:
    TypeError: for anything but such an array, a pair of an output and something else for one.
    ValueError: for another shape, also one that would broadcast.
  """
  if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f"{name} must return a floating point array, got {getattr(value, 'dtype', type(value).__name__)}")
  if value.shape != x.shape:
    raise ValueError(f"{name} must return an array of the shape of x, {x.shape}; got {value.shape}")
  return value.astype(x.dtype)


def callable_pytree(name: str, value: Any) -> None:
  """Refuse functions that cannot pass through jit as an argument, and what is no function."""
  made(name, value)
  if not callable(value):
    raise TypeError(f"{name} must be a function of time, got {type(value).__name__}")
  if jax.tree_util.all_leaves([value]):
    raise TypeError(f"{name} must be a pytree, so that it may pass through jit: wrap it, jax.tree_util.Partial(f)")


def pytree(cls: Any, static: tuple[str, ...] = ()) -> Any:
  """Make a dataclass a pytree whose `static` fields are structure, and which is rebuilt without its own checks.

  `jax.tree_util.register_dataclass` would call the constructor, which must then take tracers, None and shapes.
  """
  data = tuple(field.name for field in fields(cls) if field.name not in static)

  def flatten(made: Any) -> tuple[list[Any], tuple[Any, ...]]:
    children = [(jax.tree_util.GetAttrKey(name), getattr(made, name)) for name in data]
    return children, tuple(getattr(made, name) for name in static)

  def unflatten(structure: Any, children: Any) -> Any:
    made = object.__new__(cls)
    for name, value in zip(static + data, (*structure, *children), strict=True):
      object.__setattr__(made, name, value)
    return made

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls
