"""Digits, 8x8: 4 x 4 categorical latents of 32 codes, relaxed by Gumbel-softmax at a falling temperature.

jaxdiff train --config=configs/gumbel_digits.py --workdir=runs/gumbel_digits
jaxdiff likelihood --workdir=runs/gumbel_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.network = ConfigDict(
    {
      "type": "GumbelVAE",
      "channels": 16,
      "channel_multipliers": (1, 2),
      "blocks": 1,
      "codes": 32,
      "code_channels": 8,
      "groups": 8,
      "attention": False,
    }
  )
  config.loss = ConfigDict({"type": "gumbel", "observation": "categorical", "annealing_steps": 600})
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 600,
      "ema_decay": 0.998,
      "log_every": 25,
      "checkpoint_every": 300,
      "sample_every": 300,
      "validate_every": 100,
      "validate_examples": 360,
    }
  )
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "seed": 0})
  config.likelihood = ConfigDict({"split": "test", "batch_size": 120, "seed": 0})
  return config
