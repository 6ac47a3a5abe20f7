#!/usr/bin/env bash
# Everything that must hold: lint, format, types, import rules, then all tests (unit, integration, end to end).
# Arguments go to pytest: ./test.sh tests/model, ./test.sh -m "not e2e"
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-test-data.lock
./infra/chromium.sh # the browser test drives a real one
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=

ruff check .
ruff format --check .
pyright
lint-imports
exec python -m pytest "$@"
