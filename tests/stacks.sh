#!/usr/bin/env bash
# bash tests/stacks.sh <stack> <folder>: the stack in a virtual environment in that folder, then quickstart and tests.
# PYTHON=python3.13 bash tests/stacks.sh python <folder>: with another Python than python3.
set -euo pipefail
STOCK=(mmengine==0.10.7 mmsegmentation==1.2.2)
COMMON=('setuptools<81' wheel ninja ftfy regex scikit-learn pytest hypothesis scikit-image tensorboard)
FORK=(onedl-mmengine==0.10.12 onedl-mmsegmentation==1.4.2)
case "${1:-}" in
    today) PACKAGES=(torch==2.13.0 mmcv-lite==2.1.0 "${STOCK[@]}") ;;
    ops) PACKAGES=(torch==2.13.0 "${STOCK[@]}") OPS=mmcv==2.1.0 ;; # compiles: 7 minutes and more
    mmengine) PACKAGES=(torch==2.13.0 mmcv-lite==2.1.0 mmengine==0.10.3 mmsegmentation==1.2.2) ;;
    python) PACKAGES=(torch==2.13.0 'numpy>=2.5' 'opencv-python>=5' mmcv-lite==2.1.0 "${STOCK[@]}") ;; # Python >= 3.12
    torch) PACKAGES=(torch==2.0.0 'numpy<2' mmcv-lite==2.1.0 "${STOCK[@]}") ;;
    fork) PACKAGES=(torch==2.13.0 onedl-mmcv==2.3.6 "${FORK[@]}") ;; # without ops: pip builds it where torch is not seen
    fork-ops) PACKAGES=(torch==2.13.0 "${FORK[@]}") OPS=onedl-mmcv==2.3.6 ;;
    *) echo "usage: bash tests/stacks.sh today|ops|mmengine|python|torch|fork|fork-ops <folder>" >&2 && exit 2 ;;
esac
FOLDER=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$FOLDER/venv"
# shellcheck disable=SC1091
source "$FOLDER/venv/bin/activate"
pip install -q "${COMMON[@]}" "${PACKAGES[@]}"
if [ -n "${OPS:-}" ]; then # from source, past any wheel without ops that pip has kept, and with torch in sight
    MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --no-binary "${OPS%%=*}" "$OPS"
fi
if [[ $1 == fork* ]]; then # its mmengine looks for the base of a `mmseg::` config in a package of the old name
    cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp -r onedl_mmsegmentation-1.4.2.dist-info mmsegmentation-1.4.2.dist-info
    sed -i 's/^Name: .*/Name: mmsegmentation/' mmsegmentation-1.4.2.dist-info/METADATA
    cd - > /dev/null
fi
python --version
pip list | grep -iE '^(torch|numpy|opencv|(onedl-)?mm)'
bash dist_al_train.sh configs/al_digits.py 0 --work-dir "$FOLDER/al_digits"
python -m pytest tests
