#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process; started again, it goes on from the newest checkpoint.
#   CONFIG=configs/emoji64.py WORKDIR=/data/runs/emoji64 experiments/gpu_node/train.sh [--config.field=value ...]
set -euo pipefail

: "${CONFIG:?set CONFIG, e.g. CONFIG=configs/emoji64.py}"
: "${WORKDIR:?set WORKDIR, e.g. WORKDIR=/data/runs/emoji64}"
FSDP=${FSDP:-1}
JAXDIFF=${JAXDIFF:-jaxdiff}

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

exec "$JAXDIFF" train --config="$CONFIG" --workdir="$WORKDIR" --launcher=jit --fsdp="$FSDP" "$@"
