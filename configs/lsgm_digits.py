"""Digits, 8x8: autoencoder and diffusion of its latents trained together, by the bound on the likelihood (LSGM).

jaxdiff train --config=configs/lsgm_digits.py --workdir=runs/lsgm_digits
jaxdiff sample --workdir=runs/lsgm_digits
jaxdiff likelihood --workdir=runs/lsgm_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.autoencoder = ConfigDict(
    {
      "network": {
        "type": "AutoencoderKL",
        "channels": 16,
        "channel_multipliers": (1, 2),
        "blocks": 1,
        "latent_channels": 4,
        "groups": 8,
        "attention": False,
      },
      "loss": {"type": "vae", "observation": "categorical"},
    }
  )
  config.sde = ConfigDict({"type": "VP", "beta_min": 0.1, "beta_max": 20.0})
  config.prediction = ConfigDict({"type": "mixed_noise"})
  config.loss = ConfigDict({"type": "lsgm", "time": {"type": "importance"}})
  config.network = ConfigDict(
    {"type": "UNet", "channels": 32, "channel_multipliers": (1, 2), "blocks": 1, "max_frequency": 10.0}
  )
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 800,
      "ema_decay": 0.998,
      "log_every": 25,
      "checkpoint_every": 400,
      "sample_every": 400,
      "validate_every": 100,
      "validate_examples": 360,
    }
  )
  config.sampler = ConfigDict({"type": "dpm_solver_pp", "grid": {"steps": 20, "kind": "log_snr"}, "denoise": True})
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
