#!/usr/bin/env bash
# Whole runs with people on a real Label Studio, and a picture of a task: bash tests/label_studio.sh [FOLDER]
# In the environment of the project with requests. FOLDER keeps Label Studio's environment and data; the picture, of
# headless Chromium if there is one, goes into resources/label_studio.png.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath "${1:-$(mktemp -d)}") port=${LABEL_STUDIO_PORT:-8097}
mkdir -p "$folder"
[ -x "$folder/venv/bin/label-studio" ] || { python3 -m venv "$folder/venv"; "$folder/venv/bin/pip" install -q label-studio==1.23.2; }
rm -rf "$folder/data" "$folder/runs"
mkdir "$folder/data" "$folder/runs"
export LABEL_STUDIO_BASE_DATA_DIR="$folder/data" LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true
export LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/ COLLECT_ANALYTICS=false LATEST_VERSION_CHECK=false SENTRY_DSN='' FRONTEND_SENTRY_DSN=''
env -u PYTHONPATH "$folder/venv/bin/label-studio" start --no-browser --internal-host 127.0.0.1 --port "$port" \
    --username me@example.com --password tiny-tests > "$folder/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
python tests/label_studio.py "http://127.0.0.1:$port" "$folder/runs"
