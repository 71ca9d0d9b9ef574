#!/usr/bin/env bash
# Trains in one process on this machine, whose place in the run the platform knows: tpu_vm.sh starts this on every
# worker, gke_xpk.sh in every pod. On a single TPU machine it may be called by hand.
#
#     launch/host.sh --config=configs/finetune_pairs.py --workdir=gs://bucket/run [-- --config.seed=1 …]
#
#   --detach       runs on when the terminal closes, writes to ~/jaxembed.log
#   --stop         tells the detached run to save and end, and waits for it
#   --told=CODE    exit code after SIGTERM, when the run has saved (0)
#   --config, --workdir, --timeout, --restarts, --dry-run and the environment: docs/launch.md

set -euo pipefail
# shellcheck source=launch/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

option+=([detach]=no [stop]=no [told]=0)
log=$HOME/jaxembed.log

# Whether the detached run is alive; a number that another program has by now does not count.
running() { [[ -r $log.pid ]] && grep -qa host.sh "/proc/$(<"$log.pid")/cmdline" 2>/dev/null; }

parse "$@"
no_words
if [[ ${option[stop]} == yes ]]; then
  running || { say "no run on this machine" && exit 0; }
  said=$(wc -c <"$log") # before it is told: what it writes at once counts too
  kill -TERM "$(<"$log.pid")"
  tail --pid="$(<"$log.pid")" -c "+$((said + 1))" -F "$log"
  exit 0
fi

need_run
number told 0
command_of() { process=(env JAXEMBED_START=auto "${surroundings[@]}" "${train[@]}"); }

if [[ ${option[detach]} == yes && ${option[dry-run]} == no ]]; then
  ! running || fail "a run is under way on this machine: launch/host.sh --stop"
  setsid nohup "${BASH_SOURCE[0]}" "--restarts=${option[restarts]}" "--timeout=${option[timeout]}" \
    "--told=${option[told]}" "${train[@]:3:2}" -- "${flags[@]}" >>"$log" 2>&1 </dev/null &
  echo "$!" >"$log.pid"
  say "process $! writes to $log"
  exit 0
fi

code=0
supervise 1 || code=$?
((code || ! told)) || code=${option[told]}
exit "$code"
