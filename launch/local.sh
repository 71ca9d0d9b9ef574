#!/usr/bin/env bash
# Trains in N processes on this machine's CPU: to try a run of several processes before paying for it.
#
#     launch/local.sh 2 --devices=2 --config=configs/quickstart.py:tiny --workdir=runs/two [-- --config.seed=1 …]
#
#   N              processes
#   --devices=K    devices of each (1); the mesh has N × K
#   --config, --workdir, --timeout, --restarts, --dry-run and the environment: docs/launch.md
# Process 0 writes as if it were alone; the lines of the others go to standard error as "[1] …".
# SIGTERM or Ctrl-C: the run saves and ends; a second one ends it at once.

set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

option[devices]=1
parse "$@"
need_run
number devices 1
[[ ${#words[@]} == 1 && ${words[0]} =~ ^[1-9][0-9]{0,2}$ ]] || fail "how many processes? launch/local.sh N --config=…"
count=${words[0]}
surroundings+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${option[devices]}")

# A port that nobody listens on.
free_port() {
  port=$((20000 + RANDOM % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 10000)); done
}

command_of() {
  process=(env "${surroundings[@]}" "${train[@]}")
  ((count > 1)) || return 0
  (($1 > 0)) || free_port # another for each start: the last one's may still be held
  process=(
    env "JAXEMBED_COORDINATOR=127.0.0.1:$port" "JAXEMBED_PROCESSES=$count" "JAXEMBED_PROCESS=$1" "${process[@]:1}"
  )
}

supervise "$count" || exit "$?"
