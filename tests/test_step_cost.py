"""What `jaxdiff train` says that a step costs."""

import pathlib

import numpy as np

from jaxdiff import arguments
from jaxdiff.commands import training as commands
from jaxdiff.data.examples import from_arrays
from jaxdiff.training import cost

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def test_flops_do_not_count_what_rematerialization_repeats(monkeypatch):
  """The share of the peak is that of the model's FLOPs: of one step in one part, whatever the memory allows."""
  config = arguments.load(CONFIGS / "digits.py")
  network = {**config["network"], "channels": 4, "channel_multipliers": (1,), "blocks": 1, "groups": 2}
  asked = config | {"network": network | {"remat": "full"}, "train": config["train"] | {"microbatches": 4}}
  counted = []
  monkeypatch.setattr(commands, "_program", lambda config, source: (None, config))
  monkeypatch.setattr(cost, "step_flops", lambda step, *shapes: counted.append((step, shapes)) or 7.0)
  source = from_arrays(np.zeros((4, 8, 8, 1), np.uint8), levels=17)
  assert commands._flops(asked, source, {"w": np.zeros(3)}) == 7.0
  ((step, (state, batch, index)),) = counted
  assert step["network"] == network
  assert step["train"]["microbatches"] == 1
  assert (state["w"].shape, batch["x"].shape, index.shape) == ((3,), (128, 8, 8, 1), (128,))
