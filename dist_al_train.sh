#!/usr/bin/env bash
# bash dist_al_train.sh <config> <GPUs> [options of al_train.py]
# GPUs=0 trains on the CPU in one process. Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT as for mmseg.
set -euo pipefail
if [ $# -lt 2 ] || [[ ! $2 =~ ^[0-9]+$ ]]; then
    echo "usage: bash dist_al_train.sh <config> <GPUs> [options of al_train.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
printf -v AL_COMMAND '%q ' bash "$0" "$@" # what al_patch says to go on with
export AL_COMMAND

if [ "$GPUS" -eq 0 ]; then
    CUDA_VISIBLE_DEVICES='' AL_DEVICE=cpu exec python "$HERE/al_train.py" "$CONFIG" "${@:3}"
fi
if [ "${NNODES:-1}" -eq 1 ] && [ -z "${PORT:-}" ]; then
    WHERE=(--standalone) # a free port
else
    WHERE=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
fi
# torchrun, but for an error of which all processes fail: it finds in a file what they have to say
exec python -c '
import json, os, sys, tempfile
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
with tempfile.TemporaryDirectory() as folder:
    os.environ["AL_ERRORS"] = folder
    try:
        run.main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    if os.path.exists(f"{folder}/0"):
        print(json.load(open(f"{folder}/0"))[1], file=sys.stderr)
        sys.exit(2)
' "${WHERE[@]}" --nproc_per_node "$GPUS" "$HERE/al_train.py" "$CONFIG" --launcher pytorch "${@:3}"
