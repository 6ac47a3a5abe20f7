#!/usr/bin/env bash
# Everything that must hold: lint, format, types and import rules first, then all tests (unit, integration, end to end).
# Arguments go to pytest: ./test.sh tests/model, ./test.sh -m "not slow". Without any, the tests are spread over five processes.
# Needs what README.md ("What the machine needs") names, Debian's chromium and Java included. CONTRIBUTING.md: one test in seconds.
set -euo pipefail
cd "$(dirname "$0")"
./infra/test_programs.sh # first: what cannot be installed is better known before the set-up than after it
./infra/video2dataset_env.sh --spark & # beside the rest of the set-up, which waits for it
./setup.sh
wait $!
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=

checks() {
    ruff check .
    ruff format --check .
    ty check
    lint-imports
}
if [ $# -gt 0 ]; then
    checks
    ./infra/install.sh .venv --no-deps -r requirements-test-data.lock
    exec python -m pytest "$@"
fi
checks & # while the tests are imported, which takes one core twenty seconds
./infra/install.sh .venv --no-deps -r requirements-test-data.lock
# more processes than small machines have cores: end-to-end tests wait a lot
FVLM_TESTS_BESIDE=$! exec python -m tests.forked 5 --dist loadfile --no-loadscope-reorder
