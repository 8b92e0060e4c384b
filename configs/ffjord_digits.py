"""A continuous normalizing flow (FFJORD) of the digits: an MLP is the vector field, trained by maximum likelihood.

jaxdiff train --config=configs/ffjord_digits.py --workdir=runs/ffjord_digits
jaxdiff sample --workdir=runs/ffjord_digits
jaxdiff likelihood --workdir=runs/ffjord_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict({"type": "CNF", "t1": 1.0})
  config.prediction = ConfigDict({"type": "vector_field"})
  config.loss = ConfigDict(
    {
      "type": "ffjord",
      "divergence": {"type": "hutchinson", "probes": 1},
      "solver": "tsit5",
      "rtol": 1e-3,
      "atol": 1e-3,
      "max_steps": 256,
      "kinetic": 0.01,
      "jacobian": 0.001,
    }
  )
  config.network = ConfigDict({"type": "MLP", "width": 256, "depth": 3, "max_frequency": 10.0})
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100, "clip_norm": 100.0})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 3000,
      "ema_decay": 0.99,
      "random_flip": False,
      "log_every": 25,
      "checkpoint_every": 100,
      "keep": 3,
    }
  )
  config.sampler = ConfigDict({"type": "cnf", "rtol": 1e-4, "atol": 1e-4})
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "trajectories": 6, "seed": 0})
  config.likelihood = ConfigDict(
    {
      "divergence": {"type": "exact"},
      "rtol": 1e-3,
      "atol": 1e-3,
      "split": "test",
      "limit": 0,
      "batch_size": 60,
      "seed": 0,
    }
  )
  return config
