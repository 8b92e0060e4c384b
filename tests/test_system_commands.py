"""Every config of autoencoders, latents, GANs and CLD through the command line: a few steps, samples, likelihoods."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxdiff import cli, factory
from jaxdiff.training.metrics import read_metrics

pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SMALL = (
  "--config.train.batch_size=8",
  "--config.train.steps=2",
  "--config.train.log_every=1",
  "--config.train.sample_every=2",
  "--config.train.validate_every=2",
  "--config.train.validate_examples=8",
  "--config.train.checkpoint_every=2",
  "--config.optimizer.warmup_steps=1",
  "--config.sample.num=8",
  "--config.sample.batch_size=8",
)
LEAST = ("channel_multipliers=(1,)", "blocks=1")
CODER = ("channels=4", "groups=2", *LEAST)
UNET = ("channels=8", "groups=4", "middle_attention=False", *LEAST)
NETWORKS = {
  "vae_digits": {"network": CODER},
  "vq_digits": {"network": CODER},
  "gumbel_digits": {"network": CODER},
  "lsgm_digits": {"autoencoder.network": CODER, "network": UNET},
  "latent_digits": {"network": UNET},
  "cld_digits": {"network": UNET},
  "ddgan_digits": {"network": UNET, "discriminator": ("channels=8", "channel_multipliers=(1,)")},
}
LIKELIHOOD = ("--limit=8", "--batch_size=8")
LOOSE = ("--rtol=0.3", "--atol=0.3")
RESULTS = {
  "vae_digits": "model, variational bound",
  "vq_digits": "model, variational bound",
  "gumbel_digits": "model, variational bound",
  "lsgm_digits": "model, bound with latent ODE",
  "cld_digits": "model, bound over velocities",
}


def flags(name):
  """A few steps of the smallest networks that are still of their kind."""
  return (*SMALL, *(f"--config.{path}.{field}" for path, fields in NETWORKS[name].items() for field in fields))


def train(name, workdir, *more):
  cli.main(["train", f"--config={CONFIGS / name}.py", f"--workdir={workdir}", *flags(name), *more])


def fails(capsys, *argv):
  with pytest.raises(SystemExit) as stop:
    cli.main([*argv])
  assert stop.value.code == 2
  return capsys.readouterr().err


def picture(path):
  return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", RESULTS)
def test_a_config_trains_samples_and_bounds(name, tmp_path, capsys):
  more = ("--config.train.validate_every=0",) if name in ("lsgm_digits", "cld_digits") else ()  # to compile less
  train(name, tmp_path, *more)
  losses = read_metrics(tmp_path / "metrics.jsonl")
  assert [np.isfinite(r["loss"]) for r in losses if "loss" in r] == [True, True]
  assert any("validation_loss" in record for record in losses) == (name not in ("lsgm_digits", "cld_digits"))
  assert picture(tmp_path / "samples" / "00000002.png").std() > 1
  if name != "cld_digits":  # rows of images above what became of them
    assert picture(tmp_path / "reconstructions" / "00000002.png").std() > 1
  cli.main(["sample", f"--workdir={tmp_path}"])
  assert np.load(tmp_path / "samples.npz")["x"].shape == (8, 8, 8, 1)
  tolerances = LOOSE if name in ("lsgm_digits", "cld_digits") else ()
  cli.main(["likelihood", f"--workdir={tmp_path}", *LIKELIHOOD, *tolerances])
  report = json.loads((tmp_path / "likelihood.json").read_text())
  assert np.isfinite(report["results"][RESULTS[name]]["mean"])
  assert report["bound"].startswith("bits/dim, upper bound on -log2 P(x) / d")
  assert RESULTS[name] in capsys.readouterr().out


def test_a_gan_trains_by_both_launchers_and_has_no_likelihood(tmp_path, capsys):
  """The same metrics by jit and pmap: both optimizers, both losses."""
  for launcher, every in (("jit", 2), ("pmap", 0)):
    more = ("--config.discriminator_optimizer.warmup_steps=1", f"--config.train.sample_every={every}")
    train("ddgan_digits", tmp_path / launcher, *more, f"--launcher={launcher}")
  by_jit, by_pmap = (read_metrics(tmp_path / launcher / "metrics.jsonl") for launcher in ("jit", "pmap"))
  names = ("generator_loss", "discriminator_loss", "r1", "grad_norm")
  for a, b in zip(by_jit, by_pmap, strict=True):
    np.testing.assert_allclose([a.get(n, 0) for n in names], [b.get(n, 0) for n in names], rtol=1e-4)
  cli.main(["sample", f"--workdir={tmp_path / 'jit'}"])
  assert np.load(tmp_path / "jit" / "samples.npz")["nfe"].tolist() == [4] * 8
  assert "likelihood is not for a denoising diffusion GAN" in fails(
    capsys, "likelihood", f"--workdir={tmp_path / 'jit'}"
  )


def test_latents_of_another_run(tmp_path, capsys):
  """The autoencoder is copied, scaled, needed no more, and another one in its place is refused."""
  vae, run, tight = tmp_path / "vae", tmp_path / "run", ("--limit=8", "--batch_size=8", *LOOSE)
  argv = ("latent_digits", run, f"--config.autoencoder.workdir={vae}")
  message = fails(
    capsys,
    "train",
    f"--config={CONFIGS / 'latent_digits.py'}",
    f"--workdir={run}",
    f"--config.autoencoder.workdir={vae}",
  )
  assert f"config.autoencoder.workdir = {vae} is no directory of a run" in message
  blind = ("--config.train.sample_every=0", "--config.train.validate_every=0")
  train("vae_digits", vae, *blind)
  train(*argv)
  section = factory.read(run / "config.json")["autoencoder"]
  assert section["fingerprint"]
  assert section["network"]["scaling"] != 1
  shutil.move(vae, tmp_path / "moved")
  cli.main(["sample", f"--workdir={run}"])
  cli.main(["likelihood", f"--workdir={run}", *tight])
  assert "model, bound with latent ODE" in capsys.readouterr().out
  train("vae_digits", vae, "--config.seed=1", *blind)
  assert f"config.autoencoder.workdir = {vae} holds another autoencoder" in fails(
    capsys, "train", f"--workdir={run}", "--config.train.steps=2"
  )
  assert "holds another run: config.autoencoder.fingerprint was" in fails(
    *(capsys, "train", f"--config={CONFIGS / 'latent_digits.py'}", f"--workdir={run}"),
    *(f"--config.autoencoder.workdir={vae}", *flags("latent_digits")),
  )
  other = ("--config.data.held_out=100",)
  assert "was trained on other data: config.data.held_out was 360, is 100" in fails(
    *(capsys, "train", f"--config={CONFIGS / 'latent_digits.py'}", f"--workdir={tmp_path / 'third'}"),
    *(f"--config.autoencoder.workdir={vae}", *other),
  )
