"""Colorization: the 3786 emoji of Noto at 32x32, given their brightness. For two CPU cores.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    jaxdiff data emoji --input=package --output=data/emoji32 --size=32
    jaxdiff train --config=configs/emoji32_colorization.py --workdir=runs/emoji_color
    jaxdiff sample --workdir=runs/emoji_color

An emoji and its skin tones are all in one split, so the test set is new to the model; sample k is given what belongs
to test image k. What was measured is in experiments/conditioning.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "array_record", "path": "data/emoji32"})
  config.sde = ConfigDict({"type": "VP", "beta_min": 0.1, "beta_max": 20.0})
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 0.7})
  config.loss = ConfigDict(
    {
      "type": "denoising",
      "weight": {"type": "edm", "sigma_data": 0.7},
      "time": {"type": "log_normal", "mean": 0.2, "std": 1.3},
    }
  )
  config.network = ConfigDict(
    {
      "type": "UNet",
      "channels": 16,
      "channel_multipliers": (1, 2, 4),
      "blocks": 1,
      "max_frequency": 10.0,
      "conditions": {"grey": {"type": "greyscale"}},
    }
  )
  config.optimizer = ConfigDict({"algorithm": "muon", "learning_rate": 4e-3, "warmup_steps": 50, "b2": 0.99})
  config.train = ConfigDict(
    {
      "batch_size": 16,
      "steps": 1200,
      "ema_decay": 0.995,
      "random_flip": False,
      "log_every": 25,
      "checkpoint_every": 300,
      "keep": 3,
    }
  )
  config.sampler = ConfigDict({"type": "dpm_solver_pp", "grid": {"steps": 30, "kind": "log_snr"}})
  config.sample = ConfigDict({"num": 64, "batch_size": 64, "trajectories": 6, "seed": 0})
  config.likelihood = ConfigDict(
    {
      "divergence": {"type": "hutchinson", "probes": 1},
      "rtol": 1e-5,
      "atol": 1e-5,
      "split": "test",
      "limit": 0,
      "batch_size": 40,
      "seed": 0,
    }
  )
  config.evaluate = ConfigDict({"num": 400, "batch_size": 40, "split": "test", "seed": 0})
  return config
