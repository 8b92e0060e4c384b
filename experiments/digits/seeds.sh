#!/usr/bin/env bash
# Three seeds of configs/digits.py, then the solver error of the last one: 50 digits at the config's tolerance and at a
# tenth of it. From the repository root, after `make setup`: bash experiments/digits/seeds.sh
set -euo pipefail
bin=${VENV:-.venv}/bin
for seed in 0 1 2; do
  run=runs/digits-seed$seed
  "$bin/jaxdiff" train --config=configs/digits.py --workdir="$run" --config.seed=$seed
  "$bin/jaxdiff" likelihood --workdir="$run" --config.likelihood.seed=$seed
done
for tolerance in 1e-5 1e-6; do
  echo "50 digits at tolerance $tolerance:"
  "$bin/jaxdiff" likelihood --workdir="$run" --config.likelihood.limit=50 --config.likelihood.batch_size=50 \
    --config.likelihood.rtol=$tolerance --config.likelihood.atol=$tolerance
done
