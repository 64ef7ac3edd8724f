#!/bin/bash
# dpo_jax on a slice of Cloud TPUs: the same command on each of its hosts, which find each other by themselves.
#
#     configs/launch/tpu.sh NAME ZONE configs/quickstart.yaml output=/shared/runs/quickstart
#
# NAME is a TPU VM that exists (gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16
# --version=v2-alpha-tpuv5-lite). The output folder lies on a disk that the hosts share; where they have none, give
# output=runs/NAME checkpoint.folder=gs://BUCKET/NAME export.push=gs://BUCKET/NAME/model, which also outlast the machine.
# On a cluster of GKE the same command goes through XPK:
#
#     xpk workload create --cluster=my-cluster --workload=dpo-jax --tpu-type=v5litepod-16 \
#       --docker-image=dpo_jax:tpu --command="python -m dpo_jax.train configs/quickstart.yaml output=/shared/runs/quickstart"

set -eu
name=$1 zone=$2
shift 2
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
gcloud compute tpus tpu-vm scp --recurse --zone="$zone" --worker=all . "$name:dpo_jax"
on_all "cd dpo_jax && pip install --quiet '.[tpu,gcs]'"
on_all "cd dpo_jax && python -m dpo_jax.train$(printf ' %q' "$@")"
