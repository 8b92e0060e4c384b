"""Feature functions: what Frechet and kernel distances, precision and recall look at instead of pixels.

    raw         the data themselves, flattened (FD-raw): for vectors, and images without labels
    cnn         64 features of a small classifier of the training data (FD-cnn)
    mobilenet   1280 features of MobileNetV2 for colour images, from a file of weights (FD-mobilenet)
    inception   2048 features of the FID's Inception-v3 for images, from the file of weights of pytorch-fid (FID, KID)

Only with the last, whose weights are the user's, are the distances called FID and KID. Your own network:

    Features("my_network", params, apply)      apply(params, x: [b, *d] in the range of the data) -> [b, f]
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from jaxdiff import parallel
from jaxdiff.evaluation import classifier, inception, mobilenet
from jaxdiff.evaluation.chunks import identify, in_chunks
from jaxdiff.losses import decoders
from jaxdiff.typing import Params

KINDS = ("auto", "cnn", "raw", "mobilenet", "inception")
_FILES = {  # of weights, and the colours of their images
  "mobilenet": ("torchvision's mobilenet_v2-b0353104.pth", (3,)),
  "inception": (f"pytorch-fid's {inception.FILE}", (1, 3)),
}


class Features(NamedTuple):
  """A feature function.

  Attributes:
    name: what the distances are called after: FD-name, KD-name; FID, KID for "inception".
    params: its parameters, a pytree of arrays.
    apply: `(params, x: [b, *d]) -> [b, f]`, example by example; images in [-1, 1].
  """

  name: str
  params: Params
  apply: Callable[[Params, Array], Float[Array, "b f"]]


def raw() -> Features:
  """The data themselves, flattened."""
  return Features("raw", (), lambda params, x: x.reshape(len(x), -1))


def mobilenet_v2(path: Path) -> Features:
  """Features of MobileNetV2 with the weights of a torchvision file.

  Raises:
    ValueError: the file holds something else.
    OSError: it cannot be read.
  """
  return Features("mobilenet", mobilenet.load(path), mobilenet.features)


def inception_v3(path: Path, levels: int | None = None) -> Features:
  """Features of the FID's Inception-v3 with the weights of pytorch-fid's file, which the user supplies.

  Args:
    path: of pt_inception-2015-12-05-6726825d.pth.
    levels: of integers k. They come here as the centres of their cells and enter the network as 2 k / (levels - 1) - 1,
      as in that project, black at -1 and white at 1; None takes images as they are.

  Raises:
    ValueError: the file holds something else.
    OSError: it cannot be read.
  """
  stretch = 1.0 if levels is None else levels / (levels - 1)
  return Features("inception", inception.load(path), lambda params, x: inception.features(params, stretch * x))


def cnn(x: Shaped[np.ndarray, "n h w c"], label: Int[np.ndarray, " n"], levels: int | None, seed: int) -> Features:
  """Features of a classifier trained on these images.

  Args:
    x: integers 0..levels-1, or numbers in [-1, 1].
    label: their classes, 0..classes-1.
    levels: how many levels the integers have; None for numbers.
    seed: of the training.
  """
  params = classifier.fit(np.asarray(to_values(x, levels)), label, seed)
  model = classifier.Classifier(int(label.max()) + 1)
  return Features("cnn", jax.device_get(params), lambda params, x: model.apply(params, x)[0])


def choose(kind: str, data: Mapping[str, np.ndarray], levels: int | None, seed: int, weights: str | None) -> Features:
  """The features of this name.

  Args:
    kind: of `KINDS`; "auto" takes `cnn` for images with labels and `raw` for other data.
    data: the training data, `x [n, *d]` and, where known, `label [n]`.
    levels: of integer x.
    seed: of the classifier.
    weights: the path of the file for `mobilenet` and `inception`.

  Raises:
    ValueError: the data do not fit the features, or the file is missing or wrong.
  """
  classified = data["x"].ndim == 4 and "label" in data and int(data["label"].min()) >= 0
  if kind == "auto":
    kind = "cnn" if classified else "raw"
  if kind == "raw":
    return raw()
  if kind == "cnn":
    if not classified:
      raise ValueError("features 'cnn' are those of a classifier and need images [h, w, c] with labels: take 'raw'")
    return cnn(data["x"], data["label"], levels, seed)
  file, colours = _FILES[kind]
  if weights is None:
    raise ValueError(f"features {kind!r} need weights, the path of {file}")
  if data["x"].ndim != 4 or data["x"].shape[-1] not in colours:
    wanted = " or ".join(map(str, colours))
    raise ValueError(f"features {kind!r} are of images [h, w, {wanted}]; the data have shape {data['x'].shape[1:]}")
  path = Path(weights).expanduser()
  return mobilenet_v2(path) if kind == "mobilenet" else inception_v3(path, levels)


def to_values(x: Shaped[np.ndarray | Array, "n *d"], levels: int | None) -> Float[Array, "n *d"]:
  """Integers at the centres of their cells of [-1, 1], as samples are rounded to them; numbers as they are."""
  x = jax.numpy.asarray(x)
  return x if levels is None else decoders.integer_values(x, levels)


def to_levels(x: Float[np.ndarray, "n *d"], levels: int | None) -> Shaped[np.ndarray, "n *d"]:
  """Samples as their data are: in [-1, 1] rounded to the level in whose cell they lie; continuous ones as they are.

  Example:
    >>> to_levels(np.array([[-1.2, -0.1, 0.1, 1.0]]), levels=2).tolist()
    [[0, 0, 1, 1]]
  """
  if levels is None:
    return x
  return np.clip(np.floor((x + 1) * (levels / 2)), 0, levels - 1).astype(np.min_scalar_type(levels - 1))


def extractor(
  features: Features, levels: int | None, batch_size: int, mesh: Mesh, folder: Path
) -> Callable[[str, Shaped[np.ndarray, "n *d"], str], Float[np.ndarray, "n f"]]:
  """What takes the features of many examples, in batches sharded over the devices, and keeps every finished batch.

  Args:
    features: which.
    levels: of integer examples; None for numbers.
    batch_size: examples at a time, divisible by the number of devices.
    mesh: the devices.
    folder: where finished batches are kept.

  Returns:
    `(name, x [n, *d], identity) -> features [n, f]`: batches kept under this name are used again if they belong to the
    same examples, of this identity, and the same features.
  """
  one_batch = lambda params, x: features.apply(params, to_values(x, levels))
  run = jax.jit(parallel.shard_examples(one_batch, mesh))
  params = parallel.replicate(mesh, features.params)
  used = identify(features.params, name=features.name, levels=levels)

  def extract(name: str, x: np.ndarray, identity: str) -> np.ndarray:
    def batch(start: int) -> dict[str, Any]:
      rows = x[np.minimum(start + np.arange(batch_size), len(x) - 1)]
      return {"features": jax.device_get(run(params, parallel.shard_batch(mesh, rows)))}

    kept = identify((), features=used, examples=identity)
    return in_chunks(folder, f"{name}-{features.name}", kept, len(x), batch_size, batch)["features"]

  return extract
