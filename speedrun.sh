#!/usr/bin/env bash
# The complete pipeline in one command: real videos in, an evaluated and packaged model out. Run it again to resume.
#   ./speedrun.sh [--profile laptop|ci|FILE] [--set PATH=VALUE] [--videos CSV_OR_PARQUET] [--volume DIR] [--cloud emulator] [--port N]
#     [--keep-server]
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
"$root/setup.sh"
export PYTHONDONTWRITEBYTECODE= # many containers set it; then each of the run's hundred processes would compile this checkout again
exec "$root/.venv/bin/fvlm" speedrun "$@"
