#!/usr/bin/env bash
# Set-up, then the whole pipeline with the Prefect UI, ending at a report. Run it again to resume. Options: ./speedrun.sh --help
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
exec .venv/bin/fvlm speedrun "$@"
