"""Classification of noised data: train p(y | x_t, t), whose gradient guides samples to a class.

    x_t = alpha_t x_0 + sigma_t eps,   loss = -log p(y | x_t, t),   t in [t0, t1]

Its minimum is the conditional entropy of the label given x_t, averaged over the times, at the posterior
p(y | x_t) = p(y) p_t(x_t | y) / p_t(x_t), whose gradient is what the score of class y has beyond the score of all:

    grad_x log p_t(x | y) = grad_x log p_t(x) + grad_x log p(y | x, t)

References:
  Song et al. 2021, Score-Based Generative Modeling through SDEs, eq. 14; Dhariwal and Nichol 2021, Diffusion Models
  Beat GANs on Image Synthesis, Section 4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jaxdiff import checks, keys
from jaxdiff.losses import times
from jaxdiff.losses.score_matching import Loss
from jaxdiff.schedules import TRAINING_NOISE_TO_SIGNAL, start_time
from jaxdiff.sde import ScalarSDE, perturb
from jaxdiff.typing import NO_COND, Cond, Keys, Scalar, State


def classification(sde: ScalarSDE, time: times.Times = times.uniform(), t0: Scalar | None = None) -> Loss:
  """The cross-entropy of a classifier of data noised by a process.

  The classifier sees x_t as it is: for a process whose noise grows it should scale its input by itself.

  Args:
    sde: a process with scalar marginals.
    time: `times.uniform()`, `importance()`, `log_normal()` or `fixed(t)`.
    t0: smallest time; None for the time at which sigma / alpha = 1e-3.

  Returns:
    loss(key, x0, classifier, cond, u=None) -> (nats [b], aux). `classifier` is (x, t, **cond) -> logits [b, classes];
    cond["label"], integers [b] from 0, is not told to it, whatever else is in cond is. A label beyond the classes gives
    NaN. `key` and `u` as in `denoising`. aux: "accuracy", 1 where the largest logit is that of the label, else 0; "t".

  Raises:
    ValueError: for a t0 outside [0, t1); when called, for cond without labels, labels or logits of another shape.
    TypeError: for a factory given where what it makes is due; when called, for labels that are no integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.classification(jd.VP())
    >>> undecided = lambda x, t: jnp.zeros((len(x), 10))
    >>> nats_of = jax.jit(lambda key, x, label: loss(key, x, undecided, {"label": label}))
    >>> nats, aux = nats_of(jax.random.key(0), jnp.zeros((8, 2)), jnp.arange(8))
    >>> [round(float(value), 4) for value in nats[:2]]
    [2.3026, 2.3026]
  """
  for name, value, kind in (("sde", sde, ScalarSDE), ("time", time, times.Times)):
    checks.made(name, value, kind)
  first = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)

  def loss(
    key: Keys, x0: State, classifier: Callable[..., Array], /, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    checks.batch("x0", x0, cond, u)
    label = label_of(cond)
    noise_key, time_key = keys.split(keys.per_example(key, len(x0)))
    if u is None:
      u = times.draw(time, key, time_key, first.dtype)
    t, correction = time.place(sde, first, u.astype(first.dtype))
    x_t, _ = perturb(noise_key, x0, t, sde)
    logits = classifier(x_t, t, **{name: value for name, value in cond.items() if name != "label"})
    nats = -label_log_prob(logits.astype(t.dtype), label, x_t)
    right = (jnp.argmax(logits, axis=1).astype(label.dtype) == label).astype(t.dtype)
    return correction * nats, {"accuracy": right, "t": t}

  return loss


def label_log_prob(logits: Float[Array, "..."], label: Integer[Array, " b"], x: State) -> Float[Array, " b"]:
  """log softmax of the logits `[b, classes]` of a classifier of x at the labels, in nats.

  For labels beyond the classes it is NaN, and so is its gradient, which is all that guidance sees.

  Raises:
    ValueError: for logits of another shape.
  """
  if logits.ndim != 2 or len(logits) != len(x):
    raise ValueError(f"a classifier must return logits [b, classes] for x {x.shape}; got {logits.shape}")
  known = (label >= 0) & (label < logits.shape[1])
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(known, label, 0)[:, None], axis=1)[:, 0]
  return chosen * jnp.where(known, 1.0, jnp.nan).astype(chosen.dtype)


def label_of(cond: Cond) -> Integer[Array, " b"]:
  """cond["label"], refused unless it is integers `[b]`."""
  if "label" not in cond:
    raise ValueError(f"cond lacks 'label', integers [b], of the class; it has {sorted(cond) or 'none'}")
  label = jnp.asarray(cond["label"])
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise TypeError(f"cond['label'] must be integers [b], got {label.dtype}")
  if label.ndim != 1:
    raise ValueError(f"cond['label'] must be integers [b], got shape {label.shape}")
  return label
