"""Fashion-MNIST, 28x28 grey: a classifier of noised images for classifier guidance, on VP. For two CPU cores.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb raw
    jaxdiff data fashion_mnist --input=raw --output=data/fashion_mnist
    jaxdiff train --config=configs/fashion_mnist_classifier.py --workdir=runs/fashion_mnist_classifier
    jaxdiff evaluate --workdir=runs/fashion_mnist_classifier

Data elsewhere: --config.data.path=DIR.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict({"type": "array_record", "path": "data/fashion_mnist"})
  config.sde = ConfigDict(
    {
      "type": "VP",
      "beta_min": 0.1,
      "beta_max": 20.0,
    }
  )
  config.prediction = ConfigDict({"type": "classes"})
  config.loss = ConfigDict({"type": "classification"})
  config.network = ConfigDict(
    {
      "type": "Classifier",
      "classes": 10,
      "channels": 16,
      "channel_multipliers": (1, 2, 4),
      "blocks": 1,
      "heads": 4,
    }
  )
  config.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup_steps": 100})
  config.train = ConfigDict(
    {
      "batch_size": 64,
      "steps": 1500,
      "ema_decay": 0.99,
      "random_flip": True,
      "log_every": 50,
      "checkpoint_every": 500,
      "validate_every": 500,
    }
  )
  config.evaluate = ConfigDict({"num": 0, "batch_size": 500, "split": "test", "seed": 0})
  return config
