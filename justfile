# Short names for the commands that CONTRIBUTING.md shows. `just` is optional; ./setup.sh puts it at .venv/bin/just.

# some tests in seconds, without set-up or linters: just one tests/data/test_mixture.py
one +tests:
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest {{tests}}

# all tests but the slow ones
quick:
    OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow"

# lint, format, types, import rules
check:
    PATH="$PWD/.venv/bin:$PATH" && ruff check . && ruff format --check . && ty check && lint-imports

# everything: set-up, checks, all tests
test *arguments:
    ./test.sh {{arguments}}

# the pipeline
speedrun *arguments:
    ./speedrun.sh {{arguments}}
