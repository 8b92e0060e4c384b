#!/usr/bin/env bash
# A TPU slice and a training on it: pod.sh create | install | train [flags] | log | stop | delete.
set -euo pipefail

: "${TPU:?set TPU, the name of the slice}"
: "${ZONE:?set ZONE, e.g. ZONE=us-east5-a}"
TYPE=${TYPE:-v5p-128}
VERSION=${VERSION:-v2-alpha-tpuv5}
FSDP=${FSDP:-1}
GCLOUD=${GCLOUD:-gcloud}

on_all() {
  "$GCLOUD" compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    # Spot slices cost less and can be taken away at any time.
    spot=()
    if [ "${SPOT:-0}" = 1 ]; then
      spot=(--spot)
    fi
    "$GCLOUD" compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" "${spot[@]}"
    ;;
  install)
    on_all "mkdir -p ~/jaxdiff-source"
    "$GCLOUD" compute tpus tpu-vm scp --recurse --zone="$ZONE" --worker=all \
      jaxdiff configs pyproject.toml README.md LICENSE "$TPU:~/jaxdiff-source/"
    on_all "python3 -m venv ~/venv && cd ~ && venv/bin/pip install --quiet './jaxdiff-source[train]' 'jax[tpu]'"
    ;;
  train)
    : "${CONFIG:?set CONFIG, e.g. CONFIG=configs/imagenet64.py}"
    : "${WORKDIR:?set WORKDIR to a folder on storage that all workers mount}"
    shift
    flags=$(printf ' %q' train --config="$CONFIG" --workdir="$WORKDIR" --launcher=jit --fsdp="$FSDP" --distributed "$@")
    # `cd ... ;` and not `&&`: the process in the background, whose number is kept for `stop`, is jaxdiff itself.
    on_all "if kill -0 \$(cat ~/train.pid 2>/dev/null) 2>/dev/null; then echo 'a training runs here; stop it first' >&2; exit 1; fi
cd ~/jaxdiff-source; JAX_COMPILATION_CACHE_DIR=$(printf %q "$WORKDIR/../jax_cache") \
nohup ~/venv/bin/jaxdiff$flags >>~/train.log 2>&1 </dev/null & echo \$! >~/train.pid"
    ;;
  log)
    "$GCLOUD" compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="tail -n 100 -F ~/train.log"
    ;;
  stop)
    # Every process saves at the same step and ends with code 143.
    on_all "kill -TERM \$(cat ~/train.pid)"
    ;;
  delete)
    "$GCLOUD" compute tpus tpu-vm delete "$TPU" --zone="$ZONE" --quiet
    ;;
  *)
    echo "usage: TPU=name ZONE=zone pod.sh create | install | train [flags] | log | stop | delete" >&2
    exit 2
    ;;
esac
