#!/usr/bin/env bash
# What costs how much on a GPU, and whether the choice there is the CPU's: at most nine minutes, steps that are late left
# out.
#
#     bash tests/benchmarks/gpu.sh --collect FOLDER DATA [3.12]  # here: wheels for that Python, pictures of CamVid in DATA
#     bash tests/benchmarks/gpu.sh FOLDER [RESULTS]             # there: with the torch that is there, and no network
#     bash tests/benchmarks/gpu.sh --rehearse FOLDER [RESULTS]  # here: the same in small on a stand-in for the GPU
#
# DATA holds img/{train,val}/*.jpg and ann/{train,val}/*.png. What is collected takes 15 MB and no torch. RESULTS (a new
# folder by default) gets the tables and the logs; the exit code is 1 if a step fails.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
PACKAGES=(mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2 'setuptools<81' addict yapf platformdirs termcolor
    prettytable wcwidth ftfy) # what a machine for torch is apt to lack
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

if [ "${1:-}" = --collect ]; then
    [ $# -ge 3 ] || usage
    mkdir -p "$2/wheels" "$2"/data/{img,ann}/{train,val}
    rm -f "$2"/wheels/*.whl # two versions of a package stop an installation
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${4:-3.12}" -d "$2/wheels" "${PACKAGES[@]}"
    for split in train val; do
        n=100
        [ $split = train ] || n=10
        find "$3/img/$split" -name '*.jpg' | sort | head -n $n | while read -r image; do
            name=$(basename "$image" .jpg)
            cp "$image" "$2/data/img/$split/"
            cp "$3/ann/$split/$name.png" "$2/data/ann/$split/"
        done
    done
    du -sh "$2"
    exit
fi
REHEARSE=
if [ "${1:-}" = --rehearse ]; then
    REHEARSE=--rehearse
    shift
fi
[ $# -ge 1 ] || usage
FOLDER=$(cd "$1" && pwd)
RESULTS=$(mkdir -p "${2:-gpu_results}" && cd "${2:-gpu_results}" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" \
    "$FOLDER"/wheels/*.whl
export PYTHONPATH="$WORK/site:$ROOT:$ROOT/tests:$HERE" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || true
python3 "$HERE/gpu.py" "$FOLDER/data" "$WORK" "$RESULTS" $REHEARSE 2>&1 | tee "$RESULTS/gpu.log"
