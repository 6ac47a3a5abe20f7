#!/usr/bin/env bash
# Everything that must hold: lint, format, types and import rules first, then all tests (unit, integration, end to end).
# Arguments go to pytest: ./test.sh tests/model, ./test.sh -m "not slow". Without any, the tests are spread over five processes.
# Needs what README.md ("What the machine needs") names, Debian's chromium and Java included. CONTRIBUTING.md: one test in seconds.
set -euo pipefail
cd "$(dirname "$0")"
./infra/test_programs.sh # first: what cannot be installed is better known before the set-up than after it
./setup.sh
./infra/video2dataset_env.sh --spark & # half a minute, beside the checks
spark=$!
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=

ruff check .
ruff format --check .
ty check
lint-imports
./infra/install.sh .venv --no-deps -r requirements-test-data.lock
if [ $# -gt 0 ]; then
    wait "$spark"
    exec python -m pytest "$@"
fi
# more processes than small machines have cores: end-to-end tests wait a lot
exec python -m tests.forked 5 --dist loadfile --no-loadscope-reorder
