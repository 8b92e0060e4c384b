"""scikit-learn's handwritten digits, 8x8: a classifier of noised images for classifier guidance, on VP.

jaxdiff train --config=configs/digits_classifier.py --workdir=runs/digits_classifier
jaxdiff evaluate --workdir=runs/digits_classifier

Measured on 2 CPU cores that other work shared (4 minutes for the 1500 steps, 7.5 steps/s): how often it is right on the
360 held-out digits, and its cross-entropy in nats, where guessing gives 0.10 and 2.30.

    log-SNR    10.4    4.3    2.2    0.2   -1.9   -3.9   -6.0
    accuracy   0.99   0.99   0.98   0.80   0.33   0.16   0.11
    nats       0.02   0.03   0.05   0.60   1.87   2.24   2.30

What it guides is measured in experiments/guidance.
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
