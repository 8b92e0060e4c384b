"""Denoising score matching over the discrete noise levels of a noise-conditional score network (NCSN)."""

from jaxdiff import ncsn as levels
from jaxdiff import predictions
from jaxdiff.losses import chain as chains
from jaxdiff.losses.score_matching import Loss
from jaxdiff.predictions import Prediction


def ncsn(chain: levels.Chain, prediction: Prediction = predictions.noise(), stratified: bool = True) -> Loss:
  """Denoising at noise levels drawn uniformly, each weighted by sigma^2.

      loss = 1/2 sigma_i^2 |s(x_0 + sigma_i eps) + eps / sigma_i|^2 = 1/2 |F - eps|^2,     s = -F / sigma_i

  summed over the dimensions: the paper's objective, up to the sign of F. The network is called as
  `network(x, t, **cond)` with t = (i - 1) / (N - 1); `chain.index(t)` is the level i, for an embedding or for weights
  of each level. Read with `score_fn(apply, params, chain.sde(), predictions.noise())` it is the score -F / sigma, the
  parametrization of NCSNv2; `predictions.score()` makes the output the score itself, as in the first paper.

  Args:
    chain: the noise levels.
    prediction: what the network outputs.
    stratified: whether the levels of a batch are spread evenly rather than drawn one by one.

  Returns:
    loss(key, x0, network, cond={}, u=None) -> (loss [b], aux), as `losses.denoising`. aux: "t" and "noise_error", the
    mean squared error of the noise per dimension.

  Raises:
    TypeError: when called, for integer data.
    ValueError: when called, for stratified levels without a batch to stratify.

  Example:
    >>> import jax, jax.numpy as jnp, jaxdiff as jd
    >>> loss = jd.losses.ncsn(jd.ncsn.Chain(jd.ncsn.geometric_sigmas(10, 0.01, 1.0)))
    >>> network = jax.tree_util.Partial(lambda x, t: jnp.zeros_like(x))
    >>> value, aux = jax.eval_shape(loss, jax.random.key(0), jnp.zeros((8, 2)), network)
    >>> value.shape
    (8,)

  References:
    Song & Ermon 2019, eq. 5 and 6, with lambda = sigma^2; Song & Ermon 2020, Technique 3, for s(x) / sigma.
  """
  chains.check_made(chain, levels.Chain, prediction)
  return chains.denoising(chain, prediction, 1, stratified)
