#!/usr/bin/env bash
# Train on all GPUs of this machine, or on two CPU processes; RANKS says another number:
#   launch/single_node.sh configs/glint360k_r100.yaml data.path=/data/glint360k
# Exit code: 0 finished, 75 ended by a signal (start the same line again to go on), 70 failed for good, 2 misspelt.
set -euo pipefail
if (($# == 0)); then
    echo "error: no configuration is given: ${0##*/} CONFIG [SECTION.KEY=VALUE]..." >&2
    exit 2
fi
# A rendezvous on the loopback works where the host name doesn't resolve, too (containers).
exec python -m partial_fc.agent --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
    ${RANKS:+--nproc-per-node "$RANKS"} ${RESTARTS:+--max-restarts "$RESTARTS"} -m partial_fc train "$@"
