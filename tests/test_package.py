"""What the package promises as a whole: a light import, public names, files and functions of a size to be read."""

import ast
import operator
import pathlib
import subprocess
import sys

import pytest

import jaxdiff as jd

PACKAGE = pathlib.Path(jd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_import_is_light():
  heavy = (
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "grain",
    "matplotlib",
    "flax",
    "optax",
    "ml_collections",
  )
  code = f"import jaxdiff, sys; print([name for name in {heavy} if name in sys.modules])"
  output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert output.strip() == "[]"


def test_public_names_of_the_design_exist():
  names = (
    "SDE ScalarSDE VP SubVP VE EDM CosineVP LinearSDE VariancePreserving perturb reverse example_keys raise_if_failed "
    "time_grid score_fn score_of denoised ddpm.Chain ncsn.Chain losses.denoising losses.explicit losses.implicit "
    "losses.sliced losses.ncsn losses.ddpm_simple losses.ddpm_elbo losses.ddpm_hybrid losses.vdm losses.bound "
    "losses.averaged losses.decoders losses.hybrid CLD cld.score_fn cld.perturb cld.time_grid cld.on_channels "
    "samplers.reverse_sde samplers.probability_flow samplers.ancestral samplers.sscs "
    "samplers.ddim samplers.ddim_encode samplers.dpm_solver samplers.dpm_solver_pp samplers.unipc samplers.edm "
    "samplers.predictor_corrector samplers.langevin samplers.mala samplers.annealed_langevin samplers.adaptive_sde "
    "samplers.reverse_diffusion samplers.stochastic_heun samplers.probability_flow_encode samplers.interpolate "
    "samplers.thresholded samplers.FixedGrid parallel.shard_examples likelihood.log_prob "
    "likelihood.bits_per_dim likelihood.augmented likelihood.position_bound divergence.exact divergence.hutchinson "
    "predictions.noise predictions.data "
    "guidance.classifier guidance.log_probability guidance.without guidance.mean_shift guidance.classifier_free "
    "guidance.interval guidance.autoguidance guidance.composed inverse.pigdm inverse.dps inverse.projected "
    "inverse.repaint inverse.inpainting inverse.colorization inverse.super_resolution inverse.deblurring "
    "editing.sdedit editing.exchange editing.interpolation editing.panorama editing.cascade losses.noised_condition "
    "predictions.velocity predictions.score predictions.edm schedules.Gamma typing.Sample typing.LogProb "
    "typing.Autoencoder losses.vae losses.gumbel losses.vq losses.observations.discretized quantization.nearest "
    "quantization.gumbel_max quantization.perplexity losses.lsgm losses.LatentModel losses.Players mixed_score "
    "losses.denoising_gan losses.patch_adversarial samplers.denoising_gan ddpm.vp_betas latents.statistics "
    "likelihood.latent_ode likelihood.latent_elbo"
  )
  for name in names.split():
    assert operator.attrgetter(name)(jd) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short_and_documented(path):
  text = path.read_text(encoding="utf-8")
  tree = ast.parse(text)
  assert len(text.splitlines()) <= 420
  assert ast.get_docstring(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.col_offset == 0:
      assert ast.get_docstring(node), f"{node.name} has no docstring"
    if isinstance(node, ast.FunctionDef):
      documentation = len((ast.get_docstring(node) or "").splitlines())
      assert node.end_lineno - node.lineno - documentation <= 60, f"{node.name} is long"
