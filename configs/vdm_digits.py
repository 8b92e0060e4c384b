"""A variational diffusion model of the digits: integers as they are, and a noise schedule that is learned.

jaxdiff train --config=configs/vdm_digits.py --workdir=runs/vdm_digits
jaxdiff sample --workdir=runs/vdm_digits
jaxdiff likelihood --workdir=runs/vdm_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict(
    {"type": "VariancePreserving", "gamma_min": -9.0, "gamma_max": 6.0, "interior": "learned", "learn_ends": False}
  )
  config.prediction = ConfigDict({"type": "noise", "log_snr_time": True})
  config.loss = ConfigDict({"type": "vdm", "interior": "variance"})
  config.network = ConfigDict(
    {
      "type": "UNet",
      "channels": 32,
      "channel_multipliers": (1, 2),
      "blocks": 1,
      "max_frequency": 10.0,
      "fourier_levels": 17,
    }
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
      "rtol": 1e-5,
      "atol": 1e-5,
      "split": "test",
      "limit": 0,
      "bound_draws": 64,
      "batch_size": 120,
      "seed": 0,
    }
  )
  return config
