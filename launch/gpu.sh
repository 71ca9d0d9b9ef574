#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process; or of several, with the same command on each.
#
#     launch/gpu.sh --config=configs/finetune_pairs.py --workdir=runs/first [-- --config.seed=1 …]
#     launch/gpu.sh --nodes=2 --node-rank=0 --coordinator=HOST:PORT --config=… --workdir=/shared/run
#
#   --nodes=N            machines (JAXEMBED_PROCESSES, or 1)
#   --node-rank=I        this one's number, from 0 (JAXEMBED_PROCESS)
#   --coordinator=H:P    an address of machine 0 that all reach, and a free port there (JAXEMBED_COORDINATOR)
#   --config, --workdir, --timeout, --restarts, --dry-run and the environment: docs/launch.md
# For restarts that give the same bits: XLA_FLAGS=--xla_gpu_deterministic_ops=true launch/gpu.sh …
# SIGTERM or Ctrl-C: the run saves and ends; a second one ends it at once.

set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

option+=([nodes]=${JAXEMBED_PROCESSES:-1} [node-rank]=${JAXEMBED_PROCESS-} [coordinator]=${JAXEMBED_COORDINATOR-})
parse "$@"
no_words
need_run
add_gpu_flags
number nodes 1
if ((option[nodes] > 1)); then
  [[ ${option[coordinator]} == *?:+([0-9]) ]] || fail "--coordinator: want HOST:PORT of machine 0"
  number node-rank 0
  ((option[node-rank] < option[nodes])) || fail "--node-rank: machines count from 0; there are ${option[nodes]}"
  surroundings+=(
    "JAXEMBED_COORDINATOR=${option[coordinator]}" "JAXEMBED_PROCESSES=${option[nodes]}"
    "JAXEMBED_PROCESS=${option[node-rank]}"
  )
fi
command_of() { process=(env "${surroundings[@]}" "${train[@]}"); }

supervise 1 || exit "$?"
