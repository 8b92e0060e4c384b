"""Digits, 8x8: a variational autoencoder with categorical observations, latents 4 x 4 x 4.

jaxdiff train --config=configs/vae_digits.py --workdir=runs/vae_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.network = ConfigDict(
    {
      "type": "AutoencoderKL",
      "channels": 16,
      "channel_multipliers": (1, 2),
      "blocks": 1,
      "latent_channels": 4,
      "groups": 8,
      "attention": False,
    }
  )
  config.loss = ConfigDict({"type": "vae", "observation": "categorical", "beta": 1.0})
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 1000,
      "ema_decay": 0.998,
      "log_every": 25,
      "checkpoint_every": 300,
      "sample_every": 300,
      "validate_every": 100,
      "validate_examples": 360,
    }
  )
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "seed": 0})
  config.likelihood = ConfigDict({"split": "test", "batch_size": 120, "draws": 16, "importance": True, "seed": 0})
  return config
