"""Digits, 8x8: a denoising diffusion GAN of four steps.

jaxdiff train --config=configs/ddgan_digits.py --workdir=runs/ddgan_digits
jaxdiff sample --workdir=runs/ddgan_digits
jaxdiff evaluate --workdir=runs/ddgan_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict({"type": "DDPM", "steps": 4, "schedule": "vp"})
  config.prediction = ConfigDict({"type": "data"})
  config.loss = ConfigDict({"type": "denoising_gan", "latent_dim": 16, "r1": 0.05, "r1_every": 16})
  config.network = ConfigDict({"type": "UNet", "channels": 16, "channel_multipliers": (1, 2), "blocks": 1})
  config.discriminator = ConfigDict({"type": "StepDiscriminator", "channels": 32, "channel_multipliers": (1, 2, 4)})
  config.optimizer = ConfigDict({"learning_rate": 1e-3, "warmup_steps": 100, "b1": 0.0, "b2": 0.9, "clip_norm": None})
  config.discriminator_optimizer = ConfigDict(
    {"learning_rate": 2e-3, "warmup_steps": 100, "b1": 0.0, "b2": 0.9, "clip_norm": None}
  )
  config.train = ConfigDict(
    {
      "batch_size": 64,
      "steps": 5000,
      "ema_decay": 0.998,
      "log_every": 25,
      "checkpoint_every": 500,
      "sample_every": 500,
    }
  )
  config.sampler = ConfigDict({"type": "denoising_gan"})
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "seed": 0})
  config.evaluate = ConfigDict({"num": 1000, "batch_size": 250})
  return config
