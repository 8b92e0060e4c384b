"""ImageNet at 64x64 RGB: the U-Net of ADM (Dhariwal and Nichol 2021) on a cosine schedule, without classes.

    python -c "import tensorflow_datasets as tfds; tfds.builder('imagenet_resized/64x64', data_dir='DIR',
      file_format='array_record').download_and_prepare()"
    jaxdiff train --config=configs/imagenet64.py --workdir=runs/imagenet64 --config.data.data_dir=DIR
    jaxdiff sample --workdir=runs/imagenet64

The first command needs TensorFlow, the others do not. The network, that of `models.presets.adm_imagenet64`, Adam at
3e-4, batches of 2048 and 540,000 steps are those of ADM, Appendix I; but it predicts no variances and knows no classes,
which leaves 295.1 of 295.9 million parameters. It computes in bfloat16. Meant for a TPU pod or several nodes of GPUs.
No result is measured yet. For bits/dim as published on "ImageNet 64x64" take the other reduction of the images,
--config.data.name=downsampled_imagenet/64x64.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "tfds", "name": "imagenet_resized/64x64", "data_dir": None})
  config.sde = ConfigDict({"type": "CosineVP"})
  config.prediction = ConfigDict({"type": "edm", "sigma_data": 0.5})
  config.loss = ConfigDict({"type": "denoising", "weight": {"type": "noise"}, "time": {"type": "uniform"}})
  config.network = ConfigDict(
    {
      "type": "UNet",
      "channels": 192,
      "channel_multipliers": (1, 2, 3, 4),
      "blocks": 3,
      "attention_levels": (1, 2, 3),
      "head_channels": 64,
      "groups": 32,
      "dropout": 0.1,
      "max_frequency": 10.0,
      "modulation": "scale_shift",
      "all_biases": True,
      "norm_epsilon": 1e-5,
      "resample_in_blocks": True,
      "dtype": "bfloat16",
    }
  )
  config.optimizer = ConfigDict(
    {
      "learning_rate": 3e-4,
      "warmup_steps": 5000,
      "clip_norm": 1.0,
      "schedule": "constant",
    }
  )
  config.train = ConfigDict(
    {
      "batch_size": 2048,
      "steps": 540_000,
      "ema_decay": 0.9999,
      "random_flip": True,
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
      "split": "validation",
      "limit": 5000,
      "batch_size": 40,
      "seed": 0,
    }
  )
  config.evaluate = ConfigDict({"num": 50_000, "batch_size": 200, "split": "validation", "seed": 0})
  return config
