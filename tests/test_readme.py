"""The program of the README runs as it stands there, with fewer steps and smaller networks."""

import pathlib
import re

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.standard_promotion
README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


SMALLER = {
  "make_moons(4096": "make_moons(64",
  "MLP(width=128, depth=3": "MLP(width=16, depth=1",
  "jax.random.key(1), 500)": "jax.random.key(1), 2)",
  "(500, 2)": "(4, 2)",
  "jax.random.key(7), 0, 500": "jax.random.key(7), 0, 4",
  "x[:500]": "x[:4]",
  "draws=64": "draws=2",
  "x[:64]": "x[:4]",
  "(10, 2)": "(4, 2)",
  "np.asarray(x)), 256": "np.asarray(x)), 64",
  "total_steps=500": "total_steps=2",
  "UNet(channels=16,": "UNet(channels=8, channel_multipliers=(1,), groups=4, blocks=1,",
  '"channel_multipliers": (1, 2)': '"channel_multipliers": (1,)',
  "jnp.zeros((2, 8, 8, 1), jnp.uint8)": "jnp.zeros((2, 4, 4, 1), jnp.uint8)",
  "jax.random.key(14), jnp.zeros((2, 8, 8, 1))": "jax.random.key(14), jnp.zeros((2, 4, 4, 1))",
  "latent_net = UNet(channels=8, channel_multipliers=(1,), groups=4, blocks=1)": "latent_net = MLP(width=8, depth=1)",
}


def program(folder) -> str:
  """The blocks as one program, with fewer steps, fewer examples and smaller networks."""
  text = "\n".join(BLOCKS)
  for old, new in {**SMALLER, "runs/moons": str(folder)}.items():
    assert old in text, old
    text = text.replace(old, new)
  assert "500" not in text
  return text


def test_the_program_of_the_readme_runs(capsys, tmp_path):
  names = {}
  exec(compile(program(tmp_path), "README.md", "exec"), names)
  assert capsys.readouterr().out.startswith("(4, 2) ")
  assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(names["gradient"]["interior"]))
  assert np.all(np.isfinite(names["nats"]))
  assert callable(names["bits"])
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(names["likelihood_gradient"]))
  assert np.all(names["points"].status.code == 0)
  assert int(names["state"].step) == 2
  assert np.all(np.isfinite(names["value"]))
  assert names["aux"]["dropped"].shape == (2,)
  assert names["sample"].nfe.tolist() == [40, 40]
  assert 20 < names["partly"].nfe[0] < 40
  known = np.asarray(names["hidden"]) == 1
  assert np.all(np.asarray(names["restored"].x)[:, known] == 0)
  assert np.all(np.isfinite(names["restored"].x))
  assert names["edited"].nfe[0] == 12 * 2
  in_bits = names["in_bits"]
  np.testing.assert_allclose(in_bits.value, in_bits.reconstruction + in_bits.prior - in_bits.entropy, rtol=1e-5)
  assert names["positions"].shape == (8, 2)


def test_every_file_that_the_readme_names_exists():
  root = pathlib.Path(__file__).parents[1]
  for path in re.findall(r"\]\(([\w/.]+)\)", README):
    assert (root / path).exists(), path
