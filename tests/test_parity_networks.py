"""Networks of diffusers with random weights, through safetensors, against the same weights in ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from jaxdiff import weights  # noqa: E402

pytestmark = pytest.mark.slow
CIFAR10 = {
  "sample_size": 32,
  "block_out_channels": (128, 256, 256, 256),
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
  "layers_per_block": 2,
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
  "attention_head_dim": None,
  "norm_eps": 1e-6,
  "norm_num_groups": 32,
}
SMALL = {
  "sample_size": 8,
  "block_out_channels": (16, 32),
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
  "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
  "layers_per_block": 1,
  "norm_num_groups": 4,
}
BY_BLOCKS = {
  "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
  "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
  "downsample_type": "resnet",
  "upsample_type": "resnet",
}
UNETS = {
  "cifar10": CIFAR10,
  "small": SMALL,
  "one_channel_two_heads": SMALL | {"in_channels": 1, "out_channels": 1, "attention_head_dim": 16},
  "learned_variance": SMALL | {"out_channels": 6, "freq_shift": 1, "flip_sin_to_cos": False},
  "scale_shift": SMALL | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
  "by_blocks": SMALL | BY_BLOCKS,
  "three_levels": SMALL
  | {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "add_attention": False,
    "downsample_padding": 0,
  },
}


def random_weights(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      fan = parameter[0].numel() if parameter.ndim > 1 else 4
      parameter.add_(torch.randn_like(parameter) / fan**0.5 * 0.5)
  return model.eval()


def images(shape, seed=0):
  return np.random.default_rng(seed).standard_normal((3, *shape)).astype(np.float32)


def close(ours, theirs, name):
  ours, theirs = np.asarray(ours), theirs.permute(0, 2, 3, 1).numpy()
  error = np.abs(ours - theirs).max()
  print(f"{name}: largest difference {error:.1e}, of values up to {np.abs(theirs).max():.1f}")
  assert np.abs(theirs).max() > 0.1
  assert error < 1e-4


@pytest.mark.parametrize("name", UNETS)
def test_unet2d(name, tmp_path):
  model = random_weights(diffusers.UNet2DModel(**UNETS[name]))
  model.save_pretrained(tmp_path)
  published = weights.load(tmp_path)
  x, steps = images(published.shape), np.array([0, 357, 999])
  with torch.no_grad():
    theirs = model(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(steps)).sample
  t = jnp.asarray((steps + 1) / 1000, jnp.float32)
  close(jax.jit(published.network.apply)(published.params, x, t), theirs, f"UNet2DModel {name}")
