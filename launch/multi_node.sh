#!/usr/bin/env bash
# Train on several machines: the same line on each of them, within a minute. HEAD names one of them, which all others
# reach by this name or address:
#   NODES=2 launch/multi_node.sh HEAD configs/glint360k_r100.yaml data.path=/data/glint360k train.run_dir=/shared/runs
# NODES may be a range: with 1:4 the run goes on with those of four that are there, and HEAD has to be one of them.
# PORT (29500) is the rendezvous's on HEAD, RANKS the processes a machine (its GPUs, or two on CPUs), ADDRESS this
# machine's for the others (that of its route to HEAD), RESTARTS (3) the restarts before the run has failed.
# Exit code: 0 finished, 75 ended by a signal (start the same line again to go on), 70 failed for good, 2 misspelt.
set -euo pipefail
fail() {
    echo "error: $*" >&2
    exit 2
}
head=${1:-}
[[ -n $head && $head != *.yaml && $head != *.yml && $head != -* && $head != *=* ]] ||
    fail "the first argument is '$head', expected the host name or address of one of the machines: ${0##*/} HEAD CONFIG"
[[ -n ${2:-} ]] || fail "no configuration is given: ${0##*/} $head CONFIG [SECTION.KEY=VALUE]..."
[[ ${NODES:-} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
    fail "NODES is '${NODES:-}', expected the number of machines (2) or a range (1:4)"
port=${PORT:-29500}
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || fail "PORT is '$port', expected the number of a free port on $head"
# An IPv6 address takes brackets before a port.
[[ $head == *:* ]] && host="[$head]" || host=$head
shift
exec python -m partial_fc.agent --nnodes "$NODES" --rdzv-endpoint "$host:$port" --rdzv-id "${JOB:-partial_fc}" \
    ${RANKS:+--nproc-per-node "$RANKS"} ${ADDRESS:+--local-addr "$ADDRESS"} ${RESTARTS:+--max-restarts "$RESTARTS"} \
    -m partial_fc train "$@"
