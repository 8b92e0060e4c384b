"""The 3786 emoji of Noto, 64x64 RGB on white: a U-Net on VP. For one GPU.

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    jaxdiff data emoji --input=package --output=data/emoji64
    jaxdiff train --config=configs/emoji64.py --workdir=runs/emoji64
    jaxdiff sample --workdir=runs/emoji64
    jaxdiff evaluate --workdir=runs/emoji64

Data elsewhere: --config.data.path=DIR. An emoji and its skin tones are all in one split, so the test set is new to the
model. The data are few: expect it to remember some of them (`evaluate` shows the nearest training examples of the
samples). Flags and clocks do not survive mirroring, so there is none. Meant for one GPU with 24 GB. No result of a
whole training is measured yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "array_record", "path": "data/emoji64"})
  config.sde = ConfigDict(
    {
      "type": "VP",
      "beta_min": 0.1,
      "beta_max": 20.0,
    }
  )
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 0.7})
  config.loss = ConfigDict({"type": "denoising", "weight": {"type": "noise"}, "time": {"type": "uniform"}})
  config.network = ConfigDict(
    {
      "type": "UNet",
      "channels": 96,
      "channel_multipliers": (1, 2, 3, 4),
      "blocks": 2,
      "attention_levels": (2, 3),
      "heads": 4,
      "dropout": 0.2,
      "max_frequency": 10.0,
    }
  )
  config.optimizer = ConfigDict(
    {
      "learning_rate": 2e-4,
      "warmup_steps": 1000,
    }
  )
  config.train = ConfigDict(
    {
      "batch_size": 64,
      "steps": 100_000,
      "ema_decay": 0.9995,
      "random_flip": False,
      "log_every": 100,
      "checkpoint_every": 2000,
      "keep": 3,
    }
  )
  config.sampler = ConfigDict({"type": "dpm_solver_pp", "grid": {"steps": 50, "kind": "log_snr"}})
  config.sample = ConfigDict({"num": 100, "batch_size": 100, "trajectories": 6, "seed": 0})
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
  config.evaluate = ConfigDict({"num": 1000, "batch_size": 40, "split": "test", "seed": 0})
  return config
