#!/usr/bin/env bash
# Train on all GPUs of this machine (or on RANKS CPU processes):
#   launch/single_node.sh configs/glint360k_r100.yaml data.path=/data/glint360k
set -euo pipefail
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
# torchrun of torch 2.13 keeps addresses of dead ranks across restarts without this (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A rendezvous on the loopback works where the host name doesn't resolve, too (containers).
# A process that dies is started again (RESTARTS times), and the run goes on from its last commit; SIGUSR1 is passed on, as SIGTERM is.
exec torchrun --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
    --max-restarts "${RESTARTS:-3}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m partial_fc train "$@"
