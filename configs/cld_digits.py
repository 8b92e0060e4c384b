"""Digits, 8x8: critically-damped Langevin diffusion, a U-Net that sees positions and velocities.

jaxdiff train --config=configs/cld_digits.py --workdir=runs/cld_digits
jaxdiff sample --workdir=runs/cld_digits
jaxdiff likelihood --workdir=runs/cld_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict({"type": "CLD", "beta": 4.0, "mass": 0.25, "gamma": 0.04})
  config.prediction = ConfigDict({"type": "velocity_noise", "mixed": True})
  config.loss = ConfigDict({"type": "hybrid"})
  config.network = ConfigDict(
    {"type": "UNet", "channels": 32, "channel_multipliers": (1, 2), "blocks": 1, "max_frequency": 100.0}
  )
  config.optimizer = ConfigDict({"algorithm": "muon", "learning_rate": 8e-3, "warmup_steps": 100, "b2": 0.99})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 1500,
      "ema_decay": 0.998,
      "log_every": 25,
      "checkpoint_every": 500,
      "sample_every": 500,
      "validate_every": 250,
      "validate_examples": 360,
    }
  )
  config.sampler = ConfigDict({"type": "sscs", "grid": {"steps": 100, "kind": "quadratic"}})
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "seed": 0})
  config.likelihood = ConfigDict(
    {
      "split": "test",
      "batch_size": 120,
      "divergence": {"type": "hutchinson", "probes": 1},
      "rtol": 1e-4,
      "atol": 1e-4,
      "seed": 0,
    }
  )
  return config
