"""scikit-learn's handwritten digits, 8x8: a classifier of noised images for classifier guidance, on VP.

jaxdiff train --config=configs/digits_classifier.py --workdir=runs/digits_classifier
jaxdiff evaluate --workdir=runs/digits_classifier
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "digits", "held_out": 360, "seed": 0})
  config.sde = ConfigDict({"type": "VP", "beta_min": 0.1, "beta_max": 20.0})
  config.prediction = ConfigDict({"type": "classes"})
  config.loss = ConfigDict({"type": "classification"})
  config.network = ConfigDict(
    {
      "type": "Classifier",
      "classes": 10,
      "channels": 32,
      "channel_multipliers": (1, 2),
      "blocks": 1,
      "heads": 4,
      "dropout": 0.1,
      "max_frequency": 10.0,
    }
  )
  config.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 100})
  config.train = ConfigDict(
    {
      "batch_size": 128,
      "steps": 1500,
      "ema_decay": 0.99,
      "random_flip": False,
      "log_every": 50,
      "checkpoint_every": 500,
      "validate_every": 250,
    }
  )
  config.evaluate = ConfigDict({"num": 360, "batch_size": 180, "split": "test", "seed": 0})
  return config
