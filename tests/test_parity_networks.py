"""Networks of diffusers with random weights, through safetensors, against the same weights in ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from jaxdiff import weights  # noqa: E402
from jaxdiff.weights import files  # noqa: E402

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


def old_names(tensors):
  """As the first published files name the layers of attention."""
  words = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
  for new, old in words.items():
    tensors = {name.replace(new, old): value for name, value in tensors.items()}
  return tensors


@pytest.mark.parametrize("layout", ["old_names", "pipeline", "file", "shards", "half"])
def test_layouts_on_disk(layout, tmp_path):
  model = random_weights(diffusers.UNet2DModel(**SMALL))
  path = tmp_path
  model.save_pretrained(tmp_path)
  expected = weights.load(tmp_path).params
  if layout == "old_names":
    files.write(tmp_path / files.NAME, old_names(files.read(tmp_path / files.NAME)))
  elif layout == "pipeline":
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(prediction_type="v_prediction")).save_pretrained(
      tmp_path / "p"
    )
    path = tmp_path / "p"
  elif layout == "file":
    path = tmp_path / files.NAME
  elif layout == "shards":
    path = tmp_path / "shards"
    model.save_pretrained(path, max_shard_size="50KB")
    assert not (path / files.NAME).exists()
  else:
    path = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(path)
    rounded = lambda x: jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)
    layer = ("params", "Conv_0", "kernel")
    assert (
      weights.load(path).params[layer[0]][layer[1]][layer[2]] == rounded(expected["params"]["Conv_0"]["kernel"])
    ).all()
    return
  loaded = weights.load(path)
  assert loaded.chain.prediction == ("velocity" if layout == "pipeline" else "noise")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)


@pytest.mark.parametrize("config", [{"patch_size": 2, "out_channels": 8}, {"patch_size": 4, "num_layers": 1}])
def test_dit(config, tmp_path):
  small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8}
  model = random_weights(diffusers.DiTTransformer2DModel(**(small | {"num_embeds_ada_norm": 5} | config)))
  with torch.no_grad():
    for block in model.transformer_blocks[1:]:
      block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
  model.save_pretrained(tmp_path)
  published = weights.load(tmp_path)
  x, steps, label = images(published.shape), np.array([0, 357, 999]), np.array([0, 4, 5], np.int32)
  with torch.no_grad():
    theirs = model(
      torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(steps), torch.tensor(label, dtype=torch.int64)
    ).sample
  t = jnp.asarray((steps + 1) / 1000, jnp.float32)
  ours = jax.jit(published.network.apply)(published.params, x, t, label=label)
  close(ours, theirs, f"DiTTransformer2DModel {config}")
  assert published.classes == 5


def test_dit_whose_blocks_have_other_embeddings_is_refused(tmp_path):
  model = diffusers.DiTTransformer2DModel(2, 12, num_layers=2, sample_size=8, num_embeds_ada_norm=5)
  random_weights(model).save_pretrained(tmp_path)
  with pytest.raises(weights.WeightsError, match=r"1.norm1.emb.class_embedder.embedding_table.weight is not equal"):
    weights.load(tmp_path)


@pytest.mark.parametrize("levels", [(8,), (8, 8, 16)])
def test_autoencoder(levels, tmp_path):
  kinds = {
    "down_block_types": ("DownEncoderBlock2D",) * len(levels),
    "up_block_types": ("UpDecoderBlock2D",) * len(levels),
  }
  sizes = {"block_out_channels": levels, "layers_per_block": 2, "norm_num_groups": 4, "sample_size": 8}
  model = random_weights(diffusers.AutoencoderKL(**kinds, **sizes, latent_channels=2, scaling_factor=0.5))
  model.save_pretrained(tmp_path)
  published = weights.load(tmp_path)
  x = images(published.shape)
  apply = jax.jit(published.network.apply, static_argnames="method")
  with torch.no_grad():
    posterior = model.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
    decoded = model.decode(posterior.mean).sample
  mean, log_variance = apply(published.params, x, method="encode")
  close(mean, 0.5 * posterior.mean, f"AutoencoderKL {levels}, mean")
  close(log_variance, posterior.logvar + 2 * np.log(0.5), f"AutoencoderKL {levels}, log-variance")
  close(apply(published.params, mean, method="decode"), decoded, f"AutoencoderKL {levels}, decoded")
