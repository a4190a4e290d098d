#!/bin/sh
# Several machines without a scheduler: start this on each of them, with NODE counted from 0.
#   NODES=2 NODE=0 MAIN=10.0.0.1 sh torchrun.sh --config run.yaml
# All machines need the data, the model and the output folder under the same paths, or at least the first one's
# output folder: it writes the checkpoints.
set -e
exec torchrun \
    --nnodes "${NODES:-1}" --node_rank "${NODE:-0}" --nproc_per_node "${GPUS:-8}" \
    --master_addr "${MAIN:-127.0.0.1}" --master_port "${PORT:-29500}" \
    -m preftune dpo "$@"
