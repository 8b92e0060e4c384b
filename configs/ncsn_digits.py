"""A noise-conditional score network (NCSN) of the digits: geometric noise levels, each weighted by sigma^2.

jaxdiff train --config=configs/ncsn_digits.py --workdir=runs/ncsn_digits
jaxdiff sample --workdir=runs/ncsn_digits
jaxdiff likelihood --workdir=runs/ncsn_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict({"type": "NCSN", "levels": 100, "sigma_min": 0.01, "sigma_max": 20.0})
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 0.65})
  config.loss = ConfigDict({"type": "ncsn"})
  config.network = ConfigDict(
    {"type": "UNet", "channels": 32, "channel_multipliers": (1, 2), "blocks": 1, "max_frequency": 10.0}
  )
  config.optimizer = ConfigDict({"algorithm": "muon", "learning_rate": 8e-3, "warmup_steps": 100, "b2": 0.99})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 1200,
      "ema_decay": 0.998,
      "random_flip": False,
      "log_every": 25,
      "checkpoint_every": 400,
      "keep": 3,
    }
  )
  config.sampler = ConfigDict({"type": "reverse_sde", "grid": {"steps": 300, "kind": "log_snr"}})
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "trajectories": 6, "seed": 0})
  config.likelihood = ConfigDict(
    {
      "divergence": {"type": "hutchinson", "probes": 1},
      "rtol": 1e-4,
      "atol": 1e-4,
      "split": "test",
      "limit": 0,
      "bound_draws": 32,
      "batch_size": 120,
      "seed": 0,
    }
  )
  return config
