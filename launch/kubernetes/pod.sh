#!/usr/bin/env bash
# What a pod of a run executes: it waits until the pods can meet, then trains as any node does. The arguments are those
# of `partial-fc train`. The manifests beside this file set the variables.
set -euo pipefail
: "${HEAD_HOST:?the name of pod 0}" "${POD_INDEX:?the number of this pod}" "${POD_IP:?the address of this pod}"
export PORT="${PORT:-29500}"
# bash as a container's first process ignores SIGTERM without this.
trap 'exit 143' TERM INT
# torchrun gives up a minute after its start where it finds nobody, and pods may start hours apart.
if [ "$POD_INDEX" = 0 ]; then
    # The name has to mean this pod, not the one before it: by it torchrun knows that it keeps the store.
    until getent ahosts "$HEAD_HOST" | grep -q "^$POD_IP "; do sleep 1; done
else
    until timeout 5 bash -c ": < /dev/tcp/$HEAD_HOST/$PORT" 2>/dev/null; do sleep 1; done
fi
trap - TERM INT
# Nodes that aren't there yet are no failure for a day; 10 minutes unasked.
export PET_RDZV_CONF="${PET_RDZV_CONF:-join_timeout=86400,last_call_timeout=5}"
export ADDRESS="${ADDRESS:-$POD_IP}"
exec "$(dirname "$0")/../multi_node.sh" "$HEAD_HOST" "$@"
