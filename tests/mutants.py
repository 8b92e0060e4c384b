"""Mutants: one-line mistakes in the library, and for each the test that must notice it. `make mutants` tries them all.

Every mutant is applied in a copy of the tree, where only its own test is run; it dies when that test fails. The table
of the last run is tests/mutants.md.

    python tests/mutants.py                  # all, two at a time; writes tests/mutants.md
    python tests/mutants.py "sub-VP" "EMA"   # those whose names contain one of these words
"""

import concurrent.futures
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("jaxdiff", "tests", "configs", "experiments", "pyproject.toml", "README.md", "Makefile")
WORKERS = 2


class Mutant(NamedTuple):
  name: str
  file: str
  old: str
  new: str
  test: str


MUTANTS: list[Mutant] = [
  Mutant(
    "DDIM's ratio squared",
    "jaxdiff/samplers/ddim.py",
    "(1 - ratio * jnp.sqrt(kept))",
    "(1 - ratio**2 * jnp.sqrt(kept))",
    "tests/test_ddim.py::test_coefficients_are_those_of_the_paper[vp]",
  ),
  Mutant(
    "3M with J_2 / 2",
    "jaxdiff/samplers/dpm_solver_pp.py",
    'curvature = J[2] / 2 if coefficients == "diffusers" else J[2]',
    "curvature = J[2] / 2",
    "tests/test_dpm_solver_pp.py::test_third_order[vp]",
  ),
  Mutant(
    "(1 + eta^2) / 2 -> eta^2 / 2",
    "jaxdiff/sde.py",
    "sde.drift(x, t) - 0.5 * (1 + eta**2) * sde",
    "sde.drift(x, t) - 0.5 * eta**2 * sde",
    "tests/test_reverse_sde.py::test_every_amount_of_noise_has_the_same_marginals[0.6-reverse_sde-1]",
  ),
  Mutant(
    "UniPC without corrector",
    "jaxdiff/samplers/unipc.py",
    "x = x + exponential.weighted(correction, values)",
    "x = x + 0 * exponential.weighted(correction, values)",
    "tests/test_unipc.py::test_a_step_by_the_papers_equations[1]",
  ),
  Mutant(
    "MALA without its acceptance ratio",
    "jaxdiff/samplers/langevin.py",
    "(len(x),), x.dtype)) < ratio",
    "(len(x),), x.dtype)) < 0 * ratio",
    "tests/test_langevin.py::test_mala_on_a_gaussian_has_no_bias",
  ),
  Mutant(
    "DPM-Solver-3 with half of J_0 for J_1",
    "jaxdiff/samplers/dpm_solver.py",
    "-exponential.moments(-h_to, 2)[1]",
    "jnp.expm1(h_to) / 2",
    "tests/test_dpm_solver.py::test_coefficients_are_those_of_the_paper[vp]",
  ),
  Mutant(
    "ancestral variance beta for beta-tilde",
    "jaxdiff/samplers/ancestral.py",
    'if variance == "beta":',
    'if variance in ("beta", "beta_tilde"):',
    "tests/test_ancestral.py::test_a_step_is_the_posterior_of_the_chain[ddpm_chain-40]",
  ),
  Mutant(
    "churn above sqrt(2) - 1",
    "jaxdiff/samplers/edm.py",
    "(1 + jnp.minimum(churn, _LARGEST_CHURN))",
    "(1 + churn)",
    "tests/test_edm.py::test_where_there_is_churn",
  ),
  Mutant(
    "churn noise of s_hat - s",
    "jaxdiff/samplers/edm.py",
    "(s_hat - s) * (s_hat + s)",
    "(s_hat - s) * (s_hat - s)",
    "tests/test_edm.py::test_a_churned_step_as_in_the_paper[vp]",
  ),
  Mutant(
    "corrector's step size without alpha",
    "jaxdiff/samplers/predictor_corrector.py",
    "expand(2 * snr * alpha * sigma, x)",
    "expand(2 * snr * sigma, x)",
    "tests/test_predictor_corrector.py::test_step_size_of_the_langevin_corrector[vp]",
  ),
  Mutant(
    "SSCS: a whole step for the first half",
    "jaxdiff/samplers/sscs.py",
    "x = sde.step_back(x, t, m, first)",
    "x = sde.step_back(x, t, s, first)",
    "tests/test_sscs.py::test_a_process_of_ones_own_with_a_rate_that_varies[1]",
  ),
  Mutant(
    "stochastic Heun with noise h g(t)^2",
    "jaxdiff/samplers/reverse_sde.py",
    "jnp.sqrt(h * _mean_of_squared_diffusion(sde, ts))",
    "jnp.sqrt(h * sde.diffusion(ts[:-1]) ** 2)",
    "tests/test_reverse_sde.py::test_stochastic_heun_has_weak_order_two[vp]",
  ),
  Mutant(
    "annealed Langevin's steps by sigma, not its square",
    "jaxdiff/samplers/langevin.py",
    "/ chain.sigmas[0]) ** 2",
    "/ chain.sigmas[0])",
    "tests/test_langevin.py::test_annealed_langevin_steps_by_the_size_of_its_level_at_its_time",
  ),
  Mutant(
    "one noise for all steps",
    "jaxdiff/samplers/fixed_grid.py",
    "interval, keys.fold_in(example, i))",
    "interval, keys.fold_in(example, 0))",
    "tests/test_reverse_sde.py::test_moments_by_recursion_are_those_of_samples[vp]",
  ),
  Mutant(
    "adaptive SDE: the path goes on after a rejection",
    "jaxdiff/samplers/adaptive_sde.py",
    "        keep(w_next, w),",
    "        w_next,",
    "tests/test_adaptive_sde.py::test_a_tighter_tolerance_follows_the_same_path_more_closely",
  ),
  Mutant(
    "dynamic threshold without its scale",
    "jaxdiff/samplers/thresholding.py",
    "jnp.clip(data, -reach, reach) * (self.limit / reach)",
    "jnp.clip(data, -reach, reach)",
    "tests/test_thresholding.py::test_dynamic_limit_is_the_quantile_of_the_example",
  ),
  Mutant(
    "sub-VP std 1-exp(-2B)",
    "jaxdiff/sde.py",
    "return jnp.exp(-0.5 * integral), -jnp.expm1(-integral)",
    "return jnp.exp(-0.5 * integral), -jnp.expm1(-2 * integral)",
    "tests/test_sde.py::test_subvp_standard_deviation_is_that_of_its_own_sde",
  ),
  Mutant(
    "prior variance for prior std in the density",
    "jaxdiff/sde.py",
    "_unit_prior_log_prob(sde, z / sde.sigma_max)",
    "_unit_prior_log_prob(sde, z / sde.sigma_max**2)",
    "tests/test_sde.py::test_prior_density_is_that_of_prior_samples[ve]",
  ),
  Mutant(
    "prior variance for prior std in the samples",
    "jaxdiff/sde.py",
    "return sde.sigma_max * _unit_prior_sample",
    "return sde.sigma_max**2 * _unit_prior_sample",
    "tests/test_sde.py::test_prior_density_is_that_of_prior_samples[edm]",
  ),
  Mutant(
    "a probe redrawn within a solve",
    "jaxdiff/likelihood/density.py",
    "trace.estimate(velocity, y[0], probes, _identity(sde, t))",
    "trace.estimate(velocity, y[0], trace.draw(keys.fold_in(key, jnp.int32(9 * u)), y[0]), _identity(sde, t))",
    "tests/test_likelihood.py::test_probes_are_drawn_once_a_solve_and_know_their_error",
  ),
  Mutant(
    "a probe redrawn within a solve of a flow",
    "jaxdiff/flow.py",
    "_velocity(field, t, cond), y[0], probes)",
    "_velocity(field, t, cond), y[0], trace.draw(keys.fold_in(key, jnp.int32(9 * t)), x))",
    "tests/test_flow.py::test_probes_are_drawn_once_a_solve_and_know_their_error",
  ),
  Mutant(
    "probes shared in a batch",
    "jaxdiff/likelihood/density.py",
    "    key = keys.per_example(key, len(x0))",
    "    key = jnp.repeat(keys.per_example(key, len(x0))[:1], len(x0))",
    "tests/test_likelihood.py::test_probes_are_drawn_once_a_solve_and_know_their_error",
  ),
  Mutant(
    "levels - 1 in bits/dim",
    "jaxdiff/likelihood/bits.py",
    "math.log2(levels / (high - low))",
    "math.log2((levels - 1) / (high - low))",
    "tests/test_likelihood.py::test_units[data_range0]",
  ),
  Mutant(
    "importance with probes accepted",
    "jaxdiff/likelihood/bits.py",
    "    if importance:\n      check_exact(log_prob.trace(x))\n    inside",
    "    inside",
    "tests/test_dequantization.py::test_importance_weights_of_estimated_traces_are_refused",
  ),
  Mutant(
    "CLD kernel without series near t = 0",
    "jaxdiff/cld/process.py",
    "_SMALL = 2.0",
    "_SMALL = 0.0",
    "tests/test_cld.py::test_the_kernel_has_all_digits_of_single_precision",
  ),
  Mutant(
    "sigma^2 as 1 - alpha^2 in float32",
    "jaxdiff/sde.py",
    "jnp.sqrt(-jnp.expm1(-integral))",
    "jnp.sqrt(1 - jnp.exp(-integral))",
    "tests/test_sde.py::test_float32_has_all_its_digits_at_both_ends_of_time[vp]",
  ),
  Mutant(
    "the sign of the divergence",
    "jaxdiff/likelihood/density.py",
    "(prior_log_prob or sde.prior_log_prob)(z) + jnp.mean(change, axis=1)",
    "(prior_log_prob or sde.prior_log_prob)(z) - jnp.mean(change, axis=1)",
    "tests/test_likelihood.py::test_value_is_the_exact_density_of_gaussian_data[ve]",
  ),
  Mutant(
    "t0 of likelihood ignored",
    "jaxdiff/likelihood/density.py",
    "start = start_time(sde, t0, TRAINING_NOISE_TO_SIGNAL)",
    "start = start_time(sde, None, TRAINING_NOISE_TO_SIGNAL)",
    "tests/test_likelihood.py::test_gradients_reach_the_parameters_and_x[checkpoint]",
  ),
  Mutant(
    "the gradient of a failed solve is not NaN",
    "jaxdiff/ode.py",
    "lambda leaf: leaf * whole.astype(leaf.dtype), ys)",
    "lambda leaf: jnp.where(code == status.SUCCESS, leaf, jnp.nan), ys)",
    "tests/test_ode.py::test_failures_have_their_codes",
  ),
  Mutant(
    "shared steps by the mean error of the batch",
    "jaxdiff/ode.py",
    "square = jnp.max(total /",
    "square = jnp.mean(total /",
    "tests/test_likelihood.py::test_shared_steps_keep_the_tolerance_of_the_hardest_example",
  ),
  Mutant(
    "the endpoint rule without its sign",
    "jaxdiff/ode.py",
    "d_start = -_dot(",
    "d_start = _dot(",
    "tests/test_ode.py::test_gradients_are_those_of_central_differences[continuous-rk4-64]",
  ),
  Mutant(
    "EMA warm-up off by one",
    "jaxdiff/training/ema.py",
    "9 / (10 + step.astype(jnp.float32))",
    "9 / (11 + step.astype(jnp.float32))",
    "tests/test_training.py::test_sgd_and_average_follow_the_numpy_recursion",
  ),
  Mutant(
    "noise keys without fold_in(step)",
    "jaxdiff/training/step.py",
    "jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)",
    "jax.vmap(jax.random.fold_in, (None, 0))(key, index)",
    "tests/test_training.py::test_noise_keys_are_the_documented_ones",
  ),
  Mutant(
    "stratified times without fold_in(step)",
    "jaxdiff/training/step.py",
    "jax.random.fold_in(jax.random.fold_in(key, step), _TIME_STREAM)",
    "jax.random.fold_in(key, _TIME_STREAM)",
    "tests/test_training.py::test_one_uniform_in_every_cell",
  ),
  Mutant(
    "a non-finite step is applied",
    "jaxdiff/training/step.py",
    "jax.lax.select(finite, new, old)",
    "jax.lax.select(finite | True, new, old)",
    "tests/test_accumulation.py::test_steps_that_are_not_finite_are_skipped_and_counted",
  ),
  Mutant(
    "gradients and metrics summed over devices twice",
    "jaxdiff/training/step.py",
    "grads, metrics = jax.lax.psum((grads, metrics), axis_name)",
    "grads, metrics = jax.lax.psum(jax.lax.psum((grads, metrics), axis_name), axis_name)",
    "tests/test_accumulation.py::test_microbatches_on_four_devices[pmap]",
  ),
  Mutant(
    "the loss is averaged over devices after its sum",
    "jaxdiff/training/step.py",
    "grads, metrics = jax.lax.psum((grads, metrics), axis_name)",
    "grads, metrics = jax.lax.psum(grads, axis_name), jax.lax.pmean(metrics, axis_name)",
    "tests/test_accumulation.py::test_microbatches_on_four_devices[shard_map]",
  ),
  Mutant(
    "autodiff sums the gradient over devices before psum does",
    "jaxdiff/training/step.py",
    "      params = _varying(params, axis_name)",
    "      pass",
    "tests/test_training.py::test_shard_map_gives_the_gradient_of_jit[True]",
  ),
  Mutant(
    "microbatches averaged twice",
    "jaxdiff/training/step.py",
    "jax.tree.map(lambda s, v: s.astype(v.dtype), sums, shapes)",
    "jax.tree.map(lambda s, v: (s / parts).astype(v.dtype), sums, shapes)",
    "tests/test_accumulation.py::test_microbatches_change_nothing_but_rounding[3-False]",
  ),
  Mutant(
    "VQ straight-through without stop-gradient",
    "jaxdiff/quantization.py",
    "return z + jax.lax.stop_gradient(value - z)",
    "return z + (value - z)",
    "tests/test_quantization.py::test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other",
  ),
  Mutant(
    "DDGAN's posterior with beta for beta-tilde",
    "jaxdiff/ddpm.py",
    'expand(of_state, x_t) * x_t, self.variance("beta_tilde", t)',
    'expand(of_state, x_t) * x_t, self.variance("beta", t)',
    "tests/test_denoising_gan.py::test_a_step_of_the_sampler_is_that_of_ddpm",
  ),
  Mutant(
    "R1 without its half",
    "jaxdiff/losses/adversarial.py",
    "return 0.5 * jnp.sum(gradient**2",
    "return jnp.sum(gradient**2",
    "tests/test_adversarial.py::test_the_penalty_of_a_quadratic_discriminator_is_in_closed_form",
  ),
  Mutant(
    "the generator's term moves the discriminator",
    "jaxdiff/losses/adversarial.py",
    "fooled = logits(jax.lax.stop_gradient(discriminator), fake)",
    "fooled = logits(discriminator, fake)",
    "tests/test_adversarial.py::test_each_player_has_the_gradient_of_its_own_loss",
  ),
  Mutant(
    "min-SNR weight inverted",
    "jaxdiff/losses/weights.py",
    "jnp.minimum(1.0, gamma * jnp.exp(-log_snr(sde, t)))",
    "jnp.minimum(1.0, gamma * jnp.exp(log_snr(sde, t)))",
    "tests/test_losses.py::test_weights_are_the_documented_ones",
  ),
  Mutant(
    "importance sampling without its correction",
    "jaxdiff/losses/times.py",
    "return t, (first - last) / (sde.t1 - t0) / log_snr_rate(sde, t)",
    "return t, jnp.ones_like(u)",
    "tests/test_losses.py::test_times_stay_inside_and_likelihood_weight_times_importance_correction_is_constant",
  ),
  Mutant(
    "a cell of the discretized Gaussian ends too early",
    "jaxdiff/losses/decoders.py",
    "for inside in (0.0, 1.0)",
    "for inside in (0.0, 0.99)",
    "tests/test_decoders.py::test_discretized_gaussian_is_the_integral_over_the_cell",
  ),
  Mutant(
    "the chain's KL without its half",
    "jaxdiff/losses/ddpm.py",
    "kl = 0.5 * sum_dims(",
    "kl = sum_dims(",
    "tests/test_ddpm_losses.py::test_bounds_of_gaussian_data_are_their_closed_forms[anisotropic]",
  ),
  Mutant(
    "half the gradient of the variance of the bound",
    "jaxdiff/losses/vdm.py",
    "lambda leaf: 2 * out * leaf",
    "lambda leaf: out * leaf",
    "tests/test_vdm.py::test_the_interior_follows_the_variance_of_the_loss_and_all_else_the_bound",
  ),
  Mutant(
    "one side of the prior's cost",
    "jaxdiff/losses/bounds.py",
    "for sign in (std, -std)",
    "for sign in (std, std)",
    "tests/test_bounds.py::test_the_prior_cost_is_the_closed_form_without_variance",
  ),
  Mutant(
    "classifier-free guidance: 1 + gamma for gamma",
    "jaxdiff/guidance/classifier_free.py",
    "guided = expand(scale, x) * told + expand(1 - scale, x) * untold",
    "guided = expand(scale + 1, x) * told + expand(-scale, x) * untold",
    "tests/test_guidance.py::test_both_conventions_agree_and_end_at_the_branches",
  ),
  Mutant(
    "classifier-free guidance: both branches swapped",
    "jaxdiff/guidance/classifier_free.py",
    "told, untold = value[:, 0], value[:, 1]",
    "untold, told = value[:, 0], value[:, 1]",
    "tests/test_guidance.py::test_any_null_is_a_negative_condition_and_what_it_does_not_name_stays",
  ),
  Mutant(
    "guidance interval: inverted bound",
    "jaxdiff/guidance/interval.py",
    "(self.low < level) & (level <= self.high)",
    "(self.low < level) & (level > self.high)",
    "tests/test_guidance.py::test_an_interval_is_open_below_and_closed_above",
  ),
  Mutant(
    "guidance interval: closed below",
    "jaxdiff/guidance/interval.py",
    "(self.low < level) & (level <= self.high)",
    "(self.low <= level) & (level <= self.high)",
    "tests/test_guidance.py::test_an_interval_is_open_below_and_closed_above",
  ),
  Mutant(
    "downsampling: adjoint scaled",
    "jaxdiff/inverse/operators.py",
    "factor, axis=1), factor, axis=2) / factor**2",
    "factor, axis=1), factor, axis=2) / factor",
    "tests/test_inverse.py::test_adjoint_solve_and_pseudo_inverse[downsample]",
  ),
  Mutant(
    "PiGDM: prior variance without the data's",
    "jaxdiff/inverse/guided.py",
    "variance = data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)",
    "variance = data_variance * sigma**2 / (alpha**2 + sigma**2)",
    "tests/test_inverse.py::test_pigdm_is_exact_for_isotropic_data[vp]",
  ),
  Mutant(
    "DPS: half the scale",
    "jaxdiff/inverse/dps.py",
    "return x_next + scale * move, memory",
    "return x_next + 0.5 * scale * move, memory",
    "tests/test_inverse_bias.py::test_dps_jitters_by_its_scale",
  ),
  Mutant(
    "RePaint: re-noised by the square root's argument",
    "jaxdiff/inverse/repaint.py",
    "jnp.sqrt(jnp.maximum(sigma[goes_on] ** 2 - (keep * sigma[arrived]) ** 2, 0.0))",
    "jnp.maximum(sigma[goes_on] ** 2 - (keep * sigma[arrived]) ** 2, 0.0)",
    "tests/test_inverse_bias.py::test_what_is_known_has_the_noise_of_its_time",
  ),
  Mutant(
    "FIR resampling: gain of the filter",
    "jaxdiff/models/resampling.py",
    "+ taps[3]) / 8",
    "+ taps[3]) / 4",
    "tests/test_resampling.py::test_the_filter_is_that_of_the_direct_sum[SAME]",
  ),
  Mutant(
    "attention: no square root in the scale of QK",
    "jaxdiff/models/attention.py",
    "(1 / math.sqrt(query.shape[-1]))",
    "(1 / query.shape[-1])",
    "tests/test_attention.py::test_attention_is_the_naive_one_in_float64",
  ),
  Mutant(
    "imported convolution: rows and columns transposed",
    "jaxdiff/weights/names.py",
    'kernel = Made((f"{prefix}.weight",), lambda weight: weight.transpose(2, 3, 1, 0))',
    'kernel = Made((f"{prefix}.weight",), lambda weight: weight.transpose(3, 2, 1, 0))',
    "tests/test_weights_names.py::test_imported_layers_are_those_of_the_published_formulas",
  ),
  Mutant(
    "null label off by one",
    "jaxdiff/models/conditioning.py",
    "    return self.classes\n",
    "    return self.classes - 1\n",
    "tests/test_guidance.py::test_both_branches_of_a_linen_network_with_its_own_null",
  ),
  Mutant(
    "projection: known values by a fused difference",
    "jaxdiff/inverse/projection.py",
    "rest = jnp.where(back == x, 0.0, x - back)",
    "rest = x - back",
    "tests/test_inverse_samplers.py::test_every_operator_is_obeyed_at_the_end[projection]",
  ),
  Mutant(
    "an unknown field of a config is accepted",
    "jaxdiff/schema.py",
    '  if name not in valid and not (name == "type" and isinstance(section_at(path).makes, Mapping)):',
    "  if False:",
    "tests/test_factory.py::test_mistakes_are_named_with_their_path",
  ),
  Mutant(
    "another type keeps the fields of the former one",
    "jaxdiff/arguments.py",
    "    del section[name]\n",
    "    pass\n",
    "tests/test_arguments.py::test_fields_of_the_schema_and_other_types_by_flag",
  ),
  Mutant(
    "the identity of a run ignores its number of steps",
    "jaxdiff/factory.py",
    '_DECIDING_TRAIN_FIELDS = ("batch_size", "steps", ',
    '_DECIDING_TRAIN_FIELDS = ("batch_size", ',
    "tests/test_factory.py::test_identity_is_what_changes_the_training_and_nothing_else",
  ),
  Mutant(
    "the identity of a run ignores dropped conditions",
    "jaxdiff/factory.py",
    '"random_flip", "drop_conditions")',
    '"random_flip")',
    "tests/test_factory.py::test_identity_is_what_changes_the_training_and_nothing_else",
  ),
  Mutant(
    "a flipped bit is restored",
    "jaxdiff/training/storage.py",
    "if changed := [path for path, entry in manifest(tree).items() if entry != saved[path]]:",
    "if changed := [path for path, entry in manifest(tree).items() if False]:",
    "tests/test_checkpoint.py::test_damaged_newer_ones_are_named_and_the_newest_whole_one_is_restored",
  ),
  Mutant(
    "the fingerprint of a checkpoint is not compared",
    "jaxdiff/training/checkpoint.py",
    "    if found := differences(fingerprint, self._fingerprint) or differences(arrays",
    "    if found := differences(arrays",
    "tests/test_checkpoint.py::test_another_run_is_refused_by_name_and_not_fallen_through",
  ),
  Mutant(
    "the checksum does not weigh the positions",
    "jaxdiff/training/manifest.py",
    "  return jnp.sum(odd * words, dtype=jnp.uint32)",
    "  return jnp.sum(words, dtype=jnp.uint32)",
    "tests/test_storage.py::test_checksum_is_the_documented_sum_and_sees_one_bit",
  ),
  Mutant(
    "every device counts its rows from 0",
    "jaxdiff/training/step.py",
    "  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)",
    "  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index % 2)",
    "tests/test_launchers.py::test_noise_is_bitwise_equal_on_any_layout",
  ),
  Mutant(
    "pmap gives the rows of a batch to other devices than their indices",
    "jaxdiff/parallel/launchers.py",
    "      leaf = leaf.reshape(*lead, mesh.size // processes, -1, *leaf.shape[len(lead) + 1 :])",
    "      leaf = leaf[::-1].reshape(*lead, mesh.size // processes, -1, *leaf.shape[len(lead) + 1 :])",
    "tests/test_launchers.py::test_noise_is_bitwise_equal_on_any_layout",
  ),
  Mutant(
    "all batches of samples have the keys of the first",
    "jaxdiff/evaluation/runs.py",
    "keys.example_keys(_sampling_key(seed), start, batch_size), batch)",
    "keys.example_keys(_sampling_key(seed), 0, batch_size), batch)",
    "tests/test_evaluation.py::test_samples_do_not_depend_on_batch_size_or_devices",
  ),
  Mutant(
    "all batches of likelihoods have the keys of the first",
    "jaxdiff/evaluation/runs.py",
    "keys.example_keys(key, start, batch_size), batch)",
    "keys.example_keys(key, 0, batch_size), batch)",
    "tests/test_likelihood_command.py::test_every_example_has_its_value_whatever_the_batch",
  ),
  Mutant(
    "the last batch that is not full is dropped",
    "jaxdiff/evaluation/chunks.py",
    "range(0, count, size), share",
    "range(0, count - count % size, size), share",
    "tests/test_likelihood_command.py::test_every_example_has_its_value_whatever_the_batch",
  ),
  Mutant(
    "the exit code of a signal is its number",
    "jaxdiff/cli.py",
    "    _leave(128 + stopped.signum, stopped)",
    "    _leave(stopped.signum, stopped)",
    "tests/test_entry.py::test_exit_codes_say_what_ended_a_command",
  ),
  Mutant(
    "the program cache of the user wins over JAX_COMPILATION_CACHE_DIR",
    "jaxdiff/cli.py",
    '  if "JAX_COMPILATION_CACHE_DIR" in os.environ:',
    '  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):',
    "tests/test_entry.py::test_the_cache_that_the_user_names_or_turns_off_wins",
  ),
  Mutant(
    "pmap does not sum the gradients over the devices",
    "jaxdiff/training/step.py",
    "      grads, metrics = jax.lax.psum((grads, metrics), axis_name)",
    "      metrics = jax.lax.psum(metrics, axis_name)",
    "tests/test_launchers.py::test_gradients_are_equal_on_any_layout",
  ),
  Mutant(
    "pmap averages the gradients of means over the global batch",
    "jaxdiff/training/step.py",
    "jax.lax.psum((grads, metrics), axis_name)",
    "jax.lax.pmean((grads, metrics), axis_name)",
    "tests/test_launchers.py::test_gradients_are_equal_on_any_layout",
  ),
  Mutant(
    "under fsdp the parameters are not gathered in the loss",
    "jaxdiff/parallel/sharding.py",
    "  if mesh.shape.get(FSDP_AXIS, 1) == 1 or AxisType.Manual in mesh.axis_types:",
    "  if True:",
    "tests/test_launchers.py::test_fsdp_gathers_parameters_and_never_optimizer_state",
  ),
  Mutant(
    "steps of one dispatch all take the first batch",
    "jaxdiff/parallel/launchers.py",
    "lambda state, batch: train_step(state, batch, index), state, batches",
    "lambda state, _: train_step(state, jax.tree.map(lambda x: x[0], batches), index), state, batches",
    "tests/test_launchers.py::test_several_steps_in_one_call_are_the_single_steps",
  ),
  Mutant(
    "preemption is asked for with the step, which leaves numbers out",
    "jaxdiff/rundir.py",
    "    self._asked += 1  # not the step: a dispatch of several would leave numbers out\n",
    "    self._asked = step\n",
    "tests/test_faults.py::test_processes_ask_for_preemption_without_leaving_numbers_out",
  ),
  Mutant(
    "one trainer at a time: a shared lock",
    "jaxdiff/rundir.py",
    "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
    "tests/test_cli.py::test_one_trainer_at_a_time",
  ),
  Mutant(
    "two processes of one number join",
    "jaxdiff/parallel/processes.py",
    "  elif number in there or not 0 < number < processes:\n",
    "  elif not 0 < number < processes:\n",
    "tests/test_processes.py::test_processes_that_disagree_are_named",
  ),
  Mutant(
    "what one process cannot read the others use",
    "jaxdiff/training/storage.py",
    "    if failed.any():\n",
    "    if failed.all():\n",
    "tests/test_storage.py::test_two_processes_agree_on_what_they_restore",
  ),
  Mutant(
    "a checkpoint restores the state without the position in the data",
    "jaxdiff/training/checkpoint.py",
    "    storage.together(lambda: iterator.set_state(position))\n",
    "    storage.together(lambda: None)\n",
    "tests/test_checkpoint.py::test_damaged_newer_ones_are_named_and_the_newest_whole_one_is_restored",
  ),
]


def copy_of_the_tree(folder: pathlib.Path) -> pathlib.Path:
  for name in COPIED:
    path = ROOT / name
    if path.is_dir():
      shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(path, folder / name)
  return folder


def run(tree: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess:
  command = [
    sys.executable,
    "-B",
    "-m",
    "pytest",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    "-m",
    "slow or not slow",
    *tests,
  ]
  return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def try_one(tree: pathlib.Path, mutant: Mutant) -> str:
  """Apply a mutant, run its test, take the mutant back; return what happened to it."""
  file = tree / mutant.file
  text = file.read_text(encoding="utf-8")
  if text.count(mutant.old) != 1:
    return f"out of date: the old text occurs {text.count(mutant.old)} times"
  file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
  try:
    code = run(tree, [mutant.test]).returncode
  finally:
    file.write_text(text, encoding="utf-8")
  return {0: "SURVIVED", 1: "died"}.get(code, f"the test cannot run: pytest ended with {code}")


def try_all(mutants: list[Mutant]) -> list[str]:
  trees: queue.Queue[pathlib.Path] = queue.Queue()
  done = iter(range(1, len(mutants) + 1))

  def one(mutant: Mutant) -> str:
    tree = trees.get()
    try:
      result = try_one(tree, mutant)
    finally:
      trees.put(tree)
    print(f"{next(done)}/{len(mutants)}  {mutant.name}: {result}", flush=True)
    return result

  with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    for number in range(WORKERS):
      trees.put(copy_of_the_tree(pathlib.Path(folder) / str(number)))
    return list(pool.map(one, mutants))


def table(mutants: list[Mutant], results: list[str]) -> str:
  rows = [f"| {m.name} | `{m.file}` | `{m.test}` | {result} |" for m, result in zip(mutants, results, strict=True)]
  died = results.count("died")
  head = f"# Mutants\n\n`make mutants` writes this file. {died} of {len(mutants)} mutants died.\n"
  return "\n".join([head, "| mutant | in | its test | result |", "|---|---|---|---|", *rows, ""])


def main(words: list[str]) -> None:
  chosen = [m for m in MUTANTS if not words or any(word.lower() in m.name.lower() for word in words)]
  if not chosen:
    sys.exit(f"no mutant has any of {words} in its name")
  with tempfile.TemporaryDirectory() as folder:
    clean = run(copy_of_the_tree(pathlib.Path(folder) / "tree"), sorted({m.test for m in chosen}))
  if clean.returncode:
    sys.exit(f"the tests fail without any mutant:\n{clean.stdout[-3000:]}")
  results = try_all(chosen)
  if not words:
    (ROOT / "tests" / "mutants.md").write_text(table(chosen, results), encoding="utf-8")
  survivors = [m.name for m, result in zip(chosen, results, strict=True) if result != "died"]
  print(f"{len(chosen) - len(survivors)} of {len(chosen)} died")
  if survivors:
    sys.exit(f"not killed: {survivors}")


if __name__ == "__main__":
  main(sys.argv[1:])
