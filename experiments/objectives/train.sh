#!/bin/sh
# Four objectives on the digits: one network, one optimizer, equal steps. Usage: train.sh SEED [RUNS_DIRECTORY]
set -eu
seed=$1 runs=${2:-runs/objectives}
run() {
  name=$1 && shift
  jaxdiff train --config=configs/vdm_digits.py --workdir="$runs/$name-$seed" --config.seed="$seed" "$@"
  jaxdiff likelihood --workdir="$runs/$name-$seed"
  jaxdiff sample --workdir="$runs/$name-$seed" --config.sample.num=40
}
run vdm_learned
run vdm_straight --config.sde.interior=straight
run vp_likelihood --config.sde.type=VP --config.loss.type=denoising --config.loss.weight.type=likelihood \
  --config.loss.time.type=importance
run vp_simple --config.sde.type=VP --config.loss.type=denoising --config.loss.weight.type=noise \
  --config.loss.time.type=uniform
