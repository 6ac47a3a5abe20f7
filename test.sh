#!/usr/bin/env bash
# Run all checks: lint, format, types and import rules first, then all tests (unit, integration, end to end).
# Arguments go to pytest: ./test.sh tests/model, ./test.sh -m "not slow". Without arguments, the tests run in five processes.
# Requirements: README.md ("What the machine needs"), including Debian's chromium and Java. CONTRIBUTING.md: how to run one test in seconds.
set -euo pipefail
cd "$(dirname "$0")"
./infra/test_programs.sh # first, so that a missing program is reported before the long set-up
./setup.sh
./infra/video2dataset_env.sh --spark & # takes half a minute, in parallel with the checks
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
# more processes than a small machine has cores, because end-to-end tests wait a lot
exec python -m tests.forked 5 --dist loadfile --no-loadscope-reorder
