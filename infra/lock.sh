#!/usr/bin/env bash
# Regenerate requirements.lock: install the newest versions that pyproject.toml allows into an empty environment.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ".[dev]"
{
    echo "# Exact versions of everything: made by ./infra/lock.sh from pyproject.toml; install with ./setup.sh"
    # a CPU build of torch has a version such as 2.13.0+cpu; pip chooses the build on each machine
    "$folder/venv/bin/pip" freeze --all --exclude fvlm --exclude pip | sed -E 's/\+(cpu|cu[0-9]+)$//'
} >requirements.lock
