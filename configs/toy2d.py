"""Two moons in the plane: an MLP on VP; seconds to train, exact trace for the likelihood.

    jaxdiff train --config=configs/toy2d.py --workdir=runs/toy2d
    jaxdiff sample --workdir=runs/toy2d
    jaxdiff likelihood --workdir=runs/toy2d

Other shapes: --config.data.name=circles, swiss_roll or mixture.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "toy2d", "name": "moons", "size": 10_000, "noise": 0.05, "seed": 0})
  config.sde = ConfigDict({"type": "VP", "beta_min": 0.1, "beta_max": 20.0})
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 1.0})
  config.loss = ConfigDict({"type": "denoising", "weight": {"type": "likelihood"}, "time": {"type": "importance"}})
  config.network = ConfigDict({"type": "MLP", "width": 128, "depth": 3, "max_frequency": 10.0})
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100, "clip_norm": 1.0})
  config.train = ConfigDict(
    {
      "batch_size": 512,
      "steps": 3000,
      "ema_decay": 0.998,
      "random_flip": False,
      "log_every": 25,
      "checkpoint_every": 1000,
      "keep": 3,
    }
  )
  config.sampler = ConfigDict({"type": "probability_flow", "rtol": 1e-4, "atol": 1e-4})
  config.sample = ConfigDict({"num": 2000, "batch_size": 1000, "trajectories": 6, "seed": 0})
  config.likelihood = ConfigDict(
    {
      "divergence": {"type": "exact"},
      "rtol": 1e-4,
      "atol": 1e-4,
      "split": "test",
      "limit": 2000,
      "batch_size": 1000,
      "seed": 0,
    }
  )
  return config
