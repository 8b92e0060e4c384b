#!/usr/bin/env bash
# Trains in several processes on this machine's CPU, connected over the loopback: a rehearsal of a cluster.
#   experiments/gpu_node/two_processes.sh [--config.field=value ...]
# Exits with 0 if all processes do, else with the code of the first one that did not. SIGTERM is passed on to all.
set -euo pipefail

CONFIG=${CONFIG:-configs/digits.py}
WORKDIR=${WORKDIR:-runs/two_processes}
PROCESSES=${PROCESSES:-2}
PYTHON=${PYTHON:-python3}
JAXDIFF=${JAXDIFF:-jaxdiff}
LAUNCHER=${LAUNCHER:-jit}
FSDP=${FSDP:-1}
PORT=${PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES=${DEVICES:-2}
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

mkdir -p "$WORKDIR"
for ((process = 0; process < PROCESSES; process++)); do
  "$JAXDIFF" train --config="$CONFIG" --workdir="$WORKDIR" --launcher="$LAUNCHER" --fsdp="$FSDP" \
    --coordinator="127.0.0.1:$PORT" --processes="$PROCESSES" --process="$process" "$@" \
    >"$WORKDIR/process_$process.log" 2>&1 &
  pids+=("$!")
done

code=0
for pid in "${pids[@]}"; do
  status=0
  # A signal ends `wait`, not the process waited for.
  while wait "$pid" || status=$?; do
    if ! kill -0 "$pid" 2>/dev/null; then
      break
    fi
    status=0
  done
  if [ "$code" -eq 0 ]; then
    code=$status
  fi
done
tail -n 3 "$WORKDIR"/process_*.log
exit "$code"
