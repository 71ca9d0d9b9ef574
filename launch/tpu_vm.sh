#!/usr/bin/env bash
# Trains on all workers of a TPU VM slice, from any machine that has gcloud. The run goes on when this script has ended.
#
#     gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
#     launch/tpu_vm.sh NAME --zone=ZONE --config=configs/finetune_pairs.py --workdir=gs://bucket/run [-- …]
#     launch/tpu_vm.sh NAME --zone=ZONE --watch        follows worker 0's log until the run ends
#     launch/tpu_vm.sh NAME --zone=ZONE --stop         the run saves and ends on all workers
#
#   --dir=DIR      the checkout on the workers (jaxembed, in the home folder)
#   --gcloud=WORDS further flags of gcloud, such as --gcloud='--project=P --tunnel-through-iap'
#   --config, --workdir, --timeout, --restarts, --dry-run and the environment: docs/launch.md, which also says how to
#   install jaxembed on the workers. PYTHON, JAX_COMPILATION_CACHE_DIR, LIBTPU_INIT_ARGS and XLA_FLAGS are handed on.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option+=([zone]='' [dir]=jaxembed [gcloud]='' [watch]=no [stop]=no)
parse "$@"
[[ ${#words[@]} == 1 ]] || fail "which TPU VM? launch/tpu_vm.sh NAME --config=…"
to_words "${option[gcloud]}" --gcloud
ssh=(gcloud compute tpus tpu-vm ssh "${words[0]}" ${option[zone]:+"--zone=${option[zone]}"} "${parts[@]}")
into="cd $(quoted "${option[dir]}")"

if [[ ${option[watch]} == yes ]]; then
  run "${ssh[@]}" --worker=0 "--command=tail --pid=\$(cat jaxembed.log.pid) -n 100 -F jaxembed.log"
elif [[ ${option[stop]} == yes ]]; then
  run "${ssh[@]}" --worker=all "--command=$into && launch/host.sh --stop"
else
  need_remote
  # Each worker starts its own process again: they find each other anew, and no connection to here is needed.
  remote+=(--detach "--restarts=${option[restarts]}" -- "${flags[@]}")
  run "${ssh[@]}" --worker=all "--command=$into && $(quoted "${remote[@]}")"
fi
