#!/bin/bash
# dpo_jax on hosts that are reached by ssh: one process on each.
#
#     configs/launch/ssh.sh "node1 node2" configs/quickstart.yaml output=/shared/runs/quickstart
#
# Each host has dpo_jax installed and this folder under the same path. The output folder lies on a disk that they share,
# or is each host's own: then the result is on the first, and the run goes on from its checkpoints on the same hosts.
# The first one holds the coordinator; PORT (29500) must be open between them. Ctrl-C here stops all of them.

set -u
read -ra hosts <<< "$1"
shift
words=$(printf ' %q' "$@")
variables="JAX_COORDINATOR_ADDRESS=${hosts[0]}:${PORT:-29500} JAX_NUM_PROCESSES=${#hosts[@]}"
pids=()
for number in "${!hosts[@]}"; do
  ssh -tt -o BatchMode=yes "${hosts[$number]}" \
    "cd $(printf %q "$PWD") && $variables JAX_PROCESS_ID=$number exec ${PYTHON:-python} -m dpo_jax.train$words" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' INT TERM
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit $code
