"""CIFAR-10, 32x32 RGB: the U-Net and the training of DDPM (Ho et al. 2020), in continuous time, on VP.

    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10', data_dir='DIR',
      file_format='array_record').download_and_prepare()"
    jaxdiff train --config=configs/cifar10_vp.py --workdir=runs/cifar10 --config.data.data_dir=DIR
    jaxdiff sample --workdir=runs/cifar10
    jaxdiff evaluate --workdir=runs/cifar10 --config.evaluate.features=inception --config.evaluate.weights=FILE

The first command needs TensorFlow, the others do not. The network, that of `models.presets.ddpm_cifar10`, Adam at 2e-4,
batches of 128, 800,000 steps, the average and mirroring are those of DDPM, Appendix B; the preconditioning is that of
EDM (Karras et al. 2022). Meant for one GPU with 24 GB and several days. No result of a whole training is measured yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "tfds", "name": "cifar10", "data_dir": None})
  config.sde = ConfigDict(
    {
      "type": "VP",
      "beta_min": 0.1,
      "beta_max": 20.0,
    }
  )
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 0.5})
  config.loss = ConfigDict({"type": "denoising", "weight": {"type": "noise"}, "time": {"type": "uniform"}})
  config.network = ConfigDict(
    {
      "type": "UNet",
      "channels": 128,
      "channel_multipliers": (1, 2, 2, 2),
      "blocks": 2,
      "attention_levels": (1,),
      "heads": 1,
      "groups": 32,
      "dropout": 0.1,
      "max_frequency": 10.0,
      "modulation": "add",
      "all_biases": True,
      "resampling": "conv",
    }
  )
  config.optimizer = ConfigDict(
    {
      "learning_rate": 2e-4,
      "warmup_steps": 5000,
      "clip_norm": 1.0,
      "schedule": "constant",
    }
  )
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 800_000,
      "ema_decay": 0.9999,
      "random_flip": True,
      "log_every": 100,
      "checkpoint_every": 5000,
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
      "batch_size": 200,
      "seed": 0,
    }
  )
  config.evaluate = ConfigDict({"num": 50_000, "batch_size": 200, "split": "test", "seed": 0})
  return config
