"""Training super-resolution on noised small images: those that another model samples are not as good as the data.

    z_s = sqrt(1 - s^2) z + s eps,    s ~ U[0, most],    and the network is told z_s and s                           (1)

One network so learns p(x | z_s, s) for all s, and sampling chooses how much it trusts the small image.

References:
  Ho et al. 2022, Cascaded Diffusion Models for High Fidelity Image Generation, Section 3, non-truncated conditioning
  augmentation; Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models, Section 2.4, for the level as a
  condition.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff import checks, keys
from jaxdiff.losses.score_matching import Loss
from jaxdiff.sde import expand
from jaxdiff.typing import NO_COND, Cond, Keys, Network, State


def noised(key: Keys, image: State, level: Float[Array, " b"]) -> State:
  """The images noised, eq. (1), each by its own level and key."""
  noise = keys.normal(keys.per_example(key, len(image)), image.shape, image.dtype)
  return expand(jnp.sqrt((1 - level) * (1 + level)), image) * image + expand(level, image) * noise


def noised_condition(loss: Loss, image: str, level: str, most: float) -> Loss:
  """The loss of a network that is told an image noised by a random amount, and by how much, eq. (1).

  With `drop_conditions` it is the outer one: what is dropped has been noised.

  Args:
    loss: any of `jaxdiff.losses`.
    image: name of the condition `[b, ...]` that is noised, in units in which data have a deviation of about 1.
    level: name of the condition `[b]` by which the network is told s; it replaces one of this name.
    most: the largest level, in (0, 1): 0.5 hides what is finer than a few pixels.

  Returns:
    loss(key, x0, network, cond, u=None) -> ([b], aux), with aux "level": s of each example, from its own key.

  Raises:
    ValueError: for `most` outside (0, 1), one name for both; when called, for cond without the image.
    TypeError: for a factory given as loss; when called, for an image of integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> inner = jd.losses.denoising(jd.VP(), jd.predictions.noise())
    >>> loss = jd.losses.noised_condition(inner, "small", "level", most=0.5)
    >>> network = jax.tree_util.Partial(lambda x, t, small, level: x * level[:, None, None, None])
    >>> x, small = jnp.zeros((2, 8, 8, 1)), jnp.zeros((2, 4, 4, 1))
    >>> value, aux = jax.jit(loss)(jax.random.key(0), x, network, {"small": small})
    >>> value.shape, bool(jnp.all(aux["level"] < 0.5))
    ((2,), True)
  """
  checks.made("loss", loss)
  if not 0 < most < 1:
    raise ValueError(f"most must lie in (0, 1), the largest level of noise; got {most}")
  if image == level:
    raise ValueError(f"image and level must be the names of two conditions, got {image!r} for both")

  def noising(
    key: Keys, x0: Array, network: Network, /, cond: Cond = NO_COND, u: Float[Array, " b"] | None = None
  ) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    keys.check(key)
    if image not in cond:
      raise ValueError(f"cond lacks {image!r}, the image that is to be noised; it has {sorted(cond)}")
    value = cond[image]
    checks.batch(f"cond[{image!r}]", value)
    noise_key, loss_key = jax.random.split(key) if key.ndim == 0 else keys.split(key)
    level_key, image_key = keys.split(keys.per_example(noise_key, len(x0)))
    s = most * keys.uniform(level_key, (len(x0),), value.dtype)
    told = {**cond, image: noised(image_key, value, s), level: s}
    per_example, aux = loss(loss_key, x0, network, told, u)
    return per_example, {**aux, "level": s}

  return noising
