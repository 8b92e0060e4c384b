#!/bin/sh
# Four objectives on the digits: one network, one optimizer, equal steps. From the repository root, after
# `make setup`: sh experiments/objectives/train.sh SEED [RUNS_DIRECTORY]
set -eu
bin=${VENV:-.venv}/bin
seed=$1 runs=${2:-runs/objectives}
run() {
  name=$1 && shift
  "$bin/jaxdiff" train --config=configs/vdm_digits.py --workdir="$runs/$name-$seed" --config.seed="$seed" "$@"
  "$bin/jaxdiff" likelihood --workdir="$runs/$name-$seed"
  "$bin/jaxdiff" sample --workdir="$runs/$name-$seed" --config.sample.num=40
}
run vdm_learned
run vdm_straight --config.sde.interior=straight
run vp_likelihood --config.sde.type=VP --config.loss.type=denoising --config.loss.weight.type=likelihood \
  --config.loss.time.type=importance
run vp_simple --config.sde.type=VP --config.loss.type=denoising --config.loss.weight.type=noise \
  --config.loss.time.type=uniform
