"""Training: state, step, optimizer, checkpoints and the loop; one user of the library among others."""

from jaxdiff.training.checkpoint import Checkpoints, FingerprintError, load_fingerprint, load_params
from jaxdiff.training.codebook import moving_average
from jaxdiff.training.loop import DivergedError, Hook, NonFiniteError, train
from jaxdiff.training.optimizer import make_optimizer
from jaxdiff.training.snapshots import Snapshots, reconstruct
from jaxdiff.training.state import TrainState, abstract_state, init_state
from jaxdiff.training.step import make_train_step
from jaxdiff.training.storage import CheckpointError, SaveError

__all__ = [
  "CheckpointError",
  "Checkpoints",
  "DivergedError",
  "FingerprintError",
  "Hook",
  "NonFiniteError",
  "SaveError",
  "Snapshots",
  "TrainState",
  "abstract_state",
  "init_state",
  "load_fingerprint",
  "load_params",
  "make_optimizer",
  "make_train_step",
  "moving_average",
  "reconstruct",
  "train",
]
