#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: xpk makes a JobSet with a pod for each worker.
#
#     xpk cluster create --cluster=CLUSTER --tpu-type=v5litepod-16 --num-slices=1 --spot --zone=ZONE
#     launch/gke_xpk.sh --cluster=CLUSTER --workload=first --tpu-type=v5litepod-16 --docker-image=IMAGE \
#         --config=configs/finetune_pairs.py --workdir=gs://bucket/run [-- --config.seed=1 …]
#
#   --docker-image=IMAGE holds jaxembed, installed, and its checkout in --dir=DIR (/jaxembed)
#   --grace=SECONDS      that a pod has to save when it is told to go (120; spot machines are gone earlier)
#   --xpk=WORDS          further flags of xpk, such as --xpk='--project=P --zone=Z --priority=high'
#   --restarts=N         starts of the JobSet after failures and preemptions together (3)
#   --config, --workdir, --timeout, --dry-run and the environment: docs/launch.md. PYTHON, JAX_COMPILATION_CACHE_DIR (a
#   gs:// folder: a pod's own disk goes with it), LIBTPU_INIT_ARGS and XLA_FLAGS are handed on.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option+=([cluster]='' [workload]='' [tpu-type]='' [docker-image]='' [dir]=/jaxembed [grace]=120 [xpk]='')
parse "$@"
no_words
for name in cluster workload tpu-type docker-image; do
  [[ -n ${option[$name]} ]] || fail "--$name is missing: launch/gke_xpk.sh --help"
done
number grace 1
to_words "${option[xpk]}" --xpk
need_remote

# The JobSet starts again, not the pod. It takes code 0 for done, so a pod that was told to go says 143 once it has
# saved; xpk starts again after 42 and 127-255, and after the codes that it is given.
remote+=(--restarts=0 --told=143 -- "${flags[@]}")
run xpk workload create "--cluster=${option[cluster]}" "--workload=${option[workload]}" \
  "--tpu-type=${option[tpu-type]}" "--docker-image=${option[docker-image]}" \
  "--max-restarts=${option[restarts]}" --restart-on-exit-codes=3 \
  "--termination-grace-period-seconds=${option[grace]}" "${parts[@]}" \
  "--command=cd $(quoted "${option[dir]}") && exec $(quoted "${remote[@]}")"
