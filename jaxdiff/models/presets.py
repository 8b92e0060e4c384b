"""U-Nets of the literature, to the layer. Change what you like by `.clone(...)`: dtype, remat, dropout, frequencies.

| preset | network | parameters | published |
|---|---|---|---|
| `ddpm_cifar10` | DDPM, CIFAR-10 | 35,746,307 | 35.7M |
| `ddpm_256` | DDPM, CelebA-HQ and LSUN 256x256 | 113,673,219 | 114M |
| `ddpmpp_cifar10` | DDPM++ (cont.), CIFAR-10 | 61,804,419 | not in the paper |
| `ncsnpp_cifar10` | NCSN++ (cont.), CIFAR-10 | 62,758,915, with 128 frequencies not trained | not in the paper |
| `adm_imagenet64` | ADM, ImageNet 64x64, with labels and variances | 295,904,454 | 296M |

Published: Ho et al. 2020, Appendix B; Dhariwal and Nichol 2021, Appendix I. The networks of Song et al. 2021 are those
of the configuration files published with it, vp/cifar10_ddpmpp_continuous and ve/cifar10_ncsnpp_continuous; the "deep"
ones have 8 blocks. Initial values are those of flax, not of the papers, but for the zeros.
"""

from jaxdiff.models.conditioning import Label
from jaxdiff.models.unet import UNet


def ddpm_cifar10() -> UNet:
  """The network of DDPM for CIFAR-10, 32x32 (Ho et al. 2020, Appendix B), for times in [0, 1].

  Example:
    >>> net = ddpm_cifar10()
    >>> net.channels
    128
  """
  return UNet(
    channels=128,
    channel_multipliers=(1, 2, 2, 2),
    blocks=2,
    attention_levels=(1,),
    groups=32,
    dropout=0.1,
    modulation="add",
    all_biases=True,
    resampling="conv",
  )


def ddpm_256() -> UNet:
  """The network of DDPM for CelebA-HQ and LSUN, 256x256 (Ho et al. 2020, Appendix B), for times in [0, 1]."""
  return ddpm_cifar10().clone(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,), dropout=0.0)


def ddpmpp_cifar10() -> UNet:
  """DDPM++ (cont.) for CIFAR-10, 32x32 (Song et al. 2021, Appendix H), for times in [0, 1]."""
  return UNet(
    channels=128,
    channel_multipliers=(1, 2, 2, 2),
    blocks=4,
    attention_levels=(1,),
    up_attention="level",
    groups=32,
    dropout=0.1,
    max_frequency=999.0,
    min_frequency=0.0999,
    modulation="add",
    all_biases=True,
    resample_in_blocks=True,
    project_resampled=True,
    skip_rescale=True,
  )


def ncsnpp_cifar10() -> UNet:
  """NCSN++ (cont.) for CIFAR-10, 32x32 (Song et al. 2021, Appendix H), for the time log(sigma) / 4.

  That time is what predictions with `log_snr_time` give the network under VE. The random frequencies have the scale of
  64 cycles per unit of it, 16 per unit of log(sigma).
  """
  return ddpmpp_cifar10().clone(
    resampling="fir",
    progressive_input="residual",
    time_embedding="fourier",
    time_features=256,
    fourier_scale=64.0,
  )


def adm_imagenet64(classes: int = 1000) -> UNet:
  """ADM for ImageNet 64x64 with learned variances (Dhariwal and Nichol 2021, Appendix I), for times in [0, 1].

  Args:
    classes: of the labels, without one for none; 0 for a network without labels.
  """
  return UNet(
    channels=192,
    channel_multipliers=(1, 2, 3, 4),
    blocks=3,
    attention_levels=(1, 2, 3),
    head_channels=64,
    groups=32,
    dropout=0.1,
    min_frequency=1000.0 * 1e4 ** (-95 / 96),
    modulation="scale_shift",
    all_biases=True,
    norm_epsilon=1e-5,
    resample_in_blocks=True,
    parts=2,
    conditions={"label": Label(classes, droppable=False)} if classes else {},
  )
